"""A night in words: results.tsv, the last line, the status, and the short phrases that the terminal and the report share.

Every view shows the same score for an experiment: the mean of all its trainings up to now."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from agent.files import write_anew
from agent.journal.state import Experiment, Night
from agent.text import one_line
from agent.views.glance import at_a_glance, spread

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def results(night: Night) -> str:
    """The text of results.tsv: upstream's five columns, a line for the baseline and for each experiment."""
    return HEADER + "".join(_row(e) for e in night.experiments if e.status is not None)


def _row(experiment: Experiment) -> str:
    memory = float(experiment.summary().get("peak_vram_mb", 0.0)) / 1024
    score = experiment.mean if experiment.mean is not None else 0.0
    commit = (experiment.commit or experiment.parent)[:7]
    description = experiment.description or experiment.reason
    return f"{commit}\t{score:.6f}\t{memory:.1f}\t{experiment.status}\t{one_line(description, 200)}\n"


def write_results(night: Night, path: Path) -> None:
    """Replace results.tsv atomically, so that a reader never sees half of it."""
    write_anew(path, results(night).encode())


def last_line(night: Night) -> str:
    """What was won, in one line."""
    baseline = night.baseline
    if night.best is None or baseline is None or baseline.mean is None or night.leader.mean is None:
        return f"no baseline was measured; {len(night.done)} experiments; branch autoresearch/{night.tag}"
    first, best, tried = baseline.mean, night.leader.mean, len(night.done)
    if why := refused(night):
        return (
            f"nothing was won: {night.leader.name} was the best, {best:.4f} from baseline {first:.4f}, but its held-out test was "
            f"refused ({why}); {tried} experiments; branch autoresearch/{night.tag}"
        )
    gain = f"{100 * (best - first) / first:+.1f} %" if night.kept else "nothing won"
    text = (
        f"best {best:.4f} from baseline {first:.4f}: {gain} in {tried} experiment{'s' * (tried != 1)}, "
        f"{len(night.kept)} kept; branch autoresearch/{night.tag}"
    )
    tests = [(night.tests.get(n) or {}).get("test_bpb") for n in (0, night.best)]
    if tests[0] and tests[1] and night.kept:
        text += f"; held-out test {tests[1]:.4f} from {tests[0]:.4f}"
    if unproposed := night.unproposed():
        text += f"; {unproposed}"
    return text


def refused(night: Night) -> str:
    """Why the scorer refused the held-out test of the best experiment, "" if it did not."""
    test = night.tests.get(night.leader.n) if night.best is not None else None
    error = (test or {}).get("error") or {}
    return one_line(f"{error.get('kind')}: {error.get('message')}", 200) if test and test.get("test_bpb") is None else ""


def status(night: Night, pid: int | None, sigma: float = 0.0, folder: Path | None = None) -> list[str]:
    """The lines that `--status` prints. pid: the driver's process, None if none runs. sigma: standard deviation of one training's
    score, bpb. folder: runs/<tag>, where the current training is looked up."""
    now = at_a_glance(night, pid is not None, sigma, folder)
    who = f"process {pid} works on it" if pid is not None else f"ended: {night.ended}" if night.ended else "not running"
    lines = [f"night {night.tag}: {who}", last_line(night)]
    doing = now["open"]
    if doing:
        about = f": {doing['description']}" if doing["description"] and doing["n"] else ""
        scores = ", ".join(f"{score:.4f}" for score in night.experiments[-1].scores)
        lines.append(f"{place(now)}{about}; {doing['phase']}; trials so far: {scores or 'none'}")
        if training := doing["training"]:
            share = f"{100 * training['progress']:.0f} %" if "progress" in training else ""
            parts = ["trained, scoring"] if training["scoring"] else [share, *metrics(training)]
            lines += ["  " + ", ".join(filter(None, parts))] if any(parts) else []
    lines += filter(None, (best(now), outlook(now)))
    counts = {s: sum(e.status == s for e in night.done) for s in sorted({e.status or "" for e in night.done})}
    if counts:
        lines.append(", ".join(f"{count} {name}" for name, count in counts.items()) + "; the last ones:")
    lines += [row(e) for e in now["experiments"][-5:] if e["n"]]
    spent = f"agent: {night.agent_seconds / 60:.1f} min, {night.tokens:,} tokens, ${night.cost:.2f}"
    if night.estimated:
        spent += f" ({night.estimated} calls of unknown price counted as the dearest)"
    if night.unpriced:
        spent += f" and {night.unpriced} calls of unknown cost (give --price-in and --price-out)"
    if night.disturbed:
        spent += f"; {night.disturbed} of {night.trials + night.disturbed} trainings repeated, the machine's speed had changed"
    kind = night.sandbox.partition(":")[0]  # the name of a sandbox is enough here
    boxed = [f"sandbox of trainings: {one_line(night.sandbox, 300) if kind == 'none' else kind}"] if kind else []
    return [*lines, spent, *boxed, *(f"note: {one_line(note, 200)}" for note in night.notes[-3:])]


