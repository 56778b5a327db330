"""A source looked at without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.judgement.novelty import SourceError, fingerprint


def source_of(tmp_path: Path, text: str | bytes) -> Any:
    path = tmp_path / "train_mlx.py"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return fingerprint(path)


def test_identity_ignores_comments_formatting_docstrings_and_seeds(tmp_path: Path) -> None:
    base = source_of(tmp_path, 'X = {"a": 1}\nSEED = 1\ndef f(a):\n    """Doc."""\n    return a + 1\nmx.random.seed(3)\n')
    other_style = '# note\nX = {"a": 1,}\nSEED = int(g("S"))\n\n\ndef f(a):\n  "Other."\n  return (a + 1)\nmx.random.seed(9)\n'
    same = source_of(tmp_path, other_style)
    assert same == base
    for change in ("X = {'a': 2}", "X = {'b': 1}"):
        other = source_of(tmp_path, f'{change}\nSEED = 1\ndef f(a):\n    return a + 1\nmx.random.seed(3)\n')
        assert other.identity != base.identity
    assert source_of(tmp_path, "x = 1; y = 2").lines == source_of(tmp_path, "x = 1\ny = 2\n\n# c\n").lines == 2


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("mx.random.seed(run.seed)", "mx.random.seed(run.seed + 1)", True),
        ("mx.random.seed(run.seed)", "mx.random.seed(-7 * args.data_seed)", True),
        ("k = mx.random.key(1)", "k = mx.random.key(2)", True),
        ("r = np.random.default_rng(1)", "r = np.random.default_rng(2)", True),
        ("r = random.Random(SEED)", "r = random.Random(SEED + 5)", True),
        ("batches(8, seed=1)", "batches(8, seed=2)", True),
        ("mx.random.seed(run.seed)", "mx.random.seed(step)", False),  # in a loop it would repeat its noise
        ("r = np.random.default_rng([seed, step])", "r = np.random.default_rng([seed, 1])", False),
        ("cache.key(1)", "cache.key(2)", False),
        ("batches(8, seed=1)", "batches(9, seed=1)", False),
        ("f(reseed_every=1)", "f(reseed_every=2)", False),
    ],
)
def test_what_is_only_another_seed(tmp_path: Path, one: str, other: str, same: bool) -> None:
    assert (source_of(tmp_path, one) == source_of(tmp_path, other)) is same


@pytest.mark.parametrize("text", ["def f(:\n", "x = 1\0", b"\xff\xfe = 1\n", "(" * 5000])
def test_what_is_not_python_is_named(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(SourceError, match=r"train_mlx\.py"):
        source_of(tmp_path, text)
