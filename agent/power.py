"""A laptop at night: keep it awake where the system lets us, say so where it will not stay awake."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from agent import process
from agent.environment import clean_env


@contextlib.contextmanager
def stay_awake() -> Iterator[None]:
    """Hold off idle sleep on macOS while the block runs; it ends with this process whatever happens."""
    if sys.platform != "darwin" or shutil.which("caffeinate") is None:
        yield
        return
    over = threading.Event()
    with tempfile.TemporaryDirectory() as scratch:
        command = ["caffeinate", "-i", "-m", "-w", str(os.getpid())]
        limits = process.Limits(wall_seconds=14 * 86400.0)
        keeper = threading.Thread(
            target=lambda: process.run(
                command, cwd=Path(scratch), env=clean_env(), log=Path(scratch) / "log", limits=limits, stop=over.is_set
            ),
            daemon=True,
        )
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join(10)


def battery() -> str:
    """"" for a machine without one (or where nobody can say), else `in use` or `plugged in`."""
    import psutil

    try:
        found = psutil.sensors_battery()
    except (OSError, RuntimeError, AttributeError, NotImplementedError):
        return ""
    return "" if found is None else "in use" if found.power_plugged is False else "plugged in"


def battery_warning() -> list[str]:
    """What to tell the user of a laptop about its power supply and its lid."""
    state, found = battery(), []
    if state == "in use":
        found.append("running on battery: trainings are slower and less alike, and the night may not end by itself; plug it in")
    if state and sys.platform == "darwin":
        found.append("keep the lid open: a closed lid sends a Mac to sleep whatever we ask, unless a display is attached to it")
    return found
