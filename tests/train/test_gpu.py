"""What only a GPU can show: the shipped model trains there at its real size, in the memory that was expected. `make test-gpu`."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, prepare, program, summary_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900),
              pytest.mark.skipif(mx.default_device() != mx.Device(mx.gpu), reason="MLX has no GPU here")]


def test_the_shipped_model_trains_in_the_memory_that_was_expected(tmp_path: Path) -> None:
    """At this machine's preset and tier, on the embedded stories."""
    assert prepare("--dataset", "stories", "--json", tmp_path / "entry.json", home=tmp_path).returncode == 0
    data = json.loads((tmp_path / "entry.json").read_text())["train_dir"]
    done = program(ROOT / "train_mlx.py", home=tmp_path, seconds=600, AUTORESEARCH_DATA=data,
                   AUTORESEARCH_RUN_DIR=str(tmp_path / "run"), AUTORESEARCH_BUDGET="50steps", MLX_DISABLE_COMPILE="")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "train.json").read_text())
    assert facts["peak_vram_mb"] == pytest.approx(facts["expected_vram_mb"], rel=0.25)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < math.log(json.loads((tmp_path / "entry.json").read_text())["vocab_size"]) - 1
    assert 0 < float(summary_of(done.stdout)["val_bpb"]) < 4
