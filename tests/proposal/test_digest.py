"""The digest stays bounded and says what an agent can act upon; the ladder climbs from the journal alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.proposal.digest import FAMILIES, LADDER, Tried, advice, digest, family, near_misses, used_up

SIGMA = 0.003


def discard(k: int, gain: float = -0.02, kind: str = "optimizer", text: str = "") -> Tried:
    return Tried(k, text or f"idea {k}", "discard", (1.2 - gain,), gain, family=kind)


def keep(k: int, kind: str = "size") -> Tried:
    return Tried(k, f"kept idea {k}", "keep", (1.19, 1.191, 1.189), 0.01, family=kind)


def night(number: int) -> list[Tried]:
    draw, found = random.Random(number), []
    for k in range(1, number + 1):
        status = draw.choice(["discard"] * 8 + ["keep", "crash"])
        gain = None if status == "crash" else 0.01 if status == "keep" else -draw.expovariate(1 / 0.01) + SIGMA
        failure = "Traceback\n  x = y @ z\nValueError: [matmul] shapes (3,4) (5,6)\n" if status == "crash" else ""
        scores = () if gain is None else (1.2 - gain,)
        found.append(Tried(k, f"idea number {k} " * 5, status, scores, gain, 0, "", failure, draw.choice(FAMILIES)))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise MATRIX_LR to 0.03", "optimizer"),
        ("cosine schedule in place of linear", "schedule"),
        ("WARMDOWN_RATIO 0.4 -> 0.6", "schedule"),
        ("POLAR_STEPS 5 -> 4", "optimizer"),
        ("WEIGHT_DECAY 0.15 -> 0.1", "regularisation"),
        ("use SwiGLU in the MLP", "activation"),
        ("two more heads", "attention"),
        ("deeper: 4 layers", "size"),
        ("double the batch size", "batch"),
        ("zero init of the last matrix", "init"),
        ("EMBEDDING_LR 0.4 to 0.6", "embedding"),
        ("frobnicate the key insight", "other"),
        ("", "other"),
    ],
)
def test_family(text: str, expected: str) -> None:
    assert family(text) == expected


def test_family_by_the_changed_lines_of_the_diff_alone() -> None:
    diff = "--- a/momentum\n+++ b/momentum\n-DEPTH = 3  # attention\n+DEPTH = 4  # dropout dropout\n context = optimizer"
    assert family("make it better", diff) == "size"
    assert family("more dropout", diff) == "regularisation"


@pytest.mark.parametrize("number", [1, 10, 100, 500])
@pytest.mark.parametrize("limit", [200, 2000, 6000])
def test_the_digest_is_bounded(number: int, limit: int) -> None:
    assert len(digest(night(number), SIGMA, limit)) <= limit


def test_a_long_night_shows_every_section_and_says_what_is_left_out() -> None:
    text = digest(night(500), SIGMA)
    for title in ("Kept, newest", "Near misses", "Failed, and why", "By family of idea", "Other discards"):
        assert title in text
    assert "500 experiments" in text
    assert "more)" in text
    assert "ValueError: [matmul] shapes (3,4) (5,6)" in text
    assert len(text) > 5000  # the room is used


def test_a_short_night_is_told_whole() -> None:
    tried = night(10)
    text = digest(tried, SIGMA)
    assert all(f"| {t.id} " in text or f"| {t.id}* " in text for t in tried)
    assert "more)" not in text
    assert digest([]) == "Nothing yet: this is the first experiment."


hostile = st.text(alphabet=st.characters(), max_size=300)


@given(about=hostile, failure=hostile, limit=st.integers(0, 3000), number=st.integers(1, 40))
def test_what_others_wrote_stays_behind_the_bar(about: str, failure: str, limit: int, number: int) -> None:
    text = digest([Tried(k, about, "crash", failure=failure) for k in range(number)], SIGMA, limit)
    assert len(text) <= limit
    assert not any(ord(c) < 32 and c != "\n" for c in text)
    own = ("Failed, and why", "By family of idea", "(")
    assert all(line.startswith(("| ", *own)) for line in text.splitlines()[1:] if line)


def test_near_misses_are_discards_within_the_noise_nearest_first() -> None:
    tried = [discard(1, -0.02), discard(2, -0.001), keep(3), discard(4, 0.002), Tried(5, "x", "nan")]
    assert [t.id for t in near_misses(tried, SIGMA)] == [4, 2]


def test_a_near_miss_against_an_older_best_is_marked() -> None:
    text = digest([discard(1, -0.001), keep(2), discard(3, -0.002)], SIGMA)
    assert "| 1* discard" in text
    assert "| 3 discard" in text


def test_a_family_is_used_up_after_scored_failures_only() -> None:
    lost = [discard(k, -0.02, "init") for k in range(3)]
    assert used_up(lost, SIGMA) == ["init"]
    assert "init: 3, 0, -0.0200, used up" in digest(lost, SIGMA)
    assert used_up(lost[:2], SIGMA) == []
    assert used_up([*lost[:2], Tried(9, "", "crash", family="init")], SIGMA) == []
    assert used_up([keep(0, "init"), *lost], SIGMA) == []
    assert used_up([*lost, discard(9, 0.001, "init")], SIGMA) == []


def test_the_ladder_climbs_four_rungs_and_begins_again() -> None:
    near = [discard(1, 0.001, "init", "init idea"), discard(2, 0.002, "batch", "batch idea")]
    steps = [advice([keep(0), *near, *(discard(k) for k in range(3, n + 1))], SIGMA).step for n in range(2, 24)]
    expected = ["free"] * 2 + [step for step in (*LADDER, LADDER[0]) for _ in range(4)]
    assert steps == expected


def test_each_rung_brings_its_evidence() -> None:
    near = [discard(1, 0.001, "init", "first idea"), discard(2, 0.002, "batch", "second idea")]
    rungs = {n: advice([keep(0), *near, *(discard(k) for k in range(3, n + 1))], SIGMA).text for n in (4, 8, 12, 16)}
    assert "second idea" in rungs[4]
    assert "first idea" not in rungs[4]
    assert "'optimizer'" in rungs[8]
    assert "schedule, attention, embedding" in rungs[8]
    assert "first idea" in rungs[12]
    assert "second idea" in rungs[12]
    assert "kept idea 0" in rungs[16]


def test_a_keep_or_a_failure_does_not_climb() -> None:
    assert advice([*(discard(k) for k in range(9)), keep(9)], SIGMA).step == "free"
    assert advice([Tried(k, "x", "crash") for k in range(9)], SIGMA).step == "free"


def test_without_near_misses_there_is_nothing_to_refine_or_combine() -> None:
    assert advice([discard(k) for k in range(4)], SIGMA).step == "another family"
    assert advice([discard(k) for k in range(12)], SIGMA).step == "another family"
    assert advice([keep(0), *(discard(k) for k in range(4))], SIGMA).step == "refine"
