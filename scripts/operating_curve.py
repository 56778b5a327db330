"""Measure the decision rule under several kinds of noise: false keeps, power, and the number of trainings it needs.

    nice python scripts/operating_curve.py --nights 1000 --jobs 2

The simulator plays the driver: it trains what `decide` asks for, and does not depend on how `decide` works. Each row simulates
`--nights` nights of 100 equal candidates, and as many nights in which one candidate, at a random place among equal ones, is
better by 2 sigmas. That candidate has the ordinary noise of the night and no fixed seed. Two other rules are measured for
comparison: greedy (one training; a lower score is kept), and three seeds with bootstrap.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from agent.judgement.decision import DEFAULT_RULE, Contender, Rule, decide

CANDIDATES = 100
SIGMA = 0.003  # bpb; the rule scales with it
TRAININGS = 160  # about as many as a night of equal candidates takes; a drift reaches its full size after these


@dataclass
class File:
    """What is true of one candidate, in sigmas: its level (lower is better), its noise, and the luck that all its trainings
    share."""

    level: float
    noise: float = 1.0
    shared: float = 0.0
    frozen: float | None = None  # the draw that a fixed seed repeats


@dataclass(frozen=True)
class Noise:
    """One row of the table. draw: noise of one training, in sigmas. drift: shift of all scores at a training's place in the
    night."""

    draw: Callable[[random.Random], float] = lambda r: r.gauss(0.0, 1.0)
    drift: Callable[[int, float], float] = lambda at, phase: 0.0
    wide: float = 0.0  # share of candidates with 3 sigmas of noise
    fixed: float = 0.0  # share of candidates with a fixed seed
    correlated: float = 0.0  # correlation between the trainings of one file


def heavy_tails(r: random.Random) -> float:
    """Student's t with 3 degrees of freedom, scaled to a standard deviation of 1."""
    return r.gauss(0.0, 1.0) / math.sqrt(sum(r.gauss(0.0, 1.0) ** 2 for _ in range(3)))


def outliers(*by: float) -> Callable[[random.Random], float]:
    """Normal noise, and in 5 % of trainings one of these shifts."""
    return lambda r: r.gauss(0.0, 1.0) + (r.choice(by) if r.random() < 0.05 else 0.0)


def linear(by: float) -> Callable[[int, float], float]:
    return lambda at, phase: by * at / TRAININGS


def step(by: float) -> Callable[[int, float], float]:
    return lambda at, phase: by * (at >= 0.4 * TRAININGS)


def wave(period: int) -> Callable[[int, float], float]:
    return lambda at, phase: math.sin(2 * math.pi * (at / period + phase))


NOISES = {
    "Gaussian": Noise(),
    "Student t, 3 degrees of freedom": Noise(heavy_tails),
    "5 % outliers of +8": Noise(outliers(8)),
    "5 % outliers of +-6": Noise(outliers(6, -6)),
    "5 % outliers of -6": Noise(outliers(-6)),
    "a fifth of candidates with 3 sigmas": Noise(wide=0.2),
    **{f"drift of {by:+g} over the night": Noise(drift=linear(by)) for by in (0.5, -0.5, 1, -1, 3, -3)},
    **{f"step of {by:+g} after 40 %": Noise(drift=step(by)) for by in (1, -1)},
    **{f"wave of +-1, {period} trainings long": Noise(drift=wave(period)) for period in (160, 80, 40)},
    "a fifth of candidates with a fixed seed": Noise(fixed=0.2),
    "trainings of one file correlated 0.25": Noise(correlated=0.25),
}


@dataclass
class World:
    """A simulated machine: it trains the files of one night and counts the trainings."""

    noise: Noise
    random: random.Random
    files: list[File] = field(default_factory=list)
    trainings: int = 0

    def __post_init__(self) -> None:
        self.phase = self.random.random()

    def add(self, level: float, ordinary: bool = False) -> int:
        """Add a file; returns its number. An ordinary file has neither noise of its own nor a fixed seed."""
        r, kind = self.random, self.noise
        made = File(level, shared=math.sqrt(kind.correlated) * r.gauss(0.0, 1.0))
        if not ordinary:
            made.noise = 3.0 if r.random() < kind.wide else 1.0
            made.frozen = kind.draw(r) if r.random() < kind.fixed else None
        self.files.append(made)
        return len(self.files) - 1

    def train(self, number: int) -> tuple[int, float]:
        """Train a file once. Returns the place of this training in the night, and its score in bpb."""
        made, kind, at = self.files[number], self.noise, self.trainings
        drawn = kind.draw(self.random) if made.frozen is None else made.frozen + 0.01 * self.random.gauss(0.0, 1.0)
        noise = made.noise * (made.shared + math.sqrt(1 - kind.correlated) * drawn) + kind.drift(at, self.phase)
        self.trainings += 1
        return at, 1.0 + SIGMA * (made.level + noise)


