"""Is the candidate better than the best so far, or was it lucky? Better by more than luck explains, measured side by side.

Scores are validation bits per byte (bpb), lower is better. A gain is positive when the candidate is better. `decide` looks at all
trainings of the night in the order they ended and says what comes next: train the candidate, train the best, keep or discard. It
knows nothing else, so a driver that was killed finds the same next step in its journal.

1. Looks. The candidate is trained once. Nearly all candidates are no better, and most of them show it here: the training must lead
   what the best would score now by about 0.45 sigmas, as a third of equal candidates does. Then it is trained a second and a
   third time, and the mean must lead by more each time. Looks choose who is compared. They prove nothing, because a lucky
   candidate was chosen for its luck.
2. Comparison. What is left is trained side by side with the best: best, candidate, candidate, best, and so on. Only these trainings
   decide. A machine that grows hot, or slow, hits both alike; and the luck of the looks is not among them. The candidate is kept
   when its lead is larger than luck explains. It is discarded as soon as it leads by less than `lead` sigmas.

"What the best would score now" (`level_now`) comes from the best's own trainings, where recent ones count more, and from the best
third of the recent first looks, which tell how the machine does today. An error in it costs trainings or a missed gain, but never
makes a false keep.

How large a lead luck explains: all comparisons of a night that keep nothing share the risk `false_keeps` (`Rule.bar`). The noise is
the larger of the night's and the candidate's own spread. One training far from its siblings (a busy minute) is set aside, on both
sides alike. And most of the candidate's trainings must beat the best's middle one, because a mean alone can be carried by a few.
Repeats that agree far better than the night's noise allows are not independent, and are never kept.

A shorter file is kept if the same comparison shows that it is not worse by `margin`. What earlier simplifications lost counts.

docs/decision.md explains the rule in words, with its measured error rates, and says what the 5 % suppose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist, median
from typing import Literal

from agent.journal.state import Experiment, Night

PRIOR_SIGMA = 0.0003  # bpb; the quietest machine seen. Sigma is not estimated below it from few trainings
UNKNOWN_SIGMA = 0.03  # bpb; the noisiest machine reported, assumed until something was trained twice

# What the best would score now
RECENT = 12  # trainings of the best that are looked at
HALF_LIFE = 12.0  # trainings after which one of the best counts half
RIVALS = 16  # recent first looks that tell how the machine does
FEWEST_RIVALS = 5
RIVAL_WORTH = 0.6  # trainings of the best that one first look counts for
BEST_PART = 1 / 3  # of the first looks, by whose edge they are judged: the others may be worse for other reasons
BY_LUCK = -NormalDist().inv_cdf(BEST_PART)  # sigmas by which so many of equal candidates lead

# Outliers
ASIDE = 4.0  # sigmas from the middle of the same file's trainings, beyond which one is set aside
LUCKIEST = 2.5  # sigmas of lead that one look may claim
SPOILT = -3.5  # sigmas of lead below which one later look is passed over

SHORTER_FLOOR = 0.75  # of the margin: a shorter candidate that seems worse than this is discarded

# The night's noise
PAUSE = 8  # trainings between two of one file, above which they say nothing of the noise: the machine may have changed
LAG = 3  # a training is compared with so many before it, so that long bursts don't outweigh the others
FEW = 3  # trainings by which a candidate that was not kept may speak for the night: it may be a noisy one
REPEATED_DRAW, FAR = 0.02, 3.5  # of the middle difference: smaller ones repeat one random draw, larger ones are outliers
MEAN_DIFFERENCE = 1.12  # of two draws from a normal distribution, without those beyond `FAR`, in sigmas
MAD = 0.6745  # middle distance from the median, in sigmas
AGREE = 0.0005  # chance that independent repeats agree so well

Action = Literal["keep", "discard", "train candidate", "train best"]
Reason = Literal["better", "simpler", "worse", "within the noise", "trial limit", "repeats agree", "promising", "side by side"]


@dataclass
class Contender:
    """One experiment. `trials` are pairs (place among all trainings of the night, val_bpb), earliest first."""

    trials: list[tuple[int, float]] = field(default_factory=list)
    lines: int = 0
    kept: bool = False


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one trial (bpb), and the degrees of freedom it was estimated with."""

    sigma: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class Rule:
    """What a night may risk and spend. Sigma is the noise of one training."""

    false_keeps: float = 0.05  # chance that a night of equal candidates keeps any of them
    experiments: int = 100  # candidates that share this chance; a longer night needs its own number
    baseline_trials: int = 6  # of the first best, before any candidate
    looks: tuple[float, ...] = (0.45, 0.75, 1.0)  # sigmas by which the mean of the first trainings must lead
    lead: float = 0.85  # the same, while it is trained side by side
    thrift: float = 1.6  # trainings of an average candidate, above which all of these rise: a wave makes many look good
    sure: float = 6.0  # sigmas of lead after which the other looks are left out
    min_pairs: int = 6  # before a keep
    max_pairs: int = 16
    ahead: float = 0.75  # share of the candidate's trainings that must beat the best's middle one
    gap: float = 4.0  # sigmas between all trainings of the one and all of the other: kept after `gap_pairs`
    gap_pairs: int = 2
    compared: float = 0.15  # share of candidates that come to a comparison in a night of equals
    own: float = 0.5  # trainings of the night that the candidate's own spread is mixed with
    margin: float = 1.0  # sigmas that a shorter candidate may be worse
    margin_risk: float = 0.05  # chance to keep a shorter one that is worse by the whole margin
    shorter_pairs: tuple[int, ...] = (4, 6, 8)  # pairs at which a candidate that has only its brevity for it is judged

    def bar(self, earlier: int) -> float:
        """The z that a keep must clear after `earlier` comparisons that kept nothing.

        The first ones, as many as a night of equal candidates has, share 80 % of the risk, all later ones the rest.
        """
        share = max(2, round(self.experiments * self.compared))
        if earlier < share:
            return _quantile(self.false_keeps * 0.8 / share)
        return _quantile(self.false_keeps * 0.2 * share / (earlier * (earlier + 1)))

    @property
    def margin_bar(self) -> float:
        """The z that a shorter candidate must clear above the margin."""
        return _quantile(self.margin_risk / 2)


