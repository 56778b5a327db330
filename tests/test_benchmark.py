"""Speed and peers: the ablation's edits fit the file, a peer gets the scorer's score, and the comparisons run to their end.

What needs PyTorch, the parity of the two train files above all, is in train/test_torch.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
import pytest
from click.testing import CliRunner
from conftest import PINNED, ROOT, Dataset, environment, prepare
from pinned import train_mlx

from harness.machine import find_dtype
from scripts import benchmark, compare_backends, compare_peers, meters, peer_shim
from scripts.ablations import ABLATIONS, ADAMW_FOR_ALL, BASE
from scripts.benchmark import OURS, edited, variant
from scripts.compare_peers import Failed, adapt

SOURCE = (PINNED / "train_mlx.py").read_text()
PEER = """
import mlx.core as mx
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb
import time
DEPTH = 9  # layers
ASPECT_RATIO = 64
HEAD_DIM = 128
WINDOW_PATTERN = "SSSL" # windows
TOTAL_BATCH_SIZE = 2**19 # tokens
DEVICE_BATCH_SIZE = 128
mx.random.seed(42)
tokenizer = Tokenizer.from_directory()
assert tokenizer.decode(tokenizer.encode("a house")) == "a house"
loader = make_dataloader(tokenizer, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, "train")
counts, began = mx.ones(tokenizer.get_vocab_size()), time.time()
for _ in range(4):
    x, y, epoch = next(loader)
    counts = counts.at[y.reshape(-1)].add(1.0)
    mx.eval(counts)
