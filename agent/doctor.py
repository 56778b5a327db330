"""`python -m agent.doctor`: can a night run here? A line a check: ok, or how to mend it.

Exit code 0 if a night could run; what only makes it worse or slower is a note.
"""

from __future__ import annotations

import json
import os
import platform
import plistlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console as Rich
from rich.text import Text

from agent.coders import choice
from agent.errors import NightError
from agent.files import GIB, real_path
from agent.journal.settings import Settings
from agent.night import power
from agent.night.limits import next_time
from agent.process.child import said_by
from agent.process.environment import data_home, wsl
from agent.trial import sandbox
from agent.views.terminal import wrapped

_OLDEST_GIT = (2, 31)  # rev-parse --path-format
# Asked in a child, since nothing here imports a framework or the harness. BLAS first: it must be there before MLX.
_ASK = """
import json, sys
sys.path.insert(0, "")
answer = {}
try:
    import prepare_mlx
    from harness.machine import load_fast_blas
    answer["blas"] = load_fast_blas()
except Exception as error:
    answer["harness"] = f"{type(error).__name__}: {error}"
if sys.argv[1] == "mlx":
    import mlx.core as mx
    answer["version"] = mx.__version__
    answer["sum"] = mx.sum(mx.ones((64, 64)) @ mx.ones((64, 64))).item()
    answer["device"] = str(mx.default_device())
else:
    import torch
    answer["version"] = torch.__version__
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    answer["sum"] = (torch.ones(64, 64, device=name) @ torch.ones(64, 64, device=name)).sum().item()
    answer["device"] = torch.cuda.get_device_name() if name == "cuda" else name
print(json.dumps(answer))
"""


@dataclass(frozen=True)
class Finding:
    """`state` is ok, note (a night runs all the same) or bad (it cannot)."""

    subject: str
    state: str
    text: str


def examine(folder: Path, train_file: str, environ: Mapping[str, str], ask: bool = False) -> Iterable[Finding]:
    """All checks, for a night from the checkout `folder`; `ask`: the agents are asked for a word each, too."""
    yield check_python()
    yield from check_mac()
    yield from check_wsl()
    yield from check_place(folder, environ)
    yield check_git(folder, train_file)
    yield from check_agents(environ)
    if ask:
        yield from ask_agents(environ, folder, train_file)
    yield check_data(environ)
    yield from check_framework(folder, "torch" if "torch" in train_file else "mlx")
    yield check_disk(folder)
    yield from check_power()
    yield check_sandbox()


def check_python() -> Finding:
    version = f"{platform.python_version()} on {sys.platform} {platform.machine()}"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        if said_by(["sysctl", "-n", "sysctl.proc_translated"])[1] == "1":
            mend = "this terminal runs under Rosetta: in Finder's Get Info of it untick Open using Rosetta, then make clean"
        else:
            mend = "install one from python.org, or let uv do it"
        return Finding("python", "bad", f"{version}: MLX needs an arm64 Python; {mend}")
    return Finding("python", "ok", version)


def check_mac() -> Iterable[Finding]:
    """Whether this macOS has wheels of MLX, and those that know the chip."""
    if sys.platform != "darwin":
        return
    asked = ["sw_vers", "-productVersion"], ["sysctl", "-n", "machdep.cpu.brand_string"]
    version, chip = (said_by(argv)[1] for argv in asked)
    if not (major := version.partition(".")[0]).isdigit():
        return
    if int(major) < 14:
        yield Finding("macos", "bad", f"{version}: MLX needs macOS 14 or later; update it in System Settings > General")
    elif re.search(r"\bM[5-9]\b", chip) and int(major) < 26:
        yield Finding("macos", "note", f"{version} on {chip}: MLX uses this chip's neural accelerators only from macOS 26 on")
    else:
        yield Finding("macos", "ok", f"{version} on {chip}")


def check_wsl() -> Iterable[Finding]:
    """Windows below: which WSL, how much memory it lends, and who else may end a night."""
    if (version := wsl()) == 1:
        yield Finding("wsl", "bad", "WSL 1 has no GPU and no sandbox; in PowerShell: wsl --set-version <distribution> 2")
    elif version:
        memory = psutil.virtual_memory().total / GIB
        yield Finding("wsl", "ok", f"WSL 2 with {memory:.0f} GiB of Windows' memory; [wsl2] memory= in .wslconfig changes it")
        yield Finding("sleep", "note", "Windows may suspend all of it; in PowerShell: powercfg /change standby-timeout-ac 0")


