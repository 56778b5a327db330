"""What is macOS's alone: caffeinate, pmset, sandbox-exec, the clock that stops in sleep. The real code, as real processes.

On other systems the driver is told that it runs on macOS (`sys.platform`, and the numbers of two constants), and finds on PATH
scripts in place of Apple's programs that write down what they were asked. What the profile says is judged here by its own rules.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from night_kit import HARNESS, Bed, git

from agent import doctor
from agent.journal.journal import read_events
from agent.journal.state import fold
from agent.night import power
from agent.process.child import Bounds, run
from agent.process.environment import clean_env
from agent.trial import sandbox
from agent.trial.rights import rules
from agent.trial.sandbox import HIDDEN, READ, WRITE, seatbelt_profile

KERNEL = """
import fcntl, os
if not hasattr(fcntl, "F_GETPATH"):
    def answer(descriptor, command, given=0, real=fcntl.fcntl):
        if command != fcntl.F_GETPATH:
            return real(descriptor, command, given)
        return os.fsencode(os.readlink(f"/proc/self/fd/{descriptor}")).ljust(len(given), bytes(1))
    fcntl.F_GETPATH, fcntl.fcntl = 50, answer
"""
SHIM = KERNEL + """
import runpy, sys, time
import git, psutil, rich.console, zoneinfo  # as the system is that they run on
sys.platform = "darwin"
fcntl.F_FULLFSYNC = getattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFD)
time.CLOCK_UPTIME_RAW = getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC)
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
CAFFEINATE = """
import json, os, sys, time
with open(os.environ["AUTORESEARCH_SEEN"] + "/caffeinate", "a") as seen:
    print(json.dumps([os.getpid(), *sys.argv[1:]]), file=seen)
time.sleep(600)  # deaf to -w: it has to end with the driver all the same
"""
SANDBOX_EXEC = """
import json, os, sys
flag, profile, *argv = sys.argv[1:]
with open(os.environ["AUTORESEARCH_SEEN"] + "/sandbox-exec", "a") as seen:
    print(json.dumps([flag, profile, *argv]), file=seen)
refused = os.environ.get("AUTORESEARCH_REFUSED")
if refused and refused in profile:
    print(f"sandbox-exec: unbound variable: {refused}", file=sys.stderr)
    sys.exit(65)
os.execvp(argv[0], argv)
"""
SERVER = """\
        import subprocess
        subprocess.run([*json.load(sys.stdin)["wrap"], "true"], check=True)
"""
PMSET = "import sys; print({said!r} if sys.argv[1:] == ['-g', 'batt'] else ' lowpowermode         {low}', end='')"

ON_BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=4653155)\t93%; discharging; 5:16 remaining present: true
"""
PLUGGED_IN = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=4653155)\t100%; charged; 0:00 remaining present: true
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, first on PATH; what they see goes to `seen`."""
    folder, seen = tmp_path / "bin", tmp_path / "seen"
    folder.mkdir()
    seen.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("AUTORESEARCH_SEEN", str(seen))
    return folder