print("val_bpb:", evaluate_bpb(lambda x: mx.broadcast_to(mx.log(counts), (*x.shape, counts.size)), tokenizer, 1), DEPTH, x.shape)
"""


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_edits_of_an_ablation_fit_the_file(name: str) -> None:
    assert ABLATIONS[name][0] in ABLATIONS
    changed = variant(SOURCE, name)
    assert (changed == variant(SOURCE, BASE)) == (name == BASE)
    compile(changed, name, "exec")


def test_the_anchor_fits_the_file() -> None:
    compile(edited(adapt(SOURCE, OURS), ADAMW_FOR_ALL), "anchor", "exec")


def test_an_edit_that_no_longer_fits_says_so() -> None:
    with pytest.raises(Failed, match=r"no longer has the text 'gone'"):
        edited(SOURCE, [("gone", "")])


def test_a_peer_is_adapted_and_a_missing_constant_is_an_error() -> None:
    source = 'DEPTH = 8 # layers\ntorch.manual_seed(42)\nx = g.bfloat16().to(torch.bfloat16)\nif dtype == "cuda":\n'
    expected = 'DEPTH = 2  # layers\ntorch.manual_seed(7)\nx = g.float().to(torch.float32)\nif dtype == "cuda":\n'
    assert adapt(source, {"DEPTH": 2}, seed=7) == expected
    assert "bfloat16" in adapt(source, {}, fp32=False)
    with pytest.raises(Failed, match=r"expected a line `HEAD_DIM = \.\.\.`"):
        adapt(source, {"HEAD_DIM": 32})


def test_a_constant_is_replaced_with_all_that_stands_on_its_line() -> None:
    source = 'A = {"cpu": 1024,\n     "mac": 3072}[TIER] * DEPTH  # tokens\nB = {"cpu": 1}[TIER]  # b\nC = 2 # c\n'
    assert compare_peers.with_constants(source, {"A": 5, "B": 6, "C": 7}) == "A = 5  # tokens\nB = 6  # b\nC = 7  # c\n"


@pytest.mark.slow
def test_a_peer_gets_the_score_that_the_scorer_gives(tiny: Dataset, trained: Path) -> None:
    scored = prepare("score", trained, home=tiny.home)
    ours = float(re.search(r"^val_bpb: +(\S+)", scored.stdout, re.M)[1])
    assert peer_shim.bits_per_byte(train_mlx.load_model(trained), tiny.held) == pytest.approx(ours, abs=1e-6)


def test_a_comparison_runs_to_its_end(tiny: Dataset, tmp_path: Path) -> None:
    for name, source in (("good", PEER), ("bad", PEER.replace("import time", "import no_such_module"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(source)
    done = subprocess.run([sys.executable, "scripts/compare_peers.py", "--budget", "0.4s", "--seeds", "1", "--setup", "cpu",
                           "--peer", f"good={tmp_path / 'good'}", "--peer", f"bad={tmp_path / 'bad'}",
                           "--peer-python", os.path.relpath(sys.executable, ROOT), "--json", tmp_path / "out.json"],
                          cwd=ROOT, env=environment(tiny.home, AUTORESEARCH_DATA=str(tiny.train)),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["ours"]["summary"]["n"] == results["good cpu"]["summary"]["n"] == 1
    assert 1 < results["good cpu"]["summary"]["mean"] < 5  # of counted tokens
    assert results["good cpu"]["summary"]["tokens"] == 3 * 1024
    assert "no_such_module" in results["bad cpu"]["failures"][0]
    assert "failed" in done.stdout


def test_an_interpreter_that_is_none_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="expected a Python interpreter, got no/such, which is no program here"):
        compare_peers.interpreter(None, None, "no/such")


def test_steps_are_timed_and_memory_is_counted(tiny: Dataset) -> None:
    report = benchmark.measure_ours(SOURCE, tiny.train, 8)
    assert report["tokens"] >= 7 * train_mlx.BATCH_TOKENS
    assert report["tokens_per_second"] > 0
    assert 1 < report["framework_mb"] < report["process_mb"]


# ----------------------------------------------------------------------------------------------------------------------
# Compare
# ----------------------------------------------------------------------------------------------------------------------

WINDOWS = {"forward": 0.010, "gradients": 0.031, "step": 0.045, "training": 0.046}


def measured(rate: float, **more: object) -> dict:
    """A report of a leg."""
    return {"tokens_per_second": rate, "mfu_percent": 40.0, "product_tflops": 0.1, "framework_mb": None, "process_mb": 300.0,
            "import_seconds": 1.0, "seconds": WINDOWS, "first_seconds": {"step": 2.0}, "drift": 0.01, "swapped_mb": 0.0,
            "energy": {"untold": "no meter"}, "pieces_ms": {"Muon": 1.25}, "others_percent": 4.0, "round": 0, **more}


def in_turn(*rates: float, **more: object) -> list[dict]:
    """Reports of a leg, one a round."""
    return [measured(rate, round=i, **more) for i, rate in enumerate(rates)]


def lost(*losses: float, gradient: float = 0.0) -> dict:
    """A report of parity."""
    return {"losses": list(losses), "gradients": {"wte.weight": 0.0, "lm_head.weight": gradient}}


def test_the_parts_of_a_step_add_up_to_it() -> None:
    """Also where the windows of a round come out in another order, as on a loaded machine."""
    rounds = [measured(1, seconds={k: s * f for k, s in WINDOWS.items()}) for f in (1, 2, 3)]
    rounds[1]["seconds"]["forward"] = 9.0
    found = compare_backends.medians(rounds)
    assert sum(found["parts_ms"].values()) == pytest.approx(found["step_ms"])
    parts = compare_backends.split(WINDOWS)
    assert parts == pytest.approx({"forward": 10, "backward": 21, "optimizer": 14, "loader": 1})
    assert sum(parts.values()) == pytest.approx(46)


def test_an_interval_needs_six_values_and_covers_the_median() -> None:
    assert compare_backends.interval([1.0] * 5) is None
    assert compare_backends.interval([5.0, 1, 6, 3, 2, 4]) == (1, 6)                   # misses with 2 / 2**6 = 3 %
    assert compare_backends.interval(list(range(10))) == (1, 8)                        # misses with 2 * 11 / 2**10 = 2 %


def test_a_winner_is_named_only_if_the_interval_excludes_one() -> None:
    found = compare_backends.ratios({"a": in_turn(*[100.0] * 6), "fast": in_turn(*range(110, 116)), "slow": in_turn(*range(90, 96)),
                              "even": in_turn(90, 95, 99, 101, 105, 110), "few": in_turn(200, 210)}, "a")
    assert {name: r["faster"] for name, r in found.items()} == {"fast": "fast", "slow": "a", "even": None, "few": None}
    assert found["fast"]["median"] == pytest.approx(1.125)


def test_on_a_loaded_machine_nobody_wins() -> None:
    """Its scheduler decides: with twice as many threads as free cores one framework was seen at a sixth of the other's speed."""
    reports = {"a": in_turn(*[100.0] * 6, others_percent=90.0), "fast": in_turn(*range(600, 606), others_percent=90.0)}
    assert compare_backends.ratios(reports, "a")["fast"]["faster"] is None


