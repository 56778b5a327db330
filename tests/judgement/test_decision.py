"""The rule of decision by simulation: the promises of a night, at every noise that machines were seen to have."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from story_kit import told

from agent.judgement import decision
from agent.judgement.decision import DEFAULT_RULE, PRIOR_SIGMA, UNKNOWN_SIGMA, Noise, Rule, decide, estimate_noise, fresh
from scripts.operating_curve import Bootstrap, Greedy, Machine, Ours, Policy, SimulatedNight, mixed, simulate

NIGHTS = 1000
SIGMAS = (0.0003, 0.003, 0.03)  # bpb


def nights(
    policy: Callable[[], Policy], gains: list[float], sigma: float = 0.003, number: int = NIGHTS, draw: object = None
) -> list[SimulatedNight]:
    source = draw if isinstance(draw, random.Random) else random.Random(f"{gains} {sigma}")
    return [simulate(policy(), gains, sigma, source) for _ in range(number)]


def false_nights(ends: list[SimulatedNight]) -> float:
    return float(np.mean([any(night.kept) for night in ends]))


def power(ends: list[SimulatedNight]) -> float:
    return float(np.mean([night.kept[-1] for night in ends]))


# ---- the three promises ----


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_night_of_identical_candidates(sigma: float) -> None:
    """At most 5 % of such nights keep anything, and a candidate costs less than 1.5 trainings on average: all are counted, those
    of the baseline and the repeats of the best, too."""
    ends = nights(Ours, [0.0] * 100, sigma)
    assert false_nights(ends) <= 0.05
    assert np.mean([night.trainings / 100 for night in ends]) < 1.5
    assert all(night.trainings == night.baseline + sum(night.own) + sum(night.extra) for night in ends)
    assert {night.baseline for night in ends} == {DEFAULT_RULE.baseline_trials}


@pytest.mark.parametrize("gain", [-1.0, -0.25, 0.25])
def test_no_night_of_similar_candidates_costs_much_more(gain: float) -> None:
    assert np.mean([night.trainings / 100 for night in nights(Ours, [gain] * 100, number=150)]) < 1.6


@pytest.mark.parametrize("policy", [Greedy, Bootstrap])
def test_the_other_rules_keep_by_luck(policy: Callable[[], Policy]) -> None:
    assert false_nights(nights(policy, [0.0] * 100, number=200)) > 0.5


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(
    ("before", "number"),
    [([], 4000), ([0.0] * 30, 1500), ([0.0] * 90, 700), ([5.0] + [0.0] * 10, 3000)],
    ids=["first of the night", "after 30 equal", "after 90 equal", "after a keep"],
)
def test_a_gain_of_two_sigmas_is_found(before: list[float], number: int, sigma: float) -> None:
    assert power(nights(Ours, [*before, 2.0], sigma, number)) >= 0.8


def test_a_larger_gain_is_found_sooner() -> None:
    two, four = (nights(Ours, [gain], number=500) for gain in (2.0, 4.0))
    assert power(four) >= 0.98
    assert np.mean([night.own[0] for night in four]) < 4 < np.mean([night.own[0] for night in two])


def test_a_night_with_some_progress_stays_cheap() -> None:
    """70 % worse, 20 % equal, 10 % better: own trainings under 1.5; every keep has the new best measured again."""
    draw = random.Random(1)
    ends = [simulate(Ours(), mixed(draw, 100), 0.003, draw) for _ in range(200)]
    assert np.mean([np.mean(night.own) for night in ends]) < 1.5
    assert np.mean([night.trainings / 100 for night in ends]) < 1.9
    assert np.mean([sum(night.kept) for night in ends]) > 4


# ---- luck, from every side ----


def test_a_lucky_baseline_does_not_freeze_the_night() -> None:
    """Of nights whose baseline was half a sigma lucky, most still find 2 sigmas; without repeats of the best, fewer."""

    def found(rule: Rule) -> float:
        draw, kept = random.Random(5), list[bool]()
        while len(kept) < 800:
            policy, machine = Ours(rule), Machine(0.003, draw)
            policy.start(machine)
            if sum(policy.best) / len(policy.best) > machine.best - 0.5 * 0.003:
                continue  # not lucky
            if any(policy.keeps(machine) for _ in range(20)):
                continue  # a false keep: the best is another one
            machine.candidate = 1.0 - 2 * 0.003
            kept.append(policy.keeps(machine))
        return float(np.mean(kept))

    repeated, once = found(Rule()), found(Rule(best_trials=6, max_best_trials=6))
    assert repeated > 0.6
    assert repeated > once + 0.1


def test_a_flattered_new_best_is_sobered_by_repeats() -> None:
    """Winner's curse: the mean of a just kept candidate is too good; 20 candidates later a third of that is gone."""
    draw, errors = random.Random(6), list[list[float]]()
    while len(errors) < 1000:
        policy, machine = Ours(), Machine(0.003, draw)
        policy.start(machine)
        machine.candidate = 1.0 - 1.5 * 0.003
        if policy.keeps(machine):
            machine.best = machine.candidate
            before = float(np.mean(policy.best))
            if not any(policy.keeps(machine) for _ in range(20)):
                errors.append([before, float(np.mean(policy.best))])
    before, after = (np.mean(errors, axis=0) - machine.best) / 0.003
    assert before < -0.2
    assert after > 0.75 * before


