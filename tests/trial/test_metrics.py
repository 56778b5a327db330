"""The summary block is read strictly, the metrics as they grow."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from agent.trial.metrics import SummaryError, Tail, Watch, differences, read_summary

BLOCK = """warm-up
---
val_bpb:          1.234500
training_seconds: 300.1
total_seconds:    325.9
peak_vram_mb:     4506.2
mfu_percent:      39.80
total_tokens_M:   499.6
num_steps:        953
num_params_M:     50.3
depth:            8
val_bytes:        1000
val_sha256:       00aa
data_hash:        1e5
tokenizer_hash:   9
seq_len:          256
budget:           300s
device:           m3-max
seed:             4
"""


def test_summary_is_read() -> None:
    block = read_summary(BLOCK)
    assert block["val_bpb"] == 1.2345
    assert block["data_hash"] == "1e5", "a hash stays text, also one that looks like a number"
    assert differences(block, block) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("---\n", "", "exactly one summary block"),
        ("---\n", "---\n---\n", "found 2"),
        ("val_bpb:          1.234500", "val_bpb: nan", "val_bpb: expected a finite number"),
        ("val_bpb:          1.234500", "val_bpb: -1", "positive"),
        ("val_bpb:          1.234500", "val_bpb: 1\nval_bpb: 0.5", "val_bpb twice"),
        ("val_bpb:          1.234500", "val_bpb:", "expected 'key: value'"),
        ("val_bpb:          1.234500\n", "", "lacks val_bpb"),
        ("seed:             4", "seed: four", "seed: expected a number"),
        ("num_steps:        953", "num_steps: inf", "num_steps: expected a finite"),
        ("seed:             4\n", "seed: 4\nextra: nan\n", "extra: expected a finite"),
        ("seed:             4\n", "seed: 4\ndone.\n", "found 'done.'"),
        ("data_hash:        1e5\n", "", "lacks data_hash"),
    ],
)
def test_a_summary_that_is_not_whole_is_no_score(old: str, new: str, words: str) -> None:
    assert old in BLOCK
    with pytest.raises(SummaryError, match=words.replace(".", r"\.")):
        read_summary(BLOCK.replace(old, new))


def test_metrics_are_read_as_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    path.write_bytes(b'{"step": 1}\n{"step"')
    assert tail.new() == [{"step": 1}]
    with open(path, "ab") as file:
        file.write(b': 2}\nrubbish\n[1]\n\xff\n')
    assert tail.new() == [{"step": 2}]
    assert tail.new() == []


@pytest.mark.parametrize(("loss", "lost"), [("NaN", True), ("Infinity", True), ("31", True), ("29", False), ("null", False)])
def test_watch_stops_a_lost_training(tmp_path: Path, loss: str, lost: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    shown: list[dict[str, Any]] = []
    watch = Watch(path, 30.0, shown.append)
    path.write_text(f'{{"step": 4, "loss": {loss}, "lr": Infinity}}\n')
    assert watch() == ("nan" if lost else None)
    assert all(math.isfinite(value) for row in shown for value in row.values())
    assert watch.step == 4
    assert os.path.getsize(path) > 0