def test_a_round_that_one_leg_lacks_is_no_pair() -> None:
    found = compare_backends.ratios({"a": in_turn(100, 200, 100), "b": [measured(100, round=0), measured(100, round=2)]}, "a")
    assert found["b"]["pairs"] == [1, 1]


@pytest.mark.parametrize(("dtype", "other", "passed"), [
    ("fp32", lost(6.9, 5.0004, 4.0), True), ("fp32", lost(6.9, 5.0006, 4.0), False), ("fp32", lost(6.9, math.nan, 4.0), False),
    ("bf16", lost(6.9, 5.05, 4.0), True), ("fp32", lost(6.9, 5.0, 4.0, gradient=9e-5), True),
    ("fp32", lost(6.9, 5.0, 4.0, gradient=2e-4), False), ("fp32", lost(6.9, 5.0, 4.0, gradient=math.nan), False)])
def test_a_leg_whose_losses_or_gradients_are_off_may_not_be_timed(dtype: str, other: dict, passed: bool) -> None:
    found = compare_backends.parity({"mlx-cpu": lost(6.9, 5.0, 4.0), "cpu": other}, dtype)
    assert found["mlx-cpu"]["passed"]
    assert found["cpu"]["passed"] == passed
    if not passed and other["gradients"]["lm_head.weight"]:
        assert found["cpu"]["gradient"] == "lm_head.weight"


@pytest.mark.parametrize(("report", "problem"), [
    ({}, ""), ({"drift": -0.031}, "a matrix product changed its speed by -3%"),
    ({"swapped_mb": 70.0, "drift": 0.5}, "the machine wrote 70 MB to swap"), ({"swapped_mb": 0.5}, "")])
def test_a_leg_is_repeated_where_the_machine_swapped_or_changed_its_speed(report: dict, problem: str) -> None:
    assert compare_backends.spoiled(measured(1, **report), max_drift=3) == problem


