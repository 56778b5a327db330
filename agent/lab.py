"""Where a night's trials happen, what they may use, and the sandbox around whatever a candidate's code runs in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import sandbox
from agent.environment import clean_env

UNTIMED_SECONDS = 3600.0  # the wall limit of a budget in steps or tokens
GIB = 1 << 30


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
        return sandbox.wrap(argv, writable=writable, readable_only=readable, hidden=hidden)[0]

    def scratch(self, run_dir: Path) -> Path:
        """TMPDIR of a candidate's trainings, `tmp/NNNN`. MLX compiles kernels there and takes what it finds compiled: so it
        lasts from one trial of a candidate to the next, and no candidate gets another's."""
        return self.folder / "tmp" / run_dir.name.partition("-")[0]

    @property
    def budget_seconds(self) -> float | None:
        """The budget, None if it is one of steps or tokens."""
        match = re.fullmatch(r"([0-9.]+)([kM]?)s", self.budget)
        return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]] if match else None

    @property
    def wall_seconds(self) -> float:
        """What one training may take from start to exit."""
        return (self.budget_seconds or UNTIMED_SECONDS) + self.startup_seconds

    @property
    def abort_loss(self) -> float:
        """Nats a token; three times the loss of a model that knows nothing."""
        return 3 * math.log(max(self.vocab_size, 2))
