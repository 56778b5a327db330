"""What trainer and scorer may touch: their own folders, no network, not the held-out data; as far as the system offers it.

    argv = wrap([...], {run_dir: WRITE, worktree: READ, held_dir: HIDDEN})

Rules map real paths to what is allowed below them: HIDDEN, READ or WRITE; of nested paths the innermost decides. All else is
readable. `agent/trial/rights.py` makes the rules of a candidate; here they become a command of bubblewrap or sandbox-exec.

On Linux the folders of temporary files and sockets (/tmp, /run) are hidden as a whole, so name whatever the command needs there.
Point TMPDIR at a writable folder: MLX compiles kernels in it. A signal ends a command in bubblewrap
at once, without time to tidy up. Coding agents are not wrapped: they need their network and their logins.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from agent.process.child import Bounds, run
from agent.process.environment import clean_env

HIDDEN, READ, WRITE = "hide", "read", "write"
Rules = Mapping[str, str]

_SOCKETS = ("/tmp", "/var/tmp", "/run")  # Docker's, tmux's, D-Bus's, the key agents': ways out that need no network
_SYSTEM = ("/run/current-system", "/run/opengl-driver")  # NixOS keeps its programs there
_GPUS = ("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/dxg")
_DEVICES = '(literal "/dev/null") (literal "/dev/zero") (literal "/dev/tty") (literal "/dev/dtracehelper") (regex #"^/dev/fd/")'
_CACHE = "^/private/var/folders/[^/]+/[^/]+/C"
_METAL_CACHE = rf'(regex #"{_CACHE}/(.+/)?com\.apple\.(metal(fe)?|gpuarchiver)(/|$)")'
_PROGRAMS_CACHE = f'(require-all (vnode-type DIRECTORY) (regex #"{_CACHE}/[^/]+$"))'  # in which Metal makes its own folder
_LAUNCHING = ("lsopen", "job-creation", "appleevent-send")  # asking a system service to start something outside

_PROBE_SECONDS = 20.0

_Wrapper = Callable[[list[str], Rules], list[str]]


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


_WRITES = "no writing but to its run folder and a private TMPDIR"
_READS = "other data, other trials, logins and keys are hidden"
_NOT_COVERED = (
    "your other files can be read", "CPU, memory and GPU are shared, within the driver's limits",
    "covert channels through the kernel (load, caches, keyrings)",
)  # fmt: skip
BUBBLEWRAP = Cover(
    "bubblewrap",
    ("no network", _WRITES, _READS, "so are other processes and the sockets in /tmp and /run"),
    (*_NOT_COVERED, "holes in the kernel and in GPU drivers"),
)
BUBBLEWRAP_IN_CONTAINER = Cover(
    "bubblewrap",
    ("no network", _WRITES, _READS, "so are the sockets in /tmp and /run"),
    (*_NOT_COVERED, "your other processes, and their environment, can be seen and ended", "holes in the kernel"),
)
SANDBOX_EXEC = Cover(
    "sandbox-exec",
    ("no network", f"{_WRITES} (and Metal's cache of kernels)", _READS, "Launch Services start nothing for it"),
    (*_NOT_COVERED, "your other processes can be ended", "system services that can be asked to act"),
)
SANDBOX_EXEC_PLAIN = Cover("sandbox-exec", SANDBOX_EXEC.covered[:-1], (*SANDBOX_EXEC.not_covered, "programs started by `open`"))


def wrap(argv: Sequence[str | Path], rules: Rules) -> list[str]:
    """The command as it runs in this machine's sandbox, which `available` describes; the command as it is where there is none."""
    command = [str(word) for word in argv]
    wrapper = _detect()[0]
    return wrapper(command, rules) if wrapper else command


def wrap_scorer(argv: Sequence[str | Path], rules: Rules) -> list[str]:
    """Wrap the scorer, which itself starts a process under `wrap`: no network, writes only where the rules allow. Unchanged where
    sandboxes cannot be nested."""
    command = [str(word) for word in argv]
    return bubblewrap(command, rules, _strict(), outer=True) if nests() else command


@lru_cache(maxsize=1)
def nests() -> bool:
    """Whether a sandbox can be started inside a sandbox here: in bubblewrap mostly, in sandbox-exec never."""
    if available().kind != "bubblewrap":
        return False

    def both(argv: list[str], rules: Rules) -> list[str]:
        return bubblewrap(bubblewrap(argv, rules, _strict()), rules, _strict(), outer=True)

    return not _problem(both)


