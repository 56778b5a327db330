"""`--forget TAG` removes a night whole, and nothing else."""

from __future__ import annotations

from pathlib import Path

from night_kit import Bed, checkout_digest, git


def refs(bed: Bed) -> list[str]:
    return [name for name in git(bed.repo, "for-each-ref", "--format=%(refname)").split() if "autoresearch" in name]


def test_a_night_is_shown_and_removed_whole_and_another_stays(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better worse")
    for tag in ("night", "other"):
        assert bed.run("--experiments", "1", "--no-sandbox", tag=tag).returncode == 0
    before = checkout_digest(bed.repo)
    asked = bed.loop("--forget", "night")  # nobody answers: standard input is empty
    assert asked.returncode != 0
    assert bed.folder().is_dir()
    assert "1 kept; branch autoresearch/night" in asked.stdout
    assert "merged nowhere" in asked.stdout
    done = bed.loop("--forget", "night", "--yes")
    assert (done.returncode, "the night night is forgotten" in done.stdout) == (0, True), done.stderr
    assert not bed.folder().exists()
    assert {name.rsplit("/", 1)[0] for name in refs(bed)} == {"refs/autoresearch/other", "refs/heads/autoresearch"}
    assert "runs/night" not in git(bed.repo, "worktree", "list")
    assert checkout_digest(bed.repo) == before
    assert bed.run("--experiments", "1", "--no-sandbox").returncode == 0, "the tag is free again"


def test_what_is_left_of_a_night_whose_folder_is_gone_can_be_forgotten(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    assert bed.run("--experiments", "1", "--no-sandbox").returncode == 0
    git(bed.repo, "merge", "-q", "autoresearch/night")
    bed.folder().rename(tmp_path / "elsewhere")
    done = bed.loop("--forget", "night", "--yes")
    assert done.returncode == 0, done.stderr
    assert "merged nowhere" not in done.stdout
    assert refs(bed) == []


def test_a_running_night_and_a_night_that_is_none_are_refused(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "hangs")
    driver = bed.start("--experiments", "1", "--no-sandbox")
    try:
        while not (bed.tools / "prompt-1").exists():
            assert driver.poll() is None
        done = bed.loop("--forget", "night", "--yes")
        assert (done.returncode, "works on it" in done.stderr) == (2, True)
        assert bed.folder().is_dir()
    finally:
        bed.loop("--stop"), bed.loop("--stop")
        driver.communicate(timeout=60)
    (bed.repo / "runs/odd/lock").mkdir(parents=True)
    odd = bed.loop("--forget", "odd", "--yes")
    assert (odd.returncode, "run the same command again" in odd.stderr, "--resume" in odd.stderr) == (1, True, False)
    for tag in ("gone", "../repo", ""):
        done = bed.loop("--forget", tag, "--yes")
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert (bed.repo / "train_mlx.py").exists()
