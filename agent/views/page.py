"""What the page of a night shows, as JSON: the night at a glance, and one experiment in detail. Drawn from the journal alone."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev
from typing import Any

from agent.journal.state import Experiment, Night
from agent.text import one_line, safe_tail

CURVE_POINTS = 300  # of a loss curve, evenly chosen
CURVE_BYTES = 8 << 20  # of metrics.jsonl that are read
LOG_CHARACTERS = 4000
DIFF_CHARACTERS = 40_000


def at_a_glance(night: Night, running: bool, sigma: float) -> dict[str, Any]:
    """The whole night in numbers. sigma: standard deviation of one training, bpb."""
    best = night.leader if night.best is not None else None
    now = night.open
    return {
        "tag": night.tag, "running": running, "ended": night.ended, "started": night.started, "last": night.last, "sigma": sigma,
        "train_file": night.train_file, "data": night.dataset.get("id"), "budget": night.dataset.get("budget"),
        "wanted": night.settings.get("experiments"), "hours": night.settings.get("hours"),
        "sandbox": night.sandbox.partition(":")[0],
        "best": best.n if best else None, "baseline": night.baseline.mean if night.baseline else None, "kept": night.kept,
        "cost": night.cost, "unpriced": night.unpriced, "tokens": night.tokens, "agent_seconds": night.agent_seconds,
        "experiments": [_row(e) for e in night.experiments if e.status is not None],
        "open": {**_row(now), "phase": phase(now)} if now else None, "notes": [one_line(note, 300) for note in night.notes[-5:]],
    }  # fmt: skip


def phase(experiment: Experiment) -> str:
    """What is going on in an experiment without a verdict."""
    if experiment.n and experiment.commit is None:
        return "the agent is at work"
    trial = experiment.trials[-1] if experiment.trials else None
    return f"training {trial.k + 1}, seed {trial.seed}" if trial and trial.status == "running" else "deciding"


def _row(experiment: Experiment) -> dict[str, Any]:
    scores = experiment.scores
    return {
        "n": experiment.n, "status": experiment.status, "score": experiment.mean, "trials": len(scores),
        "error": stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None,
        "description": one_line(experiment.description, 200),
        "started": experiment.started, "ended": experiment.ended, "cost": experiment.cost,
    }  # fmt: skip


def in_detail(night: Night, n: int, folder: Path, diff: str) -> dict[str, Any]:
    """One experiment: why it was tried, what changed, how it ended, its loss curve beside the best's. folder: runs/<tag>."""
    experiment = night.experiments[n]
    error, curves = experiment.error or {}, {}
    for name, other in (("this", experiment), ("best", night.experiments[night.best or 0])):
        if points := loss_curve(other, folder):
            curves[name] = points
    logs = sorted((folder / "logs").glob(f"{n:04d}*.log"), key=lambda path: path.name)
    return {
        **_row(experiment), "hypothesis": one_line(experiment.hypothesis, 500), "reason": one_line(experiment.reason, 500),
        "commit": experiment.commit, "lines": experiment.lines, "tokens": experiment.tokens,
        "failure": f"{error.get('message') or ''}\n{error.get('tail') or ''}".strip()[:LOG_CHARACTERS],
        "results": [{"seed": t.seed, "score": t.val_bpb, "seconds": t.seconds, "status": t.status} for t in experiment.trials],
        "diff": diff[:DIFF_CHARACTERS], "curves": curves, "log": safe_tail(logs[-1], LOG_CHARACTERS) if logs else "",
    }  # fmt: skip


def loss_curve(experiment: Experiment, folder: Path) -> list[list[float]]:
    """[seconds, loss] of the newest training whose run folder is still there; [] without one."""
    for trial in reversed(experiment.trials):
        if points := read_curve(folder / "trials" / trial.folder / "metrics.jsonl"):
            return points
    return []


def read_curve(path: Path) -> list[list[float]]:
    """[seconds, loss] from metrics.jsonl, at most CURVE_POINTS. The file is the candidate's: anything may be in it."""
    try:
        if not path.is_file() or path.is_symlink():
            return []
        with open(path, "rb") as file:
            lines = file.read(CURVE_BYTES).splitlines()
    except OSError:
        return []
    points = []
    for line in lines[:: max(1, len(lines) // CURVE_POINTS)]:
        try:
            row = json.loads(line)
            seconds, loss = float(row["seconds"]), float(row["loss"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue
        if abs(seconds) < 1e9 and abs(loss) < 1e6:  # false for NaN, too
            points.append([seconds, loss])
    return points
