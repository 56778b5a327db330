"""One trial: real children, classified by evidence."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from night_kit import HARNESS, TRAINER, Bed, git
from trial_kit import lab

from agent.errors import DataError, Stopped
from agent.files import remove
from agent.git.worktree import Repository
from agent.journal.journal import read_events
from agent.journal.state import fold
from agent.process.environment import clean_env
from agent.trial import failures, sandbox
from agent.trial.lab import LOAD_SECONDS, SCORER_SECONDS, TRAINER_SECONDS, TrainText, lay_harness
from agent.trial.order import TrialResult
from agent.trial.trial import run_trial, score_run, screen
from agent.views.terminal import Console
from harness import server


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


def test_a_scorer_that_names_no_failure_is_quoted(tmp_path: Path) -> None:
    place = lab(tmp_path)
    place.harness.write_text("raise PermissionError(13, 'Permission denied', 'weights.npy')\n")
    result = run_trial(place, tmp_path / "trials" / "0001-7", 7, None)
    message = "scoring failed: PermissionError: [Errno 13] Permission denied: 'weights.npy'"
    assert (result.status, (result.error or {})["message"]) == ("crash", message)


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


@pytest.mark.skipif(sys.platform != "linux", reason="needs real-time signals")
def test_a_signal_without_a_name_is_a_crash_by_its_number(tmp_path: Path) -> None:
    result = trial(tmp_path, TRAINER.replace("run = Path", "os.kill(os.getpid(), 40); run = Path"))
    assert (result.status, (result.error or {})["message"]) == ("crash", "signal 40 ended it.")


def test_metal_aborts_where_memory_ends(tmp_path: Path) -> None:
    """It throws where nobody can catch it: the process is gone with SIGABRT, and its log says why."""
    last = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
    for words, status in ((last, "oom"), ("[METAL] Command buffer execution failed: Invalid Resource", "crash")):
        source = TRAINER.replace("run = Path", f"print({words!r}, file=sys.stderr, flush=True); os.abort(); run = Path")
        result = trial(tmp_path, source)
        assert result.status == status
        assert (result.error or {})["message"] == f"SIGABRT ended it. {words}"


@pytest.mark.parametrize("end", ["os.abort()", "sys.exit(1)"])
@pytest.mark.parametrize("words", ["Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
                                   "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
                                   "Ignored (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"])
def test_the_watchdog_of_the_gpu_is_no_fault_of_the_candidate(tmp_path: Path, words: str, end: str) -> None:
    source = TRAINER.replace("run = Path", f"print({words!r}, file=sys.stderr, flush=True); {end}; run = Path")
    result = trial(tmp_path, source)
    assert (result.status, "watchdog" in (result.error or {})["message"]) == ("interrupted", True)


@pytest.mark.parametrize("words", ["the logits server died (exit code -6, GPU Timeout Error); see serve.log",
                                   "RuntimeError: [METAL] Command buffer execution failed: Impacting Interactivity (0000000e:...)"])
def test_a_score_that_the_watchdog_ended_is_repeated(tmp_path: Path, words: str) -> None:
    assert failures.WATCHDOG.pattern.encode() == server.WATCHDOG.pattern, "the harness tells it in the words that the driver knows"
    made = lab(tmp_path, mode("unscorable"))
    made.harness.write_text(HARNESS.replace("violation", "crash").replace("logits look ahead", words))
    result = run_trial(made, tmp_path / "trials" / "0001-7", 7, None)
    assert (result.status, "watchdog" in (result.error or {})["message"]) == ("interrupted", True)


def test_a_training_that_takes_too_much_by_its_own_word_is_oom(tmp_path: Path) -> None:
    """On a GPU the system may count none of it."""
    source = TRAINER.replace('"loss": 5.0 - step,', '"loss": 5.0 - step, "memory_mb": 3000.0 * step,') + "    time.sleep(60)\n"
    result = trial(tmp_path, source, memory_bytes=4 << 30)
    assert (result.status, (result.error or {})["message"]) == ("oom", "used more memory than allowed")
    assert result.seconds < 30
    assert trial(tmp_path, source.replace("sleep(60)", "sleep(0)"), memory_bytes=8 << 30).status == "ok"


def test_a_candidate_that_the_watchdog_ends_each_time_is_a_crash_in_the_end(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "crash better")
    trainer = bed.repo / "train_mlx.py"
    trainer.write_text(trainer.read_text().replace("matmul: shapes do not fit", "Impacting Interactivity"))
    git(bed.repo, "commit", "-qam", "a GPU that shows pictures, too")
    done = bed.run("--experiments", "2", "--no-sandbox")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("is repeated: the GPU's watchdog ended the model") == 2
    assert [e.status for e in fold(read_events(bed.folder() / "journal.jsonl")[0]).done] == ["crash", "keep"]


def test_exit_code_wins_over_an_error_file_that_the_candidate_wrote(tmp_path: Path) -> None:
    forged = '(Path(os.environ["AUTORESEARCH_RUN_DIR"]) / "error.json").write_text("[" * 99999); sys.exit(3); run = Path'
    assert trial(tmp_path, TRAINER.replace("run = Path", forged)).status == "nan"


def test_held_out_data_that_is_gone_is_no_candidates_fault(tmp_path: Path) -> None:
    place = lab(tmp_path)
    gone = 'print(json.dumps({"kind": "data", "message": "val.bin is gone"}), file=sys.stderr); sys.exit(2)'
    (tmp_path / "frozen" / "prepare_mlx.py").write_text(f"import json, sys\n{gone}\n")
    with pytest.raises(DataError, match=r"scoring failed: val\.bin is gone; prepare the data again"):
        run_trial(place, tmp_path / "trials" / "0001-7", 7, None)
    with pytest.raises(DataError, match="the search for held-out text failed"):
        screen(place, b"")


HOSTILE = {
    "a pipe for error.json": ('os.mkfifo(run / "error.json"); sys.exit(3)', "nan"),
    "a device for error.json": ('(run / "error.json").symlink_to("/dev/zero"); sys.exit(4)', "oom"),
    "a giant error.json": ('(run / "error.json").touch(); os.truncate(run / "error.json", 60 << 30); sys.exit(3)', "nan"),
    "a pipe for metrics": ('os.mkfifo(run / "metrics.jsonl"); sys.exit(3)', "nan"),
    "a device for metrics": ('(run / "metrics.jsonl").symlink_to("/dev/zero"); sys.exit(3)', "nan"),
    "a pipe for train.json": ('os.mkfifo(run / "train.json"); sys.exit(0)', "crash"),
    "folders without end": (
        'os.chdir(run); [(os.mkdir("d"), os.chdir("d")) for _ in range(1900)]; time.sleep(60)', "violation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_no_file_of_a_candidate_holds_the_driver_up(tmp_path: Path, what: str) -> None:
    body, status = HOSTILE[what]
    begun = time.monotonic()
    try:
        result = trial(tmp_path, TRAINER.replace("    with open(run", f"    {body}\n    with open(run"))
        assert (result.status, time.monotonic() - begun < 15) == (status, True), result.error
        assert trial(tmp_path).status == "ok", "what was left there does not disturb the next attempt"
    finally:
        remove(tmp_path / "trials")  # deeper than pytest can remove


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 9000, "1e400", "NaN", "[" * 9000 + "]" * 9000])
def test_numbers_that_no_computer_can_hold_are_not_shown_and_stop_nothing(tmp_path: Path, number: str) -> None:
    rows = "".join(f'{{"{name}": {number}, "loss": 1.0}}\n' for name in ("step", "tokens", "tokens_per_second", "seconds"))
    body = f'(run / "metrics.jsonl").write_text({rows!r}); time.sleep(0.5)'
    source = TRAINER.replace("    with open(run", f"    {body}\n    with open(run", 1)
    seen: list[dict[str, Any]] = []
    result = trial(tmp_path, source, show=lambda row: (seen.append(row), Console().metrics(row)))
    assert result.status == "ok", result.error
    assert all(abs(value) < 1e18 for row in seen for value in row.values())
    lost = trial(tmp_path, source.replace('"loss": 1.0', f'"loss": {number}'))
    assert lost.status == ("ok" if number.startswith("[") or number.startswith("-") else "nan")


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


SLOW = TRAINER.replace("    if MODE == \"crash\":", "    time.sleep(float(os.environ.get('SLOW', 0)))\n    if MODE == \"crash\":")


def test_the_drivers_clock_bounds_a_training_by_what_the_baseline_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a trainer says of its own time: it said nothing here, and its harness's clock never ran."""
    monkeypatch.setattr("agent.trial.lab.SLACK_SECONDS", 0.5)
    reference = trial(tmp_path).summary
    assert 0 < reference[TRAINER_SECONDS] < 5
    assert 0 < reference[SCORER_SECONDS] < 5
    for budget, known in (("1s", {TRAINER_SECONDS: 1.2}), ("5steps", {TRAINER_SECONDS: 0.4})):
        changes: dict[str, Any] = {"budget": budget, "environ": clean_env({"SLOW": "30"})}
        result = trial(tmp_path, SLOW, {**reference, "budget": budget, **known}, **changes)
        assert result.status == "timeout"
        assert result.seconds < 10
        message = (result.error or {})["message"]
        assert "by the driver's clock" in message
        assert f"the baseline took {known[TRAINER_SECONDS]} s" in message


