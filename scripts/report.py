"""Draw the progress of a night and print what happened: `python scripts/report.py [runs/TAG]` (default: the latest night).

Reads the night's journal and nothing else. Writes `progress.png` beside it; `--no-picture` only prints.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the driver's journal is its neighbour's

import click

from agent import views
from agent.errors import NightError, UsageError
from agent.journal import holder, read
from agent.night import FAILURES, Experiment, Night, fold

BASELINE, KEEP, DISCARD, FAILED = "#24292f", "#1a7f37", "#9aa4ad", "#cf222e"


def load(folder: Path) -> Night:
    """The night in a folder. UsageError if there is none."""
    events, _ = read(folder / "journal.jsonl")
    if not events:
        raise UsageError(f"there is no night in {folder}: expected a journal.jsonl")
    return fold(events)


def draw(night: Night, path: Path) -> None:
    """The picture: every score in the order of experiments, the best so far as a staircase, failures on the lower edge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(10, 5.2), dpi=120)
    scored = [e for e in night.experiments if e.val_bpb is not None and e.status is not None]
    wins = [e for e in scored if e.status == "keep" and e.n > 0]
    losses = [e for e in scored if e.status == "discard"]
    groups: list[tuple[str, str, list[Experiment]]] = [
        ("baseline", BASELINE, scored[:1]),
        (f"kept ({len(wins)})", KEEP, wins),
        (f"discarded ({len(losses)})", DISCARD, losses),
    ]
    for label, colour, group in groups:
        numbers, scores = [e.n for e in group], [e.val_bpb for e in group]
        axes.scatter(numbers, scores, s=34, color=colour, label=label, zorder=3)
    kept = [e for e in scored if e.status == "keep" and e.mean is not None]
    last = max((e.n for e in night.experiments), default=0)
    if kept:
        stairs = [(e.n, e.mean) for e in kept] + [(last, kept[-1].mean)]
        axes.step(*zip(*stairs, strict=True), where="post", color=KEEP, lw=1.6, label="best so far")
        spread = kept[0].scores
        if len(spread) > 1:
            axes.axhspan(min(spread), max(spread), color=DISCARD, alpha=0.25, lw=0, label=f"its {len(spread)} seeds")
        # One diverged training must not flatten all others: the axis ends a little above the baseline.
        values = [e.val_bpb for e in scored if e.val_bpb is not None]
        first, low = kept[0].mean or 0.0, min(values)
        top = max(first + 1.5 * (first - low), first * 1.01)
        axes.set_ylim(low - 0.08 * (top - low), min(top, max(values) + 0.08 * (top - low)) if max(values) > low else None)
    failed = [e for e in night.experiments if e.status in FAILURES]
    if failed:
        axes.plot(
            [e.n for e in failed], [0.015] * len(failed), "x", color=FAILED, ms=5, transform=axes.get_xaxis_transform(),
            label=f"failed ({len(failed)})",
        )  # fmt: skip
    for experiment in kept[1:]:
        text = experiment.description if len(experiment.description) <= 34 else experiment.description[:33] + "…"
        axes.annotate(
            text.replace("$", r"\$"), (experiment.n, experiment.val_bpb), xytext=(4, 6), textcoords="offset points", fontsize=7,
            rotation=20, color=KEEP,
        )  # fmt: skip
    axes.set_xlabel("experiment")
    axes.set_ylabel("val_bpb (bits per byte, lower is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(views.last_line(night).replace("$", r"\$"), fontsize=9, loc="left", wrap=True)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, fontsize=8, frameon=False, loc="upper right")
    figure.tight_layout()
    fresh = path.with_name(f".{path.name}.new")
    figure.savefig(fresh, format="png", metadata={"Software": None})
    pyplot.close(figure)
    fresh.replace(path)


def summary(night: Night, pid: int | None) -> str:
    """What happened, in plain text: the numbers, what was kept, what failed and how often, the held-out test."""
    lines = views.status(night, pid)
    if night.kept:
        lines.append("kept:")
    previous = night.baseline
    for n in night.kept:
        experiment = night.experiments[n]
        before, after = previous.mean if previous else None, experiment.mean
        gain = f" ({after - before:+.4f})" if before is not None and after is not None else ""
        lines.append(f"  {n:>4}  {(experiment.commit or '')[:7]}  {after or 0.0:.4f}{gain}  {experiment.description}")
        previous = experiment
    for n, test in sorted(night.tests.items()):
        name = "baseline" if n == 0 else f"experiment {n}"
        if test.get("test_bpb") is not None:
            gap = test["test_bpb"] - test["val_bpb"]
            lines.append(f"held-out test, {name}: test_bpb {test['test_bpb']:.4f}, val_bpb {test['val_bpb']:.4f}, gap {gap:+.4f}")
        else:
            lines.append(f"held-out test, {name}: not scored: {(test.get('error') or {}).get('message')}")
    return "\n".join(lines)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--no-picture", is_flag=True, help="Print only.")
def main(folder: Path | None, no_picture: bool) -> None:
    """Draw progress.png of a night and print what happened."""
    try:
        if folder is None:
            journals = sorted(Path("runs").glob("*/journal.jsonl"), key=lambda path: path.stat().st_mtime)
            if not journals:
                raise UsageError("there is no night in runs/; start one: python -m agent.loop")
            folder = journals[-1].parent
        night = load(folder)
        click.echo(summary(night, holder(folder)))
        if not no_picture:
            draw(night, folder / "progress.png")
            click.echo(f"picture: {folder / 'progress.png'}")
    except NightError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
