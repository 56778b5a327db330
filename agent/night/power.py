"""A laptop at night: keep it awake where the system lets us, say so where it will not stay awake."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from agent.process import child
from agent.process.environment import clean_env


@contextlib.contextmanager
def stay_awake() -> Iterator[None]:
    """Hold off idle sleep on macOS while the block runs; it ends with this process whatever happens."""
    if sys.platform != "darwin" or shutil.which("caffeinate") is None:
        yield
        return
    command = ["caffeinate", "-i", "-m", "-w", str(os.getpid())]
    with (
        tempfile.TemporaryDirectory() as scratch,
        child.beside(command, cwd=Path(scratch), env=clean_env(), log=Path(scratch) / "log"),
    ):
        yield


def battery() -> str:
    """"" for a machine without one (or where nobody can say), else `in use` or `plugged in`."""
    if sys.platform == "darwin" and (said := _pmset("-g", "batt")):
        if "InternalBattery" not in said:
            return ""  # a desktop, perhaps with a UPS: no lid, no slower chip
        return "in use" if re.search("drawing from 'Battery Power'", said) else "plugged in"
    import psutil

    try:
        found = psutil.sensors_battery()
    except (OSError, RuntimeError, AttributeError, NotImplementedError):
        return ""
    return "" if found is None else "in use" if found.power_plugged is False else "plugged in"


def low_power_mode() -> bool:
    """Whether macOS holds the chip back; owners report about 60 % of the speed. Macs that also have a mode for high power print
    `powermode`, and 1 is the low one, too."""
    return sys.platform == "darwin" and re.search(r"^ *(low)?powermode +1\b", _pmset("-g"), re.M) is not None


def _pmset(*words: str) -> str:
    """What macOS says about its power supply, "" if it says nothing."""
    code, said = child.said_by(["pmset", *words], seconds=10.0)
    return said if code == 0 else ""


def battery_warning() -> list[str]:
    """What to tell the user of a laptop about its power supply and its lid."""
    state, found = battery(), []
    if state == "in use":
        found.append("running on battery: trainings are slower and vary more, and the battery may run out before the night ends; "
                     "plug it in")
    if state and sys.platform == "darwin":
        found.append("keep the lid open: a closed lid sends a Mac to sleep whatever we ask, unless a display is attached to it")
    if low_power_mode():
        found.append("Low Power Mode is on: trainings are much slower; turn it off in System Settings > Battery")
    return found