DEFAULT_RULE = Rule()


@dataclass(frozen=True)
class Step:
    """What comes next, and on what evidence. `gain`, its `noise` (two standard deviations) and `sigma` in bpb."""

    action: Action
    reason: Reason
    gain: float
    noise: float
    sigma: float
    pairs: int = 0

    @property
    def words(self) -> str:
        """The evidence in plain words, for the human."""
        lead = f"{'ahead of' if self.gain >= 0 else 'behind'} the best by {abs(self.gain):.4f}"
        lead += f" in {self.pairs} pair{'s' * (self.pairs > 1)} trained side by side" if self.pairs else ""
        if self.reason == "repeats agree":
            return f"its repeats agree too well: a fixed seed? (noise of one training: {self.sigma:.4f})"
        if self.reason == "worse":
            return f"worse: {lead}"
        if self.reason == "trial limit":
            return f"{lead}, still within the noise (±{self.noise:.4f}) after the most pairs allowed"
        if self.reason in ("within the noise", "better", "simpler"):
            return f"{self.reason}: {lead} (noise ±{self.noise:.4f})"
        return f"{lead} (noise ±{self.noise:.4f})"

    @property
    def next_words(self) -> str:
        """What is trained next, for the human."""
        if self.reason == "promising":
            return "trained again with another seed"
        who = "the best" if self.action == "train best" else "the candidate"
        return f"trained side by side with the best, pair {self.pairs + 1}: {who}"