# ---------------------------------------------------------------------------------------------------------------------
# Phrases, from the numbers of `glance.at_a_glance`
# ---------------------------------------------------------------------------------------------------------------------


def place(now: dict[str, Any]) -> str:
    """`experiment 3 of 7` for the open experiment. If the user set only hours, the total is an estimate."""
    doing = now["open"]
    if not doing["n"]:
        return "baseline"
    if now["wanted"] is not None:
        return f"experiment {doing['n']} of {now['wanted']}"
    more = (now["left"] or {}).get("experiments")
    return f"experiment {doing['n']}" + (f" of about {doing['n'] - 1 + max(more, 1)}" if more is not None else "")


def row(row: dict[str, Any]) -> str:
    """One experiment as a line of a table: number, status, score with its spread, description."""
    return f"{row['n']:>4}  {row['status']:<11}  {spread(row['score'], row['error']):<14}  {row['description']}"


def best(now: dict[str, Any]) -> str:
    """The best score with its standard error, the time it was reached, and the baseline's score; "" before the baseline."""
    rows = {e["n"]: e for e in now["experiments"]}
    leader = rows.get(now["best"])
    if leader is None or leader["score"] is None:
        return ""
    since, score = time.strftime("%H:%M", time.localtime(leader["ended"])), spread(leader["score"], leader["error"])
    if not leader["n"]:
        return f"best {score}: the baseline, since {since}"
    first = spread(rows[0]["score"], rows[0]["error"])
    return f"best {score} (experiment {leader['n']}, {since}), {len(now['kept'])} kept, baseline {first}"


def outlook(now: dict[str, Any]) -> str:
    """How long the night will go on, how many experiments that allows, and what the agent has cost so far."""
    parts, left = [], now["left"]
    if left and left["seconds"]:  # 0: the last experiment has taken longer than the others, and nobody knows how much longer
        end = time.strftime("%H:%M", time.localtime(time.time() + left["seconds"]))
        parts.append(f"{lasting(left['seconds'])} left (to {end})")
    if left and left["experiments"] is not None:
        count = left["experiments"]
        parts.append(f"{'about ' * (now['wanted'] is None)}{count} experiment{'s' * (count != 1)} to go")
    elif left and now["running"] and left["seconds"] is not None:
        parts.append("how many experiments fit is known after the first")
    if now["cost"] or now["tokens"]:
        parts.append(f"${now['cost']:.2f}, {now['tokens']:,} tokens")
    return "; ".join(parts)


def metrics(row: dict[str, Any]) -> list[str]:
    """The numbers of a line of metrics.jsonl in words, the most important first."""
    forms = (("loss", "loss {:.4f}"), ("tokens_per_second", "{:,.0f} tok/s"), ("memory_mb", "{:,.0f} MB"), ("step", "step {:.0f}"),
             ("seconds", "{:.0f} s"))  # fmt: skip
    return [form.format(row[key]) for key, form in forms if key in row]


def lasting(seconds: float) -> str:
    """`48 s`, `12 min`, `5 h 12 min`."""
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
