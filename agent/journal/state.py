"""The state of a night: experiments, their trials, and what follows from them, folded from the journal.

Pure: events in, state out; no file, no clock, no process.

Events, all with `v`, `seq`, `t` and `sum` (agent/journal/journal.py):

    night_start  tag, base, train_file, seed, dataset, sources, machine once; `base` is the commit the night began at
    session      settings, pid, agent, sandbox                         a driver started or resumed the night
    experiment   n, parent, step                                       number `n` is being worked on; 0 is the baseline
    agent_check  kind, message, usage, seconds                         the agent was asked for one word before the night
    asked        n                                                     the agent is asked for a candidate
    agent_failed n, kind, wait, message, usage, seconds                no candidate came; `n` is tried again
    candidate    n, commit, ast, lines, description, hypothesis, family, usage, seconds
                                                                       what the agent left, kept under a ref
    trial_start  n, k, seed, dir
    trial_end    n, k, seed, dir, status, val_bpb, summary, seconds, error
                                                                       status: ok, the name of a failure, or interrupted or
                                                                       disturbed, which means that the trial is repeated;
                                                                       the kind of `error` says what interrupted it
    verified     n, dir, status, seconds, error                        the check before a keep, which probes every row
    verdict      n, status, reason, val_bpb, description, error, usage, seconds
                                                                       ends experiment `n`
    test_score   n, split, val_bpb, test_bpb, summary, error           the held-out score, once at the end
    stories      n, texts: [{prompt, text}]                            what a model writes, for the report
    night_end    reason, text                                          a driver ended in good order; may be resumed
    note         text
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.errors import JournalError

FAILURES = ("crash", "oom", "nan", "timeout", "violation", "noop", "agent_error")
STATUSES = ("keep", "discard", *FAILURES)
REPEATED = ("interrupted", "disturbed")  # a trial that does not count, because the machine slept or its speed changed


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
    order: int = 0  # number of trials that counted before this one in the night


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
    family: str = ""  # kind of idea, guessed from description and diff
    step: str = ""  # what the agent was asked for: "free", or a rung of the ladder in proposal/digest.py
    trials: list[Trial] = field(default_factory=list)
    status: str | None = None
    reason: str = ""
    val_bpb: float | None = None
    error: dict[str, Any] | None = None
    ended: float = 0.0
    tokens: int = 0  # tokens that the agent used for this experiment
    cost: float = 0.0  # US dollars, as far as the agent reported them
    repeats: dict[str, int] = field(default_factory=dict)  # how often the current trial was repeated, by kind of error

    @property
    def name(self) -> str:
        """The name in texts for people: `baseline`, or `experiment 7`."""
        return f"experiment {self.n}" if self.n else "baseline"

    @property
    def scores(self) -> list[float]:
        """Validation bpb of every finished trial, in the order of trials."""
        return [trial.val_bpb for trial in self.trials if trial.val_bpb is not None]

    @property
    def mean(self) -> float | None:
        """The mean of its scores, bits per byte; None without a score."""
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
    machine: dict[str, Any] = field(default_factory=dict)  # python, system, cpus, memory_gb, tier, device, dtypes
    settings: dict[str, Any] = field(default_factory=dict)
    agent: str = ""  # the agent of the last session, by its name in the table of coding agents
    sandbox: str = ""  # the sandbox of trainings, as the first lines of the loop name it; "none: ..." if any session had none
    experiments: list[Experiment] = field(default_factory=list)
    tests: dict[int, dict[str, Any]] = field(default_factory=dict)
    stories: dict[int, list[dict[str, str]]] = field(default_factory=dict)  # by experiment: {prompt, text}
    best: int | None = None
    kept: list[int] = field(default_factory=list)
    cost: float = 0.0  # US dollars, as far as agents report it
    unpriced: int = 0  # calls without a price, as long as no call of the night had one: their cost is unknown, not 0
    estimated: int = 0  # calls without a price that were counted at the price of the most expensive call so far
    dearest: float = 0.0  # US dollars, price of the most expensive call
    tokens: int = 0  # tokens that the agent used
    agent_seconds: float = 0.0
    asked: bool = False  # the agent was asked for a candidate, and what that cost is not journalled yet
    agent_failures: list[dict[str, Any]] = field(default_factory=list)  # since the last candidate
    notes: list[str] = field(default_factory=list)
    trials: int = 0  # number of trials that count
    disturbed: int = 0  # number of trials that were repeated because the machine's speed changed
    session: float = 0.0  # Unix time at which the current driver session began; --hours counts from it
    rested: int = 0  # experiments with a verdict when this session began: earlier failures do not count towards its limits
    ended: str | None = None  # why the night ended; None while a driver works and after a driver was killed
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
        """The kept experiment with the lowest mean. It can differ from the best, because a keep for a shorter file may score a
        little worse."""
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

    def spent(self, most: float | None) -> bool:
        """Whether the agent has cost as much as the user allows, or could after one more call. None allows any cost."""
        return most is not None and (self.cost >= most or self.cost + self.dearest > most)

    def unproposed(self) -> str:
        """Why the agent never changed the file, in words; "" if it did, or was not asked."""
        kinds = [e.status or "" for e in self.done] + [str(failure["kind"]) for failure in self.agent_failures]
        if not kinds or any(e.commit for e in self.done) or set(kinds) - {"agent_error", "noop", "rate_limit", "login", "missing"}:
            return ""
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        return f"the agent never changed the file: {counts}"

    def since_keep(self) -> int:
        """Experiments since the last keep (or the baseline)."""
        return len([e for e in self.done if e.n > max(self.kept, default=0)])


def fold(events: Iterable[Mapping[str, Any]]) -> Night:
    """The state after these events. Raises JournalError for an order of events that no driver writes."""
    night = Night()
    for event in events:
        apply(night, event)
    return night


def apply(night: Night, event: Mapping[str, Any]) -> None:
    """Update the state by one event. Kinds of events that this version does not know are ignored."""
    if not night.started:
        night.started = event["t"]
    night.last = event["t"]
    handler = _HANDLERS.get(event["event"])
    if handler:
        handler(night, event)


def _night_start(night: Night, event: Mapping[str, Any]) -> None:
    if night.base:
        raise JournalError(f"event {event['seq']}: expected one night_start, found a second")
    night.tag, night.base, night.train_file = event["tag"], event["base"], event["train_file"]
    night.seed, night.dataset, night.machine = event["seed"], event["dataset"], event.get("machine") or {}


def _session(night: Night, event: Mapping[str, Any]) -> None:
    if night.asked:  # a driver was killed or stopped before the agent answered
        _spend(night, {"n": night.experiments[-1].n})
    if night.ended is None:  # the driver before this one was killed
        for experiment in night.experiments:
            if experiment.trials and experiment.trials[-1].status == "running":
                experiment.repeats["killed"] = experiment.repeats.get("killed", 0) + 1
    night.settings, night.ended, night.session = event["settings"], None, event["t"]
    if (agent := event.get("agent") or night.agent) != night.agent:
        night.agent, night.dearest = agent, 0.0  # a price of another agent says nothing of this one's
    if not night.sandbox.startswith("none"):  # the report must say if any session had no sandbox
        night.sandbox = event.get("sandbox") or night.sandbox
    night.rested = len(night.done)
    night.agent_failures.clear()


def _experiment(night: Night, event: Mapping[str, Any]) -> None:
    if night.open or event["n"] != len(night.experiments):
        raise JournalError(
            f"event {event['seq']}: expected experiment {len(night.experiments)} after the verdict on the one before, "
            f"found experiment {event['n']}"
        )
    night.experiments.append(Experiment(event["n"], event["parent"], event["t"], step=event.get("step") or ""))


def _current(night: Night, event: Mapping[str, Any]) -> Experiment:
    experiment = night.open
    if experiment is None or experiment.n != event["n"]:
        raise JournalError(
            f"event {event['seq']}: {event['event']} for experiment {event['n']}, "
            f"but {experiment.n if experiment else 'none'} is open"
        )
    return experiment


def _spend(night: Night, event: Mapping[str, Any]) -> None:
    """Count what a call of the agent cost. An event without `cost` in its usage has no call, unless one was asked for: then its
    answer was lost, and it has cost something all the same."""
    usage, known = event.get("usage") or {}, night.dearest > 0
    if night.asked and "cost" not in usage and known:
        usage = {**usage, "cost": None}
    night.asked = False
    cost = usage.get("cost")
    if "cost" in usage and cost is None:
        night.estimated += known
        night.unpriced += not known
        cost = night.dearest
    elif cost and night.unpriced:  # the first price of the night: it is also the estimate for all calls before
        night.estimated, night.unpriced = night.unpriced, 0
        night.cost += night.estimated * cost
    night.dearest = max(night.dearest, cost or 0.0)
    for account in (night, night.experiments[event["n"]]) if event.get("n") is not None else (night,):
        account.cost += cost or 0.0
        account.tokens += int(usage.get("tokens") or 0)
    night.agent_seconds += event.get("seconds") or 0.0


def _asked(night: Night, event: Mapping[str, Any]) -> None:
    _current(night, event)
    night.asked = True


def _agent_failed(night: Night, event: Mapping[str, Any]) -> None:
    _current(night, event)
    _spend(night, event)
    night.agent_failures.append(dict(event))


def _candidate(night: Night, event: Mapping[str, Any]) -> None:
    experiment = _current(night, event)
    if experiment.commit is not None:
        raise JournalError(f"event {event['seq']}: experiment {experiment.n} has two candidates")
    experiment.commit, experiment.ast, experiment.lines = event["commit"], event["ast"], event["lines"]
    experiment.description, experiment.family = event["description"], event.get("family", "")
    experiment.hypothesis = event.get("hypothesis") or ""
    night.agent_failures.clear()
    _spend(night, event)


def _trial_start(night: Night, event: Mapping[str, Any]) -> None:
    trials = night.experiments[event["n"]].trials
    if trials and trials[-1].status == "running":  # a driver was killed during that trial: it does not count
        trials.pop()
    if event["k"] != len(trials):
        raise JournalError(f"event {event['seq']}: expected trial {len(trials)} of {event['n']}, found {event['k']}")
    trials.append(Trial(event["k"], event["seed"], event["dir"]))


def _trial_end(night: Night, event: Mapping[str, Any]) -> None:
    experiment = night.experiments[event["n"]]
    trial = experiment.trials[-1] if experiment.trials else None
    if trial is None or trial.k != event["k"] or trial.status != "running":
        raise JournalError(f"event {event['seq']}: trial {event['k']} of experiment {event['n']} ends without a start")
    if event["status"] in REPEATED:
        experiment.trials.pop()
        why = str((event["error"] or {}).get("kind") or event["status"])
        experiment.repeats[why] = experiment.repeats.get(why, 0) + 1
        night.disturbed += event["status"] == "disturbed"
        return
    trial.status, trial.val_bpb, trial.seconds = event["status"], event["val_bpb"], event["seconds"]
    trial.summary, trial.error = event["summary"] or {}, event["error"]
    trial.order = night.trials
    experiment.repeats.clear()
    night.trials += 1


def _verdict(night: Night, event: Mapping[str, Any]) -> None:
    experiment = _current(night, event)
    experiment.status, experiment.reason, experiment.ended = event["status"], event["reason"], event["t"]
    experiment.val_bpb, experiment.error = event["val_bpb"], event["error"]
    experiment.description = event["description"] or experiment.description
    night.agent_failures.clear()
    _spend(night, event)
    if experiment.trials and experiment.trials[-1].status == "running":
        experiment.trials.pop()
    if experiment.status == "keep":
        if experiment.commit is None:
            raise JournalError(f"event {event['seq']}: experiment {experiment.n} is kept without a candidate")
        night.best = experiment.n
        if experiment.n > 0:
            night.kept.append(experiment.n)


def _test_score(night: Night, event: Mapping[str, Any]) -> None:
    night.tests[event["n"]] = dict(event)


def _stories(night: Night, event: Mapping[str, Any]) -> None:
    night.stories[event["n"]] = event["texts"]


def _night_end(night: Night, event: Mapping[str, Any]) -> None:
    night.ended = event["reason"]


def _note(night: Night, event: Mapping[str, Any]) -> None:
    night.notes.append(event["text"])


_HANDLERS = {
    "night_start": _night_start,
    "session": _session,
    "experiment": _experiment,
    "agent_check": _spend,
    "asked": _asked,
    "agent_failed": _agent_failed,
    "candidate": _candidate,
    "trial_start": _trial_start,
    "trial_end": _trial_end,
    "verdict": _verdict,
    "test_score": _test_score,
    "stories": _stories,
    "night_end": _night_end,
    "note": _note,
}
