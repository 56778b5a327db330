"""What trainer and scorer may touch: their own folders, no network, not the held-out data; as far as the system offers it.

    argv, cover = wrap([...], writable=[run_dir, tmp], readable_only=[worktree, train_dir], hidden=[held_dir], network=False)

Of nested paths the innermost decides. On Linux the folders of temporary files and sockets (/tmp, /run) are hidden as a whole,
so name whatever the command needs there. Point TMPDIR at a writable folder: MLX compiles kernels in it, and reuses them if it
stays. A signal ends a command in bubblewrap at once, without time to tidy up. Coding agents are not wrapped: they need their
network and their logins.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from agent.confinement import HIDDEN, READ, WRITE, Rules, bubblewrap, seatbelt
from agent.environment import clean_env
from agent.process import Bounds, run

# Logins and keys in the home folder. Without network they cannot leave at once, but a log goes into the next prompt.
PRIVATE = (
    ".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".netrc", ".git-credentials", ".npmrc", ".pypirc", ".claude",
    ".claude.json", ".codex", ".gemini", ".qwen", ".copilot", ".cursor", ".aider.conf.yml", ".config/gh", ".config/gcloud",
    ".config/git/credentials", ".config/goose", ".config/opencode", ".local/share/opencode", ".config/github-copilot",
    ".cache/huggingface/token", "Library/Keychains", "Library/Cookies",
)  # fmt: skip
_PROBE_SECONDS = 20.0

_Wrapper = Callable[[list[str], Rules, bool], list[str]]


@dataclass(frozen=True)
class Cover:
    """What the sandbox of this machine does and does not cover, in words."""

    kind: str  # "bubblewrap", "sandbox-exec" or "none"
    covered: tuple[str, ...]
    not_covered: tuple[str, ...]

    @property
    def present(self) -> bool:
        return self.kind != "none"

    def __str__(self) -> str:
        return f"{self.kind}: {'; '.join(self.covered) or 'nothing covered'}. Not covered: {'; '.join(self.not_covered)}"


_WRITES = "writes only to the run directory and a private TMPDIR"
_READS = "held-out data, logins and keys in the home folder cannot be read"
_NOT_COVERED = ("other files of the user can be read", "processor, memory and GPU are shared (the driver's limits apply)")
BUBBLEWRAP = Cover(
    "bubblewrap",
    ("no network", _WRITES, _READS, "other processes and the sockets in /tmp and /run cannot be seen"),
    (*_NOT_COVERED, "holes in the kernel and in GPU drivers"),
)
BUBBLEWRAP_IN_CONTAINER = Cover(
    "bubblewrap",
    ("no network", _WRITES, _READS, "the sockets in /tmp and /run cannot be seen"),
    (*_NOT_COVERED, "other processes of the user, their environment too, can be seen and ended", "holes in the kernel"),
)
SANDBOX_EXEC = Cover(
    "sandbox-exec",
    ("no network", f"{_WRITES} (and Metal's cache of kernels)", _READS, "no program can be started through Launch Services"),
    (*_NOT_COVERED, "other processes of the user can be ended", "system services that can be asked to act"),
)
SANDBOX_EXEC_PLAIN = Cover("sandbox-exec", SANDBOX_EXEC.covered[:-1], (*SANDBOX_EXEC.not_covered, "programs started by `open`"))


def wrap(
    argv: Sequence[str | Path],
    *,
    writable: Iterable[Path],
    readable_only: Iterable[Path] = (),
    hidden: Iterable[Path] = (),
    network: bool = False,
) -> tuple[list[str], Cover]:
    """The command as it runs in this machine's sandbox, and what that covers; the command as it is where there is none.

    Raises FileNotFoundError for a writable or readable path that does not exist; a hidden one may be absent.
    """
    command = [str(word) for word in argv]
    wrapper, cover = _detect()
    if wrapper is None:
        return command, cover
    return wrapper(command, _rules(writable, readable_only, hidden), network), cover


def wrap_scorer(argv: Sequence[str | Path], *, writable: Iterable[Path], readable_only: Iterable[Path]) -> list[str]:
    """The command of a program of ours that itself starts one under `wrap`: without network, writing where it may. As it is
    where this machine's sandbox does not work inside itself."""
    command = [str(word) for word in argv]
    return bubblewrap(command, _rules(writable, readable_only, []), False, _strict(), outer=True) if nests() else command


@lru_cache(maxsize=1)
def nests() -> bool:
    """Whether a sandbox can be started inside a sandbox here: in bubblewrap mostly, in sandbox-exec never."""
    if available().kind != "bubblewrap":
        return False

    def both(argv: list[str], rules: Rules, network: bool) -> list[str]:
        return bubblewrap(bubblewrap(argv, rules, network, _strict()), rules, network, _strict(), outer=True)

    return not _problem(both)


def described() -> str:
    """What is covered, of trainings and logits servers, and of the scorer, which runs the harness's own code."""
    scorer = "has no network and writes only to the run directory" if nests() else "runs with the user's rights and network"
    return f"{available()}. The scorer, which is the harness's own code, {scorer}"


def _strict() -> bool:
    return available() == BUBBLEWRAP


def available() -> Cover:
    """What `wrap` covers on this machine; found out by running it once."""
    return _detect()[1]


def _rules(writable: Iterable[Path], readable_only: Iterable[Path], hidden: Iterable[Path]) -> dict[str, str]:
    # later ones win: a caller may hide even Python's own folders, or open one of the private ones
    packages = [path for path in sys.path if path.endswith("-packages")]  # of the user, or linked from another environment
    rules = {os.path.realpath(path): READ for path in (sys.prefix, sys.base_prefix, *packages) if os.path.isdir(path)}
    private = (Path.home() / name for name in PRIVATE)
    rules |= {os.path.realpath(path): HIDDEN for path in [*private, *hidden] if os.path.exists(path)}
    for right, paths in ((READ, readable_only), (WRITE, writable)):
        for path in paths:
            if not os.path.exists(path):
                raise FileNotFoundError(f"expected {path} to exist, so that the sandbox can open it to {right}; create it first")
            rules[os.path.realpath(path)] = right
    return rules


@lru_cache(maxsize=1)
def _detect() -> tuple[_Wrapper | None, Cover]:
    choices: list[tuple[_Wrapper, Cover]] = []
    reason = f"none is known for {sys.platform}"
    if sys.platform == "darwin":
        choices = [(seatbelt, SANDBOX_EXEC), (partial(seatbelt, strict=False), SANDBOX_EXEC_PLAIN)]
    elif sys.platform == "linux":
        choices = [(bubblewrap, BUBBLEWRAP), (partial(bubblewrap, strict=False), BUBBLEWRAP_IN_CONTAINER)]
        if shutil.which("bwrap") is None:
            choices, reason = [], "bwrap is not installed; it is in the package bubblewrap"
    for wrapper, cover in choices:
        problem = _problem(wrapper)
        if not problem:
            return wrapper, cover
        reason = f"{cover.kind} does not work here: {problem}"
    return None, Cover("none", (), (f"trainer and scorer run with the user's rights and network ({reason})",))


def _problem(wrapper: _Wrapper) -> str:
    """Why a sandbox does not work here, empty if it does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = shutil.which("true") or "/usr/bin/true"
        argv = wrapper([program], _rules([folder], [], []), False)
        outcome = run(argv, cwd=folder, env=clean_env(), log=folder / "log", bounds=Bounds(_PROBE_SECONDS))
        return "" if outcome.ok else outcome.tail(300).strip() or outcome.reason
