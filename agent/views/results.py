"""Views of a night, computed from its state and nothing else: results.tsv, the last line, the status."""

from __future__ import annotations

import os
from pathlib import Path

from agent.journal.state import Experiment, Night
from agent.text import one_line

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def results(night: Night) -> str:
    """results.tsv in the five columns that existing scripts read; a line for the baseline and each experiment."""
    return HEADER + "".join(_row(e) for e in night.experiments if e.status is not None)


def _row(experiment: Experiment) -> str:
    memory = float(experiment.summary().get("peak_vram_mb", 0.0)) / 1024
    score = experiment.val_bpb if experiment.val_bpb is not None else 0.0
    commit = (experiment.commit or experiment.parent)[:7]
    description = experiment.description or experiment.reason
    return f"{commit}\t{score:.6f}\t{memory:.1f}\t{experiment.status}\t{one_line(description, 200)}\n"


def write_results(night: Night, path: Path) -> None:
    """Replace results.tsv as a whole, so that a reader never sees half of it."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(results(night), encoding="utf-8")
    os.replace(fresh, path)


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
    """Why the best's held-out test was refused, "" if it was not."""
    test = night.tests.get(night.leader.n) if night.best is not None else None
    error = (test or {}).get("error") or {}
    return one_line(f"{error.get('kind')}: {error.get('message')}", 200) if test and test.get("test_bpb") is None else ""


def status(night: Night, pid: int | None) -> list[str]:
    """What `--status` prints: who works, on what, how it stands."""
    who = f"process {pid} works on it" if pid is not None else f"ended: {night.ended}" if night.ended else "not running"
    lines = [f"night {night.tag}: {who}", last_line(night)]
    current = night.open
    if current:
        what = "baseline" if current.n == 0 else f"experiment {current.n}"
        about = f": {one_line(current.description)}" if current.description else ""
        lines.append(f"{what}{about}; trials so far: {', '.join(f'{s:.4f}' for s in current.scores) or 'none'}")
    counts = {s: sum(e.status == s for e in night.done) for s in sorted({e.status or "" for e in night.done})}
    if counts:
        lines.append(", ".join(f"{count} {name}" for name, count in counts.items()))
    spent = f"agent: {night.agent_seconds / 60:.1f} min, {night.tokens:,} tokens, ${night.cost:.2f}"
    if night.estimated:
        spent += f" ({night.estimated} calls of unknown price counted as the dearest)"
    if night.unpriced:
        spent += f" and {night.unpriced} calls of unknown cost (give --price-in and --price-out)"
    if night.disturbed:
        spent += f"; {night.disturbed} of {night.trials + night.disturbed} trainings repeated, the machine's speed had changed"
    kind = night.sandbox.partition(":")[0]  # of one that is there the name is enough here
    boxed = [f"sandbox of trainings: {one_line(night.sandbox, 300) if kind == 'none' else kind}"] if kind else []
    return [*lines, spent, *boxed, *(f"note: {one_line(note, 200)}" for note in night.notes[-3:])]
