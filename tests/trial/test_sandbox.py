"""The sandbox, run for real where the machine has one; the macOS profile also as text."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from agent.process.child import Bounds, Outcome, run
from agent.process.environment import clean_env
from agent.trial import sandbox
from agent.trial.rights import rules
from agent.trial.sandbox import HIDDEN, READ, WRITE, bubblewrap, seatbelt, seatbelt_profile

COVER = sandbox.available()
needs_sandbox = pytest.mark.skipif(not COVER.present, reason=str(COVER))
needs_bubblewrap = pytest.mark.skipif(COVER != sandbox.BUBBLEWRAP, reason=f"needs bubblewrap with a PID namespace; here {COVER}")


@pytest.fixture
def rooms(tmp_path):
    """The folders of a trial, each with something in it."""
    folders = {name: tmp_path / name for name in ("run", "tmp", "worktree", "train", "held", "checkout")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    return folders


@pytest.fixture
def inside(rooms, tmp_path):
    """Run a Python program as the trainer is run."""

    def start(code: str, stop=lambda: False, **env: str) -> Outcome:
        argv = sandbox.wrap(
            [sys.executable, "-c", textwrap.dedent(code)],
            rules([rooms["run"], rooms["tmp"]], [rooms["worktree"], rooms["train"]], [rooms["held"], tmp_path / "absent"]),
        )
        where = {name.upper(): str(folder) for name, folder in rooms.items()}
        environment = clean_env({"TMPDIR": str(rooms["tmp"]), **where, **env})
        log, bounds = tmp_path / "log", Bounds(120)
        return run(argv, cwd=rooms["worktree"], env=environment, log=log, bounds=bounds, stop=stop, grace=0.3)

    return start


TRY = """
import os
def attempt(what):
    try:
        return what()
    except OSError as error:
        return type(error).__name__
"""


@needs_sandbox
def test_only_the_run_folder_and_tmpdir_can_be_written(inside, rooms, tmp_path):
    home = Path.home() / ".autoresearch-sandbox-test"
    outcome = inside(
        TRY
        + """
for name in ("RUN", "TMP"):
    open(os.environ[name] + "/new", "w").write("x")
for place in [os.environ[name] + "/file" for name in ("WORKTREE", "TRAIN", "CHECKOUT")] + [os.environ["HOME_FILE"]]:
    assert attempt(lambda: open(place, "w")) in ("OSError", "PermissionError", "FileNotFoundError"), place
