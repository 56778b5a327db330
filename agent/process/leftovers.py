"""Records of running children, and ending the children that a killed driver has left behind.

Usually there are none: when the driver dies, the supervisor of each child ends the child's family. The records are for the case
that driver and supervisor were both killed.
"""

import contextlib
import json
import time
from pathlib import Path

import psutil

from agent.files import read_plain, remove, write_anew
from agent.process.supervise import KILL_SECONDS, marked

_RECORD_BYTES = 64 << 10  # a longer record was not written by this driver
_SAME_START = 2.0  # seconds by which two readings of a process's start time may differ: they derive from the wall clock


class Record:
    """The file that identifies a running child by its marker and the pid and start time of its processes. A path of None: no
    file."""

    def __init__(self, path: Path | None, marker: str) -> None:
        self.path, self.marker = path, marker

    def write(self, *pids: int) -> None:
        if self.path is None:
            return
        starts = []
        for pid in pids:
            with contextlib.suppress(psutil.Error, ValueError, OverflowError):  # a child may speak for its supervisor
                starts.append({"pid": pid, "start": psutil.Process(pid).create_time()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_anew(self.path, json.dumps({"marker": self.marker, "processes": starts}).encode())

    def clear(self) -> None:
        if self.path is not None:
            remove(self.path)  # whatever the child has put in its place


def end_leftovers(directory: Path) -> list[int]:
    """End the processes that the records (`*.pid`) in a directory name, and remove the records. Returns the pids that were ended.

    A process is ended only if it started when the record says, or has the record's marker in its environment, so a recycled pid is
    never hit. Call this only while holding the night's lock: it would also end the children of a living driver.
    """
    ended: set[int] = set()
    for path in sorted(directory.glob("*.pid")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # torn, or not ours
            record = json.loads(read_plain(path, _RECORD_BYTES))
            roots = [process for entry in record["processes"] if (process := _same(entry["pid"], entry["start"]))]
            ended |= end_processes(roots, str(record["marker"]))
    for path in (*directory.glob("*.pid"), *directory.glob(".*.pid.new")):
        with contextlib.suppress(OSError):  # a full disk: it names nobody who is still there
            remove(path)
    return sorted(ended)


def end_processes(roots: list[psutil.Process], marker: str) -> set[int]:
    """Send KILL to these processes, their descendants and all processes with the marker, until none is left. Returns their pids."""
    ended: set[int] = set()
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        living = []
        for process in [*roots, *(child for root in roots for child in descendants(root)), *marked(marker)]:
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
        if not living:
            break
        for process in living:
            with contextlib.suppress(psutil.Error):
                process.kill()
                ended.add(process.pid)
        roots = living  # processes that were forked meanwhile are descendants of these, or have the marker
        time.sleep(0.02)
    return ended


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All descendants of a process; [] if the process is gone."""
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _same(pid: int, start: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - start) <= _SAME_START else None
    except (psutil.Error, ValueError, OverflowError):
        return None