def test_a_leg_that_swaps_twice_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that swaps once is measured again, one that fails is asked no more."""
    monkeypatch.setattr(compare_backends, "others_percent", lambda: 1.0)
    said: list[str] = []
    shared = compare_backends.Comparison(tmp_path, tmp_path, "cpu", "fp32", {}, compare_backends.CPU_PACE, said.append)
    swaps, asked = {"mlx-cpu": [9.0] * 4, "cpu": [9.0, 0.0, 0.0]}, []

    def start(leg: str, do: str, **settings: object) -> dict:
        asked.append((leg, do))
        if leg == "cuda":
            raise Failed("exit code 1: ...\nno such device\n")
        return measured(100, swapped_mb=swaps[leg].pop(0))
    monkeypatch.setattr(shared, "start", start)
    timed: dict[str, list[dict]] = {}
    shared.time(["mlx-cpu", "cpu", "cuda"], 2, timed)
    assert [r["round"] for r in timed["cpu"]] == [0, 1]
    assert "mlx-cpu" not in timed
    assert "in round 2 the machine wrote 9 MB to swap: thrown away" in shared.failed["mlx-cpu"]
    assert asked.count(("cuda", "times")) == 1
    assert "cuda failed: no such device" in said


def test_growth_is_told_as_an_exponent() -> None:
    assert compare_backends.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert compare_backends.exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)


def test_a_comparison_writes_table_picture_and_json(tmp_path: Path) -> None:
    """With a leg that failed and one that wasn't timed."""
    energy = {"watts": 20.0, "joules_per_1000_tokens": 4.5, "source": "a meter"}
    reports = {"mlx-cpu": in_turn(100, 120, energy=energy), "cpu": [measured(200.0, drift=0.2), measured(300.0, round=1)]}
    checked = {leg: {"fp32": p, "passed": p["passed"]} for leg, p in compare_backends.parity(
        {"mlx-cpu": lost(1.0), "cpu": lost(1.0, gradient=2e-5), "mps": lost(2.0)}, "fp32").items()}
    result = {
        "machine": {"processor": "A processor", "cores": 2, "memory_gb": 8.0, "system": "Linux", "mlx": "1",
                    "threads": "all", "conditions": ["it runs on its battery"]}, "date": "2026-01-01",
        "parity": checked, "missing": ["no compiler"], "interrupted": True,
        "settings": {"tier": "cpu", "dtype": "fp32", "data": "d", "rounds": 2, "steps": 3, "repeats": 1, "warmup": 1,
                     "max_drift": 3, "constants": {"DROPOUT": "(0.0,)"},
                     "batch_tokens": 2048, "passes": 2, "seq_len": 128, "flops_per_token": 5e6, "parameters": 3e6},
        "legs": {name: compare_backends.medians(r) for name, r in reports.items()},
        "ratios": compare_backends.ratios(reports, "mlx-cpu"),
        "failed": {"cuda": "RuntimeError: no such device"}, "reports": reports,
        "equal_steps": {"budget": "9steps", "legs": {"mlx-cpu": {"val_bpb": 1.47}, "cpu": {"val_bpb": 1.5}},
                        "difference": 0.02, "agree": False},
        "equal_seconds": {"budget": "9s", "legs": {"cpu": {"val_bpb": 1.25, "num_steps": 1234}}}}
    compare_backends.write(result, tmp_path, "x")
    assert json.loads((tmp_path / "x.json").read_text())["legs"]["cpu"]["tokens_per_second"] == 250
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "x.md").read_text()
    for words in ("| tokens/s, median | 110 | 250 |", "| backward | 21.0 | 21.0 |", "| val_bpb after 9steps | 1.4700 | 1.5000 |",
                  "| steps in 9s | - | 1,234 |", "| Muon alone, ms | 1.25 | 1.25 |", "| energy, J per 1,000 tokens | 4.50 | - |",
                  "Energy of mlx-cpu: a meter.", "Energy of cpu is not told: no meter.", "No compiler.", "It was interrupted",
                  "at most 4 %. No leg counts in which the machine swapped", "About this machine: it runs on its battery.",
                  "1 losses in fp32 within 0.0e+00 and gradients within 2.0e-05 (lm_head.weight) (tolerance 1e-04).",
                  "in both files DROPOUT = (0.0,).", "2.25 times the tokens/s, too few rounds", "one is wrong", "cpu 20%",
                  "Parity of mps: 1 losses in fp32 within 1.0e+00 and gradients within 0.0e+00 (wte.weight) (tolerance 1e-03): "
                  "failed, so it was not timed.",
                  "cuda failed: RuntimeError: no such device"):
        assert words in text, words
    busy = {leg: [r | {"others_percent": 70.0} for r in own] for leg, own in reports.items()}
    assert any("a loaded machine" in line for line in compare_backends.sentences(result | {"reports": busy}))


