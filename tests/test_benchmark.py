"""Speed and peers: the ablation's edits fit the file, a peer gets the scorer's score, and the comparisons run to their end.

What needs PyTorch, the parity of the two train files above all, is in train/test_torch.py.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import PINNED, ROOT, Dataset, environment, prepare
from mlx.utils import tree_flatten
from pinned import train_mlx

from scripts import benchmark, compare_peers, leg, peer_shim
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
                           "--json", tmp_path / "out.json"],
                          cwd=ROOT, env=environment(tiny.home, AUTORESEARCH_DATA=str(tiny.train)),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["ours"]["summary"]["n"] == results["good cpu"]["summary"]["n"] == 1
    assert 1 < results["good cpu"]["summary"]["mean"] < 5  # of counted tokens
    assert results["good cpu"]["summary"]["tokens"] == 3 * 1024
    assert "no_such_module" in results["bad cpu"]["failures"][0]
    assert "failed" in done.stdout


def test_the_score_is_reached_at_the_shortest_budget_that_beats_it() -> None:
    results = {name: {"summary": {"mean": mean}} for name, mean in (("ours", 1.0), ("slow", 2.0), ("fast", 0.9))}
    lines = compare_peers.speedrun(results, {10.0: 2.1, 15.0: 1.9, 30.0: 1.5}, 60.0)
    assert lines == ["slow: 2.0000 after 60 s; ours is below after 15 s, 1/4.0 of the time",
                     "fast: 0.9000 after 60 s; ours is not below"]


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
            "import_seconds": 1.0, "seconds": WINDOWS, "first_seconds": {"step": 2.0}, "drift": 0.01, **more}


def test_flops_are_those_of_both_files_own_count() -> None:
    model = train_mlx.GPT(train_mlx.GPTConfig(vocab_size=320, n_layer=3))
    shapes = {name: p.shape for name, p in tree_flatten(model.parameters())}
    assert leg.flops_per_token(shapes, 77) == model.flops_per_token(77)


def test_the_parts_of_a_step_add_up_to_it() -> None:
    parts = benchmark.split(WINDOWS)
    assert parts == pytest.approx({"forward": 10, "backward": 21, "optimizer": 14, "loader": 1})
    assert sum(parts.values()) == pytest.approx(46)


def test_an_interval_needs_six_values_and_covers_the_median() -> None:
    assert benchmark.interval([1.0] * 5) is None
    assert benchmark.interval([5.0, 1, 6, 3, 2, 4]) == (1, 6)                   # misses with 2 / 2**6 = 3 %
    assert benchmark.interval(list(range(10))) == (1, 8)                        # misses with 2 * 11 / 2**10 = 2 %


def test_a_winner_is_named_only_if_the_interval_excludes_one() -> None:
    def reports(*rates: float) -> list[dict]:
        return [measured(rate) for rate in rates]

    base = reports(*[100.0] * 6)
    found = benchmark.ratios({"a": base, "fast": reports(*range(110, 116)), "slow": reports(*range(90, 96)),
                              "even": reports(90, 95, 99, 101, 105, 110), "few": reports(200, 210)}, "a")
    assert {name: r["faster"] for name, r in found.items()} == {"fast": "fast", "slow": "a", "even": None, "few": None}
    assert found["fast"]["median"] == pytest.approx(1.125)


def test_a_leg_whose_losses_are_off_may_not_be_timed() -> None:
    first = [6.9, 5.0, 4.0]
    found = benchmark.parity({"mlx-cpu": first, "cpu": [6.9, 5.0004, 4.0]}, "fp32")
    assert found["cpu"]["passed"]
    assert not benchmark.parity({"mlx-cpu": first, "cpu": [6.9, 5.0006, 4.0]}, "fp32")["cpu"]["passed"]
    assert not benchmark.parity({"mlx-cpu": first, "cpu": [6.9, math.nan, 4.0]}, "fp32")["cpu"]["passed"]
    assert benchmark.parity({"mlx": first, "mps": [6.9, 5.05, 4.0]}, "bf16")["mps"]["passed"]


def test_growth_is_told_as_an_exponent() -> None:
    assert benchmark.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert benchmark.exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)


def test_a_comparison_writes_table_picture_and_json(tmp_path: Path) -> None:
    """With a leg that failed and one that wasn't timed."""
    reports = {"mlx-cpu": [measured(100.0), measured(120.0)], "cpu": [measured(200.0, drift=0.2), measured(300.0)]}
    result = {
        "machine": {"processor": "A processor", "cores": 2, "memory_gb": 8.0, "system": "Linux", "mlx": "1",
                    "threads": "all"}, "date": "2026-01-01",
        "load": 3.0, "parity": benchmark.parity({"mlx-cpu": [1.0], "cpu": [1.0], "mps": [2.0]}, "fp32"),
        "settings": {"tier": "cpu", "dtype": "fp32", "data": "d", "rounds": 2, "steps": 3, "repeats": 1, "warmup": 1,
                     "max_drift": 3, "batch_tokens": 2048, "passes": 2, "seq_len": 128, "flops_per_token": 5e6, "parameters": 3e6},
        "legs": {name: benchmark.medians(r) for name, r in reports.items()}, "ratios": benchmark.ratios(reports, "mlx-cpu"),
        "failed": {"cuda": "exit code 1: ...\nRuntimeError: no such device"}, "reports": reports,
        "equal_steps": {"budget": "9steps", "legs": {"cpu": {"val_bpb": 1.5}}, "difference": 0.02, "agree": False}}
    benchmark.write(result, tmp_path, "x")
    assert json.loads((tmp_path / "x.json").read_text())["legs"]["cpu"]["tokens_per_second"] == 250
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "x.md").read_text()
    for words in ("| tokens/s, median | 110 | 250 |", "| backward | 21.0 | 21.0 |", "| val_bpb after 9steps | - | 1.5000 |",
                  "a loaded machine", "2.25 times the tokens/s, too few rounds", "one is wrong", "cpu 20%",
                  "Parity of mps: 1 losses within 1.0e+00 (tolerance 1e-03): failed, so it was not timed.",
                  "cuda failed: RuntimeError: no such device"):
        assert words in text, words


