"""What a night taught about the arms of the catalogue, and Thompson sampling over them.

An arm is the key and the direction of a change. The chance that it helps is a Beta distribution: the catalogue's prior, updated
by this night's results. A keep counts 1, a failed training 0, and a discard up to 0.5, less the more it lost. Evidence fades with
each later keep, because it was gathered against another file. Failures fade faster if the kept change and the arm are coupled. So
an idea comes back once the file around it has changed.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from agent.journal.state import Night
from agent.judgement.decision import noise
from agent.search.catalogue import COUPLED
from agent.search.changes import Change

TRUST = 2.0  # experiments that a prior is worth
SHARPNESS = 6.0  # of the draws: as if all that is known had been seen so often, so that a short night begins with the likeliest
FADE = 0.6  # of evidence, by every keep after it
COUPLED_FADE = 0.3  # of failures, by a keep of something coupled
LABELLED = {"smeared embedding", "middle layer backed out", "z-loss"}  # forms whose names are numbers
_PART = re.compile(r"(?P<key>\S.*?) (?P<old>\S+) -> (?P<new>\S+)(?: \([^)]*\))?")

Arm = tuple[str, str]


@dataclass(frozen=True)
class Lesson:
    """What came of one earlier experiment of ours, as far as an arm is concerned."""

    arm: Arm
    reward: float  # 0 to 1
    weight: float


def arms_of(description: str) -> list[Arm]:
    """The arms that a description of ours names; [] for anybody else's words."""
    arms = []
    for part in description.split(" + "):
        match = _PART.fullmatch(part.strip())
        if not match:
            return []
        arms.append((match["key"], _direction(match["key"], match["old"], match["new"])))
    return arms


def _direction(key: str, old: str, new: str) -> str:
    if key == "depth by width":
        with contextlib.suppress(ValueError):
            return "deeper" if int(new.split("x")[0]) > int(old.split("x")[0]) else "wider"
    if key == "NGRAM_BUCKETS":
        return "more" if len(re.findall(r"\d+", new)) > len(re.findall(r"\d+", old)) else "fewer"
    with contextlib.suppress(ValueError):
        before, after = (_number(text) for text in (old, new))
        if key == "SOFTCAP" and after == 0:
            return "off"
        if key not in LABELLED:
            return "up" if after > before else "down"
    return new


def _number(text: str) -> float:
    base, _, power = text.partition("**")
    return float(base) ** float(power) if power else float(base)


def lessons(state: Night) -> list[Lesson]:
    """The evidence of a night, faded by what was kept since."""
    sigma = max(noise(state).sigma, 1e-6)
    kept = [(n, [key for key, _ in arms_of(state.experiments[n].description)]) for n in state.kept]
    found = []
    for experiment in state.done:
        arms = arms_of(experiment.description)
        parent = next((e for e in state.experiments if e.commit == experiment.parent), None)
        if experiment.status == "keep":
            reward = 1.0
        elif experiment.status == "discard" and experiment.mean is not None and parent and parent.mean is not None:
            worse = max((experiment.mean - parent.mean) / sigma, 0.0)
            reward = 0.5 * math.exp(-worse / 2)
        elif experiment.status in ("crash", "oom", "nan", "timeout", "violation"):
            reward = 0.0
        else:
            continue  # nothing was trained
        for arm in arms:
            weight = 1.0 / len(arms)  # of two changes nobody knows which one it was
            for n, keys in kept:
                if n > experiment.n:
                    weight *= FADE
                    if reward < 0.5 and any(arm[0] in COUPLED.get(key.partition("[")[0], ()) for key in keys):
                        weight *= COUPLED_FADE
            found.append(Lesson(arm, reward, weight))
    return found


class Bandit:
    """Thompson sampling over the arms of the catalogue."""

    def __init__(self, evidence: Sequence[Lesson], draw: random.Random) -> None:
        self.draw = draw
        self.counts: dict[Arm, tuple[float, float]] = {}
        for lesson in evidence:
            won, lost = self.counts.get(lesson.arm, (0.0, 0.0))
            self.counts[lesson.arm] = won + lesson.weight * lesson.reward, lost + lesson.weight * (1 - lesson.reward)

    def chance(self, change: Change) -> tuple[float, float]:
        """The two parameters of the Beta distribution of a change's arm."""
        won, lost = self.counts.get(change.arm, (0.0, 0.0))
        return SHARPNESS * (TRUST * change.prior + won), SHARPNESS * (TRUST * (1 - change.prior) + lost)

    def pick(self, options: Sequence[Change]) -> Change:
        """One of the options: the arm of the best draw, then one of its steps, rather the first."""
        arms: dict[Arm, list[Change]] = {}
        for change in options:
            arms.setdefault(change.arm, []).append(change)
        best = max(arms, key=lambda arm: self.draw.betavariate(*self.chance(arms[arm][0])))
        return self.draw.choices(arms[best], weights=[1 / (i + 1) for i in range(len(arms[best]))])[0]


class Uniform(Bandit):
    """The random control: any change as likely as any other."""

    def pick(self, options: Sequence[Change]) -> Change:
        return self.draw.choice(options)
