"""train_mlx.py as a process: what a run leaves behind, what it refuses, how it ends when it fails.

`test_the_file_as_it_stands` is about the file as it stands, after any night. The others need to know its text, so they edit
the copy in tests/pinned.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import PINNED, ROOT, Dataset, program, summary_of
from pinned import train_mlx

SOURCE = (PINNED / "train_mlx.py").read_text()


def run(tmp_path: Path, data: Dataset, source: str = SOURCE, **env: str):
    """Train `source` as a real process on the tiny dataset; returns the finished process and the run directory."""
    (tmp_path / "train_mlx.py").write_text(source)
    env = {"AUTORESEARCH_DATA": str(data.train), "AUTORESEARCH_RUN_DIR": str(tmp_path / "run"), "AUTORESEARCH_SCORE": "0",
           "AUTORESEARCH_BUDGET": "2steps", **env}
    return program("train_mlx.py", home=data.home, cwd=tmp_path, **env), tmp_path / "run"


def changed(before: str, after: str, source: str = SOURCE) -> str:
    assert before in source
    return source.replace(before, after)


def with_constant(source: str, **values: object) -> str:
    """The source with other values of its constants."""
    for name, value in values.items():
        source, found = re.subn(rf"^{name} = (?:{{[^}}]*}}\[TIER\]|[^#\n]*)[^#\n]*", f"{name} = {value}  ", source, flags=re.M)
        assert found == 1
    return source


SMALL = with_constant(SOURCE, NGRAM_BUCKETS="(997, 1009, 1013)", BATCH_TOKENS=256)


def test_the_file_as_it_stands_trains_and_is_scored(tmp_path: Path, tiny: Dataset) -> None:
    """Whatever a night has made of it: the probes accept it, and it has learnt something in 12 steps."""
    done = program(ROOT / "train_mlx.py", home=tiny.home, AUTORESEARCH_DATA=str(tiny.train), AUTORESEARCH_BUDGET="12steps",
                   AUTORESEARCH_RUN_DIR=str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert 0 < float(summary_of(done.stdout)["val_bpb"]) < 4


def test_a_run_leaves_what_the_scorer_needs(tmp_path: Path, tiny: Dataset) -> None:
    process, out = run(tmp_path, tiny, AUTORESEARCH_BUDGET="30steps")
    assert process.returncode == 0, process.stderr
    facts = json.loads((out / "train.json").read_text())
    assert facts["num_steps"] == 30
    assert facts["total_tokens"] == 30 * train_mlx.BATCH_TOKENS
    assert facts["tier"] == train_mlx.TIER
    assert facts["expected_vram_mb"] == pytest.approx(facts["peak_vram_mb"], rel=0.15)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line) == {"step", "tokens", "seconds", "progress", "loss", "lr", "tokens_per_second", "mfu_percent",
                             "memory_mb"} for line in lines)
    assert (lines[-1]["step"], lines[-1]["tokens"]) == (30, facts["total_tokens"])
    assert lines[-1]["loss"] < np.log(320) - 0.5
    start, progress = process.stdout.split("expected:")[0], process.stdout.rsplit("step", 1)[1]
    for word in (f"{train_mlx.TIER}: ", "TFLOP/s", "depth 2, width 128", "M parameters", "MFLOPs per token", "accumulation"):
        assert word in start
    assert re.search(r"expected: [\d.e+-]+ epochs, peak memory [\d,]+ MB", process.stdout)
    assert "30 (100 %)" in progress
    logits = train_mlx.load_model(out)(np.zeros((2, 8), np.int32))
    assert logits.shape == (2, 8, 320)
    assert logits.dtype == np.float32


def test_a_name_that_the_scorer_would_not_find_is_refused_before_the_training(tmp_path: Path, tiny: Dataset) -> None:
    (tmp_path / "mine.py").write_text(SMALL)
    done = program("mine.py", home=tiny.home, cwd=tmp_path, AUTORESEARCH_DATA=str(tiny.train))
    assert done.returncode == 2
    assert "expected a file named train_*.py, which the scorer looks for, got mine.py; rename it" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_command_line_says_what_the_variables_say_and_wins_over_them(tmp_path: Path, tiny: Dataset) -> None:
    (tmp_path / "train_mlx.py").write_text(SMALL)
    env = {"AUTORESEARCH_DATA": str(tiny.train), "AUTORESEARCH_SCORE": "0", "AUTORESEARCH_BUDGET": "90steps"}
    done = program("train_mlx.py", "--budget", "2steps", "--seed", "7", "--run-dir", "mine", home=tiny.home, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "mine" / "train.json").read_text())
    assert (facts["budget"], facts["num_steps"], facts["seed"]) == ("2steps", 2, 7)


@pytest.mark.parametrize(("words", "code", "said"), [
    (["--help"], 0, "--budget"), (["--budgt", "5s"], 2, "unrecognized arguments: --budgt"), (["5s"], 2, "arguments: 5s"),
    (["--budget", "5 minutes"], 2, "expected something like 300s"), (["--seed", "x"], 2, "check --data"),
    (["--data", "nowhere"], 2, "nowhere"),
])
def test_an_argument_is_read_or_refused(tmp_path: Path, tiny: Dataset, words: list[str], code: int, said: str) -> None:
    (tmp_path / "train_mlx.py").write_text(SMALL)
    done = program("train_mlx.py", *words, home=tiny.home, cwd=tmp_path, AUTORESEARCH_DATA=str(tiny.train))
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_same_seed_trains_the_same_weights(tmp_path: Path, tiny: Dataset) -> None:
    weights = []
    for name, seed in (("a", "4"), ("b", "4"), ("c", "5")):
        (tmp_path / name).mkdir()
        process, out = run(tmp_path / name, tiny, SMALL, AUTORESEARCH_SEED=seed)
        assert process.returncode == 0, process.stderr
        weights.append((out / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_dropout_and_n_grams_follow_the_epoch(tmp_path: Path, tiny: Dataset) -> None:
    """Three steps an epoch, as the text is told to be three batches long."""
    source = changed("        params, moments, loss = step_fn(", "        print('RATES', float(rates.get('dropout', 0)), "
                     "'first_epoch' in rates)\n        params, moments, loss = step_fn(", SMALL)
    source = changed("// run.epoch_tokens", "// (3 * batch_tokens)", source)
    process, _ = run(tmp_path, tiny, source, AUTORESEARCH_BUDGET="8steps")
    assert process.returncode == 0, process.stderr
    said = [line.split("RATES ")[1].split() for line in process.stdout.splitlines() if "RATES" in line]
    first, second, third = train_mlx.DROPOUT[:3]
    assert [float(rate) for rate, _ in said] == pytest.approx([first] * 3 + [second] * 3 + [third] * 2)
    assert [now for _, now in said] == ["True"] * 3 + ["False"] * 5


@pytest.mark.parametrize("tier", ["mac", "mac-max", pytest.param("cuda", marks=pytest.mark.slow)])
def test_another_tiers_constants_can_be_asked_for(tmp_path: Path, tiny: Dataset, tier: str) -> None:
    """Its model and optimizer on this machine, tables and batch made small."""
    process, out = run(tmp_path, tiny, changed("range(2)", "range(1)", SMALL), AUTORESEARCH_BUDGET="1steps", AUTORESEARCH_TIER=tier)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"{tier}: ")
    assert json.loads((out / "config.json").read_text())["n_layer"] == {"mac": 3, "mac-max": 4, "cuda": 8}[tier]


def test_an_unknown_tier_is_told_with_those_there_are(tmp_path: Path, tiny: Dataset) -> None:
    process, _ = run(tmp_path, tiny, AUTORESEARCH_TIER="laptop")
    assert process.returncode != 0
    assert process.stderr.endswith("error: AUTORESEARCH_TIER=laptop: expected one of cpu, mac, mac-max, cuda\n")


def test_a_budget_shorter_than_a_step_still_trains_one(tmp_path: Path, tiny: Dataset) -> None:
    process, out = run(tmp_path, tiny, SMALL, AUTORESEARCH_BUDGET="0.001s")
    assert process.returncode == 0, process.stderr
    assert json.loads((out / "train.json").read_text())["num_steps"] == 1


def test_a_diverging_run_ends_at_once_with_its_name(tmp_path: Path, tiny: Dataset) -> None:
    source = changed("    return p - lr * direction, m, v", "    return p * mx.inf, m, v", SMALL)
    process, out = run(tmp_path, tiny, source, AUTORESEARCH_BUDGET="100000steps")
    assert process.returncode == 3, process.stderr
    error = json.loads((out / "error.json").read_text())
    assert error["kind"] == "nan"
    assert re.match(r"the loss became nan at step \d,", error["message"])
    assert not (out / "train.json").exists()


def test_a_run_that_diverges_without_nan_ends_as_well(tmp_path: Path, tiny: Dataset) -> None:
    source = changed("    return p - lr * direction, m, v", "    return 1.5 * p - lr * direction, m, v", SMALL)
    process, out = run(tmp_path, tiny, source, AUTORESEARCH_BUDGET="100000steps")
    assert process.returncode == 3, process.stderr
    message = json.loads((out / "error.json").read_text())["message"]
    loss, mean = map(float, re.findall(r"\d+\.\d+", message)[:2])
    assert np.log(320) + train_mlx.ABORT_LOSS < mean < loss < 1e4


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(tmp_path: Path, tiny: Dataset) -> None:
    """And what the refusal says is taken at its word."""
    source = changed("limit, held = memory_limit(), ", "limit, held = 100 << 20, ")
    source = with_constant(source, NGRAM_BUCKETS="()", BATCH_TOKENS="2**14", MICRO_TOKENS="2**14")
    process, out = run(tmp_path, tiny, source)
    assert process.returncode == 4, process.stdout + process.stderr
    error = json.loads((out / "error.json").read_text())
    assert error["kind"] == "oom"
    assert "this device has 0.10; the largest that fits: MICRO_TOKENS = " in error["message"]
    process, out = run(tmp_path, tiny, with_constant(source, MICRO_TOKENS=error["message"].split(" = ")[1]))
    assert process.returncode == 0, process.stderr
    assert json.loads((out / "train.json").read_text())["peak_vram_mb"] < 1.15 * 100


def test_a_model_that_does_not_fit_is_refused_with_the_largest_that_does(tmp_path: Path, tiny: Dataset) -> None:
    """Before it is made, as these weights would not fit into any machine; and what it says is taken at its word."""
    source = with_constant(changed("limit, held = memory_limit(), ", "limit, held = 100 << 20, "), NGRAM_BUCKETS="()")
    process, out = run(tmp_path, tiny, with_constant(source, DEPTH=100))
    assert process.returncode == 4, process.stdout + process.stderr
    message = json.loads((out / "error.json").read_text())["message"]
    fits = int(re.search(r"the largest that fits: DEPTH = (\d+),", message)[1])
    assert 2 <= fits < 12
    process, _ = run(tmp_path, tiny, with_constant(source, DEPTH=fits, BATCH_TOKENS=64), AUTORESEARCH_BUDGET="1steps")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(("line", "kind", "exit_code"), [("np.zeros(1 << 50)", "oom", 4), ("1 / 0", "crash", 1)])
def test_out_of_memory_is_told_apart_from_a_crash(tmp_path: Path, tiny: Dataset, line: str, kind: str, exit_code: int) -> None:
    anchor = "    probe, probe_flops = matmul_probe()\n"
    process, out = run(tmp_path, tiny, changed(anchor, f"    {line}\n{anchor}"))
    assert process.returncode == exit_code, process.stderr
    assert json.loads((out / "error.json").read_text())["kind"] == kind
    assert "Traceback" in process.stderr
