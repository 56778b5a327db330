"""Preparation, end to end through the command line: what lies on disk is whole, disjoint, and made once."""

import hashlib
import json
import os

import numpy as np
import pytest
from conftest import on_windows, prepare, program

from harness.machine import detect_preset
from harness.overlap import code_points, letters_of
from harness.tokenizer import Tokenizer


def documents(folder, split, tokenizer):
    """The texts of a shard, cut at the document marks."""
    tokens = np.fromfile(folder / f"{split}.bin", np.uint16)
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    return [tokenizer.decode(part[1:]) for part in np.split(tokens, starts)[1:]]


def test_splits_are_disjoint_and_together_they_are_the_text(tiny):
    tokenizer = Tokenizer((tiny.train / "tokenizer.model").read_bytes())
    train, val, test = (documents(d, s, tokenizer) for d, s in ((tiny.train, "train"), (tiny.held, "val"), (tiny.held, "test")))
    normal = [{letters_of(code_points(d))[0].tobytes() for d in docs} for docs in (train, val, test)]
    assert not normal[0] & normal[1]
    assert not normal[0] & normal[2]
    assert not normal[1] & normal[2]
    text = (tiny.home / "text.txt").read_text(encoding="utf-8")
    assert all(d in text for d in train + val + test)
    assert len(train) > 100
    assert len(val) > 1
    assert len(test) > 1
    meta = json.loads((tiny.held / "meta.json").read_text())
    assert meta["val_bytes"] == sum(len(d.encode()) for d in val)
    assert meta["val_sha256"] == hashlib.sha256("".join(val).encode()).hexdigest()


def test_preparing_again_changes_nothing_and_says_the_same(tiny):
    def state():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for d in (tiny.train, tiny.held) for p in sorted(d.iterdir())}
    before = state()
    done = prepare("--dataset", f"text:{tiny.home / 'text.txt'}", "--preset", "tiny", "--json", tiny.home / "again.json",
                   home=tiny.home)
    assert done.returncode == 0
    assert state() == before
    assert json.loads((tiny.home / "again.json").read_text()) == tiny.entry


def test_on_windows_the_same_data_is_prepared(tiny, tmp_path):
    done = prepare("--dataset", f"text:{tiny.home / 'text.txt'}", "--preset", "tiny", "--json", tmp_path / "entry.json",
                   home=tmp_path / "home", ACTED_PLATFORM="linux", **on_windows())
    assert done.returncode == 0, done.stderr
    entry = json.loads((tmp_path / "entry.json").read_text())
    assert {key: entry[key] for key in ("data_hash", "tokenizer_hash")} == {
        key: tiny.entry[key] for key in ("data_hash", "tokenizer_hash")}
    assert not (tmp_path / "home" / "work" / entry["id"]).exists()


def test_the_trainer_is_given_no_held_out_text(tiny):
    assert {p.name for p in tiny.train.iterdir()} == {"meta.json", "tokenizer.model", "train.bin"}
    assert str(tiny.held) not in (tiny.train / "meta.json").read_text()
    assert os.path.commonpath([tiny.train, tiny.held]) == str(tiny.home)


def test_only_a_preparation_by_hand_becomes_the_current_one(tmp_path):
    """A night prepares with --json: after `make demo` a real night must not silently be a demo night."""
    (tmp_path / "a.txt").write_text("".join(f"Line {i} of some text, {i * i}.\n\n" for i in range(3000)))
    options = ("--dataset", f"text:{tmp_path / 'a.txt'}", "--preset", "tiny")
    assert prepare(*options, "--json", tmp_path / "entry.json", home=tmp_path / "home").returncode == 0
    assert not (tmp_path / "home" / "current.json").exists()
    assert prepare(*options, home=tmp_path / "home").returncode == 0
    current = json.loads((tmp_path / "home" / "current.json").read_text())
    assert current == json.loads((tmp_path / "entry.json").read_text())


@pytest.mark.slow  # the machine's own dataset has 8 MB
@pytest.mark.skipif(detect_preset() != "cpu", reason="where there is a GPU, the machine's own dataset comes from the hub")
def test_a_first_training_prepares_the_data_itself(tmp_path):
    train_file = tmp_path / "train.py"
    train_file.write_text("from prepare_mlx import start_run\nrun = start_run(__file__)\nprint(run.data.name, run.budget.text)\n")
    for said in (["no data is prepared yet", "ready: stories-1024-", "stories-1024-"], ["stories-1024-"]):
        done = program(train_file, "--budget", "3steps", home=tmp_path / "home", cwd=tmp_path, AUTORESEARCH_DEVICE="cpu")
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line.startswith(start) for line, start in zip(lines, said, strict=True)] == [True] * len(said), done.stdout
        assert lines[-1].endswith(" 3steps")
