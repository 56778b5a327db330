"""What a child may use, and how it ended."""

from dataclasses import dataclass
from pathlib import Path

from agent.capture import safe_tail

FLOOD = 100  # a child that prints more than this many times `log_bytes` is ended


@dataclass(frozen=True)
class Bounds:
    """What a child may use; None is no limit."""

    wall_seconds: float
    idle_seconds: float | None = None  # without a byte of output
    log_bytes: int = 4 << 20  # of each output file; more is dropped from its middle, FLOOD times more ends the child
    memory_bytes: int | None = None  # resident, summed over the family; pages they share count for each
    directories: tuple[Path, ...] = ()
    directory_bytes: int | None = None  # in all of them together


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    `reason` is `exited`, or what made the driver end it: `wall`, `idle`, `log`, `memory`, `disk`, `stopped`, or the word that
    `watch` returned; or `missing`: it could not be started, and the log says why.
    """

    exit_code: int | None  # None if it died by a signal or never ran
    signal: int | None
    reason: str
    seconds: float  # awake, by the monotonic clock
    peak_rss_mb: float  # resident memory of the family, sampled; on Apple GPUs this leaves out most of Metal's buffers
    log: Path
    suspended_seconds: float  # for which the machine slept meanwhile

    @property
    def ok(self) -> bool:
        return self.reason == "exited" and self.exit_code == 0

    def tail(self, max_chars: int = 2000) -> str:
        """The end of the log as safe text: no control characters, no secrets."""
        return safe_tail(self.log, max_chars)