def described() -> str:
    """What is covered, of trainings and logits servers, and of the scorer, which runs the harness's own code."""
    scorer = "has no network and writes only to the run folder" if nests() else "runs with your rights and network"
    return f"{available()}. The scorer, the harness's own code, {scorer}"


def _strict() -> bool:
    return available() == BUBBLEWRAP


def available() -> Cover:
    """What `wrap` covers on this machine; found out by running it once."""
    return _detect()[1]


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
    return None, Cover("none", (), (f"trainer and scorer run with your rights and network ({reason})",))


def bubblewrap(argv: list[str], rules: Rules, strict: bool = True, outer: bool = False) -> list[str]:
    """bwrap on Linux; `strict` has a PID namespace, which some containers forbid. Inside an `outer` one another can be started."""
    command = ["bwrap", "--die-with-parent", "--unshare-ipc", "--unshare-net"]
    if not outer:
        command += ["--cap-drop", "ALL"]
    if strict:
        command.append("--unshare-pid")
    command += ["--ro-bind", "/", "/", "--dev", "/dev"]
    if strict:
        command += ["--proc", "/proc"]
    for device in sorted(path for pattern in _GPUS for path in glob.glob(pattern)):
        command += ["--dev-bind-try", device, device]
    whole: dict[str, str] = {os.path.realpath(path): HIDDEN for path in _SOCKETS if os.path.isdir(path)}
    whole |= {os.path.realpath(path): READ for path in _SYSTEM if os.path.isdir(path)}
    whole |= rules
    frozen = []
    for path, right in sorted(whole.items(), key=_depth):
        if right != HIDDEN:
            command += ["--bind" if right == WRITE else "--ro-bind", path, path]
        elif os.path.isdir(path):
            command += ["--tmpfs", path]
            frozen += ["--remount-ro", path]  # later: what is mounted inside needs its place made first
        else:
            command += ["--ro-bind", "/dev/null", path]
    return [*command, *frozen, "--", *argv]


def seatbelt(argv: list[str], rules: Rules, strict: bool = True) -> list[str]:
    """sandbox-exec on macOS; `strict` also denies asking system services to start programs, and second names of others' files."""
    program = shutil.which("sandbox-exec") or "/usr/bin/sandbox-exec"
    return [program, "-p", seatbelt_profile(rules, strict), *argv]


def seatbelt_profile(rules: Rules, strict: bool = True) -> str:
    """The profile's text. The last rule that matches decides."""
    lines = ["(version 1)", "(allow default)", "(deny network*)"]
    if strict:
        lines += [f"(deny {operation})" for operation in _LAUNCHING]
        lines.append("(deny file-link)")  # a hard link in a writable folder would make any file of the user's writable
    # Metal keeps compiled kernels in the user's cache; without it every trial compiles them again
    lines += ["(deny file-write*)", f"(allow file-write* {_DEVICES} {_METAL_CACHE})"]
    lines.append(f"(allow file-write-create {_PROGRAMS_CACHE})")
    for path, right in sorted(rules.items(), key=_depth):
        here = f"(subpath {_quoted(path)})"
        if right == HIDDEN:
            lines.append(f"(deny file* {here})")  # also `file-link` and `file-clone`: no copy under another name
            inside = [Path(other) for other, what in rules.items() if what != HIDDEN and Path(path) in Path(other).parents]
            passed = {path, *(str(folder) for other in inside for folder in other.parents if Path(path) in folder.parents)}
            # to pass through to what is open inside
            lines += [f"(allow file-read-metadata (literal {_quoted(folder)}))" for folder in sorted(passed)]
        elif right == READ:
            lines += [f"(allow file* {here})", f"(deny file-write* {'file-link ' * strict}{here})"]
        else:
            lines.append(f"(allow file* {here})")
    return "\n".join(lines)


def _problem(wrapper: _Wrapper) -> str:
    """Why a sandbox does not work here, empty if it does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = shutil.which("true") or "/usr/bin/true"
        rules = {os.path.realpath(sys.prefix): READ, os.path.realpath(folder): WRITE}
        argv = wrapper([program], rules)
        outcome = run(argv, cwd=folder, env=clean_env(), log=folder / "log", bounds=Bounds(_PROBE_SECONDS))
        return "" if outcome.ok else outcome.tail(300).strip() or outcome.reason


def _depth(rule: tuple[str, str]) -> tuple[int, str]:
    path = rule[0].rstrip("/")
    return path.count("/"), path


def _quoted(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
