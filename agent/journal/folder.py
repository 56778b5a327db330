"""The folders of nights, `runs/<tag>`: choose a tag, clean up after a killed driver, remove run directories that are not needed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from agent.errors import UsageError
from agent.files import remove
from agent.journal.journal import holder, read_events
from agent.journal.state import Experiment, Night, Trial, fold
from agent.process.leftovers import end_leftovers


def runs_folder(root: Path) -> Path:
    """Where a checkout keeps its nights: `runs`, or the target if it is a link. UsageError if the target does not exist."""
    runs = root / "runs"
    if runs.is_symlink() and not runs.exists():
        raise UsageError(f"{runs} is a link to {runs.readlink()}, which is not there; mount that disk, or remove the link")
    if runs.exists() and not runs.is_dir():
        raise UsageError(f"{runs} is a file, where nights have their folder; move it away")
    return runs.resolve()


def clear_leftovers(folder: Path) -> None:
    """Remove what an earlier night of the same tag has left in the folder of a new one: weights, caches and views."""
    for name in ("trials", "tmp", "frozen", "worktree", "results.tsv", "progress.png"):
        remove(folder / name)


def sweep(folder: Path) -> list[int]:
    """End processes and remove scratch folders that a killed driver has left. Returns the pids of the processes."""
    ended = end_leftovers(folder)
    scratch = (*folder.glob("agent-*"), *folder.glob("logs/tmp*"), folder / "trials" / "screen", folder / "tmp" / "screen")
    _remove_all((*scratch, *folder.glob(".*.new")))
    return ended


def prune(night: Night, folder: Path) -> None:
    """Remove run and scratch directories that are no longer needed.

    Kept: the newest run of the baseline, of the best and of the last experiment, and all runs of an experiment without a
    verdict."""
    wanted: set[str] = set()
    for n in {0, night.best or 0, len(night.experiments) - 1} if night.experiments else ():
        experiment = night.experiments[n]
        scored = [trial.folder for trial in experiment.trials if trial.status == "ok"]
        wanted.update(scored[-1:] if experiment.status else [trial.folder for trial in experiment.trials])
        wanted.update(trial.folder for trial in experiment.trials[-1:])  # a person may want to look at a failed one
    _remove_all(path for path in (*folder.glob("trials/[0-9]*-*"), *folder.glob("tmp/[0-9]*")) if path.name not in wanted)


def finished_run(experiment: Experiment, folder: Path) -> tuple[Trial, Path] | None:
    """The newest scored trial of an experiment whose run directory is still there, and that directory. None if none is."""
    runs = ((trial, folder / "trials" / trial.folder) for trial in reversed(experiment.trials) if trial.status == "ok")
    return next((found for found in runs if found[1].is_dir()), None)


def _remove_all(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # harmless but for its size; removed after the next experiment, if that works then
            remove(path)


def neighbours(folder: Path) -> list[str]:
    """The tags of other nights of this checkout that run right now and slow this one down."""
    others = (path.parent for path in folder.parent.glob("*/journal.jsonl") if path.parent != folder)
    return sorted(other.name for other in others if holder(other) is not None)


def require_tag(tag: str) -> None:
    """UsageError for a tag that cannot name a folder of its own below runs/."""
    if "/" in tag or tag.startswith(".") or not tag.strip():
        raise UsageError(f"tag {tag!r}: expected letters, digits and dashes")


def choose_tag(runs: Path, tag: str | None, resume: bool, taken: Callable[[str], str] = lambda tag: "") -> str:
    """The tag of the night to run: the given one; with `resume` the latest; else today's, which goes on if it was cut off.

    `taken` returns what git still has of a tag without a journal, "" if nothing. A new night does not use such a tag.
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
    journals = [path for path in runs.glob("*/journal.jsonl") if read_events(path)[0]]  # without events, no night has begun
    if not journals:
        raise UsageError(f"there is no night in {runs}; start one: python -m agent.loop")
    return max(journals, key=lambda path: path.stat().st_mtime).parent.name
