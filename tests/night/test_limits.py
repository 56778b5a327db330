"""When a night is over, when it pauses, and how long it waits."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from story_kit import Story, told

from agent import loop
from agent.errors import UsageError
from agent.journal.settings import Settings
from agent.journal.state import Night
from agent.judgement.decision import Rule
from agent.night import limits, setup

NOW = datetime(2026, 11, 22, 22, 30).timestamp()


def over(story: Story, seconds: float = 0.0, free: float = 100.0, **settings: Any) -> str | None:
    asked = Settings(**settings)
    reason = limits.over(story.night, asked, seconds_left=limits.seconds_left(asked, seconds, NOW), free_gb=free)
    return reason[0] if reason else None


def test_limits_end_a_night() -> None:
    story = told()
    assert over(story) is None
    assert over(story, experiments=2) == "experiments"
    assert over(story, experiments=3) is None
    assert over(story, seconds=3601, hours=1) == "hours"
    assert over(story, until=NOW) == "until"
    assert over(story, seconds=1e9, until=NOW + 1) is None, "a session may have begun long ago, or its clock have stood still"
    assert over(story, max_cost=0.75) == "max_cost"
    assert over(story, max_cost=1.24) == "max_cost", "another call as dear as the dearest would exceed it"
    assert over(story, max_cost=1.25) is None
    assert over(story, target=1.35) == "target"
    assert over(story, target=1.34) is None
    assert over(story, free=1.0) == "disk"
    for n in range(3, 6):
        story.experiment(n, "discard", (1.9,))
    assert over(story, patience=3) == "patience"
    assert over(story, patience=4) is None


def call(story: Story, n: int, cost: float | None) -> None:
    """A call of the agent that brought nothing."""
    story.add("experiment", n=n, parent="p")
    story.add("verdict", n=n, status="noop", reason="", val_bpb=None, description="", error=None, seconds=1.0,
              usage={"cost": cost, "tokens": None})  # fmt: skip


def test_a_call_of_unknown_price_counts_as_the_dearest_so_far() -> None:
    story = told()
    call(story, 3, None)
    assert (story.night.cost, story.night.estimated, story.night.unpriced) == (1.25, 1, 0)
    assert story.night.experiments[3].cost == 0.5
    assert over(story, max_cost=1.6) == "max_cost"
    words = limits.over(story.night, Settings(max_cost=1.2), seconds_left=1.0, free_gb=9)
    assert words is not None
    assert "1 calls of unknown price among them" in words[1]


def test_an_agent_that_never_tells_a_price_cannot_be_held_to_one() -> None:
    story = Story()
    story.experiment(0, "keep", (1.5,))
    call(story, 1, None)
    assert over(story, max_cost=100.0) is None, "it may have been cut off"
    call(story, 2, None)
    assert story.night.unpriced == 2
    assert over(story) is None
    assert over(story, max_cost=100.0) == "max_cost"
    call(story, 3, 0.2)  # now a price is known
    assert (story.night.unpriced, story.night.estimated) == (0, 2)
    assert abs(story.night.cost - 0.6) < 1e-9


def test_a_free_agent_and_an_experiment_without_a_call_cost_nothing() -> None:
    story = told()
    call(story, 3, 0.0)
    story.experiment(4, "noop")
    assert (story.night.cost, story.night.unpriced, story.night.estimated) == (0.75, 0, 0)


def test_a_call_that_was_cut_off_with_its_driver_is_paid_for() -> None:
    story = told()  # whose dearest call cost 0.5
    before = story.night.cost
    story.add("experiment", n=3, parent="c2")
    story.add("asked", n=3)
    story.add("session", settings={}, pid=2)
    assert (story.night.cost, story.night.estimated) == (before + story.night.dearest, 1)
    story.add("asked", n=3)
    story.add("agent_failed", n=3, kind="rate_limit", wait=1.0, message="", usage={"cost": 0.0}, seconds=0.0)
    story.add("session", settings={}, pid=3)
    assert story.night.estimated == 1, "it was waiting, nothing was asked"


def test_a_call_whose_answer_was_lost_is_paid_for() -> None:
    story = told()
    before = story.night.cost
    story.add("experiment", n=3, parent="c2")
    story.add("asked", n=3)
    lost = {"status": "agent_error", "reason": "damaged", "val_bpb": None, "description": "", "error": None, "usage": {}}
    story.add("verdict", n=3, **lost, seconds=0.0)
    assert (story.night.cost, story.night.estimated) == (before + story.night.dearest, 1)


def test_the_price_of_one_agent_is_none_of_another() -> None:
    story = told()
    story.add("session", settings={}, pid=2, agent="claude")
    call(story, 3, 0.5)
    assert over(story, max_cost=1.5) == "max_cost", "it could cost as much again"
    story.add("session", settings={}, pid=3, agent="claude")
    assert over(story, max_cost=1.5) == "max_cost"
    story.add("session", settings={}, pid=4, agent="search")
    assert over(story, max_cost=1.5) is None


def test_a_session_that_asked_nothing_costs_nothing() -> None:
    story = told()
    before = story.night.cost
    story.add("experiment", n=3, parent="c2")
    story.add("asked", n=3)
    story.add("agent_failed", n=3, kind="login", wait=None, message="", usage={"cost": 0.0}, seconds=0.0)
    for pid in (2, 3, 4):
        story.add("night_end", reason="login", text="")
        story.add("session", settings={}, pid=pid)
        story.add("agent_check", kind="login", message="", usage={"cost": 0.0}, seconds=1.0)
    assert (story.night.cost, story.night.estimated) == (before, 0)


def test_a_night_that_ended_at_a_limit_was_asking_nobody() -> None:
    story = told()
    story.add("experiment", n=3, parent="c2")
    story.add("asked", n=3)
    story.add("session", settings={}, pid=2)  # the driver was killed during the call
    story.add("night_end", reason="max_cost", text="")
    story.add("session", settings={}, pid=3)
    assert story.night.estimated == 1


def test_the_word_that_is_asked_before_a_night_is_paid_for() -> None:
    story = Story()
    story.add("agent_check", kind="ok", message="ready", usage={"cost": 0.25, "tokens": 7}, seconds=2.0)
    assert (story.night.cost, story.night.tokens, story.night.agent_seconds) == (0.25, 7, 2.0)


def test_a_night_that_was_limited_all_the_time_has_proposed_nothing() -> None:
    story = told()
    assert story.night.unproposed() == "", "it has a candidate"
    story = Story()
    story.experiment(0, "keep", (1.5,))
    assert story.night.unproposed() == "", "nothing was asked for"
    story.add("experiment", n=1, parent="p")
    story.add("agent_failed", n=1, kind="rate_limit", wait=1.0, message="", usage={}, seconds=0.0)
    assert story.night.unproposed() == "the agent never changed the file: 1 rate_limit"


def test_breaker_pauses_longer_and_longer_then_ends_the_night() -> None:
    story, pauses, ended = told(), [], None
    settings = Settings(breaker=3, backoff=10)
    for n in range(3, 12):
        story.experiment(n, "agent_error")
        pauses.append(limits.pause(story.night, settings))
        if ended is None and limits.over(story.night, settings, seconds_left=1.0, free_gb=9):
            ended = n - 2
    assert pauses[:6] == [0, 0, 10, 20, 40, 80]
    assert ended == 6
    story.experiment(12, "crash")
    assert limits.pause(story.night, settings) == 0
    assert limits.over(story.night, settings, seconds_left=1.0, free_gb=9) is None


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


def test_the_baseline_is_measured_as_often_as_the_rule_wants() -> None:
    assert Settings().baseline_seeds == Rule().baseline_trials


@pytest.mark.parametrize(("clock", "hours"), [("07:00", 8.5), ("22:31", 1 / 60), ("22:30", 24.0), ("0:00", 1.5)])
def test_until_is_the_next_time_that_clocks_show_it(clock: str, hours: float) -> None:
    assert abs((limits.next_time(clock, NOW) - NOW) / 3600 - hours) < 1e-6
    assert limits.next_time(limits.clock(limits.next_time(clock, NOW)), NOW) == limits.next_time(clock, NOW)


def test_a_time_of_day_is_kept_whatever_comes_before_the_first_experiment() -> None:
    given = loop._with_end({"until": "07:00", "hours": None})
    settings = setup.chosen(Night(), given)
    assert (settings.until, settings.hours) == (limits.next_time("07:00"), None)
    assert limits.seconds_left(settings, 0.0, settings.until or 0.0) == 0.0


def test_a_resume_keeps_the_time_of_day_and_a_new_end_replaces_the_old_one() -> None:
    none, ahead = {"until": None, "hours": None}, limits.next_time("07:00")
    past = ahead - 3 * 86400
    for stored in (ahead, past):
        settings = setup.chosen(Night(settings=Settings(until=stored).to_json()), none)
        assert settings.until == limits.next_time(limits.clock(stored)), "07:00, unless the clocks were changed meanwhile"
        assert settings.hours is None
    for given in ({"until": None, "hours": 2.0}, {"until": ahead, "hours": None}):
        for before in (Settings(until=past), Settings(hours=8.0)):
            settings = setup.chosen(Night(settings=before.to_json()), given)
            assert {"until": settings.until, "hours": settings.hours} == given
    assert setup.chosen(Night(), none).hours == 8.0


@pytest.mark.parametrize("clock", ["7", "24:00", "07:60", "7 am", "", "-1:00"])
def test_what_is_no_time_of_day_is_said(clock: str) -> None:
    with pytest.raises(UsageError, match="expected a time of day such as 07:00"):
        limits.next_time(clock)
