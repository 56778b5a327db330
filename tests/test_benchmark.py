"""Speed and peers: the ablation's edits fit the file, a peer gets the scorer's score, and one comparison runs to its end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PINNED, ROOT, Dataset, environment, prepare
from pinned import train_mlx

from scripts import benchmark, compare_peers, peer_shim
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
                          cwd=ROOT, env=environment(tiny.home), capture_output=True, text=True, timeout=120)
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
