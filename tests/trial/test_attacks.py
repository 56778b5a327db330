"""Candidates that cheat, each a real train file, run as the driver runs them: trainer, scorer and sandbox are the real ones.

Each ends with the score that the honest file gets, or as a failure by name; and the table says which.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from night_kit import git

from agent.git.worktree import Repository
from agent.trial import sandbox
from agent.trial.lab import FROZEN as PARTS
from agent.trial.lab import Lab
from agent.trial.trial import run_trial

needs_sandbox = pytest.mark.skipif(not sandbox.available().present, reason=f"no sandbox here: {sandbox.available()}")
ATTACKS = ROOT / "tests" / "attacks"
FROZEN = [p.relative_to(ROOT) for name in PARTS for p in (ROOT / name, *(ROOT / name).rglob("*.py")) if p.is_file()]
GUARD = '\n\nif __name__ == "__main__":\n    main()\n'


def source(name: str) -> str:
    """A whole train file: the honest one, changed by an attack."""
    honest = (ATTACKS / "honest.py").read_text()
    assert honest.endswith(GUARD)
    return honest if name == "honest" else honest.removesuffix(GUARD) + "\n\n" + (ATTACKS / f"{name}.py").read_text() + GUARD


def lab(folder: Path, tiny, name: str, **changes) -> Lab:
    (folder / "night" / "trials").mkdir(parents=True)
    for file in FROZEN:
        for place in (folder / "worktree", folder / "night" / "frozen"):
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, place / file)
    (folder / "worktree" / "train_x.py").write_text(source(name))
    settings = {"folder": folder / "night", "worktree": folder / "worktree", "train_file": "train_x.py",
                "harness": folder / "night" / "frozen" / "prepare_mlx.py", "train_dir": tiny.train, "held_dir": tiny.held,
                "budget": "60steps", "vocab_size": 320, "startup_seconds": 60.0, "sandboxed": False}
    return Lab(**{**settings, **changes})


def trial(folder: Path, tiny, name: str, reference=None, **changes):
    return run_trial(lab(folder, tiny, name, **changes), folder / "night" / "trials" / "0001-1", 1, reference)


@pytest.fixture(scope="module")
def honest(tiny, tmp_path_factory) -> float:
    result = trial(tmp_path_factory.mktemp("honest"), tiny, "honest")
    assert result.status == "ok", result.error
    assert 0.5 < result.val_bpb < 2
    return result.val_bpb


@pytest.mark.parametrize("name", [
    "prints_a_summary", "writes_the_result", "patches_everything", "looks_for_the_validation_text", "edits_the_harness",
    "leaves_a_child", "fills_its_run_directory_with_traps"])
def test_ends_with_its_honest_score(tiny, tmp_path, honest, name):
    result = trial(tmp_path, tiny, name)
    assert result.status == "ok", result.error
    assert result.val_bpb == honest
    for file in FROZEN:
        assert (tmp_path / "night" / "frozen" / file).read_bytes() == (ROOT / file).read_bytes()
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.log")) < 50e6


@pytest.mark.parametrize(("name", "status", "said", "changes"), [
    ("copies_targets_from_the_batch", "violation", "cross_row", {}),
    ("peeks_ahead", "violation", "non_causal", {}),
    ("keeps_state", "violation", "stateful", {}),
    ("trains_in_warm_up", "violation", "training data was asked for before run.budget.start()", {}),
    ("warms_up_for_too_long", "timeout", "still running after", {"budget": "1s", "startup_seconds": 2.0}),
    ("sleeps_past_its_budget", "timeout", "still running after", {"budget": "1s", "startup_seconds": 2.0}),
    ("fills_the_disk", "violation", "wrote more than", {"directory_bytes": 50 << 20}),
    ("hides_its_result_in_a_pipe", "crash", "no train.json", {}),
    ("nests_folders", "violation", "nested folders deeper than", {}),
])
def test_ends_as_a_failure_by_name(tiny, tmp_path, name, status, said, changes):
    result = trial(tmp_path, tiny, name, **changes)
    assert (result.status, result.val_bpb) == (status, None)
    assert said in result.error["message"]


def test_a_log_without_end_is_cut_off(tiny, tmp_path):
    result = trial(tmp_path, tiny, "prints_a_gigabyte")
    assert result.status == "violation"
    assert result.val_bpb is None
    assert result.error["message"] == "printed without end"
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.log")) < 50e6


def test_a_log_without_end_from_the_logits_server_is_cut_off(tiny, tmp_path):
    result = trial(tmp_path, tiny, "prints_a_gigabyte_when_asked")
    assert (result.status, result.val_bpb) == ("violation", None)
    assert "File too large" in result.error["message"]
    assert (tmp_path / "night" / "trials" / "0001-1" / "serve.log").stat().st_size <= 256 << 20


def test_a_child_that_was_left_is_ended(tiny, tmp_path):
    trial(tmp_path, tiny, "leaves_a_child")
    alive = tmp_path / "night" / "trials" / "0001-1" / "alive"
    last = alive.stat().st_mtime_ns if alive.exists() else None
    time.sleep(0.5)
    assert (alive.stat().st_mtime_ns if alive.exists() else None) == last
    running = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert not running


@pytest.fixture(scope="module")
def baseline(tiny, tmp_path_factory) -> dict:
    """The summary of an honest trial of one second, with what it took by the driver's clock."""
    result = trial(tmp_path_factory.mktemp("baseline"), tiny, "honest", budget="1s")
    assert result.status == "ok", result.error
    return result.summary


