"""The doctor's lines, from real children, repositories and programs."""

import json
import os
import platform
import plistlib
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import git
import psutil
import pytest
from conftest import ROOT

from agent import doctor
from agent.doctor import check_agents, check_data, check_disk, check_framework, check_git
from agent.night import power
from agent.process.child import seconds_asleep
from agent.trial import sandbox
from harness.machine import load_fast_blas


@pytest.fixture
def checkout(tmp_path):
    """A user's checkout of the project, as far as the doctor looks."""
    folder = tmp_path / "my project"
    repo = git.Repo.init(folder)
    repo.git.config("user.email", "t@localhost")
    repo.git.config("user.name", "t")
    (folder / "train_mlx.py").write_text("LR = 1\n")
    shutil.copy(ROOT / "prepare_mlx.py", folder)
    shutil.copytree(ROOT / "harness", folder / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    repo.git.add("-A")
    repo.git.commit("-qm", "base")
    repo.close()
    return folder


@pytest.fixture
def data(tmp_path):
    """A prepared dataset; the environment that names it."""
    home = tmp_path / "data"
    for split, files in {"train": ("meta.json", "train.bin"), "held": ("meta.json", "val.bin", "test.bin")}.items():
        (home / split / "x").mkdir(parents=True)
        for name in files:
            (home / split / "x" / name).write_bytes(b"12345678")
    entry = {"id": "x", "dataset": "tinystories", "train_dir": str(home / "train" / "x"), "held_dir": str(home / "held" / "x")}
    (home / "current.json").write_text(json.dumps(entry))
    return {"AUTORESEARCH_HOME": str(home), "HOME": str(tmp_path)}


def call(folder: Path, env: dict[str, str], *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "agent.doctor", *options]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_a_machine_that_can_run_a_night(checkout, data):
    pytest.importorskip("mlx.core")
    result = call(checkout, data)
    assert result.returncode == 0, result.stdout + result.stderr
    *lines, last = result.stdout.splitlines()
    assert last == "a night could run: python -m agent.loop"
    assert all(re.match(r"(ok|note) +\w+ +\S", line) for line in lines), lines
    subjects = [line.split()[1] for line in lines]
    assert [name for name in ("python", "git", "agent", "data", "mlx", "disk", "power", "sandbox") if name not in subjects] == []
    assert re.search(r"^ok +git .*my project at [0-9a-f]{7}$", result.stdout, re.MULTILINE)


def test_what_is_bad_is_named_at_the_end_and_in_the_exit_code(checkout, data):
    (Path(data["AUTORESEARCH_HOME"]) / "held" / "x" / "val.bin").unlink()
    result = call(checkout, data)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "a night cannot run yet: mend data"


def test_without_git_it_says_how_to_get_it(checkout, data, tmp_path):
    (tmp_path / "empty").mkdir()
    result = call(checkout, {**data, "PATH": str(tmp_path / "empty")})
    assert result.returncode == 1
    assert re.search(r"^bad +git +not found on PATH; (install|run)", result.stdout, re.MULTILINE), result.stdout + result.stderr


def test_a_repository_a_night_can_start_from(checkout, tmp_path):
    assert check_git(checkout, "train_mlx.py").state == "ok"
    (checkout / "train_mlx.py").write_text("LR = 2\n")
    dirty = check_git(checkout, "train_mlx.py")
    assert dirty.state == "note"
    assert "train_mlx.py differs from HEAD" in dirty.text
    missing = check_git(checkout, "train_torch.py")
    assert missing.state == "bad"
    assert "git add train_torch.py" in missing.text
    (tmp_path / "plain").mkdir()
    assert "git init" in check_git(tmp_path / "plain", "train_mlx.py").text
    git.Repo.init(tmp_path / "new").close()
    assert "no commit" in check_git(tmp_path / "new", "train_mlx.py").text


def test_an_old_git_is_refused(checkout, tmp_path, monkeypatch):
    script = tmp_path / "bin" / "git"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho git version 2.20.1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    finding = check_git(checkout, "train_mlx.py")
    assert finding.state == "bad"
    assert "2.20" in finding.text
    assert "2.31 or newer" in finding.text


def test_data(data):
    home = Path(data["AUTORESEARCH_HOME"])
    assert check_data(data).state == "ok"
    (home / "train" / "x" / "train.bin").write_bytes(b"")
    empty = check_data(data)
    assert empty.state == "bad"
    assert empty.text.endswith("train.bin is missing or empty; prepare it again: python prepare_mlx.py --dataset tinystories")
    entry = json.loads((home / "current.json").read_text())
    (home / "train" / "x" / "train.bin").write_bytes(b"12345678")
    for preset, state in (("cpu", "ok"), ("mac", "note"), ("cuda", "note")):
        (home / "current.json").write_text(json.dumps({**entry, "dataset": "stories", "preset": preset}))
        assert check_data(data).state == state
    assert check_data(data).text.endswith("--dataset tinystories")
    for broken in ("{", "[]", "{}", '{"train_dir": 1, "held_dir": 2}'):
        (home / "current.json").write_text(broken)
        assert check_data(data).state == "bad"
        assert "current.json cannot be read" in check_data(data).text
    (home / "current.json").unlink()
    absent = check_data(data)
    assert absent.state == "note"
    assert "python prepare_mlx.py" in absent.text


def test_agents_are_started_and_their_login_looked_for(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {"claude": "echo '2.1.0 (Claude Code)'", "codex": "echo codex-cli 1.0", "gemini": "echo cannot load >&2; exit 3"}
    for name, body in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    findings = {one.subject: one for one in check_agents({"PATH": str(programs), "HOME": str(tmp_path), "CODEX_API_KEY": "x"})}
    assert findings["claude"].state == "note"
    assert "no sign of a login: " in findings["claude"].text
    assert (findings["codex"].state, findings["codex"].text) == ("ok", "codex-cli 1.0, with a login")
    assert findings["gemini"].state == "note"
    assert "--version fails (cannot load); reinstall it: " in findings["gemini"].text
    assert findings["agent"].text.startswith("without --agent a night takes codex; not installed: ")
    assert "claude" not in findings["agent"].text


def test_each_installed_agent_is_asked_on_request(checkout, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    result = {"type": "result", "is_error": False, "result": "ready", "total_cost_usd": 0.0123, "usage": {"output_tokens": 2}}
    for name, body in {"claude": f"print({json.dumps(result)!r})", "codex": "sys.exit('401 Unauthorized')"}.items():
        (programs / name).write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
        (programs / name).chmod(0o755)
    environ = {"PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(tmp_path)}
    monkeypatch.setenv("PATH", environ["PATH"])
    asked = {found.subject: found for found in doctor.ask_agents(environ, checkout, "train_mlx.py")}
    assert set(asked) == {"claude", "codex"}
    assert (asked["claude"].state, "answered in" in asked["claude"].text, "$0.0123" in asked["claude"].text) == ("ok", True, True)
    assert (asked["codex"].state, "codex login" in asked["codex"].text) == ("note", True)
    assert [found.state for found in doctor.ask_agents(environ, tmp_path, "train_mlx.py")] == ["bad"]


def test_framework_device_and_blas(checkout):
    pytest.importorskip("mlx.core")
    findings = {one.subject: one for one in check_framework(checkout, "mlx")}
    assert re.match(r"\d+\.\d+.* on Device", findings["mlx"].text)
    assert findings["mlx"].state == ("note" if "cpu" in findings["mlx"].text else "ok")
    if sys.platform == "linux" and "cpu" in findings["mlx"].text:
        name = load_fast_blas()  # the real harness's
        assert (findings["blas"].state, findings["blas"].text == name) == (("ok", True) if name else ("note", False))


def test_a_framework_that_does_not_import_and_a_broken_harness(checkout):
    (checkout / "prepare_mlx.py").write_text("def options(:\n")
    (checkout / "torch.py").write_text("raise ImportError('libcuda.so.1: cannot open')\n")
    (finding,) = check_framework(checkout, "torch")
    assert finding.state == "bad"
    assert "ImportError: libcuda.so.1: cannot open" in finding.text
    assert "pip install -e '.[torch]'" in finding.text
    pytest.importorskip("mlx.core")
    harness, *_ = check_framework(checkout, "mlx")
    assert (harness.subject, harness.state) == ("harness", "bad")
    assert "SyntaxError" in harness.text


@pytest.mark.parametrize(("free", "state"), [(1, "bad"), (5, "note"), (50, "ok")])
def test_disk(tmp_path, monkeypatch, free, state):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free << 30))
    finding = check_disk(tmp_path)
    assert finding.state == state
    assert f"{free} GiB free" in finding.text


@pytest.mark.parametrize(("cover", "state"), [(sandbox.BUBBLEWRAP, "ok"), (sandbox.Cover("none", (), ("anything",)), "note")])
def test_sandbox(monkeypatch, cover, state):
    monkeypatch.setattr(sandbox, "available", lambda: cover)
    assert doctor.check_sandbox().state == state
    assert "Not covered: " in doctor.check_sandbox().text


def test_a_launch_agent_starts_a_night_where_the_users_programs_are_found(checkout):
    done = call(checkout, {}, "--launchd", "23:15")
    assert done.returncode == 0, done.stderr
    made = plistlib.loads(done.stdout.partition("<!--")[0].encode())
    assert made["StartCalendarInterval"] == {"Hour": 23, "Minute": 15}
    assert made["WorkingDirectory"] == str(checkout)
    assert made["EnvironmentVariables"]["PATH"] == os.environ["PATH"]
    assert made["ProcessType"] == "Interactive", "launchd slows down any other kind"
    assert Path(made["StandardOutPath"]).parent.is_dir(), "launchd makes no folder"
    assert made["ProgramArguments"][1:3] == ["-m", "agent.loop"]
    assert made["ProcessType"] == "Interactive"
    assert Path(made["StandardOutPath"]).parent.is_dir(), "launchd makes no folder"
    assert "expected a time of day" in call(checkout, {}, "--launchd", "late").stderr


def test_windows_below_is_told(monkeypatch, tmp_path):
    def at(release, folder=tmp_path):
        monkeypatch.setattr(platform, "release", lambda: release)
        found = [*doctor.check_wsl(), *doctor.check_place(folder, {"HOME": str(tmp_path)})]
        return [(one.subject, one.state) for one in found], " ".join(one.text for one in found)

    assert at("6.8.0-31-generic")[0] == []
    assert at("4.4.0-19041-Microsoft")[0] == [("wsl", "bad")]
    found, words = at("6.6.87.2-microsoft-standard-WSL2")
    assert found == [("wsl", "ok"), ("sleep", "note")]
    assert f"{psutil.virtual_memory().total / 2**30:.0f} GiB of Windows' memory" in words
    assert "powercfg" in words
    found, words = at("6.6.87.2-microsoft-standard-WSL2", Path("/mnt/c/Users/me/autoresearch"))
    assert found[2:] == [("place", "note")]
    assert "Windows' side" in words


def test_in_wsl_a_sleeping_windows_is_noticed_by_the_wall_clock(monkeypatch):
    """It stops the virtual machine as a whole: only the wall clock, which is set afterwards, has moved on."""
    before = seconds_asleep()
    monkeypatch.setattr(platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    before, now = seconds_asleep(), time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    assert seconds_asleep() - before == pytest.approx(3600, abs=1)


def test_power_never_stops_a_night():
    findings = list(doctor.check_power())
    assert "power" in [one.subject for one in findings]
    assert {one.state for one in findings} <= {"ok", "note"}


@pytest.mark.parametrize(("plugged", "words"), [(None, []), (True, []), (False, ["running on battery"])])
def test_a_laptop_is_told_of_its_battery(monkeypatch, plugged, words):
    state = namedtuple("state", "percent secsleft power_plugged")
    monkeypatch.setattr(sys, "platform", "linux")  # on macOS pmset is asked: test_macos.py
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None if plugged is None else state(50, 1, plugged), raising=False)
    warnings = power.battery_warning()
    assert [warning[: len(start)] for warning, start in zip(warnings, words, strict=True)] == words