def decide(contenders: Sequence[Contender], rule: Rule = DEFAULT_RULE) -> Step:
    """The next step for the last contender. The first is the baseline, and the best is the last one that was kept.

    Raises ValueError for no score or one that isn't finite: a failed trial is no score.
    """
    candidate, earlier = contenders[-1], contenders[:-1]
    at = max((i for i, contender in enumerate(earlier) if contender.kept), default=-1)
    best, own = earlier[at] if at >= 0 else Contender(), [score for _, score in candidate.trials]
    if not best.trials or not own or not all(map(math.isfinite, own)):
        raise ValueError(f"expected finite scores of both, got best={best.trials} candidate={candidate.trials}")
    noise = estimate_noise(contenders)
    sigma, shorter = noise.sigma, candidate.lines < best.lines
    theirs, mine = side_by_side(best, candidate)
    pairs, looks = min(len(theirs), len(mine)), len(own) - len(mine)
    firsts = [contender.trials[0][1] for contender in earlier[at + 1 :] if contender.trials]
    level = level_now(best.trials, firsts, candidate.trials[-1][0], sigma)
    gain = level - _mean(set_aside(own, sigma)) if theirs else looks_lead(own, level, sigma)
    error = sigma * math.sqrt(1 / len(own) + 1 / max(4, len(theirs)))
    side = gain if gain < 0 else max(gain, level - median(own))  # told in full, though a look that is far too good counts for less

    def step(action: Action, reason: Reason) -> Step:
        return Step(action, reason, side, 2 * error, sigma, pairs)

    if agrees_too_well(own, sigma):
        return step("discard", "repeats agree")
    if len(theirs) != len(mine):
        return step("train best" if len(theirs) < len(mine) else "train candidate", "side by side")
    lost = lost_by_brevity(earlier, sigma) if shorter else 0.0
    spread = max(1.0, own_spread(own, sigma, rule.own))
    if pairs:
        ours, others = set_aside(mine, sigma), set_aside(theirs, sigma)
        side, error = _mean(others) - _mean(ours), sigma * math.sqrt(spread / len(ours) + 1 / len(others))
        freedom = noise.degrees_of_freedom if spread == 1.0 else rule.own + len(own) - 1
        if pairs >= rule.gap_pairs and min(theirs) - max(own) > rule.gap * sigma * max(1.0, 5 / max(1, freedom)):
            return step("keep", "better")
        middle = median(theirs)
        ahead = sum(score < middle for score in mine) >= rule.ahead * pairs
        if pairs >= rule.min_pairs and ahead and _z(side / error, freedom) > rule.bar(comparisons(earlier)):
            return step("keep", "better")
        above = side - lost + rule.margin * sigma
        if shorter and pairs in rule.shorter_pairs and _z(above / error, freedom) > rule.margin_bar:
            return step("keep", "simpler")
        if pairs >= rule.max_pairs:
            return step("discard", "trial limit")
    floor = sigma * (rule.lead if pairs else rule.looks[min(looks, len(rule.looks)) - 1])
    floor += sigma * max(0.0, trained_each(earlier) - rule.thrift)
    if pairs:
        floor *= math.sqrt(max(1.0, own_spread(own, sigma, 3.0)))
    if shorter and pairs < rule.shorter_pairs[-1]:
        floor = min(floor, lost - SHORTER_FLOOR * rule.margin * sigma)
    if gain < floor:
        return step("discard", "worse" if side < -2 * error else "within the noise")
    if not pairs and looks < len(rule.looks) and level - max(own) < rule.sure * sigma:
        return step("train candidate", "promising")
    return step("train candidate" if pairs % 2 else "train best", "side by side")


def side_by_side(best: Contender, candidate: Contender) -> tuple[list[float], list[float]]:
    """The scores of the best and of the candidate since the best was trained beside it; both empty before."""
    theirs = [trial for trial in best.trials if trial[0] > candidate.trials[0][0]]
    begin = theirs[0][0] if theirs else math.inf
    mine = [score for when, score in candidate.trials if when > begin]
    return [score for _, score in theirs], mine[: len(theirs)] if candidate.kept else mine  # later ones are for its successors


