"""One trial: a training of the candidate, then its score, both as children.

The score is taken from the scorer's standard output and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.errors import DataError
from agent.files import read_plain, remove
from agent.process import child
from agent.text import failure_record
from agent.trial import rights, sandbox
from agent.trial.failures import LOG_BYTES, REASONS, TRAINER_CODES, ending, failed, last_words, limit_words, scorer_word, watchdog
from agent.trial.lab import SCORER_SECONDS, TRAINER_SECONDS, Lab, run_child
from agent.trial.metrics import SummaryError, Watch, differences, read_summary
from agent.trial.order import TrialResult

SUSPENDED_SECONDS = 5.0  # a training that slept longer is repeated
SCREEN_SECONDS = 300.0
DATA_CODE = 2  # exit code of the harness where its own data or command line is at fault
VERIFYING = 8.0  # times as long as a score: the harness asks up to six times as many questions, of up to twelve logits servers


def screen(lab: Lab, parent: bytes) -> TrialResult:
    """Search the worktree's train file for held-out text. What `parent`, the file it was made from, holds too does not count."""
    folder = _fresh(lab.folder / "trials" / "screen")
    (folder / "parent.py").write_bytes(parent)
    log = lab.folder / "logs" / "screen.log"
    argv = [sys.executable, "-B", str(lab.harness), "screen", str(lab.worktree / lab.train_file)]
    argv += ["--parent", str(folder / "parent.py"), "--held", str(lab.held_dir)]
    _fresh(lab.scratch(folder))
    lab.restore_harness()
    outcome = run_child(lab, argv, log, folder, SCREEN_SECONDS)
    for used in (folder, lab.scratch(folder)):
        remove(used)
    return TrialResult("ok", outcome.seconds) if outcome.ok else _refused(outcome, "the search for held-out text failed")


def run_trial(lab: Lab, run_dir: Path, seed: int, reference: Mapping[str, Any] | None) -> TrialResult:
    """Train the worktree's train file with one seed, and score it. `reference` is the baseline's summary: the score must be
    comparable with it, and the baseline's time bounds the time of this trial.

    Stopped if the user wants to stop at once. DataError if Python cannot be started, or the training text was changed.
    """
    if changed := lab.changed_text():
        raise DataError(
            f"{changed} of the training text {lab.train_dir.name} is not what was prepared: an agent, a training or another "
            "program changed it; prepare the data again with prepare_mlx.py, then --resume"
        )
    _fresh(run_dir)
    _fresh(lab.scratch(run_dir))
    try:
        return _train_and_score(lab, run_dir, seed, reference)
    finally:
        with contextlib.suppress(OSError):
            remove(lab.scratch(run_dir))


def _train_and_score(lab: Lab, run_dir: Path, seed: int, reference: Mapping[str, Any] | None) -> TrialResult:
    name, limit = run_dir.name, lab.trainer_limit(reference or {})
    env = {
        "AUTORESEARCH_DATA": str(lab.train_dir), "AUTORESEARCH_RUN_DIR": str(run_dir), "AUTORESEARCH_BUDGET": lab.budget,
        "AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_SCORE": "0",
    }  # fmt: skip
    watch = Watch(run_dir / "metrics.jsonl", lab.abort_loss, lab.show, lab.memory_bytes)
    trainer = lab.confined([sys.executable, "-B", lab.train_file], [run_dir, lab.scratch(run_dir)], lab.train_dir)
    log = lab.folder / "logs" / f"{name}.train.log"
    outcome = run_child(lab, trainer, log, run_dir, limit, env, watch)
    if outcome.suspended_seconds > SUSPENDED_SECONDS:
        slept = f"the machine slept for {outcome.suspended_seconds:.0f} s during the training"
        return failed("slept", slept, outcome)
    if lab.restore_harness():
        return failed("violation", "the night's copy of the harness was changed during the training", outcome)
    if changed := lab.changed_text():
        return failed("violation", f"{changed} of the training text was changed during the training", outcome)
    if outcome.reason == "wall":
        return failed("timeout", _over_time(lab, limit, reference), outcome, watch.step)
    kind, message = ending(lab, outcome, watch, run_dir)
    if kind:
        return failed(kind, message, outcome, watch.step)
    scored = score_run(lab, run_dir, "val", reference)
    seconds = outcome.seconds + scored.seconds
    if scored.status == "ok" and reference and (unlike := differences(scored.summary, reference)):
        message = f"the score cannot be compared with the baseline's: {'; '.join(unlike)}"
        return TrialResult("violation", seconds, error=failure_record("violation", message))
    summary = {**scored.summary, TRAINER_SECONDS: round(outcome.seconds, 2)} if scored.status == "ok" else scored.summary
    return TrialResult(scored.status, seconds, scored.val_bpb, summary, scored.error)


