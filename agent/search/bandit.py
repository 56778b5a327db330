"""Thompson sampling over the changes of the catalogue, with evidence from the night's journal.

An arm of the bandit is the key and the direction of a change, such as (MATRIX_LR, up). The probability that an arm helps has a Beta
distribution: the prior of the catalogue, updated by the results of this night. A keep counts 1, a failed training 0, and a discard
0.5 or less: the worse the score, the less. Each later keep makes older evidence count less, because the file has changed since.
Failures lose even more weight if the kept change and the arm are coupled, so that an idea is tried again in a changed file.
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

TRUST = 2.0  # a prior weighs as much as this many experiments
SHARPNESS = 6.0  # multiplies all evidence: draws vary less, so that a short night begins with the most promising changes
FADE = 0.6  # weight of evidence is multiplied by this for every keep after it
COUPLED_FADE = 0.3  # weight of a failure is multiplied by this, too, for every keep of a coupled change
LABELLED = {"smeared embedding", "middle layer backed out", "z-loss"}  # switches whose labels are numbers: they have no up or down
_PART = re.compile(r"(?P<key>\S.*?) (?P<old>\S+) -> (?P<new>\S+)(?: \([^)]*\))?")

Arm = tuple[str, str]


@dataclass(frozen=True)
class Lesson:
    """What one earlier experiment of this proposer says about an arm."""

    arm: Arm
    reward: float  # 0 to 1
    weight: float


def arms_of(description: str) -> list[Arm]:
    """The arms in the description of an experiment; [] if another agent wrote the description."""
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
    """The evidence of a night: the weight of a lesson falls with each later keep."""
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
            weight = 1.0 / len(arms)  # of two changes at once, either may be the cause
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
        """The parameters (alpha, beta) of the Beta distribution of a change's arm."""
        won, lost = self.counts.get(change.arm, (0.0, 0.0))
        return SHARPNESS * (TRUST * change.prior + won), SHARPNESS * (TRUST * (1 - change.prior) + lost)

    def pick(self, options: Sequence[Change]) -> Change:
        """Choose the arm with the highest draw, then one of its changes: the first with weight 1, the second 1/2, and so on."""
        arms: dict[Arm, list[Change]] = {}
        for change in options:
            arms.setdefault(change.arm, []).append(change)
        best = max(arms, key=lambda arm: self.draw.betavariate(*self.chance(arms[arm][0])))
        return self.draw.choices(arms[best], weights=[1 / (i + 1) for i in range(len(arms[best]))])[0]


class Uniform(Bandit):
    """The random control: every change is equally likely."""

    def pick(self, options: Sequence[Change]) -> Change:
        return self.draw.choice(options)
