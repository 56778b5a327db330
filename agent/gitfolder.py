"""Git's folder of a worktree, read so that nothing an agent wrote there can run or mislead: objects by plumbing, verified."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from agent.errors import NightError
from agent.filetree import TreeEntry, object_id, read_plain
from agent.gitcommand import git_bytes

# Keys of the config that can run a program, redirect a path, or pull in another file. The rest (branch.*, remote.*.fetch)
# changes with the user's own work, which goes on during a night.
_EXECUTING = (
    "alias.", "core.attributesfile", "core.editor", "core.excludesfile", "core.fsmonitor", "core.gitproxy", "core.hookspath",
    "core.pager", "core.sshcommand", "core.worktree", "credential.", "diff.", "difftool.", "extensions.", "filter.", "gpg.",
    "include.", "includeif.", "merge.", "mergetool.", "pager.", "protocol.", "sequence.", "submodule.", "trailer.",
    "uploadpack.", "url.",
)  # fmt: skip
_NIGHTS_REFS = ("refs/autoresearch/", "refs/heads/autoresearch/", "refs/replace/")  # a replacement makes git lie about a commit


class GuardError(NightError):
    """The worktree cannot be checked or put back: git's folder or its objects are damaged."""


def git(admin: Path, *args: str) -> bytes:
    return git_bytes(admin, "--no-replace-objects", f"--git-dir={admin}", *args)


def admin_of(worktree: Path) -> tuple[Path, bytes]:
    """Git's folder of a worktree, and the content of the file that points there. GuardError if that is not what it should be."""
    pointer = worktree / ".git"
    try:
        content = read_plain(pointer)
    except OSError as error:
        raise GuardError(f"expected {pointer} to be the file that links a worktree to git: {error.strerror}") from None
    admin = worktree / os.fsdecode(content.removeprefix(b"gitdir: ").rstrip(b"\n"))
    if not content.startswith(b"gitdir: ") or not (admin / "commondir").is_file():
        raise GuardError(f"expected {pointer} to name git's folder of this worktree, found {content[:200]!r}")
    return admin, content


def algorithm_of(admin: Path) -> str:
    """sha1 or sha256."""
    return git(admin, "rev-parse", "--show-object-format").decode().strip()


def tree(admin: Path, commit: str) -> dict[str, TreeEntry]:
    """All files of a commit by path. GuardError if there is no such commit."""
    try:
        listing = git(admin, "ls-tree", "-r", "-l", "-z", "--full-tree", commit)
    except NightError as error:
        raise GuardError(f"expected {commit} to be a commit: {error}") from None
    entries = {}
    for line in listing.split(b"\0")[:-1]:
        facts, _, path = line.partition(b"\t")
        mode, _, oid, size = facts.decode().split()
        entries[os.fsdecode(path)] = TreeEntry(mode, int(size) if size.isdigit() else 0, oid)
    return entries


def blob(admin: Path, oid: str, algorithm: str) -> bytes:
    """An object's content, verified. GuardError if it is gone or not what its name says."""
    try:
        content = git(admin, "cat-file", "blob", oid)
    except NightError as error:
        raise GuardError(f"git's object {oid} cannot be read: {error}; run: git fsck") from None
    if object_id(content, algorithm) != oid:
        raise GuardError(f"git's object {oid} holds something else than its name says; run: git fsck")
    return content


def state_of(admin: Path) -> dict[str, str]:
    """What an agent must leave as it is: hooks, what can execute in the config, attributes, HEAD, the night's refs.

    Name (".git/...") -> value or digest.
    """
    common = (admin / os.fsdecode(read_plain(admin / "commondir").strip())).resolve()
    state = {}
    files = [*common.glob("hooks/*"), *(common / name for name in ("info/attributes", "info/grafts", "objects/info/alternates"))]
    files += [admin.resolve() / name for name in ("HEAD", "commondir", "gitdir", "config.worktree", "info/attributes")]
    for file in files:
        with contextlib.suppress(OSError):
            status = os.stat(file)  # of the target: a hook may be a link to a script
            content = file.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            state[f".git/{file.relative_to(common)}"] = f"{status.st_mode:o} {hashlib.sha256(content).hexdigest()}"
    listing = git(admin, "config", "--file", str(common / "config"), "--no-includes", "--list", "-z")
    for setting in listing.decode("utf-8", "replace").split("\0")[:-1]:
        key, _, value = setting.partition("\n")
        if key.startswith(_EXECUTING) or (key.startswith("remote.") and not key.endswith((".fetch", ".url"))):
            state[f".git/config {key}"] = state.get(f".git/config {key}", "") + value + "\n"
    refs = git(admin, "for-each-ref", "--format=%(refname) %(objectname)", *_NIGHTS_REFS)
    for line in refs.decode("utf-8", "replace").splitlines():
        name, _, value = line.partition(" ")
        state[f".git/{name}"] = value
    return state
