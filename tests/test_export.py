"""scripts/export.py: the folder runs under mlx-lm and gives the model's own logits, whatever an agent made of the architecture."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PINNED, ROOT, Dataset, environment, program

from agent.journal.journal import Journal

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
passes, plain = [], model._logits
model._logits = lambda row: passes.append(row.shape[1]) or plain(row)
theirs = [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=2 * context)]
assert theirs == greedy, (theirs, greedy)
cache = model.make_cache()
by_cache = [np.array(model(mx.array([[token]]), cache=cache))[0, 0] for token in [*ids, *greedy][:context]]
row[0] = [*ids, *greedy][:context]
gap = np.abs(by_cache - logits_of(row)[0]).max()
short = sum(width < context for width in passes)
cache[0].trim(5)
again = np.array(model(mx.array([[int(row[0, context - 5])]]), cache=cache))[0, 0]
gap = max(gap, np.abs(again - logits_of(row)[0, context - 5]).max())
print("equal", len(greedy), short, f"{gap:.1e}")
"""


def compare(out: Path, run_dir: Path, tiny: Dataset) -> int:
    """Check logits and text; the number of passes that the cache made shorter."""
    argv = [sys.executable, "-W", "ignore", "-c", COMPARE, str(out), str(run_dir), str(tiny.train)]
    done = subprocess.run(argv, env=environment(tiny.home), cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    word, tokens, short, gap = done.stdout.split()
    assert (word, tokens) == ("equal", "64")
    assert float(gap) < 1e-3, "with the cache, whether it fits the model or not, after a trim, too"
    return int(short)


def test_mlx_lm_gives_the_same_logits_and_text(trained: Path, tiny: Dataset, tmp_path: Path) -> None:
    done = program(EXPORT, trained, tmp_path / "out", home=tiny.home)
    assert done.returncode == 0, done.stderr
    assert compare(tmp_path / "out", trained, tiny) > 10
    card = (tmp_path / "out" / "README.md").read_text()
    assert "20steps" in card
    assert "text.txt" in card
    again = program(EXPORT, trained, tmp_path / "out", home=tiny.home)
    assert "exists already" in again.stderr
    assert "with train.json" in program(EXPORT, tmp_path, tmp_path / "x", home=tiny.home).stderr
    assert "there is no night in" in program(EXPORT, tmp_path / "x", "--tag", "none", home=tiny.home, cwd=tmp_path).stderr


def test_the_card_of_a_nights_model_tells_its_recipe(trained: Path, tiny: Dataset, tmp_path: Path) -> None:
    """Experiment 1 was kept; its words are an agent's, and no markup."""
    with Journal(tmp_path / "runs" / "night") as journal:
        journal.append("night_start", tag="night", base="b", train_file="train_mlx.py", seed=1, dataset={})
        for n, score in ((0, 2.0), (1, 1.5)):
            journal.append("experiment", n=n, parent="b")
            journal.append("candidate", n=n, commit=f"c{n}", ast="a", lines=1, description="<b>wider</b> | `MLP`", usage={},
                           seconds=0.0)
            for k in range(2):
                run = f"000{n}-{k}"
                journal.append("trial_start", n=n, k=k, seed=k, dir=run)
                journal.append("trial_end", n=n, k=k, seed=k, dir=run, status="ok", val_bpb=score + 0.01 * k, summary={},
                               seconds=1.0, error=None)
            journal.append("verdict", n=n, status="keep", reason="", val_bpb=score, description="", error=None, usage={},
                           seconds=0.0)
        journal.append("test_score", n=1, split="test", val_bpb=1.5, test_bpb=1.5321, summary={}, error=None)
        shutil.copytree(trained, tmp_path / "runs" / "night" / "trials" / run)
    done = program(EXPORT, "out", home=tiny.home, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# night, experiment 1" in card
    assert "1.5050 bits per byte (mean of 2 trainings, sd 0.0" in card
    assert "| held-out test | 1.5321 bits per byte" in card
    assert "- \\<b\\>wider\\</b\\> \\| \\`MLP\\`: 0.5000" in card
    assert "| commit | c1 |" in card
    assert "20 steps" in card


CHANGES = {
    "another block": (
        (("mx.square(mx.maximum(self.c_fc(x), 0))", "nn.silu(self.c_fc(x))"), ("self.wte", "self.letters"),
         ('"wte.weight"', '"letters.weight"'), ("return x + self.mlp(norm(x))", "return x + norm(self.mlp(norm(x)))")), True),
    "no attention": ((("y = attention(q, k, v, scale=D**-0.5, mask=\"causal\")", "y = mx.cumsum(v, axis=2)"),), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_an_architecture_that_an_agent_changed_runs_as_well(tiny: Dataset, tmp_path: Path, change: str) -> None:
    """The folder has the code. The cache is used where it fits the architecture, and only there."""
    source, (edits, fits) = (PINNED / "train_mlx.py").read_text(), CHANGES[change]
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "train_mlx.py").write_text(source)
    run = program("train_mlx.py", "--budget", "10steps", "--run-dir", "run", home=tiny.home, cwd=tmp_path,
                  AUTORESEARCH_DATA=str(tiny.train), AUTORESEARCH_SCORE="0")
    assert run.returncode == 0, run.stderr
    done = program(EXPORT, tmp_path / "run", tmp_path / "out", home=tiny.home)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_file"] == "model.py"
    assert (compare(tmp_path / "out", tmp_path / "run", tiny) > 10) is fits
