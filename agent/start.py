"""Everything between the command line and the first step: which night, its data, its harness, its settings, its lock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from agent import process
from agent.environment import clean_env, data_home
from agent.errors import DataError, Stopped, UsageError
from agent.filetree import remove
from agent.journal import Journal, holder, read_events
from agent.night import Night, fold
from agent.worktree import Repository, Worktree

HARNESS = "prepare_mlx.py"
# Frozen with it: what it reads, and what train files do
HARNESS_PARTS = ("corpus.py", "counts.py", "machine.py", "probes.py", "stories.py", "tokenizer.py")
TIER = "AUTORESEARCH_TIER"  # whose constants a train file takes, if not this machine's
PREPARE_SECONDS = 6 * 3600.0  # a download on a slow line
DATASET_KEYS = ("id", "train_dir", "held_dir", "preset", "vocab_size", "seq_len", "budget", "data_hash", "tokenizer_hash", "device")


def choose_tag(runs: Path, tag: str | None, resume: bool) -> str:
    """The night that is meant: the given tag; the latest with `resume`; else today's, continued if it was cut off."""
    if tag:
        if "/" in tag or tag.startswith(".") or not tag.strip():
            raise UsageError(f"--tag {tag}: expected letters, digits and dashes")
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


def held_out_places(entry: Mapping[str, Any], worktree: Worktree) -> tuple[Path, ...]:
    """Where held-out text lies that a training must not read: all held-out shards, what they were made from; of the user's
    own text also what git keeps of it, where it is a part of the checkout."""
    homes = {data_home(), Path(entry["held_dir"]).parent.parent}
    found = [home / name for home in homes for name in ("held", "downloads", "work")]
    root = worktree.repository.root.resolve()
    for source in _own_text(entry, root):
        found.append(source)
        if source.is_relative_to(root):
            found += [worktree.common, worktree.path / source.relative_to(root)]
    return tuple(path for path in dict.fromkeys(found) if path != worktree.path)


def _own_text(entry: Mapping[str, Any], root: Path) -> Iterator[Path]:
    """The user's files behind `text:PATH`: where this night had them from and, as the same text has the same id, where the data
    was first made from; also what links in a folder lead to. A relative path is of older data, and taken from `root`."""
    if not str(entry.get("name") or "").startswith("text:"):
        return
    paths = [entry["name"].removeprefix("text:")]
    with contextlib.suppress(OSError, ValueError, KeyError):
        paths.append(json.loads((Path(entry["held_dir"]) / "meta.json").read_text(encoding="utf-8"))["source"])
    for path in paths:
        source = (root / Path(path).expanduser()).resolve()
        yield source
        yield from (link.resolve() for link in source.rglob("*") if link.is_symlink() and link.is_file())


