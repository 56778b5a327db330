"""Running git: without hooks, signatures or questions, in no other repository than is meant; what it complains of is an error."""

from __future__ import annotations

import os
from pathlib import Path

import git

from agent.errors import NightError, UsageError

_QUIET = (
    "-c", "core.hooksPath=/dev/null",  # the user's hooks are for the user's commits
    "-c", "commit.gpgSign=false",  # would ask for a passphrase at 3 a.m.
    "-c", "gc.auto=0",
    "-c", "core.fsync=committed,loose-object",  # the journal names commits: they must survive power loss as well
    "-c", "core.fsmonitor=false",
    "-c", "advice.detachedHead=false",
)  # fmt: skip
# Set by git for its hooks and by some shells; they would point every command at another repository.
_FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE",
            "GIT_PREFIX", "GIT_CEILING_DIRECTORIES", "GIT_ALTERNATE_OBJECT_DIRECTORIES")  # fmt: skip


class GitFailed(NightError):
    """git refused a command; the message is git's own."""


def run_git(cwd: Path, *args: str) -> str:
    """Standard output of a git command, without its last newline. GitFailed with git's words if it fails."""
    return git_bytes(cwd, *args).decode("utf-8", "surrogateescape").removesuffix("\n")


def git_bytes(cwd: Path, *args: str) -> bytes:
    """Standard output of a git command as it came. GitFailed with git's words if it fails."""
    for name in _FOREIGN:
        os.environ.pop(name, None)
    env = {"GIT_LFS_SKIP_SMUDGE": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", *_QUIET, *args]
    try:
        out = git.cmd.Git(str(cwd)).execute(
            command, env=env, stdout_as_string=False, strip_newline_in_stdout=False,
            start_new_session=True,  # the terminal's Ctrl-C is for the driver, which finishes what it does
        )  # fmt: skip
    except git.exc.GitCommandNotFound as error:
        raise UsageError(f"git is not installed, or {cwd} is gone: {error}") from None
    except git.exc.GitCommandError as error:
        words = str(error.stderr or error.stdout).strip().removeprefix("stderr: ").strip("' \n")
        raise GitFailed(f"git {' '.join(args)[:200]}: {words or f'exit status {error.status}'}") from None
    return out if isinstance(out, bytes) else str(out).encode()
