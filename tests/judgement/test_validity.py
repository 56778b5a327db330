"""A machine that grows slower or faster during a training: the trial is repeated, within bounds, so that heat does not decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from night_kit import HARNESS, TRAINER, Bed, git
from story_kit import Story, told
from trial_kit import lab

from agent.errors import NightError
from agent.journal.journal import read_events
from agent.journal.state import fold
from agent.judgement import validity
from agent.trial.order import TrialResult
from agent.views import results

WARNING = "slowed down by 31% during this training (heat or another program?)"


def drifting(bed: Bed) -> None:
    """Have the scorer report for each training what the next word of the file `drifts` says."""
    trainer = TRAINER.replace(
        '"budget": os.environ["AUTORESEARCH_BUDGET"]}',
        '"budget": os.environ["AUTORESEARCH_BUDGET"]}\n        words = Path(os.environ["AUTORESEARCH_DRIFTS"])\n'
        '        made["drift"], _, rest = words.read_text().partition(" ")\n        words.write_text(rest)',
    )
    warn = f'    if made["drift"] == "drift":\n        values["speed_warning"] = {WARNING!r}\n'
    harness = HARNESS.replace('    print("---")', warn + '    print("---")')
    assert trainer != TRAINER
    assert harness != HARNESS
    (bed.repo / "train_mlx.py").write_text(trainer)
    (bed.repo / "prepare_mlx.py").write_text(harness)
    git(bed.repo, "commit", "-qam", "with drifts")


def test_a_disturbed_training_is_repeated_twice_then_taken(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    drifting(bed)
    (bed.tools / "drifts").write_text("quiet drift quiet drift drift drift quiet")
    done = bed.run("--experiments", "0", "--budget", "60s", "--no-sandbox", AUTORESEARCH_DRIFTS=str(bed.tools / "drifts"))
    assert done.returncode == 0, done.stdout + done.stderr
    events = read_events(bed.folder() / "journal.jsonl")[0]
    ends = [(e["k"], e["seed"], e["status"]) for e in events if e["event"] == "trial_end"]
    assert ends == [(0, 1, "ok"), (1, 2, "disturbed"), (1, 2, "ok"), (2, 3, "disturbed"), (2, 3, "disturbed"), (2, 3, "ok")]
    night = fold(events)
    assert [trial.seed for trial in night.experiments[0].trials] == [1, 2, 3]
    assert (night.trials, night.disturbed) == (3, 3)
    assert f"trial 2 is repeated: the machine {WARNING}" in done.stdout
    assert f"the machine {WARNING})" in done.stdout, "what is taken all the same is said"
    assert "3 of 6 trainings repeated" in bed.loop("--status").stdout
    assert all(e["val_bpb"] for e in events if e["event"] == "trial_end"), "what was not counted is on record"


@pytest.mark.parametrize(
    ("budget", "status", "warning", "expected"),
    [
        ("300s", "ok", WARNING, "disturbed"),
        ("300s", "ok", "", "ok"),
        ("300s", "crash", WARNING, "crash"),
        ("30s", "ok", WARNING, "disturbed"),
        ("12s", "ok", WARNING, "ok"),  # measured too briefly to mean anything
        ("200steps", "ok", WARNING, "ok"),  # speed does not decide
    ],
)
def test_only_a_timed_training_of_some_length_is_repeated(
    tmp_path: Path, budget: str, status: str, warning: str, expected: str
) -> None:
    summary: dict[str, Any] = {"speed_warning": warning} if warning else {}
    night = told().night
    trial = TrialResult(status, 1.0, 1.5, summary)
    result = validity.validated(night, night.leader, trial, lab(tmp_path, budget=budget).budget_seconds)
    assert result.status == expected
    assert result.val_bpb == 1.5


def night_of(*rates: float | None) -> Story:
    """A night whose baseline was trained so often, the probe at these rates."""
    story = Story()
    story.add("experiment", n=0, parent="p")
    story.add("candidate", n=0, commit="c0", ast="a", lines=1, description="", usage={}, seconds=0.0)
    for k, rate in enumerate(rates):
        story.add("trial_start", n=0, k=k, seed=k + 1, dir="d")
        summary = {} if rate is None else {"products_per_second": rate}
        story.add("trial_end", n=0, k=k, seed=k + 1, dir="d", status="ok", val_bpb=1.5, summary=summary, seconds=1.0, error=None)
    return story


@pytest.mark.parametrize(
    ("earlier", "rate", "budget", "said"),
    [
        ((100.0, 90.0, 110.0), 89.0, "300s", "was 11% slower than in the night's median training (heat or another program?)"),
        ((100.0, 90.0, 110.0), 91.0, "300s", ""),
        ((100.0, 90.0, 110.0), 400.0, "300s", ""),  # a quieter machine than before is no harm
        ((100.0, 100.0), 50.0, "300s", ""),  # too few to know what is usual
        ((100.0, 100.0, None), 50.0, "300s", ""),
        ((100.0, 100.0, 100.0), None, "300s", ""),  # a harness that does not tell
        ((100.0, 100.0, 100.0), 50.0, "12s", "was 50% slower than in the night's median training (heat or another program?)"),
    ],
)
def test_a_machine_that_is_slow_from_beginning_to_end_is_noticed_by_the_night(
    tmp_path: Path, earlier: tuple[float | None, ...], rate: float | None, budget: str, said: str
) -> None:
    night = night_of(*earlier).night
    summary: dict[str, Any] = {} if rate is None else {"products_per_second": rate}
    trial = TrialResult("ok", 1.0, 1.5, summary)
    result = validity.validated(night, night.experiments[0], trial, lab(tmp_path, budget=budget).budget_seconds)
    assert result.summary.get("speed_warning", "") == validity.disturbance(result) == said
    assert result.status == ("disturbed" if said and budget == "300s" else "ok")
    if result.status == "disturbed":
        assert (result.error or {})["message"] == f"the machine {said}"


def test_a_machine_that_stays_slow_becomes_what_is_usual() -> None:
    rates = [100.0] * 3
    trained = 0
    while len(rates) < 20:
        night = night_of(*rates).night
        night.disturbed = trained - len(rates) + 3
        summary = {"products_per_second": 70.0, "speed_index": 1.0}
        result = validity.validated(night, night.experiments[0], TrialResult("ok", 1.0, 1.5, summary), 300.0)
        trained += 1
        rates += [70.0] * (result.status == "ok")
    assert trained == 17 + 4, "four trainings repeated, then it is taken as it is"


def test_what_the_driver_was_told_of_a_change_within_a_training_stands() -> None:
    night = night_of(100.0, 100.0, 100.0).night
    summary: dict[str, Any] = {"products_per_second": 50.0, "speed_warning": WARNING}
    result = validity.validated(night, night.experiments[0], TrialResult("ok", 1.0, 1.5, summary), 300.0)
    assert validity.disturbance(result) == WARNING


def test_a_machine_that_is_never_quiet_costs_four_repeats_and_one_in_ten() -> None:
    story = Story()
    story.add("experiment", n=0, parent="p")
    story.add("candidate", n=0, commit="c0", ast="a", lines=1, description="", usage={}, seconds=0.0)
    trained = 0
    while story.night.trials < 40:
        night = story.night
        result = validity.validated(night, night.experiments[0], TrialResult("ok", 1.0, 1.5, {"speed_warning": WARNING}), 300.0)
        story.trial(0, len(night.experiments[0].trials), 1.5, result.status)
        trained += 1
    assert trained == 40 + 4 + 3
    assert any("7 of 47 trainings repeated" in line for line in results.status(story.night, None))


def test_a_machine_that_sleeps_through_every_attempt_ends_the_night() -> None:
    story = told()
    asleep = TrialResult("interrupted", 1.0)
    for attempt in range(validity.MOST_INTERRUPTIONS - 1):
        assert validity.validated(story.night, story.night.leader, asleep, 5.0) is asleep
        story.trial(2, 2, None, "interrupted")
        assert story.night.leader.repeats == {"interrupted": attempt + 1}
    with pytest.raises(NightError, match="suspended during every attempt"):
        validity.validated(story.night, story.night.leader, asleep, 5.0)
    story.trial(2, 2, 1.4)
    assert story.night.leader.repeats == {}
