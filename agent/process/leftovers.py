"""What a killed driver may leave behind: a record of each running child, and the way to end it.

Normally nothing is left: a child's supervisor ends the family when the driver dies. This is for the case that both were killed.
"""

import contextlib
import json
import time
from pathlib import Path

import psutil

from agent.files import read_plain, remove, write_anew
from agent.process.supervise import KILL_SECONDS, marked

_RECORD_BYTES = 64 << 10  # of a record; a longer one is not ours
_SAME_START = 2.0  # seconds that two readings of one process's start may differ: they are derived from the wall clock


class Record:
    """The file that names a running child: its marker, and the pid and start time of its processes. None: no file."""

    def __init__(self, path: Path | None, marker: str) -> None:
        self.path, self.marker = path, marker

    def write(self, *pids: int) -> None:
        if self.path is None:
            return
        starts = []
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                starts.append({"pid": pid, "start": psutil.Process(pid).create_time()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_anew(self.path, json.dumps({"marker": self.marker, "processes": starts}).encode())

    def clear(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def end_leftovers(directory: Path) -> list[int]:
    """End every process that the records (`*.pid`) in a directory still name, and remove the records; the pids that were ended.

    A process is ended only if it started when the record says, or carries the record's marker in its environment: a recycled
    pid is never hit. Call this only as the one driver of the night: it would end a living driver's children.
    """
    ended: set[int] = set()
    for path in sorted(directory.glob("*.pid")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # torn, or not ours
            record = json.loads(read_plain(path, _RECORD_BYTES))
            roots = [process for entry in record["processes"] if (process := _same(entry["pid"], entry["start"]))]
            ended |= end_processes(roots, str(record["marker"]))
        remove(path)
    for draft in directory.glob(".*.pid.new"):
        remove(draft)
    return sorted(ended)


def end_processes(roots: list[psutil.Process], marker: str) -> set[int]:
    """KILL these, their descendants, and all who carry the marker, until none is left; the pids that were sent it."""
    ended: set[int] = set()
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        living = []
        for process in [*roots, *_families(roots), *marked(marker)]:
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
        if not living:
            break
        for process in living:
            with contextlib.suppress(psutil.Error):
                process.kill()
                ended.add(process.pid)
        roots = living  # who forked meanwhile is found below them or by the marker
        time.sleep(0.02)
    return ended


def _families(roots: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in roots:
        with contextlib.suppress(psutil.Error):
            found += process.children(recursive=True)
    return found


def _same(pid: int, start: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - start) <= _SAME_START else None
    except (psutil.Error, ValueError, OverflowError):
        return None
