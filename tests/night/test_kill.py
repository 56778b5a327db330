"""A night that is killed again and again ends like one that was left alone: nothing lost, doubled or half-kept."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from night_kit import ROOT, Bed, git

from agent.journal.journal import read_events
from agent.journal.state import Night, fold
from agent.views import results

PLAN = "better worse crash simpler comment violation fail better nan extra worse better"
LIMITED = "better limit worse crash limit simpler comment violation limit fail better nan"
KINDS = (
    "night_start", "session", "experiment", "asked", "agent_failed", "candidate", "trial_start", "trial_end", "verified",
    "verdict", "test_score", "night_end",
)  # fmt: skip


def doomed(bed: Bed, experiments: int, doom: str) -> int:
    """Run the driver that kills itself; its exit status."""
    command = bed.command("--experiments", str(experiments), "--no-sandbox")
    command[1:3] = [str(ROOT / "tests" / "doomed.py")]
    env = bed.environment(DOOM=doom, DOOM_LOG=str(bed.tools / "doom"))
    with open(bed.tools / "out", "a") as out:
        return subprocess.run(command, cwd=bed.repo, env=env, stdout=out, stderr=out, timeout=120).returncode


def killed_at(bed: Bed, experiments: int, seconds: float) -> int:
    """Run the driver and kill it after so many seconds, if it still runs; its exit status."""
    with open(bed.tools / "out", "a") as out:
        command = bed.command("--experiments", str(experiments), "--no-sandbox")
        driver = subprocess.Popen(command, cwd=bed.repo, env=bed.environment(), stdout=out, stderr=out)
        try:
            return driver.wait(seconds)
        except subprocess.TimeoutExpired:
            driver.send_signal(signal.SIGKILL)
            return driver.wait()


def leftovers(bed: Bed) -> list[str]:
    """Command lines of living processes that work in the bed."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            if str(bed.repo) in words or str(bed.tools) in words or process.cwd().startswith(str(bed.repo)):
                found.append(words)
        except (psutil.Error, OSError):
            continue
    return found


def check(bed: Bed, experiments: int) -> Night:
    """Journal, refs, branch, results.tsv, weights, worktrees and processes agree, and every experiment is there once."""
    folder = bed.folder()
    events, torn = read_events(folder / "journal.jsonl")
    assert torn == b""
    night = fold(events)  # refuses doubled verdicts, candidates and trials by itself
    verdicts = Counter(event["n"] for event in events if event["event"] == "verdict")
    assert verdicts == Counter(range(experiments + 1))
    assert Counter(event["n"] for event in events if event["event"] == "experiment") == verdicts
    refs = dict(line.split()[::-1] for line in git(bed.repo, "for-each-ref", "--format=%(objectname) %(refname)").splitlines())
    for experiment in night.experiments:
        name = f"refs/autoresearch/night/{experiment.n:04d}"
        if experiment.commit:
            assert refs[name] == experiment.commit
        else:
            assert name not in refs
        if experiment.status == "keep" and experiment.n:
            assert len(experiment.scores) >= 2
    assert refs["refs/heads/autoresearch/night"] == night.leader.commit
    kept = [night.base, *(night.experiments[n].commit for n in night.kept)]
    assert git(bed.repo, "rev-list", "--reverse", "autoresearch/night").split() == kept
    assert (folder / "results.tsv").read_text() == results.results(night)
    for n in {0, night.best}:
        trial = [t for t in night.experiments[n or 0].trials if t.status == "ok"][-1]  # the others' weights are pruned
        assert (folder / "trials" / trial.folder / "weights.safetensors").is_file()
    assert sorted(night.tests) == sorted({0, night.best})
    assert git(bed.repo, "worktree", "list").count("\n") == 0
    assert not (folder / "worktree").exists()
    assert not [*folder.glob("agent-*"), *folder.glob("*.pid")]
    deadline = time.monotonic() + 10
    while (left := leftovers(bed)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    return night


def boundaries_met(folder: Path) -> set[str]:
    """Where drivers killed themselves: before, in the middle of and after which kinds of journal line."""
    return {line for log in folder.glob("*/tools/doom") for line in log.read_text().splitlines()}


def outcomes(night: Night) -> list[tuple[str | None, str]]:
    return [(e.status, e.description) for e in night.experiments]


def undisturbed(folder: Path, experiments: int) -> list[tuple[str | None, str]]:
    bed = Bed(folder, PLAN)
    done = bed.run("--experiments", str(experiments), "--no-sandbox")
    assert done.returncode == 0, done.stdout + done.stderr
    return outcomes(check(bed, experiments))


def test_killed_around_journal_lines(tmp_path: Path) -> None:
    bed, experiments = Bed(tmp_path / "killed", PLAN), 3
    kills = 0
    for when, count in zip(itertools.cycle(("after", "before", "torn")), itertools.cycle((4, 7, 5, 9, 6)), strict=False):
        status = doomed(bed, experiments, f"{when} {count}")
        if status == 0:
            break
        assert status == -signal.SIGKILL, (bed.tools / "out").read_text()
        kills += 1
        assert kills < 60, "the night makes no progress"
    assert kills >= 6
    assert outcomes(check(bed, experiments)) == undisturbed(tmp_path / "calm", experiments)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    bed, experiments, dice = Bed(tmp_path, PLAN), 3, random.Random(5)
    for _ in range(3):
        killed_at(bed, experiments, dice.uniform(0.4, 2.0))
    assert bed.run("--experiments", str(experiments), "--no-sandbox").returncode == 0
    check(bed, experiments)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_two_hundred_moments(tmp_path: Path) -> None:
    """Every kind of journal line, before, half and after it; then random lines and random moments; 200 kills in all."""
    dice, kills, experiments = random.Random(int(os.environ.get("KILL_SEED", "1"))), 0, 12
    boundaries = [f"{when} {kind}" for kind in KINDS for when in ("before", "torn", "after")]
    for when, kind in (("before", "session"), ("torn", "experiment"), ("after", "candidate")):  # a torn line is noted, at first
        boundaries.insert(boundaries.index(f"torn {kind}") + 1, f"{when} note")
    wanted = set(boundaries)
    beds = (Bed(tmp_path / str(night), LIMITED) for night in itertools.count(1))
    bed, since = next(beds), 0
    while kills < 200:
        if boundaries:
            status = doomed(bed, experiments, boundaries[0])
        elif dice.random() < 0.4:
            status = doomed(bed, experiments, f"{dice.choice(('after', 'before', 'torn'))} {dice.randint(2, 12)}")
        else:
            status = killed_at(bed, experiments, dice.uniform(0.3, 4.0))
        if status == 0:
            check(bed, experiments)
            print(f"{bed.home.parent.name}: {since} kills, {kills} in all", file=sys.stderr)
            bed, since = next(beds), 0
            continue
        assert status == -signal.SIGKILL, (bed.tools / "out").read_text()[-3000:]
        kills, since = kills + 1, since + 1
        assert since < 150, "the night makes no progress"
        boundaries = boundaries[1:]
    assert not boundaries
    assert wanted <= boundaries_met(tmp_path)
    assert bed.run("--experiments", str(experiments), "--no-sandbox").returncode == 0
    check(bed, experiments)
