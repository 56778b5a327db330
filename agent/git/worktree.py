"""Git, as a night uses it: a private worktree, one branch, one ref a candidate.

The user's checkout, index, stash, config and untracked files are never written. Commits are made from plumbing, so that
the branch moves only when a verdict is in the journal; hooks, signing and garbage collection are off.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from agent.errors import UsageError
from agent.git.command import GitFailed, git_bytes, run_git

_NOBODY = {"user.name": "autoresearch", "user.email": "autoresearch@localhost"}


class Repository:
    """The user's repository, read only but for the night's own branch, refs and worktree."""

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

    def file_at(self, commit: str, path: str) -> bytes:
        """A file's content at a commit; UsageError if it isn't there."""
        try:
            return git_bytes(self.root, "cat-file", "blob", f"{commit}:{path}")
        except GitFailed:
            raise UsageError(
                f"{path} is not in commit {commit[:7]}; a night trains what is committed: git add {path} && git commit"
            ) from None

    def files(self, commit: str, *paths: str) -> list[str]:
        """The files of a commit at or below these paths."""
        out = run_git(self.root, "ls-tree", "-r", "-z", "--name-only", commit, "--", *paths)
        return [name for name in out.split("\0") if name]

    def changed(self, *paths: str) -> list[str]:
        """Which of these files differ from HEAD in the user's checkout."""
        out = run_git(self.root, "status", "--porcelain", "--untracked-files=no", "-z", "--", *paths)
        return [entry[3:] for entry in out.split("\0") if len(entry) > 3]

    def resolve(self, name: str) -> str | None:
        """The commit a name means, None if it means none."""
        try:
            return run_git(self.root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except GitFailed:
            return None


class Worktree:
    """The night's private checkout of branch autoresearch/<tag>. Every method may be repeated after a crash.

    Commands name git's folder of this worktree outright: were it searched for from the working directory, an agent that
    deletes the file `.git` would turn the next reset on the user's own checkout.
    """

    def __init__(self, repository: Repository, tag: str, path: Path) -> None:
        self.repository, self.tag, self.path = repository, tag, path
        self.branch = f"autoresearch/{tag}"
        self._ref = f"refs/heads/{self.branch}"
        self.common = Path(run_git(repository.root, "rev-parse", "--path-format=absolute", "--git-common-dir"))
        self._admin: Path | None = None

    def check_free(self) -> None:
        """UsageError if a new night cannot have its branch or its refs."""
        try:
            run_git(self.repository.root, "check-ref-format", self._ref)
        except GitFailed:
            raise UsageError(f"--tag {self.tag}: not usable in a branch name; choose letters, digits and dashes") from None
        if self.repository.resolve(self._ref):
            raise UsageError(
                f"branch {self.branch} exists already, and runs/{self.tag} has no journal of it; choose another --tag, or "
                f"delete it: git branch -D {self.branch}"
            )
        if self.repository.resolve("refs/heads/autoresearch"):
            raise UsageError("a branch is called autoresearch, so that none can be autoresearch/<tag>; rename it")

    def open(self, commit: str) -> None:
        """Have the worktree there, on the branch, at `commit`, clean; whatever was in it is gone."""
        root = self.repository.root
        self._refuse_second_checkout()
        self._admin = self._find_admin()
        self._unlock()
        if self._admin is None:
            self.close()
            add = ("worktree", "add", "--quiet", "--force", "--no-checkout", "--detach", str(self.path), commit)
            try:
                run_git(root, *add)
            except GitFailed as error:
                raise UsageError(f"no worktree at {self.path}: {error}") from None
            self._admin = self._find_admin()
        self.reset(commit)

    def reset(self, commit: str) -> None:
        """Branch and files at `commit`, nothing else there, whatever the agent did to it."""
        self.path.mkdir(exist_ok=True)
        self._unlock()
        pointer, content = self.path / ".git", f"gitdir: {self._admin}\n"
        if not pointer.is_file() or pointer.is_symlink() or pointer.read_text(errors="replace") != content:
            shutil.rmtree(pointer) if pointer.is_dir() and not pointer.is_symlink() else pointer.unlink(missing_ok=True)
            pointer.write_text(content)
        run_git(self.repository.root, "update-ref", self._ref, commit)
        self._git("symbolic-ref", "HEAD", self._ref)
        try:
            self._git("reset", "--quiet", "--hard", commit)
            self._git("clean", "-ffdxq")
        except GitFailed:
            for folder, _, _ in os.walk(self.path):  # one that its maker has locked
                os.chmod(folder, 0o755)
            self._git("reset", "--quiet", "--hard", commit)
            self._git("clean", "-ffdxq")

    def show(self, best: str, commit: str, file: str) -> None:
        """The train file of `commit` in a worktree that is otherwise at `best`, clean."""
        self.reset(best)
        self._git("checkout", "--quiet", commit, "--", file)

    def commit(self, n: int, parent: str, file: str, message: str) -> str:
        """Commit the train file on top of `parent`, kept as refs/autoresearch/<tag>/NNNN; the branch stays."""
        self._git("read-tree", parent)
        self._git("add", "--force", "--", file)
        tree = self._git("write-tree")
        who = [] if self._has_identity() else [f"{key}={value}" for key, value in _NOBODY.items()]
        flags = [flag for setting in who for flag in ("-c", setting)]
        commit = self._git(*flags, "commit-tree", tree, "-p", parent, "-m", message)
        self.keep_ref(n, commit)
        return commit

    def diff(self, old: str, new: str) -> str:
        """The change between two commits, without context."""
        return run_git(self.repository.root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "-U0", old, new)

    def keep_ref(self, n: int, commit: str) -> None:
        """Candidate `n` stays reachable."""
        run_git(self.repository.root, "update-ref", f"refs/autoresearch/{self.tag}/{n:04d}", commit)

    def orphan(self, n: int, parent: str) -> tuple[str, str] | None:
        """Commit and message of a candidate `n` that was committed just before a crash, None if there is none."""
        commit = self.repository.resolve(f"refs/autoresearch/{self.tag}/{n:04d}")
        if commit is None or self.repository.resolve(f"{commit}^") != parent:
            return None
        return commit, run_git(self.repository.root, "log", "-1", "--format=%B", commit).strip()

    def close(self) -> None:
        """Remove the worktree; branch and refs stay, and the branch can be switched to."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(GitFailed):  # twice: also one that a killed `git worktree add` left locked
            run_git(self.repository.root, "worktree", "remove", "--force", "--force", str(self.path))
        self._admin = None

    def leftovers(self) -> list[str]:
        """The night's branch and refs, by full name."""
        out = run_git(self.repository.root, "for-each-ref", "--format=%(refname)", self._ref, f"refs/autoresearch/{self.tag}/")
        return out.split()

    def merged(self) -> bool:
        """Whether another branch contains the night's branch, so that its commits outlive it."""
        if not self.repository.resolve(self._ref):
            return True
        out = run_git(self.repository.root, "for-each-ref", "--format=%(refname)", "--contains", self._ref, "refs/heads/")
        return any(name != self._ref for name in out.split())

    def forget(self) -> None:
        """Remove the worktree, the branch and every ref of the night."""
        self._refuse_second_checkout()
        self.close()
        for name in self.leftovers():
            run_git(self.repository.root, "update-ref", "-d", name)

    def _git(self, *args: str) -> str:
        if self._admin is None:
            raise GitFailed(f"the worktree {self.path} is not open")
        return run_git(self.path, f"--git-dir={self._admin}", f"--work-tree={self.path}", *args)

    def _find_admin(self) -> Path | None:
        """Git's folder of this worktree; None if there is none, or only a half-made or half-removed one."""
        for pointer in (self.common / "worktrees").glob("*/gitdir"):
            whole = all((pointer.parent / name).is_file() for name in ("HEAD", "commondir"))
            target = os.path.normpath(pointer.parent / pointer.read_text(errors="surrogateescape").rstrip("\n"))
            if target == str(self.path / ".git"):
                return pointer.parent if whole and self.path.is_dir() else None
        return None

    def _unlock(self) -> None:
        """Remove locks that a killed git left on what is the night's alone; a git that still runs gets a second."""
        locks = [self.common / f"{self._ref}.lock"]
        if self._admin:
            locks += [self._admin / "index.lock", self._admin / "HEAD.lock"]
        for lock in locks:
            patience = 20
            while lock.exists() and patience:
                time.sleep(0.05)
                patience -= 1
            lock.unlink(missing_ok=True)

    def _refuse_second_checkout(self) -> None:
        listing = run_git(self.repository.root, "worktree", "list", "--porcelain", "-z").split("\0\0")
        for entry in listing:
            fields = dict(line.partition(" ")[::2] for line in entry.strip("\0").split("\0"))
            if fields.get("branch") == self._ref and Path(fields["worktree"]) != self.path:
                raise UsageError(
                    f"{fields['worktree']} has branch {self.branch} checked out, and the night would move it under your "
                    "feet; switch away: git switch -"
                )

    def _has_identity(self) -> bool:
        if os.environ.get("GIT_COMMITTER_EMAIL") and os.environ.get("GIT_AUTHOR_EMAIL"):
            return True
        try:
            return bool(self._git("config", "user.email") and self._git("config", "user.name"))
        except GitFailed:
            return False
