"""scripts/sample.py: text from a trained model, whichever night it comes from."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Dataset, program

from agent.journal.journal import Journal
from scripts.sample import Options, generate

SAMPLE = ROOT / "scripts" / "sample.py"


def uniform(ids: list[int]) -> np.ndarray:
    """A model of five tokens: 3 is likeliest, then 2; never 4."""
    return np.log(np.array([0.1, 0.1, 0.3, 0.5, 1e-9]))


def test_temperature_top_p_seed_and_the_stop_token() -> None:
    def drawn(**more: float) -> list[int]:
        options = Options(**{"tokens": 200, "temperature": 1.0, "top_p": 1.0, "seed": 1, **more})
        return list(generate(uniform, [0], 9, options))

    assert set(drawn(temperature=0.0)) == {3}
    assert set(drawn(top_p=0.6)) == {2, 3}
    assert set(drawn()) == {0, 1, 2, 3}
    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)
    assert list(generate(uniform, [0], 3, Options(200, 0.0, 1.0, 1))) == []


CACHED = r"""
import sys
from pathlib import Path
from harness.machine import load_fast_blas
load_fast_blas(threads=1)
import numpy as np
from scripts import sample
run_dir, context = Path(sys.argv[1]), 32
cached = sample.model(run_dir, context)
passes, logits_of = [], cached.logits_of
cached.logits_of = lambda row: passes.append(row.shape[1]) or logits_of(row)
options = sample.Options(40, 0.0, 1.0, 1)  # past the context
with_cache = list(sample.generate(cached, list(range(3, 13)), -1, options))
widths = passes[:]
plain = sample.Uncached(logits_of, context)
assert with_cache == list(sample.generate(plain, list(range(3, 13)), -1, options))
difference = max(np.abs(sample.Cached(logits_of, context, cached.module)(ids) - plain(ids)).max()
                 for ids in ([5], list(range(9)), list(range(31))))
print(cached.used, sum(width < context for width in widths), max(w for w in widths if w < context), f"{difference:.1e}")
"""


def test_the_cache_gives_the_models_own_text_with_short_passes(trained: Path, tiny: Dataset) -> None:
    used, short, widest, difference = program("-c", CACHED, trained, home=tiny.home).stdout.split()
    assert used == "True"
    assert int(short) == 23, "all tokens that fit the context: 10 are given"
    assert int(widest) == 16
    assert float(difference) < 1e-4


@pytest.mark.parametrize("change", [
    ("mx.fast.rope(t, D, traditional=False, base=self._rope_base, scale=-1.0, offset=0)",
     "(t + mx.arange(T).reshape(1, 1, T, 1) / 32)"),  # positions of its own
    ('mask="causal")', "mask=mx.arange(T) <= mx.arange(T)[:, None])"),
    ("y = attention(q, k, v, scale=D**-0.5, mask=\"causal\")", "y = mx.cumsum(v, axis=2)"),  # no attention at all
])
def test_a_model_that_the_cache_does_not_fit_writes_without_it(trained: Path, tiny: Dataset, tmp_path: Path, change) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    source = (run_dir / "train_mlx.py").read_text()
    assert change[0] in source
    (run_dir / "train_mlx.py").write_text(source.replace(*change))
    done = program("-c", CACHED.replace("difference = max", "difference = 0 and max"), run_dir, home=tiny.home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False")


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
