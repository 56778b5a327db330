"""The journal: what is written is on the disk, a torn tail is set aside, damage is refused, one driver writes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from night_kit import ROOT

from agent.errors import JournalError, LockedError, UsageError
from agent.journal.journal import Journal, decode, encode, holder, read_events


def filled(folder: Path, count: int = 3) -> Path:
    with Journal(folder) as journal:
        for number in range(count):
            journal.append("note", text=f"zeile {number} – ünï\n\t\x00")
    return folder / "journal.jsonl"


def test_round_trip(tmp_path: Path) -> None:
    path = filled(tmp_path)
    events, torn = read_events(path)
    assert torn == b""
    assert [(e["seq"], e["event"], e["v"]) for e in events] == [(0, "note", 1), (1, "note", 1), (2, "note", 1)]
    assert events[1]["text"] == "zeile 1 – ünï\n\t\x00"
    assert all(json.loads(line)["sum"] for line in path.read_text().splitlines())
    with Journal(tmp_path) as journal:
        assert journal.events == events
        journal.append("note", text="more")
    assert len(read_events(path)[0]) == 4


def test_every_cut_of_the_last_line_is_set_aside(tmp_path: Path) -> None:
    path = filled(tmp_path / "whole")
    data = path.read_bytes()
    last = len(data) - len(data.splitlines(keepends=True)[-1])
    for cut in range(last + 1, len(data)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(data[:cut])
        with Journal(folder) as journal:
            assert journal.torn == folder / "journal.torn-1"
            assert journal.torn.read_bytes() == data[last:cut]
            assert [e["event"] for e in journal.events] == ["note"] * 3  # two old ones, and one that tells of the torn line
            assert "torn" in journal.events[2]["text"]
        assert read_events(folder / "journal.jsonl")[1] == b""


@pytest.mark.parametrize("tail", [b"\0" * 512, b"\xff\xfe\n", b'{"v":1}\n', b"\n"])
def test_garbage_tail_is_set_aside_and_the_next_number_is_free(tmp_path: Path, tail: bytes) -> None:
    path = filled(tmp_path)
    (tmp_path / "journal.torn-1").write_bytes(b"of an earlier night")
    with open(path, "ab") as file:
        file.write(tail)
    with Journal(tmp_path) as journal:
        assert journal.torn == tmp_path / "journal.torn-2"
    assert (tmp_path / "journal.torn-1").read_bytes() == b"of an earlier night"


@pytest.mark.parametrize("what", ["flip", "drop", "swap", "old"])
def test_damage_in_the_middle_is_refused(tmp_path: Path, what: str) -> None:
    path = filled(tmp_path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    if what == "flip":
        lines[1] = lines[1].replace(b"zeile 1", b"zeile 7")
    elif what == "drop":
        del lines[1]
    elif what == "swap":
        lines[0], lines[1] = lines[1], lines[0]
    else:
        body = json.dumps({"v": 0, "seq": 0, "t": 0, "event": "note"}, separators=(",", ":"))
        import hashlib

        lines[0] = f'{body[:-1]},"sum":"{hashlib.sha256(body.encode()).hexdigest()[:16]}"}}\n'.encode()
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"line \d of \d is damaged"):
        Journal(tmp_path)
    assert path.read_bytes() == before, "a refused journal is left as it is"
    if what == "old":
        with pytest.raises(JournalError, match="schema: expected 1, found 0"):
            read_events(path)


def test_no_nan_in_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        with pytest.raises(ValueError, match="JSON compliant"):
            journal.append("note", val=float("nan"))
        assert journal.events == []
        journal.append("note", text="goes on")
    assert len(read_events(tmp_path / "journal.jsonl")[0]) == 1


def test_an_event_out_of_order_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append("experiment", n=0, parent="b")
        with pytest.raises(JournalError, match="expected experiment 1 after the verdict"):
            journal.append("experiment", n=0, parent="b")
        journal.append("note", text="goes on")
    assert [event["event"] for event in read_events(tmp_path / "journal.jsonl")[0]] == ["experiment", "note"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from agent.errors import JournalError
from agent.journal.journal import Journal
with Journal(Path(sys.argv[1])) as journal:
    journal.append("note", text="before")
    size = journal.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + int(sys.argv[2]), resource.RLIM_INFINITY))  # no more fits
    try:
        journal.append("note", text="lost")
    except JournalError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append("night_end", reason="error", text="")
"""


@pytest.mark.parametrize("room", [0, 20])
def test_a_line_that_a_full_disk_cuts_off_does_not_spoil_the_next(tmp_path: Path, room: int) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "n"), str(room)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "make room on the disk, then --resume" in done.stdout
    events, torn = read_events(tmp_path / "n" / "journal.jsonl")
    assert ([event["event"] for event in events], torn) == (["note", "night_end"], b"")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small file system of its own")
