"""The spawner against real children that misbehave."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from conftest import PLANTED, ROOT
from hypothesis import given
from hypothesis import strategies as st

from agent.files import remove
from agent.process import supervise
from agent.process.child import Bounds, Outcome, run, said_by
from agent.process.environment import clean_env
from agent.process.leftovers import end_leftovers
from agent.process.output import BoundedLog

PATIENCE = 60.0  # seconds; far more than anything here needs, even on a busy machine


@pytest.fixture
def child(tmp_path):
    """Run a Python program under the spawner, with generous bounds unless told otherwise."""

    def start(code: str, **options) -> Outcome:
        wanted = {"wall_seconds": PATIENCE, **options.pop("bounds", {})}
        argv = [sys.executable, "-c", textwrap.dedent(code)]
        settings = {"cwd": tmp_path, "env": clean_env(), "log": tmp_path / "child.log", "grace": 0.3, **options}
        return run(settings.pop("argv", argv), bounds=Bounds(**wanted), **settings)

    return start


def living(marker: str) -> list[int]:
    """Processes with this word in their command line."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.status() != psutil.STATUS_ZOMBIE and any(marker in word for word in one.cmdline()):
                found.append(one.pid)
        except psutil.Error:
            continue
    return found


def eventually(condition) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_exit_code_output_and_peak_memory_are_reported(child):
    outcome = child("import sys; b = bytearray(60 << 20); print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (outcome.exit_code, outcome.signal, outcome.reason, outcome.ok) == (3, None, "exited", False)
    assert sorted(outcome.tail().split()) == ["err", "out"]
    assert 60 < outcome.peak_rss_mb < 1000
    assert 0 < outcome.seconds < PATIENCE
    assert outcome.suspended_seconds == 0


def test_death_by_a_signal_is_reported_as_that_signal(child):
    outcome = child("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert (outcome.exit_code, outcome.signal, outcome.reason) == (None, signal.SIGSEGV, "exited")


def test_standard_output_can_go_to_a_file_of_its_own(child, tmp_path):
    outcome = child("import sys; print('score'); print('noise', file=sys.stderr)", stdout_to=tmp_path / "deep" / "out")
    assert outcome.ok
    assert (tmp_path / "deep" / "out").read_text() == "score\n"
    assert outcome.log.read_text() == "noise\n"


def test_a_long_prompt_is_delivered_even_to_a_child_that_does_not_read(child):
    prompt = "añ" * 300_000
    assert child("import sys; print(len(sys.stdin.buffer.read()))", stdin=prompt).tail() == f"{len(prompt.encode())}\n"
    assert child("pass", stdin=prompt).ok
    assert child("import sys; print(repr(sys.stdin.read()))").tail() == "''\n"


@pytest.mark.parametrize("name", ["no-such-program-anywhere", "/no/such/program", "./not-executable"])
def test_a_missing_program_is_named(child, tmp_path, name):
    (tmp_path / "not-executable").write_text("#!/bin/sh\n")
    outcome = child("", argv=[name])
    assert (outcome.exit_code, outcome.reason) == (None, "missing")
    assert f"expected '{name}' to be" in outcome.tail()
    assert "install it" in outcome.tail()


def test_a_program_with_a_missing_interpreter_is_missing(child, tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    outcome = child("", argv=[str(script)])
    assert outcome.reason == "missing"
    assert "cannot start" in outcome.tail()


def test_a_missing_working_directory_is_named(child, tmp_path):
    outcome = child("pass", cwd=tmp_path / "gone")
    assert outcome.reason == "missing"
    assert "gone does not exist" in outcome.tail()


def test_a_child_that_ignores_term_is_killed_after_the_grace(child, tmp_path):
    outcome = child(
        """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print('deaf', flush=True)
        open('up', 'w')
        time.sleep(1000)
        """,
        stop=(tmp_path / "up").exists,
    )
    assert (outcome.reason, outcome.signal) == ("stopped", signal.SIGKILL)
    assert outcome.tail() == "deaf\n"


def test_a_child_may_tidy_up_on_term(child, tmp_path):
    outcome = child(
        """
        import signal, sys, time
        def tidy(number, frame):
            print('tidied', flush=True)
            sys.exit(9)
        signal.signal(signal.SIGTERM, tidy)
        open('up', 'w')
        time.sleep(1000)
        """,
        stop=(tmp_path / "up").exists,
        grace=20.0,
    )
    assert (outcome.reason, outcome.exit_code) == ("stopped", 9)
    assert outcome.tail() == "tidied\n"


def test_the_wall_clock_is_a_limit(child):
    outcome = child("import time; time.sleep(1000)", bounds={"wall_seconds": 1.0})
    assert (outcome.reason, outcome.signal) == ("wall", signal.SIGTERM)
    assert outcome.seconds >= 1.0


FORK_AWAY = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        {change}
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1000)', '{marker}'] {environ})
    os._exit(0)
os.wait()
time.sleep({stay})
"""


@pytest.mark.parametrize("stay", [0, 1000], ids=["parent exits", "parent stays"])
def test_a_grandchild_in_another_session_is_ended(child, stay, tmp_path):
    marker = f"away-{os.getpid()}-{stay}"
    code = FORK_AWAY.format(marker=marker, stay=stay, change="pass", environ="")
    outcome = child(code, bounds={"wall_seconds": 2.0 if stay else PATIENCE})
    assert outcome.reason == ("wall" if stay else "exited")
    assert living(marker) == []


@pytest.mark.skipif(sys.platform != "linux", reason="a process without marker and parent cannot be found on macOS")
def test_a_grandchild_that_also_drops_its_environment_and_pipes_is_ended(child):
    marker = f"bare-{os.getpid()}"
    change = "os.closerange(0, 3)"
    code = FORK_AWAY.format(marker=marker, stay=0, change=change, environ=", {}").replace("execv(", "execve(")
    assert child(code).reason == "exited"
    assert living(marker) == []


def test_a_child_that_closes_its_pipes_and_goes_on_is_waited_for(child, tmp_path):
    outcome = child("import os, time; os.closerange(0, 3); time.sleep(1); open('done', 'w'); os._exit(4)")
    assert outcome.exit_code == 4
    assert (tmp_path / "done").exists()


def test_a_child_that_closes_its_pipes_still_meets_its_limit(child):
    assert child("import os, time; os.closerange(0, 3); time.sleep(1000)", bounds={"wall_seconds": 1.5}).reason == "wall"


def test_output_without_end_and_without_newline_is_bounded_on_disk_and_in_memory(child):
    before = psutil.Process().memory_info().rss
    outcome = child(
        """
        import os
        os.write(1, b'HEAD')
        block = b'x' * (1 << 20)
        for _ in range(150):
            rest = block
            while rest:
                rest = rest[os.write(1, rest):]
        os.write(1, b'TAIL')
        """,
        bounds={"log_bytes": 2 << 20},
    )
    assert outcome.ok
    content = outcome.log.read_bytes()
    assert content.startswith(b"HEADxxx")
    assert content.endswith(b"xxxTAIL")
    assert b"bytes left out" in content
    assert len(content) < (2 << 20) + 100
    assert psutil.Process().memory_info().rss - before < 40 << 20


def test_a_flood_is_ended(child):
    outcome = child("while True: print('y' * 100000)", bounds={"log_bytes": 10_000})
    assert outcome.reason == "log"
    assert outcome.log.stat().st_size < 10_100


def test_output_that_is_no_text_becomes_safe_text(child):
    written = rb"ok \xff\xfe\x80 \x1b[31mred\x1b[0m \x00\x07 \xe2\x80\xaeevil\r\n1%\r2%\r3%\n"
    outcome = child(f"import os; os.write(1, b'{written.decode()}')")
    assert outcome.ok
    assert outcome.log.read_bytes().startswith(b"ok \xff\xfe\x80")
    assert outcome.tail() == "ok ��� red  evil\n3%\n"


def test_silence_ends_a_child_and_output_keeps_it_alive(child):
    chatty = "import time\nfor _ in range(10): print('.', flush=True); time.sleep(0.35)"
    assert child(chatty, bounds={"idle_seconds": 3.0}).ok
    assert child("import time; time.sleep(1000)", bounds={"idle_seconds": 1.0}).reason == "idle"


def test_memory_of_the_whole_family_is_limited(child):
    hog = """
        import subprocess, sys, time
        hog = 'b = bytearray(150 << 20); import time; time.sleep(1000)'
        both = [subprocess.Popen([sys.executable, '-c', hog]) for _ in range(2)]
        time.sleep(1000)
        """
    outcome = child(hog, bounds={"memory_bytes": 250 << 20})
    assert outcome.reason == "memory"
    assert outcome.peak_rss_mb > 250


def test_a_full_directory_ends_a_child(child, tmp_path):
    outcome = child(
        "import time\nopen('big', 'wb').write(b'x' * (8 << 20)); time.sleep(1000)",
        bounds={"directories": (tmp_path / "absent", tmp_path), "directory_bytes": 4 << 20},
    )
    assert outcome.reason == "disk"


@pytest.mark.parametrize("how", ["os.unlink('d/big')", "os.chmod('d', 0)"])
def test_a_file_that_cannot_be_found_does_not_fill_the_disk(child, tmp_path, how):
    """Its bytes are in no folder that can be counted; the disk tells."""
    code = f"""
        import os, time
        os.mkdir('d')
        big = open('d/big', 'wb')
        {how}
        for _ in range(64):
            big.write(os.urandom(1 << 20))
            big.flush()
            time.sleep(0.05)
        time.sleep(1000)
        """
    spare = shutil.disk_usage(tmp_path).free - (16 << 20)
    outcome = child(code, bounds={"directories": (tmp_path / "absent", tmp_path), "directory_bytes": 1 << 40, "spare_bytes": spare})
    assert outcome.reason == "disk"


def test_folders_too_deep_to_measure_end_a_child(child, tmp_path):
    folder = tmp_path / "deep"
    folder.mkdir()
    try:
        outcome = child("import os, time; os.chdir('deep')\nfor _ in range(1900): os.mkdir('d'); os.chdir('d')\ntime.sleep(60)",
                        bounds={"directories": (folder,), "directory_bytes": 1 << 40})
        assert outcome.reason == "disk"
    finally:
        remove(folder)


def test_pipes_where_the_driver_writes_and_reads_hold_it_up_for_no_time(child, tmp_path):
    for name in ("child.log", "out", ".child.pid.new", "child.pid", "other.pid"):
        os.mkfifo(tmp_path / name)
    outcome = child("print('said')", stdout_to=tmp_path / "out", pidfile=tmp_path / "child.pid")
    assert outcome.ok
    assert (tmp_path / "out").read_text() == "said\n"
    (tmp_path / "huge.pid").write_text('{"marker": "m", "processes": [{"pid": 1' + "0" * 400 + ', "start": 1e400}]}')
    (tmp_path / "deep.pid").write_text("[" * 50000)
    (tmp_path / "folder.pid").mkdir()
    assert end_leftovers(tmp_path) == []
    assert list(tmp_path.glob("*.pid")) == []


def test_a_short_command_is_asked_what_it_says(tmp_path):
    code = "import os, sys; print(sys.argv[1]); print('but', file=sys.stderr); sys.exit(int(sys.argv[2]))"
    assert said_by([sys.executable, "-c", code, "hello", "0"]) == (0, "hello")
    assert said_by([sys.executable, "-c", code, "", "3"]) == (3, "but"), "without an output its complaint is what it said"
    assert said_by([sys.executable, "-c", "import os; print(os.getcwd())"], tmp_path) == (0, str(tmp_path.resolve()))
    assert said_by([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.1)[0] is None
    ending, said = said_by(["no-such-program"])
    assert (ending, "found none" in said) == (None, True)


def test_stop_and_watch_end_a_child_with_their_reason(child, tmp_path):
    flag = tmp_path / "flag"
    code = "import time; open('flag', 'w'); time.sleep(1000)"
    assert child(code, stop=flag.exists).reason == "stopped"
    flag.unlink()
    assert child(code, watch=lambda: "nan" if flag.exists() else None).reason == "nan"


def test_an_exception_in_watch_ends_the_child_first(child):
    marker = f"watched-{os.getpid()}"

    def fail():
        if living(marker):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        child(f"import time; time.sleep(1000)  # {marker}", watch=fail)
    assert living(marker) == []


def test_a_family_whose_output_fills_the_disk_is_ended_first(child, full_disk):
    marker = f"filling-{os.getpid()}"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
    code = f"""
        import subprocess, sys, time
        deaf = subprocess.Popen([sys.executable, "-c", {deaf!r}, "{marker}"], stdout=subprocess.PIPE, start_new_session=True)
        deaf.stdout.readline()
        print('x' * 200_000, flush=True)
        time.sleep(1000)
        """
    full_disk(10_000)
    with pytest.raises(OSError, match="File too large"):
        child(code)
    assert living(marker) == []


def test_a_disk_that_is_full_meanwhile_is_no_matter_to_a_child_that_prints_nothing(child, full_disk, tmp_path):
    outcome = child("import time; time.sleep(0.5)", pidfile=tmp_path / "child.pid", watch=lambda: full_disk(0))
    assert outcome.ok
    assert not (tmp_path / "child.pid").exists()


def test_whatever_a_child_puts_in_the_place_of_its_record_is_removed(child, tmp_path):
    code = "import os, time; time.sleep(0.5); os.remove('child.pid'); os.makedirs('child.pid/a')"
    assert child(code, pidfile=tmp_path / "child.pid").ok
    assert not (tmp_path / "child.pid").exists()


def test_a_child_that_kills_or_stops_its_supervisor_gains_nothing(child, monkeypatch):
    monkeypatch.setattr(supervise, "KILL_SECONDS", 0.5)  # what the driver gives a supervisor that does not answer
    for number in ("SIGKILL", "SIGSTOP"):
        marker = f"{number}-{os.getpid()}"
        code = f"import os, signal, time; os.kill(os.getppid(), signal.{number}); time.sleep(1000)  # {marker}"
        outcome = child(code, bounds={"wall_seconds": 1.0})
        assert not outcome.ok
        assert living(marker) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_child_that_writes_to_its_supervisors_pipe_cannot_confuse_the_driver(child, tmp_path):
    code = r"""
        import os
        pipes = f"/proc/{os.getppid()}/fd"
        for name in os.listdir(pipes):
            try:
                pipe = os.open(f"{pipes}/{name}", os.O_WRONLY | os.O_NONBLOCK)
                os.write(pipe, b'[' * 5000 + b'\n\xff\n[1]\n{"exit": "x", "left": []}\n{"pid": -1}\n{"peak_kb": {}}\n')
            except OSError:
                pass
        raise SystemExit(5)
        """
    outcome = child(code, pidfile=tmp_path / "child.pid")  # it may have told the supervisor to end it, but no more
    assert (outcome.reason, outcome.ok) == ("exited", False)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("told", ['{"exit": 0, "left": 0}', '{"exit": -99999, "left": 0}', '{"left": 0, "peak_kb": 1e400}'])
def test_a_child_that_speaks_for_its_supervisor_and_kills_it_leaves_nobody(child, told):
    marker = f"orphan-{os.getpid()}"
    code = f"""
        import os, signal, subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)  # {marker}"], start_new_session=True)
        supervisor = os.getppid()
        for name in os.listdir(f"/proc/{{supervisor}}/fd"):
            try:
                os.write(os.open(f"/proc/{{supervisor}}/fd/{{name}}", os.O_WRONLY | os.O_NONBLOCK), b'\\n{told}\\n')
            except OSError:
                pass
        os.kill(supervisor, signal.SIGKILL)
        time.sleep(1000)
        """
    outcome = child(code)
    assert not outcome.ok
    assert outcome.signal in (signal.SIGKILL, signal.SIGTERM)  # the supervisor may take the words for an order before it is killed
    assert living(marker) == []


def test_sleep_of_the_machine_is_measured_and_not_charged(child, monkeypatch):
    readings = iter([100.0, 100.0, 107.5])
    monkeypatch.setattr("agent.process.child.seconds_asleep", lambda: next(readings))
    outcome = child("pass")
    assert outcome.suspended_seconds == 7.5
    assert outcome.ok


def test_many_children_leave_no_open_files_behind(child):
    child("pass")
    before = psutil.Process().num_fds()
    for _ in range(5):
        child("pass", stdin="x")
        child("", argv=["no-such-program-anywhere"])
    assert psutil.Process().num_fds() == before
    assert psutil.Process().children() == []


DRIVER = """
import sys
from pathlib import Path
from agent.process.child import Bounds, run
from agent.process.environment import clean_env
folder = Path(sys.argv[1])
code = ("import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)', sys.argv[1]], start_new_session=True);"
        "open('up', 'w'); time.sleep(1000)")
run([sys.executable, "-c", code, sys.argv[2]], cwd=folder, env=clean_env(), log=folder / "log",
    bounds=Bounds(1000), pidfile=folder / "child.pid", grace=0.3)
"""


def start_driver(folder: Path, marker: str) -> subprocess.Popen:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder), marker], cwd=ROOT)
    assert eventually((folder / "up").exists)
    assert eventually(lambda: len(json.loads((folder / "child.pid").read_text())["processes"]) == 2)
    return driver


def test_children_die_with_a_killed_driver(tmp_path):
    marker = f"orphan-{os.getpid()}"
    driver = start_driver(tmp_path, marker)
    driver.kill()
    driver.wait()
    assert eventually(lambda: living(marker) == [])
    assert (tmp_path / "child.pid").exists()
    assert end_leftovers(tmp_path) == []
    assert list(tmp_path.glob("*.pid*")) == []


UNDER_CTRL_C = """
import signal, sys
from pathlib import Path
from agent.process.child import Bounds, run
from agent.process.environment import clean_env
signal.signal(signal.SIGINT, lambda number, frame: None)
print("ready", flush=True)
folder = Path(sys.argv[1])
for _ in range(20):
    outcome = run(["/bin/sh", "-c", "true"], cwd=folder, env=clean_env(), log=folder / "log", bounds=Bounds(1000))
    assert outcome.ok, outcome
signal.signal(signal.SIGINT, signal.SIG_IGN)  # or Python, as it exits, would die of the next one
"""


def test_ctrl_c_in_the_terminal_never_hits_a_child_even_as_it_starts(tmp_path):
    options = {"cwd": ROOT, "start_new_session": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", UNDER_CTRL_C, str(tmp_path)], **options) as driver:
        assert driver.stdout.readline() == "ready\n"
        while driver.poll() is None:
            supervise.signal_group(driver.pid, signal.SIGINT)  # the driver and whatever has not left its group yet
            time.sleep(0.0005)
        assert driver.returncode == 0, driver.stderr.read()


def test_a_command_can_be_interrupted_though_its_supervisor_cannot(child):
    outcome = child("import os, signal; os.kill(os.getpid(), signal.SIGHUP)")
    assert outcome.signal == signal.SIGHUP


def test_leftovers_of_a_killed_driver_and_supervisor_are_ended(tmp_path):
    marker = f"leftover-{os.getpid()}"
    driver = start_driver(tmp_path, marker)
    supervisor = psutil.Process(driver.pid).children()[0]
    supervisor.suspend()  # as good as gone, but its children live
    driver.kill()
    driver.wait()
    assert len(living(marker)) == 3  # supervisor, child and grandchild
    assert len(end_leftovers(tmp_path)) == 3
    assert eventually(lambda: living(marker) == [])
    assert list(tmp_path.glob("*.pid*")) == []


def test_a_recycled_pid_is_not_killed(tmp_path):
    innocent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        started = psutil.Process(innocent.pid).create_time()
        record = {"marker": "a marker of nobody", "processes": [{"pid": innocent.pid, "start": started - 100}]}
        (tmp_path / "old.pid").write_text(json.dumps(record))
        (tmp_path / "torn.pid").write_text('{"marker": "x", "proc')
        (tmp_path / "odd.pid").write_text('{"marker": "x", "processes": [{"pid": "1"}]}')
        assert end_leftovers(tmp_path) == []
        assert innocent.poll() is None
        assert list(tmp_path.iterdir()) == []
    finally:
        innocent.kill()
        innocent.wait()


# --- environment and secrets

def test_no_secret_is_in_a_clean_environment(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AUTORESEARCH_API_KEY", "planted-in-our-own-name")
    monkeypatch.setenv("AUTORESEARCH_SEED", "7")
    monkeypatch.setenv("HF_TOKEN", "hf_planted_for_downloads")
    plain = clean_env({"EXTRA": "1"})
    assert plain["EXTRA"] == "1"
    assert plain["PATH"] == os.environ["PATH"]
    assert plain["AUTORESEARCH_SEED"] == "7"
    assert not any("planted" in value or "pr0xy" in value for value in plain.values())
    assert clean_env(network=True)["HF_TOKEN"] == "hf_planted_for_downloads"
    assert "GITHUB_TOKEN" not in clean_env(network=True)
    assert clean_env(keep_secrets=True)["GITHUB_TOKEN"] == PLANTED["GITHUB_TOKEN"]


def test_secrets_do_not_reach_a_log_even_in_pieces(child, tmp_path, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    code = """
        import os, sys, time
        for name in ('ACME_API_KEY', 'GITHUB_TOKEN', 'SOME_PRIVATE_KEY'):
            for char in os.environ[name]:
                print(char, end='', flush=True); time.sleep(0.001)
            print(' then', os.environ[name], flush=True)
            print(os.environ[name][:9], 'is a beginning only', file=sys.stderr)
        """
    outcome = child(code, env=clean_env(keep_secrets=True), stdout_to=tmp_path / "out")
    assert outcome.ok
    out = (tmp_path / "out").read_text()
    assert out.count("[redacted GITHUB_TOKEN]") == 2
    assert not any(value in out for value in PLANTED.values())
    assert "ghp_plant is a beginning only" in outcome.tail()


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=30), st.integers(min_value=4, max_value=100))
def test_a_bounded_log_keeps_head_and_tail(tmp_path_factory, chunks, limit):
    path = tmp_path_factory.getbasetemp() / "bounded"
    log = BoundedLog(path, limit, {})
    for chunk in chunks:
        log.write(chunk)
    log.close()
    text, kept = b"".join(chunks), path.read_bytes()
    assert log.received == len(text)
    if len(text) <= limit:
        assert kept == text
    else:
        tail = limit // 2
        note = b"\n[... %d bytes left out ...]\n" % (len(text) - limit)
        assert kept == text[: limit - tail] + note + text[len(text) - tail :]
