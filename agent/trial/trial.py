"""One trial: a training of the candidate, then its score, both as children.

The score is taken from the scorer's standard output and nowhere else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.files import remove
from agent.text import failure_record
from agent.trial import rights, sandbox
from agent.trial.failures import REASONS, TRAINER_CODES, ending, failed, last_words, scorer_word
from agent.trial.lab import Lab, run_child
from agent.trial.metrics import SummaryError, Watch, differences, read_summary
from agent.trial.order import TrialResult

SUSPENDED_SECONDS = 5.0  # a training that slept longer is repeated
IMPORT_SECONDS = 5.0
SCORE_SECONDS = 300.0, 900.0  # the wall limit of a score: that of a training, within these
_IMPORT = "import importlib.util as u, sys; s = u.spec_from_file_location('candidate', sys.argv[1]); m = u.module_from_spec(s); \
sys.modules['candidate'] = m; sys.path.insert(0, ''); s.loader.exec_module(m)"


def check_import(lab: Lab) -> dict[str, Any] | None:
    """Import the train file once, without a budget; the error if that fails. A slow import is no failure."""
    log = lab.folder / "logs" / "import.log"
    python = [sys.executable, "-B", "-c", _IMPORT, str(lab.worktree / lab.train_file)]
    scratch = _fresh(lab.folder / "trials" / "import")
    outcome = run_child(lab, lab.confined(python, [scratch, lab.scratch(scratch)]), log, scratch, IMPORT_SECONDS)
    for used in (scratch, lab.scratch(scratch)):
        remove(used)
    if outcome.reason != "exited" or outcome.exit_code == 0:
        return None
    return failed("crash", f"importing {lab.train_file} fails: {last_words(outcome)}", outcome).error


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
    outcome = run_child(lab, trainer, log, run_dir, lab.wall_seconds, env, watch)
    if outcome.suspended_seconds > SUSPENDED_SECONDS:
        slept = f"the machine slept for {outcome.suspended_seconds:.0f} s during the training"
        return failed("interrupted", slept, outcome)
    kind, message = ending(lab, outcome, watch, run_dir)
    if kind:
        return failed(kind, message, outcome, watch.step)
    scored = score_run(lab, run_dir, "val")
    seconds = outcome.seconds + scored.seconds
    if scored.status == "ok" and reference and (unlike := differences(scored.summary, reference)):
        message = f"the score cannot be compared with the baseline's: {'; '.join(unlike)}"
        return TrialResult("violation", seconds, error=failure_record("violation", message))
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
        scorer = sandbox.wrap_scorer(scorer, rights.rules([run_dir, lab.scratch(run_dir)], readable))
    shortest, longest = SCORE_SECONDS
    outcome = run_child(lab, scorer, log, run_dir, min(longest, max(shortest, lab.wall_seconds)), stdout_to=out)
    remove(scratch)
    if outcome.suspended_seconds > SUSPENDED_SECONDS and not outcome.ok:
        return failed("interrupted", "the machine slept", outcome)
    if outcome.reason != "exited":
        return failed(REASONS.get(outcome.reason, "crash"), f"scoring ended by the limit {outcome.reason}", outcome)
    if outcome.exit_code != 0:
        kind, message = scorer_word(log)
        return failed(kind or TRAINER_CODES.get(outcome.exit_code or 1, "crash"), f"scoring failed: {message}", outcome)
    try:
        summary = read_summary(out.read_text(encoding="utf-8", errors="replace"), split)
    except SummaryError as error:
        return failed("crash", str(error), outcome)
    return TrialResult("ok", outcome.seconds, summary[f"{split}_bpb"], summary)


def _fresh(folder: Path) -> Path:
    remove(folder)
    folder.mkdir(parents=True)
    return folder