def dataset(
    harness: Path, cwd: Path, name: str | None, preset: str | None, log: Path, stop: Callable[[], bool],
    show: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The dataset of a new night: the named one, prepared if it is missing, else the last one prepared.

    DataError with the harness's own words if it cannot be made ready.
    """
    current = data_home() / "current.json"
    if name is None and preset is None and current.is_file():
        found = _entry(current)
        if Path(found["train_dir"]).is_dir() and Path(found["held_dir"]).is_dir():
            return found
    with tempfile.TemporaryDirectory(dir=log.parent) as scratch:
        answer = Path(scratch) / "dataset.json"
        options = [*(("--dataset", name) if name else ()), *(("--preset", preset) if preset else ())]
        shown = _LastLine(log, show)
        outcome = process.run(
            [sys.executable, "-B", str(harness), "--json", str(answer), *options], cwd=cwd, env=clean_env(network=True), log=log,
            bounds=process.Bounds(wall_seconds=PREPARE_SECONDS), stop=stop, watch=shown, pidfile=log.parent.parent / "prepare.pid",
        )  # fmt: skip
        if outcome.reason == "stopped":
            raise Stopped
        if not outcome.ok:
            ending = f"{outcome.reason}, exit code {outcome.exit_code}"
            raise DataError(f"the data could not be prepared ({ending}):\n{outcome.tail(1000)}")
        return _entry(answer)


def _entry(path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return {**{key: entry[key] for key in DATASET_KEYS}, "name": entry.get("dataset")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected a dataset as JSON, got {error!r}; run python {HARNESS} again") from None


class _LastLine:
    """A `watch` that shows what a child printed last."""

    def __init__(self, log: Path, show: Callable[[str], None]) -> None:
        self._log, self._show = log, show

    def __call__(self) -> None:
        try:
            lines = self._log.read_bytes()[-2000:].decode("utf-8", "replace").replace("\r", "\n").split("\n")
        except OSError:
            return
        if words := [line for line in lines if line.strip()]:
            self._show(words[-1][:150])


def lay_harness(repository: Repository, base: str, folder: Path) -> Path:
    """Write the base commit's harness to the night's folder, or put it back there; the scorer's path."""
    place = folder / "frozen"
    place.mkdir(parents=True, exist_ok=True)
    for stranger in place.iterdir():  # beside a program Python also finds modules that nobody committed, and their bytecode
        if stranger.name not in (HARNESS, *HARNESS_PARTS) or not stranger.is_file() or stranger.is_symlink():
            remove(stranger)
    for name in (HARNESS, *HARNESS_PARTS):
        content = _committed(repository, base, name)
        if content is None:
            continue
        if not (place / name).is_file() or (place / name).read_bytes() != content:
            (place / name).write_bytes(content)
    return place / HARNESS


@lru_cache(maxsize=2 * (1 + len(HARNESS_PARTS)))  # asked before every training
def _committed(repository: Repository, base: str, name: str) -> bytes | None:
    """A file that a night holds fast, at a commit; None for a part of the harness that it does not have."""
    return repository.file_at(base, name) if name == HARNESS or repository.has(base, name) else None


def require_data(entry: Mapping[str, Any]) -> None:
    """DataError if the night's data is not where it was."""
    for key in ("train_dir", "held_dir"):
        if not Path(entry[key]).is_dir():
            again = f"python {HARNESS} --dataset {entry.get('name') or 'NAME'} --preset {entry['preset']}"
            raise DataError(f"the night's data is gone: expected {entry[key]}; prepare it again: {again}")


def begin(
    journal: Journal, repository: Repository, tag: str, train_file: str, entry: Mapping[str, Any], seed: int
) -> Night:  # fmt: skip
    """Journal the start of a new night and return its state."""
    base = repository.head
    names = (train_file, HARNESS, *HARNESS_PARTS)
    contents = {name: _committed(repository, base, name) for name in names}
    sources = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if content is not None}
    memory = round(psutil.virtual_memory().total / 2**30)
    machine = {
        "python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(), "memory_gb": memory,
        "tier": os.environ.get(TIER, ""),
    }  # fmt: skip
    journal.append(
        "night_start", tag=tag, base=base, train_file=train_file, seed=seed, dataset=dict(entry), sources=sources, machine=machine
    )
    return fold(journal.events)


def keep_tier(night: Night) -> None:
    """The tier that was asked for when the night began: a resume trains the same constants."""
    os.environ.pop(TIER, None)
    if tier := night.machine.get("tier"):
        os.environ[TIER] = tier


def refuse_unfit(repository: Repository, worktree: Worktree, train_file: str, budget: str | None) -> list[str]:
    """UsageError where a new night cannot start; else what the user should know about their checkout."""
    if budget is not None and not re.fullmatch(r"[0-9.]*[1-9][0-9.]*[kM]?(s|steps|tokens)", budget):
        raise UsageError(f"--budget {budget}: expected something like 300s, 200steps or 5Mtokens")
    if Path(train_file).name != train_file:
        raise UsageError(f"--train-file {train_file}: expected a file at the top of the repository")
    for name in (HARNESS, train_file):
        repository.file_at(repository.head, name)
    worktree.check_free()
    changed = repository.changed(HARNESS, *HARNESS_PARTS, train_file)
    return [f"{name} has changes that are not committed; the night uses the committed version" for name in changed]