@pytest.fixture
def on_macos(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    sandbox._detect.cache_clear()
    sandbox.nests.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_GETPATH", 50, raising=False)  # so that what KERNEL does is undone
    monkeypatch.setattr(fcntl, "fcntl", fcntl.fcntl)
    if not hasattr(os, "lchflags"):
        del fcntl.F_GETPATH
        exec(KERNEL, {})
    if not hasattr(time, "CLOCK_UPTIME_RAW"):
        monkeypatch.setattr("time.CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC, raising=False)
    yield
    sandbox._detect.cache_clear()
    sandbox.nests.cache_clear()


def program(folder: Path, name: str, source: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)


def seen(tmp_path: Path, name: str) -> list[list[Any]]:
    path = tmp_path / "seen" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def call(bed: Bed, module: str, *options: str, **extra: str) -> subprocess.Popen[str]:
    """`python -m module` in the bed's checkout, by a Python that takes itself for one on macOS."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SHIM, module, *options], cwd=bed.repo,
        env=bed.environment(AUTORESEARCH_SEEN=os.environ["AUTORESEARCH_SEEN"], **extra), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def night(bed: Bed, *options: str, **extra: str) -> subprocess.Popen[str]:
    return call(bed, "agent.loop", *bed.command(*options)[3:], **extra)


def wait_for(what: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- sleep ----


def test_sleep_is_held_off_while_the_night_lasts(tmp_path: Path, tools: Path) -> None:
    program(tools, "caffeinate", CAFFEINATE)
    driver = night(Bed(tmp_path, "worse"), "--experiments", "1", "--no-sandbox")
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    ((pid, *argv),) = seen(tmp_path, "caffeinate")
    assert argv == ["-i", "-m", "-w", str(driver.pid)]
    assert not psutil.pid_exists(pid)


def test_backups_pass_over_the_weights_and_take_the_journal(tmp_path: Path, tools: Path) -> None:
    note = "import os, sys\nopen(os.environ['AUTORESEARCH_SEEN'] + '/tmutil', 'a').write(' '.join(sys.argv[1:]) + '\\n')"
    program(tools, "tmutil", note)
    bed = Bed(tmp_path, "worse")
    driver = night(bed, "--experiments", "0", "--no-sandbox")
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    told = (tmp_path / "seen" / "tmutil").read_text().splitlines()
    assert told == [f"addexclusion {bed.folder() / name}" for name in ("trials", "tmp")]


def test_nothing_holds_off_sleep_once_the_driver_was_killed(tmp_path: Path, tools: Path) -> None:
    program(tools, "caffeinate", CAFFEINATE)
    driver = night(Bed(tmp_path, "hangs"), "--experiments", "1", "--no-sandbox")
    wait_for(lambda: seen(tmp_path, "caffeinate"))
    pid = seen(tmp_path, "caffeinate")[0][0]
    assert psutil.pid_exists(pid)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate(timeout=30)
    wait_for(lambda: not psutil.pid_exists(pid))


def test_a_night_without_caffeinate_and_pmset_is_a_night(tmp_path: Path, tools: Path) -> None:
    program(tools, "caffeinate", "raise SystemExit('caffeinate: not today')")
    program(tools, "pmset", "raise SystemExit('pmset: not today')")
    driver = night(Bed(tmp_path, "worse"), "--experiments", "1", "--no-sandbox")
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said


def test_sleep_is_told_by_the_clock_that_stops_in_it(tmp_path: Path, on_macos: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The processor time of this process stands still while it waits, as macOS's uptime does while the machine sleeps.
    monkeypatch.setattr("time.CLOCK_UPTIME_RAW", time.CLOCK_PROCESS_CPUTIME_ID, raising=False)
    argv = [sys.executable, "-c", "import time; time.sleep(1.5)"]
    outcome = run(argv, cwd=tmp_path, env=clean_env(), log=tmp_path / "log", bounds=Bounds(60))
    assert outcome.ok
    assert 0.75 < outcome.suspended_seconds <= outcome.seconds + 0.1


def test_what_metal_holds_counts_as_memory(tmp_path: Path, on_macos: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells it in the footprint, in the layout of sys/resource.h; as resident it counts next to nothing."""

    class Usage(ctypes.Structure):
        names = ("user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups", "pageins", "wired_size", "resident_size",
                 "phys_footprint", "proc_start_abstime", "proc_exit_abstime")  # fmt: skip
        _fields_ = (("uuid", ctypes.c_uint8 * 16), *((name, ctypes.c_uint64) for name in names))

    class System:
        def proc_pid_rusage(self, pid: int, flavor: int, into: Any) -> int:
            assert flavor == 0
            ctypes.memmove(into, ctypes.byref(Usage(phys_footprint=3 << 30)), ctypes.sizeof(Usage))
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: System())
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    outcome = run(argv, cwd=tmp_path, env=clean_env(), log=tmp_path / "log", bounds=Bounds(60, memory_bytes=2 << 30))
    assert outcome.reason == "memory"
    assert outcome.peak_rss_mb >= 3 << 10


# ---- paths ----


def test_what_is_hidden_is_named_as_the_disk_spells_it(tmp_path: Path, on_macos: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac's disk finds Caf\u00e9/HELD under any spelling; sandbox-exec compares the one that the kernel has."""
    (typed := tmp_path / "caf\u00e9" / "held").mkdir(parents=True)
    stored = str(typed).replace("caf\u00e9", "Cafe\u0301").replace("held", "Held")

    def kernel(descriptor: int, command: int, given: bytes, real: Any = fcntl.fcntl) -> bytes:
        path = os.fsdecode(real(descriptor, command, given).rstrip(b"\0"))
        return os.fsencode(stored if path == str(typed) else path).ljust(len(given), b"\0")

    monkeypatch.setattr(fcntl, "fcntl", kernel)
    given = rules([tmp_path], [], [typed])
    assert given[stored] == HIDDEN
    assert str(typed) not in given
    assert not allowed(seatbelt_profile(given), "file-read-data", f"{stored}/val.bin")


@pytest.mark.parametrize(("where", "words"), [
    ("Documents/ar", "macOS asks permission"), ("Library/Mobile Documents/com~apple~CloudDocs/ar", "in a cloud"),
    ("Library/CloudStorage/Dropbox/ar", "in a cloud"), ("/Volumes/Disk/ar", "can be unplugged"), ("code/ar", ""),
    ("Documents2/ar", ""),
])  # fmt: skip
def test_the_doctor_knows_places_that_do_not_last_a_night(tmp_path: Path, on_macos: None, where: str, words: str) -> None:
    found = [one.text for one in doctor.check_place(tmp_path / where, {"HOME": str(tmp_path)})]
    assert [words in text for text in found] == [True] * bool(words)


def test_the_doctor_knows_rosetta_ssh_and_apples_placeholder_of_git(
    tmp_path: Path, tools: Path, on_macos: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    program(tools, "sysctl", "import sys; print(1 if sys.argv[-1] == 'sysctl.proc_translated' else '')")
    assert "under Rosetta" in doctor.check_python().text
    program(tools, "sysctl", "raise SystemExit(1)")  # an Intel Mac knows no such name
    assert "from python.org" in doctor.check_python().text
    words = "xcode-select: note: No developer tools were found, requesting install."
    program(tools, "git", f"import sys; print({words!r}, file=sys.stderr); sys.exit(1)")
    found = doctor.check_git(tmp_path, "train_mlx.py")
    assert (found.state, "No developer tools" in found.text, "xcode-select --install" in found.text) == ("bad", True, True)
    told = [one.text for one in doctor.check_agents({"PATH": "", "SSH_CONNECTION": "10.0.0.2 50000 10.0.0.3 22"})]
    assert "security unlock-keychain" in told[0]
    assert "keychain" not in " ".join(one.text for one in doctor.check_agents({"PATH": ""}))


# ---- power ----


def test_low_power_mode_has_two_names(tools: Path, on_macos: None) -> None:
    for said, low in ((" lowpowermode         1", True), (" powermode            1", True), (" powermode            2", False),
                      (" powermode            0", False), (" lowpowermode         0", False)):  # fmt: skip
        program(tools, "pmset", f"print('System-wide power settings:\\nCurrently in use:\\n standby              1\\n{said}')")
        assert power.low_power_mode() == low, said


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (ON_BATTERY, "in use"),
        (ON_BATTERY.replace("5:16 remaining", "(no estimate)"), "in use"),
        ("Currently drawing from 'Battery Power'\n -InternalBattery-0\t41%; discharging; 2:01 remaining\n", "in use"),
        (PLUGGED_IN, "plugged in"),
        (PLUGGED_IN.replace("100%; charged; 0:00 remaining", "80%; AC attached; not charging"), "plugged in"),
        (PLUGGED_IN.replace("100%; charged; 0:00 remaining", "58%; charging; 1:10 remaining"), "plugged in"),
        (PLUGGED_IN.replace("100%; charged; 0:00 remaining", "98%; finishing charge; 0:05 remaining"), "plugged in"),
        ("Now drawing from 'AC Power'\n", ""),
        ("Now drawing from 'UPS Power'\n -Smart-UPS 750 (id=2)\t100%; discharging; 0:30 remaining present: true\n", ""),
    ],
)  # fmt: skip
def test_what_pmset_says(said: str, state: str, tools: Path, on_macos: None) -> None:
    program(tools, "pmset", PMSET.format(said=said, low=0))
    assert power.battery() == state
    starts = {"in use": ["running on battery", "keep the lid open"], "plugged in": ["keep the lid open"], "": []}[state]
    warnings = power.battery_warning()
    assert [warning[: len(start)] for warning, start in zip(warnings, starts, strict=True)] == starts


def test_the_loop_and_the_doctor_warn_of_battery_and_lid(tmp_path: Path, tools: Path) -> None:
    program(tools, "pmset", PMSET.format(said=ON_BATTERY, low=1))
    program(tools, "caffeinate", CAFFEINATE)
    bed = Bed(tmp_path, "worse")
    said, _ = night(bed, "--experiments", "0", "--no-sandbox").communicate(timeout=120)
    assert "note: running on battery: trainings are slower" in said
    assert "note: keep the lid open" in said
    assert "note: Low Power Mode is on" in said
    said, _ = call(bed, "agent.doctor").communicate(timeout=120)
    assert re.search(r"^note +power +running on battery: .*plug it in$", said, re.MULTILINE), said
    assert re.search(r"^ok +sleep +a night holds off idle sleep$", said, re.MULTILINE), said


@pytest.mark.parametrize(("version", "chip", "state", "words"), [
    ("13.6.1", "Apple M1", "bad", "needs macOS 14"), ("15.2", "Apple M5 Max", "note", "only from macOS 26 on"),
    ("26.1", "Apple M5 Max", "ok", "26.1 on Apple M5 Max"), ("14.0", "Apple M2", "ok", "14.0 on Apple M2"),
])  # fmt: skip
def test_the_doctor_knows_the_system_and_the_chip(
    version: str, chip: str, state: str, words: str, tools: Path, on_macos: None
) -> None:
    program(tools, "sw_vers", f"print({version!r})")
    program(tools, "sysctl", f"print({chip!r})")
    (finding,) = doctor.check_mac()
    assert (finding.state, words in finding.text) == (state, True)


# ---- the sandbox ----


def parse(profile: str) -> list[Any]:
    """The profile's forms: lists of words, ("string", text) and ("regex", text). ValueError if it is no profile."""
    quoted = r'"((?:[^"\\]|\\.)*)"'
    token = re.compile(rf'\s*(?:(?P<open>\()|(?P<close>\))|#(?P<regex>{quoted})|(?P<text>{quoted})|(?P<word>[^\s()"#]+))', re.S)
    stack: list[list[Any]] = [[]]
    at = 0
    while at < len(profile.rstrip()):
        found = token.match(profile, at)
        if found is None:
            raise ValueError(f"no profile from {profile[at : at + 40]!r} on")
        at = found.end()
        if found["open"]:
            stack.append([])
        elif found["close"]:
            done = stack.pop()
            stack[-1].append(done)
        elif found["regex"] is not None:
            stack[-1].append(("regex", found["regex"][1:-1].replace("\\\\", "\\")))
        elif found["text"] is not None:
            stack[-1].append(("string", re.sub(r"\\(.)", r"\1", found["text"][1:-1], flags=re.S)))
        else:
            stack[-1].append(found["word"])
    if len(stack) != 1:
        raise ValueError(f"{len(stack) - 1} parentheses are not closed")
    return stack[0]


def allowed(profile: str, operation: str, path: Path | str = "") -> bool:
    """Whether the profile allows an operation on a path: the last rule that matches decides."""
    version, *rules = parse(profile)
    assert version == ["version", "1"]
    verdict = False
    for action, *words in rules:
        assert action in ("allow", "deny")
        names = [word for word in words if isinstance(word, str)]
        filters = [word for word in words if isinstance(word, list)]
        assert names, words
        hit = any(name == "default" or name == operation or (name[-1] == "*" and operation.startswith(name[:-1])) for name in names)
        if hit and (not filters or any(matches(*one, path=str(path)) for one in filters)):
            verdict = action == "allow"
    return verdict


def matches(kind: str, value: Any, *more: Any, path: str) -> bool:
    """Whether a filter fits a path; that of a folder ends in a slash."""
    if kind == "require-all":
        return all(matches(*one, path=path) for one in (value, *more))
    if kind == "vnode-type":
        return value == "DIRECTORY" and path.endswith("/")
    assert kind in ("subpath", "literal", "regex")
    path = path.rstrip("/")
    assert value[0] == ("regex" if kind == "regex" else "string")
    if kind == "regex":
        return re.search(value[1], path) is not None
    assert value[1].startswith("/"), "a path that is not absolute matches nothing"
    return path == value[1] or (kind == "subpath" and path.startswith(value[1].rstrip("/") + "/"))


ODD = '/Users/u/my "best" runs (2)\\new; ünï'


def test_the_profile_of_odd_paths_says_what_is_meant() -> None:
    profile = seatbelt_profile({"/Users/u": READ, "/Users/u/held": HIDDEN, ODD: WRITE, "/Users/u/held/open": READ})
    assert allowed(profile, "file-write-data", f"{ODD}/trial/weights")
    assert not allowed(profile, "file-write-data", "/Users/u/my")
    assert not allowed(profile, "file-write-data", ODD + "2/file")
    assert not allowed(profile, "file-write-create", "/Users/u/.zshrc")
    assert not allowed(profile, "file-write-create", "/private/tmp/x")
    assert not allowed(profile, "file-read-data", "/Users/u/held/val.bin")
    assert allowed(profile, "file-read-data", "/Users/u/held/open/x")
    assert allowed(profile, "file-read-metadata", "/Users/u/held")
    assert not allowed(profile, "file-read-metadata", "/Users/u/held/val.bin")
    assert allowed(profile, "file-read-data", "/usr/lib/libSystem.dylib")
    assert allowed(profile, "file-write-data", "/dev/null")
    assert allowed(profile, "file-write-data", "/private/var/folders/a1/b2/C/com.apple.metal/16777235_419/functions.data")
    assert not allowed(profile, "file-write-data", "/private/var/folders/a1/b2/T/x")
    assert allowed(profile, "process-exec", "/usr/bin/python3")
    for operation in ("network-outbound", "network-bind", "network-inbound", "lsopen", "job-creation", "appleevent-send"):
        assert not allowed(profile, operation), operation


HELD, RUN = "/Users/u/.cache/autoresearch-mlx/held", "/Users/u/ar/runs/x/trials/1"


@pytest.mark.parametrize("strict", [True, False])
def test_no_second_name_leads_to_a_file(strict: bool) -> None:
    """A link or a clone in the run directory would make held-out text readable; a link, the user's own files writable."""
    given = {HELD: HIDDEN, "/Users/u/ar/runs": HIDDEN, "/Users/u/ar/runs/x/worktree": READ, RUN: WRITE}
    profile = seatbelt_profile(given, strict)
    for operation in ("file-link", "file-clone", "file-read-data", "file-test-existence", "file-map-executable"):
        assert not allowed(profile, operation, f"{HELD}/id/val.bin"), operation
    for place in ("/Users/u/.zshrc", "/Users/u/ar/train_mlx.py", "/Users/u/ar/runs/x/worktree/train_mlx.py"):
        assert not (strict and allowed(profile, "file-link", place))
        assert not allowed(profile, "file-write-data", place)
    for operation in ("file-link", "file-clone", "file-map-executable", "file-write-create"):  # a kernel that was compiled in there
        assert allowed(profile, operation, f"{RUN}/kernel.so"), operation


def test_metal_may_keep_its_kernels_and_nothing_else_in_the_cache() -> None:
    """A program's first kernels go to C/PROGRAM/com.apple.metal, whose folder does not exist before."""
    profile, cache = seatbelt_profile({}), "/private/var/folders/a1/b2/C"
    for folder in ("org.python.python/", "python3.12/", "com.apple.metal/", "org.python.python/com.apple.metal/32024/"):
        assert allowed(profile, "file-write-create", f"{cache}/{folder}"), folder
    for file in ("com.apple.metalfe/x", "com.apple.gpuarchiver/x.gpuarchive", "org.python.python/com.apple.metal/functions.data"):
        assert allowed(profile, "file-write-data", f"{cache}/{file}"), file
    for file in ("note", "org.python.python/note", "com.apple.metalx/note"):
        assert not allowed(profile, "file-write-create", f"{cache}/{file}"), file
    assert not allowed(profile, "file-write-unlink", f"{cache}/org.python.python/")
    assert not allowed(profile, "file-write-create", "/private/var/folders/a1/b2/T/folder/")


@pytest.mark.parametrize("broken", ["(version 1", "(version 1))", '(version 1)(allow file-read* (subpath "/a))'])
def test_what_is_no_profile_is_noticed(broken: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        parse(broken)


def test_a_night_under_sandbox_exec(tmp_path: Path, tools: Path) -> None:
    program(tools, "sandbox-exec", SANDBOX_EXEC)
    bed = Bed(tmp_path, "worse", name='a "repo" (1)')
    (bed.repo / "prepare_mlx.py").write_text(HARNESS.replace('== "score":\n', '== "score":\n' + SERVER))
    git(bed.repo, "commit", "-qam", "with a server")
    driver = night(bed, "--experiments", "1")
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    assert "sandbox of trainings: sandbox-exec\n" in said
    told = next(event["sandbox"] for event in read_events(bed.folder() / "journal.jsonl")[0] if event["event"] == "session")
    assert told.startswith("sandbox-exec: no network")
    assert "The scorer, the harness's own code, runs with your rights and network" in told
    folder, data = bed.folder().resolve(), (bed.home / "data").resolve()
    calls = [(profile, argv) for flag, profile, *argv in seen(tmp_path, "sandbox-exec") if flag == "-p"]
    trainings = [profile for profile, argv in calls if argv[-1:] == ["train_mlx.py"]]
    servers = [profile for profile, argv in calls if argv == ["true"]]
    ends = [event for event in read_events(folder / "journal.jsonl")[0] if event["event"] == "trial_end"]
    assert len(ends) >= 4
    assert len(trainings) == len(ends)
    for profile, end in zip(trainings, ends, strict=True):
        assert allowed(profile, "file-write-create", folder / "trials" / end["dir"] / "weights")
        assert allowed(profile, "file-write-create", folder / f"tmp/{end['dir']}/kernel")
        assert allowed(profile, "file-read-data", data / "train/toy/train.bin")
    assert len(servers) >= len(ends)
    outside = [folder, folder / "trials/x", folder / "worktree", folder / "frozen", data / "train/toy", bed.repo, bed.home]
    for profile in (*trainings, *servers):
        assert [place for place in outside if allowed(profile, "file-write-create", place / "x")] == []
        assert allowed(profile, "file-read-data", folder / "worktree/train_mlx.py")
        others = (folder / "trials/x/weights", folder.parent / "other/trials/0000-1/weights", folder / "journal.jsonl")
        for path in (data / "held/toy/val.bin", data / "train/other/train.bin", *others):
            assert not allowed(profile, "file-read-data", path)
        assert allowed(profile, "file-read-metadata", folder), "to pass through to what is open inside"
        assert not allowed(profile, "network-outbound")
    assert not [profile for profile in servers if allowed(profile, "file-read-data", data / "train/toy/train.bin")]
    said, _ = call(bed, "agent.loop", "--status").communicate(timeout=60)
    assert "sandbox of trainings: sandbox-exec\n" in said


def test_where_sandbox_exec_knows_no_launching_the_plainer_profile_is_used(
    tmp_path: Path, tools: Path, on_macos: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tools, "sandbox-exec", SANDBOX_EXEC)
    monkeypatch.setenv("AUTORESEARCH_REFUSED", "lsopen")
    assert sandbox.available() == sandbox.SANDBOX_EXEC_PLAIN
    argv = sandbox.wrap(["true"], rules([tmp_path]))
    assert (argv[0], argv[1], argv[3:]) == (str(tools / "sandbox-exec"), "-p", ["true"])
    assert allowed(argv[2], "lsopen")
    assert not allowed(argv[2], "network-outbound")
    assert not sandbox.nests()


def test_a_sandbox_that_does_not_work_is_said_by_loop_doctor_and_report(tmp_path: Path, tools: Path) -> None:
    program(tools, "sandbox-exec", SANDBOX_EXEC)
    bed = Bed(tmp_path, "worse")
    absent = "none: nothing covered. Not covered: trainer and scorer run with your rights and network"
    why = "(sandbox-exec does not work here: sandbox-exec: unbound variable: version)"
    driver = night(bed, "--experiments", "0", AUTORESEARCH_REFUSED="version")
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    assert f"sandbox of trainings: {absent} {why}" in said
    said, _ = call(bed, "agent.doctor", AUTORESEARCH_REFUSED="version").communicate(timeout=120)
    assert re.search(rf"^note +sandbox +{re.escape(absent)}", said, re.MULTILINE), said
    assert f"sandbox of trainings: {absent} {why}" in bed.loop("--status").stdout
    script = ROOT / "scripts" / "report.py"
    report = [sys.executable, str(script), str(bed.folder()), "--no-picture"]
    done = subprocess.run(report, cwd=bed.repo, env=bed.environment(), capture_output=True, text=True, check=True)
    assert f"sandbox of trainings: {absent}" in done.stdout
    assert fold(read_events(bed.folder() / "journal.jsonl")[0]).sandbox.startswith("none")
