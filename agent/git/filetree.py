"""Files as git sees them, read and written without git: no link is followed, nothing is executed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.process.child import Bounds, run
from agent.process.environment import clean_env

LINK, MODULE, OTHER = "120000", "160000", "other"  # modes: symbolic link, submodule; pipe, socket, device or folder
CACHE = "__pycache__"


@dataclass(frozen=True)
class TreeEntry:
    """`mode` in git's octal words, `size` in bytes, `oid` the object id of the content."""

    mode: str
    size: int
    oid: str


def mode_of(status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return LINK
    if not stat.S_ISREG(status.st_mode):
        return OTHER
    return "100755" if status.st_mode & 0o100 else "100644"


def entry_of(file: Path, status: os.stat_result, algorithm: str) -> TreeEntry:
    """The entry git would make of a file or link. `algorithm` is the repository's: sha1 or sha256."""
    mode = mode_of(status)
    content = os.fsencode(os.readlink(file)) if mode == LINK else read_plain(file) if mode != OTHER else b""
    return TreeEntry(mode, len(content), object_id(content, algorithm))


def object_id(content: bytes, algorithm: str) -> str:
    """The name git gives a blob."""
    return hashlib.new(algorithm, b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read_plain(file: Path) -> bytes:
    """A plain file's content. OSError for a link; a pipe does not block."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:
        return stream.read()


def walk(root: Path, enter: Collection[str] | None = None, everything: bool = False) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below `root`, and every folder that is not in `enter` (None: enter all) and so is not looked into.

    Git's own `.git` is left out; so are caches of bytecode and folders without a file, unless `everything` is asked for.
    Paths are relative. A caller may remove what it is given.
    """
    stack = [""]
    while stack:
        folder = stack.pop()
        unlock(root / folder)
        with os.scandir(root / folder) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(root / path)
            if path == ".git":
                continue
            if not stat.S_ISDIR(status.st_mode):
                yield path, status
            elif name == CACHE and not everything:
                continue
            elif enter is None or path in enter:
                stack.append(path)
            elif everything or _has_files(root / path):
                yield path, status


def _has_files(folder: Path) -> bool:
    problems: list[OSError] = []  # what cannot be read, or lies too deep, counts
    try:
        return any(names or ".git" in dirs for _, dirs, names in os.walk(folder, onerror=problems.append)) or bool(problems)
    except RecursionError:
        return True


def unlock(folder: Path) -> None:
    """Make a folder readable and writable again, if its owner may."""
    status = os.lstat(folder)
    if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o700 != 0o700:
        with contextlib.suppress(OSError):
            os.chmod(folder, status.st_mode | 0o700)


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder with all that is in it, however locked or deep. OSError if it stays."""
    try:
        _remove(path)
    except (OSError, RecursionError):  # deeper than a path may be long: leave it to the system's own tools
        where, log = path.parent, Path(os.devnull)
        for command in (["chmod", "-R", "u+rwx"], ["chflags", "-R", "nouchg"], ["rm", "-rf"]):
            if command[0] != "chflags" or sys.platform == "darwin":
                run([*command, "--", path], cwd=where, env=clean_env(), log=log, bounds=Bounds(wall_seconds=600))
        if os.path.lexists(path):
            raise


def _remove(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    unlock(path)
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        _remove(path / name)
    path.rmdir()


def write_plain(file: Path, entry: TreeEntry, content: bytes) -> None:
    """Create a file or link as a commit has it. FileExistsError if something is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if entry.mode == LINK:
        os.symlink(os.fsdecode(content), file)
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(file, flags, 0o777 if entry.mode == "100755" else 0o666), "wb") as stream:
        stream.write(content)


def set_permissions(file: Path, mode: str) -> None:
    """What git would have created it with."""
    mask = os.umask(0o022)
    os.umask(mask)
    os.chmod(file, (0o777 if mode == "100755" else 0o666) & ~mask)
