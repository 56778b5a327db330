"""Git, as a night uses it: one branch and one ref a candidate in the user's repository, and a worktree of its own.

The user's checkout, index, stash, config and untracked files are never written. Commits are made from plumbing, and the branch
moves only when a verdict is in the journal.

The worktree is a plain folder with the files of a commit. While a coding agent works in it, it has a `.git` of its own: a new,
empty repository that borrows the user's objects. Whatever an agent's git does (stash, commit, config, hooks, gc, a lock left
behind) stays in there and is thrown away with it, and two nights have nothing in common.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from agent.errors import UsageError
from agent.files import read_plain, remove
from agent.git import filetree
from agent.git.command import GitFailed, git_bytes, run_git
from agent.git.filetree import TreeEntry

_NOBODY = ("autoresearch", "autoresearch@localhost")
_STORED_ELSEWHERE = {b"version https://git-lfs": "Git LFS", b"\0GITCRYPT": "git-crypt"}  # how a commit's content then begins
_LARGEST_SOURCE = 16 << 20  # bytes of a file in the user's checkout that is compared with its commit
_LOCK_SECONDS = 1.0  # that a git of the user's may hold a lock on one of the night's refs


class GuardError(GitFailed):
    """A commit cannot be read: the repository's objects are damaged or gone."""


