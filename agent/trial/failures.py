"""How a trial ended, read from evidence: exit code, signal, the limit that the spawner had to enforce, metrics, `error.json`.

The candidate can write any of these files, as anything: a pipe, a device, a number of a thousand digits. So reading is bounded.
Log text is never parsed, with two exceptions: what Metal says of memory and of its watchdog, because Metal aborts the process.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

from agent.errors import DataError
from agent.files import DEEPEST, GIB, MOST_ENTRIES, read_plain
from agent.process import child
from agent.text import failure_record, one_line
from agent.trial.lab import Lab
from agent.trial.metrics import Watch
from agent.trial.order import TrialResult

TRAINER_CODES = {1: "crash", 2: "crash", 3: "nan", 4: "oom", 5: "timeout", 6: "violation"}
REASONS = {"wall": "timeout", "idle": "timeout", "memory": "oom", "disk": "violation", "log": "violation", "nan": "nan"}
INTERRUPTIONS = ("slept", "watchdog")  # of the machine and by its GPU: no fault of the candidate
ERROR_BYTES = 64 << 10  # of error.json
LOG_BYTES = 64 << 20  # of a log; the spawner keeps far less
# What Metal says of work that it ended for the sake of the screen or of another program, or after another one's fault.
# harness/server.py has the same words
WATCHDOG = re.compile(r"Impacting Interactivity|GPU Timeout Error|Innocent ?Victim|SubmissionsIgnored", re.I)
METAL_MEMORY = "kIOGPUCommandBufferCallbackErrorOutOfMemory"


def ending(lab: Lab, outcome: child.Outcome, watch: Watch, run_dir: Path) -> tuple[str, str]:
    """Kind of failure of a training, "" if it ended well, and what is known about it."""
    watch()  # what it wrote in its last instant
    if outcome.reason == "missing":
        if not lab.worktree.is_dir():
            raise FileNotFoundError(f"the worktree {lab.worktree} was removed just before a training")
        raise DataError(f"the trainer cannot be started: {outcome.tail(300)}")
    if outcome.reason == "nan" or watch.message:
        return "nan", watch.message
    if outcome.reason != "exited":
        return REASONS.get(outcome.reason, "crash"), limit_words(lab, outcome.reason)
    kind, message = _error_file(run_dir / "error.json")
    if (outcome.signal or outcome.exit_code) and (found := watchdog(f"{message}\n{outcome.tail(5000)}")):
        return "watchdog", found
    if outcome.signal is not None:
        # Not one of the driver's limits: those have a reason. The system's own killer is what sends KILL at night, and Metal
        # aborts the process where memory ends: a word in its log is all that it leaves
        aborted = outcome.signal == signal.SIGABRT
        killed = "oom" if outcome.signal == signal.SIGKILL or (aborted and METAL_MEMORY in outcome.tail(5000)) else "crash"
        words = message or (last_words(outcome) if aborted else "")
        return kind or killed, f"{child.signal_name(outcome.signal)} ended it. {words}".strip()
    if outcome.exit_code:
        return TRAINER_CODES.get(outcome.exit_code, "crash"), message or f"exit code {outcome.exit_code}: {last_words(outcome)}"
    if (run_dir / "train.json").is_symlink() or not (run_dir / "train.json").is_file():
        return "crash", "exit code 0, but no train.json: the training did not come to its end"
    return "", ""


def watchdog(text: str) -> str:
    """What to say where Metal's watchdog ended a process, "" if nothing in its last words tells so."""
    found = WATCHDOG.search(text)
    return f"the GPU's watchdog ended the model, perhaps for another program's sake ({found[0]})" if found else ""


def limit_words(lab: Lab, reason: str) -> str:
    """What a child did that the driver ended by one of its limits."""
    limits = {
        "wall": f"still running after {lab.wall_seconds:.0f} s (budget {lab.budget} and {lab.startup_seconds:.0f} s)",
        "disk": f"wrote more than {lab.directory_bytes / GIB:.0f} GiB or {MOST_ENTRIES} files, nested folders deeper than "
                f"{DEEPEST}, or filled the disk",
        "memory": "used more memory than allowed", "log": "printed without end",
    }  # fmt: skip
    return limits.get(reason, reason)


def _error_file(path: Path) -> tuple[str, str]:
    """Kind and message of the harness's error file, "" where there is none."""
    try:
        return _error_record(read_plain(path, ERROR_BYTES)) or ("", "")
    except OSError:
        return "", ""


def scorer_word(log: Path) -> tuple[str, str]:
    """The last error record on the scorer's standard error."""
    try:
        lines = read_plain(log, LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return "", ""
    return next(filter(None, map(_error_record, reversed(lines))), ("", ""))


def _error_record(text: str | bytes) -> tuple[str, str] | None:
    """Kind and message of JSON {"kind", "message"}. The candidate may have written it: only known kinds count, others are ""."""
    try:
        record = json.loads(text)
        kind, message = str(record["kind"]), one_line(str(record["message"]), 500)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (kind if kind in TRAINER_CODES.values() else ""), message


def failed(kind: str, message: str, outcome: child.Outcome, step: int | None = None) -> TrialResult:
    status = "interrupted" if kind in INTERRUPTIONS else kind
    return TrialResult(status, outcome.seconds, error=failure_record(kind, message, step, outcome.tail(2000)))


def last_words(outcome: child.Outcome) -> str:
    """The last line that was printed, for people."""
    return next((line for line in reversed(outcome.tail(1000).splitlines()) if line.strip()), "")
