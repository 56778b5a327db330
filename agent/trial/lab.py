"""Where a night's trials happen, what they may use, the harness that they run with, and how their children are started."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from agent.errors import Stopped
from agent.files import GIB, read_plain, remove
from agent.git.filetree import walk
from agent.git.worktree import Repository
from agent.process import child
from agent.process.environment import clean_env
from agent.trial import rights, sandbox
from agent.trial.order import parse_budget

HARNESS = "prepare_mlx.py"
FROZEN = (HARNESS, "harness")  # the harness's command line and its folder: a night uses them as its base commit has them
UNTIMED_SECONDS = 3600.0  # the wall limit of a budget in steps or tokens, of a baseline
SCORE_SECONDS = 300.0, 900.0  # the wall limit of a baseline's score: that of a training, within these
# Keys of a summary. The driver measures the first two itself, the scorer the third: none is the candidate's own word.
TRAINER_SECONDS, SCORER_SECONDS, LOAD_SECONDS = "trainer_seconds", "scorer_seconds", "load_seconds"
# Time limits of a candidate: a multiple of the baseline's time, and seconds on top
OVERHEAD = 1.5  # for start-up, saving and loading
SLOWER = 3.0  # for training steps and answers, which honestly take longer in a larger model
SLACK_SECONDS, SLACK_SHARE, LOAD_SLACK_SECONDS = 10.0, 0.05, 5.0  # the share is of the budget
META_BYTES = 1 << 20  # of a meta.json
DATA_VARIABLES = ("AUTORESEARCH_HOME", "AUTORESEARCH_DATA", "AUTORESEARCH_JOURNAL")  # the user's own; they lead to data


class TrainText:
    """The folder of the training text, compared with the digests in its `meta.json` as that was when the session began.

    An agent has the user's rights, and so has a training without a sandbox: either could put held-out text there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._known, self._digests = folder, dict[str, tuple[int, ...]](), dict[str, str]()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # data of another maker, without digests
            content = read_plain(folder / "meta.json", META_BYTES)
            self._digests = {entry["name"]: entry["sha256"] for entry in json.loads(content)["prepared"]}
            self._digests["meta.json"] = hashlib.sha256(content).hexdigest()

    def changed(self) -> str:
        """The name of a file that is no longer as it was prepared, "" if there is none.

        A file is read again only if its size, times or inode changed; `st_ctime`, of the last change of any kind, cannot be forged.
        """
        now = dict[str, os.stat_result]()
        with contextlib.suppress(OSError):  # the folder is gone, and all its files with it
            now = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(self.folder)}
        for name in sorted({*now, *self._digests} if self._digests else ()):
            if name.startswith((".DS_Store", "._")):  # macOS left these
                continue
            status = now.get(name)
            if status is None or not stat.S_ISREG(status.st_mode):
                return name
            stamp = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
            if self._known.get(name) != stamp and _sha256(self.folder / name) != self._digests.get(name):
                return name
            self._known[name] = stamp
        return ""


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Lab:
    """Where trials of a night happen and what they may use."""

    folder: Path  # runs/<tag>
    worktree: Path
    train_file: str
    harness: Path  # the scorer that counts
    train_dir: Path
    held_dir: Path
    budget: str  # "300s", "200steps", "5Mtokens"
    vocab_size: int
    repository: Repository | None = None  # with `base`: where the harness comes from; None: it is not compared before a score
    base: str = ""
    text: TrainText | None = None  # None: the training text is not compared before a training
    hidden: tuple[Path, ...] = ()  # beside the night's folder and data: what a candidate may not see, but for what is opened inside
    startup_seconds: float = 120.0  # compilation, loading, saving: on top of the budget, until the baseline's need is known
    memory_bytes: int | None = None
    directory_bytes: int = 20 * GIB  # in run directory and TMPDIR together
    spare_bytes: int = 0  # that stay free on the disk
    stop: Callable[[], bool] = lambda: False
    show: Callable[[dict[str, Any]], None] = lambda row: None
    sandboxed: bool = True
    environ: Mapping[str, str] = field(default_factory=clean_env)

    def confined(self, argv: list[str], writable: Sequence[Path], *readable: Path) -> list[str]:
        """The candidate's command in this machine's sandbox: no network, and writes only to `writable`. Of nights and prepared data
        it can read the worktree, the harness and `readable`.

        An empty command gives the words to put before a command."""
        for folder in writable:
            folder.mkdir(parents=True, exist_ok=True)
        if not self.sandboxed:
            return argv
        hidden = (self.folder, self.train_dir, self.held_dir, *self.hidden)
        opened = (self.worktree, self.harness.parent, *readable)
        return sandbox.wrap(argv, rights.rules(writable, opened, hidden))

    def scratch(self, run_dir: Path) -> Path:
        """TMPDIR of one trial, `tmp/NNNN-S`. It is new for each trial, so that no trial finds what another one left. A framework
        that caches kernels there compiles them again, before the budget starts."""
        return self.folder / "tmp" / run_dir.name

    def restore_harness(self) -> bool:
        """Restore the night's copy of the harness. Returns whether anything had been changed."""
        return self.repository is not None and restore(self.repository, self.base, self.folder)

    def changed_text(self) -> str:
        """The file of the training text that is not what was prepared, "" if there is none."""
        return self.text.changed() if self.text is not None else ""

    @property
    def budget_seconds(self) -> float | None:
        """The budget, None if it is one of steps or tokens."""
        amount, unit = parse_budget(self.budget)
        return amount if unit == "s" else None

    @property
    def wall_seconds(self) -> float:
        """Time limit of a training from start to exit, until the baseline's time is known."""
        return (self.budget_seconds or UNTIMED_SECONDS) + self.startup_seconds

    def trainer_limit(self, reference: Mapping[str, Any]) -> float:
        """Time limit of a training from start to exit, in seconds of the driver's clock. `reference` is the baseline's summary.

        A budget in seconds: the budget, 1.5 times what the baseline took beside it, and 10 s or 5 % of the budget. Another
        budget: three times what the baseline took and 10 s, because a larger model's steps are honestly slower.
        """
        took, budget = reference.get(TRAINER_SECONDS), self.budget_seconds
        if not isinstance(took, float):
            return self.wall_seconds
        if budget is None:
            return min(self.wall_seconds, SLOWER * took + SLACK_SECONDS)
        beside = OVERHEAD * max(0.0, took - budget) + max(SLACK_SECONDS, SLACK_SHARE * budget)
        return min(self.wall_seconds, budget + beside)

    def scorer_limit(self, reference: Mapping[str, Any]) -> float:
        """Time limit of a score, in seconds of the driver's clock."""
        took, (shortest, longest) = reference.get(SCORER_SECONDS), SCORE_SECONDS
        if not isinstance(took, float):
            return min(longest, max(shortest, self.wall_seconds))
        return SLOWER * took + SLACK_SECONDS

    def load_limit(self, reference: Mapping[str, Any]) -> float | None:
        """Time limit for a logits server to import the candidate and load its model, in seconds; None: the harness's own limit."""
        took = reference.get(LOAD_SECONDS)
        return OVERHEAD * took + LOAD_SLACK_SECONDS if isinstance(took, float) else None

    @property
    def abort_loss(self) -> float:
        """Nats a token; three times the loss of a model that knows nothing."""
        return 3 * math.log(max(self.vocab_size, 2))


