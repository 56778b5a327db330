"""The rule of decision: its promises by simulation, in small, and each of its steps. The full table: scripts/operating_curve.py."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from story_kit import Story

from agent.journal.state import fold
from agent.judgement import decision
from agent.judgement.decision import DEFAULT_RULE, PRIOR_SIGMA, UNKNOWN_SIGMA, Contender, Rule, Step, decide, estimate_noise, judge
from scripts.operating_curve import CANDIDATES, NOISES, SIGMA, Greedy, Ours, ThreeSeeds, World, simulate


def equals(noise: str, nights: int) -> tuple[float, float]:
    """Share of nights of equal candidates with a false keep, and trainings a candidate."""
    draw = random.Random(noise)
    ends = [simulate(NOISES[noise], draw) for _ in range(nights)]
    return float(np.mean([end.false_keeps > 0 for end in ends])), float(np.mean([end.trainings for end in ends])) / CANDIDATES


def power(noise: str, number: int, gain: float = 2.0) -> float:
    """Share kept of candidates that gain so many sigmas, each at a random place among equal ones."""
    draw = random.Random(noise)
    return float(np.mean([simulate(NOISES[noise], draw, better_at=draw.randint(1, 40), gain=gain).found for _ in range(number)]))


# ---- the promises, in small ----


@pytest.mark.parametrize(
    ("noise", "false_nights", "trainings"),
    [
        ("Gaussian", 0.1, 1.8),  # 0.05 is promised; of so few nights more may have one
        ("5 % outliers of -6", 0.1, 1.8),
        ("drift of -1 over the night", 0.1, 1.9),
        ("step of -1 after 40 %", 0.1, 1.9),
        ("a fifth of candidates with a fixed seed", 0.1, 1.8),
    ],
)
def test_a_night_of_equal_candidates(noise: str, false_nights: float, trainings: float) -> None:
    found, cost = equals(noise, 60)
    assert found <= false_nights
    assert cost <= trainings


@pytest.mark.parametrize(("noise", "least"), [("Gaussian", 0.7), ("5 % outliers of +8", 0.55), ("drift of +1 over the night", 0.6)])
def test_a_gain_of_two_sigmas_is_found(noise: str, least: float) -> None:
    assert power(noise, 150) >= least


def test_a_large_gain_is_found_at_once() -> None:
    draw = random.Random(3)
    ends = [simulate(NOISES["Gaussian"], draw, better_at=3, gain=12.0) for _ in range(40)]
    assert np.mean([end.found for end in ends]) >= 0.97
    assert np.mean([end.spent for end in ends]) < 7


@pytest.mark.parametrize("policy", [Greedy, ThreeSeeds])
def test_the_other_rules_keep_by_luck(policy: type[Greedy] | type[ThreeSeeds]) -> None:
    draw = random.Random(1)
    assert np.mean([simulate(NOISES["Gaussian"], draw, policy, number=50).false_keeps > 0 for _ in range(20)]) > 0.5


def test_the_rule_scales_with_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def night() -> list[tuple[int, int]]:
        draw = random.Random(7)
        return [(end.false_keeps, end.trainings) for end in (simulate(NOISES["Gaussian"], draw, number=40) for _ in range(3))]

    small = night()
    monkeypatch.setattr("scripts.operating_curve.SIGMA", 10 * SIGMA)
    assert night() == small


# ---- one night, step by step ----

BASELINE = (1.001, 0.998, 1.003, 0.996, 1.0, 1.002)  # sigma about 0.003


def at(start: int, scores: Sequence[float], lines: int = 100, kept: bool = False) -> Contender:
    return Contender([(start + k, score) for k, score in enumerate(scores)], lines, kept)


class Play:
    """A night in which best and candidate score what the test says, in turn with what the rule asks for."""

    def __init__(self, lines: int = 100) -> None:
        self.best, self.candidate = at(0, BASELINE, kept=True), Contender([], lines)
        self.order: list[str] = []
        self.clock = len(BASELINE)

    def train(self, who: str, score: float) -> Step:
        contender = self.candidate if who == "candidate" else self.best
        contender.trials.append((self.clock, score))
        self.clock += 1
        self.order.append(who)
        return decide([self.best, self.candidate])

    def play(self, candidate: Sequence[float], best: Sequence[float] = (1.0,)) -> Step:
        """To the verdict; scores are repeated when they run out."""
        step, used = self.train("candidate", candidate[0]), {"candidate": 1, "best": 0}
        while step.action not in ("keep", "discard"):
            who = step.action.removeprefix("train ")
            scores = candidate if who == "candidate" else best
            step = self.train(who, scores[used[who] % len(scores)])
            used[who] += 1
        return step


GOOD = (0.991, 0.994, 0.989, 0.9925, 0.995, 0.99)  # 2.5 sigmas better
PLAIN = (1.002, 0.997, 1.0, 1.003, 0.998, 0.9995)


def test_a_clear_loser_is_discarded_after_one_training() -> None:
    play = Play()
    step = play.play([1.05])
    assert (step.action, step.reason, play.order) == ("discard", "worse", ["candidate"])
    assert step.words.startswith("worse: behind the best by 0.05")


def test_a_lower_score_within_the_noise_is_discarded_and_says_so() -> None:
    step = Play().play([0.9992])
    assert (step.action, step.reason) == ("discard", "within the noise")
    assert step.words.startswith("within the noise: ahead of the best by 0.0008 (noise ±0.00")


def test_nothing_is_kept_by_looks_and_best_and_candidate_are_trained_in_turns() -> None:
    play = Play()
    step = play.play(GOOD, PLAIN)
    assert (step.action, step.reason) == ("keep", "better")
    looks = len(DEFAULT_RULE.looks)
    assert play.order[:looks] == ["candidate"] * looks
    compared = play.order[looks:]
    assert compared[:8] == ["best", "candidate", "candidate", "best"] * 2, "so that a steady drift hits both alike"
    assert compared.count("best") == compared.count("candidate") == step.pairs >= DEFAULT_RULE.min_pairs


def test_only_what_is_trained_side_by_side_decides() -> None:
    """However good the looks were and however bad the best's old trainings: equal side by side is no gain."""
    lucky = Play()
    assert lucky.play([0.985, 0.986, 0.984, *PLAIN], PLAIN).action == "discard"
    assert lucky.order.count("best") > 0
    stale = Play()
    stale.best.trials = [(when, score + 0.05) for when, score in stale.best.trials]
    assert stale.play(PLAIN, PLAIN[::-1]).action == "discard"