class Ours:
    """The rule of `agent.judgement.decision`, called as the driver calls it."""

    def __init__(self, world: World, rule: Rule = DEFAULT_RULE) -> None:
        self.world, self.rule, self.best = world, rule, world.add(0.0, ordinary=True)
        self.contenders = [Contender([world.train(self.best) for _ in range(rule.baseline_trials)], lines=100, kept=True)]

    def keeps(self, number: int, lines: int = 0) -> bool:
        candidate = Contender([self.world.train(number)], self.contenders[self.best].lines + lines)
        self.contenders.append(candidate)
        while (step := decide(self.contenders, self.rule)).action not in ("keep", "discard"):
            which = number if step.action == "train candidate" else self.best
            self.contenders[which].trials.append(self.world.train(which))
        candidate.kept = step.action == "keep"
        self.best = number if candidate.kept else self.best
        return candidate.kept


class Greedy:
    """One training; a lower score is kept and becomes the score to beat."""

    def __init__(self, world: World) -> None:
        self.world, self.best = world, world.add(0.0, ordinary=True)
        self.score = world.train(self.best)[1]

    def keeps(self, number: int) -> bool:
        score = self.world.train(number)[1]
        kept = score < self.score
        if kept:
            self.best, self.score = number, score
        return kept


class ThreeSeeds:
    """Three trainings each; kept if the mean is lower in 95 % of all 27 x 27 pairs of bootstrap resamples."""

    def __init__(self, world: World) -> None:
        self.world, self.best = world, world.add(0.0, ordinary=True)
        self.means = self.resample(self.best)

    def resample(self, number: int) -> list[float]:
        scores = [self.world.train(number)[1] for _ in range(3)]
        return [sum(drawn) for drawn in itertools.product(scores, repeat=3)]

    def keeps(self, number: int) -> bool:
        means = self.resample(number)
        kept = sum(a < b for a in means for b in self.means) >= 0.95 * 27 * 27
        if kept:
            self.best, self.means = number, means
        return kept


Policy = type[Ours] | type[Greedy] | type[ThreeSeeds]


@dataclass(frozen=True)
class Night:
    """The result of a simulated night: equal candidates that were kept, all trainings, whether the better candidate was kept,
    and the trainings spent on it."""

    false_keeps: int
    trainings: int
    found: bool = False
    spent: int = 0


def simulate(
    noise: Noise, draw: random.Random, policy: Policy = Ours, better_at: int = 0, gain: float = 2.0, number: int = CANDIDATES
) -> Night:  # fmt: skip
    """Simulate a night of equal candidates. With `better_at`, the candidate of that number is better by `gain` sigmas, and the
    night ends after it."""
    world = World(noise, draw)
    rule, false_keeps = policy(world), 0
    for n in range(1, number + 1):
        before, better = world.trainings, n == better_at
        kept = rule.keeps(world.add(world.files[rule.best].level - gain * better, ordinary=better))
        if better:
            return Night(false_keeps, world.trainings, kept, world.trainings - before)
        false_keeps += kept
    return Night(false_keeps, world.trainings)


@dataclass(frozen=True)
class Row:
    """Share of nights with a false keep; trainings per candidate; share of better candidates that are kept; trainings to keep
    one."""

    false_nights: float
    trainings: float
    power: float
    to_keep: float


def measure(noise: str, nights: int, policy: Policy = Ours, seed: int = 0, gain: float = 2.0) -> Row:
    """Simulate the nights of one row of the table."""
    draw = random.Random(f"{noise} {policy.__name__} {seed}")
    equal = [simulate(NOISES[noise], draw, policy) for _ in range(nights)]
    ends = [simulate(NOISES[noise], draw, policy, draw.randint(1, CANDIDATES), gain) for _ in range(nights)]
    found = [end.spent for end in ends if end.found]
    return Row(
        sum(night.false_keeps > 0 for night in equal) / nights, sum(night.trainings for night in equal) / nights / CANDIDATES,
        len(found) / nights, sum(found) / max(1, len(found)),
    )  # fmt: skip


@click.command()
@click.option("--nights", default=1000, show_default=True, type=click.IntRange(min=1), help="Simulated nights per figure.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Number of processes.")
@click.option("--seed", default=0, show_default=True)
def main(nights: int, jobs: int, seed: int) -> None:
    """Print false keeps, power and number of trainings of the decision rule, under several kinds of noise."""
    table = Table(
        "noise, in sigmas", title=f"nights of {CANDIDATES} equal candidates; {nights} nights per figure",
        caption="power: share of gains of 2 sigmas that is kept\ntrainings: per equal candidate; to keep: until a gain is kept",
    )  # fmt: skip
    for name in ("false keeps", "power", "trainings", "to keep"):
        table.add_column(name, justify="right", no_wrap=True)
    wanted: list[tuple[str, str, Policy]] = [(name, name, Ours) for name in NOISES]
    wanted += [("greedy, Gaussian", "Gaussian", Greedy), ("three seeds and bootstrap, Gaussian", "Gaussian", ThreeSeeds)]
    with ProcessPoolExecutor(jobs) as pool:
        rows = pool.map(measure, *zip(*((noise, nights, policy, seed) for _, noise, policy in wanted), strict=True))
        for (title, _, policy), row in zip(wanted, rows, strict=True):
            if policy is Greedy:
                table.add_section()
            table.add_row(title, f"{row.false_nights:.1%}", f"{row.power:.0%}", f"{row.trainings:.2f}", f"{row.to_keep:.1f}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
