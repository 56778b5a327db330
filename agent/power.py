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


def on_battery() -> bool:
    """Whether the machine runs on its battery; False where nobody can say."""
    import psutil

    try:
        battery = psutil.sensors_battery()
    except (OSError, RuntimeError, AttributeError, NotImplementedError):
        return False
    return battery is not None and battery.power_plugged is False


def battery_warning() -> list[str]:
    """What to tell the user about the power supply, if anything."""
    if not on_battery():
        return []
    lid = "; a closed lid sends a Mac to sleep whatever we ask" if sys.platform == "darwin" else ""
    return [f"running on battery: trainings are slower and less alike, and the night may not end by itself{lid}"]