@pytest.mark.parametrize("place", sorted((ROOT / "docs" / "benchmarks").glob("*.json")), ids=lambda place: place.stem)
def test_a_published_page_says_what_its_json_says(place: Path) -> None:
    """And neither names a folder of the machine."""
    text, page = place.read_text(), place.with_suffix(".md").read_text()
    assert not re.search(r"/(home|Users|work|tmp|root|private|var)/", text + page)
    assert place.with_suffix(".png").is_file()
    result = json.loads(text)
    figures = [f"{leg[key]:,.0f}" for leg in result["legs"].values() for key in ("tokens_per_second", "lowest", "highest")]
    figures += [f"{leg['step_ms']:.1f}" for leg in result["legs"].values()]
    figures += [f"{ratio['median']:.2f} times the tokens/s" for ratio in result["ratios"].values()]
    figures += [f"{run['val_bpb']:.4f}" for key in ("equal_steps", "equal_seconds") for run in result[key]["legs"].values()]
    assert len(figures) > 8
    assert [figure for figure in figures if figure not in page] == []


def test_a_backend_that_is_not_here_is_refused_with_those_that_are() -> None:
    refused = CliRunner().invoke(benchmark.main, ["compare", "--backends", "mlx-cpu,abacus"])
    assert refused.exit_code == 2
    assert re.search(r"abacus: expected some of those that this machine has:.* mlx-cpu", refused.output.replace("\n", " "))


@pytest.mark.parametrize("words", [["--out", "/proc/nowhere"], ["--constant", "DEPTH"], ["--equal-steps", "many"]])
def test_what_would_fail_in_the_end_is_refused_at_once(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_backends, "available", lambda: (["mlx-cpu"], []))
    refused = CliRunner().invoke(benchmark.main, ["compare", "--backends", "mlx-cpu", *words])
    assert refused.exit_code == 2
    assert {"--out": "/proc/nowhere can't be written", "--constant": "expected NAME=VALUE, got DEPTH",
            "--equal-steps": "budget 'many': expected something like 300s"}[words[0]] in refused.output


def test_a_framework_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_backends.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    here, missing = compare_backends.available()
    assert "mlx-cpu" in here
    assert missing == ["PyTorch is not installed (scripts/setup.sh torch installs it)"]


@pytest.mark.parametrize("stage", ["parity", "times", "train"])
def test_ctrl_c_keeps_what_was_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """In the check of parity there is nothing yet; in the second round the first one counts, in a training both do."""
    monkeypatch.setattr(compare_backends, "others_percent", lambda: 1.0)
    shared = compare_backends.Comparison(tmp_path, tmp_path, "cpu", "fp32", {}, compare_backends.CPU_PACE, lambda text: None)
    shape = dict.fromkeys(("batch_tokens", "passes", "seq_len", "flops_per_token", "parameters"), 1)
    done: list[str] = []

    def start(leg: str, do: str, *_: object, **__: object) -> dict:
        if do == stage and (do != "times" or "times" in done):
            raise KeyboardInterrupt
        done.append(do)
        return {"save_weights": shape, "parity": lost(5.0, 4.0)}.get(do) or measured(100.0, **shape)
    monkeypatch.setattr(shared, "start", start)

    def compare() -> dict:
        return shared.measure(["cpu"], 2, {"equal_steps": "1steps"}, sweep=False)
    if stage == "parity":
        with pytest.raises(KeyboardInterrupt):
            compare()
        return
    result = compare()
    assert result["interrupted"]
    assert result["legs"]["cpu"]["rounds"] == (1 if stage == "times" else 2)


def test_without_prepared_data_the_command_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    refused = CliRunner().invoke(benchmark.main, ["ablation"])
    assert refused.exit_code == 1
    assert "expected prepared data, found none: run `python prepare_mlx.py" in refused.output