def test_a_drift_hits_both() -> None:
    """The machine worsens by 3 sigmas while they are compared; the candidate is better by as much all the time."""
    play, sigma = Play(), 0.003
    step = play.train("candidate", 0.991)
    noise = random.Random(4)
    while step.action not in ("keep", "discard"):
        drift = 3 * sigma * (play.clock - len(BASELINE)) / 16
        who = step.action.removeprefix("train ")
        step = play.train(who, (0.991 if who == "candidate" else 1.0) + drift + noise.gauss(0, sigma / 2))
    assert step.action == "keep"
    assert step.gain == pytest.approx(0.009, abs=0.002)


@pytest.mark.parametrize("spoilt", [1.03, 0.97])
def test_one_busy_minute_neither_kills_nor_keeps(spoilt: float) -> None:
    for place in (4, 5, 6):
        good, plain = list(GOOD * 3), list(PLAIN * 3)
        good[place] = plain[place] = spoilt
        assert Play().play(good, PLAIN).action == "keep", place
        assert Play().play([0.992, 0.993, 0.9915, *plain], PLAIN).action == "discard", place
        beside = list(PLAIN * 3)
        beside[place - 3] = spoilt
        assert Play().play(GOOD, beside).action == "keep", place


def test_a_noisy_candidate_needs_more_than_a_quiet_one() -> None:
    """The same mean lead, once with the night's noise and once with far more of its own."""
    wide = [0.991 + 5 * (score - 0.992) for score in GOOD]
    assert Play().play(GOOD, PLAIN).action == "keep"
    quiet, noisy = Play(), Play()
    quiet.play(GOOD, PLAIN)
    noisy.play(wide, PLAIN)
    assert len(noisy.order) > len(quiet.order) or decide([noisy.best, noisy.candidate]).action == "discard"


@pytest.mark.parametrize("jitter", [0.0, 1e-6, 5e-5])
def test_repeats_that_agree_too_well_are_named_and_not_kept(jitter: float) -> None:
    draw = random.Random(2)
    step = Play().play([0.98 + draw.uniform(-jitter, jitter) for _ in range(20)], PLAIN)
    assert (step.action, step.reason) == ("discard", "repeats agree")
    assert step.words.startswith("its repeats agree too well: a fixed seed?")


def test_where_nothing_is_noisy_nothing_agrees_too_well() -> None:
    """A budget of steps on a CPU may repeat every score exactly, the baseline's too."""
    play = Play()
    play.best = at(0, [1.0] * 6, kept=True)
    assert play.play([0.98], [1.0]).reason == "better"