def test_what_a_trial_may_take(tmp_path: Path) -> None:
    place = lab(tmp_path, budget="300s", startup_seconds=120.0)
    assert place.trainer_limit({}) == 420, "of a baseline"
    assert place.trainer_limit({TRAINER_SECONDS: 308.0}) == 300 + 1.5 * 8 + 15
    assert place.trainer_limit({TRAINER_SECONDS: 500.0}) == 420, "never more than the user allows"
    assert lab(tmp_path, budget="8s").trainer_limit({TRAINER_SECONDS: 12.0}) == 8 + 1.5 * 4 + 10
    assert lab(tmp_path, budget="20steps").trainer_limit({TRAINER_SECONDS: 12.0}) == 3 * 12 + 10
    assert place.scorer_limit({SCORER_SECONDS: 20.0}) == 3 * 20 + 10
    assert place.scorer_limit({}) == 420
    assert (place.load_limit({LOAD_SECONDS: 2.0}), place.load_limit({})) == (1.5 * 2 + 5, None)


def prepared(folder: Path) -> TrainText:
    """A training text as the harness leaves it."""
    folder.mkdir(exist_ok=True)
    (folder / "train.bin").write_bytes(b"a text")
    file = {"name": "train.bin", "bytes": 6, "sha256": hashlib.sha256(b"a text").hexdigest()}
    (folder / "meta.json").write_text(json.dumps({"prepared": [file]}))
    return TrainText(folder)