def test_one_backend_is_measured_and_trained(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_backends, "TRAIN_FILE", PINNED / "train_mlx.py")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tiny.home))
    monkeypatch.setattr(compare_backends, "others_percent", lambda: 3.0)  # without waiting for a second
    monkeypatch.setattr(compare_backends, "available", lambda: (["mlx-cpu"], []))
    monkeypatch.setattr(compare_backends, "SWEEP", (1, 2))
    small = [word for constant in ("DEPTH=1", "WIDTH=64", "SEQ_LEN=32", "BATCH_TOKENS=256", "NGRAM_BUCKETS=(97,)")
             for word in ("--constant", constant)]
    done = CliRunner().invoke(benchmark.main, [
        "compare", "--backends", "mlx-cpu", "--data", str(tiny.train), *small, "--rounds", "1", "--steps", "2",
        "--equal-steps", "3steps", "--equal-seconds", "0", "--sweep", "--out", str(tmp_path), "--name", "x"])
    assert done.exit_code == 0, done.output
    written = (tmp_path / "x.json").read_text() + (tmp_path / "x.md").read_text()
    assert not [private for private in (str(ROOT), str(tmp_path), str(tiny.home)) if private in written]
    result = json.loads((tmp_path / "x.json").read_text())
    assert len(result["parity"]["mlx-cpu"]["fp32"]["losses"]) == 10
    (report,) = result["reports"]["mlx-cpu"]
    assert report["batch_tokens"] == 256
    assert report["seq_len"] == 32
    assert report["tokens_per_second"] == pytest.approx(256 / report["seconds"]["training"])
    assert 0 < report["framework_mb"] < report["process_mb"]
    assert report["pieces_ms"].keys() == {"attention", "norm", "Muon", "n-gram rows"}
    assert min(report["pieces_ms"].values()) > 0
    assert report["swapped_mb"] < 1e6
    assert report["energy"].keys() in ({"untold"}, {"watts", "joules_per_1000_tokens", "source"})
    assert report["others_percent"] == 3
    assert {what: legs["mlx-cpu"]["sizes"] for what, legs in result["sweep"].items()} == {
        "depth": [1, 2], "batch": [256, 512], "row length": [32, 64]}
    assert result["equal_steps"]["legs"]["mlx-cpu"]["num_steps"] == 3
    assert 1 < result["equal_steps"]["legs"]["mlx-cpu"]["val_bpb"] < 10


def test_upstreams_attention_without_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "kernels", None)
    for name in ("get_device_capability", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    peer_shim.without_hopper()
    attend = sys.modules["kernels"].get_kernel("any").flash_attn_interface.flash_attn_func
    q, k, v = torch.randn(3, 1, 9, 2, 4)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 2
    for window in (9, 3):
        seen = torch.ones(9, 9).tril().triu(-window).bool()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        expected = torch.einsum("bhts,bshd->bthd", weights, v)
        assert torch.allclose(attend(q, k, v, causal=True, window_size=(window, 0)), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Dtype: measured and remembered
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rates", "chosen"), [
    ({"bfloat16": [100, 101], "float32": [99, 98]}, "bfloat16"),
    ({"bfloat16": [100, 101], "float32": [120, 119]}, "float32"),
    ({"bfloat16": [100, 101], "float32": [103, 104]}, "bfloat16"),  # too little
    ({"bfloat16": [100, 125], "float32": [120, 130]}, "bfloat16"),  # not in each round
    ({"bfloat16": [100, 101], "float16": [150, 151], "float32": [90, 91]}, "float16"),
    ({"bfloat16": [], "float32": [90, 91]}, "float32")])
def test_another_dtype_has_to_be_clearly_faster(rates: dict[str, list[float]], chosen: str) -> None:
    assert benchmark.fastest(rates) == chosen


