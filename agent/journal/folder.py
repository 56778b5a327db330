"""The folders of nights, `runs/<tag>`: which one is meant, what a killed driver left in it, what nobody will ask for."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from agent.errors import UsageError
from agent.journal.journal import holder, read_events
from agent.journal.state import Night, fold
from agent.process.leftovers import end_leftovers


def sweep(folder: Path) -> list[int]:
    """End processes and remove scratch folders that a killed driver has left; the pids that were ended."""
    ended = end_leftovers(folder)
    for left in (*folder.glob("agent-*"), *folder.glob("logs/tmp*"), folder / "trials" / "screen", folder / "tmp" / "screen"):
        shutil.rmtree(left, ignore_errors=True)
    for draft in (*folder.glob(".*.new"), *folder.glob(".stop-*")):
        draft.unlink(missing_ok=True)
    return ended


def prune(night: Night, folder: Path) -> None:
    """Remove run and scratch directories that nobody will ask for: all but the baseline's, the best's and the last one's."""
    wanted = {0, night.best, len(night.experiments) - 1}
    for made in (*folder.glob("trials/[0-9]*-*"), *folder.glob("tmp/[0-9]*")):
        number = made.name.partition("-")[0]
        if not (number.isdigit() and int(number) in wanted):
            shutil.rmtree(made, ignore_errors=True)


def neighbours(folder: Path) -> list[str]:
    """Other nights of this checkout that a driver works on right now: they share the machine's time."""
    others = (path.parent for path in folder.parent.glob("*/journal.jsonl") if path.parent != folder)
    return sorted(other.name for other in others if holder(other) is not None)


def require_tag(tag: str) -> None:
    """UsageError for a tag that cannot name a folder of its own below runs/."""
    if "/" in tag or tag.startswith(".") or not tag.strip():
        raise UsageError(f"tag {tag!r}: expected letters, digits and dashes")


def choose_tag(runs: Path, tag: str | None, resume: bool) -> str:
    """The night that is meant: the given tag; the latest with `resume`; else today's, continued if it was cut off."""
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
        if not events or (fold(events).ended is None and holder(runs / name) is None):
            return name
        number += 1


def latest(runs: Path) -> str:
    """The tag of the night whose journal was written last. UsageError if there is none."""
    journals = [path for path in runs.glob("*/journal.jsonl") if read_events(path)[0]]  # one without events is a false start
    if not journals:
        raise UsageError(f"there is no night in {runs}; start one: python -m agent.loop")
    return max(journals, key=lambda path: path.stat().st_mtime).parent.name
