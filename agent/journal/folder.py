"""The folders of nights, `runs/<tag>`: which one is meant, what a killed driver left in it, what nobody will ask for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from agent.errors import UsageError
from agent.files import remove
from agent.journal.journal import holder, read_events
from agent.journal.state import Night, fold
from agent.process.leftovers import end_leftovers


def runs_folder(root: Path) -> Path:
    """Where a checkout keeps its nights: `runs`, or where that link leads. UsageError if it leads nowhere."""
    runs = root / "runs"
    if runs.is_symlink() and not runs.exists():
        raise UsageError(f"{runs} is a link to {runs.readlink()}, which is not there; mount that disk, or remove the link")
    if runs.exists() and not runs.is_dir():
        raise UsageError(f"{runs} is a file, where nights have their folder; move it away")
    return runs.resolve()


def clear_leftovers(folder: Path) -> None:
    """Remove what is left of an earlier night in the folder of a new one: its weights, caches and views are not the new one's."""
    for name in ("trials", "tmp", "frozen", "worktree", "results.tsv", "progress.png"):
        remove(folder / name)


def sweep(folder: Path) -> list[int]:
    """End processes and remove scratch folders that a killed driver has left; the pids that were ended."""
    ended = end_leftovers(folder)
    scratch = (*folder.glob("agent-*"), *folder.glob("logs/tmp*"), folder / "trials" / "screen", folder / "tmp" / "screen")
    _remove_all((*scratch, *folder.glob(".*.new"), *folder.glob(".stop-*")))
    return ended


def prune(night: Night, folder: Path) -> None:
    """Remove run and scratch directories that nobody will ask for.

    What stays: the newest run of the baseline, the best and the last experiment, and all runs of one without a verdict."""
    wanted: set[str] = set()
    for n in {0, night.best or 0, len(night.experiments) - 1} if night.experiments else ():
        experiment = night.experiments[n]
        scored = [trial.folder for trial in experiment.trials if trial.status == "ok"]
        wanted.update(scored[-1:] if experiment.status else [trial.folder for trial in experiment.trials])
        wanted.update(trial.folder for trial in experiment.trials[-1:])  # a failed one may be looked at
    _remove_all(path for path in (*folder.glob("trials/[0-9]*-*"), *folder.glob("tmp/[0-9]*")) if path.name not in wanted)


def _remove_all(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # what stays takes room, and does no other harm; it is tried again after the next
            remove(path)


def neighbours(folder: Path) -> list[str]:
    """Other nights of this checkout that a driver works on right now: they share the machine's time."""
    others = (path.parent for path in folder.parent.glob("*/journal.jsonl") if path.parent != folder)
    return sorted(other.name for other in others if holder(other) is not None)


def require_tag(tag: str) -> None:
    """UsageError for a tag that cannot name a folder of its own below runs/."""
    if "/" in tag or tag.startswith(".") or not tag.strip():
        raise UsageError(f"tag {tag!r}: expected letters, digits and dashes")


def choose_tag(runs: Path, tag: str | None, resume: bool, taken: Callable[[str], str] = lambda tag: "") -> str:
    """The night that is meant: the given tag; the latest with `resume`; else today's, continued if it was cut off.

    `taken` says what git still holds of a tag without a journal, "" if nothing: a new night takes another one.
    """
    if tag is not None:
        require_tag(tag)
        if resume and not read_events(runs / tag / "journal.jsonl")[0]:
            raise UsageError(f"--resume: there is no night runs/{tag}")
        return tag
    if resume:
        return latest(runs)
    today = time.strftime("%b%d").lower()
    number = 1
    while True:
        name = today if number == 1 else f"{today}-{number}"
        events, _ = read_events(runs / name / "journal.jsonl")
        if (not events and not taken(name)) or (events and fold(events).ended is None and holder(runs / name) is None):
            return name
        number += 1


def latest(runs: Path) -> str:
    """The tag of the night whose journal was written last. UsageError if there is none."""
    journals = [path for path in runs.glob("*/journal.jsonl") if read_events(path)[0]]  # one without events is a false start
    if not journals:
        raise UsageError(f"there is no night in {runs}; start one: python -m agent.loop")
    return max(journals, key=lambda path: path.stat().st_mtime).parent.name
