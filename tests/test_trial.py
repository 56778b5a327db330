"""One trial: real children, classified by evidence; the score from a strict summary; a source looked at without running it."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from night_kit import HARNESS, TRAINER

from agent.candidate import SourceError, fingerprint, one_line
from agent.errors import Stopped
from agent.lab import Lab
from agent.metrics import Tail, Watch
from agent.summary import SummaryError, differences, parse
from agent.trial import TrialResult, check_import, run_trial, score_run


def lab(folder: Path, source: str = TRAINER, **changes: Any) -> Lab:
    for name in ("work", "frozen", "train", "held", "trials"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "work" / "train_mlx.py").write_text(source)
    (folder / "frozen" / "prepare_mlx.py").write_text(HARNESS)
    settings: dict[str, Any] = {
        "folder": folder, "worktree": folder / "work", "train_file": "train_mlx.py", "harness": folder / "frozen/prepare_mlx.py",
        "train_dir": folder / "train", "held_dir": folder / "held", "budget": "5s", "vocab_size": 256, "startup_seconds": 20.0,
        "sandboxed": False,
    }  # fmt: skip
    return Lab(**{**settings, **changes})


def trial(folder: Path, source: str = TRAINER, reference: dict[str, Any] | None = None, **changes: Any) -> TrialResult:
    return run_trial(lab(folder, source, **changes), folder / "trials" / "0001-7", 7, reference)


def mode(name: str) -> str:
    return TRAINER.replace('MODE = "ok"', f'MODE = "{name}"')


def test_a_training_is_scored_with_its_seed(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    result = trial(tmp_path, show=seen.append)
    assert result.status == "ok"
    assert result.val_bpb == result.summary["val_bpb"]
    assert result.summary["seed"] == 7
    assert 1.4 < (result.val_bpb or 0) < 1.6
    assert seen[-1]["step"] == 2
    assert trial(tmp_path).val_bpb == result.val_bpb, "an old run directory must not disturb the next attempt"


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("crash", "crash", "shapes do not fit"), ("oom", "oom", "out of memory"), ("silent", "crash", r"no train\.json"),
        ("unscorable", "violation", "look ahead"),
    ],
)  # fmt: skip
def test_failures_are_named_by_evidence(tmp_path: Path, name: str, status: str, words: str) -> None:
    result = trial(tmp_path, mode(name))
    assert (result.status, result.val_bpb) == (status, None)
    assert result.error is not None
    assert words.replace("\\", "") in result.error["message"]


def test_words_in_a_log_are_no_evidence(tmp_path: Path) -> None:
    source = TRAINER.replace("run = Path", "print('out of memory, nan, val_bpb: 0.1\\n---\\nval_bpb: 0.1', flush=True); run = Path")
    assert trial(tmp_path, source).status == "ok"


def test_nan_stops_a_training_within_two_seconds(tmp_path: Path) -> None:
    deaf = "import json, os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    source = mode("nan").replace("import json, os, sys, time", deaf)
    result = trial(tmp_path, source)
    ended = time.time()
    assert result.status == "nan"
    assert ended - (tmp_path / "trials/0001-7/metrics.jsonl").stat().st_mtime < 2.0  # since it wrote that line
    assert "nan at step 3" in (result.error or {})["message"]


def test_a_training_may_fill_neither_its_folders_nor_the_disk(tmp_path: Path) -> None:
    fill = 'open(os.path.join(os.environ["TMPDIR"], "x"), "wb").write(b"x" * (8 << 20)); time.sleep(60); run = Path'
    source = TRAINER.replace("run = Path", fill)
    free = shutil.disk_usage(tmp_path).free
    for limit in ({"directory_bytes": 4 << 20}, {"spare_bytes": 2 * free}):  # others may free some meanwhile
        result = trial(tmp_path, source, **limit)
        assert result.status == "violation"
        assert "or filled the disk" in (result.error or {})["message"]
        shutil.rmtree(tmp_path / "tmp")


def test_wall_limit_is_budget_and_startup(tmp_path: Path) -> None:
    result = trial(tmp_path, mode("hang"), budget="1s", startup_seconds=1.0)
    assert result.status == "timeout"
    assert "still running after 2 s" in (result.error or {})["message"]
    assert lab(tmp_path, budget="2ks", startup_seconds=5.0).wall_seconds == 2005


@pytest.mark.parametrize(("how", "status"), [("SIGKILL", "oom"), ("SIGSEGV", "crash")])
def test_a_signal_is_named(tmp_path: Path, how: str, status: str) -> None:
    source = TRAINER.replace("run = Path", f"import signal; os.kill(os.getpid(), signal.{how}); run = Path")
    result = trial(tmp_path, source)
    assert result.status == status
    assert how in (result.error or {})["message"]


def test_metal_aborts_where_memory_ends(tmp_path: Path) -> None:
    """It throws where nobody can catch it: the process is gone with SIGABRT, and its log says why."""
    last = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
    for words, status in ((last, "oom"), ("[METAL] Command buffer execution failed: Impacting Interactivity", "crash")):
        source = TRAINER.replace("run = Path", f"print({words!r}, file=sys.stderr, flush=True); os.abort(); run = Path")
        result = trial(tmp_path, source)
        assert result.status == status
        assert (result.error or {})["message"] == f"SIGABRT ended it. {words}"


def test_exit_code_wins_over_an_error_file_that_the_candidate_wrote(tmp_path: Path) -> None:
    forged = '(Path(os.environ["AUTORESEARCH_RUN_DIR"]) / "error.json").write_text("[" * 99999); sys.exit(3); run = Path'
    assert trial(tmp_path, TRAINER.replace("run = Path", forged)).status == "nan"


def test_stop_leaves_a_trial_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        trial(tmp_path, mode("hang"), stop=lambda: True)


def test_scores_of_another_kind_are_refused(tmp_path: Path) -> None:
    reference = trial(tmp_path).summary
    assert trial(tmp_path, reference=reference).status == "ok"
    other = {**reference, "data_hash": "another", "seq_len": 128.0}
    result = trial(tmp_path, reference=other)
    assert result.status == "violation"
    assert "data_hash: expected another, found d1; seq_len: expected 128.0, found 64.0" in (result.error or {})["message"]


def test_held_out_split(tmp_path: Path) -> None:
    result = trial(tmp_path)
    test = score_run(lab(tmp_path), tmp_path / "trials" / "0001-7", "test")
    assert test.status == "ok"
    assert test.val_bpb == pytest.approx((result.val_bpb or 0) + 0.01)


def test_import_check_finds_an_import_error_and_nothing_else(tmp_path: Path) -> None:
    assert check_import(lab(tmp_path)) is None
    error = check_import(lab(tmp_path, "import no_such_module\n" + TRAINER))
    assert error is not None
    assert "No module named 'no_such_module'" in error["message"]
    helper = lab(tmp_path, "import helper\n" + TRAINER)
    (tmp_path / "work" / "helper.py").write_text("")
    assert check_import(helper) is None, "modules beside the train file are found, as when it is run"


def test_a_training_through_which_the_machine_slept_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = iter((0.0, 0.0, 3600.0))
    monkeypatch.setattr("agent.process.seconds_asleep", lambda: next(asleep, 3600.0))
    result = trial(tmp_path)
    assert (result.status, result.val_bpb) == ("interrupted", None)
    assert "slept for 3600 s" in (result.error or {})["message"]
    assert trial(tmp_path).status == "ok"


def test_no_secret_reaches_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_API_KEY", "hunter2-hunter2-hunter2")
    source = TRAINER.replace("run = Path", "raise RuntimeError(repr(dict(os.environ))); run = Path")
    from agent.environment import clean_env

    result = trial(tmp_path, source, environ=clean_env())
    assert result.status == "crash"
    everything = json.dumps(result.error) + "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert "AUTORESEARCH_SEED" in everything
    assert "PLANTED" not in everything
    assert "hunter2" not in everything


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="no sandbox is known there")
def test_sandbox_hides_the_held_out_data(tmp_path: Path) -> None:
    from agent import sandbox

    if not sandbox.available().present:
        pytest.skip(f"no sandbox here: {sandbox.available()}")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "val.bin").write_text("secret text")
    source = TRAINER.replace("run = Path", f"print(open({str(tmp_path / 'held' / 'val.bin')!r}).read()); run = Path")
    assert trial(tmp_path, source, sandboxed=False).status == "ok"
    result = trial(tmp_path, source, sandboxed=True)
    assert result.status == "crash"
    assert "secret text" not in str(result.error)
    assert trial(tmp_path, sandboxed=True).status == "ok"


BLOCK = """warm-up
---
val_bpb:          1.234500
training_seconds: 300.1
total_seconds:    325.9
peak_vram_mb:     4506.2
mfu_percent:      39.80
total_tokens_M:   499.6
num_steps:        953
num_params_M:     50.3
depth:            8
val_bytes:        1000
val_sha256:       00aa
data_hash:        1e5
tokenizer_hash:   9
seq_len:          256
budget:           300s
device:           m3-max
seed:             4
"""


def test_summary_is_read() -> None:
    block = parse(BLOCK)
    assert block["val_bpb"] == 1.2345
    assert block["data_hash"] == "1e5", "a hash stays text, also one that looks like a number"
    assert differences(block, block) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("---\n", "", "exactly one summary block"),
        ("---\n", "---\n---\n", "found 2"),
        ("val_bpb:          1.234500", "val_bpb: nan", "val_bpb: expected a finite number"),
        ("val_bpb:          1.234500", "val_bpb: -1", "positive"),
        ("val_bpb:          1.234500", "val_bpb: 1\nval_bpb: 0.5", "val_bpb twice"),
        ("val_bpb:          1.234500", "val_bpb:", "expected 'key: value'"),
        ("val_bpb:          1.234500\n", "", "lacks val_bpb"),
        ("seed:             4", "seed: four", "seed: expected a number"),
        ("num_steps:        953", "num_steps: inf", "num_steps: expected a finite"),
        ("seed:             4\n", "seed: 4\nextra: nan\n", "extra: expected a finite"),
        ("seed:             4\n", "seed: 4\ndone.\n", "found 'done.'"),
        ("data_hash:        1e5\n", "", "lacks data_hash"),
    ],
)
def test_a_summary_that_is_not_whole_is_no_score(old: str, new: str, words: str) -> None:
    assert old in BLOCK
    with pytest.raises(SummaryError, match=words.replace(".", r"\.")):
        parse(BLOCK.replace(old, new))


def source_of(tmp_path: Path, text: str | bytes) -> Any:
    path = tmp_path / "train_mlx.py"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return fingerprint(path)


def test_identity_ignores_comments_formatting_docstrings_and_seeds(tmp_path: Path) -> None:
    base = source_of(tmp_path, 'X = {"a": 1}\nSEED = 1\ndef f(a):\n    """Doc."""\n    return a + 1\nmx.random.seed(3)\n')
    other_style = '# note\nX = {"a": 1,}\nSEED = int(g("S"))\n\n\ndef f(a):\n  "Other."\n  return (a + 1)\nmx.random.seed(9)\n'
    same = source_of(tmp_path, other_style)
    assert same == base
    for change in ("X = {'a': 2}", "X = {'b': 1}"):
        other = source_of(tmp_path, f'{change}\nSEED = 1\ndef f(a):\n    return a + 1\nmx.random.seed(3)\n')
        assert other.identity != base.identity
    assert source_of(tmp_path, "x = 1; y = 2").lines == source_of(tmp_path, "x = 1\ny = 2\n\n# c\n").lines == 2


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("mx.random.seed(run.seed)", "mx.random.seed(run.seed + 1)", True),
        ("mx.random.seed(run.seed)", "mx.random.seed(-7 * args.data_seed)", True),
        ("k = mx.random.key(1)", "k = mx.random.key(2)", True),
        ("r = np.random.default_rng(1)", "r = np.random.default_rng(2)", True),
        ("r = random.Random(SEED)", "r = random.Random(SEED + 5)", True),
        ("batches(8, seed=1)", "batches(8, seed=2)", True),
        ("mx.random.seed(run.seed)", "mx.random.seed(step)", False),  # in a loop it would repeat its noise
        ("r = np.random.default_rng([seed, step])", "r = np.random.default_rng([seed, 1])", False),
        ("cache.key(1)", "cache.key(2)", False),
        ("batches(8, seed=1)", "batches(9, seed=1)", False),
        ("f(reseed_every=1)", "f(reseed_every=2)", False),
    ],
)
def test_what_is_only_another_seed(tmp_path: Path, one: str, other: str, same: bool) -> None:
    assert (source_of(tmp_path, one) == source_of(tmp_path, other)) is same


@pytest.mark.parametrize("text", ["def f(:\n", "x = 1\0", b"\xff\xfe = 1\n", "(" * 5000])
def test_what_is_not_python_is_named(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(SourceError, match=r"train_mlx\.py"):
        source_of(tmp_path, text)


def test_one_line_is_harmless() -> None:
    assert one_line("a\tb\nc\x1b[31m\u202ed\x00 \ud800") == "a b c [31m d ?"
    assert len(one_line("word " * 100, 50)) <= 50


def test_metrics_are_read_as_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    path.write_bytes(b'{"step": 1}\n{"step"')
    assert tail.new() == [{"step": 1}]
    with open(path, "ab") as file:
        file.write(b': 2}\nrubbish\n[1]\n\xff\n')
    assert tail.new() == [{"step": 2}]
    assert tail.new() == []


@pytest.mark.parametrize(("loss", "lost"), [("NaN", True), ("Infinity", True), ("31", True), ("29", False), ("null", False)])
def test_watch_stops_a_lost_training(tmp_path: Path, loss: str, lost: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    shown: list[dict[str, Any]] = []
    watch = Watch(path, 30.0, shown.append)
    path.write_text(f'{{"step": 4, "loss": {loss}, "lr": Infinity}}\n')
    assert watch() == ("nan" if lost else None)
    assert all(math.isfinite(value) for row in shown for value in row.values())
    assert watch.step == 4
    assert os.path.getsize(path) > 0
