"""Is the candidate better than the best so far, or was it lucky?

Scores are validation bits per byte (bpb), lower is better. A `gain` is the best's bpb minus the candidate's, so positive is
better. Everything here is a pure function of scores. The caller trains and asks again:

    best = baseline = [rule.baseline_trials scores]
    noise = estimate_noise([baseline, *(fresh(scores) for scores in every candidate of the night, this one too)])
    decision = decide(best, candidate, noise, firsts=[scores[0] of every candidate judged against this best], lines_delta=-3)
    if decision.action == "again": train one more trial of the best if decision.remeasure_best, else of the candidate
    if decision.action == "keep":  best = candidate, with all its trials

The rule is a sequential probability ratio test (Wald 1945, "Sequential tests of statistical hypotheses"). It tests "the
candidate gains `worth` sigmas" against "the candidate gains nothing". Most candidates of a night gain nothing, and of all tests
with the same risks this one spends the fewest trainings on them. After each trial of the candidate there are three outcomes:
- The mean gain is below Wald's lower line, `worth / 2 + log(give_up) / (worth * trials)` sigmas (0.7 after the first trial,
  rising to 1): discard. Four of five candidates that are no better are discarded after one trial.
- The mean gain clears the bar: keep. Wald's upper line would need a known sigma and a known best. Instead, Student's t of the gain
  must exceed a quantile that spreads `false_keeps` over all candidates of a night. It must also nearly exceed it without the
  candidate's luckiest trial, because one outlier is no evidence.
- Neither: train one more trial, up to `max_trials`.

All candidates are compared with the same best, so an error in its mean affects all of them. A lucky best would block the night;
an unlucky one would have every candidate trained twice. Two measures bound this error:
- The best is trained again, but only when needed: up to `best_trials` if that could change the verdict, and up to 1.5 times the
  candidate's trials while a candidate lasts. These trials stay with the best.
- The line for discards moves with the first trials of all candidates since the last keep, which say something about the best at no
  cost (`misjudged`). It decides who is trained again, never who is kept. A night of 100 equal candidates costs 1.48 trainings
  per candidate, including the baseline and repeats of the best; with a fixed line it would cost 1.57 for the same power.

Selection: a candidate is only repeated because its first trial looked good. That trial counts in full in the test, whose bar was
simulated with it. It does not count in the noise (`fresh`), because a lucky first trial followed by an ordinary one looks like more
noise than there is. A new best is overestimated by 0.1 to 0.4 sigmas (the winner's curse). Leaving out its first trial did not
help, since the trial that ends a test is selected, too. Later repeats correct it. The driver pairs seeds, but the pairs are not
used: two edits of one file may have uncorrelated scores at equal seeds, and pairing would then discard most trials of the best.

A shorter file may be worse than the best by `margin`, measured against the best mean ever kept (`record`), so that many small
losses do not add up.

`scripts/operating_curve.py` shows what the rule costs and finds, and `tests/judgement/test_decision.py` holds it to that. The rule
assumes normal scores with one sigma all night. It tolerates tails as heavy as Student's t with 3 degrees of freedom, and slow
outliers (a busy machine). It does not tolerate sudden excellent scores: with a long tail towards low bpb, false keeps quadruple.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, quantiles
from typing import Literal

from agent.journal.state import Experiment, Night

PRIOR_SIGMA = 0.0003  # bpb; the quietest machine seen. One squared deviation of it is added to those measured
UNKNOWN_SIGMA = 0.03  # bpb; the noisiest machine reported, believed until something was measured twice

SIMPLER_LOOKS = 2.0  # looks at the margin, as if independent; by simulation
BEST_PER_TRIAL = 1.5  # trials of the best for one of a candidate: dearer than 1 now, and of use to the next candidate
WITHOUT_LUCK = 0.9  # of the bar, to be cleared without the luckiest trial; by simulation, with heavy tails too
REACH = 2.0  # standard deviations that the best's mean may still move when it is trained again
FIFTH = NormalDist().inv_cdf(0.8)  # sigmas above which a fifth of equal candidates begin
MOVES = -0.3, 0.4  # sigmas that the line of discards may fall and rise: candidates may also be truly worse, or truly better
BELIEF = 10  # first trials, to be believed by half

Action = Literal["keep", "discard", "again"]
Reason = Literal["better", "simpler", "worse", "not better", "trial limit", "promising", "best uncertain"]


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one trial (bpb), and the degrees of freedom it was estimated with."""

    sigma: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class Rule:
    """What a night may risk and spend. Sigma is the noise of one trial."""

    false_keeps: float = 0.05  # chance that a night of identical candidates keeps any of them
    experiments: int = 100  # candidates that share this chance; a longer night needs its own number
    worth: float = 2.0  # sigmas of gain that should be found, four times in five
    give_up: float = 0.58  # discard below this likelihood ratio of a gain of `worth` to none
    baseline_trials: int = 6  # of the first best, before any candidate
    best_trials: int = 9  # of any best, when they could turn a first look
    max_best_trials: int = 20
    min_trials: int = 2  # of a candidate before it may be kept, 2 or more: one number is never enough
    max_trials: int = 16  # of a candidate; a gain of 2 sigmas takes 6 on average, one of 1 sigma at worst all
    margin: float = 1.0  # sigmas that a simpler candidate may be worse
    margin_risk: float = 0.05  # chance to keep a simpler one that is worse by the whole margin
    simpler_trials: int = 8  # of a candidate that has only its brevity for it

    @property
    def bar(self) -> float:
        """The z that a keep must clear."""
        return NormalDist().inv_cdf(1 - self.false_keeps / self.experiments)

    @property
    def margin_bar(self) -> float:
        """The z that a simpler candidate must clear above the margin."""
        return NormalDist().inv_cdf(1 - self.margin_risk / SIMPLER_LOOKS)

    def floor(self, trials: int) -> float:
        """Mean gain, in sigmas, below which a candidate with this many trials is discarded."""
        return self.worth / 2 + math.log(self.give_up) / (self.worth * trials)

    def best_needed(self, trials: int) -> int:
        """Trials that the best should have to judge a candidate with this many trials."""
        return min(self.max_best_trials, max(self.best_trials, math.ceil(BEST_PER_TRIAL * trials)))