assert attempt(lambda: os.unlink(os.environ["TRAIN"] + "/file")) != None
assert attempt(lambda: os.chmod(os.environ["WORKTREE"] + "/file", 0o777)) != None
print("done")
""",
        HOME_FILE=str(home),
    )
    assert outcome.tail() == "done\n"
    assert not home.exists()
    assert (rooms["run"] / "new").read_text() == "x"
    assert [folder.name for folder in rooms.values() if (folder / "file").read_text() != folder.name] == []


@needs_sandbox
def test_held_out_data_and_logins_are_hidden_and_training_data_is_not(rooms, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_rsa").write_text("planted")
    (home / ".netrc").write_text("planted")
    (home / "open").write_text("open")
    monkeypatch.setenv("HOME", str(home))
    files = [rooms["held"] / "file", home / ".ssh" / "id_rsa", home / ".netrc", home / "open", rooms["train"] / "file"]
    code = TRY + "import sys\nfor file in sys.argv[1:]: print(attempt(lambda: open(file).read()))"
    argv = sandbox.wrap(
        [sys.executable, "-c", code, *files], rules([rooms["run"]], [rooms["train"], home], [rooms["held"]])
    )
    outcome = run(argv, cwd=rooms["run"], env=clean_env(), log=tmp_path / "log", bounds=Bounds(60))
    held, key, netrc, plain, train = outcome.tail().split("\n")[:5]
    assert (plain, train) == ("open", "train")
    assert "held" not in held
    assert "planted" not in key + netrc
    assert outcome.ok


@needs_sandbox
def test_the_innermost_rule_decides(rooms, tmp_path):
    (rooms["held"] / "inner").mkdir()
    code = TRY + "print(attempt(lambda: open('../file').read())); open('written', 'w')"
    argv = sandbox.wrap([sys.executable, "-c", code], rules([rooms["held"] / "inner"], hidden=[rooms["held"]]))
    outcome = run(argv, cwd=rooms["held"] / "inner", env=clean_env(), log=tmp_path / "log", bounds=Bounds(60))
    assert outcome.tail().strip() in ("FileNotFoundError", "PermissionError")
    assert (rooms["held"] / "inner" / "written").exists()


@needs_sandbox
def test_there_is_no_network(inside):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = TRY + f"import socket; print(attempt(lambda: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)))"
        socket.create_connection(server.getsockname(), 5).close()
        refused = inside(code)
        assert refused.ok
        assert refused.tail().strip() in ("ConnectionRefusedError", "PermissionError", "OSError")


@needs_sandbox
def test_shared_memory_and_child_processes_work(inside):
    outcome = inside(
        """
        import multiprocessing, numpy as np
        from multiprocessing import shared_memory
        def fill(name):
            block = shared_memory.SharedMemory(name)
            np.frombuffer(block.buf, np.float32)[:] = 7
            block.close()
        if __name__ == "__main__":
            block = shared_memory.SharedMemory(create=True, size=4 << 20)
            context = multiprocessing.get_context("fork")
            child = context.Process(target=fill, args=(block.name,))
            child.start(); child.join()
            array = np.frombuffer(block.buf, np.float32)
            print(float(array.sum()) == 7 * array.size, child.exitcode)
            del array
            block.close(); block.unlink()
            with context.Lock():
                pass
        """
    )
    assert outcome.tail() == "True 0\n"


@needs_sandbox
def test_an_end_reaches_into_the_sandbox(inside, rooms):
    marker = f"boxed-{os.getpid()}"
    outcome = inside(
        f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        block = bytearray(80 << 20)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", "{marker}"], start_new_session=True)
        time.sleep(1.5)  # for memory to be measured
        open(os.environ["RUN"] + "/up", "w")
        time.sleep(1000)
        """,
        stop=(rooms["run"] / "up").exists,
    )
    assert outcome.reason == "stopped"
    assert outcome.peak_rss_mb > 80
    deadline = time.monotonic() + 20
    while any(marker in one.info["cmdline"] for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_sandbox
def test_exit_codes_and_signals_come_out(inside):
    assert inside("raise SystemExit(4)").exit_code == 4
    died = inside("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert (died.exit_code, died.signal) == (None, signal.SIGSEGV)


@needs_bubblewrap
def test_other_processes_and_sockets_cannot_be_seen(inside, tmp_path):
    path = Path("/tmp") / f"autoresearch-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        try:
            outcome = inside(
                TRY
                + f"""
import socket
print(attempt(lambda: socket.socket(socket.AF_UNIX).connect({str(path)!r})))
print(os.path.exists("/proc/{os.getpid()}/environ") and str(os.getpid()) != "{os.getpid()}")
print(sum(name.isdigit() for name in os.listdir("/proc")) < 5)
"""
            )
        finally:
            path.unlink()
    assert outcome.tail() == "FileNotFoundError\nFalse\nTrue\n"


@needs_bubblewrap
@pytest.mark.skipif(shutil.which("mount") is None, reason="needs the program mount")
def test_the_walls_cannot_be_remounted(inside, rooms):
    code = TRY + "import subprocess; print(subprocess.run(['mount', '-o', 'remount,rw,bind', os.environ['TRAIN']]).returncode != 0)"
    assert inside(code).tail().endswith("True\n")
    assert inside(TRY + "print(attempt(lambda: open(os.environ['TRAIN'] + '/new', 'w')))").tail() == "OSError\n"


@needs_bubblewrap
def test_a_trainer_on_mlx_runs_inside(inside, rooms):
    pytest.importorskip("mlx.core")
    outcome = inside(
        """
        import mlx.core as mx
        print(mx.compile(lambda x: mx.tanh(x) * 2 + 1)(mx.zeros(8)).sum().item())
        """
    )
    assert outcome.tail() == "8.0\n"


@needs_sandbox
def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected .*absent to exist.*create it first"):
        rules([tmp_path / "absent"])


def test_without_a_sandbox_the_command_is_unchanged_and_the_cover_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox._detect.cache_clear()
    try:
        assert sandbox.wrap(["python", Path("train_mlx.py")], rules([tmp_path])) == ["python", "train_mlx.py"]
        cover = sandbox.available()
        assert not cover.present
        assert "run with your rights and network (bwrap is not installed" in str(cover)
    finally:
        sandbox._detect.cache_clear()


def test_a_sandbox_that_fails_its_probe_is_not_used(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    sandbox._detect.cache_clear()
    try:
        assert "does not work here: bwrap: No permissions" in str(sandbox.available())
    finally:
        sandbox._detect.cache_clear()


# --- as text

def test_the_macos_profile_lets_a_command_pass_through_hidden_folders_to_what_is_open_inside():
    given = {"/h/runs": HIDDEN, "/h/runs/night/trials/0001-1": WRITE, "/h/runs/night/worktree": READ}
    profile = seatbelt_profile(given)
    lines = profile.splitlines()
    hidden = lines.index('(deny file* (subpath "/h/runs"))')
    for folder in ("/h/runs", "/h/runs/night", "/h/runs/night/trials"):
        assert lines.index(f'(allow file-read-metadata (literal "{folder}"))') > hidden
    assert "0001-1" not in " ".join(line for line in lines if "metadata" in line)
    assert '(literal "/h")' not in profile


RULES = {"/home/u": READ, "/home/u/held": HIDDEN, '/home/u/runs/a "b"\\c': WRITE, "/home/u/held/open": READ}


def test_the_macos_profile_denies_and_opens_in_the_right_order():
    profile = seatbelt_profile(RULES)
    lines = profile.splitlines()
    assert lines[:3] == ["(version 1)", "(allow default)", "(deny network*)"]
    order = [
        "(deny file-write*)",
        '(deny file* (subpath "/home/u/held"))',
        '(allow file* (subpath "/home/u/held/open"))',
        '(deny file-write* file-link (subpath "/home/u/held/open"))',
    ]
    assert [lines.index(line) for line in order] == sorted(lines.index(line) for line in order)
    assert '(allow file* (subpath "/home/u/runs/a \\"b\\"\\\\c"))' in lines
    assert "lsopen" in profile
    assert "lsopen" not in seatbelt_profile(RULES, strict=False)
    assert seatbelt(["python", "x.py"], RULES) == ["/usr/bin/sandbox-exec", "-p", profile, "python", "x.py"]


@pytest.mark.skipif(sys.platform != "darwin", reason="sandbox-exec is macOS's")
def test_macos_accepts_the_profile(tmp_path):
    rules = {os.path.realpath(tmp_path): WRITE}
    argv = seatbelt(["/usr/bin/true"], rules, strict=False)
    assert subprocess.run(argv, check=False).returncode == 0


def test_the_bubblewrap_command_with_and_without_pid_namespace():
    strict, weak = bubblewrap(["true"], RULES), bubblewrap(["true"], RULES, strict=False)
    assert "--unshare-pid" in strict
    assert "--unshare-pid" not in weak
    assert strict[-2:] == ["--", "true"]
    for one in (strict, weak):
        assert "--unshare-net" in one
        assert "--die-with-parent" in one
        assert one[one.index("--cap-drop") + 1] == "ALL"
        assert one.index("/home/u/held") < one.index("/home/u/held/open")
