"""A night as plain data: the same numbers for the terminal, `--status --json`, the page and the report.

The numbers come from the journal and from the run directory of the current training. A candidate's files may hold anything, so only
a bounded part of each is read.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from agent.files import read_part
from agent.journal.settings import Settings
from agent.journal.state import Experiment, Night, Trial
from agent.text import one_line, safe_tail

CURVE_POINTS = 300  # points of a loss curve, evenly spaced
CURVE_BYTES = 2 << 20  # how much of metrics.jsonl is read for a loss curve: about 10,000 lines
ROW_BYTES = 4096  # how much is read from the end of metrics.jsonl for its newest line
LOG_CHARACTERS = 4000
DIFF_CHARACTERS = 40_000
RECENT = 20  # the pace of this many experiments predicts how long the next ones take
HIDDEN = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]|[\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
BEYOND_NOISE = 2.0  # standard errors; only used in what people read, the decision is made in decision.py
ENDS = {  # why a night ended, in words
    "experiments": "all experiments asked for are done", "hours": "its hours are over",
    "until": "the time of its end has come", "stopped": "stopped by request",
    "error": "an error, see the last note or logs/driver.log", "max_cost": "its money is spent", "target": "the target is reached",
    "patience": "nothing was kept for as long as --patience allows", "disk": "the disk is full",
    "failures": "too many failures in a row", "login": "the agent's login expired", "rate_limit": "the agent's rate limit",
    "missing": "the agent is missing",
}  # fmt: skip


def at_a_glance(night: Night, running: bool, sigma: float, folder: Path | None = None) -> dict[str, Any]:
    """The whole night in numbers. sigma: standard deviation of one training's score, bpb. folder: runs/<tag>, where the current
    training is looked up."""
    best = night.leader if night.best is not None else None
    now = night.open
    busy, idle = (phase(night), "not finished") if now else ("between two experiments", "")
    doing = busy if running else idle
    return {
        "tag": night.tag, "running": running, "ended": night.ended, "why_ended": ENDS.get(night.ended or "", night.ended),
        "started": night.started, "last": night.last, "sigma": sigma,
        "train_file": night.train_file, "data": night.dataset.get("id"), "budget": night.dataset.get("budget"),
        "agent": proposer(night),
        "wanted": night.settings.get("experiments"), "hours": night.settings.get("hours"), "until": night.settings.get("until"),
        "sandbox": night.sandbox.partition(":")[0],
        "best": best.n if best else None, "baseline": night.baseline.mean if night.baseline else None, "kept": night.kept,
        "cost": night.cost, "unpriced": night.unpriced, "tokens": night.tokens, "agent_seconds": night.agent_seconds,
        "experiments": [_row(e, sigma) for e in night.experiments if e.status is not None],
        "open": {**_row(now, sigma), "phase": doing, "training": training(night, folder) if running else None} if now else None,
        "doing": doing,
        "left": left(night, time.time()) if running else None, "notes": [one_line(note, 300) for note in night.notes[-5:]],
    }  # fmt: skip


def proposer(night: Night) -> str:
    """Who proposed the changes: the agent's name, and its model if the user chose one."""
    model = night.settings.get("model")
    return one_line(night.agent + (f" ({model})" if model else ""), 80)


def visible(text: str) -> str:
    """The text with each control character and directional mark spelled out, like `<U+202E>`, so that nothing in it is hidden."""
    return HIDDEN.sub(lambda match: f"<U+{ord(match[0]):04X}>", text)


def phase(night: Night) -> str:
    """What happens now in the open experiment, in words."""
    experiment = night.experiments[-1]
    if experiment.n and experiment.commit is None:
        return "the agent is at work"
    subject, trial = running_trial(night)
    if subject is None or trial is None:
        return "deciding"
    if subject is not experiment:
        return f"training the best again, seed {trial.seed}"
    seeds = None if experiment.n else night.settings.get("baseline_seeds")
    return f"training {trial.k + 1}{f' of {seeds}' if seeds else ''}, seed {trial.seed}"


def running_trial(night: Night) -> tuple[Experiment, Trial] | tuple[None, None]:
    """The current training and the experiment that it belongs to: the open experiment, or the best one, which is trained again."""
    subjects = [*night.experiments[-1:], *([night.leader] if night.best is not None else [])]
    return next(((e, e.trials[-1]) for e in subjects if e.trials and e.trials[-1].status == "running"), (None, None))


def error_of(experiment: Experiment, sigma: float) -> float | None:
    """Standard error of an experiment's mean score, bpb: sigma / sqrt(number of trainings). None if it has no score."""
    return sigma / len(experiment.scores) ** 0.5 if experiment.scores and sigma else None


def score(experiment: Experiment, sigma: float) -> str:
    """The score of an experiment with its standard error, `1.2345 ±0.0021`; "" without a score."""
    return spread(experiment.mean, error_of(experiment, sigma))


def spread(mean: float | None, error: float | None) -> str:
    """`1.2345 ±0.0021`, a mean and its standard error; `1.2345` where the error is unknown; "" without a mean."""
    return "" if mean is None else f"{mean:.4f}" + (f" ±{error:.4f}" if error else "")


def compared(experiment: Experiment, other: Experiment, sigma: float) -> str:
    """Compare two scores in words: by how much the first is better or worse, and whether the difference is within the noise."""
    errors = error_of(experiment, sigma), error_of(other, sigma)
    if experiment.mean is None or other.mean is None or errors[0] is None or errors[1] is None:
        return ""
    gain, noise = other.mean - experiment.mean, BEYOND_NOISE * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    way = "beats" if gain > 0 else "is behind"
    how = "within the noise" if abs(gain) < noise else "more than the noise"
    return f"{experiment.mean:.4f} {way} {other.name} ({other.mean:.4f}) by {abs(gain):.4f}, {how} (±{noise:.4f})"


