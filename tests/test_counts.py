"""`counts.py` against Kneser-Ney written down with dictionaries, and what must hold of any such model."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counts import Counts, repeats, spread


def kneser_ney(text: list[int], vocab_size: int, order: int, context: list[int], word: int) -> float:
    """The definition, in the order of the paper: raw counts at the longest n-gram, continuation counts below, one discount each."""
    def table(n: int) -> Counter:  # n-grams of n tokens of context and a word
        if n == order - 1:
            return Counter(tuple(text[i : i + n + 1]) for i in range(len(text) - n))
        return Counter(gram[1:] for gram in {tuple(text[i : i + n + 2]) for i in range(len(text) - n - 1)})

    p = 1 / vocab_size
    for n in range(min(order, len(context) + 1)):
        grams, before = table(n), tuple(context[len(context) - n :])
        if tuple(before) not in {tuple(text[i : i + n]) for i in range(len(text) - n)}:
            break  # never seen before a word, so none that is longer was
        once, twice = (sum(c == k for c in grams.values()) for k in (1, 2))
        discount = min(max(Fraction(once, max(once + 2 * twice, 1)), Fraction(1, 10)), Fraction(95, 100))
        following = {gram[-1]: c for gram, c in grams.items() if gram[:-1] == before}
        total = sum(following.values())
        if total:
            share = max(following.get(word, 0) - discount, 0) / total
            p = float(share) + float(discount * len(following) / total) * p
    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_kneser_neys(order: int) -> None:
    rng = np.random.default_rng(order)
    text, vocab_size = rng.integers(0, 6, 300) * rng.integers(0, 2, 300), 7
    rows = np.stack([text[40:48], rng.integers(0, 7, 8)])                       # what was read, and what was not
    ours = Counts.of(text, vocab_size, order).probabilities(rows)
    for b in range(2):
        for t in range(8):
            expected = [kneser_ney(text.tolist(), vocab_size, order, rows[b, : t + 1].tolist(), w) for w in range(vocab_size)]
            np.testing.assert_allclose(ours[b, t], expected, rtol=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.integers(1, 6), st.data())
def test_they_add_up_to_one_and_none_is_zero(text: list[int], order: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 12))  # shorter than the longest context, too
    rows = np.array([data.draw(st.lists(st.integers(0, 9), min_size=width, max_size=width)) for _ in range(2)])
    p = Counts.of(np.array(text, np.uint16), 10, order).probabilities(rows)
    assert p.shape == (2, width, 10)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-5)
    assert p.min() > 0


def test_a_token_is_expected_by_what_stands_before_it_in_its_row_only() -> None:
    rng = np.random.default_rng(0)
    counts = Counts.of(rng.integers(0, 20, 5000), 20, 4)
    rows = rng.integers(0, 20, (3, 16))
    whole = counts.probabilities(rows)
    np.testing.assert_array_equal(counts.probabilities(rows[:, :9]), whole[:, :9])
    np.testing.assert_array_equal(counts.probabilities(rows[1:2]), whole[1:2])


def test_a_file_gives_the_same_counts_again(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 50, 2000)
    counts = Counts.of(text, 50, 3)
    counts.save(tmp_path / "counts.npz")
    again = Counts.load(tmp_path / "counts.npz")
    assert again.order == 3
    np.testing.assert_array_equal(again.probabilities(text[None, :64]), counts.probabilities(text[None, :64]))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        Counts.of(np.array([1]), 10, 5)


def test_a_mixture_has_its_share_of_both() -> None:
    rng = np.random.default_rng(0)
    counts, rows = Counts.of(rng.integers(0, 9, 400), 9, 3), rng.integers(0, 9, (2, 5))
    logits = rng.normal(size=(2, 5, 9)).astype(np.float32) * 50
    network = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(axis=-1, keepdims=True)
    mixed = counts.mixed(logits, rows, 0.3)
    assert mixed.dtype == np.float32
    counted = counts.probabilities(rows)
    product = network**0.7 * counted**0.3
    expected = (0.7 * network + 0.3 * counted + product / product.sum(axis=-1, keepdims=True)) / 2
    np.testing.assert_allclose(np.exp(mixed), expected, rtol=1e-5, atol=1e-9)


def test_what_followed_the_longest_repeat_is_copied() -> None:
    row = np.array([1, 2, 3, 1, 2, 4, 2, 3, 1, 2])
    length, places = repeats(row, 3)
    assert length.tolist() == [0, 0, 0, 1, 2, 0, 1, 2, 3, 3]                    # at the end: 3 1 2 stood there once, then a 4
    assert np.flatnonzero(places[9]).tolist() == [4]
    assert np.flatnonzero(places[6]).tolist() == [1, 4]
    counts, logits = Counts.of(row, 5, 2), np.zeros((1, 10, 5), np.float32)
    plain, copied = (np.exp(counts.mixed(logits, row[None], 0.5, shares))[0] for shares in ((), (0.1, 0.2, 0.4)))
    np.testing.assert_allclose(copied[9], 0.6 * plain[9] + 0.4 * np.eye(5)[4], rtol=1e-5)
    np.testing.assert_allclose(copied[6], 0.9 * plain[6] + 0.05 * np.eye(5)[3] + 0.05 * np.eye(5)[4], rtol=1e-5)
    np.testing.assert_array_equal(copied[5], plain[5])
    np.testing.assert_allclose(copied.sum(axis=-1), 1, rtol=1e-5)


def test_copies_come_from_a_rows_past_only() -> None:
    rng = np.random.default_rng(1)
    rows, counts = rng.integers(0, 4, (2, 20)), Counts.of(rng.integers(0, 4, 100), 4, 2)
    logits = rng.normal(size=(2, 20, 4)).astype(np.float32)
    whole = counts.mixed(logits, rows, 0.5, (0.1, 0.2))
    np.testing.assert_array_equal(counts.mixed(logits[:, :11], rows[:, :11], 0.5, (0.1, 0.2)), whole[:, :11])
    np.testing.assert_array_equal(counts.mixed(logits[1:], rows[1:], 0.5, (0.1, 0.2)), whole[1:])


def test_pieces_of_a_long_text_come_from_all_over_it() -> None:
    text = np.arange(10_000)
    np.testing.assert_array_equal(spread(text, 10_000), text)
    some = spread(text, 1000)
    assert len(some) <= 1000
    assert len(np.unique(some)) == len(some)
    assert some[0] == 0
    assert some[-1] == 9999
    assert np.all(np.diff(some) < 200)
    assert len(spread(text, 3)) == 3
