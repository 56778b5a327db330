"""Only the train file may change: what else an agent did to its worktree is found, named, and undone.

    before = remember(worktree)                                   # just before the agent starts
    violations = check(worktree, commit, train_file, before)
    scrub(worktree, commit, before)                               # every file as in the commit, nothing else

Not covered: what an agent does outside of the worktree and of the parts of git's folder that `state_of` reads, the
user's own branches among it. Agents run with the user's rights.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from agent.errors import NightError
from agent.git import filetree
from agent.git.command import git_bytes
from agent.git.filetree import LINK, MODULE, OTHER, TreeEntry, object_id, read_plain

TRAIN_FILE_BYTES = 1 << 20
MOST_VIOLATIONS = 20  # more say nothing new

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


@dataclass(frozen=True)
class Violation:
    path: str  # relative to the worktree, odd characters escaped; what is in git's folder begins with .git/
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Snapshot:
    """What an agent found when it began."""

    files: dict[str, TreeEntry] = field(repr=False)
    admin: Path  # git's folder of the worktree
    pointer: bytes  # content of the file `.git`
    git: dict[str, str] = field(repr=False)


def remember(worktree: Path) -> Snapshot:
    """Read the worktree and what must stay in its git folder. GuardError if it is no worktree."""
    admin, pointer = admin_of(worktree)
    algorithm = algorithm_of(admin)
    files = {path: filetree.entry_of(worktree / path, status, algorithm) for path, status in filetree.walk(worktree)}
    return Snapshot(files, admin, pointer, state_of(admin))


def check(worktree: Path, base_commit: str, train_file: str, before: Snapshot | None = None) -> list[Violation]:
    """What differs from `before` (without it: from the commit) other than the train file's content; at most 20.

    Writes to git's folder are noticed only with `before`.
    """
    if worktree.is_symlink() or not worktree.is_dir():
        return [Violation(".", "the worktree was removed or replaced; expected a directory")]
    found: list[Violation] = []
    if before is None:
        admin, _ = admin_of(worktree)
        expected = tree(admin, base_commit)
    else:
        admin, expected = before.admin, before.files
        found += _git_violations(worktree, before)
    algorithm = algorithm_of(admin)
    missing = {path for path, entry in expected.items() if entry.mode != MODULE}
    for path, status in filetree.walk(worktree, _folders(expected)):
        missing.discard(path)
        what = _problem(worktree / path, status, expected.get(path), algorithm, path == train_file)
        if what:
            found.append(Violation(_shown(path), what))
            if len(found) == MOST_VIOLATIONS:
                return found
    found += [Violation(_shown(path), "was deleted; only the train file may change") for path in sorted(missing)]
    return found[:MOST_VIOLATIONS]


def scrub(worktree: Path, commit: str, before: Snapshot | None = None) -> None:
    """Put every file back as the commit has it, byte for byte, and remove all others, caches and ignored ones too.

    Nothing outside of the worktree is written: links are removed, not followed. The index is not touched. GuardError if the
    commit cannot be read; with `before`, even a removed `.git` is put back.
    """
    if worktree.is_symlink() or not worktree.is_dir():
        filetree.remove(worktree)
        worktree.mkdir()
    if before is not None and _pointer_changed(worktree, before):
        filetree.remove(worktree / ".git")
        (worktree / ".git").write_bytes(before.pointer)
    admin = before.admin if before is not None else admin_of(worktree)[0]
    algorithm = algorithm_of(admin)
    expected = tree(admin, commit)
    modules = [path for path, entry in expected.items() if entry.mode == MODULE]
    absent = dict(expected)
    for path, status in filetree.walk(worktree, {*_folders(expected), *modules}, everything=True):
        file, entry = worktree / path, expected.get(path)
        plain = filetree.mode_of(status) != OTHER and (status.st_nlink == 1 or filetree.mode_of(status) == LINK)
        if entry is None or not plain or filetree.entry_of(file, status, algorithm) != entry:
            filetree.remove(file)
            continue
        absent.pop(path)
        if entry.mode != LINK:
            filetree.set_permissions(file, entry.mode)
    for path, entry in absent.items():
        if entry.mode == MODULE:
            (worktree / path).mkdir(parents=True, exist_ok=True)
        else:
            filetree.write_plain(worktree / path, entry, blob(admin, entry.oid, algorithm))


def _problem(file: Path, status: os.stat_result, entry: TreeEntry | None, algorithm: str, train: bool) -> str:
    """What is wrong with a file or folder, empty if nothing is."""
    mode, folder = filetree.mode_of(status), stat.S_ISDIR(status.st_mode)
    kind = "a folder" if folder else {LINK: "a symbolic link", OTHER: "a pipe, socket or device"}.get(mode, "a file")
    if folder and os.path.lexists(file / ".git"):
        return "a git repository was put here; only the train file may change"
    if entry is None or entry.mode == MODULE:
        return f"{kind} was added; only the train file may change"
    if mode != entry.mode:
        if {mode, entry.mode} <= {"100644", "100755"}:
            return f"its mode was changed from {entry.mode} to {mode}"
        return f"was replaced by {kind}"
    if status.st_mode & 0o7000 and mode != LINK:
        return f"its mode was changed to {stat.S_IMODE(status.st_mode):04o}"
    if train:
        return _train_problem(file, status)
    if mode != OTHER and (status.st_size != entry.size or filetree.entry_of(file, status, algorithm).oid != entry.oid):
        return "its content was changed; only the train file may change"
    return ""


def _train_problem(file: Path, status: os.stat_result) -> str:
    if status.st_nlink > 1:
        return "is a hard link to another file"
    if status.st_size > TRAIN_FILE_BYTES:
        return f"has {status.st_size} bytes; at most {TRAIN_FILE_BYTES} are allowed"
    try:
        content = filetree.read_plain(file)
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text: {error.reason} at byte {error.start}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "holds a NUL byte; expected Python source" if b"\0" in content else ""


def _git_violations(worktree: Path, before: Snapshot) -> list[Violation]:
    if _pointer_changed(worktree, before):
        return [Violation(".git", "the file that links the worktree to git was changed")]
    try:
        now = state_of(before.admin)
    except (OSError, GuardError) as error:
        return [Violation(".git", f"git's folder was damaged: {error}")]
    names = sorted(name for name in {*now, *before.git} if now.get(name) != before.git.get(name))
    return [Violation(_shown(name), "was written to; git's folder is not the agent's") for name in names]


def _pointer_changed(worktree: Path, before: Snapshot) -> bool:
    try:
        return filetree.read_plain(worktree / ".git") != before.pointer
    except OSError:
        return True


def _shown(path: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in path)


def _folders(paths: Iterable[str]) -> set[str]:
    """Every folder that one of these files is in."""
    folders: set[str] = set()
    for path in paths:
        parent = os.path.dirname(path)
        while parent and parent not in folders:
            folders.add(parent)
            parent = os.path.dirname(parent)
    return folders


def _git(admin: Path, *args: str) -> bytes:
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
    return _git(admin, "rev-parse", "--show-object-format").decode().strip()


def tree(admin: Path, commit: str) -> dict[str, TreeEntry]:
    """All files of a commit by path. GuardError if there is no such commit."""
    try:
        listing = _git(admin, "ls-tree", "-r", "-l", "-z", "--full-tree", commit)
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
        content = _git(admin, "cat-file", "blob", oid)
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
    listing = _git(admin, "config", "--file", str(common / "config"), "--no-includes", "--list", "-z")
    for setting in listing.decode("utf-8", "replace").split("\0")[:-1]:
        key, _, value = setting.partition("\n")
        if key.startswith(_EXECUTING) or (key.startswith("remote.") and not key.endswith((".fetch", ".url"))):
            state[f".git/config {key}"] = state.get(f".git/config {key}", "") + value + "\n"
    refs = _git(admin, "for-each-ref", "--format=%(refname) %(objectname)", *_NIGHTS_REFS)
    for line in refs.decode("utf-8", "replace").splitlines():
        name, _, value = line.partition(" ")
        state[f".git/{name}"] = value
    return state
