"""The journal: append-only JSON lines, the only state of a night.

A line is one event: `{"v": 1, "seq": 7, "t": 1732.5, "event": "verdict", ..., "sum": "16 hex digits"}`. `seq` counts from 0
without gaps, `t` is Unix time in seconds, `sum` is the start of the SHA-256 of the line without `sum`. An append returns only when
the line is on the disk, so that whatever the driver undoes or starts afterwards can be reconstructed.

A torn last line (power loss in the middle of an append) never took effect: it is moved to `journal.torn-N`. A bad line anywhere
else means that somebody edited the file or that the disk is failing: the journal is refused.

A night's folder may be moved or removed while a driver works in it (`git clean -fdx`, `mv runs` to another disk). The driver has
all events in memory, so it writes the journal anew under its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from agent.errors import JournalError, LockedError, UsageError
from agent.files import read_plain, write_anew
from agent.journal.state import fold

SCHEMA = 1
RESERVE_BYTES = 64 << 10  # disk space that is kept occupied, and freed for the last lines of a night whose disk is full
_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # another process holds the lock; any other error: this disk cannot lock files
Event = dict[str, Any]


def encode(event: Event) -> bytes:
    """The line of an event, with its newline. ValueError for NaN, which JSON does not have."""
    body = json.dumps(event, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return f'{body[:-1]},"sum":"{_digest(body)}"}}\n'.encode()


def decode(line: bytes, seq: int) -> Event:
    """The event of a line that ends in a newline; ValueError says what is wrong with it."""
    text = line.decode("ascii")
    if not text.endswith('"}\n') or len(text) < 30:
        raise ValueError("the line is incomplete")
    body, given = text[:-27] + "}", text[-19:-3]
    if text[-27:-19] != ',"sum":"' or _digest(body) != given:
        raise ValueError(f"checksum: expected {_digest(body)}, found {given}")
    event = json.loads(body)
    if event.get("v") != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA}, found {event.get('v')}")
    if event.get("seq") != seq:
        raise ValueError(f"sequence: expected {seq}, found {event.get('seq')}")
    return dict(event)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def read_events(path: Path) -> tuple[list[Event], bytes]:
    """All events of a journal, and the bytes of a torn last line (b"" if it is complete). Changes nothing on disk.

    Raises JournalError if a line before the last is bad.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], b""
    events: list[Event] = []
    *whole, last = data.split(b"\n")
    lines = [line + b"\n" for line in whole] + [last] * bool(last)
    for number, line in enumerate(lines):
        try:
            events.append(decode(line, number))
        except ValueError as error:
            if number == len(lines) - 1:
                return events, line
            raise JournalError(
                f"{path}: line {number + 1} of {len(lines)} is damaged ({error}). Only a last line can be torn by a crash; "
                "restore the file from a backup, or start a new night with --tag"
            ) from None
    return events, b""


