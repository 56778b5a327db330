"""scripts/setup.sh says what would make the set-up useless before it begins; both ways to install take the same versions."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def setup(folder: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script with programs of ours before those of the system; nothing is ever installed."""
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    (bin := folder / "bin").mkdir()
    for name, answer in {"uv": 'echo "uv $*"; exit 9', "python3": "exit 9", **programs}.items():
        (bin / name).write_text(f"#!/bin/sh\n{answer}\n")
        (bin / name).chmod(0o755)
    for version in range(10, 15):
        (bin / f"python3.{version}").symlink_to(bin / "python3")
    env = {"PATH": f"{bin}:{os.environ['PATH']}", "HOME": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run([folder / "scripts" / "setup.sh"], env=env, capture_output=True, text=True, timeout=60)


def start_repository(folder: Path) -> None:
    subprocess.run("git init -q && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m start", shell=True, cwd=folder,
                   check=True)


@pytest.mark.parametrize("state", ["a downloaded ZIP", "no commit yet", "inside another checkout"])
def test_a_folder_that_no_night_could_run_in_is_told_with_a_command_that_mends_it(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    if state == "no commit yet":
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    if state == "inside another checkout":
        start_repository(tmp_path)
    done = setup(folder)
    assert done.returncode == 1
    assert "is not a git repository with a commit" in done.stderr
    assert not (folder / ".venv").exists()
    mend = done.stderr.splitlines()[1].strip()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}  # a person without an identity
    subprocess.run(mend, shell=True, cwd=folder, env=env, check=True)
    shutil.rmtree(folder / "bin")
    assert "need uv, or Python" in setup(folder).stderr, "past the check"


def test_a_checkout_is_known_under_any_spelling_of_its_path(tmp_path: Path) -> None:
    """On a Mac's disk /users/U/Code is /Users/u/code, and git prints another spelling than the shell."""
    (project := tmp_path / "project").mkdir()
    start_repository(project)
    git = shutil.which("git")
    (tmp_path / "Project").symlink_to(project)
    answer = f'case "$*" in *show-toplevel*) echo {tmp_path}/Project;; *) exec {git} "$@";; esac'
    assert "need uv, or Python" in setup(project, git=answer).stderr, "past the check"


@pytest.mark.parametrize(("programs", "words"), [
    ({"git": "echo 'xcode-select: note: no developer tools were found' >&2; exit 1"}, "git does not run; install it: xcode-select"),
    ({"uname": "echo Linux", "getconf": "echo glibc 2.31"}, "this system has 2.31; use Ubuntu 22.04"),
    ({"uname": "echo Linux", "getconf": "exit 1"}, "this system has another C library"),
    ({"uname": "echo Darwin", "sysctl": "echo 1", "sw_vers": "echo 13.6"}, "MLX needs macOS 14 or later, this is 13.6"),
    ({"uname": "echo Darwin", "sysctl": "exit 1"}, "no Apple Silicon"),
])
def test_a_system_that_mlx_cannot_run_on_is_told_first(tmp_path: Path, programs: dict[str, str], words: str) -> None:
    start_repository(tmp_path)
    done = setup(tmp_path, **programs)
    assert done.returncode == 1
    assert words in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("machine", ["x86_64", "arm64"])
def test_a_python_for_intel_is_left_to_uv_or_told(tmp_path: Path, machine: str) -> None:
    """As every Python is that comes for both, in a terminal that runs under Rosetta."""
    start_repository(tmp_path)
    mac = {"uname": "echo Darwin", "sysctl": "echo 1", "sw_vers": "echo 26.1",
           "python3": f'[ "$1" = -c ] && case "$2" in *machine*) echo {machine};; esac'}
    assert ("--python python3" in setup(tmp_path, **mac).stdout) == (machine == "arm64")
    if not shutil.which("uv"):
        (tmp_path / "bin" / "uv").unlink()
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run([tmp_path / "scripts" / "setup.sh"], env=env, capture_output=True, text=True, timeout=60)
        assert ("set to Open using Rosetta" in done.stderr) == (machine == "x86_64")


@pytest.mark.parametrize("works", [True, False])
def test_an_environment_that_works_is_kept_with_its_extras(tmp_path: Path, works: bool) -> None:
    start_repository(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable if works else tmp_path / "removed")
    (tmp_path / ".venv" / "extra").touch()
    done = setup(tmp_path, uv='echo "uv $*"')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv" / "extra").exists() == works
    assert ("uv venv" in done.stdout) != works
    assert "uv pip install" in done.stdout


def test_pip_and_uv_are_told_the_same_versions() -> None:
    """Two lists, because neither program reads the other's."""
    wanted = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    block = re.search(r"^constraint-dependencies = \[.*?\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert block is not None
    assert [line.strip()[1:-2] for line in block[1].splitlines()] == wanted


@pytest.mark.parametrize("command", ["-m agent.loop --status", "-m agent.doctor", "prepare_mlx.py --list", "train_mlx.py"])
def test_a_python_without_the_packages_is_told_which_one_has_them(command: str) -> None:
    done = subprocess.run([sys.executable, "-S", *command.split()], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable} has none of the project's packages; first: source .venv/bin/activate")
