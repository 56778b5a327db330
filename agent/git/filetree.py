"""The files of a commit in a folder, read and written without git: no link is followed, no filter runs, nothing is executed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agent.files import remove, unlock

LINK, MODULE, OTHER = "120000", "160000", "other"  # modes: symbolic link, submodule; pipe, socket, device or folder
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TreeEntry:
    """`mode` in git's octal words, `size` in bytes, `oid` the object id of the content."""

    mode: str
    size: int
    oid: str


def mode_of(status: os.stat_result) -> str:
    """The mode that git would give a file: its octal words for a plain file and a link, OTHER for anything else."""
    if stat.S_ISLNK(status.st_mode):
        return LINK
    if not stat.S_ISREG(status.st_mode):
        return OTHER
    return "100755" if status.st_mode & 0o100 else "100644"


def holds(file: Path, status: os.stat_result, entry: TreeEntry, algorithm: str) -> bool:
    """Whether a file or link has the content of an entry. A file of another size is not read, however large."""
    if mode_of(status) == LINK:
        return entry.mode == LINK and object_id(os.fsencode(os.readlink(file)), algorithm) == entry.oid
    return stat.S_ISREG(status.st_mode) and status.st_size == entry.size and _file_id(file, entry.size, algorithm) == entry.oid


def object_id(content: bytes, algorithm: str) -> str:
    """The name git gives a blob. `algorithm` is the repository's: sha1 or sha256."""
    return hashlib.new(algorithm, b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _file_id(file: Path, size: int, algorithm: str) -> str:
    """The name git would give a plain file's first `size` bytes."""
    digest, left = hashlib.new(algorithm, b"blob %d\0" % size, usedforsecurity=False), size
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        while left and (chunk := stream.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder that one of these files is in, the top ("") left out."""
    return {str(parent) for path in paths for parent in PurePosixPath(path).parents} - {"."}


def walk(root: Path, enter: Collection[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below `root`, and every folder that is not in `enter` and so is not looked into, with paths relative to `root`.

    A caller may remove what it is given.
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
            if stat.S_ISDIR(status.st_mode) and path in enter:
                stack.append(path)
            else:
                yield path, status


def restore(root: Path, expected: Mapping[str, TreeEntry], algorithm: str, content: Callable[[TreeEntry], bytes]) -> None:
    """Have a folder hold the files of a commit, byte for byte, and nothing else: whatever else is there is removed.

    Nothing outside the folder is written: links are removed, not followed. `content` reads an entry's object.
    """
    if root.is_symlink() or not root.is_dir():
        remove(root)
        root.mkdir(parents=True)
    absent = dict(expected)
    modules = {path for path, entry in expected.items() if entry.mode == MODULE}
    for path, status in walk(root, folders_of(expected) | modules):
        file, entry = root / path, expected.get(path)
        single = status.st_nlink == 1 or stat.S_ISLNK(status.st_mode)  # a hard link would write through to another file
        if entry is None or not single or not holds(file, status, entry, algorithm):
            remove(file)
            continue
        absent.pop(path)
        if entry.mode != LINK:
            _set_permissions(file, entry.mode)
    for path, entry in absent.items():
        if entry.mode == MODULE:
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            _write_plain(root / path, entry, content(entry))


def _write_plain(file: Path, entry: TreeEntry, content: bytes) -> None:
    """Create a file or link as a commit has it. FileExistsError if something is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if entry.mode == LINK:
        os.symlink(os.fsdecode(content), file)
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(file, flags, 0o777 if entry.mode == "100755" else 0o666), "wb") as stream:
        stream.write(content)


def _set_permissions(file: Path, mode: str) -> None:
    """The permissions that git would have created the file with."""
    mask = os.umask(0o022)
    os.umask(mask)
    os.chmod(file, (0o777 if mode == "100755" else 0o666) & ~mask)
