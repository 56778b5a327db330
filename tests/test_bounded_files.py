"""Files that somebody else wrote are opened, measured and removed within bounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import files
from agent.files import BOUNDLESS, DEEPEST, directory_bytes, read_part, read_plain, remove, size_in_words, write_anew


def nest(folder: Path, depth: int) -> None:
    """Folders one in the other, deeper than a path may be long."""
    where = os.getcwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        for _ in range(depth):
            os.mkdir("deeper")
            os.chdir("deeper")
        Path("last").write_text("x")
    finally:
        os.chdir(where)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied in the end: pytest itself cannot remove deep ones."""
    yield tmp_path
    for path in tmp_path.iterdir():
        remove(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


def folder(path: Path) -> None:
    path.mkdir()


def giant(path: Path) -> None:
    path.touch()
    os.truncate(path, 60 << 30)


@pytest.mark.parametrize("kind", [pipe, device, loop, folder, giant], ids=lambda kind: kind.__name__)
def test_what_is_no_plain_file_of_its_size_is_not_read(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    path, begun = tmp_path / "x", time.monotonic()
    kind(path)
    with pytest.raises(OSError, match="expected"):
        read_plain(path, 1000)
    assert time.monotonic() - begun < 5


def test_a_part_is_read_from_either_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert read_plain(path, 10) == b"0123456789"
    assert [read_part(path, *where) for where in ((2, 3), (-3, 99), (-99, 2), (20, 5))] == [b"234", b"789", b"01", b""]


def test_a_directory_is_measured_as_its_files_take_room(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/data").write_bytes(b"x" * (1 << 20))
    giant(tmp_path / "sparse")
    (tmp_path / "link").symlink_to("/")
    assert 1 << 20 <= directory_bytes(tmp_path) < 2 << 20
    assert directory_bytes(tmp_path / "gone") == 0


def test_what_is_too_deep_or_too_full_to_count_is_above_every_limit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nest(place / "deep", 1900)
    nest(place / "flat", DEEPEST - 1)
    assert directory_bytes(place / "deep") == BOUNDLESS
    assert directory_bytes(place / "flat") < 1 << 20
    monkeypatch.setattr(files, "MOST_ENTRIES", 5)
    for number in range(6):
        (place / "flat" / str(number)).touch()
    assert directory_bytes(place / "flat") == BOUNDLESS
    assert size_in_words(place / "flat") == "more than 5 files or 64 nested folders", "and not how much that is above the limits"


def test_a_size_is_told_in_megabytes(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x" * 3_000_000)
    assert size_in_words(tmp_path) == "3 MB"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that no removal may reach."""
    kept = tmp_path / "outside"
    kept.mkdir()
    (kept / "precious").write_text("mine")
    yield kept
    assert (kept / "precious").read_text() == "mine"


def test_anything_is_removed_and_nothing_outside(tmp_path: Path, outside: Path) -> None:
    top = tmp_path / "top"
    nest(top / "deep", 1900)
    for number in range(300):
        (top / "wide" / str(number)).mkdir(parents=True)
    (top / "link").symlink_to(outside)
    os.link(outside / "precious", top / "hard")
    pipe(top / "pipe")
    (top / "locked/inner").mkdir(parents=True)
    (top / "locked/inner/x").touch()
    (top / "locked/inner").chmod(0)
    (top / "locked").chmod(0)
    remove(top)
    assert not os.path.lexists(top)
    for one in (top, tmp_path / "gone" / "gone"):
        remove(one)  # nothing is there
    (tmp_path / "alone").symlink_to(outside)
    remove(tmp_path / "alone")
    assert not os.path.lexists(tmp_path / "alone")


def test_a_removal_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "top/inner").mkdir(parents=True)
    monkeypatch.setattr(files, "REMOVE_SECONDS", -1.0)
    with pytest.raises(OSError, match="not removed within"):
        remove(tmp_path / "top")


@pytest.mark.parametrize("kind", [pipe, device, folder, None], ids=["pipe", "device", "folder", "nothing"])
def test_a_file_is_written_anew_whatever_stands_there(tmp_path: Path, kind: Callable[[Path], None] | None) -> None:
    for name in ("x", ".x.new"):
        if kind:
            kind(tmp_path / name)
    write_anew(tmp_path / "x", b"new", durable=True)
    assert read_plain(tmp_path / "x", 10) == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
