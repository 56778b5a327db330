"""The fold: a night's state is what its journal says, and an impossible journal is refused."""

from __future__ import annotations

from typing import Any

import pytest
from story_kit import told

from agent.errors import JournalError
from agent.journal.state import fold


def test_fold() -> None:
    night = told().night
    assert (night.best, night.kept, len(night.done), night.open) == (2, [2], 2, None)
    assert night.leader.mean == pytest.approx(1.35)
    assert night.experiments[0].mean == pytest.approx(1.6)
    assert (night.cost, night.tokens, night.agent_seconds) == (0.75, 30, 6.0)
    assert night.since_keep() == 0


def test_every_prefix_folds_and_keeps_the_best() -> None:
    events = told().events
    bests = [fold(events[:count]).best for count in range(len(events) + 1)]
    assert bests == sorted(bests, key=lambda best: -1 if best is None else best)
    assert bests[-1] == 2


def test_trials_of_the_best_sharpen_its_mean_while_another_is_judged() -> None:
    story = told()
    story.add("experiment", n=3, parent="c2")
    story.add("candidate", n=3, commit="c3", ast="a3", lines=9, description="", usage={}, seconds=0.0)
    story.trial(3, 0, 1.2)
    story.trial(2, 2, 1.5)
    assert story.night.leader.mean == pytest.approx(1.4)
    assert story.night.open is not None
    assert story.night.open.scores == [1.2]


def test_a_killed_trial_never_counted_and_an_interrupted_one_is_repeated() -> None:
    story = told()
    story.add("experiment", n=3, parent="c2")
    story.add("candidate", n=3, commit="c3", ast="a3", lines=9, description="", usage={}, seconds=0.0)
    story.add("trial_start", n=3, k=0, seed=1, dir="0003-1")  # the driver is killed here
    story.trial(3, 0, None, "interrupted")
    story.trial(3, 0, 1.2)
    trials = story.night.experiments[3].trials
    assert [(t.k, t.status, t.val_bpb) for t in trials] == [(0, "ok", 1.2)]


@pytest.mark.parametrize(
    ("event", "fields", "words"),
    [
        ("night_start", {"tag": "u", "base": "b", "train_file": "f", "seed": 1, "dataset": {}}, "a second"),
        ("experiment", {"n": 2, "parent": "p"}, "expected experiment 3"),
        ("experiment", {"n": 4, "parent": "p"}, "expected experiment 3"),
        ("verdict", {"n": 2, "status": "keep"}, "none is open"),
        ("candidate", {"n": 1}, "none is open"),
        ("trial_end", {"n": 2, "k": 1}, "without a start"),
        ("trial_start", {"n": 2, "k": 5, "seed": 1, "dir": "d"}, "expected trial 2 of 2, found 5"),
    ],
)
def test_impossible_journals_are_refused(event: str, fields: dict[str, Any], words: str) -> None:
    story = told()
    story.add(event, **fields)
    with pytest.raises(JournalError, match=words):
        _ = story.night


def test_unknown_events_are_passed_over() -> None:
    story = told()
    story.add("weather", sky="clear")
    assert story.night.best == 2
