"""What a night shows while it runs: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console as Rich
from rich.markup import escape
from rich.status import Status

PLAIN_SECONDS = 30.0  # between progress lines where there is no terminal
FIRST_SECONDS = 4.0  # to the first one


class Console:
    """`say` prints a line that stays; `show` replaces the live line."""

    def __init__(self) -> None:
        self._rich = Rich(highlight=False, soft_wrap=True)
        self._live = self._rich.is_terminal
        self._status: Status | None = None
        self._shown = 0.0
        self.prefix = ""

    def __enter__(self) -> Console:
        if self._live:
            self._status = self._rich.status("", spinner="dots")
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status:
            self._status.stop()

    def say(self, text: str) -> None:
        """One line with the time."""
        stamped = f"{time.strftime('%H:%M:%S')} {text}"
        with contextlib.suppress(OSError):  # whoever was listening is gone; the night goes on
            if self._live:
                self._rich.print(escape(stamped))
            else:
                print(stamped, flush=True)

    def show(self, text: str, every: float = PLAIN_SECONDS) -> None:
        """Replace the live line; without a terminal, print it if the last one is old enough."""
        now = time.monotonic()
        if self._status:
            self._status.update(escape(f"{self.prefix} {text}".strip()))
        elif now - self._shown >= every:
            self._shown = now
            self.say(f"  {self.prefix} {text}".rstrip())

    def stage(self, prefix: str) -> None:
        """Name what the live line is about."""
        self.prefix = prefix
        self._shown = time.monotonic() - PLAIN_SECONDS + FIRST_SECONDS
        if self._status:
            self._status.update(escape(prefix))

    def metrics(self, row: dict[str, Any]) -> None:
        """The newest numbers of the running training."""
        parts = []
        if "step" in row:
            parts.append(f"step {row['step']:.0f}")
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4f}")
        if "tokens_per_second" in row:
            parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
        if "seconds" in row:
            parts.append(f"{row['seconds']:.0f} s")
        self.show(", ".join(parts))


def complain(text: str) -> None:
    """One line to standard error."""
    print(f"error: {text}", file=sys.stderr, flush=True)