def test_a_measured_dtype_is_what_trainings_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "new"))
    monkeypatch.delenv("AUTORESEARCH_DTYPES", raising=False)
    place = benchmark.remember("Apple M1 mlx", "float32")
    assert benchmark.remember("Apple M1 mps torch", "float16") == place
    assert (find_dtype("Apple M1 mlx"), find_dtype("Apple M1 mps torch")) == ("float32", "float16")
    benchmark.remember("Apple M1 mlx", "bfloat16")
    assert json.loads(place.read_text()) == {"Apple M1 mps torch": "float16"}
    place.write_text("{damaged")
    benchmark.remember("Apple M1 mlx", "float32")
    assert find_dtype("Apple M1 mlx") == "float32"


@pytest.fixture
def dtype_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """`benchmark.py dtype` on a machine with these backends, in a data home of its own: what it writes as JSON."""
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    monkeypatch.delenv("AUTORESEARCH_DTYPES", raising=False)

    def run(data: Path, *backends: str) -> dict:
        monkeypatch.setattr(benchmark, "available", lambda: (list(backends), []))
        arguments = ["dtype", "--rounds", "1", "--steps", "3", "--data", str(data), "--json", str(tmp_path / "out.json")]
        done = CliRunner().invoke(benchmark.main, arguments)
        assert done.exit_code == 0, done.output
        told = json.loads((tmp_path / "out.json").read_text())
        assert told["said"] in done.output
        return told
    return run


@pytest.mark.slow
def test_dtypes_are_measured_by_training_and_a_cpu_remembers_none(
        tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype_command: Callable[..., dict]) -> None:
    source = compare_peers.with_constants(SOURCE, {"DEPTH": 1, "WIDTH": 64, "BATCH_TOKENS": 256, "NGRAM_BUCKETS": "()"})
    monkeypatch.setattr(benchmark, "TRAIN_FILE", tmp_path / "train_mlx.py")
    (tmp_path / "train_mlx.py").write_text(source)
    told = dtype_command(tiny.train, "mlx-cpu")
    assert all(len(rates) == 1 and rates[0] > 0 for rates in told["tokens_per_second"].values())
    assert told["tokens_per_second"].keys() == {"bfloat16", "float16", "float32"}
    assert told["device"].endswith(" mlx")
    assert "nothing is changed" in told["said"]
    assert not (tmp_path / "dtypes.json").exists()


@pytest.mark.parametrize(("fp16", "fp32", "dtype"), [
    (120.0, 150.0, "float32"), (150.0, 99.0, "float16"), (98.0, 101.0, "bfloat16")])
