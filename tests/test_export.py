"""scripts/export.py: the folder runs under mlx-lm and gives the model's own logits, whatever an agent made of the architecture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PINNED, ROOT, Dataset, environment, program

EXPORT = ROOT / "scripts" / "export.py"
COMPARE = r"""
import json, sys
from pathlib import Path
from harness.machine import load_fast_blas
load_fast_blas(threads=1)
import mlx.core as mx, numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step
out, run_dir, data = map(Path, sys.argv[1:])
model, tokenizer = load(str(out), trust_remote_code=True)
from scripts.sample import Options, Uncached, generate, load as load_run
from harness.tokenizer import Tokenizer
ours = Tokenizer((data / "tokenizer.model").read_bytes())
context = json.loads((data / "meta.json").read_text())["seq_len"]
texts = ["Tree house, 3 cats.", "über naïve  \n\n  dogs", "a\tb 1984 don't", "\U0001f600 rare", " leading"]
for text in texts:
    assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text), text
    assert tokenizer.decode(ours.encode(text)) == text, text
ids = [ours.bos_id, *ours.encode(texts[0])][:context]
assert tokenizer.encode(texts[0]) == [ours.bos_id, *ours.encode(texts[0])]
logits_of = load_run(run_dir)
row = np.zeros((1, context), np.int32); row[0, : len(ids)] = ids
wanted = logits_of(row)[:, : len(ids)]
found = np.array(model(mx.array([ids])))
assert np.abs(found - wanted).max() == 0, np.abs(found - wanted).max()
greedy = list(generate(Uncached(logits_of, context), ids, -1, Options(2 * context, 0.0, 1.0, 1)))
theirs = [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=2 * context)]
assert theirs == greedy, (theirs, greedy)
print("equal", len(greedy))
"""


def compare(out: Path, run_dir: Path, tiny: Dataset) -> None:
    argv = [sys.executable, "-W", "ignore", "-c", COMPARE, str(out), str(run_dir), str(tiny.train)]
    done = subprocess.run(argv, env=environment(tiny.home), cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("equal 64")


def test_mlx_lm_gives_the_same_logits_and_text(trained: Path, tiny: Dataset, tmp_path: Path) -> None:
    done = program(EXPORT, tmp_path / "out", "--run", trained, home=tiny.home)
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "out", trained, tiny)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "20steps" in card
    assert "text.txt" in card
    again = program(EXPORT, tmp_path / "out", "--run", trained, home=tiny.home)
    assert "exists already" in again.stderr
    assert "with train.json" in program(EXPORT, tmp_path / "x", "--run", tmp_path, home=tiny.home).stderr


@pytest.mark.slow
def test_an_architecture_that_an_agent_changed_runs_as_well(tiny: Dataset, tmp_path: Path) -> None:
    """Another activation, another block, weights of other names: the folder has the code."""
    source = (PINNED / "train_mlx.py").read_text()
    for old, new in (("mx.square(mx.maximum(self.c_fc(x), 0))", "nn.silu(self.c_fc(x))"), ("self.wte", "self.letters"),
                     ('"wte.weight"', '"letters.weight"'), ("return x + self.mlp(norm(x))", "return x + norm(self.mlp(norm(x)))")):
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "train_mlx.py").write_text(source)
    run = program("train_mlx.py", "--budget", "10steps", "--run-dir", "run", home=tiny.home, cwd=tmp_path,
                  AUTORESEARCH_DATA=str(tiny.train), AUTORESEARCH_SCORE="0")
    assert run.returncode == 0, run.stderr
    done = program(EXPORT, tmp_path / "out", "--run", tmp_path / "run", home=tiny.home)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_file"] == "model.py"
    compare(tmp_path / "out", tmp_path / "run", tiny)