def test_a_keep_gives_its_share_of_the_risk_back() -> None:
    compared = Contender([(10, 1.0), (11, 1.0), (12, 1.0), (14, 1.0)])  # 13 was the best's
    looked = at(20, [1.0, 1.0, 1.0])
    assert decision.comparisons([at(0, BASELINE, kept=True), compared, looked, replace(compared)]) == 2
    assert decision.comparisons([at(0, BASELINE, kept=True), replace(compared, kept=True)]) == 0


def test_all_comparisons_of_a_night_together_risk_what_was_promised() -> None:
    for rule in (Rule(), Rule(experiments=10), Rule(experiments=1000), Rule(false_keeps=0.2)):
        risks = [0.5 * math.erfc(rule.bar(earlier) / math.sqrt(2)) for earlier in range(20_000)]
        assert rule.false_keeps * 0.95 < sum(risks) <= rule.false_keeps * 1.0001
        assert all(later <= first for first, later in pairwise(risks))


def test_the_same_next_step_follows_from_the_journal() -> None:
    """A night told to the rule and the same night folded from its journal, after every training."""
    story, play = Story(), Play()
    story.experiment(0, "keep", BASELINE)
    story.add("experiment", n=1, parent="c0")
    story.add("candidate", n=1, commit="c1", ast="a1", lines=10, description="", usage={}, seconds=0.0)
    play.best.lines = play.candidate.lines = 10
    count, step = {0: len(BASELINE), 1: 0}, Step("train candidate", "promising", 0.0, 0.0, 0.0)
    draw = random.Random(9)
    while step.action not in ("keep", "discard"):
        n = 1 if step.action == "train candidate" else 0
        score = draw.gauss(0.991 if n else 1.0, 0.003)
        step = play.train("candidate" if n else "best", score)
        story.add("trial_start", n=n, k=count[n], seed=1, dir="killed")  # of a driver that was killed: it has no place
        story.trial(n, count[n], None, "disturbed")
        story.trial(n, count[n], score)
        count[n] += 1
        night = fold(story.events)
        assert judge(night, night.experiments[1], DEFAULT_RULE) == step
    assert step.pairs > 0


# ---- simpler ----


def simpler(gain: float, lines: int, number: int) -> float:
    draw, kept = random.Random(f"{gain} {lines}"), 0
    for _ in range(number):
        world = World(NOISES["Gaussian"], draw)
        kept += Ours(world).keeps(world.add(-gain), lines)
    return kept / number


def test_a_shorter_file_is_kept_unless_it_is_worse_by_the_margin() -> None:
    assert simpler(-1.0, -5, 300) <= 0.07
    assert simpler(-2.0, -5, 100) <= 0.01
    assert simpler(0.0, -5, 200) >= 0.3
    assert simpler(0.0, 5, 200) <= 0.01
    assert simpler(2.5, -5, 60) >= 0.8


def test_a_simplification_goes_through_the_same_comparison() -> None:
    play = Play(lines=97)
    step = play.play([score - 0.001 for score in PLAIN[::-1]], PLAIN)
    assert (step.action, step.reason) == ("keep", "simpler")
    assert step.pairs in DEFAULT_RULE.shorter_pairs
    assert step.words.startswith("simpler: ")


def test_many_small_losses_do_not_add_up() -> None:
    """60 shorter files in a row, each worse than the one before by 0.3 sigmas."""
    lost, kept = [], []
    for seed in range(16):
        world = World(NOISES["Gaussian"], random.Random(seed))
        rule = Ours(world)
        kept.append(sum(rule.keeps(world.add(world.files[rule.best].level + 0.3), -3) for _ in range(60)))
        lost.append(world.files[rule.best].level)
    assert np.mean(lost) < 1.5 * DEFAULT_RULE.margin
    assert np.mean(kept) > 0.5, "some are kept all the same"


def test_what_earlier_simplifications_lost_is_no_longer_to_lose() -> None:
    first = at(0, (*BASELINE, *PLAIN), kept=True)
    first.trials[6:] = [(9 + 2 * k, score) for k, (_, score) in enumerate(first.trials[6:])]
    worse = Contender(
        [(6 + k, 1.0024) for k in range(3)] + [(10 + 2 * k, score + 0.0024) for k, score in enumerate(PLAIN)], 90, True
    )
    assert decision.lost_by_brevity([first], 0.003) == 0.0
    assert decision.lost_by_brevity([first, worse], 0.003) == pytest.approx(0.0024 + 0.003 * math.sqrt(2 / 6), abs=1e-6)


