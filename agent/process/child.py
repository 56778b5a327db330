"""The one spawner: it starts, watches, limits and ends every child of the driver.

A child runs under `agent/process/supervise.py`. The supervisor ends the child's whole family (the child and its descendants)
when the child exits, when this module asks for it, or when the driver dies. Limits: wall clock, silence, output, memory, bytes
in directories.
"""

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.files import directory_bytes
from agent.process import supervise
from agent.process.environment import clean_env, wsl
from agent.process.leftovers import Record, descendants, end_processes
from agent.process.output import BoundedLog
from agent.text import safe_tail, secrets_in

TICK_SECONDS = 0.2  # how often `stop` and `watch` are asked
SAMPLE_SECONDS = 0.5  # how often memory and directories are measured
GRACE_SECONDS = 1.0  # between TERM and KILL
_CHUNK = 256 * 1024
_BESIDE_SECONDS = 30 * 86400.0  # wall-clock limit of a command that `beside` runs
_JOIN_SECONDS = 15.0
FLOOD = 100  # a child that prints more than this many times `log_bytes` is ended


@dataclass(frozen=True)
class Bounds:
    """What a child may use. None means no limit."""

    wall_seconds: float
    idle_seconds: float | None = None  # without a byte of output
    log_bytes: int = 4 << 20  # of each output file; more is dropped from its middle, FLOOD times more ends the child
    memory_bytes: int | None = None  # summed over the family; a page shared by two processes counts twice
    directories: tuple[Path, ...] = ()
    directory_bytes: int | None = None  # of all `directories` together; a directory too deep or too full to count is over the limit
    spare_bytes: int = 0  # must stay free on their disk, because files without a name or in a locked folder cannot be counted


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    `reason` is `exited`, or why the driver ended the child: `wall`, `idle`, `log`, `memory`, `disk`, `stopped`, or the word that
    `watch` returned. `missing` means that the child could not be started; the log says why.
    """

    exit_code: int | None  # None if a signal ended the child, or it never ran
    signal: int | None
    reason: str
    seconds: float  # by the monotonic clock, which stops while the machine sleeps
    peak_rss_mb: float  # largest sampled memory of the family: resident, on macOS including Metal's buffers
    log: Path
    suspended_seconds: float  # how long the machine slept meanwhile

    @property
    def ok(self) -> bool:
        return self.reason == "exited" and self.exit_code == 0

    def tail(self, max_chars: int = 2000) -> str:
        """The end of the log as safe text: no control characters, no secrets."""
        return safe_tail(self.log, max_chars)


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    bounds: Bounds,
    stdin: str | None = None,
    stdout_to: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    watch: Callable[[], str | None] = lambda: None,
    pidfile: Path | None = None,
    grace: float = GRACE_SECONDS,
) -> Outcome:
    """Run a command until it exits or reaches a limit. No process of its family is alive when this returns.

    `env` is the child's whole environment (`clean_env`). Standard output and error go to `log`; if `stdout_to` is given, the output
    goes to that file and only the errors to `log`. `stop` and `watch` are called several times a second. `pidfile` is the record
    by which `end_leftovers` finds the child after the driver was killed. Raises OSError if the files cannot be written, and
    whatever `stop` or `watch` raise, after ending the child.
    """
    return _Child([str(word) for word in argv], cwd, dict(env), log, bounds, stdin, stdout_to, pidfile, grace).follow(stop, watch)


def said_by(argv: Sequence[str | Path], cwd: Path | None = None, seconds: float = 60.0) -> tuple[int | None, str]:
    """Exit code of a short command and what it said: its output, or what it complained of. None: it was ended or is not there.

    cwd: by default a folder of its own. seconds: the first import of a framework after an installation is slow."""
    with tempfile.TemporaryDirectory() as name:
        out, log = Path(name) / "out", Path(name) / "log"
        outcome = run(argv, cwd=cwd or Path(name), env=clean_env(), log=log, stdout_to=out, bounds=Bounds(seconds))
        return outcome.exit_code, (safe_tail(out, 100_000).strip() or outcome.tail(1000).strip())


@contextlib.contextmanager
def beside(
    argv: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str], log: Path, watch: Callable[[], str | None] = lambda: None,
    ended: Callable[[Outcome], None] = lambda outcome: None, pidfile: Path | None = None,
) -> Iterator[None]:  # fmt: skip
    """Run a command while the block runs, and end the command with the block.

    A command that cannot be started, or that exits early, does not disturb the block: another thread calls `ended`. The same
    thread calls `watch` several times a second.
    """
    over = threading.Event()

    def follow() -> None:
        bounds = Bounds(wall_seconds=_BESIDE_SECONDS)
        with contextlib.suppress(OSError):  # its log cannot be written
            outcome = run(argv, cwd=cwd, env=env, log=log, bounds=bounds, stop=over.is_set, watch=watch, pidfile=pidfile)
            if not over.is_set():
                ended(outcome)

    keeper = threading.Thread(target=follow, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join(_JOIN_SECONDS)


class _Child:
    def __init__(
        self, argv: list[str], cwd: Path, env: dict[str, str], log: Path, bounds: Bounds, stdin: str | None,
        stdout_to: Path | None, pidfile: Path | None, grace: float,
    ) -> None:  # fmt: skip
        self.argv, self.cwd, self.env, self.stdin, self.bounds, self.grace = argv, cwd, env, stdin, bounds, grace
        secrets = {**secrets_in(os.environ), **secrets_in(env)}
        self.log_path = log
        self.log = BoundedLog(log, bounds.log_bytes, secrets)
        self.out = self.log if stdout_to is None else BoundedLog(stdout_to, bounds.log_bytes, secrets)
        self.marker = self.env[supervise.MARKER] = uuid.uuid4().hex
        self.record = Record(pidfile, self.marker)
        self.reason: str | None = None
        self.unwritten: OSError | None = None  # why its output cannot be written
        self.root: int | None = None  # pid of the command, which the supervisor reports
        self.supervised = True  # until the supervisor exits
        self.status = b""  # JSON lines from the supervisor
        self.peak_mb = 0.0
        self.started = self.heard = time.monotonic()
        self.asleep = seconds_asleep()

    def follow(self, stop: Callable[[], bool], watch: Callable[[], str | None]) -> Outcome:
        with contextlib.ExitStack() as files:
            for finish in (self.record.clear, self.out.close, self.log.close):
                files.callback(finish)
            problem = self._problem()
            if problem:
                return self._missing(problem)
            with contextlib.ExitStack() as self.open:
                self._spawn()
                try:
                    self._loop(stop, watch)
                finally:
                    self._end()
                if self.unwritten:
                    raise self.unwritten
                return self._outcome()

    def _problem(self) -> str | None:
        if not self.cwd.is_dir():
            return f"the working directory {self.cwd} does not exist"
        program = str(self.cwd / self.argv[0]) if os.sep in self.argv[0] else self.argv[0]
        if shutil.which(program, path=self.env.get("PATH", os.defpath)) is None:
            where = "an executable file" if os.sep in program else "a program on PATH"
            return f"expected {self.argv[0]!r} to be {where}, found none; install it, or give its full path"
        return None

    def _missing(self, problem: str) -> Outcome:
        self.log.write(f"cannot start {self.argv[0]}: {problem}\n".encode("utf-8", "replace"))
        return Outcome(None, None, "missing", 0.0, 0.0, self.log_path, 0.0)

    def _spawn(self) -> None:
        self.selector = self.open.enter_context(selectors.DefaultSelector())
        self.control = self.open.enter_context(contextlib.ExitStack())  # closing it tells the supervisor to end the family
        self.record.write()  # before the child exists: the marker is enough to find it
        with contextlib.ExitStack() as theirs:
            status, status_theirs = os.pipe()
            theirs.callback(os.close, status_theirs)
            self.open.callback(os.close, status)
            control_theirs, control = os.pipe()
            theirs.callback(os.close, control_theirs)
            self.control.callback(os.close, control)
            source = subprocess.DEVNULL
            if self.stdin is not None:  # a file, not a pipe: a child that does not read cannot block the driver
                file = theirs.enter_context(tempfile.TemporaryFile())
                file.write(self.stdin.encode("utf-8", "replace"))
                file.seek(0)
                source = file.fileno()
            words = (status_theirs, control_theirs, self.grace, Path(psutil.__file__).parent.parent)
            command = [sys.executable, "-I", supervise.__file__, *map(str, words)]
            # Ctrl-C would kill the new process until it is in its own session: blocked, the signal waits for the supervisor
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, supervise.FROM_TERMINAL)
            theirs.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            self.process = subprocess.Popen(
                [*command, *self.argv], cwd=self.cwd, env=self.env, stdin=source, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if self.out is self.log else subprocess.PIPE,
                pass_fds=(status_theirs, control_theirs), start_new_session=True, bufsize=0,
            )  # fmt: skip
        self.started = self.heard = time.monotonic()
        self.asleep = seconds_asleep()
        self.family = psutil.Process(self.process.pid)
        self._write_record(self.process.pid)
        self._follow_pipe(status, None)
        for pipe, sink in [(self.process.stdout, self.out), (self.process.stderr, self.log)]:
            if pipe is not None:
                self.open.callback(pipe.close)
                self._follow_pipe(pipe.fileno(), sink)

    def _write_record(self, *pids: int) -> None:
        """Add processes to the record. On a full disk it stays as it was: it has the marker, by which the family is found, too."""
        with contextlib.suppress(OSError):
            self.record.write(*pids)

    def _follow_pipe(self, descriptor: int, sink: BoundedLog | None) -> None:
        os.set_blocking(descriptor, False)
        self.selector.register(descriptor, selectors.EVENT_READ, sink)

    def _loop(self, stop: Callable[[], bool], watch: Callable[[], str | None]) -> None:
        next_tick = next_sample = 0.0
        while self._read(TICK_SECONDS) and self.reason is None and self.unwritten is None:
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK_SECONDS
                self.reason = self._over_limit(now) or ("stopped" if stop() else watch())
            if now >= next_sample and self.reason is None:
                self.reason = self._sample()
                taken = time.monotonic() - now  # counting many files takes long: leave nine tenths of the time to the child
                next_sample = now + max(SAMPLE_SECONDS, 10 * taken)

    def _read(self, timeout: float) -> bool:
        """Read what is in the pipes. Returns whether the supervisor is still alive. Output that cannot be written is left out."""
        for key, _ in self.selector.select(timeout):
            sink: BoundedLog | None = key.data
            try:
                chunk = os.read(key.fd, _CHUNK)
            except BlockingIOError:
                continue
            if not chunk:
                self.selector.unregister(key.fd)
                self.supervised = self.supervised and sink is not None
            elif sink is None:
                self.status = (self.status + chunk)[-_CHUNK:]
                if self.root is None and isinstance(pid := self._told("pid"), int):
                    self.root = pid
                    self._write_record(self.process.pid, pid)
            else:
                self.heard = time.monotonic()
                try:
                    sink.write(chunk)
                except OSError as error:  # a full disk: the family is ended first
                    self.unwritten = error
        return self.supervised

    def _told(self, name: str) -> object:
        """A fact that the supervisor reported, None if it did not. A child can write to this pipe too, so every line is checked."""
        told = None
        for line in self.status.split(b"\n")[:-1]:
            with contextlib.suppress(ValueError, RecursionError):
                facts = json.loads(line)
                told = facts.get(name, told) if isinstance(facts, dict) else told
        return told

    def _over_limit(self, now: float) -> str | None:
        bounds = self.bounds
        if now - self.started > bounds.wall_seconds:
            return "wall"
        if bounds.idle_seconds is not None and now - self.heard > bounds.idle_seconds:
            return "idle"
        if max(self.log.received, self.out.received) > FLOOD * bounds.log_bytes:
            return "log"
        return None

    def _sample(self) -> str | None:
        bounds = self.bounds
        resident = sum(memory_bytes(process) for process in descendants(self.family))
        self.peak_mb = max(self.peak_mb, resident / 2**20)
        if bounds.memory_bytes is not None and resident > bounds.memory_bytes:
            return "memory"
        if bounds.directory_bytes is not None and sum(map(directory_bytes, bounds.directories)) > bounds.directory_bytes:
            return "disk"
        with contextlib.suppress(OSError):  # none of them is there any more
            there = next((folder for folder in bounds.directories if folder.is_dir()), None)
            if there and shutil.disk_usage(there).free < bounds.spare_bytes:
                return "disk"
        return None

    def _end(self) -> None:
        """End the family if it has not ended by itself, and read the rest of its output."""
        self.control.close()
        deadline = time.monotonic() + self.grace + supervise.KILL_SECONDS + 2.0
        while self.supervised and time.monotonic() < deadline:
            self._read(TICK_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TICK_SECONDS)
        # The child may have killed or stopped its supervisor, and written false reports in its place
        if self.process.returncode != 0 or self._told("left") != 0:
            end_processes([*descendants(self.family), self.family], self.marker)
        self.process.wait()
        deadline = time.monotonic() + 1.0
        while len(self.selector.get_map()) and time.monotonic() < deadline:  # an escaped member may hold a pipe open
            if not self.selector.select(0):
                break
            self._read(0)

    def _outcome(self) -> Outcome:
        seconds, slept = time.monotonic() - self.started, seconds_asleep() - self.asleep
        problem, code, peak_kb = self._told("missing"), self._told("exit"), self._told("peak_kb")
        if problem is not None:
            return self._missing(str(problem))
        status = -int(signal.SIGKILL)  # unless the supervisor ended properly and reported an exit code
        if self.process.returncode == 0 and isinstance(code, int) and -signal.NSIG < code < 256:
            status = code
        if os.path.basename(self.argv[0]) == "bwrap" and 128 < status < 128 + signal.NSIG:
            status = 128 - status  # the sandbox reports a signal of its child as a shell does
        return Outcome(
            exit_code=status if status >= 0 else None,
            signal=-status if status < 0 else None,
            reason=self.reason or "exited",
            seconds=seconds,
            peak_rss_mb=max(self.peak_mb, peak_kb / 1024 if isinstance(peak_kb, float) else 0.0),
            log=self.log_path,
            suspended_seconds=round(max(0.0, slept), 1),
        )


def signal_name(number: int) -> str:
    """`SIGSEGV`; `signal 40` for one without a name, as most real-time signals of Linux are."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def seconds_asleep() -> float:
    """Seconds that the machine has been suspended, from an arbitrary start: only the difference of two calls is meaningful."""
    if sys.platform == "linux" and not wsl():  # Windows suspends the whole virtual machine, whose own clocks do not notice
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    if sys.platform == "darwin":
        return time.clock_gettime(time.CLOCK_MONOTONIC_RAW) - time.clock_gettime(time.CLOCK_UPTIME_RAW)  # one counter: no drift
    return time.time() - time.monotonic()  # also moves when the clock is set


def memory_bytes(process: psutil.Process) -> int:
    """Resident memory; on macOS the footprint if that is larger; 0 if the process is gone."""
    try:
        resident = int(process.memory_info().rss)
    except psutil.Error:
        return 0
    if sys.platform == "darwin":  # Metal's buffers are in the footprint, which Activity Monitor shows, and mostly not resident
        usage = (ctypes.c_uint64 * 64)()  # rusage_info_v0: a UUID of 16 bytes, then counters; the eighth is ri_phys_footprint
        ask = getattr(ctypes.CDLL(None), "proc_pid_rusage", None)
        if ask is not None and ask(process.pid, 0, usage) == 0:
            return max(resident, int(usage[9]))
    return resident
