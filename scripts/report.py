"""Report on a night: `python scripts/report.py [runs/TAG]` (default: the latest night).

Reads the journal and the commits of the night. Prints a summary, and writes three files beside the journal: `report.html`,
which needs no other file, `report.md` for a pull request, and `progress.png`. With `--no-picture` it only prints.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `agent` is found when this runs as a script

import click

from agent.errors import NightError
from agent.files import write_anew
from agent.git.command import DAMAGE
from agent.git.worktree import Repository, Worktree
from agent.journal.folder import latest
from agent.journal.journal import holder
from agent.journal.state import Night
from agent.judgement.decision import noise
from agent.text import redact
from agent.views.report import draw, draw_costs, facts, load, markdown, page, summary


def write_report(night: Night, folder: Path, sigma: float) -> None:
    """Write progress.png, report.html and report.md to the night's folder. If its commits are gone, the report has no diffs."""
    def diff(parent: str, commit: str) -> str:
        try:
            return redact(worktree.diff(parent, commit)) if worktree and parent and commit else ""
        except DAMAGE:
            return ""

    try:
        worktree = Worktree(Repository(Path.cwd()), night.tag, folder / "worktree")
    except (NightError, *DAMAGE):
        worktree = None
    draw(night, folder / "progress.png", sigma)
    with tempfile.TemporaryDirectory() as scratch:
        draw_costs(night, Path(scratch) / "costs.png")
        costs = (Path(scratch) / "costs.png").read_bytes()
    known = facts(night, sigma, diff)
    html = page(known, {"picture": (folder / "progress.png").read_bytes(), "costs": costs})
    write_anew(folder / "report.html", html.encode("utf-8", "replace"))
    write_anew(folder / "report.md", markdown(known, f"autoresearch/{night.tag}").encode("utf-8", "replace"))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--no-picture", is_flag=True, help="Print the summary; write no files.")
def main(folder: Path | None, no_picture: bool) -> None:
    """Print a summary of a night, and write report.html, report.md and progress.png."""
    try:
        if folder is None:
            folder = Path("runs") / latest(Path("runs"))
        night = load(folder)
        sigma = noise(night).sigma if night.experiments else 0.0
        click.echo(summary(night, holder(folder), sigma))
        if not no_picture:
            write_report(night, folder, sigma)
            click.echo(f"report: {folder / 'report.html'}, {folder / 'report.md'}; picture: {folder / 'progress.png'}")
    except NightError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