def test_the_noise_of_a_whole_night_is_close() -> None:
    found = []
    for k in range(300):
        policy, machine = Ours(), Machine(0.003, random.Random(k))
        policy.start(machine)
        for _ in range(50):
            policy.keeps(machine)
        found.append(policy.noise.sigma / 0.003)
    assert 0.95 < np.mean(found) < 1.15


class HeavyTails(random.Random):
    """Student's t with 3 degrees of freedom, scaled to the standard deviation asked for."""

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        chi = sum(super(HeavyTails, self).gauss(0.0, 1.0) ** 2 for _ in range(3))
        return mu + sigma * super().gauss(0.0, 1.0) / math.sqrt(chi)


class SlowOutliers(random.Random):
    """An exponential tail towards high scores: a machine that was busy trained fewer steps."""

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        return mu + sigma * (self.expovariate(1.0) - 1)


@pytest.mark.parametrize(("draw", "limit"), [(HeavyTails(1), 0.06), (SlowOutliers(1), 0.05)], ids=["t3", "slow"])
def test_tails(draw: random.Random, limit: float) -> None:
    assert false_nights(nights(Ours, [0.0] * 100, draw=draw, number=600)) <= limit
    assert power(nights(Ours, [0.0] * 20 + [2.0], draw=draw, number=500)) >= 0.8


def test_one_outlier_would_be_enough_if_the_luckiest_trial_counted_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, best = Noise(0.003, 20), [1.0] * 16
    trials = [0.97, 0.998, 0.998]  # 10 sigmas, then a little better than the best
    assert decide(best, trials, noise).action == "again"
    monkeypatch.setattr(decision, "WITHOUT_LUCK", 0.0)
    assert decide(best, trials, noise).reason == "better"


# ---- simpler ----


def test_a_simpler_candidate_is_kept_unless_it_is_worse_by_the_margin() -> None:
    """One sigma worse is kept in at most 5 % of cases, equal in 2 of 5, and brevity is the reason."""

    def kept(gain: float, lines: int) -> float:
        return power(nights(lambda: Ours(lines_delta=lines), [gain], number=1200))

    assert kept(-1.0, -5) <= 0.05
    assert kept(-2.0, -5) <= 0.005
    assert kept(0.0, -5) >= 0.4
    assert kept(0.0, 0) <= 0.005
    assert kept(0.0, 5) <= 0.005
    assert kept(2.0, -5) >= 0.9


def test_the_reason_of_a_simplification() -> None:
    noise, best, equal = Noise(0.003, 20), [1.0] * 16, [1.0] * 8
    verdict = decide(best, equal, noise, lines_delta=-1)
    assert (verdict.action, verdict.reason) == ("keep", "simpler")
    assert decide(best, equal, noise, lines_delta=0).action == "discard"
    assert decide(best, [0.98] * 4, noise, lines_delta=-1).reason == "better"


def chain(bounded: bool, seed: int) -> tuple[float, int]:
    """Sigmas that 60 shorter files lost together, each worse by 0.3 than what it was made from; and how many were kept."""
    policy, machine = Ours(lines_delta=-3), Machine(0.003, random.Random(seed))
    policy.start(machine)
    kept = 0
    for _ in range(60):
        machine.candidate = machine.best + 0.3 * 0.003
        if not bounded:
            policy.kept = [policy.best]
        if policy.keeps(machine):
            machine.best, kept = machine.candidate, kept + 1
    return (machine.best - 1.0) / 0.003, kept


def test_a_chain_of_simplifications_does_not_lose_more_than_the_margin_and_a_little_luck() -> None:
    """Measured against the best mean ever kept, they lose the margin together; each against the one before, all they like."""
    bounded, free = (np.array([chain(bound, seed) for seed in range(200)]) for bound in (True, False))
    assert bounded[:, 0].mean() < DEFAULT_RULE.margin
    assert np.quantile(bounded[:, 0], 0.95) < 2 * DEFAULT_RULE.margin
    assert bounded[:, 1].mean() > 1, "some are kept all the same"
    assert free[:, 0].mean() > 1.5 * DEFAULT_RULE.margin
    assert np.quantile(free[:, 0], 0.95) > 2.5 * DEFAULT_RULE.margin


