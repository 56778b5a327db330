"""Compare nights: which agent found more, in how many experiments, hours and dollars?

    python scripts/compare_agents.py runs/claude runs/search runs/random --out comparison.png

Reads only the journals. If the results are close, one night per agent proves little: the last line compares the difference with the
noise of a single training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from agent.errors import JournalError, NightError
from agent.journal.journal import read_events
from agent.journal.state import FAILURES, Experiment, Night, fold
from agent.judgement.decision import noise
from agent.text import one_line
from agent.trial.metrics import COMPARED

COLOURS = ("#1a7f37", "#0969da", "#bc4c00", "#8250df", "#24292f", "#bf3989")


@dataclass(frozen=True)
class Point:
    """The best score so far (bpb) after so many experiments and so many hours of work."""

    experiments: int
    hours: float
    best: float


@dataclass(frozen=True)
class Side:
    """One night of the comparison. The first point of `curve` is the baseline."""

    label: str
    night: Night
    curve: list[Point]

    def best_after(self, experiments: float = float("inf"), hours: float = float("inf")) -> float | None:
        """The best val_bpb within so many experiments and hours, None before the baseline."""
        reached = [p.best for p in self.curve if p.experiments <= experiments and p.hours <= hours]
        return reached[-1] if reached else None


def load(path: Path, label: str = "") -> Side:
    """The night of a folder or a journal. ClickException if there is none to compare."""
    file = path / "journal.jsonl" if path.is_dir() else path
    try:
        events, _ = read_events(file)
        night = fold(events)
        leader = night.leader
    except (OSError, JournalError, NightError, KeyError) as error:
        raise click.ClickException(f"{file}: expected the journal of a night with a baseline: {error}") from None
    if leader.mean is None:
        raise click.ClickException(f"{file}: the baseline of this night has no score")
    return Side(label or name(night, events), night, curve(night, events))


def name(night: Night, events: Sequence[Mapping[str, Any]]) -> str:
    """The agent and its model; the tag of the night if the journal does not name an agent."""
    stated = next((e["agent"] for e in reversed(events) if e["event"] == "session" and e.get("agent")), None)
    agent = stated if isinstance(stated, str) else night.settings.get("agent") or night.settings.get("agent_cmd")
    return one_line(" ".join(str(word) for word in (agent or night.tag, night.settings.get("model")) if word), 40)


def curve(night: Night, events: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The best score after each experiment. Time without a driver, before a night was resumed, does not count."""
    clock, before, done, best, points = 0.0, night.started, 0, None, []
    for event in events:
        if event["event"] != "session":
            clock += event["t"] - before
        before = event["t"]
        if event["event"] != "verdict":
            continue
        experiment: Experiment = night.experiments[event["n"]]
        best = experiment.mean if experiment.status == "keep" else best
        done += experiment.n > 0
        if best is not None:
            points.append(Point(done, clock / 3600, best))
    return points


