"""scripts/sample.py: text from a trained model, whichever night it comes from."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Dataset, program

from agent.journal.journal import Journal
from scripts.sample import Options, generate

SAMPLE = ROOT / "scripts" / "sample.py"


def uniform(row: np.ndarray) -> np.ndarray:
    """A model of five tokens: 3 is likeliest, then 2; never 4."""
    return np.broadcast_to(np.log(np.array([0.1, 0.1, 0.3, 0.5, 1e-9])), (*row.shape, 5))


def test_temperature_top_p_seed_and_the_stop_token() -> None:
    def drawn(**more: float) -> list[int]:
        options = Options(**{"tokens": 200, "temperature": 1.0, "top_p": 1.0, "seed": 1, **more})
        return list(generate(uniform, [0], 4, 9, options))

    assert set(drawn(temperature=0.0)) == {3}
    assert set(drawn(top_p=0.6)) == {2, 3}
    assert set(drawn()) == {0, 1, 2, 3}
    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)
    assert list(generate(uniform, [0], 4, 3, Options(200, 0.0, 1.0, 1))) == []


def night(folder: Path, run_dir: Path) -> None:
    """A night whose baseline and best have this run directory."""
    with Journal(folder) as journal:
        journal.append("night_start", tag="night", base="b", train_file="train_mlx.py", seed=1, dataset={})
        for n in range(2):
            journal.append("experiment", n=n, parent="b")
            journal.append("candidate", n=n, commit=f"c{n}", ast="a", lines=1, description="", usage={}, seconds=0.0)
            journal.append("trial_start", n=n, k=0, seed=1, dir=f"000{n}-1")
            journal.append("trial_end", n=n, k=0, seed=1, dir=f"000{n}-1", status="ok", val_bpb=2.0 - n, summary={}, seconds=1.0,
                           error=None)
            journal.append("verdict", n=n, status="keep", reason="", val_bpb=2.0 - n, description="", error=None, usage={},
                           seconds=0.0)
            shutil.copytree(run_dir, folder / "trials" / f"000{n}-1")


def test_a_model_continues_a_prompt_and_the_best_of_a_night_is_found(trained: Path, tiny: Dataset, tmp_path: Path) -> None:
    def sample(*words: object):
        return program(SAMPLE, *words, "--tokens", 12, home=tiny.home, cwd=tmp_path, COLUMNS="120")

    alone = sample(trained, "--prompt", "Über")
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("Über")
    assert len(alone.stdout) > len("Über\n")
    assert "there is no night" in sample().stderr
    night(tmp_path / "runs" / "night", trained)
    best = sample("--prompt", "Über")
    assert best.stdout == alone.stdout
    assert "experiment 1 of the night night, val_bpb 1.0000" in best.stderr
    both = sample("--compare", "--prompt", "Über")
    assert "baseline, val_bpb 2.0000" in both.stdout
    assert both.stdout.count("Über") >= 2
    shutil.rmtree(tmp_path / "runs" / "night" / "trials")
    assert "no run folder of experiment 1 is left" in sample().stderr


@pytest.mark.parametrize(("words", "said"), [(["nowhere"], "does not exist"), ([".", "--compare"], "expected RUN_DIR alone"),
                                             (["."], "expected the directory of a finished training")])
def test_what_is_no_model_is_said(words: list[str], said: str, tiny: Dataset, tmp_path: Path) -> None:
    done = program(SAMPLE, *words, home=tiny.home, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
