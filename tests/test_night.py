"""The fold: a night's state is what its journal says, and an impossible journal is refused."""

from __future__ import annotations

from typing import Any

import pytest

from agent import judgement, limits
from agent.decision import Rule
from agent.errors import JournalError
from agent.night import Night, fold
from agent.settings import Settings


class Story:
    """Events of a night, written by hand."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.add("night_start", tag="t", base="b0", train_file="train_mlx.py", seed=1, dataset={})
        self.add("session", settings={}, pid=1)

    def add(self, event: str, **fields: Any) -> None:
        self.events.append({"v": 1, "seq": len(self.events), "t": float(len(self.events) + 1), "event": event, **fields})

    def experiment(self, n: int, status: str, scores: tuple[float, ...] = (), cost: float = 0.0, **more: Any) -> None:
        self.add("experiment", n=n, parent="p")
        if scores or status == "keep":
            self.add("candidate", n=n, commit=f"c{n}", ast=f"a{n}", lines=10, description=f"idea {n}",
                     usage={"cost": cost, "tokens": 10}, seconds=2.0)  # fmt: skip
        for k, score in enumerate(scores):
            self.trial(n, k, score)
        mean = sum(scores) / len(scores) if scores else None
        self.add("verdict", n=n, status=status, reason="r", val_bpb=mean, description="", error=None, usage={}, seconds=0.0, **more)

    def trial(self, n: int, k: int, score: float | None, status: str = "ok") -> None:
        self.add("trial_start", n=n, k=k, seed=1 + k, dir=f"{n:04d}-{k}")
        self.add("trial_end", n=n, k=k, seed=1 + k, dir=f"{n:04d}-{k}", status=status, val_bpb=score, summary={}, seconds=1.0,
                 error=None)  # fmt: skip

    @property
    def night(self) -> Night:
        return fold(self.events)


def told() -> Story:
    story = Story()
    story.experiment(0, "keep", (1.5, 1.6, 1.7))
    story.experiment(1, "discard", (1.8,), cost=0.5)
    story.experiment(2, "keep", (1.3, 1.4), cost=0.25)
    return story


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


def test_a_simplification_is_measured_by_the_lowest_mean_ever_kept_and_screened_by_the_firsts_since(monkeypatch: Any) -> None:
    story = told()
    story.experiment(3, "discard", (1.7, 1.8))
    story.experiment(4, "keep", (1.4, 1.36))  # shorter, and a little worse
    story.experiment(5, "crash")
    story.experiment(6, "discard", (1.55, 1.2))
    story.experiment(7, "noop")
    story.experiment(8, "discard", (1.45,))
    story.add("experiment", n=9, parent="c4")
    story.add("candidate", n=9, commit="c9", ast="a9", lines=7, description="", usage={}, seconds=0.0)
    story.trial(9, 0, 1.39)
    night, rule = story.night, Rule()
    assert (night.best, night.record.n) == (4, 2)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(judgement, "decide", lambda best, candidate, noise, **more: asked.update(more, best=best, of=candidate))
    judgement.judge(night, night.experiments[9], rule)
    assert asked == {
        "best": [1.4, 1.36], "of": [1.39], "firsts": [1.55, 1.45], "lines_delta": -3, "record": [1.3, 1.4], "rule": rule,
    }  # fmt: skip


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


def over(story: Story, seconds: float = 0.0, free: float = 100.0, **settings: Any) -> str | None:
    reason = limits.over(story.night, Settings(**settings), session_seconds=seconds, free_gb=free)
    return reason[0] if reason else None


def test_limits_end_a_night() -> None:
    story = told()
    assert over(story) is None
    assert over(story, experiments=2) == "experiments"
    assert over(story, experiments=3) is None
    assert over(story, seconds=3601, hours=1) == "hours"
    assert over(story, max_cost=0.75) == "max_cost"
    assert over(story, max_cost=0.76) is None
    assert over(story, target=1.35) == "target"
    assert over(story, target=1.34) is None
    assert over(story, free=1.0) == "disk"
    for n in range(3, 6):
        story.experiment(n, "discard", (1.9,))
    assert over(story, patience=3) == "patience"
    assert over(story, patience=4) is None


def test_unknown_cost_is_not_free() -> None:
    story = told()
    story.add("experiment", n=3, parent="c2")
    story.add("agent_failed", n=3, kind="rate_limit", wait=1, message="", usage={"cost": None, "tokens": 500}, seconds=1.0)
    assert story.night.unpriced == 1
    assert over(story) is None
    assert over(story, max_cost=100.0) == "max_cost"


def test_breaker_pauses_longer_and_longer_then_ends_the_night() -> None:
    story, pauses, ended = told(), [], None
    settings = Settings(breaker=3, backoff=10)
    for n in range(3, 12):
        story.experiment(n, "agent_error")
        pauses.append(limits.pause(story.night, settings))
        if ended is None and limits.over(story.night, settings, session_seconds=0, free_gb=9):
            ended = n - 2
    assert pauses[:6] == [0, 0, 10, 20, 40, 80]
    assert ended == 6
    story.experiment(12, "crash")
    assert limits.pause(story.night, settings) == 0
    assert limits.over(story.night, settings, session_seconds=0, free_gb=9) is None


def test_discards_in_a_row_are_research_not_failure() -> None:
    story = told()
    for n in range(3, 40):
        story.experiment(n, "discard", (1.9,))
    assert limits.pause(story.night, Settings()) == 0
    assert over(story) is None


def test_a_new_session_forgets_the_streak_that_ended_the_last() -> None:
    story = told()
    for n in range(3, 13):
        story.experiment(n, "agent_error")
    assert over(story) == "failures"
    story.add("night_end", reason="failures", text="")
    story.add("session", settings={}, pid=2)
    assert over(story) is None


def test_rate_limit_waits_as_told_else_longer_and_longer() -> None:
    story, settings = told(), Settings()
    story.add("experiment", n=3, parent="c2")
    waits = []
    for wait in (None, None, None, 17.0, None):
        story.add("agent_failed", n=3, kind="rate_limit", wait=wait, message="", usage={}, seconds=0.0)
        waits.append(limits.rate_limit_wait(story.night, settings))
    assert waits == [60, 120, 240, 17, 960]
    assert len(story.night.done) == 2, "a wait is no experiment"
    for _ in range(50):
        story.add("agent_failed", n=3, kind="rate_limit", wait=None, message="", usage={}, seconds=0.0)
    assert limits.rate_limit_wait(story.night, settings) is None
