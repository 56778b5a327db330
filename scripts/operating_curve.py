"""The operating curve: what a rule of decision finds, what it keeps by luck, and what it costs, by simulation.

    python scripts/operating_curve.py --nights 2000

Three rules judge the same candidates: ours (`agent/judgement/decision.py`, the code itself, asked as the driver asks it), plain
greedy (one trial; a lower score is kept and becomes the score to beat), and "three seeds and bootstrap" (three trials of
each; kept if the candidate's mean is lower in 95 % of bootstrap resamples). Scores are normal, gains in sigmas.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Protocol

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from agent.judgement.decision import DEFAULT_RULE, Noise, Rule, decide, estimate_noise, fresh

GAINS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
RESAMPLES = np.array(list(itertools.product(range(3), repeat=3)))  # all 27 resamples of three scores: [27, 3]


@dataclass
class Machine:
    """A machine that trains: gives scores (bpb) around a level, and counts them. `draw(level, sigma)` is the noise."""

    sigma: float
    draw: random.Random
    best: float = 1.0  # true level of the best so far (bpb)
    candidate: float = 1.0
    candidate_trials: int = 0
    best_trials: int = 0

    def train_best(self) -> float:
        self.best_trials += 1
        return self.draw.gauss(self.best, self.sigma)

    def train_candidate(self) -> float:
        self.candidate_trials += 1
        return self.draw.gauss(self.candidate, self.sigma)


class Policy(Protocol):
    def start(self, machine: Machine) -> None:
        """Measure the baseline."""

    def keeps(self, machine: Machine) -> bool:
        """Train the candidate as often as needed and judge it."""


class Ours:
    """`agent.judgement.decision`, with the book-keeping of the driver."""

    def __init__(self, rule: Rule = DEFAULT_RULE, lines_delta: int = 0) -> None:
        self.rule, self.lines_delta = rule, lines_delta

    def start(self, machine: Machine) -> None:
        self.best = self.baseline = [machine.train_best() for _ in range(self.rule.baseline_trials)]
        self.kept = [self.baseline]
        self.candidates: list[list[float]] = []
        self.firsts: list[float] = []
        self.noise: Noise = estimate_noise([self.baseline])
        self.reasons: list[str] = []

    def keeps(self, machine: Machine) -> bool:
        scores, line = [machine.train_candidate()], self.lines_delta
        while True:
            record = min(self.kept, key=fmean) if line < 0 else None
            decision = decide(self.best, scores, self.noise, firsts=self.firsts, lines_delta=line, record=record, rule=self.rule)
            if decision.action != "again":
                break
            if decision.remeasure_best:
                self.best.append(machine.train_best())
            else:
                scores.append(machine.train_candidate())
            self.noise = estimate_noise([self.baseline, *map(fresh, self.candidates), fresh(scores)])
        self.reasons.append(decision.reason)
        if len(scores) > 2 or decision.action == "keep":  # else it has no say in the noise
            self.candidates.append(scores)
        self.firsts.append(scores[0])
        if decision.action == "keep":
            self.best, self.firsts = scores, []
            self.kept.append(scores)
        return decision.action == "keep"


class Greedy:
    def start(self, machine: Machine) -> None:
        self.best = machine.train_best()

    def keeps(self, machine: Machine) -> bool:
        score = machine.train_candidate()
        kept = score < self.best
        self.best = min(self.best, score)
        return kept


class Bootstrap:
    """Three seeds each; kept if the mean is lower in 95 % of all 27 x 27 pairs of resamples."""

    def start(self, machine: Machine) -> None:
        self.best = np.array([machine.train_best() for _ in range(3)])[RESAMPLES].mean(axis=1)  # [27]

    def keeps(self, machine: Machine) -> bool:
        means = np.array([machine.train_candidate() for _ in range(3)])[RESAMPLES].mean(axis=1)  # [27]
        kept = float((means[:, None] < self.best[None, :]).mean()) >= 0.95
        if kept:
            self.best = means
        return kept


@dataclass
class SimulatedNight:
    """What became of its candidates: kept or not, own trials of each, trials of the best for each; gains in sigmas."""

    kept: list[bool] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    extra: list[int] = field(default_factory=list)
    baseline: int = 0
    progress: float = 0.0

    @property
    def trainings(self) -> int:
        return self.baseline + sum(self.own) + sum(self.extra)


def simulate(
    policy: Policy, gains: Sequence[float], sigma: float, draw: random.Random, trainings: float = float("inf")
) -> SimulatedNight:
    """A night with these true gains (in sigmas, each against the best of its time), or as many as `trainings` pay for."""
    machine, night = Machine(sigma, draw), SimulatedNight()
    policy.start(machine)
    night.baseline = machine.best_trials
    for gain in gains:
        if night.trainings >= trainings:
            break
        machine.candidate = machine.best - gain * sigma
        machine.candidate_trials = machine.best_trials = 0
        night.kept.append(policy.keeps(machine))
        night.own.append(machine.candidate_trials)
        night.extra.append(machine.best_trials)
        if night.kept[-1]:
            machine.best = machine.candidate
            night.progress += gain
    return night


def mixed(draw: random.Random, number: int) -> list[float]:
    """Gains (in sigmas) as a night has them: 70 % worse by 5 on average, 20 % equal, 10 % better by 2 on average."""
    kinds = (draw.random() for _ in range(number))
    return [-draw.expovariate(1 / 5) if u < 0.7 else 0.0 if u < 0.9 else draw.expovariate(1 / 2) for u in kinds]


POLICIES: dict[str, type[Ours] | type[Greedy] | type[Bootstrap]] = {
    "ours": Ours,
    "greedy": Greedy,
    "three seeds": Bootstrap,
}


def curve(sigma: float, nights: int, seed: int) -> Table:
    title = f"P(keep) and trainings of one candidate after 20 equal ones; noise {sigma} bpb, {nights} nights a figure"
    table = Table("gain, sigma", title=title)
    for name in POLICIES:
        table.add_column(name, justify="right")
        table.add_column("trained", justify="right")
    for gain in GAINS:
        row = [f"{gain:g}"]
        for policy in POLICIES.values():
            draw = random.Random(f"{seed} {gain}")
            ends = [simulate(policy(), [0.0] * 20 + [gain], sigma, draw) for _ in range(nights)]
            row.append(f"{np.mean([night.kept[-1] for night in ends]):.3f}")
            row.append(f"{np.mean([night.own[-1] + night.extra[-1] for night in ends]):.2f}")
        table.add_row(*row)
    return table


def whole_nights(sigma: float, nights: int, seed: int) -> Table:
    table = Table("100 candidates", *POLICIES, title=f"whole nights; noise {sigma} bpb")
    rows: dict[str, list[str]] = {}
    for policy in POLICIES.values():
        draw = random.Random(seed)
        equal = [simulate(policy(), [0.0] * 100, sigma, draw) for _ in range(nights)]
        some = [simulate(policy(), mixed(draw, 100), sigma, draw) for _ in range(nights // 4)]
        short = [simulate(policy(), mixed(draw, 200), sigma, draw, trainings=100) for _ in range(nights // 4)]
        for name, value in {
            "all equal: nights with false keeps": f"{np.mean([any(night.kept) for night in equal]):.1%}",
            "all equal: false keeps": f"{np.mean([sum(night.kept) for night in equal]):.2f}",
            "all equal: trainings each, own": f"{np.mean([np.mean(night.own) for night in equal]):.2f}",
            "all equal: trainings each, with the best's": f"{np.mean([night.trainings / 100 for night in equal]):.2f}",
            "mixed: trainings each, own": f"{np.mean([np.mean(night.own) for night in some]):.2f}",
            "mixed: trainings each, with the best's": f"{np.mean([night.trainings / 100 for night in some]):.2f}",
            "mixed: keeps": f"{np.mean([sum(night.kept) for night in some]):.1f}",
            "mixed: true progress (sigma)": f"{np.mean([night.progress for night in some]):.1f}",
            "mixed: the same, of 100 trainings": f"{np.mean([night.progress for night in short]):.1f}",
        }.items():
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


@click.command()
@click.option("--nights", default=1000, show_default=True, type=click.IntRange(min=4), help="nights a figure")
@click.option("--sigma", default=0.003, show_default=True, help="noise of one trial, bpb")
@click.option("--seed", default=0, show_default=True)
def main(nights: int, sigma: float, seed: int) -> None:
    """Print what our rule keeps and costs, beside plain greedy and three seeds with bootstrap."""
    console = Console()
    console.print(curve(sigma, nights, seed))
    console.print(whole_nights(sigma, nights, seed))


if __name__ == "__main__":
    main()