def looks_lead(own: Sequence[float], level: float, sigma: float) -> float:
    """Mean lead (bpb) of the first looks. A lead above `LUCKIEST` sigmas counts as `LUCKIEST`. One later look far below the best is
    left out. If the first is behind the best, or two are far below it, every lead counts as it is."""
    leads = [level - score for score in own]
    counted = [min(LUCKIEST * sigma, lead) for lead in leads if lead > SPOILT * sigma]
    return _mean(leads) if leads[0] < 0 or len(counted) < len(leads) - 1 else _mean(counted)


def level_now(trials: Sequence[tuple[int, float]], firsts: Sequence[float], now: int, sigma: float) -> float:
    """What the best would score (bpb) if it were trained now, `now` being the place of the newest training.

    Where most candidates are worse than the best, their best third leads by less, and the level seems worse than it is. That lets
    at most about a third of them have a second look.
    """
    recent = trials[-RECENT:]
    middle, weight, total = median(score for _, score in recent), 0.0, 0.0
    for when, score in recent:
        if abs(score - middle) <= ASIDE * sigma:
            share = 0.5 ** ((now - when) / HALF_LIFE)
            weight, total = weight + share, total + share * score
    if len(firsts) >= FEWEST_RIVALS:
        ranked = sorted(firsts[-RIVALS:])
        place = BEST_PART * (len(ranked) + 1) - 1
        low = int(place)
        edge = ranked[low] + (place - low) * (ranked[low + 1] - ranked[low])
        share = RIVAL_WORTH * len(ranked)
        weight, total = weight + share, total + share * (edge + BY_LUCK * sigma)
    return total / weight if weight > 1e-9 else middle


def trained_each(contenders: Sequence[Contender]) -> float:
    """Trainings for each candidate that was not kept, those of the best beside it included; 0 until there are some."""
    spans = [c.trials[-1][0] - c.trials[0][0] + 1 for c in contenders if c.trials and not c.kept]
    return sum(spans) / len(spans) if len(spans) > 2 * FEWEST_RIVALS else 0.0


def comparisons(contenders: Sequence[Contender]) -> int:
    """Candidates so far that were trained side by side with the best and not kept. A keep gives its share of the risk back."""
    tried = (c.trials for c in contenders if len(c.trials) > 1 and not c.kept)
    return sum(trials[-1][0] - trials[0][0] > len(trials) - 1 for trials in tried)  # others were trained in between


def lost_by_brevity(contenders: Sequence[Contender], sigma: float) -> float:
    """How much worse (bpb) the best may be than the best ever kept, by the comparisons that led to it.

    A comparison counts one standard error lower than it came out: what was kept was lucky in it, too.
    """
    gained = most = 0.0
    for best, candidate in pairwise(contender for contender in contenders if contender.kept):
        theirs, mine = side_by_side(best, candidate)
        error = sigma * math.sqrt(1 / len(theirs) + 1 / len(mine))
        gained += _mean(set_aside(theirs, sigma)) - _mean(set_aside(mine, sigma)) - error
        most = max(most, gained)
    return most - gained