def test_a_backend_that_is_not_here_is_refused_with_those_that_are() -> None:
    refused = CliRunner().invoke(benchmark.main, ["compare", "--backends", "mlx-cpu,abacus"])
    assert refused.exit_code == 2
    assert re.search(r"abacus: expected some of those that this machine has:.* mlx-cpu", refused.output.replace("\n", " "))


def test_without_prepared_data_the_command_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    refused = CliRunner().invoke(benchmark.main, ["ablation"])
    assert refused.exit_code == 1
    assert "expected prepared data, found none: run `python prepare_mlx.py" in refused.output


def test_one_backend_is_measured_and_trained(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "TRAIN_FILE", PINNED / "train_mlx.py")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tiny.home))
    small = [word for constant in ("DEPTH=1", "WIDTH=64", "BATCH_TOKENS=256", "NGRAM_BUCKETS=(97,)")
             for word in ("--constant", constant)]
    done = CliRunner().invoke(benchmark.main, [
        "compare", "--backends", "mlx-cpu", "--data", str(tiny.train), *small, "--rounds", "1", "--steps", "2", "--repeats", "1",
        "--warmup", "1", "--equal-steps", "3steps", "--equal-seconds", "0", "--out", str(tmp_path), "--name", "x"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "x.json").read_text())
    assert len(result["parity"]["mlx-cpu"]["losses"]) == 10
    (report,) = result["reports"]["mlx-cpu"]
    assert report["batch_tokens"] == 256
    assert report["seq_len"] == 32
    assert report["tokens_per_second"] == pytest.approx(256 / report["seconds"]["training"])
    assert 0 < report["framework_mb"] < report["process_mb"]
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
