"""Everything between the command line and the first step: which night, its data, its harness, its settings, its lock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from agent.errors import DataError, Stopped, UsageError
from agent.git.worktree import Repository, Worktree
from agent.journal.journal import Journal
from agent.journal.settings import Settings
from agent.journal.state import Night, fold
from agent.night.limits import clock, next_time
from agent.process import child
from agent.process.environment import clean_env, data_home
from agent.text import safe_tail
from agent.trial.lab import FROZEN, HARNESS, frozen
from agent.trial.order import parse_budget
from agent.trial.rights import folders, public

TIER = "AUTORESEARCH_TIER"  # whose constants a train file takes, if not this machine's
DEVICE = "AUTORESEARCH_DEVICE"  # cpu: train there although there is a GPU
DTYPES = "AUTORESEARCH_DTYPES"  # the dtype by device, as scripts/benchmark.py measured it
OVERHEAD_SECONDS = 45.0  # guess of what a training takes beside its budget: start, score
PREPARE_SECONDS = 6 * 3600.0  # a download on a slow line
DATASET_KEYS = ("id", "train_dir", "held_dir", "preset", "vocab_size", "seq_len", "budget", "data_hash", "tokenizer_hash", "device")


def dataset(
    harness: Path, cwd: Path, name: str | None, preset: str | None, log: Path, stop: Callable[[], bool],
    show: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The dataset of a new night: the named one, else the one that the user prepared last by hand, else this machine's default.

    It is prepared if it is missing. Its key `chosen` says why. DataError with the harness's own words if it cannot be made ready.
    """
    current = data_home() / "current.json"
    if name is None and preset is None and current.is_file():
        found = _entry(current)
        if all(folder.is_dir() for folder in folders({"id": found["id"]})):
            return {**found, "chosen": "which you prepared last"}
    with tempfile.TemporaryDirectory(dir=log.parent) as scratch:
        answer = Path(scratch) / "dataset.json"
        options = [*(("--dataset", name) if name else ()), *(("--preset", preset) if preset else ())]

        def show_last() -> None:
            if lines := [line for line in safe_tail(log, 2000).split("\n") if line.strip()]:
                show(lines[-1][:150])

        outcome = child.run(
            [sys.executable, "-B", str(harness), "--json", str(answer), *options], cwd=cwd, env=clean_env(network=True), log=log,
            bounds=child.Bounds(wall_seconds=PREPARE_SECONDS), stop=stop, watch=show_last,
            pidfile=log.parent.parent / "prepare.pid",
        )  # fmt: skip
        if outcome.reason == "stopped":
            raise Stopped
        if not outcome.ok:
            ending = f"{outcome.reason}, exit code {outcome.exit_code}"
            raise DataError(f"the data could not be prepared ({ending}):\n{outcome.tail(1000)}")
        return {**_entry(answer), "chosen": "as asked" if name or preset else "this machine's default"}


