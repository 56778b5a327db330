"""When a night is over, when it pauses, and how it is asked to stop.

The limits are pure functions of the state. A night is asked to stop by Ctrl-C, a signal, or `--stop` in another terminal. Once:
after this experiment; twice: now.
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType

from agent.errors import Stopped, UsageError
from agent.files import read_plain, write_anew
from agent.journal.settings import Settings
from agent.journal.state import FAILURES, Night

LONGEST_PAUSE = 600.0  # seconds, between failing experiments
LONGEST_WAIT = 1800.0  # seconds, for a rate limit that does not say how long it lasts
FIRST_WAIT = 60.0
UNKNOWN_PRICES = 2  # calls in a row without a price, and none known, that end a night with --max-cost; one may have been cut off
GIVE_UP_WAITS = 50  # a day of half hours: whoever limits the rate has no more for us


def seconds_left(settings: Settings, session_seconds: float, now: float) -> float:
    """Seconds in which experiments may still begin; infinite without --until and --hours. now: Unix time."""
    end = settings.end(now - session_seconds)
    return math.inf if end is None else end - now


def over(night: Night, settings: Settings, *, seconds_left: float, free_gb: float) -> tuple[str, str] | None:
    """Name and words of the limit that ends the night before its next experiment, None if it goes on."""
    done = len(night.done)
    best = night.leader.mean
    if settings.experiments is not None and done >= settings.experiments:
        return "experiments", f"{done} experiment{'s' * (done != 1)} done, as asked"
    if seconds_left <= 0 and settings.until is not None:
        return "until", f"it is {clock(settings.until)} or later, as asked"
    if seconds_left <= 0:
        return "hours", f"{settings.hours:g} hours are over"
    if settings.max_cost is not None and night.spent(settings.max_cost):
        guess = f", {night.estimated} calls of unknown price among them" if night.estimated else ""
        one = f", and one call has cost up to ${night.dearest:.2f}" if night.cost < settings.max_cost else ""
        return "max_cost", f"the agent has cost ${night.cost:.2f} of ${settings.max_cost:.2f}{guess}{one}"
    if settings.max_cost is not None and night.unpriced >= UNKNOWN_PRICES:
        return "max_cost", (
            "the agent does not report its cost, so --max-cost cannot be enforced; give --price-in and --price-out, or begin a "
            "night without --max-cost"
        )
    if settings.target is not None and best is not None and best <= settings.target:
        return "target", f"val_bpb {best:.4f} reaches the target {settings.target:g}"
    if settings.patience is not None and night.since_keep() >= settings.patience:
        return "patience", f"nothing kept in {night.since_keep()} experiments"
    if free_gb < settings.disk_gb:
        return "disk", f"{free_gb:.1f} GB free on the disk, {settings.disk_gb:g} GB wanted; free some and resume"
    kind, length = night.streak()
    if kind in FAILURES and length >= 2 * settings.breaker:
        return "failures", f"{length} experiments in a row ended as {kind}; see the logs, mend it and resume"
    return None


def pause(night: Night, settings: Settings) -> float:
    """Seconds to wait before the next experiment: 0, unless failures of one kind come in a row."""
    kind, length = night.streak()
    if kind not in FAILURES or length < settings.breaker:
        return 0.0
    return float(min(settings.backoff * 2.0 ** (length - settings.breaker), LONGEST_PAUSE))


def rate_limit_wait(night: Night, settings: Settings) -> float | None:
    """Seconds to wait after the newest rate limit; None once waiting has not helped for a day."""
    failures = [f for f in night.agent_failures if f["kind"] == "rate_limit"]
    if len(failures) >= GIVE_UP_WAITS:
        return None
    told = failures[-1].get("wait") if failures else None
    if told is not None:
        return float(max(told, 1.0))
    return float(min(FIRST_WAIT * 2.0 ** (len(failures) - 1), LONGEST_WAIT))


def without_agent(night: Night, settings: Settings, kind: str, message: str, seconds_left: float) -> tuple[str, str] | float:
    """No agent could be asked: name and words of why the night ends, or the seconds to wait."""
    if kind != "rate_limit":
        return kind, message
    wait = rate_limit_wait(night, settings)
    if wait is None:
        return "rate_limit", f"the rate limit has not lifted in {GIVE_UP_WAITS} attempts: {message}"
    if wait > seconds_left:
        name = "hours" if settings.until is None else "until"
        return name, f"the rate limit lasts {wait:.0f} s more, past the end of this night: {message}"
    return wait


def next_time(shown: str, now: float | None = None) -> float:
    """The Unix time, after `now`, at which clocks here next show `shown`, HH:MM. UsageError if that is no time of day."""
    match = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", shown.strip())
    if match is None:
        raise UsageError(f"{shown!r}: expected a time of day such as 07:00")
    here = datetime.fromtimestamp(time.time() if now is None else now)
    end = here.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
    if end <= here:
        end += timedelta(days=1)
    return end.timestamp()


def clock(moment: float) -> str:
    """What clocks here show at a Unix time: HH:MM."""
    return time.strftime("%H:%M", time.localtime(moment))


_ONCE, _NOW = "after this experiment\n", "now\n"


class Stopper:
    """Collects requests to stop. `now` is cheap enough to be asked several times a second.

    A closed terminal is no such request: `left` is called, `alone` is True from then on, and the night goes on.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], None] = lambda text: None, left: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        self._file = folder / "stop"
        self._say, self._left, self.alone = say, left, False
        self._requests = 0
        self._told = 0

    def install(self) -> None:
        """Take the signals. SIGINT asks once, then at once; SIGTERM asks at once; SIGHUP, of a closed terminal, does not ask."""
        self._file.unlink(missing_ok=True)
        signal.signal(signal.SIGINT, self._interrupted)
        for number, handler in ((signal.SIGTERM, self._ended), (signal.SIGHUP, self._hung_up)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, handler)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._requests += 1

    def _ended(self, number: int, frame: FrameType | None) -> None:
        self._requests += 2

    def _hung_up(self, number: int, frame: FrameType | None) -> None:
        self.alone = True
        self._left()

    def _count(self) -> int:
        requests = self._requests
        with contextlib.suppress(OSError):
            requests += 2 if "now" in read_plain(self._file, 64).decode("ascii", "replace") else 1
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
    write_anew(file, word.encode())
    return word.strip()