@pytest.mark.parametrize(("name", "said", "sandboxed"), [
    ("trains_before_its_budget_starts", "by the driver's clock (budget 1s; the baseline took", False),
    pytest.param("trains_before_its_budget_starts", "by the driver's clock (budget 1s; the baseline", True, marks=needs_sandbox),
    ("slows_its_clock", "by the driver's clock (budget 1s; the baseline took", False),
    ("trains_in_load_model", "importing the train file and load_model took more than", False),
    pytest.param("trains_in_load_model", "importing the train file and load_model took more than", True, marks=needs_sandbox),
    ("answers_slowly", "scoring was still running after", False),
])
def test_time_that_a_candidate_takes_beside_its_budget_ends_it(tiny, tmp_path, monkeypatch, baseline, name, said, sandboxed):
    """None of these says how long it trained, or what it says is a lie. The slack is shortened here, to wait for less."""
    monkeypatch.setattr("agent.trial.lab.SLACK_SECONDS", 10.0 if name == "trains_in_load_model" else 2.0)  # its own limit is first
    monkeypatch.setattr("agent.trial.lab.LOAD_SLACK_SECONDS", 1.0)
    monkeypatch.setattr("agent.trial.lab.SLOWER", 1.5)
    result = trial(tmp_path, tiny, name, baseline, budget="1s", sandboxed=sandboxed)
    assert (result.status, result.val_bpb) == ("timeout", None)
    assert said in result.error["message"]
    assert result.seconds < 20


def test_an_honest_trial_fits_into_the_time_of_the_baseline(tiny, tmp_path, baseline):
    result = trial(tmp_path, tiny, "honest", baseline, budget="1s")
    assert result.status == "ok", result.error
    assert result.summary["trainer_seconds"] > 1


@pytest.fixture
def outside(tiny):
    """A folder with the train shard that is not below /tmp, which a sandbox hides as a whole."""
    places = [p for p in (Path.home(), Path(__file__).parent) if not any(p.is_relative_to(t) for t in ("/tmp", "/var/tmp"))]
    if not places:
        pytest.skip("needs a home folder or a checkout that is not below /tmp")
    with tempfile.TemporaryDirectory(prefix=".autoresearch-test-", dir=places[0]) as name:
        shutil.copytree(tiny.train, Path(name) / "train")
        yield Path(name)


@needs_sandbox
def test_a_logits_server_sees_no_training_text(tiny, outside, honest):
    changes = {"train_dir": outside / "train", "held_dir": tiny.held}
    free = trial(outside / "free", tiny, "reads_the_training_text_at_scoring", **changes)
    assert free.val_bpb < honest, "without a sandbox it does"
    boxed = trial(outside / "boxed", tiny, "reads_the_training_text_at_scoring", sandboxed=True, **changes)
    assert boxed.status == "ok", boxed.error
    assert boxed.val_bpb == honest


@needs_sandbox
def test_a_trial_goes_on_from_no_other(tiny, outside):
    """Neither from weights beside its run directory nor from what an earlier trial of its own left in TMPDIR."""
    place, other = (lab(outside / name, tiny, name, sandboxed=True) for name in ("goes_on_from_other_trials", "honest"))
    honest = run_trial(other, other.folder / "trials" / "0001-2", 2, None)
    results = [run_trial(place, place.folder / "trials" / f"0001-{seed}", seed, None) for seed in (1, 2)]
    assert [result.status for result in results] == ["ok", "ok"], [result.error for result in results]
    assert results[1].val_bpb == honest.val_bpb
    assert "found" not in "".join(log.read_text() for log in place.folder.rglob("*.train.log"))


@pytest.mark.skipif(sys.platform != "linux", reason="these are calls of Linux")
@pytest.mark.parametrize("name", ["tells_by_the_page_cache", "tells_by_the_keyring"])
@pytest.mark.parametrize("sandboxed", [False, pytest.param(True, marks=needs_sandbox)])
def test_two_servers_learn_nothing_of_each_other_from_the_kernel(tiny, tmp_path, honest, name, sandboxed):
    result = trial(tmp_path, tiny, name, sandboxed=sandboxed)
    assert result.status == "ok", result.error
    assert result.val_bpb == honest


def test_a_training_that_edits_the_nights_harness_is_a_violation(tiny, tmp_path):
    for file in FROZEN:
        (tmp_path / "repo" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / "repo" / file)
    git(tmp_path / "repo", "init", "-q")
    git(tmp_path / "repo", "add", "-A")
    git(tmp_path / "repo", "commit", "-qm", "start")
    repository = Repository(tmp_path / "repo")
    result = trial(tmp_path, tiny, "edits_the_nights_harness", repository=repository, base=repository.head)
    assert (result.status, result.val_bpb) == ("violation", None)
    assert "the night's copy of the harness was changed" in result.error["message"]


@needs_sandbox
@pytest.mark.parametrize("name", ["guesses_where_the_validation_text_is", "edits_the_harness", "patches_everything", "whispers",
                                  "edits_the_nights_harness"])
def test_in_the_sandbox_it_ends_with_its_honest_score(tiny, tmp_path, honest, name):
    result = trial(tmp_path, tiny, name, sandboxed=True)
    assert result.status == "ok", result.error
    assert result.val_bpb == honest
    for file in FROZEN:
        assert (tmp_path / "worktree" / file).read_bytes() == (ROOT / file).read_bytes()


@pytest.mark.parametrize("name", ["guesses_where_the_validation_text_is", "whispers", "reads_the_training_text_at_scoring"])
def test_without_the_sandbox_it_is_not_refused(tiny, tmp_path, honest, name):
    """What only the sandbox covers, said here so that nobody believes more: held-out text can be read by the folder's owner, two
    processes of a model can leave each other notes, and load_model can read the whole training text."""
    result = trial(tmp_path, tiny, name)
    assert result.status == "ok", result.error
    assert result.val_bpb < honest
    assert os.stat(tiny.held).st_mode & 0o077 == 0, "other users cannot, at least"
