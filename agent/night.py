"""What happened in a night, folded from its journal. Pure: events in, state out; no file, no clock, no process.

Events, all with `v`, `seq`, `t` and `sum` (agent/journal.py):

    night_start  tag, base, train_file, seed, dataset, sources, machine once; `base` is the commit the night began at
    session      settings, pid, agent, sandbox                         a driver began or resumed the night
    experiment   n, parent, step                                       number `n` is being worked on; 0 is the baseline
    agent_failed n, kind, wait, message, usage, seconds                no candidate came; `n` is tried again
    candidate    n, commit, ast, lines, description, hypothesis, family, usage, seconds
                                                                       what the agent left, kept under a ref
    trial_start  n, k, seed, dir
    trial_end    n, k, seed, dir, status, val_bpb, summary, seconds, error
                                                                       status: ok, a failure's name, or that it is to be
                                                                       repeated: interrupted, disturbed
    verdict      n, status, reason, val_bpb, description, error, usage, seconds
                                                                       ends experiment `n`
    test_score   n, split, val_bpb, test_bpb, summary, error           the held-out score, once at the end
    night_end    reason, text                                          a driver ended in good order; may be resumed
    note         text
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agent.errors import JournalError
from agent.state import FAILURES, REPEATED, STATUSES, Experiment, Night, Trial

__all__ = ["FAILURES", "REPEATED", "STATUSES", "Experiment", "Night", "Trial", "apply", "fold"]


def fold(events: Iterable[Mapping[str, Any]]) -> Night:
    """The state after these events. JournalError for an order that no driver writes."""
    night = Night()
    for event in events:
        apply(night, event)
    return night


def apply(night: Night, event: Mapping[str, Any]) -> None:
    """Move the state on by one event. Kinds of event that this version does not know are passed over."""
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
    night.settings, night.ended = event["settings"], None
    if not night.sandbox.startswith("none"):  # one session without is what the report has to say
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
    usage = event.get("usage") or {}
    for account in (night, night.experiments[event["n"]]):
        account.cost += usage.get("cost") or 0.0
        account.tokens += int(usage.get("tokens") or 0)
    night.unpriced += bool(usage.get("tokens")) and usage.get("cost") is None
    night.agent_seconds += event.get("seconds") or 0.0


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
    if trials and trials[-1].status == "running":  # a driver was killed in the middle: that attempt never counted
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
        experiment.repeats[event["status"]] = experiment.repeats.get(event["status"], 0) + 1
        night.disturbed += event["status"] == "disturbed"
        return
    trial.status, trial.val_bpb, trial.seconds = event["status"], event["val_bpb"], event["seconds"]
    trial.summary, trial.error = event["summary"] or {}, event["error"]
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


def _night_end(night: Night, event: Mapping[str, Any]) -> None:
    night.ended = event["reason"]


def _note(night: Night, event: Mapping[str, Any]) -> None:
    night.notes.append(event["text"])


_HANDLERS = {
    "night_start": _night_start,
    "session": _session,
    "experiment": _experiment,
    "agent_failed": _agent_failed,
    "candidate": _candidate,
    "trial_start": _trial_start,
    "trial_end": _trial_end,
    "verdict": _verdict,
    "test_score": _test_score,
    "night_end": _night_end,
    "note": _note,
}
