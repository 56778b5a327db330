"""Is the candidate better than the best so far, or was it lucky?

Scores are validation bits per byte (bpb), lower is better; a `gain` is bpb of the best minus bpb of the candidate, so
positive is better. Everything here is a pure function of scores; the caller trains, and asks again:

    noise = estimate_noise([best, *(fresh(c) for c in earlier_candidates), fresh(candidate)])
    verdict = decide(best, candidate, noise, lines_delta=-3)
    if verdict.action == "again": train one more trial of the best if verdict.remeasure_best, else of the candidate
    if verdict.action == "keep":  best = fresh(candidate)

The rule is a group-sequential test (Wald 1945, "Sequential tests of statistical hypotheses"; Pocock 1977) with unequal
costs. Most candidates are no better than the best, so the first trial is a cheap screen: below `promising` sigmas of gain
the candidate is discarded at once. A promising one is trained again, trial by trial, until its mean gain
- clears the bar: z of the gain's Student t statistic above the quantile that shares `false_keeps` among the
  candidates of the night and the looks at each of them: keep, or
- falls below the floor for its number of trials: discard, or
- reaches `max_trials`: discard.
The error of the best's own mean is shared by every candidate of the night, so a lucky best would freeze it and an
unlucky one would open it to luck. Hence the best is trained again too, lazily: only when a candidate gets so far that a
better known best is worth a training. Those trials stay with the best, so that they are paid once a keep.

Selection is corrected where it enters. A candidate's first trial is what got it looked at, so it counts as evidence in
the test, whose bar knows of it, but not afterwards: `fresh` drops it from the new best's mean (the winner's curse) and
from the noise. Pairing by seed is not used: with 5-minute trainings on a busy machine the correlation of two trials with
the same seed may be nil, and then a paired difference has twice the variance of the mean it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

PRIOR_SIGMA = 0.0003  # bpb; the quietest machine seen. One squared deviation of it is added to those measured
UNKNOWN_SIGMA = 0.03  # bpb; the noisiest machine reported, believed until something was measured twice

Action = Literal["keep", "discard", "again"]
Reason = Literal["better", "simpler", "worse", "not better", "trial limit", "promising", "best uncertain"]


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one trial (bpb), and the degrees of freedom it was estimated with."""

    sigma: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class Rule:
    """What the night may risk and spend. Limits in sigmas are of the gain; see `scripts/operating_curve.py`."""

    false_keeps: float = 0.05  # chance that a night of identical candidates keeps any of them
    experiments: int = 100  # candidates in the night that share this chance
    looks: float = 2.0  # effective number of looks at a promising candidate, found by simulation
    baseline_trials: int = 5  # of the first best, before any candidate
    min_trials: int = 2  # of a candidate before it may be kept: one number is never enough
    max_trials: int = 10  # of a candidate
    promising: float = 0.8  # sigmas of gain the first trial must show
    hopeful: float = 1.0  # sigmas of mean gain that later trials must hold
    best_trials: int = 16  # of the best, at most, asked for while a candidate is in doubt
    margin: float = 1.0  # sigmas a simpler candidate may be worse
    margin_risk: float = 0.05  # chance to keep a simpler candidate that is worse by the whole margin
    simpler_trials: int = 6  # of a candidate that has only its brevity for it

    @property
    def bar(self) -> float:
        """The z that a keep must clear."""
        return NormalDist().inv_cdf(1 - self.false_keeps / self.experiments / self.looks)

    def floor(self, trials: int) -> float:
        """Sigmas of mean gain below which a candidate with so many trials is discarded."""
        return self.promising if trials == 1 else self.hopeful

    def best_needed(self, trials: int) -> int:
        """Trials the best should have to judge a candidate with so many."""
        return min(self.best_trials, 4 + 2 * trials)