def lay_harness(repository: Repository, base: str, folder: Path) -> Path:
    """Write the base commit's harness to runs/<tag>/frozen, or restore it there. Returns the path of the scorer's program."""
    restore(repository, base, folder)
    return folder / "frozen" / HARNESS


def restore(repository: Repository, base: str, folder: Path) -> bool:
    """Compare runs/<tag>/frozen with the base commit byte by byte. Write it anew and return True if anything differs."""
    place, contents = folder / "frozen", frozen(repository, base)
    if _holds(place, contents):
        return False
    remove(place)
    for name, content in contents.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return True


def _holds(place: Path, contents: Mapping[str, bytes]) -> bool:
    """Whether a folder holds these files and nothing else. Python would also import other modules, and bytecode, from there; but
    nothing whose name begins with a dot, as the files do that macOS leaves (.DS_Store, and ._NAME on disks of another system)."""
    if place.is_symlink() or not place.is_dir():
        return False
    folders = {str(parent) for name in contents for parent in PurePosixPath(name).parents}
    found = {path: status for path, status in walk(place, folders) if not PurePosixPath(path).name.startswith(".")}
    return found.keys() == contents.keys() and all(
        stat.S_ISREG(found[name].st_mode) and found[name].st_size == len(content) and (place / name).read_bytes() == content
        for name, content in contents.items()
    )


@lru_cache(maxsize=2)  # called before every training and score; read once, so that nothing written to git later counts
def frozen(repository: Repository, base: str) -> dict[str, bytes]:
    """Path and content of every file that a commit's harness consists of. UsageError if the commit has none."""
    return {name: repository.file_at(base, name) for name in (HARNESS, *repository.files(base, *FROZEN))}


def run_child(
    lab: Lab, argv: list[str], log: Path, run_dir: Path, wall: float, env: Mapping[str, str] | None = None,
    watch: Callable[[], str | None] = lambda: None, stdin: str | None = None, stdout_to: Path | None = None,
) -> child.Outcome:  # fmt: skip
    log.parent.mkdir(exist_ok=True)
    written = (run_dir, lab.scratch(run_dir))
    bounds = child.Bounds(
        wall_seconds=wall, memory_bytes=lab.memory_bytes, directories=written, directory_bytes=lab.directory_bytes,
        spare_bytes=lab.spare_bytes,
    )  # fmt: skip
    known = {name: value for name, value in lab.environ.items() if name not in DATA_VARIABLES}
    outcome = child.run(
        argv, cwd=lab.worktree, env={**known, "TMPDIR": str(lab.scratch(run_dir)), **(env or {})}, log=log, bounds=bounds,
        stop=lab.stop, watch=watch, stdin=stdin, stdout_to=stdout_to, pidfile=lab.folder / "child.pid",
    )  # fmt: skip
    if outcome.reason == "stopped":
        raise Stopped
    return outcome
