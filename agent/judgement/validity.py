"""Whether the result of a trial counts: not if the machine slept, or was faster or slower than usual."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from agent.errors import NightError
from agent.journal.state import Experiment, Night
from agent.text import failure_record, one_line
from agent.trial.order import TrialResult

MOST_INTERRUPTIONS = 5  # of one trial, in a row
MOST_REPEATS = 2  # of one trial, in a row, because the machine was not alike at its beginning and its end
REPEATS_OF_A_NIGHT = 4, 10  # a night repeats at most 4 trials plus one in 10; a machine that is never quiet is part of the noise
SHORTEST_PROBED = 30.0  # seconds of training; in a shorter one the harness measures the machine's speed too briefly
SLOWER = 0.10  # below the median of the night's trainings: as the harness's own bound for a change within one
TRIALS_BEFORE = 3  # that the median needs


def validated(night: Night, experiment: Experiment, result: TrialResult, budget_seconds: float | None) -> TrialResult:
    """The result of a trial, with status `disturbed` if it does not count, so that neither heat nor another program decides: the
    machine's speed changed during the training by more than the harness allows, or was below the night's median throughout.

    A trial is repeated `MOST_REPEATS` times, and a night repeats only a share of its trials. Beyond that the result counts, and
    its summary has a warning. NightError if the machine sleeps through every attempt."""
    if result.status == "interrupted" and experiment.repeats.get(result.kind, 0) + 1 >= MOST_INTERRUPTIONS:
        raise NightError("the machine was suspended during every attempt at a trial; keep it awake, then --resume")
    few, one_in = REPEATS_OF_A_NIGHT
    result = _against_the_night(night, result)
    disturbed = result.status == "ok" and decisive(budget_seconds) and disturbance(result)
    if not disturbed or experiment.repeats.get("disturbed", 0) >= MOST_REPEATS or night.disturbed >= few + night.trials // one_in:
        return result
    message = f"the machine {disturbed}"
    return replace(result, status="disturbed", error=failure_record("disturbed", message))


def decisive(budget_seconds: float | None) -> bool:
    """Whether a training is long enough for the machine's speed to decide whether it counts."""
    return (budget_seconds or 0.0) >= SHORTEST_PROBED


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
    words = f"was {-change:.0%} slower than in the night's median training (heat or another program?)"
    warning = {"speed_warning": words} if change < -SLOWER else {}
    return replace(result, summary={**result.summary, **warning})
