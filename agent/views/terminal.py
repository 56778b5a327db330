"""A night on a terminal: a live panel below the lines already printed. In a log, on a dumb terminal or with --plain: lines only."""

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

PLAIN_SECONDS = 30.0  # between two progress lines where there is no panel
FIRST_SECONDS = 4.0  # until the first progress line
PER_SECOND = 2.0  # how often the panel is drawn; drawing more often would take time from the training
BAR = 24  # width of the progress bar, in columns
TERMINAL_LOG = "logs/terminal.log"  # below runs/<tag>: output after the terminal was closed
COLOURS = {"keep": "green", "discard": "dim"}  # every other status is a failure: red

Glance = dict[str, Any]  # what agent.views.glance.at_a_glance returns


class Console:
    """`say` prints a line. `stage` and `show` tell what happens now: in the panel, or without one as a line every PLAIN_SECONDS.

    After the terminal was closed, or the program that read the output has ended, everything is written to the file `instead`.
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
        """Print a line with the time."""
        clock = time.strftime("%H:%M:%S")
        try:
            if self._rich.file.isatty():
                self._rich.print(wrapped(clock, text))
            else:
                print(f"{clock} {text}", file=self._rich.file, flush=True)
        except OSError:  # the reader of the output is gone
            self.leave((1,))
            with contextlib.suppress(OSError):
                self._rich.file.flush()  # the line is still in the buffer: now it goes to the file

    def leave(self, streams: Sequence[int] = ()) -> None:
        """From now on, write to the file instead of to these descriptors (default: those that were a terminal at the start).

        A signal handler may call this: it prints nothing and takes no lock.
        """
        with contextlib.suppress(OSError):
            there = os.open(self._instead, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            for stream in streams or self._terminals:
                os.dup2(there, stream)
            os.close(there)
        self._lively = False

    def stage(self, text: str) -> None:
        """Name what the driver does now."""
        self._stage, self._words, self._since = text, "", time.time()
        self._shown = time.monotonic() - PLAIN_SECONDS + FIRST_SECONDS

    def show(self, text: str, every: float = PLAIN_SECONDS) -> None:
        """Tell how far the current stage is. Without a panel, print a line if the last one is `every` seconds old."""
        self._words, now = text, time.monotonic()
        if not self._lively and now - self._shown >= every:
            self._shown = now
            self.say(f"  {self._stage} {text}".rstrip())

    def metrics(self, row: dict[str, Any]) -> None:
        """Show the newest numbers of the current training."""
        self.show(", ".join(results.metrics(row)))

    def _panel(self) -> RenderableType:
        if self._look:
            with contextlib.suppress(Exception):  # the night changes meanwhile; the next look is half a second away
                self._last = self._look()
        return panel(self._last, self._rich.width, self._stage, self._words, self._since)


def panel(now: Glance | None, width: int, stage: str = "", words: str = "", since: float | None = None) -> Group:
    """The panel: what happens now, how far it is, the best, the last results, what is left. At most 10 lines, cut to the width.

    stage, words: what the driver says that it does. since: Unix time at which this stage began. During an experiment, `now` says
    more than `stage`, and is shown in its place.
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
            phase, clock, words = "scoring", "", ""  # `words` and `clock` are still about the training
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
    """Follow a night that another process drives, until the night ends or Ctrl-C. `look` returns the numbers and the lines of
    --status."""
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
    """Print lines. On a terminal, long lines are wrapped between words, and keep their indentation."""
    console = Rich(highlight=False)
    for line in lines:
        if sys.stdout.isatty():
            text = line.lstrip()
            console.print(wrapped(" " * (len(line) - len(text) - 1), text) if text != line else Text(line))
        else:
            print(line, flush=True)


def complain(text: str) -> None:
    """Print an error to standard error."""
    with contextlib.suppress(OSError):  # the terminal is closed; the exit code still tells
        print(f"error: {text}", file=sys.stderr, flush=True)


def wrapped(first: str | Text, text: str) -> Table:
    """Two columns: `first`, and the text, whose wrapped lines stay to the right of `first`."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(first if isinstance(first, Text) else Text(first), Text(text))
    return table


def _line(text: str, room: int, style: str = "") -> Text:
    line = Text(text, style=style, no_wrap=True, overflow="ellipsis", end="\n")
    line.truncate(room, overflow="ellipsis")
    return line


def _bar(training: dict[str, Any], room: int) -> RenderableType:
    """The progress bar of a training, and as many of its numbers as fit beside the bar."""
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
