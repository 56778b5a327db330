"""One trial: a training of the candidate, then its score, both as children; how it ended is read from evidence.

Evidence is an exit code, a signal, the limit that the spawner had to enforce, the newest metrics, the harness's `error.json`.
Words in a log are for people, but for Metal's last ones. The score is taken from the scorer's standard output and nowhere else.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import process, sandbox
from agent.candidate import one_line
from agent.errors import DataError, Stopped
from agent.filetree import remove
from agent.lab import GIB, Lab
from agent.measure import directory_bytes
from agent.metrics import Watch
from agent.redact import redact
from agent.summary import SummaryError, differences, parse

TRAINER_CODES = {1: "crash", 2: "crash", 3: "nan", 4: "oom", 5: "timeout", 6: "violation"}
REASONS = {"wall": "timeout", "idle": "timeout", "memory": "oom", "disk": "violation", "log": "violation", "nan": "nan"}
SUSPENDED_SECONDS = 5.0  # a training that slept longer is repeated
IMPORT_SECONDS = 5.0
METAL_MEMORY = "kIOGPUCommandBufferCallbackErrorOutOfMemory"
SCORE_SECONDS = 300.0, 900.0  # the wall limit of a score: that of a training, within these
_IMPORT = "import importlib.util as u, sys; s = u.spec_from_file_location('candidate', sys.argv[1]); m = u.module_from_spec(s); \
sys.modules['candidate'] = m; sys.path.insert(0, ''); s.loader.exec_module(m)"


@dataclass(frozen=True)
class TrialResult:
    """`status` is ok, interrupted, disturbed or a failure's name; `val_bpb` in bits per byte, with ok and disturbed."""

    status: str
    seconds: float
    val_bpb: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None


def check_import(lab: Lab) -> dict[str, Any] | None:
    """Import the train file once, without a budget; the error if that fails. A slow import is no failure."""
    log = lab.folder / "logs" / "import.log"
    python = [sys.executable, "-B", "-c", _IMPORT, str(lab.worktree / lab.train_file)]
    scratch = _fresh(lab.folder / "trials" / "import")
    outcome = _child(lab, lab.confined(python, [scratch, lab.scratch(scratch)]), log, scratch, IMPORT_SECONDS)
    for used in (scratch, lab.scratch(scratch)):
        shutil.rmtree(used, ignore_errors=True)
    if outcome.reason != "exited" or outcome.exit_code == 0:
        return None
    return _failed("crash", f"importing {lab.train_file} fails: {_last_words(outcome)}", outcome).error


def run_trial(lab: Lab, run_dir: Path, seed: int, reference: Mapping[str, Any] | None) -> TrialResult:
    """Train what the worktree holds with one seed and score it. `reference` is a summary it must be comparable with.

    Stopped if the user wants to stop at once, DataError if there is no Python to start it with.
    """
    _fresh(run_dir)
    name = run_dir.name
    env = {
        "AUTORESEARCH_DATA": str(lab.train_dir), "AUTORESEARCH_RUN_DIR": str(run_dir), "AUTORESEARCH_BUDGET": lab.budget,
        "AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_SCORE": "0",
    }  # fmt: skip
    watch = Watch(run_dir / "metrics.jsonl", lab.abort_loss, lab.show)
    trainer = lab.confined([sys.executable, "-B", lab.train_file], [run_dir, lab.scratch(run_dir)])
    log = lab.folder / "logs" / f"{name}.train.log"
    outcome = _child(lab, trainer, log, run_dir, lab.wall_seconds, env, watch)
    if outcome.suspended_seconds > SUSPENDED_SECONDS:
        slept = f"the machine slept for {outcome.suspended_seconds:.0f} s during the training"
        return _failed("interrupted", slept, outcome)
    kind, message = _ending(lab, outcome, watch, run_dir)
    if kind:
        return _failed(kind, message, outcome, watch.step)
    scored = score_run(lab, run_dir, "val")
    seconds = outcome.seconds + scored.seconds
    if scored.status == "ok" and reference and (unlike := differences(scored.summary, reference)):
        message = f"the score cannot be compared with the baseline's: {'; '.join(unlike)}"
        return TrialResult("violation", seconds, error={"kind": "violation", "message": message, "step": None, "tail": ""})
    return TrialResult(scored.status, seconds, scored.val_bpb, scored.summary, scored.error)


