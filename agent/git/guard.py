"""Only the train file may change: what else a coding agent changed is found and named.

    before = remember(repository)                                   # just before the agent starts
    found = check(repository, worktree, files, train_file, base, before)

`found.violations` void the candidate. `found.droppings` do not: files that the agent added, such as caches, backups and notes.
They can change nothing, because every training begins with the files of the candidate's commit and no others. An added file is a
violation only if the edited source now names it, by an import or a path: the training would not have that file.

An agent has the user's rights and can write elsewhere, too. What changed in the user's checkout (`in_checkout`) and in Python's
packages (`in_python`) is told, but neither undone nor a violation: a person may work there at the same time. Of the user's git
folder only what can run a program is watched. The night itself depends on none of it (see command.py).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import re
import stat
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from agent.errors import NightError
from agent.files import read_plain, unlock
from agent.git import filetree
from agent.git.command import GitFailed, run_git
from agent.git.filetree import LINK, MODULE, OTHER, TreeEntry
from agent.git.worktree import Repository
from agent.text import parsed

TRAIN_FILE_BYTES = 96 << 10  # twice our longest; at 200 KB of `a.a.a.a` Python 3.10 dies of a full stack as it parses them
MOST_VIOLATIONS = 20  # more say nothing new
MOST_DROPPINGS = 200  # likewise; the rest is removed all the same
_LARGEST_WATCHED = 1 << 20  # bytes of a hook or an attributes file whose content is compared

# Keys of a config that run a program, send commits elsewhere, or pull in another file of keys. All else changes with the user's
# own work, which goes on during a night: remotes, branches, submodules, and what their editor and their forge's tools write.
_EXECUTING = re.compile(
    r"alias\..*|core\.(alternaterefscommand|askpass|attributesfile|editor|fsmonitor|gitproxy|hookspath|pager|sshcommand|worktree)"
    r"|credential\.(.*\.)?helper|diff\.external|(diff|difftool|merge|mergetool|browser|man|guitool)\..*\.(cmd|command|driver|path|textconv)"
    r"|filter\..*\.(clean|smudge|process)|gpg\..*program|gpg\..*command|gpg\.program|include\.path|includeif\..*\.path"
    r"|interactive\.difffilter|pager\..*|protocol\..*|remote\..*\.(proxy|receivepack|uploadpack|vcs)|sequence\.editor"
    r"|submodule\..*\.update|tar\..*\.command|trailer\..*\.(cmd|command)|uploadpack\.packobjectshook|url\..*"
)


@dataclass(frozen=True)
class Violation:
    path: str  # relative to the worktree, odd characters escaped; what is in git's folder begins with .git/
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass
class Findings:
    violations: list[Violation] = field(default_factory=list)
    droppings: list[str] = field(default_factory=list)  # paths that were added and harm nothing, bytecode left out


def remember(repository: Repository) -> dict[str, str]:
    """What must stay as it is in the user's git folder: hooks, attributes, borrowed objects, and keys that can run a program.

    Name (".git/...") -> value or digest. GitFailed if the config cannot be read.
    """
    common, state = repository.common, {}
    names = ["info/attributes", "objects/info/alternates"]
    try:
        with os.scandir(common / "hooks") as entries:
            names += [f"hooks/{entry.name}" for entry in islice(entries, 1000) if not entry.name.endswith(".sample")]
    except OSError:
        pass  # a repository without hooks
    for name in names:
        try:
            status = os.lstat(common / name)
            content = os.fsencode(os.readlink(common / name)) if stat.S_ISLNK(status.st_mode) else b""
            if stat.S_ISREG(status.st_mode):
                content = read_plain(common / name, _LARGEST_WATCHED)
        except FileNotFoundError:
            continue
        except OSError as error:
            content = str(error).encode()
        state[f".git/{name}"] = f"{status.st_mode:o} {hashlib.sha256(content).hexdigest()}"
    for config in ("config", "config.worktree"):
        if not (common / config).is_file():
            continue
        listing = repository.git("config", "--file", str(common / config), "--no-includes", "--list", "-z")
        for setting in listing.split("\0")[:-1]:
            key, _, value = setting.partition("\n")
            if _EXECUTING.fullmatch(key.lower()) and not (key.startswith("alias.") and value[:1] not in "!-"):
                state[f".git/{config} {key}"] = state.get(f".git/{config} {key}", "") + value + "\n"
    return state


def in_checkout(repository: Repository) -> dict[str, int]:
    """What the user's checkout holds: path -> digest of size, time and mode, for each file that git knows or would add."""
    found: dict[str, int] = {}
    with contextlib.suppress(GitFailed):  # a damaged index is the user's, and costs no experiment
        listing = run_git(repository.root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        for path in listing.split("\0")[:-1]:
            with contextlib.suppress(OSError):
                found[_shown(path)] = _glance(f"{repository.root}/{path}", os.lstat(f"{repository.root}/{path}"))
    return found


def in_python() -> dict[str, int]:
    """What every training could run: "package NAME" -> digest of sizes, times and modes, for each installed package, each module of
    Python's own, and each program beside this Python."""
    places = [path for path in sys.path if path.endswith("-packages")]
    places += [sysconfig.get_path("stdlib"), *([sysconfig.get_path("scripts")] if sys.prefix != sys.base_prefix else [])]
    found: dict[str, int] = {}
    folders = [("", path) for path in {os.path.realpath(path) for path in places}]  # (package, folder); lib64 may be a link to lib
    while folders:
        package, folder = folders.pop()
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                name = f"package {package or entry.name}"
                if not entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(OSError):  # it has gone meanwhile
                        found[name] = found.get(name, 0) ^ _glance(entry.path, entry.stat(follow_symlinks=False))
                # Python itself writes to the first; the others are places of their own
                elif entry.name not in ("__pycache__", "site-packages", "dist-packages"):
                    folders.append((package or entry.name, entry.path))
    return found


def _glance(path: str, status: os.stat_result) -> int:
    return hash((path, status.st_size, status.st_mtime_ns, status.st_mode))


def changed(before: Mapping[str, int], after: Mapping[str, int]) -> set[str]:
    """The names that came, went or have another digest."""
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


def check(
    repository: Repository, worktree: Path, expected: Mapping[str, TreeEntry], train_file: str, base: bytes,
    before: Mapping[str, str] | None = None,
) -> Findings:  # fmt: skip
    """What differs from the files `expected` other than the train file's content, which was `base`; at most 20 violations.

    Without `before`, git's folder is not looked at.
    """
    if worktree.is_symlink() or not worktree.is_dir():
        return Findings([Violation(".", "the worktree was removed or replaced; expected a directory")])
    found = Findings(_git_violations(repository, before) if before is not None else [])
    for path, entry in sorted(expected.items()):
        if what := _problem(worktree, path, entry, repository.algorithm, path == train_file):
            found.violations.append(Violation(_shown(path), what))
    broken = {violation.path for violation in found.violations}
    needed = _new_names(base, _source(worktree / train_file)) if train_file not in broken else set()
    for path, kind in _additions(worktree, expected):
        if _bare(path) in needed or PurePosixPath(path).name in needed:
            what = f"{kind} was added, and {train_file} now names it; only the train file may change"
            found.violations.append(Violation(_shown(path), what))
        elif not path.endswith("__pycache__") and not PurePosixPath(path).name.startswith((".DS_Store", "._")):  # macOS left these
            found.droppings.append(_shown(path) + "/" * (kind == "a folder"))
    found.violations = found.violations[:MOST_VIOLATIONS]
    return found


def _problem(root: Path, path: str, entry: TreeEntry, algorithm: str, train: bool) -> str:
    """What is wrong with a file that should be there, "" if nothing is."""
    for parent in reversed(PurePosixPath(path).parents[:-1]):
        try:
            status = os.lstat(root / parent)
        except OSError:
            break
        if not stat.S_ISDIR(status.st_mode):
            return f"its folder {_shown(str(parent))} was replaced by {_kind(status)}"
        unlock(root / parent)
    try:
        status = os.lstat(root / path)
    except OSError:
        return "" if entry.mode == MODULE else "was deleted; only the train file may change"
    mode = filetree.mode_of(status)
    if entry.mode == MODULE:
        return "" if stat.S_ISDIR(status.st_mode) else f"was replaced by {_kind(status)}"
    if mode != entry.mode:
        if {mode, entry.mode} <= {"100644", "100755"}:
            return f"its mode was changed from {entry.mode} to {mode}"
        return f"was replaced by {_kind(status)}"
    if status.st_mode & 0o7000 and mode != LINK:
        return f"its mode was changed to {stat.S_IMODE(status.st_mode):04o}"
    if train:
        return _train_problem(root / path, status)
    try:
        same = filetree.holds(root / path, status, entry, algorithm)
    except OSError:
        same = False
    return "" if same else "its content was changed; only the train file may change"


def _train_problem(file: Path, status: os.stat_result) -> str:
    if status.st_nlink > 1:
        return "is a hard link to another file"
    if status.st_size > TRAIN_FILE_BYTES:
        return f"has {status.st_size} bytes; at most {TRAIN_FILE_BYTES} are allowed"
    try:
        content = read_plain(file, TRAIN_FILE_BYTES)
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text: {error.reason} at byte {error.start}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "holds a NUL byte; expected Python source" if b"\0" in content else ""


def _additions(root: Path, expected: Mapping[str, TreeEntry]) -> list[tuple[str, str]]:
    """Path and kind of what is in the worktree and not in the commit; an added folder is one of them, and not looked into."""
    known = filetree.folders_of(expected)
    modules = {path for path, entry in expected.items() if entry.mode == MODULE}
    real, found = {""}, list[tuple[str, str]]()
    for folder in ["", *sorted(known | modules)]:
        try:
            if os.path.dirname(folder) not in real or not stat.S_ISDIR(os.lstat(root / folder).st_mode):
                continue  # replaced by a link: that has been named, and what lies behind it is not ours
            real.add(folder)
            unlock(root / folder)
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    path = os.path.join(folder, entry.name)
                    if path in expected or path in known or path == ".git":
                        continue
                    found.append((path, _kind(entry.stat(follow_symlinks=False))))
                    if len(found) == MOST_DROPPINGS:
                        return found
        except OSError:  # gone: that has been named
            continue
    return sorted(found)


def _source(file: Path) -> bytes:
    try:
        return read_plain(file, TRAIN_FILE_BYTES)
    except OSError:
        return b""


def _new_names(old: bytes, new: bytes) -> set[str]:
    """What the new source names and the old one did not: modules and their parts, and the parts of paths in strings."""
    return _names(new) - _names(old)


def _names(source: bytes) -> set[str]:
    names: set[str] = set()
    try:
        nodes = list(ast.walk(parsed(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return names  # it will not be trained
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names.update(part for module in modules for part in module.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 4096:
            names.update(PurePosixPath(node.value).parts)
    return names


def _bare(path: str) -> str:
    """The name under which Python imports a file or folder: without folders and endings."""
    return PurePosixPath(path).name.split(".")[0] or path


def _kind(status: os.stat_result) -> str:
    if stat.S_ISDIR(status.st_mode):
        return "a folder"
    return {LINK: "a symbolic link", OTHER: "a pipe, socket or device"}.get(filetree.mode_of(status), "a file")


def _git_violations(repository: Repository, before: Mapping[str, str]) -> list[Violation]:
    try:
        now = remember(repository)
    except NightError as error:
        return [Violation(".git", f"git's folder was damaged: {error}")]
    names = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    return [Violation(_shown(name), "was written to, and can run programs; git's folder is not the agent's") for name in names]


def _shown(path: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in path)
