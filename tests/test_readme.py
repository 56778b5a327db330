"""The README tells the truth: its file map is the repository, its commands exist and take their options."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^ {4}((?:python|make) [^#\n]+?) *(?:#.*)?$", README, re.M)))
HIDDEN = {".ci", ".github", ".gitignore", "AGENTS.md", "CHANGELOG.md", "LICENSE", "README.md", "Makefile", "constraints.txt",
          "pyproject.toml"}  # a map needs no entry for these


def test_the_file_map_is_the_repository() -> None:
    listed = set(re.findall(r"^\| `([\w./]+)` \|", README, re.M))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    there = {name.split("/")[0] + ("/" if "/" in name else "") for name in tracked}
    assert listed == {name for name in there if name.strip("/") not in HIDDEN}


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python")])
def test_a_command_and_its_options_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    program = words[:2] if words[0] == "-m" else words[:1]
    if program == ["train_mlx.py"]:
        assert (ROOT / "train_mlx.py").exists()
        return
    shown = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    missing = [w for w in words if w.startswith("--") and not re.search(rf"{w}\b", shown.stdout)]
    assert not missing


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_a_make_target_exists(command: str) -> None:
    shown = subprocess.run(["make", "-n", command.split()[1]], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