def score_run(lab: Lab, run_dir: Path, split: str) -> TrialResult:
    """Score a finished run directory on `val` or `test` with the night's harness."""
    out, log = (lab.folder / "logs" / f"{run_dir.name}.{split}.{kind}" for kind in ("out", "log"))
    # The scorer is ours and reads the held-out text; its logits servers are the candidate's and get the sandbox. Each finds
    # nothing that another one wrote: the run directory is for reading, and the scratch is made anew for each.
    scratch = lab.scratch(run_dir) / "server"
    remove(scratch)
    server = json.dumps(lab.confined([], [scratch], run_dir))
    scorer = [sys.executable, "-B", str(lab.harness), "score", str(run_dir), "--split", split, "--held", str(lab.held_dir)]
    scorer += ["--wrap", server, "--scratch", str(scratch)]
    if lab.sandboxed:
        readable = [lab.worktree, lab.harness.parent, lab.train_dir, lab.held_dir]
        scorer = sandbox.wrap_scorer(scorer, writable=[run_dir, lab.scratch(run_dir)], readable_only=readable)
    shortest, longest = SCORE_SECONDS
    outcome = _child(lab, scorer, log, run_dir, min(longest, max(shortest, lab.wall_seconds)), stdout_to=out)
    remove(scratch)
    if outcome.suspended_seconds > SUSPENDED_SECONDS and not outcome.ok:
        return _failed("interrupted", "the machine slept", outcome)
    if outcome.reason != "exited":
        return _failed(REASONS.get(outcome.reason, "crash"), f"scoring ended by the limit {outcome.reason}", outcome)
    if outcome.exit_code != 0:
        kind, message = _scorer_word(log)
        return _failed(kind or TRAINER_CODES.get(outcome.exit_code or 1, "crash"), f"scoring failed: {message}", outcome)
    try:
        summary = parse(out.read_text(encoding="utf-8", errors="replace"), split)
    except SummaryError as error:
        return _failed("crash", str(error), outcome)
    return TrialResult("ok", outcome.seconds, summary[f"{split}_bpb"], summary)


def _ending(lab: Lab, outcome: process.Outcome, watch: Watch, run_dir: Path) -> tuple[str, str]:
    """Kind of failure of a training, "" if it ended well, and what is known about it."""
    watch()  # what it wrote in its last instant
    if outcome.reason == "missing":
        raise DataError(f"the trainer cannot be started: {outcome.tail(300)}")
    if outcome.reason == "nan" or watch.message:
        return "nan", watch.message
    if outcome.reason != "exited":
        limits = {
            "wall": f"still running after {lab.wall_seconds:.0f} s (budget {lab.budget} and {lab.startup_seconds:.0f} s)",
            "disk": f"wrote more than {lab.directory_bytes / GIB:.0f} GiB, or filled the disk",
            "memory": "used more memory than allowed", "log": "printed without end",
        }  # fmt: skip
        return REASONS.get(outcome.reason, "crash"), limits.get(outcome.reason, outcome.reason)
    kind, message = _error_file(run_dir / "error.json")
    if outcome.signal is not None:
        # Not one of the driver's limits: those have a reason. The system's own killer is what sends KILL at night, and Metal
        # aborts the process where memory ends: a word in its log is all that it leaves
        aborted = outcome.signal == signal.SIGABRT
        killed = "oom" if outcome.signal == signal.SIGKILL or (aborted and METAL_MEMORY in outcome.tail(5000)) else "crash"
        words = message or (_last_words(outcome) if aborted else "")
        return kind or killed, f"{signal.Signals(outcome.signal).name} ended it. {words}".strip()
    if outcome.exit_code:
        return TRAINER_CODES.get(outcome.exit_code, "crash"), message or f"exit code {outcome.exit_code}: {_last_words(outcome)}"
    if not (run_dir / "train.json").is_file():
        return "crash", "exit code 0, but no train.json: the training did not come to its end"
    return "", ""


def _child(
    lab: Lab, argv: list[str], log: Path, run_dir: Path, wall: float, env: Mapping[str, str] | None = None,
    watch: Callable[[], str | None] = lambda: None, stdout_to: Path | None = None,
) -> process.Outcome:  # fmt: skip
    log.parent.mkdir(exist_ok=True)
    written = (run_dir, lab.scratch(run_dir))
    room = min(lab.directory_bytes, sum(map(directory_bytes, written)) + max(0, shutil.disk_usage(run_dir).free - lab.spare_bytes))
    bounds = process.Bounds(wall_seconds=wall, memory_bytes=lab.memory_bytes, directories=written, directory_bytes=room)
    known = {name: value for name, value in lab.environ.items() if name != "AUTORESEARCH_HOME"}  # it leads to held-out data
    outcome = process.run(
        argv, cwd=lab.worktree, env={**known, "TMPDIR": str(lab.scratch(run_dir)), **(env or {})}, log=log, bounds=bounds,
        stop=lab.stop, watch=watch, stdout_to=stdout_to, pidfile=lab.folder / "child.pid",
    )  # fmt: skip
    if outcome.reason == "stopped":
        raise Stopped
    return outcome


def _error_file(path: Path) -> tuple[str, str]:
    """Kind and message of the harness's error file, "" where there is none."""
    try:
        with open(path, "rb") as file:
            return _error_record(file.read(65536)) or ("", "")
    except OSError:
        return "", ""


def _scorer_word(log: Path) -> tuple[str, str]:
    """The last error record on the scorer's standard error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next(filter(None, map(_error_record, reversed(lines))), ("", ""))


def _error_record(text: str | bytes) -> tuple[str, str] | None:
    """Kind and message of JSON {"kind", "message"}. The candidate may have written it: only known kinds count, others are ""."""
    try:
        record = json.loads(text)
        kind, message = str(record["kind"]), one_line(str(record["message"]), 500)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (kind if kind in TRAINER_CODES.values() else ""), message


def _failed(kind: str, message: str, outcome: process.Outcome, step: int | None = None) -> TrialResult:
    error = {"kind": kind, "message": redact(one_line(message, 500)), "step": step, "tail": outcome.tail(2000)}
    return TrialResult(kind, outcome.seconds, error=error)


def _last_words(outcome: process.Outcome) -> str:
    """The last line that was printed, for people."""
    return next((line for line in reversed(outcome.tail(1000).splitlines()) if line.strip()), "")


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