def set_aside(scores: Sequence[float], sigma: float) -> list[float]:
    """The scores without one, or one in eight, that lies far from the others."""
    if len(scores) < 3:
        return list(scores)
    middle = median(scores)
    ranked = sorted(scores, key=lambda score: abs(score - middle))
    reach = ASIDE * max(sigma, abs(ranked[len(ranked) // 2] - middle) / MAD if len(ranked) > 5 else 0.0)
    for _ in range(1 + len(scores) // 8):
        if abs(ranked[-1] - middle) > reach:
            ranked.pop()
    return ranked


def own_spread(scores: Sequence[float], sigma: float, prior: float) -> float:
    """Variance of a candidate's own trainings over that of the night's noise, mixed with `prior` observations of the latter.

    The looks count here: a noisy candidate that was lucky in them is betrayed by what follows.
    """
    inside = set_aside(scores, sigma)
    mean = _mean(inside)
    return (prior + sum((score - mean) ** 2 for score in inside) / sigma**2) / (prior + len(inside) - 1)


def agrees_too_well(scores: Sequence[float], sigma: float) -> bool:
    """Whether the scores differ so little that independent trainings do so once in 1 / `AGREE`, by the chi-squared distribution.

    Never where the night's own noise is next to nothing: nothing can be told there.
    """
    if len(scores) < 2 or sigma <= PRIOR_SIGMA:
        return False
    mean, half = _mean(scores), (len(scores) - 1) / 2
    x = sum((score - mean) ** 2 for score in scores) / sigma**2 / 2
    if x > half / 2:
        return False
    term: float = math.exp(-x) * x**half / math.gamma(half + 1)
    total = term
    for k in range(1, 12):
        term *= x / (half + k)
        total += term
    return total < AGREE


def estimate_noise(contenders: Iterable[Contender]) -> Noise:
    """Standard deviation of one training, from differences between trainings of one file made close together.

    Those far above the middle difference (outliers) and far below it (a fixed seed) are left out, and so is a candidate's first
    trial, which selected it. The prior only ever adds: with few trials that agree by chance sigma stays near `PRIOR_SIGMA`.
    """
    differences: list[float] = []
    freedom = 0
    for n, contender in enumerate(contenders):
        trials = contender.trials[n > 0 :] if contender.kept else contender.trials[n > 0 : FEW + 1]
        if len(trials) > 1:
            found, repeats = _close_together(tuple(trials))
            differences += found
            freedom += repeats
    if not differences:
        return Noise(UNKNOWN_SIGMA, 0)
    differences.sort()
    middle = differences[len(differences) // 2]
    drawn = [difference for difference in differences if REPEATED_DRAW * middle < difference < FAR * middle]
    sigma = _mean(drawn) / MEAN_DIFFERENCE if drawn else middle
    return Noise(math.sqrt(sigma**2 + PRIOR_SIGMA**2 / freedom), freedom)


@lru_cache(maxsize=1000)
def _close_together(trials: tuple[tuple[int, float], ...]) -> tuple[tuple[float, ...], int]:
    """Differences between trainings with no `PAUSE` between them, and how many trainings repeat one before."""
    differences: list[float] = []
    freedom, burst, last = 0, list[float](), trials[0][0]
    for when, score in trials:
        if when - last > PAUSE:
            burst = []
        freedom += bool(burst)
        differences += [abs(score - other) for other in burst[-LAG:]]
        burst.append(score)
        last = when
    return tuple(differences), freedom


def judge(night: Night, experiment: Experiment, rule: Rule = DEFAULT_RULE) -> Step:
    """The next step for an experiment that has a score."""
    return decide(contenders(night)[: experiment.n + 1], rule)


def noise(night: Night) -> Noise:
    """The night's noise."""
    return estimate_noise(contenders(night))


def contenders(night: Night) -> list[Contender]:
    """The experiments of a night as the rule sees them."""
    kept = {0, *night.kept}
    return [
        Contender([(t.order, t.val_bpb) for t in e.trials if t.val_bpb is not None], e.lines, e.n in kept)
        for e in night.experiments
    ]


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _quantile(chance: float) -> float:
    return NormalDist().inv_cdf(1 - chance)


def _z(t: float, freedom: float) -> float:
    """The normal deviate with the tail of Student's t, within 0.05 from 3 degrees of freedom on (Wallace 1959)."""
    nu = max(freedom, 1.0)
    return math.copysign((8 * nu + 1) / (8 * nu + 3) * math.sqrt(nu * math.log1p(t * t / nu)), t)