def test_a_gpu_that_is_faster_in_another_dtype_computes_in_it_from_then_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype_command: Callable[..., dict], fp16: float, fp32: float, dtype: str,
) -> None:
    """The line of the train file that chooses the dtype is run as on a GPU."""
    monkeypatch.setattr(benchmark, "TRAIN_FILE", PINNED / "train_mlx.py")
    rates = {"mx.bfloat16": 100.0, "mx.float16": fp16, "mx.float32": fp32}

    def trained(source: str, *_: object) -> dict:
        (found,) = [rate for name, rate in rates.items() if re.search(rf"^DTYPE = {name} ", source, re.M)]
        return {"tokens_per_second": found, "framework_mb": 1.0, "process_mb": 1.0, "device": "Apple M1 mlx"}
    monkeypatch.setattr(benchmark, "measure_ours", trained)

    def chosen(device: str) -> object:
        line = re.search(r"^DTYPE = (.*)$", SOURCE, re.M)[1]
        return eval(line, {"mx": mx, "GPU": True, "find_dtype": find_dtype, "device_name": lambda: device})
    assert chosen("Apple M1 mlx") == mx.bfloat16
    told = dtype_command(tmp_path, "mlx", "mlx-cpu")
    assert told["chosen"] == dtype
    assert chosen("Apple M1 mlx") == getattr(mx, dtype)
    assert chosen("Apple M3 mlx") == mx.bfloat16
    assert (f"computes in {dtype} on Apple M1 mlx from now on" in told["said"]) == (dtype != "bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# Meters
# ---------------------------------------------------------------------------------------------------------------------


def test_rapl_adds_the_packages_up_and_its_counters_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "RAPL", tmp_path)
    with pytest.raises(meters.Untold, match="has no RAPL counters"):
        meters.Rapl()
    for name, value in (("intel-rapl:0", 900_000), ("intel-rapl:1", 5_000_000), ("intel-rapl:0:0", 77)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000\n")
    meter = meters.Rapl()
    assert meter.joules() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000")  # wrapped
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("7000000")
    assert meter.joules() == pytest.approx(0.2 + 2.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # root may read a file without permissions, not a folder
    with pytest.raises(meters.Untold, match="read by root only; `sudo chmod"):
        meters.Rapl()


MACMON = """#!/bin/sh
echo '{"cpu_power": 4.0, "all_power": 20.0, "sys_power": 30.0}'
echo '{"cpu_power": 4.0, "all_power": 10.0, "sys_power": 30.0}'
"""


@pytest.fixture
def macmon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, first in PATH, still to be written."""
    (tmp_path / "macmon").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "macmon"


def test_macmons_power_is_added_up_over_time(macmon: Path) -> None:
    macmon.write_text(MACMON + "exec sleep 60\n")
    meter = meters.Macmon()
    try:
        while meter.watts != 10:
            time.sleep(0.01)
        before, start = meter.joules(), time.monotonic()
        time.sleep(0.2)
        assert meter.joules() - before == pytest.approx(10 * (time.monotonic() - start), rel=0.2)
    finally:
        meter.close()


def test_a_macmon_that_ends_tells_no_energy(macmon: Path) -> None:
    macmon.write_text(MACMON + "while [ ! -e $0.end ]; do sleep 0.01; done\n")
    meter = meters.Macmon()
    Path(f"{macmon}.end").touch()
    meter.follower.join(10)
    assert math.isnan(meter.joules())
    meter.close()


def test_without_power_from_macmon_the_energy_is_not_told(macmon: Path) -> None:
    macmon.write_text("#!/bin/sh\necho no Apple chip\n")
    with pytest.raises(meters.Untold, match="gives no power here"):
        meters.Macmon()
    macmon.unlink()
    with pytest.raises(meters.Untold, match="brew install macmon"):
        meters.Macmon()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to make a library that acts NVML's part")
def test_nvmls_counter_is_read_in_joules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvml.c").write_text("""
static int index; static unsigned long long energy = 1500;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **handle) { index = i; *handle = &index; return i < 4 ? 0 : 2; }
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *mj) {
    if (handle != &index) return 2;
    if (index == 3) return 3;
    *mj = energy; energy += 2000; return 0; }
""")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "nvml.so", tmp_path / "nvml.c"], check=True)
    monkeypatch.setattr(meters, "NVML", str(tmp_path / "nvml.so"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    meter = meters.energy_meter(on_cuda=True)
    before = meter.joules()
    assert meter.joules() - before == 2
    for devices, why in (("3", "no energy counter"), ("7", "no access to GPU 7"), ("MIG-1", "no access to GPU MIG-1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        with pytest.raises(meters.Untold, match=why):
            meters.Nvml()
    monkeypatch.setattr(meters, "NVML", str(tmp_path / "none.so"))
    with pytest.raises(meters.Untold, match="no access"):
        meters.Nvml()


def test_a_mac_tells_what_it_swapped_and_that_it_has_no_fan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (("vm_stat", "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPageouts:   9.\nSwapouts:   3.\n"),
                       ("system_profiler", "Hardware:\n      Model Name: MacBook Air\n")):
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'E'\n{said}E\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(meters, "MAC", True)
    assert meters.swapped_out() == 3 * 16384
    assert any(line.startswith("no fan") for line in meters.conditions())
    monkeypatch.setattr(meters, "MAC", False)
    assert meters.swapped_out() >= 0
    assert 0 <= meters.others_percent(0.05) <= 100