def test_the_end_of_a_night_is_written_on_a_full_disk(tmp_path: Path) -> None:
    """On a real full file system, in a mount namespace: the journal gives up its reserve."""
    code = """
import os, sys
from pathlib import Path
from agent.journal.journal import Journal
with Journal(Path(sys.argv[1]) / "n") as journal:
    try:
        with open(Path(sys.argv[1]) / "fill", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
    except OSError as error:
        print(error.strerror)
    journal.append("night_end", reason="error", text="x" * 5000)
"""
    mount = f"mount -t tmpfs -o size=512k none '{tmp_path}'"
    script = f"{mount} && '{sys.executable}' -c \"$CODE\" '{tmp_path}' && cat '{tmp_path}/n/journal.jsonl'"
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    env = {**os.environ, "CODE": code, "PYTHONPATH": str(ROOT)}
    if shutil.which("unshare") is None or subprocess.run([*inside[:-1], mount], capture_output=True).returncode:
        pytest.skip("no mount namespace here")
    done = subprocess.run(inside, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    first, line = done.stdout.splitlines()
    assert first == "No space left on device"
    assert json.loads(line)["event"] == "night_end"


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def replaced(folder: Path) -> None:
    (folder / "journal.jsonl").unlink()
    (folder / "journal.jsonl").write_text("something else\n")


def shortened(folder: Path) -> None:
    os.replace(shutil.copy(folder / "journal.jsonl", folder / "copy"), folder / "journal.jsonl")
    os.truncate(folder / "journal.jsonl", 20)


def blocked(folder: Path) -> None:
    (folder / "journal.jsonl").unlink()
    os.mkfifo(folder / "journal.jsonl")


def linked(folder: Path) -> None:
    (folder / "journal.jsonl").rename(folder / "mine")
    (folder / "journal.jsonl").symlink_to(folder / "mine")


@pytest.mark.parametrize("harm", [gone, replaced, shortened, blocked, linked], ids=lambda harm: harm.__name__)
def test_a_journal_that_went_from_its_place_is_there_again_with_every_event(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    folder = tmp_path / "runs" / "n"
    with Journal(folder) as journal:
        journal.append("note", text="before")
        harm(folder)
        journal.append("note", text="after")
        there = journal.path.lstat().st_ino
        assert holder(folder) == os.getpid(), "the lock is in its place as well"
        journal.append("note", text="later")
        assert journal.path.lstat().st_ino == there, "restored once"
    events, torn = read_events(folder / "journal.jsonl")
    assert ([event["text"] for event in events], torn) == (["before", "after", "later"], b"")
    assert (folder / ".gitignore").read_text() == "*\n"


def test_a_journal_that_was_moved_to_another_disk_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "n"
    with Journal(folder) as journal:
        journal.append("note", text="before")
        shutil.copytree(tmp_path / "runs", tmp_path / "big")
        shutil.rmtree(tmp_path / "runs")
        (tmp_path / "runs").symlink_to(tmp_path / "big")
        copy = journal.path.lstat().st_ino
        journal.append("note", text="after")
        assert journal.path.lstat().st_ino == copy, "the copy is whole, so it is gone on with"
    assert len(read_events(tmp_path / "big" / "n" / "journal.jsonl")[0]) == 2


def test_a_driver_whose_place_another_one_has_taken_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "n"
    with Journal(folder) as first:
        first.append("note", text="of the first")
        shutil.rmtree(folder)
        with Journal(folder) as second:
            second.append("note", text="of the second")
            with pytest.raises(LockedError, match="already works on the night"):
                first.append("note", text="lost")
        assert [event["text"] for event in read_events(folder / "journal.jsonl")[0]] == ["of the second"]


def test_decode_says_what_is_wrong() -> None:
    line = encode({"v": 1, "seq": 0, "t": 0, "event": "note"})
    assert decode(line, 0)["event"] == "note"
    with pytest.raises(ValueError, match="sequence: expected 5, found 0"):
        decode(line, 5)
    with pytest.raises(ValueError, match="checksum"):
        decode(line.replace(b"note", b"nope"), 0)


def test_second_driver_is_refused_and_told_the_pid(tmp_path: Path) -> None:
    with Journal(tmp_path):
        assert holder(tmp_path) == os.getpid()
        code = "import sys; from pathlib import Path; from agent.journal.journal import Journal; Journal(Path(sys.argv[1]))"
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert other.returncode == 1
        assert f"process {os.getpid()} already works on the night" in other.stderr
        os.truncate(tmp_path / "lock", 0)
        assert holder(tmp_path) == 0, "some driver works on it, though it has not said which"
    assert holder(tmp_path) is None
    Journal(tmp_path).close()


def test_a_disk_that_knows_no_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network and external disks are on macOS. It is no driver at work."""
    def refused(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(UsageError, match=r"cannot lock files \(.*ln -s"):
        Journal(tmp_path)
    assert holder(tmp_path) is None


def test_lock_dies_with_its_driver(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from agent.journal.journal import Journal;"
        "j = Journal(Path(sys.argv[1])); j.append('note', text='x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert holder(tmp_path) is None
    with Journal(tmp_path) as journal:
        assert len(journal.events) == 1


def test_locked_error_owns_an_exit_code() -> None:
    assert (LockedError.exit_code, JournalError.exit_code) == (8, 9)