class Journal:
    """The one writer of a night's journal. Opening takes the lock; a second driver gets LockedError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.jsonl"
        _make_durable_folder(folder)
        self._lock = _take_lock(folder / "lock")
        self.torn: Path | None = None
        self.events, rest = read_events(self.path)
        if rest:
            self.torn = self._set_aside(rest)
        fresh = not self.path.exists()
        self._file = self._opened()
        if fresh:
            _sync_folder(folder)
        self._keep_reserve()
        if self.torn:
            self.append("note", text=f"a torn last line of {len(rest)} bytes was set aside in {self.torn.name}")

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event and return it once it is on the disk. JournalError if it cannot be written, or could not be read again
        because it is out of order; ValueError for NaN."""
        self.follow()
        full: Event = {"v": SCHEMA, "seq": len(self.events), "t": round(time.time(), 3), "event": event, **fields}
        line = encode(full)
        fold([*self.events, full])  # before it is written: one event out of order, and no driver could read the night again
        problem = self._write(line)
        if problem and self._give_up_reserve():
            problem = self._write(line)
        if problem:
            raise JournalError(
                f"{self.path}: expected to write {len(line)} bytes, but {problem}; make room on the disk, then --resume"
            )
        self.events.append(full)
        return full

    def follow(self) -> bool:
        """Restore journal and lock if somebody removed, moved or replaced them. Returns whether that was necessary.

        Raises LockedError if another driver has taken the night meanwhile.
        """
        lock = self.folder / "lock"
        if _is_open(self.path, self._file) and _is_open(lock, self._lock):
            return False
        _make_durable_folder(self.folder)
        if not _is_open(lock, self._lock):
            self._lock, old = _take_lock(lock), self._lock
            os.close(old)
        whole = b"".join(map(encode, self.events))
        try:
            moved = read_plain(self.path, len(whole)) == whole
        except OSError:
            moved = False
        if not moved:
            if os.path.lexists(self.path):
                os.rename(self.path, self.folder / f"journal.replaced-{int(time.time())}")
            write_anew(self.path, whole, durable=True)
            _sync_folder(self.folder)
        os.close(self._file)
        self._file = self._opened()
        self._keep_reserve()
        return True

    def _opened(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def _write(self, line: bytes) -> str:
        """Write the complete line to disk, or nothing. Returns "" or what went wrong."""
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written == len(line):
                _sync(self._file)
                return ""
            problem = f"{written} bytes were written"
        except OSError as error:
            problem = str(error.strerror)
        os.ftruncate(self._file, size)  # the next line must not follow half of this one
        return problem

    def _keep_reserve(self) -> None:
        """Occupy some disk space, so that the end of the night can be journalled even when the disk is full."""
        reserve = self.folder / ".reserve"
        with contextlib.suppress(OSError):
            if not reserve.exists():
                write_anew(reserve, os.urandom(RESERVE_BYTES), durable=True)  # random: some file systems store no zeros

    def _give_up_reserve(self) -> bool:
        try:
            (self.folder / ".reserve").unlink()
        except OSError:
            return False
        return True

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_aside(self, rest: bytes) -> Path:
        number = 1
        while (aside := self.folder / f"journal.torn-{number}").exists():
            number += 1
        with open(aside, "wb") as file:
            file.write(rest)
            file.flush()
            _sync(file.fileno())
        _sync_folder(self.folder)
        os.truncate(self.path, self.path.stat().st_size - len(rest))
        with open(self.path, "rb+") as file:
            _sync(file.fileno())
        return aside


def holder(folder: Path) -> int | None:
    """The process id of the driver that works on this night, None if nobody does."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return None  # no driver can hold a lock there, so none has begun
        with contextlib.suppress(ValueError, IndexError):  # a driver that has just taken it has not written its number yet
            return int(os.pread(lock, 32, 0).split()[0])
        return 0
    finally:
        os.close(lock)
    return None


def _is_open(path: Path, descriptor: int) -> bool:
    """Whether the file at this path is the one that is open as `descriptor`."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def _take_lock(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for wait in (0.05, 0.1, 0.2):  # seconds; `--status` holds the lock for an instant to see whether a driver does
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _HELD:
                os.close(lock)
                raise UsageError(
                    f"the disk of {path.parent} cannot lock files ({error.strerror}), so two drivers could spoil one night; have "
                    "runs/ on a disk of this machine: ln -s /path/to/a/folder runs"
                ) from None
            time.sleep(wait)
    else:
        pid = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise LockedError(
            f"process {pid} already works on the night {path.parent.name}; watch it with --status, end it with --stop, "
            "or choose another --tag"
        )
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _make_durable_folder(folder: Path) -> None:
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    ignored = folder / ".gitignore"
    if not ignored.exists():
        write_anew(ignored, b"*\n")  # a night is no part of the user's repository, whatever their own .gitignore says
    for made in missing:
        _sync_folder(made.parent)


def _sync(descriptor: int) -> None:
    """Flush a file to the disk itself. On macOS, fsync leaves it in the disk's cache, which is lost with the power."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):  # not every file system knows F_FULLFSYNC
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """A file's name survives power loss only once its folder has been synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _sync(handle)
    finally:
        os.close(handle)