def test_training_text_that_a_training_changes_is_a_violation_and_trains_no_other(tmp_path: Path) -> None:
    text = prepared(tmp_path / "train")
    file = tmp_path / "train" / "train.bin"
    assert trial(tmp_path, text=text).status == "ok"
    later = f"time.sleep(0.01); Path({str(file)!r}).write_text('a test')"
    later += f"; os.utime({str(file)!r}, ns=(0, {file.stat().st_mtime_ns}))"
    result = trial(tmp_path, TRAINER.replace("run = Path", f"{later}; run = Path"), text=text)
    assert (result.status, result.val_bpb) == ("violation", None)
    assert "train.bin of the training text was changed" in (result.error or {})["message"]
    for known in (text, TrainText(tmp_path / "train")):  # also by a new session
        with pytest.raises(DataError, match=r"train\.bin of the training text .* prepare the data again"):
            trial(tmp_path, text=known)
    prepared(tmp_path / "train")
    assert trial(tmp_path, text=text).status == "ok"
    remove(tmp_path / "train")
    assert text.changed() == "meta.json"


@pytest.mark.parametrize("harm", ["held.txt", "meta.json", "train.bin"])
def test_what_is_put_beside_the_training_text_or_in_its_place_is_found(tmp_path: Path, harm: str) -> None:
    text = prepared(tmp_path / "train")
    (tmp_path / "train" / ".DS_Store").touch()
    assert text.changed() == ""
    (tmp_path / "train" / harm).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "train" / harm)
    assert text.changed() == harm
    (tmp_path / "train" / harm).unlink()
    (tmp_path / "train" / harm).write_text("{}")
    assert text.changed() == harm


def test_a_harness_that_was_changed_during_a_training_is_a_violation(tmp_path: Path) -> None:
    bed = Bed(tmp_path / "bed")
    repository = Repository(bed.repo)
    folder = tmp_path / "night"
    evil = 'Path(os.environ["AUTORESEARCH_RUN_DIR"]).parents[1].joinpath("frozen/prepare_mlx.py").write_text("evil"); run = Path'
    for source, status in ((TRAINER.replace("run = Path", evil), "violation"), (TRAINER, "ok")):
        place = lab(folder, source, repository=repository, base=repository.head)
        lay_harness(repository, repository.head, folder)
        result = run_trial(place, folder / "trials" / "0001-7", 7, None)
        assert result.status == status, result.error
        assert (folder / "frozen" / "prepare_mlx.py").read_bytes() == repository.file_at(repository.head, "prepare_mlx.py")
    (folder / "frozen" / "prepare_mlx.py").write_text("print('---')")
    assert score_run(place, folder / "trials" / "0001-7", "test").status == "ok", "restored before a score, whoever changed it"


def test_a_training_through_which_the_machine_slept_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = iter((0.0, 0.0, 3600.0))
    monkeypatch.setattr("agent.process.child.seconds_asleep", lambda: next(asleep, 3600.0))
    result = trial(tmp_path)
    assert (result.status, result.val_bpb) == ("interrupted", None)
    assert "slept for 3600 s" in (result.error or {})["message"]
    assert trial(tmp_path).status == "ok"


def test_no_secret_reaches_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_API_KEY", "hunter2-hunter2-hunter2")
    source = TRAINER.replace("run = Path", "raise RuntimeError(repr(dict(os.environ))); run = Path")
    result = trial(tmp_path, source, environ=clean_env())
    assert result.status == "crash"
    everything = json.dumps(result.error) + "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert "AUTORESEARCH_SEED" in everything
    assert "PLANTED" not in everything
    assert "hunter2" not in everything


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="no sandbox is known there")
def test_sandbox_hides_the_held_out_data(tmp_path: Path) -> None:
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