def _entry(path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return {**{key: entry[key] for key in DATASET_KEYS}, "name": entry.get("dataset")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected a dataset as JSON, got {error!r}; run python {HARNESS} again") from None


def chosen(night: Night, options: Mapping[str, Any]) -> Settings:
    """The settings of a session: those of the night so far, with the options given now.

    --until of an earlier session ends this one when clocks next show that time, as it would if it were given again."""
    given = {name: value for name, value in options.items() if name in Settings.__dataclass_fields__}
    settings = Settings.from_json(night.settings)
    if settings.agent is None and settings.agent_cmd is None and given.get("agent") == night.agent:
        settings = replace(settings, agent=night.agent)  # the one that was found, now named: what was said of it still holds
    settings = settings.updated(given)
    if settings.until is not None and given.get("until") is None:
        settings = settings.updated({"until": next_time(clock(settings.until))})
    if settings.experiments is None and settings.hours is None and settings.until is None:
        settings = settings.updated({"hours": 8.0})
    return settings


def in_plain_words(night: Night, settings: Settings, agent: str, free_gb: float) -> list[str]:
    """What was chosen, how long it will take, and what it may cost: the first lines of a session."""
    data, (amount, unit) = night.dataset, parse_budget(str(night.dataset["budget"]))
    why = f", {data['chosen']}" if data.get("chosen") else ""
    name = data.get("name") or "text:"
    lines = [
        f"night {night.tag}: {night.train_file} as of commit {night.base[:7]}; Ctrl-C stops it, a closed window does not; "
        "--resume goes on",
        f"data: {data['id'] if name == 'text:' else name}, preset {data.get('preset')}{why}; others: --dataset, --preset",
        agent,
    ]
    each, minutes, seeds = str(data["budget"]), "", settings.baseline_seeds
    if unit == "s":
        each = f"about {(amount + OVERHEAD_SECONDS) / 60:.1f} min"
        minutes = f" ({seeds * (amount + OVERHEAD_SECONDS) / 60:.0f} min)"
    first = f", {seeds} for the baseline first{minutes}" if night.best is None else ""
    number = settings.experiments
    count = "" if number is None else f"{number} experiment{'s' * (number != 1)}"
    end = settings.end(time.time())
    ends = "" if end is None else f"until {time.strftime('%a %H:%M', time.localtime(end))}"
    lines.append(f"time: {each} a training{first}; then {' or '.join(filter(None, [count, ends]))}")
    limit = "no limit on what the agent costs (--max-cost sets one)"
    if settings.max_cost is not None:
        limit = f"at most ${settings.max_cost:.2f}"
    lines.append(f"cost: {limit}; disk: {free_gb:.0f} GB free, {settings.disk_gb:g} GB stay free")
    return lines


def require_data(entry: Mapping[str, Any]) -> None:
    """DataError if the night's data is not where it was."""
    for folder in folders(entry):
        if not folder.is_dir():
            name = entry.get("name") or "NAME"
            again = f"python {HARNESS} --dataset {'text:PATH' if name == 'text:' else name} --preset {entry['preset']}"
            raise DataError(f"the night's data is gone: expected {folder}; prepare it again: {again}")


def begin(
    journal: Journal, repository: Repository, tag: str, train_file: str, entry: Mapping[str, Any], seed: int
) -> Night:  # fmt: skip
    """Journal the start of a new night and return its state."""
    base = repository.head
    contents = {train_file: repository.file_at(base, train_file), **frozen(repository, base)}
    sources = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    memory = round(psutil.virtual_memory().total / 2**30)
    machine = {
        "python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(), "memory_gb": memory,
        "tier": os.environ.get(TIER, ""), "device": os.environ.get(DEVICE, ""), "dtypes": _measured_dtypes(),
    }  # fmt: skip
    journal.append(
        "night_start", tag=tag, base=base, train_file=train_file, seed=seed, dataset=public(entry), sources=sources, machine=machine
    )
    return fold(journal.events)


def refuse_older(journal: Journal, repository: Repository, night: Night) -> None:
    """UsageError for a night that an earlier version of the driver began: its harness had other files, which this one can't lay."""
    start = next(event for event in journal.events if event["event"] == "night_start")
    began = set(start.get("sources") or ())
    if began != {night.train_file, *frozen(repository, night.base)}:
        raise UsageError(
            f"the night {night.tag} was begun by another version of this project, whose harness had other files; finish it with "
            f"that version (git checkout {night.base[:9]}), or start a new night with another --tag"
        )


def leave_out_of_backups(folder: Path) -> None:
    """Have Spotlight and Time Machine pass over weights and scratch files, which change all night; not over the journal."""
    for name in ("trials", "tmp"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / ".metadata_never_index").touch()
        if sys.platform == "darwin":
            child.said_by(["tmutil", "addexclusion", folder / name], seconds=10.0)


def _measured_dtypes() -> dict[str, str]:
    """The dtype that each device computes fastest in: {} while nobody has measured, or if the file is damaged."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        text = os.environ.get(DTYPES) or (data_home() / "dtypes.json").read_text(encoding="utf-8")
        return {str(device): str(dtype) for device, dtype in json.loads(text).items()}
    return {}


def keep_choices(night: Night) -> None:
    """Tier, device and dtypes as they were when the night began: all its trainings, a resume's too, compute alike."""
    device = night.machine.get("device", os.environ.get(DEVICE))  # a night that an earlier version began has none
    for name, value in ((TIER, night.machine.get("tier")), (DEVICE, device)):
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value
    os.environ[DTYPES] = json.dumps(night.machine.get("dtypes") or {})


def refuse_unfit(repository: Repository, worktree: Worktree, train_file: str, budget: str | None) -> list[str]:
    """UsageError where a new night cannot start; else what the user should know about their checkout."""
    if budget is not None:
        parse_budget(budget)
    if Path(train_file).name != train_file:
        raise UsageError(f"--train-file {train_file}: expected a file at the top of the repository")
    for name in (HARNESS, train_file):
        repository.file_at(repository.head, name)
    worktree.check_free()
    repository.refuse_stored_elsewhere(repository.head, train_file, *repository.files(repository.head, *FROZEN))
    changed = repository.changed(repository.head, *FROZEN, train_file)
    return [f"{name} has changes that are not committed; the night uses the committed version" for name in changed]
