"""A night on a terminal: a live panel below lines that stay; plain lines in a log, on a dumb terminal, or with --plain."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as Rich
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agent.views import results

PLAIN_SECONDS = 30.0  # between progress lines where there is no terminal
FIRST_SECONDS = 4.0  # to the first one
PER_SECOND = 2.0  # the panel is drawn; more would take time from the training
BAR = 24  # columns
TERMINAL_LOG = "logs/terminal.log"  # below runs/<tag>: what is said once the terminal is closed
COLOURS = {"keep": "green", "discard": "dim"}  # the others failed: red

Glance = dict[str, Any]  # of agent.views.glance.at_a_glance


class Console:
    """`say` prints a line that stays. `stage` and `show` say what goes on now: in the panel, or as a plain line now and then.

    Once the terminal is closed, or the program that read our output has ended, everything goes to the file `instead`.
    """

    def __init__(self, plain: bool = False, instead: Path = Path(os.devnull)) -> None:
        self._rich, self._instead = Rich(highlight=False, soft_wrap=False), instead
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self._lively = sys.stdout.isatty() and not self._rich.is_dumb_terminal and not plain  # FORCE_COLOR makes no file a terminal
        self._live: Live | None = None
        self._look: Callable[[], Glance] | None = None
        self._last: Glance | None = None
        self._stage, self._words, self._since, self._shown = "", "", time.time(), 0.0

    def __enter__(self) -> Console:
        if self._lively:
            self._live = Live(get_renderable=self._panel, console=self._rich, refresh_per_second=PER_SECOND, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            with contextlib.suppress(OSError):  # as in `say`
                self._live.stop()

    def follow(self, look: Callable[[], Glance]) -> None:
        """Draw the panel from what `look` returns. A thread calls it, twice a second."""
        self._look = look

    def say(self, text: str) -> None:
        """One line with the time."""
        clock = time.strftime("%H:%M:%S")
        try:
            self._print(clock, text)
        except OSError:  # whoever was listening is gone
            self.leave((1,))
            with contextlib.suppress(OSError):
                self._rich.file.flush()  # the line is still in the buffer

    def _print(self, clock: str, text: str) -> None:
        if self._rich.file.isatty():
            self._rich.print(_wrapped(clock, text))
        else:
            print(f"{clock} {text}", file=self._rich.file, flush=True)

    def leave(self, streams: Sequence[int] = ()) -> None:
        """Write to the file from now on, instead of to these descriptors; default: to the terminal that was there at the start.

        A signal handler may call this: it prints nothing and takes no lock.
        """
        with contextlib.suppress(OSError):
            there = os.open(self._instead, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            for stream in streams or self._terminals:
                os.dup2(there, stream)
            os.close(there)
        self._lively = False

    def stage(self, text: str) -> None:
        """Name what goes on now."""
        self._stage, self._words, self._since = text, "", time.time()
        self._shown = time.monotonic() - PLAIN_SECONDS + FIRST_SECONDS

    def show(self, text: str, every: float = PLAIN_SECONDS) -> None:
        """How far it is. Without a panel a line is printed if the last one is `every` seconds old."""
        self._words, now = text, time.monotonic()
        if not self._lively and now - self._shown >= every:
            self._shown = now
            self.say(f"  {self._stage} {text}".rstrip())

    def metrics(self, row: dict[str, Any]) -> None:
        """The newest numbers of the running training."""
        self.show(", ".join(results.metrics(row)))

    def _panel(self) -> RenderableType:
        if self._look:
            with contextlib.suppress(Exception):  # the night changes meanwhile; the next look is half a second away
                self._last = self._look()
        return panel(self._last, self._rich.width, self._stage, self._words, self._since)


def panel(now: Glance | None, width: int, stage: str = "", words: str = "", since: float | None = None) -> Group:
    """What goes on, how far it is, the best, the last results, what is left: at most 10 lines that fit the width.

    stage, words and since (Unix time): what the driver says that it does, and since when. The experiment at hand speaks for itself.
    """
    doing, room = now["open"] if now else None, max(width - 1, 20)
    training = (doing or {}).get("training")
    rows: list[RenderableType] = []
    clock = f", {results.lasting(time.time() - since)}" if since is not None else ""
    if now is None or doing is None:
        rows.append(_line(f"{stage}{clock}", room, "bold"))
    else:
        phase = stage if doing["phase"] == "deciding" and stage else doing["phase"]
        if (training or {}).get("scoring"):
            phase, clock, words = "scoring", "", ""  # the last words and the clock are the training's
        rows.append(_line(f"{results.place(now)}: {phase}{clock}", room, "bold"))
        if doing["description"] and doing["n"]:
            rows.append(_line(f"  {doing['description']}", room))
    if training and not training["scoring"]:
        rows.append(_bar(training, room))
    elif words:
        rows.append(_line(words, room))
    if now is not None:
        rows += [_line(text, room) for text in (results.best(now),) if text]
        rows += [_line(results.row(e), room, COLOURS.get(e["status"], "red")) for e in now["experiments"][-5:] if e["n"]]
        rows += [_line(text, room) for text in (results.outlook(now),) if text]
    return Group(*rows)


def watch(look: Callable[[], tuple[Glance, list[str]]], plain: bool = False) -> None:
    """Follow a night that another process drives, until it ends or Ctrl-C. `look` gives the numbers and the lines of --status."""
    console = Rich(highlight=False)
    now, lines = look()
    with contextlib.suppress(KeyboardInterrupt):
        if sys.stdout.isatty() and not console.is_dumb_terminal and not plain:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while now["running"]:
                    live.update(panel(now, console.width, now["doing"]), refresh=True)
                    time.sleep(1 / PER_SECOND)
                    now, lines = look()
        else:
            said: list[str] = []
            while now["running"]:
                if lines != said:
                    said = lines
                    print_lines([*lines, ""])
                time.sleep(PLAIN_SECONDS)
                now, lines = look()
    print_lines(lines)


def print_lines(lines: list[str]) -> None:
    """Print lines; on a terminal, wrapped between words, the rest of a line below its beginning."""
    console = Rich(highlight=False)
    for line in lines:
        if sys.stdout.isatty():
            text = line.lstrip()
            console.print(_wrapped(" " * (len(line) - len(text) - 1), text) if text != line else Text(line))
        else:
            print(line, flush=True)


def complain(text: str) -> None:
    """One line to standard error."""
    with contextlib.suppress(OSError):  # a closed terminal: the exit code is what is left
        print(f"error: {text}", file=sys.stderr, flush=True)


def _wrapped(first: str, text: str) -> Table:
    """Two columns, so that what is wrapped stays right of the first."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(first), Text(text))
    return table


def _line(text: str, room: int, style: str = "") -> Text:
    line = Text(text, style=style, no_wrap=True, overflow="ellipsis", end="\n")
    line.truncate(room, overflow="ellipsis")
    return line


def _bar(training: dict[str, Any], room: int) -> RenderableType:
    """The bar of a training and as many of its numbers as fit beside it."""
    share, width = training.get("progress"), min(BAR, room // 3)
    parts, text = results.metrics(training), f"{100 * share:3.0f} %" if share is not None else ""
    if share and training.get("seconds"):
        parts.insert(1, f"{results.lasting(training['seconds'] * (1 - share) / share)} left")
    for part in parts:
        if len(text) + 2 + len(part) > room - (width + 1 if share is not None else 0):
            break
        text += f"  {part}" if text else part
    if share is None:
        return _line(text, room)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_row(ProgressBar(total=1.0, completed=share, width=width), _line(text, room))
    return table