def rows(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The rows of the table: a name, and a cell for each night."""
    common, hours = min(e.curve[-1].experiments for e in sides), min(e.curve[-1].hours for e in sides)

    def count(*statuses: str) -> Callable[[Side], int]:
        return lambda side: sum(e.status in statuses for e in side.night.done)

    def bpb(value: float | None) -> str:
        return f"{value:.4f}" if value is not None else "-"

    def failures(side: Side) -> str:
        kinds = [f"{count(kind)(side)} {kind}" for kind in FAILURES if count(kind)(side)]
        return f"{count(*FAILURES)(side)}" + (f" ({', '.join(kinds)})" if kinds else "")

    def share(part: int, whole: int) -> str:
        return f"{part} ({100 * part / whole:.0f} %)" if whole else "0"

    def held_out(side: Side) -> str:
        scores = [(side.night.tests.get(n) or {}).get("test_bpb") for n in (0, side.night.leader.n)]
        return f"{scores[1]:.4f} from {scores[0]:.4f}" if scores[0] and scores[1] else "-"

    def trainings(side: Side) -> int:
        return sum(len(e.trials) for e in side.night.experiments)

    table: list[tuple[str, Callable[[Side], str]]] = [
        ("baseline val_bpb", lambda e: bpb(e.curve[0].best)),
        ("best val_bpb", lambda e: bpb(e.curve[-1].best)),
        ("gain", lambda e: f"{100 * (e.curve[0].best - e.curve[-1].best) / e.curve[0].best:.2f} %"),
        (f"best after {common} experiments", lambda e: bpb(e.best_after(experiments=common))),
        (f"best after {hours:.2f} h", lambda e: bpb(e.best_after(hours=hours))),
        ("held-out test_bpb", held_out),
        ("experiments", lambda e: str(len(e.night.done))),
        ("keeps", lambda e: share(len(e.night.kept), len(e.night.done))),
        ("discards", lambda e: str(count("discard")(e))),
        ("failures", failures),
        ("trainings", lambda e: str(trainings(e))),
        ("hours", lambda e: f"{e.curve[-1].hours:.2f}"),
        ("hours the agent worked", lambda e: f"{e.night.agent_seconds / 3600:.2f}"),
        ("agent's tokens", lambda e: f"{e.night.tokens:,}"),
        ("cost", lambda e: f"${e.night.cost:.2f}" if e.night.cost or not e.night.tokens else "unknown"),
    ]
    return [(title, [cell(side) for side in sides]) for title, cell in table]


def differences(sides: Sequence[Side]) -> list[str]:
    """The reasons why these nights cannot be compared fairly; [] if they can."""
    found = []
    for key in COMPARED:
        values = [str(e.night.experiments[0].summary().get(key, "unknown")) for e in sides]
        if len(set(values)) > 1:
            found.append(f"{key} differs: {', '.join(values)}")
    return found


def verdict(sides: Sequence[Side]) -> str:
    """Which night leads after the same number of experiments, and by how many standard deviations of one training."""
    common = min(e.curve[-1].experiments for e in sides)
    ranked = sorted(sides, key=lambda e: e.best_after(experiments=common) or float("inf"))
    first, second = ranked[0], ranked[1]
    lead = (second.best_after(experiments=common) or 0.0) - (first.best_after(experiments=common) or 0.0)
    sigma = max(noise(e.night).sigma for e in sides)
    if not lead:
        return f"after {common} experiments each: {first.label} and {second.label} are equal"
    text = f"after {common} experiments each: {first.label} leads {second.label} by {lead:.4f} bpb"
    doubt = "" if lead > 3 * sigma else "; that may be luck: compare more nights"
    return f"{text}, {lead / sigma:.1f} sigma of one training{doubt}"


def draw(sides: Sequence[Side], path: Path) -> None:
    """Draw the best score so far against experiments and against hours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), dpi=120, sharey=True)
    for i, side in enumerate(sides):
        best = [p.best for p in side.curve]
        for axis, along in zip(axes, ([p.experiments for p in side.curve], [p.hours for p in side.curve]), strict=True):
            colour, dashes = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
            axis.step(along, best, where="post", color=colour, ls=dashes, lw=1.8, label=side.label.replace("$", r"\$"))
    for axis, title in zip(axes, ("experiments", "hours"), strict=True):
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("best val_bpb so far (lower is better)")
    axes[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("nights", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--label", "labels", multiple=True, help="A name for each night, in their order. Default: its agent and model.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the picture here (.png, .svg or .pdf).")
def main(nights: tuple[Path, ...], labels: tuple[str, ...], out: Path | None) -> None:
    """Compare NIGHTS: folders runs/TAG, or their journals."""
    if len(nights) < 2:
        raise click.UsageError("expected at least two nights to compare, got 1")
    if labels and len(labels) != len(nights):
        raise click.UsageError(f"expected {len(nights)} labels, one for each night, got {len(labels)}")
    sides = [load(path, label) for path, label in zip(nights, labels or [""] * len(nights), strict=True)]
    if len({e.label for e in sides}) < len(sides):
        sides = [Side(f"{e.label} ({e.night.tag})", e.night, e.curve) for e in sides]
    console = Console()
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for side in sides:
        table.add_column(Text(side.label), justify="right")  # as text: a command may have brackets
    for title, cells in rows(sides):
        table.add_row(title, *map(Text, cells))
    console.print(table)
    for line in differences(sides):
        console.print(f"not comparable: {line}", style="bold red", markup=False, highlight=False)
    console.print(verdict(sides), markup=False, highlight=False, soft_wrap=True)
    if out:
        draw(sides, out)
        console.print(f"picture: {out}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