def test_what_was_lost_is_no_longer_to_lose() -> None:
    noise, record, best = Noise(0.003, 20), [1.0] * 16, [1.0 + 0.8 * 0.003] * 16
    candidate = [1.0 + 1.2 * 0.003] * 8  # worse than the best by 0.4 sigmas, than the record by more than the margin
    assert decide(best, best[:8], noise, lines_delta=-1).reason == "simpler"
    assert decide(best, best[:8], noise, lines_delta=-1, record=record).reason != "simpler"
    assert decide(best, candidate, noise, lines_delta=-1, record=record).action == "discard"
    assert decide(best, [1.0] * 8, noise, lines_delta=-1, record=record).reason == "simpler"
    assert decide(best, [0.98] * 4, noise, lines_delta=-1, record=record).reason == "better"


# ---- what the first trials of all candidates tell ----


def first_trials(level: float, number: int, seed: int = 1, worse: float = 0.0) -> list[float]:
    """Of candidates at a level (sigmas above 1 bpb), a part of which is worse by 5 on average."""
    draw = random.Random(seed)
    levels = [level + (draw.expovariate(1 / 5) if draw.random() < worse else 0.0) for _ in range(number)]
    return [draw.gauss(1.0 + at * 0.003, 0.003) for at in levels]


def test_an_unlucky_best_is_known_by_how_good_all_others_look() -> None:
    def seen(*told: float, **more: float) -> float:
        return float(np.mean([decision.misjudged([1.0], first_trials(*told, seed=seed, **more), 0.003) for seed in range(300)]))

    assert seen(0.0, 4) == 0.0, "too few"
    assert seen(0.0, 100) == pytest.approx(0.0, abs=0.05)
    assert seen(-0.3, 100) == pytest.approx(0.3, abs=0.08)
    assert seen(0.2, 100) == pytest.approx(-0.2, abs=0.08)
    assert 0.1 < seen(-0.3, 10) < 0.2, "ten are believed by half"
    assert seen(-3.0, 100) == pytest.approx(0.4), "but not that it is out of the question"
    assert seen(3.0, 100) == pytest.approx(-0.3)
    assert -0.2 < seen(-0.3, 100, worse=0.5) < 0.0, "many that are worse outweigh it, and some trainings are wasted"


def test_the_others_decide_who_is_trained_again_but_not_who_is_kept() -> None:
    noise, best, lucky = Noise(0.003, 20), [1.0] * 12, [1.0 - 0.9 * 0.003]
    assert decide(best, lucky, noise).action == "again"
    assert decide(best, lucky, noise, firsts=first_trials(-0.5, 50)).reason == "not better"
    assert decide(best, [1.0 - 0.5 * 0.003], noise).reason == "not better"
    assert decide(best, [1.0 - 0.5 * 0.003], noise, firsts=first_trials(0.5, 50)).action == "again"
    for level in (-2.0, 0.0, 2.0):
        assert decide(best, [0.99] * 4, noise, firsts=first_trials(level, 50)).reason == "better"
        assert decide(best, [0.996] * 2, noise, firsts=first_trials(level, 50)).action != "keep"


# ---- one verdict ----


def test_a_clear_loser_is_discarded_after_one_trial() -> None:
    verdict = decide([1.0, 1.003, 0.997, 1.001], [1.05], Noise(0.003, 3))
    assert (verdict.action, verdict.reason, verdict.remeasure_best) == ("discard", "worse", False)
    assert verdict.gain == pytest.approx(-0.04975)
    assert verdict.confidence < 0.01


def test_nothing_is_kept_after_one_trial() -> None:
    verdict = decide([1.0] * 20, [0.5], Noise(0.003, 100))
    assert (verdict.action, verdict.reason, verdict.remeasure_best) == ("again", "promising", False)


def test_a_close_call_asks_for_the_best_first() -> None:
    verdict = decide([1.0] * 6, [1.0 - 0.6 * 0.003], Noise(0.003, 5))
    assert (verdict.action, verdict.reason, verdict.remeasure_best) == ("again", "best uncertain", True)


