"""The commands of the sandboxes: rules in, argv out. Pure but for looking which devices exist.

`rules` maps real paths to what is allowed below them: HIDDEN, READ or WRITE; of nested paths the innermost decides. All else
is readable. Every function has a `strict` form and a weaker one for systems that refuse it.
"""

import glob
import os
import shutil
from collections.abc import Mapping

HIDDEN, READ, WRITE = "hide", "read", "write"
Rules = Mapping[str, str]

_SOCKETS = ("/tmp", "/var/tmp", "/run")  # Docker's, tmux's, D-Bus's, the key agents': ways out that need no network
_SYSTEM = ("/run/current-system", "/run/opengl-driver")  # NixOS keeps its programs there
_RESOLVER = ("/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager")
_GPUS = ("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/dxg")

_DEVICES = '(literal "/dev/null") (literal "/dev/zero") (literal "/dev/tty") (literal "/dev/dtracehelper") (regex #"^/dev/fd/")'
_METAL_CACHE = '(regex #"^/private/var/folders/[^/]+/[^/]+/C/(.+/)?com\\.apple\\.metal(fe)?(/|$)")'
_LAUNCHING = ("lsopen", "job-creation", "appleevent-send")  # asking a system service to start something outside


def bubblewrap(argv: list[str], rules: Rules, network: bool, strict: bool = True, outer: bool = False) -> list[str]:
    """bwrap on Linux; `strict` has a PID namespace, which some containers forbid. Inside an `outer` one another can be started."""
    command = ["bwrap", "--die-with-parent", "--unshare-ipc"]
    if not outer:
        command += ["--cap-drop", "ALL"]
    if not network:
        command.append("--unshare-net")
    if strict:
        command.append("--unshare-pid")
    command += ["--ro-bind", "/", "/", "--dev", "/dev"]
    if strict:
        command += ["--proc", "/proc"]
    for device in sorted(path for pattern in _GPUS for path in glob.glob(pattern)):
        command += ["--dev-bind-try", device, device]
    shared = [*_SYSTEM, *(_RESOLVER if network else ())]
    whole: dict[str, str] = {os.path.realpath(path): HIDDEN for path in _SOCKETS if os.path.isdir(path)}
    whole |= {os.path.realpath(path): READ for path in shared if os.path.isdir(path)}
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


def seatbelt(argv: list[str], rules: Rules, network: bool, strict: bool = True) -> list[str]:
    """sandbox-exec on macOS; `strict` also denies asking system services to start programs."""
    program = shutil.which("sandbox-exec") or "/usr/bin/sandbox-exec"
    return [program, "-p", seatbelt_profile(rules, network, strict), *argv]


def seatbelt_profile(rules: Rules, network: bool, strict: bool = True) -> str:
    """The profile's text. The last rule that matches decides."""
    lines = ["(version 1)", "(allow default)"]
    if not network:
        lines.append("(deny network*)")
    if strict:
        lines += [f"(deny {operation})" for operation in _LAUNCHING]
    # Metal keeps compiled kernels in the user's cache; without it every trial compiles them again
    lines += ["(deny file-write*)", f"(allow file-write* {_DEVICES} {_METAL_CACHE})"]
    for path, right in sorted(rules.items(), key=_depth):
        here = f"(subpath {_quoted(path)})"
        if right == HIDDEN:
            lines.append(f"(deny file-read* file-write* {here})")
            lines.append(f"(allow file-read-metadata (literal {_quoted(path)}))")  # to pass through to what is open inside
        elif right == READ:
            lines += [f"(allow file-read* {here})", f"(deny file-write* {here})"]
        else:
            lines.append(f"(allow file-read* file-write* {here})")
    return "\n".join(lines)


def _depth(rule: tuple[str, str]) -> tuple[int, str]:
    path = rule[0].rstrip("/")
    return path.count("/"), path


def _quoted(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