DEFAULT_RULE = Rule()


@dataclass(frozen=True)
class Decision:
    """What to do next and on what evidence.

    `gain` and its lower limit `gain_low` (one-sided 95 %) are in bpb; `confidence` is that of the candidate being better
    by this comparison alone, so that a keep needs far more than 0.95: a night makes a hundred comparisons. With action
    `again`, `remeasure_best` says whose trial is next.
    """

    action: Action
    reason: Reason
    gain: float
    gain_low: float
    confidence: float
    remeasure_best: bool = False


def fresh(trials: Sequence[float]) -> list[float]:
    """The trials of a candidate that may speak for the noise: all but the first, which selected it."""
    return list(trials[1:])


def estimate_noise(groups: Iterable[Sequence[float]]) -> Noise:
    """Pooled standard deviation within groups of trials of the same file, over the whole night.

    The prior only ever adds: with few trials that agree by chance sigma stays near `PRIOR_SIGMA`, and a large sigma
    isn't pulled down. Its weight is one observation, and it earns no degree of freedom.
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


def misjudged(best: Sequence[float], firsts: Sequence[float], sigma: float) -> float:
    """Sigmas by which the best's mean seems too bad (or, below 0, too good), by the first trials of all its rivals.

    The best fifth of candidates that are equal to it begin `FIFTH` sigmas better than it truly is. Where many are worse, it
    seems too good: that costs some trainings, which `MOVES` bounds. 0 until there are enough of them.
    """
    if len(firsts) < 5:
        return 0.0
    seen = (_mean(best) - quantiles(firsts, n=5)[0]) / sigma - FIFTH
    return max(MOVES[0], min(MOVES[1], seen * len(firsts) / (len(firsts) + BELIEF)))


def decide(
    best: Sequence[float],
    candidate: Sequence[float],
    noise: Noise,
    *,
    firsts: Sequence[float] = (),
    lines_delta: int = 0,
    record: Sequence[float] | None = None,
    rule: Rule = DEFAULT_RULE,
) -> Decision:
    """Judge a candidate by all its trials so far against all trials of the best.

    `firsts` are the first trials of the candidates that were judged since the best became the best. `lines_delta` is the
    change in lines of code: below 0 a candidate that isn't worse by the margin is kept as `simpler`; worse than `record`, the
    trials of the lowest mean ever kept (None: the best's). Raises ValueError for no score or one that isn't finite: a failed
    trial is no score.
    """
    if not best or not candidate or not all(map(math.isfinite, (*best, *candidate))):
        raise ValueError(f"expected finite scores of both, got best={list(best)} candidate={list(candidate)}")
    trials, sigma, freedom = len(candidate), noise.sigma, noise.degrees_of_freedom
    record = record or best
    gain, simpler = _mean(best) - _mean(candidate), _mean(record) - _mean(candidate)
    error = sigma * math.sqrt(1 / trials + 1 / len(best))
    z = _z(gain / error, freedom)

    def decision(action: Action, reason: Reason, remeasure_best: bool = False) -> Decision:
        low = gain - error * _t(1.645, freedom)
        return Decision(action, reason, gain, low, NormalDist().cdf(z), remeasure_best)

    floor = rule.floor(trials)
    if lines_delta < 0 and trials <= rule.simpler_trials:  # halfway between equal to the record and worse by the margin
        floor = min(floor, (gain - simpler) / sigma - rule.margin / 2)
    floor = (floor + misjudged(best, firsts, sigma)) * sigma
    reach = REACH * sigma * math.sqrt(max(0.0, 1 / len(best) - 1 / rule.best_trials))
    if gain < floor - reach:
        return decision("discard", "worse" if gain < 0 else "not better")
    if trials >= rule.min_trials:
        rest = sorted(candidate)[1:]
        z_rest = _z((_mean(best) - _mean(rest)) / (sigma * math.sqrt(1 / len(rest) + 1 / len(best))), freedom)
        if z > rule.bar and z_rest > WITHOUT_LUCK * rule.bar:
            return decision("keep", "better")
        z_simpler = _z((simpler + rule.margin * sigma) / (sigma * math.sqrt(1 / trials + 1 / len(record))), freedom)
        if lines_delta < 0 and z_simpler > rule.margin_bar:
            return decision("keep", "simpler")
    if reach and gain < floor + reach:
        return decision("again", "best uncertain", remeasure_best=True)
    if trials >= rule.max_trials:
        return decision("discard", "trial limit")
    if trials > 1 and len(best) < rule.best_needed(trials):
        return decision("again", "best uncertain", remeasure_best=True)
    return decision("again", "promising")


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)


def _z(t: float, freedom: int) -> float:
    """The normal deviate with the tail of Student's t, within 0.05 from 3 degrees of freedom on (Wallace 1959)."""
    nu = max(freedom, 1)
    return math.copysign((8 * nu + 1) / (8 * nu + 3) * math.sqrt(nu * math.log1p(t * t / nu)), t)


def _t(z: float, freedom: int) -> float:
    """The inverse of `_z`."""
    nu = max(freedom, 1)
    return math.copysign(math.sqrt(nu * math.expm1((z * (8 * nu + 3) / (8 * nu + 1)) ** 2 / nu)), z)


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