_ASKED_FOR = ("Desktop", "Documents", "Downloads")  # below the home folder: macOS asks before a program may read there
_CLOUDS = ("Library/Mobile Documents", "Library/CloudStorage")


def check_place(folder: Path, environ: Mapping[str, str]) -> Iterable[Finding]:
    """Whether checkout and data lie where a night can use them until the morning."""
    home = real_path(environ.get("HOME") or Path.home())
    for name, path in (("checkout", folder), ("data", data_home(environ))):
        real = Path(real_path(path))
        inside = real.relative_to(home).as_posix() if real.is_relative_to(home) else ""
        words = ""
        if sys.platform == "darwin" and inside.startswith(_CLOUDS):
            words = "is kept in a cloud, which uploads each trial and may remove local copies"
        elif sys.platform == "darwin" and inside.split("/")[0] in _ASKED_FOR:
            words = "is a folder for which macOS asks permission, and at night nobody answers; iCloud may remove local copies"
        elif sys.platform == "darwin" and real.is_relative_to("/Volumes"):
            words = "is on a disk that can be unplugged or fall asleep, and that may lack what a night needs (locks, links)"
        elif wsl() and re.match(r"/mnt/[a-z]/", f"{real}/"):
            words = "is on Windows' side, where files are slow and have no permissions"
        if words:
            mend = "clone into ~/" if name == "checkout" else "set AUTORESEARCH_HOME to a folder below ~/"
            yield Finding("place", "note", f"the {name}, {path}, {words}; {mend}")


def check_git(folder: Path, train_file: str) -> Finding:
    apple = "run xcode-select --install, then git --version until it prints one"
    mend = apple if sys.platform == "darwin" else "install the package git"
    if shutil.which("git") is None:
        return Finding("git", "bad", f"not found on PATH; {mend}")
    code, said = said_by(["git", "--version"])
    if code != 0:  # on a Mac /usr/bin/git is there from the start, and only offers to install one, or a licence to be agreed to
        return Finding("git", "bad", f"git does not run ({_first_line(said)}); {mend}")
    import git  # fails to import where there is no git

    from agent.git.worktree import Repository
    from agent.trial.lab import FROZEN

    found = git.cmd.Git().version_info[:2]
    words = ".".join(map(str, found))
    if found < _OLDEST_GIT:
        return Finding("git", "bad", f"version {words}; {'.'.join(map(str, _OLDEST_GIT))} or newer is needed, please upgrade")
    try:
        repository = Repository(folder)
        repository.file_at(repository.head, train_file)
    except NightError as error:
        return Finding("git", "bad", str(error))
    changed = repository.changed(repository.head, train_file, *FROZEN)
    if changed:
        return Finding("git", "note", f"{', '.join(changed)} differs from HEAD; a night starts from what is committed")
    return Finding("git", "ok", f"{words}, {repository.root} at {repository.head[:7]}")


def check_agents(environ: Mapping[str, str]) -> Iterable[Finding]:
    """Each installed agent: does it start, is there a sign of a login? None is needed: `search` is built in."""
    absent = []
    for coder in choice.TABLE.values():
        if not coder.login_env and not coder.login_files:
            continue  # built in
        path = coder.find(environ)
        if path is None:
            absent.append(coder.name)
            continue
        code, said = said_by([path, "--version"], Path.cwd())
        if code != 0:
            yield Finding(coder.name, "note", f"{path} --version fails ({_first_line(said)}); reinstall it: {coder.install_hint}")
        elif not coder.logged_in(environ):
            yield Finding(coder.name, "note", f"installed, but there is no sign of a login: {coder.login_hint}")
        else:
            yield Finding(coder.name, "ok", f"{_first_line(said)}, with a login")
    if sys.platform == "darwin" and environ.get("SSH_CONNECTION"):
        locked = "over SSH the keychain is locked, and claude, copilot and cursor keep their login there"
        yield Finding("agent", "note", f"{locked}; in this session: security unlock-keychain, or set the agent's key as a variable")
    others = f"; not installed: {', '.join(absent)}" if absent else ""
    yield Finding("agent", "ok", f"without --agent a night takes {choice.detect(environ)[0].name}{others}")


