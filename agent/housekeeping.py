"""What a night leaves on the disk, and what it sweeps up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from agent.journal import holder
from agent.leftovers import end_leftovers
from agent.night import Night
from agent.redact import redact


def sweep(folder: Path) -> list[int]:
    """End processes and remove scratch folders that a killed driver has left; the pids that were ended."""
    ended = end_leftovers(folder)
    for left in (*folder.glob("agent-*"), *folder.glob("logs/tmp*"), folder / "trials" / "import", folder / "tmp" / "import"):
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


def clean(value: Any) -> Any:
    """A journal keeps no secret, in whatever field an agent or a training managed to put it."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value
