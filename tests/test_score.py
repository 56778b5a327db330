"""The score: from logits, by another process, every byte once; and the refusals."""

import math

import numpy as np
import pytest
from conftest import ROOT, program, summary_of

from prepare_mlx import HarnessError, Tokenizer
from probes import log_probs


def test_training_then_score_end_to_end(tiny, trained):
    done = program(ROOT / "prepare_mlx.py", "score", trained, home=tiny.home)
    assert done.returncode == 0, done.stderr
    summary = summary_of(done.stdout)
    assert 0.5 < float(summary["val_bpb"]) < 2, "20 steps learn the words of the text"
    assert summary["data_hash"] == tiny.entry["data_hash"]
    assert summary["num_steps"] == "20"


def test_softmax_in_float64_equals_an_independent_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 8, (50, 300)).astype(np.float32)
    ids = rng.integers(0, 300, (50, 4))
    expected = [[float(x[i]) - math.log(math.fsum(math.exp(v) for v in map(float, x))) for i in row]
                for x, row in zip(logits, ids, strict=True)]
    assert np.allclose(log_probs(logits, ids), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_refused(bad):
    logits = np.zeros((4, 9), np.float32)
    logits[2, 3] = bad
    with pytest.raises(HarnessError, match="non_finite"):
        log_probs(logits, np.zeros((4, 1), int))


def test_every_validation_token_is_scored_once(tiny):
    tokenizer = Tokenizer((tiny.held / "tokenizer.model").read_bytes())
    tokens = np.fromfile(tiny.held / "val.bin", np.uint16)
    assert tokenizer.token_bytes[tokens].sum() == len(tokenizer.decode_bytes(tokens))
