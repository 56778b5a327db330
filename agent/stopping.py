"""How a night is asked to stop: Ctrl-C, a signal, or `--stop` in another terminal. Once: after this experiment; twice: now."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from agent.errors import Stopped

_ONCE, _NOW = "after this experiment\n", "now\n"


class Stopper:
    """Collects requests to stop. `now` is cheap enough to be asked several times a second."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self._file = folder / "stop"
        self._say = say
        self._requests = 0
        self._told = 0

    def install(self) -> None:
        """Take the signals. SIGINT asks once, then at once; SIGTERM and a closed terminal ask at once."""
        self._file.unlink(missing_ok=True)
        signal.signal(signal.SIGINT, self._interrupted)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, self._ended)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._requests += 1

    def _ended(self, number: int, frame: FrameType | None) -> None:
        self._requests += 2

    def _count(self) -> int:
        requests = self._requests
        with contextlib.suppress(OSError):
            requests += 2 if "now" in self._file.read_text() else 1
        if self._told < min(requests, 2):  # said here, not in the signal handler, which must not print
            self._told = min(requests, 2)
            words = "stopping after this experiment; once more stops now (the night can be resumed)", "stopping now"
            self._say(words[self._told - 1])
        return requests

    def finishing(self) -> bool:
        """Whether to begin no further experiment."""
        return self._count() >= 1

    def now(self) -> bool:
        """Whether to leave everything as it is, at once."""
        return self._count() >= 2

    def sleep(self, seconds: float, show: Callable[[float], None] = lambda left: None) -> None:
        """Wait, awake to requests: a first one ends the wait, a second raises Stopped."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.now():
                raise Stopped
            if self.finishing():
                return
            show(left)
            time.sleep(min(left, 0.2))


def request_stop(folder: Path) -> str:
    """Leave a request for the driver of this night; a second one asks it to stop at once. Says what was asked."""
    file = folder / "stop"
    word = _NOW if file.exists() else _ONCE
    draft = folder / f".stop-{os.getpid()}"
    draft.write_text(word)
    os.replace(draft, file)
    return word.strip()
