"""The state of a night: experiments, their trials, and what follows from them. `agent/night.py` makes it from the journal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from agent.errors import JournalError

FAILURES = ("crash", "oom", "nan", "timeout", "violation", "noop", "agent_error")
STATUSES = ("keep", "discard", *FAILURES)
REPEATED = ("interrupted", "disturbed")  # how a trial may end that counts for nothing: the machine slept, or its speed changed


@dataclass
class Trial:
    """One training of one candidate with one seed. `val_bpb` in bits per byte, None unless `status` is ok."""

    k: int
    seed: int
    folder: str
    status: str = "running"
    val_bpb: float | None = None
    seconds: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None


@dataclass
class Experiment:
    """One candidate: what was tried, its trials, and the verdict (`status` None while it is open)."""

    n: int
    parent: str
    started: float
    commit: str | None = None
    ast: str = ""
    lines: int = 0
    description: str = ""
    hypothesis: str = ""
    family: str = ""  # kind of idea, by words and diff
    step: str = ""  # what the agent was asked for: free, or the rung of the ladder
    trials: list[Trial] = field(default_factory=list)
    status: str | None = None
    reason: str = ""
    val_bpb: float | None = None
    error: dict[str, Any] | None = None
    ended: float = 0.0
    tokens: int = 0  # the agent's, for this experiment
    cost: float = 0.0  # US dollars, as far as told
    repeats: dict[str, int] = field(default_factory=dict)  # of the trial at hand, in a row, by their reason

    @property
    def name(self) -> str:
        """What the human reads: baseline, or experiment 7."""
        return f"experiment {self.n}" if self.n else "baseline"

    @property
    def scores(self) -> list[float]:
        """Validation bpb of every finished trial, in the order of trials."""
        return [trial.val_bpb for trial in self.trials if trial.val_bpb is not None]

    @property
    def mean(self) -> float | None:
        """The best estimate of its val_bpb (bits per byte), None if it has none."""
        return sum(self.scores) / len(self.scores) if self.scores else None

    def summary(self) -> dict[str, Any]:
        """The summary of the last finished trial, {} if there is none."""
        return next((trial.summary for trial in reversed(self.trials) if trial.summary), {})


@dataclass
class Night:
    """The whole state. `best` is the number of the best experiment, None before the baseline has a verdict."""

    tag: str = ""
    base: str = ""
    train_file: str = ""
    seed: int = 0
    dataset: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)  # python, system, cpus, memory_gb
    settings: dict[str, Any] = field(default_factory=dict)
    sandbox: str = ""  # what trainings ran in, by the words of the loop's start; of a session without one, if there was any
    experiments: list[Experiment] = field(default_factory=list)
    tests: dict[int, dict[str, Any]] = field(default_factory=dict)
    best: int | None = None
    kept: list[int] = field(default_factory=list)
    cost: float = 0.0  # US dollars, as far as agents report it
    unpriced: int = 0  # calls of an agent that used tokens and told no cost: unknown is not free
    tokens: int = 0  # the agent's, not the trainer's
    agent_seconds: float = 0.0
    agent_failures: list[dict[str, Any]] = field(default_factory=list)  # since the last candidate
    notes: list[str] = field(default_factory=list)
    trials: int = 0  # that count
    disturbed: int = 0  # that were repeated because the machine's speed changed meanwhile
    rested: int = 0  # experiments with a verdict when this session began: it has its own patience with failures
    ended: str | None = None  # the reason, None while a driver works or after one was killed
    started: float = 0.0
    last: float = 0.0

    @property
    def open(self) -> Experiment | None:
        """The experiment without a verdict, if any."""
        return self.experiments[-1] if self.experiments and self.experiments[-1].status is None else None

    @property
    def done(self) -> list[Experiment]:
        """Experiments with a verdict, the baseline not counted."""
        return [e for e in self.experiments if e.n > 0 and e.status is not None]

    @property
    def baseline(self) -> Experiment | None:
        """Experiment 0, None before it has begun."""
        return self.experiments[0] if self.experiments else None

    @property
    def leader(self) -> Experiment:
        """The best experiment; JournalError before the baseline was measured."""
        if self.best is None:
            raise JournalError("the night has no baseline yet; run it again to measure one")
        return self.experiments[self.best]

    @property
    def record(self) -> Experiment:
        """The kept one with the lowest mean, which need not be the best: a shorter file may be a little worse."""
        return min((self.experiments[n] for n in {0, *self.kept}), key=lambda e: (e.mean or math.inf, e.n))

    def streak(self) -> tuple[str, int]:
        """The status of this session's last experiment and how many in a row had it, newest first."""
        done = self.done[self.rested :]
        if not done:
            return "", 0
        status = done[-1].status or ""
        length = 0
        for experiment in reversed(done):
            if experiment.status != status:
                break
            length += 1
        return status, length

    def since_keep(self) -> int:
        """Experiments since the last keep (or the baseline)."""
        return len([e for e in self.done if e.n > max(self.kept, default=0)])
