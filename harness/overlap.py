"""
Compare texts by their letters: cut a text into passages, and find duplicates and stretches that two texts share.

The letters of a text are its letters and digits in lower case, without accents, white space and punctuation. A copy with other line
ends, other wrapping, other quotes or other case has the same letters, so it is cut at the same places and recognised.
"""

import unicodedata
from functools import lru_cache

import numpy as np

WINDOW = 32                     # letters in one rolling hash, about 40 characters of English
NEIGHBOURS = 16                 # of this many windows in a row, one is compared: its hash decides, so it is the same in every copy
COPY = 80                       # letters, about 100 characters: a shared stretch this long is a copy, a shorter one may be a phrase
SHINGLE = 48                    # letters, about 60 characters: a shorter stretch counts as no copy at all
SLAB = 1 << 20                  # characters that are cut at a time
STEPS = (1, 2, 4, 8, 16)        # the window doubles with each step
BASE = 0x9E3779B97F4A7C15


@lru_cache(maxsize=1)
def letter_table() -> np.ndarray:
    """For each code point below 65,536 the letter that it counts as, 0 if it is no letter: uint32 [65536]."""
    table = np.zeros(1 << 16, np.uint32)
    for point in range(1 << 16):
        if (char := chr(point)).isalnum():
            base, *marks = unicodedata.normalize("NFD", char)  # é -> e and an accent; Hangul would become other letters
            base = base if all(unicodedata.combining(m) for m in marks) else char
            table[point] = ord(base.lower()[0])
    return table


def code_points(text: str) -> np.ndarray:
    """The code points of a text: uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def letters_of(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the letters of a text, uint32 [n], and their positions in it in characters, int64 [n]. Characters beyond U+FFFF,
    such as emoji, count as letters."""
    letters = letter_table()[np.minimum(points, 0xFFFF)]
    if len(points) and points.max() > 0xFFFF:
        letters = np.where(points > 0xFFFF, points, letters)
    at = np.flatnonzero(letters)
    return letters[at], at


def rolling(letters: np.ndarray) -> np.ndarray:
    """Hash every window of WINDOW letters: uint64 [n - WINDOW + 1]. Entry i covers the letters i .. i + WINDOW - 1."""
    hashes = mixed(letters.astype(np.uint64) + np.uint64(1))
    for step in STEPS:  # a polynomial modulo 2^64: hash of 2k letters = hash of the first k * BASE^k + hash of the next k
        hashes = hashes[:-step] * np.uint64(pow(BASE, step, 1 << 64)) + hashes[step:] if len(hashes) > step else hashes[:0]
    return mixed(hashes)