def ask_agents(environ: Mapping[str, str], folder: Path, train_file: str) -> Iterable[Finding]:
    """Each installed agent, asked for one word as before a night. This costs what a short question costs, and takes a while."""
    if shutil.which("git") is None:
        return  # told by check_git; without it the next import fails
    from agent.proposal.check import ask_for_a_word

    try:
        source = train_file, (folder / train_file).read_bytes()
    except OSError as error:
        yield Finding("agents", "bad", f"{train_file} can't be read ({error}); run this in the project's folder")
        return
    for coder in choice.TABLE.values():
        if not (coder.login_env or coder.login_files) or coder.find(environ) is None:
            continue  # chat and local are asked before their night: only that knows their model
        with tempfile.TemporaryDirectory() as scratch:
            answer = ask_for_a_word(coder, Settings(), Path(scratch), source)
        cost = answer.usage.get("cost")
        price = f" (${cost:.4f})" if cost else ""
        yield Finding(coder.name, "ok" if answer.kind == "ok" else "note", answer.words + price)


def check_data(environ: Mapping[str, str]) -> Finding:
    home = data_home(environ)
    current = home / "current.json"
    if not current.exists():
        return Finding("data", "note", f"none prepared in {home}; a night prepares it, or: python prepare_mlx.py")
    again = "prepare it again: python prepare_mlx.py --dataset "
    try:
        entry: dict[str, Any] = json.loads(current.read_text("utf-8"))
        dataset = str(entry.get("dataset", "stories"))
        wanted = [Path(entry["train_dir"]) / name for name in ("meta.json", "train.bin")]
        wanted += [Path(entry["held_dir"]) / name for name in ("meta.json", "val.bin", "test.bin")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Finding("data", "bad", f"{current} cannot be read ({type(error).__name__}: {error}); {again}stories")
    for file in wanted:
        if not file.is_file() or file.stat().st_size == 0:
            return Finding("data", "bad", f"{file} is missing or empty; {again}{dataset}")
    if dataset == "stories" and entry.get("preset") in ("mac", "mac-max", "cuda"):
        words = "stories is small: a GPU reads it several times in five minutes, and then learns it by heart"
        return Finding("data", "note", f"{words}; {again}tinystories")
    return Finding("data", "ok", f"{entry.get('id')}, {sum(file.stat().st_size for file in wanted) / 2**20:.0f} MiB in {home}")


def check_framework(folder: Path, module: str) -> Iterable[Finding]:
    code, said = said_by([sys.executable, "-c", _ASK, module], folder)
    try:
        answer: dict[str, Any] = json.loads(said.splitlines()[-1]) if code == 0 else {}
    except (ValueError, IndexError):
        answer = {}
    mend = "pip install -e '.[torch]'" if module == "torch" else "make clean, then scripts/setup.sh"
    if not answer or answer.get("sum") != 64.0**3:
        why = said.strip().splitlines()[-1] if said.strip() else "no answer"
        yield Finding(module, "bad", f"does not work here ({why[:200]}); run {mend}")
        return
    if "harness" in answer:
        yield Finding("harness", "bad", f"prepare_mlx.py does not import ({answer['harness']}); run this in the project's folder")
    device = str(answer["device"])
    on_cpu = "cpu" in device.lower()
    slow = "; no GPU in use: fine for the demo, slow for a night" if on_cpu else ""
    yield Finding(module, "note" if on_cpu else "ok", f"{answer['version']} on {device}{slow}")
    if sys.platform == "linux" and on_cpu and module == "mlx":
        blas = answer.get("blas")
        none = "none found, products run about 50 times slower: `pip install mkl` (x86-64) or install the package libopenblas0"
        yield Finding("blas", "ok" if blas else "note", blas or none)


def check_disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.0f} GiB free in {folder}"
    if free < 2:
        return Finding("disk", "bad", f"{text}; a night needs 2 at the very least, 10 to be safe: remove old runs/ or clear space")
    return Finding("disk", "ok" if free >= 10 else "note", text if free >= 10 else f"{text}; 10 or more are safe")


