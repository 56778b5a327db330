"""Files that somebody else wrote: opened, measured and removed within bounds on their kind, size, depth and number."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import time
import uuid
from pathlib import Path

GIB = 1 << 30
DEEPEST = 64  # nested folders; no training and no coding agent needs more
MOST_ENTRIES = 200_000  # files and folders below one directory
BOUNDLESS = 1 << 62  # bytes: the answer for a directory that is deeper or holds more entries, above every limit
REMOVE_SECONDS = 600.0


def real_path(path: Path | str) -> str:
    """A path as the kernel has it: links followed and, on macOS, upper and lower case and accents as they are on the disk. There
    a sandbox compares a path as it is spelled, while files are found under any spelling."""
    real = os.path.realpath(path)
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
            finally:
                os.close(descriptor)
    return real


def read_plain(file: Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes. OSError for a link, pipe, device or folder, or a larger file."""
    content = read_part(file, 0, limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"expected at most {limit} bytes", str(file))
    return content


def read_part(file: Path, offset: int, limit: int) -> bytes:
    """At most `limit` bytes of a plain file from `offset` on, counted from the end if negative. OSError as `read_plain`.

    A pipe or device is never opened: that could block for ever, or do something.
    """
    if not stat.S_ISREG(os.lstat(file).st_mode):
        raise OSError(errno.EINVAL, "expected a plain file", str(file))
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):  # exchanged since
            raise OSError(errno.EINVAL, "expected a plain file", str(file))
        stream.seek(offset if offset >= 0 else max(0, status.st_size + offset))
        return stream.read(limit)


def write_anew(file: Path, content: bytes, durable: bool = False) -> None:
    """Replace a file as a whole, so that a reader never sees half of it, whatever stands under its name or its draft's.

    With `durable` its content is on the disk before it gets its name.
    """
    draft = file.with_name(f".{file.name}.new")
    remove(draft)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as stream:
        stream.write(content)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())
    if file.is_dir() and not file.is_symlink():
        remove(file)
    os.replace(draft, file)


def directory_bytes(directory: Path) -> int:
    """Bytes that the files below a directory take on the disk; BOUNDLESS if it is too deep or holds too many entries to count.

    Links are not followed; files that vanish meanwhile do not count.
    """
    total, seen, folders = 0, 0, [(directory, 0)]
    while folders:
        folder, depth = folders.pop()
        if depth > DEEPEST:
            return BOUNDLESS
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                seen += 1
                if seen > MOST_ENTRIES:
                    return BOUNDLESS
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((Path(entry.path), depth + 1))
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512  # what a sparse file really takes
    return total


def size_in_words(directory: Path) -> str:
    """The size of a directory for people, as far as it can be counted."""
    size = directory_bytes(directory)
    return f"{size / 1e6:,.0f} MB" if size < BOUNDLESS else f"more than {MOST_ENTRIES:,} files or {DEEPEST} nested folders"


def unlock(folder: Path) -> None:
    """Make a folder readable and writable again, if its owner may."""
    status = os.lstat(folder)
    if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o700 != 0o700:
        with contextlib.suppress(OSError):
            os.chmod(folder, status.st_mode | 0o700)


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder with all that is in it, however locked or deep. OSError if it stays.

    A folder inside another is moved up to the top before it is emptied, so that no path grows longer than the system allows.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(status.st_mode):
        _unlink(path)
        return
    deadline, folders = time.monotonic() + REMOVE_SECONDS, [path]
    while folders:
        folder = folders[-1]
        _unfasten(folder)
        inner = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    inner.append(Path(entry.path))
                else:
                    _unlink(Path(entry.path))
                if time.monotonic() > deadline:
                    raise OSError(errno.ETIMEDOUT, f"not removed within {REMOVE_SECONDS:.0f} s", str(path))
        if folder != path:
            folders.pop()
            inner = [_moved(one, path) for one in inner]
            os.rmdir(folder)
        folders += inner
        if folder == path and not inner:
            folders.pop()
    os.rmdir(path)


def _moved(folder: Path, top: Path) -> Path:
    _unfasten(folder)  # a folder that moves is written to: its `..` changes
    there = top / uuid.uuid4().hex
    os.rename(folder, there)
    return there


def _unlink(file: Path) -> None:
    try:
        os.unlink(file)
    except FileNotFoundError:
        pass
    except PermissionError:
        unlock(file.parent)
        _unfasten(file)
        os.unlink(file)


def _unfasten(path: Path) -> None:
    """Take away what keeps the owner from removing a path: permissions of a folder, and on macOS the flag `uchg`."""
    unlock(path)
    if hasattr(os, "lchflags"):
        with contextlib.suppress(OSError):
            os.lchflags(path, 0)