def left(night: Night, now: float) -> dict[str, Any]:
    """How much of the night is left: `seconds` until its end and `experiments` until then, each None if unknown.

    Estimated from the pace and the cost of the last experiments, within the night's limits. now: Unix time."""
    done, settings = night.done, night.settings
    recent = [e for e in done[-RECENT:] if e.ended > e.started]
    pace = fmean(e.ended - e.started for e in recent) if recent else None
    asked, money, end = settings.get("experiments"), settings.get("max_cost"), Settings.from_json(settings).end(night.session)
    seconds = max(0.0, end - now) if end is not None else None
    counts = [asked - len(done)] if asked is not None else []
    if seconds is not None and pace:
        counts.append(int(seconds / pace) + 1)  # the last experiment may begin shortly before the end
    if money is not None and done and night.cost > 0:
        counts.append(int((money - night.cost) / (night.cost / len(done))))
    experiments = max(0, min(counts)) if counts else None
    if pace and experiments is not None:
        begun = now - night.open.started if night.open and night.open.n else 0.0
        needed = max(0.0, experiments * pace - min(begun, pace))  # the open one may take longer; the others still come
        seconds = needed if seconds is None else min(seconds, needed)
    return {"seconds": seconds, "experiments": experiments, "pace": pace}


def _row(experiment: Experiment, sigma: float) -> dict[str, Any]:
    return {
        "n": experiment.n, "status": experiment.status, "score": experiment.mean, "trials": len(experiment.scores),
        "error": error_of(experiment, sigma), "description": one_line(experiment.description, 200),
        "reason": one_line(experiment.reason, 300), "started": experiment.started, "ended": experiment.ended,
        "cost": experiment.cost,
    }  # fmt: skip


def training(night: Night, folder: Path | None) -> dict[str, Any] | None:
    """The current training: its newest metrics (`progress`: used share of the budget), and whether it is being scored."""
    trial = running_trial(night)[1]
    if folder is None or trial is None:
        return None
    run = folder / "trials" / trial.folder
    return {**newest(run / "metrics.jsonl"), "seed": trial.seed, "scoring": (run / "train.json").is_file()}


def newest(path: Path) -> dict[str, float]:
    """The finite numbers in the newest complete line of metrics.jsonl; {} if there is none."""
    try:
        lines = read_part(path, -ROW_BYTES, ROW_BYTES).split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
            numbers = ((str(key), value) for key, value in row.items() if isinstance(value, (int, float)))
            return {key: float(value) for key, value in numbers if abs(value) < 1e18}  # False for NaN, too
        except (ValueError, AttributeError, RecursionError):
            continue
    return {}


def in_detail(night: Night, n: int, folder: Path, diff: str, sigma: float) -> dict[str, Any]:
    """One experiment: why it was tried, what it changed, how it ended, and its loss curve beside that of the best experiment.
    folder: runs/<tag>."""
    experiment = night.experiments[n]
    error, curves = experiment.error or {}, {}
    for name, other in (("this", experiment), ("best", night.experiments[night.best or 0])):
        if points := loss_curve(other, folder):
            curves[name] = points
    logs = sorted((folder / "logs").glob(f"{n:04d}*.log"), key=lambda path: path.name)
    return {
        **_row(experiment, sigma), "hypothesis": one_line(experiment.hypothesis, 500), "reason": one_line(experiment.reason, 500),
        "commit": experiment.commit, "lines": experiment.lines, "tokens": experiment.tokens,
        "failure": visible(f"{error.get('message') or ''}\n{error.get('tail') or ''}".strip()[:LOG_CHARACTERS]),
        "results": [{"seed": t.seed, "score": t.val_bpb, "seconds": t.seconds, "status": t.status} for t in experiment.trials],
        "diff": visible(diff[:DIFF_CHARACTERS]), "curves": curves, "log": safe_tail(logs[-1], LOG_CHARACTERS) if logs else "",
    }  # fmt: skip


def loss_curve(experiment: Experiment, folder: Path) -> list[list[float]]:
    """The loss curve of the newest training whose run directory still exists, [[seconds, loss], ...]; [] if there is none."""
    for trial in reversed(experiment.trials):
        if points := read_curve(folder / "trials" / trial.folder / "metrics.jsonl"):
            return points
    return []


def read_curve(path: Path) -> list[list[float]]:
    """[[seconds, loss], ...] from metrics.jsonl, about CURVE_POINTS. A candidate wrote the file, so lines may be malformed."""
    try:
        lines = read_part(path, 0, CURVE_BYTES).splitlines()
    except OSError:
        return []
    points = []
    for line in lines[:: max(1, len(lines) // CURVE_POINTS)]:
        try:
            row = json.loads(line)
            seconds, loss = float(row["seconds"]), float(row["loss"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue
        if abs(seconds) < 1e9 and abs(loss) < 1e6:  # False for NaN, too
            points.append([seconds, loss])
    return points


def families(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """For each kind of idea: how many were tried, kept and failed. The kind with the highest share of keeps comes first."""
    groups: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault(experiment.family or "other", []).append(experiment)
    table = [
        {"family": one_line(name, 40), "tried": len(group), "kept": sum(e.status == "keep" for e in group),
         "failed": sum(e.status not in ("keep", "discard") for e in group)}
        for name, group in groups.items()
    ]  # fmt: skip
    return sorted(table, key=lambda row: (-row["kept"] / row["tried"], -row["tried"], row["family"]))
