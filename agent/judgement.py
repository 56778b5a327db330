"""What can be known about a candidate without training it, and how loud the night's noise is. Reads, never writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from agent.candidate import Source, SourceError, fingerprint, one_line
from agent.decision import Decision, Noise, Rule, decide, estimate_noise, fresh
from agent.errors import NightError
from agent.lab import Lab
from agent.night import Experiment, Night
from agent.trial import TrialResult, check_import

MOST_INTERRUPTIONS = 5  # of one trial, in a row
MOST_REPEATS = 2  # of one trial, in a row, because the machine was not alike at its beginning and its end
REPEATS_OF_A_NIGHT = 4, 10  # so many and one in so many trials: a machine that is never quiet is the night's noise, no event
SHORTEST_PROBED = 30.0  # seconds of training; in a shorter one the harness measures the machine's speed too briefly
SLOWER = 0.10  # below the median of the night's trainings: as the harness's own bound for a change within one
TRIALS_BEFORE = 3  # that the median needs
UNREADABLE = Source("", 0)  # of a file that does not parse: equal to no other


class EarlyVerdict(NamedTuple):
    """A verdict that needs no training."""

    status: str
    reason: str
    error: dict[str, Any] | None


def source(path: Path) -> Source:
    """Identity and length of a train file; `UNREADABLE` if it does not parse."""
    try:
        return fingerprint(path)
    except (SourceError, OSError):
        return UNREADABLE


def early_verdict(night: Night, experiment: Experiment) -> EarlyVerdict | None:
    """The verdict on a candidate whose training would tell nothing new: no change, or a file that was trained before."""
    if not experiment.ast:
        return None
    for earlier in night.experiments[: experiment.n]:
        if earlier.ast != experiment.ast:
            continue
        if earlier.commit == experiment.parent:
            return _fault("noop", "only the seed, comments or formatting changed")
        if earlier.status in ("keep", "discard") and earlier.mean is not None:
            return EarlyVerdict("discard", f"trained before as experiment {earlier.n}: {earlier.mean:.4f}", None)
        if earlier.status in ("crash", "oom", "nan", "timeout", "violation"):  # one of the guard's has no file to be equal to
            return EarlyVerdict(earlier.status, f"trained before as experiment {earlier.n}", earlier.error)
    return None


def broken(lab: Lab) -> EarlyVerdict | None:
    """What is wrong with the train file in the worktree, found before a budget is spent on it."""
    try:
        fingerprint(lab.worktree / lab.train_file)
    except (SourceError, OSError) as wrong:
        return _fault("crash", str(wrong))
    error = check_import(lab)
    return EarlyVerdict("crash", error["message"], error) if error else None


def validated(night: Night, experiment: Experiment, result: TrialResult, budget_seconds: float | None) -> TrialResult:
    """The result of a trial, or that it counts for nothing: `disturbed` where the machine grew faster or slower meanwhile by
    more than the harness finds harmless, or was slower than the night's all along, so that neither heat nor another program
    decides. Within bounds: then it is taken, and its summary says so.

    NightError if the machine sleeps through every attempt."""
    if result.status == "interrupted" and experiment.repeats.get("interrupted", 0) + 1 >= MOST_INTERRUPTIONS:
        raise NightError("the machine was suspended during every attempt at a trial; keep it awake, then --resume")
    few, one_in = REPEATS_OF_A_NIGHT
    result = _against_the_night(night, result)
    disturbed = result.status == "ok" and (budget_seconds or 0.0) >= SHORTEST_PROBED and disturbance(result)
    if not disturbed or experiment.repeats.get("disturbed", 0) >= MOST_REPEATS or night.disturbed >= few + night.trials // one_in:
        return result
    message = f"the machine's speed changed, {disturbed}"
    return replace(result, status="disturbed", error={"kind": "disturbed", "message": message, "step": None, "tail": ""})


def disturbance(result: TrialResult) -> str:
    """What is known about the machine during a training, "" if it was quiet."""
    return one_line(str(result.summary.get("speed_warning", "")))


def _against_the_night(night: Night, result: TrialResult) -> TrialResult:
    """With a warning in its summary where the machine was slow from beginning to end: only the night can tell."""
    trials = (trial for experiment in night.experiments for trial in experiment.trials)
    before = [rate for trial in trials if isinstance(rate := trial.summary.get("products_per_second"), float)]
    rate = result.summary.get("products_per_second")
    if not isinstance(rate, float) or disturbance(result) or len(before) < TRIALS_BEFORE:
        return result
    change = rate / max(median(before), 1e-9) - 1
    warning = {"speed_warning": f"{change:+.0%} against the night's median: heat, or another program"} if change < -SLOWER else {}
    return replace(result, summary={**result.summary, **warning})


def judge(night: Night, experiment: Experiment, rule: Rule) -> Decision:
    """What the scores of the night say of an experiment that has one."""
    best = night.leader
    firsts = [e.scores[0] for e in night.experiments[best.n + 1 : experiment.n] if e.scores]
    return decide(
        best.scores, experiment.scores, noise(night), firsts=firsts, lines_delta=experiment.lines - best.lines,
        record=night.record.scores, rule=rule,
    )  # fmt: skip


def noise(night: Night) -> Noise:
    """The night's noise, from every repeated trial; a first trial that selected its candidate is left out."""
    return estimate_noise([e.scores if e.n == 0 else fresh(e.scores) for e in night.experiments])


def _fault(kind: str, message: str) -> EarlyVerdict:
    return EarlyVerdict(kind, message, {"kind": kind, "message": message, "step": None, "tail": ""})