def check_power() -> Iterable[Finding]:
    yield from (Finding("power", "note", warning) for warning in power.battery_warning())
    if power.battery() != "in use":
        yield Finding("power", "ok", "not on battery")
    if sys.platform == "darwin":
        awake = shutil.which("caffeinate") is not None
        told = "a night holds off idle sleep" if awake else "caffeinate is missing; set sleep to never"
        yield Finding("sleep", "ok" if awake else "note", told)
    elif power.battery() and not wsl():
        yield Finding("sleep", "note", "a laptop may suspend; start with: systemd-inhibit --what=sleep:idle python -m agent.loop")


def check_sandbox() -> Finding:
    cover = sandbox.available()
    return Finding("sandbox", "ok" if cover.present else "note", str(cover))


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[0][:100]


def launch_agent(clock: str, folder: Path) -> str:
    """A property list for launchd, with the user's PATH: launchd's own has no folder with their agents."""
    try:
        next_time(clock)
    except NightError as error:
        raise click.UsageError(str(error)) from None
    hour, minute = map(int, clock.split(":"))
    (folder / "runs").mkdir(exist_ok=True)  # launchd starts nothing whose log has no folder
    label, logs = "autoresearch.night", str(folder / "runs" / "launchd.log")
    content = {
        "Label": label, "WorkingDirectory": str(folder),
        "ProgramArguments": [sys.executable, "-m", "agent.loop", "--until", "07:00"],
        "EnvironmentVariables": {"PATH": os.environ["PATH"]}, "StandardOutPath": logs, "StandardErrorPath": logs,
        "StartCalendarInterval": {"Hour": hour, "Minute": minute},
        "ProcessType": "Interactive",  # others are held back, and trainings would be slower
    }  # fmt: skip
    place = f"~/Library/LaunchAgents/{label}.plist"
    return plistlib.dumps(content).decode() + (
        f"<!-- save it as {place}, then: launchctl bootstrap gui/$(id -u) {place}\n"
        f"     to remove it: launchctl bootout gui/$(id -u)/{label}\n"
        "     The Mac has to be awake at that time. An agent whose login is in the keychain needs you to be logged in. -->"
    )


def deeply(folder: Path) -> bool:
    """Run the long checks, write their file; whether none is bad."""
    from agent import deep  # fails to import where there is no git

    results = []
    for result in deep.examine(folder):
        results.append(result)
        _print_row(result.state, result.check, result.text)
    path = folder / "runs" / "doctor.json"
    deep.write(results, path)
    click.echo(f"written to {path}; attach it to an issue, whatever it says")
    return not any(result.state == "bad" for result in results)


def _print_row(state: str, subject: str, text: str) -> None:
    """One finding as one line; on a terminal a long text goes on below its beginning. rich heeds NO_COLOR, FORCE_COLOR and TERM."""
    console, colour = Rich(highlight=False), {"ok": "green", "note": "yellow", "bad": "red", "skip": "bright_black"}[state]
    line = Text.assemble((f"{state:<5}", colour), f"{subject:<10}")
    if sys.stdout.isatty():
        console.print(wrapped(line, text))
    else:
        console.print(line + Text(f" {text}"), soft_wrap=True)


@click.command()
@click.option("--train-file", default="train_mlx.py", show_default=True, help="The file a night would improve.")
@click.option("--launchd", metavar="HH:MM", help="Print a LaunchAgent that starts a night at this time, and how to install it.")
@click.option("--deep", "deeper", is_flag=True, help="Prove by short trainings what could only be guessed; about ten minutes.")
@click.option("--agents", "ask", is_flag=True, help="Ask each installed agent for one word; costs a few cents at most.")
@click.version_option(package_name="autoresearch-apple-silicon", prog_name="autoresearch")
def main(train_file: str, launchd: str | None, deeper: bool, ask: bool) -> None:
    """Check whether a night could run here; each line says ok or how to mend it."""
    if launchd is not None:
        click.echo(launch_agent(launchd, Path.cwd()))
        return
    if deeper:
        sys.exit(0 if deeply(Path.cwd()) else 1)
    bad = []
    for finding in examine(Path.cwd(), train_file, os.environ, ask):
        _print_row(finding.state, finding.subject, finding.text)
        bad += [finding.subject] if finding.state == "bad" else []
    click.echo(f"a night cannot run yet: mend {', '.join(bad)}" if bad else "a night could run: python -m agent.loop")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
