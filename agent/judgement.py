"""What can be known about a candidate without training it, and how loud the night's noise is. Reads, never writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from agent.candidate import Source, SourceError, inspect
from agent.decision import Noise, estimate_noise, fresh
from agent.night import Experiment, Night
from agent.trial import Lab, check_import

UNREADABLE = Source("", 0)  # of a file that does not parse: equal to no other


class Known(NamedTuple):
    """A verdict that needs no training."""

    status: str
    reason: str
    error: dict[str, Any] | None


def source(path: Path) -> Source:
    """Identity and length of a train file; `UNREADABLE` if it does not parse."""
    try:
        return inspect(path)
    except (SourceError, OSError):
        return UNREADABLE


def recall(night: Night, experiment: Experiment) -> Known | None:
    """The verdict on a candidate whose training would tell nothing new: no change, or a file that was trained before."""
    if not experiment.ast:
        return None
    for earlier in night.experiments[: experiment.n]:
        if earlier.ast != experiment.ast:
            continue
        if earlier.commit == experiment.parent:
            return _fault("noop", "only the seed, comments or formatting changed")
        if earlier.status in ("keep", "discard") and earlier.mean is not None:
            return Known("discard", f"trained before as experiment {earlier.n}: {earlier.mean:.4f}", None)
        if earlier.status in ("crash", "oom", "nan", "timeout"):
            return Known(earlier.status, f"trained before as experiment {earlier.n}", earlier.error)
    return None


def broken(lab: Lab) -> Known | None:
    """What is wrong with the train file in the worktree, found before a budget is spent on it."""
    try:
        inspect(lab.worktree / lab.train_file)
    except (SourceError, OSError) as wrong:
        return _fault("crash", str(wrong))
    error = check_import(lab)
    return Known("crash", error["message"], error) if error else None


def noise(night: Night) -> Noise:
    """The night's noise, from every repeated trial; a first trial that selected its candidate is left out."""
    return estimate_noise([e.scores if e.n == 0 else fresh(e.scores) for e in night.experiments])


def _fault(kind: str, message: str) -> Known:
    return Known(kind, message, {"kind": kind, "message": message, "step": None, "tail": ""})