def mixed(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values so that each bit of the result depends on all bits of the value."""
    values = (values ^ (values >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(29)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(32)
    return values


def sampled(letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the windows to compare. Returns the position of each in letters, int64 [k], and its hash, uint64 [k].

    This is winnowing: of every NEIGHBOURS windows in a row, the one with the smallest hash is chosen, about one in eight of all. So
    two texts that share WINDOW + NEIGHBOURS - 1 letters always have a chosen window in common.
    """
    hashes = rolling(letters)
    lowest = hashes
    for step in STEPS[:4]:  # of NEIGHBOURS windows from each one on
        lowest = np.minimum(lowest[:-step], lowest[step:]) if len(lowest) > step else lowest
    edge = np.zeros(NEIGHBOURS - 1, np.uint64)
    highest = np.concatenate([edge, lowest, edge])
    for step in STEPS[:4]:  # a window is compared if it is the lowest of one of the rows that it belongs to
        highest = np.maximum(highest[:-step], highest[step:])
    begins = np.flatnonzero(hashes == highest[: len(hashes)])
    return begins, hashes[begins]


def find(hashes: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Look hashes up in the sorted array `index`. Returns which of the hashes are in it, int64 [k], and where, int64 [k]."""
    if not len(index):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    where = np.minimum(np.searchsorted(index, hashes), len(index) - 1)
    hit = np.flatnonzero(index[where] == hashes)
    return hit, where[hit]


def stretches(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join shared windows to stretches. begins: positions of the windows in letters, ascending. Returns where each stretch
    begins and ends, in letters: int64 [k], int64 [k]."""
    if not len(begins):
        return begins, begins
    gaps = np.flatnonzero(np.diff(begins) > 2 * WINDOW)
    return begins[np.concatenate([[0], gaps + 1])], begins[np.concatenate([gaps, [-1]])] + WINDOW


def passages(text: str, size: int) -> list[str]:
    """Cut a text into passages of about `size` characters; joined, they are `text` again. A text below 2 * `size` is not cut.

    Only the letters near a cut decide where it is. Among the allowed lengths, a passage ends at a blank line, else at a
    sentence end, else at a line end, else at a word end, else anywhere; among equal places, where the rolling hash of the
    letters before is smallest. So after an insertion, or in a copy that begins elsewhere, the cuts are soon the same again.
    """
    if len(text) <= 2 * size:
        return [text]
    slabs = [0]  # they bound the memory: one JSON line may hold a library
    while len(text) - slabs[-1] > 2 * SLAB:
        slabs.append(text.find("\n", slabs[-1] + SLAB, slabs[-1] + 2 * SLAB) + 1 or slabs[-1] + SLAB)
    return [p for a, b in zip(slabs, [*slabs[1:], len(text)], strict=True) for p in slab_passages(text[a:b], size)]


def slab_passages(text: str, size: int) -> list[str]:
    """`passages` of a text of at most 2 * SLAB characters."""
    points = code_points(text)
    letters, at = letters_of(points)
    keys = cut_keys(points, letters, at)
    cuts, position = [0], 0  # characters, letters
    while len(letters) - position > 2 * size:
        low = position + size // 4
        position = low + int(np.argmin(keys[low : position + size + size // 4])) + 1
        cuts.append(behind_gap(text, int(at[position - 1]) + 1, int(at[position])))
    parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    longest = 16 * size  # in text of few letters, such as a table of dashes, a passage would have no end
    return [p[i : i + longest] for p in parts for i in range(0, len(p), longest)]


def cut_keys(points: np.ndarray, letters: np.ndarray, at: np.ndarray) -> np.ndarray:
    """For each letter, how bad a cut after it would be: uint64 [n]. The kind of gap after the letter counts first, then the
    hash."""
    kinds = gap_table()[np.minimum(points, 0xFFFF)]
    crlf = np.flatnonzero((points[:-1] == 13) & (points[1:] == 10))
    kinds[crlf] -= GAP_LINE - GAP_SPACE  # \r\n is one line end
    total = np.zeros(len(points) + 1, np.int64)
    np.cumsum(kinds, out=total[1:])
    before = np.flatnonzero(np.diff(at, append=len(points)) > 1)  # letters with a gap behind them
    gap = total[np.append(at, len(points))[before + 1]] - total[at[before] + 1]
    lines, spaces, stops, wide = gap >> 48, (gap >> 32) & 0xFFFF, (gap >> 16) & 0xFFFF, gap & 0xFFFF
    sentence = (wide > 0) | ((stops > 0) & (spaces + lines > 0))
    keys = np.full(len(letters), np.uint64(15 << 59), np.uint64)
    keys[WINDOW - 1 :] = (rolling(letters) >> np.uint64(5)) | np.uint64(4 << 59)
    badness = np.select([lines > 1, sentence, lines > 0], [0, 1, 2], 3).astype(np.uint64)
    keys[before] = (keys[before] & np.uint64(2**59 - 1)) | (badness << np.uint64(59))
    return keys


GAP_LINE, GAP_SPACE, GAP_STOP, GAP_WIDE = 1 << 48, 1 << 32, 1 << 16, 1  # counts of characters in a gap, side by side in an int64


@lru_cache(maxsize=1)
def gap_table() -> np.ndarray:
    """For each code point below 65,536, its kind in a gap between two letters: int64 [65536]."""
    table = np.zeros(1 << 16, np.int64)
    table[[ord(c) for c in "\t \u00a0\u3000"]] = GAP_SPACE
    table[[ord(c) for c in "\n\r"]] = GAP_LINE
    table[[ord(c) for c in ".!?…"]] = GAP_STOP
    table[[ord(c) for c in "。！？"]] = GAP_WIDE  # needs no space behind it
    return table


def behind_gap(text: str, start: int, end: int) -> int:
    """Where to cut in the gap between two letters: after its last line end, else after its last white space, else at its end."""
    gap = text[start:end]
    if line := max(gap.rfind("\n"), gap.rfind("\r")) + 1:
        return start + line
    return next((start + i for i in range(len(gap), 0, -1) if gap[i - 1].isspace()), end)
