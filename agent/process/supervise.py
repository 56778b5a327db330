"""The supervisor of one child: a process between driver and child that ends the child's whole family.

`agent/process/child.py` starts this file as a program: `python -I supervise.py STATUS_FD CONTROL_FD GRACE PACKAGES COMMAND...`. The
supervisor starts the command in a session of its own and reports how it ended on STATUS_FD (JSON lines). When the command exits or
CONTROL_FD closes (the driver closed it, or died), the supervisor ends every process that is left: TERM, GRACE seconds, KILL.
PACKAGES is the folder where psutil is installed.

Which processes are found: on Linux every descendant, even after double forks or in other sessions, because the supervisor is
their subreaper. On macOS: descendants that are still in the process tree, processes in the command's process group, and
processes with the marker in their environment. macOS hides the environment of system programs, so a system program that left
tree and group is missed.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import psutil

MARKER = "AUTORESEARCH_CHILD"  # environment variable of all processes of a family; its value identifies the family
FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # the driver decides what they end
KILL_SECONDS = 5.0  # how long KILL is repeated against a family that forks faster than it dies
LINUX = sys.platform.startswith("linux")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def marked(marker: str) -> "list[psutil.Process]":
    """All living processes of this user that have the marker in their environment."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == marker:
                found.append(process)
    return found


def members(root: int, marker: str) -> "list[psutil.Process]":
    """The living processes of the command's family, without this process and zombies."""
    import psutil

    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    if not LINUX:  # no subreaper: an orphan has left the tree
        found.update((process.pid, process) for process in marked(marker))
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.getpgid(process.pid) == root:
                    found[process.pid] = process
    found.pop(os.getpid(), None)
    living = []
    for process in found.values():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def signal_group(pid: int, number: int) -> None:
    """Signal a process group, if there is one. macOS answers EPERM for a group that holds only a zombie."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def send(processes: "list[psutil.Process]", number: int) -> None:
    """Signal each process; psutil makes sure that a recycled pid is not hit."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            process.send_signal(number)


class _Supervisor:
    def __init__(self, status: int, control: int, grace: float, command: list[str]) -> None:
        self.status, self.control, self.grace = status, control, grace
        self.ended: int | None = None  # wait status of the command
        self.peak_kb = 0.0  # peak memory of the largest single process that was waited for
        self.alone = False  # no child is left to wait for
        self.marker = os.environ.get(MARKER, "")
        os.set_inheritable(status, False)
        os.set_inheritable(control, False)
        for number in FROM_TERMINAL:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_TERMINAL)  # the driver blocked them, and the command shall get them
        self.told_to_end = False
        signal.signal(signal.SIGTERM, self._on_term)
        self.wake, wake_writer = os.pipe()
        os.set_blocking(wake_writer, False)
        os.set_blocking(self.wake, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self.root = os.fork()
        if self.root == 0:
            self._become(command)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):  # else the driver would wait for this process's copies of the command's pipes
            os.dup2(null, descriptor)

    def _on_term(self, number: int, frame: object) -> None:
        self.told_to_end = True

    def _become(self, command: list[str]) -> NoReturn:
        try:
            os.setsid()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # if the supervisor is killed, the command is, too
            signal.set_wakeup_fd(-1)
            for number in (*FROM_TERMINAL, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)  # Python ignores SIGPIPE, and what is ignored stays so across exec
            os.execvp(command[0], command)
        except BaseException as error:
            self.tell(missing=f"{type(error).__name__}: {error}")
        os._exit(127)

    def tell(self, **facts: object) -> None:
        with contextlib.suppress(OSError):  # nobody listens when the driver is dead
            os.write(self.status, json.dumps(facts).encode() + b"\n")

    def reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                self.alone = True
                return
            if pid == 0:
                return
            self.peak_kb = max(self.peak_kb, usage.ru_maxrss / (1 if LINUX else 1024))
            if pid == self.root:
                self.ended = status

    def run(self) -> None:
        self.tell(pid=self.root)
        self.reap()
        while self.ended is None and not self.told_to_end:
            ready, _, _ = select.select([self.control, self.wake], [], [], 60.0)
            if self.control in ready:
                break
            with contextlib.suppress(BlockingIOError):
                os.read(self.wake, 4096)
            self.reap()
        left = self.end()
        code = None if self.ended is None else os.waitstatus_to_exitcode(self.ended)
        self.tell(exit=code, peak_kb=self.peak_kb, left=left)

    def end(self) -> int:
        """End the family. Returns how many of its processes could not be ended."""
        if self.ended is None:
            signal_group(self.root, signal.SIGTERM)  # at once, before anybody can fork
        deadline, asked = time.monotonic() + self.grace, {self.root}
        left = self.left()
        while left and time.monotonic() < deadline:
            send([process for process in left if process.pid not in asked], signal.SIGTERM)
            asked.update(process.pid for process in left)
            time.sleep(0.02)
            left = self.left()
        deadline = time.monotonic() + KILL_SECONDS
        while left and time.monotonic() < deadline:
            if self.ended is None:
                signal_group(self.root, signal.SIGKILL)
            send(left, signal.SIGKILL)
            time.sleep(0.01)
            left = self.left()
        self.reap()
        return len(left)

    def left(self) -> "list[psutil.Process]":
        self.reap()
        return [] if LINUX and self.alone else members(self.root, self.marker)


def _prctl(option: int, value: int) -> None:
    if LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.path.append(sys.argv[4])  # isolated Python does not look into the user's own packages
    _Supervisor(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[5:]).run()