def _over_time(lab: Lab, limit: float, reference: Mapping[str, Any] | None) -> str:
    took = (reference or {}).get(TRAINER_SECONDS)
    allowed = f"the baseline took {took:.1f} s" if isinstance(took, float) else f"{lab.startup_seconds:.0f} s beside the budget"
    return f"still running after {limit:.0f} s by the driver's clock (budget {lab.budget}; {allowed})"


def score_run(
    lab: Lab, run_dir: Path, split: str, reference: Mapping[str, Any] | None = None, verifying: bool = False
) -> TrialResult:  # fmt: skip
    """Score a finished run directory on `val` or `test` with the night's harness. `reference` is as in `run_trial`. With
    `verifying`, before a keep, every row is probed for look-ahead; otherwise some are."""
    out, log = (lab.folder / "logs" / f"{run_dir.name}.{'verify' if verifying else split}.{kind}" for kind in ("out", "log"))
    # The scorer is ours and reads the held-out text; its logits servers are the candidate's and get the sandbox. Each server sees
    # a copy of the run directory in this scratch folder, which the scorer makes anew for each, and neither the run directory
    # itself nor the training text.
    scratch = lab.scratch(run_dir) / "server"
    lab.restore_harness()
    remove(scratch)
    scorer = [sys.executable, "-B", str(lab.harness), "score", str(run_dir), "--split", split]
    scorer += ["--scratch", str(scratch), "--private"]
    # not on the command line, which a server may see: where the held-out text is, and whether it is about to be kept
    told = json.dumps({"held": str(lab.held_dir), "wrap": lab.confined([], [scratch]), "verify": verifying})
    if (load := lab.load_limit(reference or {})) is not None:
        scorer += ["--load-limit", f"{load:.1f}"]
    if lab.sandboxed:
        readable = [lab.worktree, lab.harness.parent, lab.held_dir]
        scorer = sandbox.wrap_scorer(scorer, rights.rules([run_dir, lab.scratch(run_dir)], readable))
    limit = lab.scorer_limit(reference or {}) * (VERIFYING if verifying else 1)
    outcome = run_child(lab, scorer, log, run_dir, limit, stdin=told, stdout_to=out)
    remove(lab.scratch(run_dir))
    if outcome.suspended_seconds > SUSPENDED_SECONDS and not outcome.ok:
        return failed("slept", "the machine slept", outcome)
    if outcome.reason == "wall":
        return failed("timeout", f"scoring was still running after {limit:.0f} s by the driver's clock", outcome)
    if outcome.reason != "exited":
        words = f"scoring was ended: the model {limit_words(lab, outcome.reason)}"
        return failed(REASONS.get(outcome.reason, "crash"), words, outcome)
    if outcome.exit_code != 0:
        return _refused(outcome, "scoring failed")
    try:
        summary = read_summary(read_plain(out, LOG_BYTES).decode("utf-8", "replace"), split)
    except SummaryError as error:
        return failed("crash", str(error), outcome)
    return TrialResult("ok", outcome.seconds, summary[f"{split}_bpb"], {**summary, SCORER_SECONDS: round(outcome.seconds, 2)})


def _refused(outcome: child.Outcome, what: str) -> TrialResult:
    """The failure that the harness named on standard error. DataError if its data is at fault, which no candidate can cause."""
    kind, message = scorer_word(outcome.log)
    if found := watchdog(message):
        return failed("watchdog", found, outcome)
    if outcome.exit_code == DATA_CODE:
        raise DataError(f"{what}: {message or last_words(outcome)}; prepare the data again, then --resume")
    kind = kind or TRAINER_CODES.get(outcome.exit_code or 1, "crash")
    return failed(kind, f"{what}: {message or last_words(outcome)}", outcome)


def _fresh(folder: Path) -> Path:
    remove(folder)
    folder.mkdir(parents=True)
    return folder
