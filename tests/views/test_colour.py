"""NO_COLOR, FORCE_COLOR, TERM=dumb and pipes: what the doctor, a night, its report and a preparation write to each."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from night_kit import ROOT, Bed

COLOUR = re.compile(r"\x1b\[(?:\d*;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;\dm]")
MOVES = re.compile(r"\x1b\[\??\d*[A-HJKhl]|\r(?!\n)")  # of the cursor; lines on a terminal end with \\r\\n
PROGRAMS = ("doctor", "night", "status", "report", "prepare")


@pytest.fixture(scope="module")
def beds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bed]:
    """A toy night that kept one experiment and discarded one, and a checkout with the real harness to prepare and to examine."""
    night = Bed(tmp_path_factory.mktemp("night"), "better worse")
    assert night.run("--experiments", "2", "--no-sandbox").returncode == 0
    real = Bed(tmp_path_factory.mktemp("real"))
    shutil.copy(ROOT / "prepare_mlx.py", real.repo)
    shutil.copytree(ROOT / "harness", real.repo / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    (real.repo / "text.txt").write_text("\n\n".join(f"{n} small cats sleep near {n % 7} green rivers." for n in range(600)))
    return {"night": night, "real": real}


def command(program: str, beds: dict[str, Bed], tmp_path: Path) -> tuple[list[str], Bed]:
    night, real = beds["night"], beds["real"]
    words = {
        "doctor": (["-m", "agent.doctor"], real),
        "night": (night.command("--experiments", "1", "--no-sandbox", tag=tmp_path.name)[1:], night),
        "status": (["-m", "agent.loop", "--status", "--tag", "night"], night),
        "report": ([str(ROOT / "scripts" / "report.py"), "runs/night", "--no-picture"], night),
        "prepare": (["prepare_mlx.py", "--dataset", "text:text.txt", "--preset", "tiny"], real),
    }
    return [sys.executable, *words[program][0]], words[program][1]


def written(program: str, beds: dict[str, Bed], folder: Path, terminal: bool, **variables: str) -> str:
    """All that a program writes to a terminal, or to a pipe."""
    argv, bed = command(program, beds, folder)
    known = {k: v for k, v in bed.environment().items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    env = {**known, "COLUMNS": "80", "TERM": "xterm-256color", "AUTORESEARCH_HOME": str(folder / "data"), **variables}
    if not terminal:
        done = subprocess.run(argv, cwd=bed.repo, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    master, slave = pty.openpty()
    child, text = subprocess.Popen(argv, cwd=bed.repo, env=env, stdin=slave, stdout=slave, stderr=slave), b""
    os.close(slave)
    while part := _read(master):
        text += part
    os.close(master)
    assert child.wait(60) == 0, text
    return text.decode(errors="replace")


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # the program has ended
        return b""


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("terminal", "variables"), [
    pytest.param(True, {"NO_COLOR": "1"}, id="NO_COLOR"),
    pytest.param(True, {"TERM": "dumb"}, id="dumb", marks=pytest.mark.slow),
    pytest.param(False, {}, id="pipe", marks=pytest.mark.slow),
    pytest.param(False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, id="NO_COLOR wins", marks=pytest.mark.slow),
])  # fmt: skip
def test_where_nobody_wants_colours_there_are_none(
    program: str, terminal: bool, variables: dict[str, str], beds: dict[str, Bed], tmp_path: Path
) -> None:
    text = written(program, beds, tmp_path, terminal, **variables)
    assert not COLOUR.search(text), text
    if not terminal or "TERM" in variables:
        assert not MOVES.search(text), f"nothing is drawn over: {text!r}"


@pytest.mark.parametrize(("terminal", "variables"), [
    pytest.param(True, {}, id="terminal", marks=pytest.mark.slow), pytest.param(False, {"FORCE_COLOR": "1"}, id="FORCE_COLOR"),
])  # fmt: skip
def test_where_they_are_wanted_they_are_there_and_a_file_is_no_terminal(
    terminal: bool, variables: dict[str, str], beds: dict[str, Bed], tmp_path: Path
) -> None:
    assert COLOUR.search(written("doctor", beds, tmp_path, terminal, **variables))
    for program in ("night", "prepare"):
        text = written(program, beds, tmp_path, terminal, **variables)
        assert bool(MOVES.search(text)) is terminal, f"{program}: {text!r}"
