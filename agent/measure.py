"""What the driver measures from outside: memory of processes, bytes on disk, time asleep."""

import contextlib
import os
import sys
import time
from pathlib import Path

import psutil


def seconds_asleep() -> float:
    """Seconds the machine has been suspended since it started: only the difference of two readings means something."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    if sys.platform == "darwin":
        return time.clock_gettime(time.CLOCK_MONOTONIC) - time.clock_gettime(time.CLOCK_UPTIME_RAW)
    return time.time() - time.monotonic()  # also moves when the clock is set


def directory_bytes(directory: Path) -> int:
    """Bytes that the files below a directory take; files that vanish meanwhile do not count."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                total += status.st_blocks * 512  # what a sparse file really takes
    return total


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All processes below this one; none if it is gone."""
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory; zero if the process is gone."""
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
