"""Running git so that only the night's own settings decide: no hook, filter, signature, replacement or question of the user's.

Plumbing commands are used throughout. They read no attribute, convert no line end and start no program that a config names.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import git

from agent.errors import NightError, UsageError

SECONDS = 300.0  # for one command; none of ours needs more, but a pipe in git's folder would make git wait for ever
_QUIET = (
    "-c", "core.hooksPath=/dev/null",  # the user's hooks are for the user's commits
    "-c", "commit.gpgSign=false",  # would ask for a passphrase at 3 a.m.
    "-c", "gc.auto=0",
    "-c", "core.fsync=committed,loose-object",  # the journal names commits: they must survive power loss as well
    "-c", "core.fsmonitor=false",
    "-c", "core.autocrlf=false", "-c", "core.safecrlf=false", "-c", "core.attributesFile=/dev/null",
    "-c", "i18n.commitEncoding=utf-8",
)  # fmt: skip
# Set by git for its hooks and by some shells; they would point every command at another repository.
_FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE",
            "GIT_PREFIX", "GIT_CEILING_DIRECTORIES", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_EXTERNAL_DIFF")  # fmt: skip
_ENVIRONMENT = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "GIT_LFS_SKIP_SMUDGE": "1",
                "GIT_NO_REPLACE_OBJECTS": "1", "GIT_GRAFT_FILE": os.devnull}  # fmt: skip


class GitFailed(NightError):
    """git refused a command; the message is git's own."""


# What a full disk, a removed folder, a damaged repository or too little memory may raise around one experiment.
DAMAGE = (GitFailed, OSError, MemoryError, RecursionError)


def run_git(cwd: Path, *args: str, stdin: bytes | None = None, index: Path | None = None) -> str:
    """Standard output of a git command, without its last newline. GitFailed with git's words if it fails."""
    return git_bytes(cwd, *args, stdin=stdin, index=index).decode("utf-8", "surrogateescape").removesuffix("\n")


def git_bytes(cwd: Path, *args: str, stdin: bytes | None = None, index: Path | None = None) -> bytes:
    """Standard output of a git command as it came. GitFailed with git's words if it fails or takes too long.

    `index`: the file that git takes as its index, instead of the repository's own; one that is absent is an empty index."""
    for name in _FOREIGN:
        os.environ.pop(name, None)
    command, environment = ["git", *_QUIET, *args], {**_ENVIRONMENT, **({"GIT_INDEX_FILE": str(index)} if index else {})}
    try:
        with tempfile.TemporaryFile() as source:
            source.write(stdin or b"")
            source.seek(0)
            out = git.cmd.Git(str(cwd)).execute(
                command, env=environment, stdout_as_string=False, strip_newline_in_stdout=False, istream=source,
                kill_after_timeout=SECONDS,
                start_new_session=True,  # the terminal's Ctrl-C is for the driver, which finishes what it does
            )  # fmt: skip
    except git.exc.GitCommandNotFound as error:
        raise UsageError(f"git is not installed, or {cwd} is gone: {error}") from None
    except git.exc.GitCommandError as error:
        words = str(error.stderr or error.stdout).strip().removeprefix("stderr: ").strip("' \n")
        told = " ".join(word for word in args if not word.startswith(("--git-dir=", "--work-tree=")))
        raise GitFailed(f"git {told[:200]}: {words or f'exit status {error.status}'}") from None
    return out if isinstance(out, bytes) else str(out).encode()
