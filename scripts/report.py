"""Draw the progress of a night and print what happened: `python scripts/report.py [runs/TAG]` (default: the latest night).

Reads the night's journal and nothing else. Writes `progress.png` beside it; `--no-picture` only prints.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the driver's journal is its neighbour's

import click

from agent.errors import NightError
from agent.journal.folder import latest
from agent.journal.journal import holder
from agent.views.report import draw, load, summary


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--no-picture", is_flag=True, help="Print only.")
def main(folder: Path | None, no_picture: bool) -> None:
    """Draw progress.png of a night and print what happened."""
    try:
        if folder is None:
            folder = Path("runs") / latest(Path("runs"))
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
