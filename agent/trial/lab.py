"""Where a night's trials happen, what they may use, the harness that they run with, and how their children are started."""

from __future__ import annotations

import math
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from agent.errors import Stopped
from agent.files import GIB, directory_bytes, remove
from agent.git.filetree import walk
from agent.git.worktree import Repository
from agent.process import child
from agent.process.environment import clean_env
from agent.trial import rights, sandbox
from agent.trial.order import parse_budget

HARNESS = "prepare_mlx.py"
FROZEN = (HARNESS, "harness")  # the harness's command line and its folder: a night uses them as its base commit has them
UNTIMED_SECONDS = 3600.0  # the wall limit of a budget in steps or tokens


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
    hidden: tuple[Path, ...] = ()  # beside `held_dir`: where else text lies that the score is made from
    startup_seconds: float = 120.0  # compilation, loading, saving: on top of the budget
    memory_bytes: int | None = None
    directory_bytes: int = 20 * GIB  # in run directory and TMPDIR together
    spare_bytes: int = 0  # that stay free on the disk
    stop: Callable[[], bool] = lambda: False
    show: Callable[[dict[str, Any]], None] = lambda row: None
    sandboxed: bool = True
    environ: Mapping[str, str] = field(default_factory=clean_env)

    def confined(self, argv: list[str], writable: Sequence[Path], *readable: Path) -> list[str]:
        """A command of the candidate's in this machine's sandbox: no network, no held-out data, writes only to `writable`.

        An empty command gives the words to put before one."""
        for folder in writable:
            folder.mkdir(parents=True, exist_ok=True)
        if not self.sandboxed:
            return argv
        readable, hidden = (self.worktree, self.harness.parent, self.train_dir, *readable), [self.held_dir, *self.hidden]
        return sandbox.wrap(argv, rights.rules(writable, readable, hidden))[0]

    def scratch(self, run_dir: Path) -> Path:
        """TMPDIR of a candidate's trainings, `tmp/NNNN`. MLX compiles kernels there and takes what it finds compiled: so it
        lasts from one trial of a candidate to the next, and no candidate gets another's."""
        return self.folder / "tmp" / run_dir.name.partition("-")[0]

    @property
    def budget_seconds(self) -> float | None:
        """The budget, None if it is one of steps or tokens."""
        amount, unit = parse_budget(self.budget)
        return amount if unit == "s" else None

    @property
    def wall_seconds(self) -> float:
        """What one training may take from start to exit."""
        return (self.budget_seconds or UNTIMED_SECONDS) + self.startup_seconds

    @property
    def abort_loss(self) -> float:
        """Nats a token; three times the loss of a model that knows nothing."""
        return 3 * math.log(max(self.vocab_size, 2))


def lay_harness(repository: Repository, base: str, folder: Path) -> Path:
    """Write the base commit's harness to runs/<tag>/frozen, or restore it there. Returns the path of the scorer's program."""
    place, contents = folder / "frozen", frozen(repository, base)
    if not _holds(place, contents):
        remove(place)
        for name, content in contents.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
    return place / HARNESS


def _holds(place: Path, contents: Mapping[str, bytes]) -> bool:
    """Whether a folder holds these files and nothing else. Python would also import other modules, and bytecode, from there."""
    if place.is_symlink() or not place.is_dir():
        return False
    folders = {str(parent) for name in contents for parent in PurePosixPath(name).parents}
    found = dict(walk(place, folders))
    return found.keys() == contents.keys() and all(
        stat.S_ISREG(found[name].st_mode) and (place / name).read_bytes() == content for name, content in contents.items()
    )


@lru_cache(maxsize=2)  # called before every training
def frozen(repository: Repository, base: str) -> dict[str, bytes]:
    """Path and content of every file that a commit's harness consists of. UsageError if the commit has none."""
    return {name: repository.file_at(base, name) for name in (HARNESS, *repository.files(base, *FROZEN))}


def run_child(
    lab: Lab, argv: list[str], log: Path, run_dir: Path, wall: float, env: Mapping[str, str] | None = None,
    watch: Callable[[], str | None] = lambda: None, stdout_to: Path | None = None,
) -> child.Outcome:  # fmt: skip
    log.parent.mkdir(exist_ok=True)
    written = (run_dir, lab.scratch(run_dir))
    taken, free = sum(map(directory_bytes, written)), shutil.disk_usage(run_dir).free
    room = min(lab.directory_bytes, taken + max(0, free - lab.spare_bytes))
    bounds = child.Bounds(wall_seconds=wall, memory_bytes=lab.memory_bytes, directories=written, directory_bytes=room)
    known = {name: value for name, value in lab.environ.items() if name != "AUTORESEARCH_HOME"}  # it leads to held-out data
    outcome = child.run(
        argv, cwd=lab.worktree, env={**known, "TMPDIR": str(lab.scratch(run_dir)), **(env or {})}, log=log, bounds=bounds,
        stop=lab.stop, watch=watch, stdout_to=stdout_to, pidfile=lab.folder / "child.pid",
    )  # fmt: skip
    if outcome.reason == "stopped":
        raise Stopped
    return outcome