# ---- noise ----


def test_the_first_trial_has_no_say_in_the_noise_and_neither_has_a_pause() -> None:
    quiet = estimate_noise([at(0, BASELINE, kept=True)])
    assert estimate_noise([at(0, BASELINE, kept=True), at(6, [0.9])]) == quiet
    assert estimate_noise([Contender([*at(0, BASELINE).trials, (60, 1.5)], kept=True)]) == quiet, "the machine may have changed"


@pytest.mark.parametrize("spoilt", [0, 1])
def test_the_noise_is_close_and_outliers_move_it_little(spoilt: int) -> None:
    draw, found = random.Random(spoilt), []
    for _ in range(200):
        scores = [draw.gauss(1.0, 0.003) for _ in range(12)]
        scores[:spoilt] = [1.03] * spoilt
        found.append(estimate_noise([at(0, scores, kept=True)]).sigma / 0.003)
    assert 0.9 < np.median(found) < 1.3


def test_noise_without_repeats_is_the_largest_and_agreement_by_chance_is_not_believed() -> None:
    assert estimate_noise([at(0, [1.0]), at(1, [1.1])]).sigma == UNKNOWN_SIGMA
    assert estimate_noise([at(0, [1.0, 1.0, 1.0])]).sigma == pytest.approx(PRIOR_SIGMA / math.sqrt(2))


def test_a_fixed_seed_does_not_make_the_night_look_quiet() -> None:
    frozen = [at(10 * k, [0.99] * 4) for k in range(1, 4)]
    honest = estimate_noise([at(0, BASELINE, kept=True)]).sigma
    assert estimate_noise([at(0, BASELINE, kept=True), *frozen]).sigma == pytest.approx(honest, rel=0.1)


@pytest.mark.parametrize(
    ("t", "freedom", "z"),
    [(8.610, 4, 3.2905), (5.041, 8, 3.2905), (4.073, 15, 3.2905), (3.646, 30, 3.2905), (2.353, 3, 1.645), (1.812, 10, 1.645)],
)  # fmt: skip
def test_student_t_against_the_printed_table(t: float, freedom: int, z: float) -> None:
    assert decision._z(t, freedom) == pytest.approx(z, abs=0.05)
    assert decision._z(-t, freedom) == -decision._z(t, freedom)


def test_agreement_against_the_printed_chi_squared_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "AGREE", 0.01)
    for freedom, quantile in ((2, 0.0201), (4, 0.2971), (9, 2.0879)):  # 1 % of chi-squared is below
        shape = np.arange(freedom + 1) - freedom / 2.0
        for factor, agrees in ((0.98, True), (1.02, False)):
            scores = 1.0 + 0.003 * shape * math.sqrt(factor * quantile / (shape**2).sum())
            assert decision.agrees_too_well(scores.tolist(), 0.003) is agrees


# ---- any night ----


@pytest.mark.parametrize("bad", [[], [math.nan], [1.0, math.inf]])
def test_scores_must_be_finite(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="expected finite scores of both"):
        decide([at(0, BASELINE, kept=True), at(6, bad)])


@given(
    best=st.lists(st.floats(-10, 10), min_size=1, max_size=8), candidate=st.lists(st.floats(-10, 10), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False), lines=st.integers(90, 110),
)  # fmt: skip
def test_any_order_of_trainings_has_a_next_step(
    best: list[float], candidate: list[float], order: random.Random, lines: int
) -> None:  # fmt: skip
    """Also those that this rule would not have asked for."""
    places = list(range(1, len(best) + len(candidate)))
    order.shuffle(places)
    theirs = [0, *sorted(places[: len(best) - 1])]
    mine = sorted(places[len(best) - 1 :])
    step = decide(
        [Contender(list(zip(theirs, best, strict=True)), 100, True), Contender(list(zip(mine, candidate, strict=True)), lines)]
    )
    assert step.words
    assert step.next_words
    if step.reason == "better":
        assert step.gain > 0
        assert step.pairs > 1
    if step.reason == "simpler":
        assert lines < 100


def test_a_lead_that_is_far_too_good_is_told_in_full() -> None:
    baseline = Contender([(n, 0.925 + 0.001 * n) for n in range(3)], lines=10, kept=True)
    step = decide([baseline, Contender([(3, 0.76)], lines=10)])
    assert step.action != "discard"
    assert step.gain == pytest.approx(0.166, abs=0.003)