def test_the_trial_limit_ends_it() -> None:
    rule = Rule(max_trials=4)
    assert decide([1.0] * 20, [0.997] * 3, Noise(0.003, 20), rule=rule).action == "again"
    verdict = decide([1.0] * 20, [0.997] * 4, Noise(0.003, 20), rule=rule)
    assert (verdict.action, verdict.reason) == ("discard", "trial limit")


def test_the_bar_shares_the_risk_of_the_night() -> None:
    assert Rule(experiments=500).bar > Rule(experiments=100).bar > Rule(false_keeps=0.5).bar
    assert Rule().bar == pytest.approx(3.2905, abs=0.0005)  # one in 2000


@pytest.mark.parametrize("bad", [[], [math.nan], [1.0, math.inf]])
def test_scores_must_be_finite(bad: list[float]) -> None:
    for best, candidate in ((bad, [1.0]), ([1.0], bad)):
        with pytest.raises(ValueError, match="expected finite scores of both"):
            decide(best, candidate, Noise(0.003, 5))


scores = st.lists(st.floats(-10, 10), min_size=1, max_size=20)


@given(best=scores, candidate=scores, sigma=st.floats(1e-5, 1), freedom=st.integers(0, 50), lines=st.integers(-9, 9))
def test_a_verdict_is_consistent(best: list[float], candidate: list[float], sigma: float, freedom: int, lines: int) -> None:
    verdict = decide(best, candidate, Noise(sigma, freedom), lines_delta=lines)
    assert 0 <= verdict.confidence <= 1
    assert verdict.gain_low <= verdict.gain
    assert verdict.action == "again" or not verdict.remeasure_best
    if verdict.action == "again":
        assert len(candidate) < 16 or (verdict.remeasure_best and len(best) < 20)
    if verdict.reason == "better":
        assert verdict.gain > 0
        assert len(candidate) > 1
    if verdict.reason == "simpler":
        assert lines < 0


# ---- noise ----


def test_the_first_trial_has_no_say_in_the_noise() -> None:
    assert fresh([0.9, 1.0, 1.1]) == [1.0, 1.1]
    assert fresh([0.9]) == fresh([]) == []


def test_the_noise_is_pooled_within_groups() -> None:
    noise = estimate_noise([[1.0, 1.02], [2.0, 2.01, 2.03], [5.0], []])
    expected = (0.01**2 * 2 + np.var([2.0, 2.01, 2.03]) * 3 + PRIOR_SIGMA**2) / 3
    assert noise.sigma == pytest.approx(math.sqrt(expected))
    assert noise.degrees_of_freedom == 3


def test_noise_without_repeats_is_the_largest_and_agreement_by_chance_is_not_believed() -> None:
    assert estimate_noise([[1.0], [1.1]]) == Noise(UNKNOWN_SIGMA, 0)
    assert estimate_noise([[1.0, 1.0, 1.0]]).sigma == pytest.approx(PRIOR_SIGMA / math.sqrt(2))


@pytest.mark.parametrize(
    ("t", "freedom", "z"),
    [(8.610, 4, 3.2905), (5.041, 8, 3.2905), (4.073, 15, 3.2905), (3.646, 30, 3.2905), (2.353, 3, 1.645), (1.812, 10, 1.645)],
)  # fmt: skip
def test_student_t_against_the_printed_table(t: float, freedom: int, z: float) -> None:
    assert decision._z(t, freedom) == pytest.approx(z, abs=0.05)
    assert decision._z(-t, freedom) == -decision._z(t, freedom)
    assert decision._t(decision._z(t, freedom), freedom) == pytest.approx(t)


def test_a_simplification_is_measured_by_the_lowest_mean_ever_kept_and_screened_by_the_firsts_since(monkeypatch: Any) -> None:
    story = told()
    story.experiment(3, "discard", (1.7, 1.8))
    story.experiment(4, "keep", (1.4, 1.36))  # shorter, and a little worse
    story.experiment(5, "crash")
    story.experiment(6, "discard", (1.55, 1.2))
    story.experiment(7, "noop")
    story.experiment(8, "discard", (1.45,))
    story.add("experiment", n=9, parent="c4")
    story.add("candidate", n=9, commit="c9", ast="a9", lines=7, description="", usage={}, seconds=0.0)
    story.trial(9, 0, 1.39)
    night, rule = story.night, Rule()
    assert (night.best, night.record.n) == (4, 2)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(decision, "decide", lambda best, candidate, noise, **more: asked.update(more, best=best, of=candidate))
    decision.judge(night, night.experiments[9], rule)
    assert asked == {
        "best": [1.4, 1.36], "of": [1.39], "firsts": [1.55, 1.45], "lines_delta": -3, "record": [1.3, 1.4], "rule": rule,
    }  # fmt: skip
