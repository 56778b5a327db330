"""The journal: append-only JSON lines, the only state of a night.

A line is one event: `{"v": 1, "seq": 7, "t": 1732.5, "event": "verdict", ..., "sum": "16 hex digits"}`. `seq` counts from 0
without gaps, `t` is Unix time in seconds, `sum` is the start of the SHA-256 of the line without it. An append returns
only when the line is on the disk, so whatever the driver undoes or starts afterwards can be reconstructed.

A torn last line (power loss in the middle of an append) never took effect: it is set aside in `journal.torn-N`.
A bad line anywhere else means that somebody edited the file or the disk is failing: refused, nothing is guessed.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent.errors import JournalError, LockedError, UsageError
from agent.files import read_plain, write_anew

SCHEMA = 1
RESERVE_BYTES = 64 << 10  # given up for the last lines of a night whose disk is full
_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # a lock that another process holds; anything else: no lock can be had
Event = dict[str, Any]


def encode(event: Event) -> bytes:
    """One line, newline included. NaN has no place in a journal: ValueError."""
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
    """All events of a journal and the bytes of a torn last line (empty if whole). Changes nothing on disk.

    JournalError if a line before the last is bad.
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
        self.restored = 0  # how often the journal was written anew, because it had gone from its place
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
        """Write one event and return it once it is on the disk. JournalError if it cannot be written, ValueError for NaN."""
        self.follow()
        full: Event = {"v": SCHEMA, "seq": len(self.events), "t": round(time.time(), 3), "event": event, **fields}
        line = encode(full)
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
        """Have journal and lock under their names again, where somebody removed, moved or replaced them; whether that was so.

        LockedError if another driver works there meanwhile.
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
            self.restored += 1
        os.close(self._file)
        self._file = self._opened()
        self._keep_reserve()
        return True

    def _opened(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def _write(self, line: bytes) -> str:
        """Put a line on the disk as a whole, or not at all; "" or what went wrong."""
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
        """Occupy some of the disk, so that the end of a night that fills it can still be written down."""
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
        with contextlib.suppress(ValueError):
            return int(os.pread(lock, 32, 0).split()[0])
        return 0
    finally:
        os.close(lock)
    return None


def _is_open(path: Path, descriptor: int) -> bool:
    """Whether a path leads to an open file, and not to nothing or to another one."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def _take_lock(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for wait in _patience():  # `--status` holds the lock for an instant to see whether anybody does
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


def _patience() -> Iterator[float]:
    yield from (0.05, 0.1, 0.2)


def _make_durable_folder(folder: Path) -> None:
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    ignored = folder / ".gitignore"
    if not ignored.exists():
        write_anew(ignored, b"*\n")  # whatever the user ignores, a night is no part of their repository
    for made in missing:
        _sync_folder(made.parent)


def _sync(descriptor: int) -> None:
    """Have a file on the disk itself: on macOS fsync leaves it in the disk's own cache, which power loss empties."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):  # a file system that knows no such order
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