class Repository:
    """The user's repository: objects, commits and the night's own refs. All else in it is only read."""

    def __init__(self, folder: Path) -> None:
        """UsageError, in one line, where a night cannot be run from `folder`."""
        folder = folder.resolve()
        try:
            bare, top, prefix = (*run_git(folder, "rev-parse", "--is-bare-repository").split(), "", "")
            if bare == "false":
                top = run_git(folder, "rev-parse", "--show-toplevel")
                prefix = run_git(folder, "rev-parse", "--show-prefix")
        except GitFailed as error:
            if "dubious ownership" in str(error):
                raise UsageError(str(error)) from None
            raise UsageError(
                f"{folder} is not in a git repository; a night keeps what it finds as commits: "
                "clone the project, or run `git init && git add -A && git commit -m start`"
            ) from None
        if bare == "true" or not top:
            raise UsageError(f"{folder} is a bare repository without files; run from a checkout of it")
        if prefix:
            raise UsageError(f"{folder} is inside the repository {top}; run from its top: cd {top}")
        self.root = Path(top)
        try:
            self.head = run_git(self.root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        except GitFailed:
            raise UsageError(
                f"{self.root} has no commit yet; a night begins at one: run `git add -A && git commit -m start`"
            ) from None
        self.common = Path(run_git(self.root, "rev-parse", "--path-format=absolute", "--git-common-dir"))
        self.algorithm = run_git(self.root, "rev-parse", "--show-object-format")

    def git(self, *args: str, stdin: bytes | None = None) -> str:
        """Output of a command on this repository, whose folder is named and not searched for. The user's index is not read, as it
        may be damaged: `git diff-tree` would fail then, which has no need of it."""
        return run_git(self.root, f"--git-dir={self.common}", *args, stdin=stdin, index=self.common / "autoresearch-no-index")

    def file_at(self, commit: str, path: str) -> bytes:
        """A file's content at a commit; UsageError if it isn't there."""
        try:
            return git_bytes(self.root, f"--git-dir={self.common}", "cat-file", "blob", f"{commit}:{path}")
        except GitFailed:
            raise UsageError(
                f"{path} is not in commit {commit[:7]}; a night trains what is committed: git add {path} && git commit"
            ) from None

    def files(self, commit: str, *paths: str) -> list[str]:
        """The files of a commit at or below these paths."""
        out = self.git("ls-tree", "-r", "-z", "--name-only", "--full-tree", commit, "--", *paths)
        return [name for name in out.split("\0") if name]

    def tree(self, commit: str) -> dict[str, TreeEntry]:
        """All files of a commit by path. GuardError if there is no such commit."""
        try:
            listing = self.git("ls-tree", "-r", "-l", "-z", "--full-tree", commit)
        except GitFailed as error:
            raise GuardError(f"expected {commit} to be a commit: {error}") from None
        entries = {}
        for line in listing.split("\0")[:-1]:
            facts, _, path = line.partition("\t")
            mode, _, oid, size = facts.split()
            entries[path] = TreeEntry(mode, int(size) if size.isdigit() else 0, oid)
        return entries

    def blob(self, entry: TreeEntry) -> bytes:
        """The content of an entry, verified. GuardError if it is gone or not what its name says."""
        try:
            content = git_bytes(self.root, f"--git-dir={self.common}", "cat-file", "blob", entry.oid)
        except GitFailed as error:
            raise GuardError(f"git's object {entry.oid} cannot be read: {error}; run: git fsck") from None
        if filetree.object_id(content, self.algorithm) != entry.oid:
            raise GuardError(f"git's object {entry.oid} holds something else than its name says; run: git fsck")
        return content

    def refuse_stored_elsewhere(self, commit: str, *paths: str) -> None:
        """UsageError for a file of which a commit holds only a pointer or a secret form, because a filter of git's made it."""
        for path in paths:
            content = self.file_at(commit, path)
            for beginning, tool in _STORED_ELSEWHERE.items():
                if content.startswith(beginning):
                    raise UsageError(
                        f"{path} is stored through {tool}, so commit {commit[:7]} does not hold its source; a night trains what "
                        f"is committed: take {path} out of .gitattributes, then git add --renormalize {path} && git commit"
                    )

    def changed(self, commit: str, *paths: str) -> list[str]:
        """Which of these files differ from a commit in the user's checkout. Line ends do not count: git may convert them."""
        different = []
        for name in self.files(commit, *paths):
            try:
                content = read_plain(self.root / name, _LARGEST_SOURCE)
            except OSError:
                content = b""
            if content.replace(b"\r\n", b"\n") != self.file_at(commit, name).replace(b"\r\n", b"\n"):
                different.append(name)
        return different

    def resolve(self, name: str) -> str | None:
        """The commit a name means, None if it means none."""
        try:
            return self.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except GitFailed:
            return None

    def leftover(self, tag: str) -> str:
        """What an earlier night of this tag has left in git, "" if nothing: its branch, or refs of its candidates."""
        if self.resolve(f"refs/heads/autoresearch/{tag}"):
            return f"branch autoresearch/{tag} exists already"
        refs = self.git("for-each-ref", "--count=1", "--format=%(refname)", f"refs/autoresearch/{tag}/")
        return f"candidates of an earlier night are kept under refs/autoresearch/{tag}" if refs else ""

    def set_ref(self, name: str, commit: str) -> str:
        """Point a ref of the night at a commit. A lock that a killed git left on it is removed. The words for the user where it
        cannot be set. GuardError if there is no such commit."""
        try:
            self.git("update-ref", name, commit)
        except GitFailed:
            deadline, lock = time.monotonic() + _LOCK_SECONDS, self.common / f"{name}.lock"
            while lock.exists() and time.monotonic() < deadline:  # whoever holds it may still run
                time.sleep(0.05)
            remove(lock)
            if not self.resolve(commit):
                raise GuardError(
                    f"commit {commit[:9]} is gone from git: {name} was deleted, and then what no ref leads to; fetch it from a "
                    "clone or a backup"
                ) from None
            try:
                self.git("update-ref", name, commit)
            except GitFailed as error:
                return f"{name} stays where it is: {str(error).rpartition('fatal: ')[2]}"
        return ""

    def commit(self, parent: str, file: str, content: bytes, message: str) -> str:
        """Write a commit that differs from `parent` in one file at the top, without index, worktree or filters. No ref moves."""
        oid = self.git("hash-object", "-w", "--no-filters", "--stdin", stdin=content)
        lines = []
        for line in self.git("ls-tree", "-z", "--full-tree", parent).split("\0")[:-1]:
            facts, _, name = line.partition("\t")
            mode, kind, _ = facts.split()
            lines.append(f"{mode} {kind} {oid}\t{name}" if name == file else line)
        listing = "".join(f"{line}\0" for line in lines).encode("utf-8", "surrogateescape")
        tree = self.git("mktree", "-z", "--missing", stdin=listing)
        who = [] if self.identity() else ["-c", f"user.name={_NOBODY[0]}", "-c", f"user.email={_NOBODY[1]}"]
        text = f"{message}\n".encode("utf-8", "replace")  # not an argument, which the user's locale may be unable to encode
        return self.git(*who, "commit-tree", tree, "-p", parent, stdin=text)

    def identity(self) -> tuple[str, str] | None:
        """Name and address that the user commits with, None if git knows none."""
        if os.environ.get("GIT_COMMITTER_EMAIL") and os.environ.get("GIT_AUTHOR_EMAIL"):
            return os.environ.get("GIT_COMMITTER_NAME") or _NOBODY[0], os.environ["GIT_COMMITTER_EMAIL"]
        try:
            name, email = self.git("config", "user.name"), self.git("config", "user.email")
        except GitFailed:
            return None
        return (name, email) if name and email else None

    def checked_out(self, ref: str) -> Path | None:
        """The checkout of the user's that has a branch checked out, None if none has."""
        for entry in self.git("worktree", "list", "--porcelain").split("\n\n"):
            fields = dict(line.partition(" ")[::2] for line in entry.splitlines())
            if fields.get("branch") == ref:
                return Path(fields["worktree"])
        return None


class Worktree:
    """The folder a night works in, and its branch autoresearch/<tag>. Every method may be repeated after a crash."""

    def __init__(self, repository: Repository, tag: str, path: Path) -> None:
        self.repository, self.tag, self.path = repository, tag, path
        self.branch = f"autoresearch/{tag}"
        self._ref = f"refs/heads/{self.branch}"
        self._tree: tuple[str, dict[str, TreeEntry]] = "", {}
        self._lost = set[str]()  # commits of candidates that are gone from git

    def check_free(self) -> None:
        """UsageError if a new night cannot have its branch or its refs."""
        try:
            self.repository.git("check-ref-format", self._ref)
        except GitFailed:
            raise UsageError(f"--tag {self.tag}: not usable in a branch name; choose letters, digits and dashes") from None
        if left := self.repository.leftover(self.tag):
            refs = f"git for-each-ref --format='delete %(refname)' {self._ref} refs/autoresearch/{self.tag}/"
            raise UsageError(
                f"{left}, and runs/{self.tag} has no journal of it; choose another --tag, or delete all that is left of it: "
                f"{refs} | git update-ref --stdin"
            )
        if self.repository.resolve("refs/heads/autoresearch"):
            raise UsageError("a branch is called autoresearch, so that none can be autoresearch/<tag>; rename it")

    def open(self, commit: str) -> None:
        """Have the branch at `commit`, and the worktree made anew with its files."""
        if taken := self.repository.checked_out(self._ref):
            raise UsageError(
                f"{taken} has branch {self.branch} checked out, and the night would move it under your feet; "
                "switch away: git switch -"
            )
        remove(self.path)
        self.move(commit)
        self.fill(commit)

    def move(self, commit: str) -> str:
        """Move the branch to `commit`. Where it stays, as the user has meanwhile checked it out, the words for them come back.

        GuardError if there is no such commit."""
        if self.repository.resolve(self._ref) == commit:
            return ""
        if taken := self.repository.checked_out(self._ref):
            stays = f"{taken} has branch {self.branch} checked out, so it stays where it is"
            return f"{stays}; switch away (git switch -), and it follows"
        return self.repository.set_ref(self._ref, commit)

    def fill(self, commit: str) -> None:
        """The files of a commit in the worktree and nothing else, whatever was done to it. GuardError if they cannot be read."""
        filetree.restore(self.path, self.tree(commit), self.repository.algorithm, self.repository.blob)

    def lend(self, commit: str) -> None:
        """The files of a commit, and a git repository in which a coding agent may do as it likes."""
        self.fill(commit)
        kind = f"--object-format={self.repository.algorithm}"
        run_git(self.path.parent, "init", "--quiet", "--template=", kind, f"--initial-branch={self.branch}", str(self.path))
        folder = self.path / ".git"
        objects = str(self.repository.common / "objects")
        if "\n" in objects:  # only then: gitdb, by which aider reads, knows no quotes
            objects = '"' + objects.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        (folder / "objects" / "info").mkdir(exist_ok=True)
        (folder / "objects" / "info" / "alternates").write_text(f"{objects}\n", encoding="utf-8", errors="surrogateescape")
        with contextlib.suppress(OSError):  # a shallow clone: history ends there
            (folder / "shallow").write_bytes(read_plain(self.repository.common / "shallow", 1 << 20))
        name, email = ("".join(char for char in word if char not in '"\\\n') for word in self.repository.identity() or _NOBODY)
        with open(folder / "config", "a", encoding="utf-8") as config:
            config.write(f'[user]\n\tname = "{name}"\n\temail = "{email}"\n')
        own = (f"--git-dir={folder}", f"--work-tree={self.path}")
        run_git(self.path, *own, "update-ref", "HEAD", commit)
        run_git(self.path, *own, "read-tree", commit)

    def diff(self, old: str, new: str) -> str:
        """The change between two commits, without context."""
        return self.repository.git("diff-tree", "-p", "--text", "--no-ext-diff", "--no-textconv", "--no-color", "-U0", old, new)

    def keep_refs(self, candidates: dict[int, str]) -> list[str]:
        """Candidates by their number stay reachable as refs/autoresearch/<tag>/NNNN, also where somebody has deleted a ref.

        Returns the words for the user about each that cannot."""
        wanted = {f"refs/autoresearch/{self.tag}/{n:04d}": commit for n, commit in candidates.items()}
        listing = self.repository.git("for-each-ref", "--format=%(refname) %(objectname)", f"refs/autoresearch/{self.tag}/")
        present = dict(line.split(" ") for line in listing.splitlines())
        problems = []
        for name, commit in wanted.items():
            if present.get(name) != commit and commit not in self._lost:
                try:
                    problems.append(self.repository.set_ref(name, commit))
                except GuardError as gone:  # an old candidate: the night can do without
                    self._lost.add(commit)
                    problems.append(str(gone))
        return list(filter(None, problems))

    def close(self) -> None:
        """Remove the worktree; branch and refs stay. OSError if it cannot be removed."""
        remove(self.path)

    def refs(self) -> list[str]:
        """The night's branch and refs, by full name."""
        return self.repository.git("for-each-ref", "--format=%(refname)", self._ref, f"refs/autoresearch/{self.tag}/").split()

    def merged(self) -> bool:
        """Whether another branch contains the night's branch, so that its commits outlive it."""
        if not self.repository.resolve(self._ref):
            return True
        containing = self.repository.git("for-each-ref", "--format=%(refname)", "--contains", self._ref, "refs/heads/")
        return any(name != self._ref for name in containing.split())

    def forget(self) -> None:
        """Remove the worktree, the branch and every ref of the night. UsageError while the branch is checked out."""
        if taken := self.repository.checked_out(self._ref):
            raise UsageError(f"{taken} has branch {self.branch} checked out; switch away first: git switch -")
        self.close()
        for name in self.refs():
            self.repository.git("update-ref", "-d", name)

    def tree(self, commit: str) -> dict[str, TreeEntry]:
        """The files of a commit. Only the newest answer is remembered: a commit does not change."""
        if self._tree[0] != commit:
            self._tree = commit, self.repository.tree(commit)
        return self._tree[1]
