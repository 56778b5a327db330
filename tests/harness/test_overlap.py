"""Cuts that a copy of a text shares, and stretches that two texts share, whatever was done to line ends, wrapping and case."""

import textwrap
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.overlap import NEIGHBOURS, WINDOW, code_points, find, letters_of, passages, rolling, sampled, stretches
from harness.stories import Storyteller

TELLER = Storyteller(seed=7)
TEXT = "\n\n".join(TELLER.story() for _ in range(150))  # about 100,000 characters


def letters(text: str) -> bytes:
    return letters_of(code_points(text))[0].tobytes()


@given(st.text("ab .\n", max_size=3000), st.integers(4, 50))
@settings(max_examples=100)
def test_passages_joined_are_the_text(text, size):
    parts = passages(text, size)
    assert "".join(parts) == text
    assert all(parts) or not text
    assert max(map(len, parts)) <= max(16 * size, 2 * size)


@pytest.mark.parametrize("text", ["日本語" * 20_000, "日本語。今日は" * 9000, "-" * 100_000, "x" * 100_000, "\n" * 90_000,
                                  "😀" * 50_000])
def test_text_without_words_is_cut_too(text):
    parts = passages(text, 2048)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 16 * 2048


def test_passages_end_at_blank_lines_else_at_sentences():
    assert all(part.endswith("\n\n") for part in passages(TEXT, 2048)[:-1])
    parts = passages(TEXT.replace("\n\n", " "), 2048)
    assert all(part.rstrip('" ')[-1] in ".!?" for part in parts)
    assert 1000 < len(TEXT) / len(parts) < 3000


@pytest.mark.parametrize("copy", [
    TEXT.replace("\n", "\r\n"), TEXT.replace("\n", "\r"), TEXT[1234:], TEXT.upper(), TEXT.replace('"', "”").replace("'", "’"),
    "\n\n".join(textwrap.fill(p, 50) for p in TEXT.split("\n\n")), "A line before.\n" + TEXT,
    TEXT[:40_000] + "Inserted. " + TEXT[40_000:],
], ids=["crlf", "cr", "shifted", "upper", "quotes", "wrapped", "prefixed", "inserted"])
def test_a_copy_is_cut_at_the_same_places(copy):
    one, two = ({letters(part) for part in passages(text, 2048)} for text in (TEXT, copy))
    assert len(one & two) >= min(len(one), len(two)) - 2


def test_letters_ignore_accents_case_and_how_they_are_composed():
    text = "Où est l’ÉLÈVE?\r\n"
    assert letters(text) == letters(unicodedata.normalize("NFD", text)) == letters("ou est l'eleve")
    assert letters("日本、語が") == letters("日\n本語が")
    assert letters(" \n-_.") == b""
    assert len(letters("😀😀")) == 8


def test_a_hash_depends_on_its_window_and_not_on_its_place():
    hashes = rolling(letters_of(code_points(TEXT))[0])
    shifted = rolling(letters_of(code_points(TEXT[100:]))[0])
    assert np.array_equal(hashes[-len(shifted) :], shifted)
    assert len(hashes) == len(letters(TEXT)) // 4 - WINDOW + 1
    assert len(rolling(np.zeros(WINDOW - 1, np.uint32))) == 0
    raw = letters(TEXT)
    distinct = {raw[4 * i : 4 * (i + WINDOW)] for i in range(len(hashes))}
    assert len(np.unique(hashes)) == len(distinct), "different windows, different hashes"


def test_a_shared_stretch_is_found_where_it_stands():
    other = "".join(chr(97 + i * i * 7 % 26) for i in range(3000))
    index = np.unique(sampled(letters_of(code_points(TEXT))[0])[1])
    mixed = other + "\n".join(TEXT[5000:6000].split(" ")) + other[::-1]
    got, at = letters_of(code_points(mixed))
    begins, hashes = sampled(got)
    [begin], [end] = stretches(begins[find(hashes, index)[0]])
    assert 3000 <= at[begin] < 3060
    assert 3940 < at[end - 1] <= 4000
    assert len(find(sampled(letters_of(code_points(other))[0])[1], index)[0]) == 0


@given(st.integers(0, 1000), st.text("xyz", max_size=40), st.text("xyz", max_size=40))
@settings(max_examples=100)
def test_every_shared_stretch_of_47_letters_is_found(start, before, after):
    got = letters_of(code_points(TEXT))[0]
    index = np.unique(sampled(got)[1])
    stretch = got[start : start + WINDOW + NEIGHBOURS - 1]
    mixed = np.concatenate([code_points(before), stretch, code_points(after)])
    _, hashes = sampled(mixed)
    assert len(find(hashes, index)[0]) > 0
    assert len(sampled(got)[0]) < len(got) / 7


def test_nothing_is_shared_with_nothing():
    hashes = sampled(letters_of(code_points(TEXT))[0])[1]
    assert len(find(hashes, hashes[:0])[0]) == len(stretches(np.empty(0, np.int64))[0]) == 0