@dataclass(frozen=True)
class Verdict:
    """What to do next and on what evidence.

    `gain` and its lower limit `gain_low` (one-sided 95 %) are in bpb; `confidence` is that of the candidate being better,
    from this comparison alone (the bar for a keep is higher than it looks: a night makes a hundred comparisons). With
    action `again`, `remeasure_best` says whose trial is next.
    """

    action: Action
    reason: Reason
    gain: float
    gain_low: float
    confidence: float
    remeasure_best: bool = False


def fresh(trials: Sequence[float]) -> list[float]:
    """The trials of a candidate that did not help to select it: all but the first."""
    return list(trials[1:])


def estimate_noise(groups: Iterable[Sequence[float]]) -> Noise:
    """Pooled standard deviation within groups of trials of the same file, over the whole night.

    The prior only ever adds: with few trials that agree by chance sigma stays near `PRIOR_SIGMA`, and a large sigma isn't
    pulled down. Its weight is one observation, and it earns no degree of freedom.
    """
    squares, freedom = 0.0, 0
    for group in groups:
        if len(group) > 1:
            mean = _mean(group)
            squares += sum((score - mean) ** 2 for score in group)
            freedom += len(group) - 1
    if not freedom:
        return Noise(UNKNOWN_SIGMA, 0)
    return Noise(math.sqrt((squares + PRIOR_SIGMA**2) / freedom), freedom)


def decide(
    best: Sequence[float], candidate: Sequence[float], noise: Noise, *, lines_delta: int = 0, rule: Rule = Rule()
) -> Verdict:
    """Judge a candidate by all its trials so far against all trials of the best.

    `lines_delta` is the change in lines of code: below 0 a candidate that isn't worse by the margin is kept as `simpler`.
    Raises ValueError for no score or one that isn't finite: a failed trial is no score.
    """
    if not best or not candidate or not all(map(math.isfinite, (*best, *candidate))):
        raise ValueError(f"expected finite scores of both, got best={list(best)} candidate={list(candidate)}")
    trials, sigma = len(candidate), noise.sigma
    gain = _mean(best) - _mean(candidate)
    error = sigma * math.sqrt(1 / trials + 1 / len(best))
    z = _z(gain / error, noise.degrees_of_freedom)

    def verdict(action: Action, reason: Reason, remeasure_best: bool = False) -> Verdict:
        low = gain - error * _t(1.645, noise.degrees_of_freedom)
        return Verdict(action, reason, gain, low, NormalDist().cdf(z), remeasure_best)

    needed = rule.best_needed(trials)
    # What a better known best could still add to the gain: one standard deviation of its change.
    hope = math.sqrt(max(0.0, 1 / len(best) - 1 / needed))
    better_z, simpler_z = rule.bar, NormalDist().inv_cdf(1 - rule.margin_risk / rule.looks)
    shorter = lines_delta < 0 and trials <= rule.simpler_trials
    floor = rule.floor(trials) if not shorter else -rule.margin / 2
    if gain < (floor - hope) * sigma:
        return verdict("discard", "worse" if trials == 1 else "not better")
    if len(best) < needed:
        return verdict("again", "best uncertain", remeasure_best=True)
    if gain < floor * sigma:
        return verdict("discard", "worse" if trials == 1 else "not better")
    if trials >= rule.min_trials:
        if z > better_z:
            return verdict("keep", "better")
        if lines_delta < 0 and _z((gain + rule.margin * sigma) / error, noise.degrees_of_freedom) > simpler_z:
            return verdict("keep", "simpler")
    if trials >= rule.max_trials:
        return verdict("discard", "trial limit")
    return verdict("again", "promising")


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)


def _z(t: float, freedom: int) -> float:
    """The normal deviate with the tail of Student's t; within 0.05 from 3 degrees of freedom on (Wallace 1959)."""
    nu = max(freedom, 1)
    return math.copysign((8 * nu + 1) / (8 * nu + 3) * math.sqrt(nu * math.log1p(t * t / nu)), t)


def _t(z: float, freedom: int) -> float:
    """The inverse of `_z`."""
    nu = max(freedom, 1)
    u = z * (8 * nu + 3) / (8 * nu + 1)
    return math.copysign(math.sqrt(nu * math.expm1(u * u / nu)), z)
