"""Git as a night uses it, on real repositories: what is refused, what is repaired, and that the user's things stay as they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from night_kit import Bed, checkout_digest, git

from agent.errors import UsageError
from agent.git.worktree import Repository, Worktree


@pytest.fixture(autouse=True)
def no_user_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path / "bed")


def opened(bed: Bed, tag: str = "night") -> Worktree:
    repository = Repository(bed.repo)
    folder = bed.repo / "runs" / tag
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    worktree = Worktree(repository, tag, folder / "worktree")
    worktree.open(repository.head)
    return worktree


def edit(worktree: Worktree, text: str = "GAIN = 1\n") -> None:
    with open(worktree.path / "train_mlx.py", "a") as file:
        file.write(text)


def test_candidates_stay_reachable_and_the_branch_moves_only_on_reset(bed: Bed) -> None:
    worktree = opened(bed)
    base = git(bed.repo, "rev-parse", "main")
    edit(worktree)
    commit = worktree.commit(1, base, "train_mlx.py", "one idea — with ünicode")
    assert git(bed.repo, "rev-parse", "refs/autoresearch/night/0001") == commit
    assert git(bed.repo, "rev-parse", "autoresearch/night", "main").split() == [base, base]
    whose = git(bed.repo, "log", "-1", "--format=%an %ae %s", commit)
    assert whose == "autoresearch autoresearch@localhost one idea — with ünicode"
    assert git(bed.repo, "diff", "--name-only", base, commit) == "train_mlx.py"
    worktree.reset(base)
    assert (worktree.path / "train_mlx.py").read_bytes() == (bed.repo / "train_mlx.py").read_bytes()
    worktree.show(base, commit, "train_mlx.py")
    assert (worktree.path / "train_mlx.py").read_text().endswith("GAIN = 1\n")
    assert worktree.orphan(1, base) == (commit, "one idea — with ünicode")
    assert worktree.orphan(1, commit) is None
    assert worktree.orphan(2, base) is None
    worktree.reset(commit)
    assert git(bed.repo, "rev-parse", "autoresearch/night") == commit
    worktree.close()
    assert not worktree.path.exists()
    assert git(bed.repo, "worktree", "list").count("\n") == 0
    assert git(bed.repo, "branch", "--list", "autoresearch/*").strip() == "autoresearch/night"


def test_commits_bear_the_users_name_where_there_is_one(bed: Bed) -> None:
    git(bed.repo, "config", "user.name", "Ada")
    git(bed.repo, "config", "user.email", "ada@example.org")
    worktree = opened(bed)
    edit(worktree)
    commit = worktree.commit(1, worktree.repository.head, "train_mlx.py", "x")
    assert git(bed.repo, "log", "-1", "--format=%an <%ae>", commit) == "Ada <ada@example.org>"


def test_no_hook_runs_and_nothing_is_signed(bed: Bed) -> None:
    for hook in ("pre-commit", "post-commit", "post-checkout", "reference-transaction", "post-index-change", "commit-msg"):
        path = bed.repo / ".git" / "hooks" / hook
        path.write_text(f"#!/bin/sh\necho {hook} >> '{bed.tools / 'hooked'}'\n")
        path.chmod(0o755)
    git(bed.repo, "config", "commit.gpgSign", "true")
    git(bed.repo, "config", "user.signingKey", "nobody")
    worktree = opened(bed)
    edit(worktree)
    commit = worktree.commit(1, worktree.repository.head, "train_mlx.py", "x")
    worktree.reset(commit)
    worktree.close()
    assert not (bed.tools / "hooked").exists()


def test_an_agent_without_its_git_file_cannot_turn_a_reset_on_the_users_checkout(bed: Bed) -> None:
    worktree = opened(bed)
    (bed.repo / "train_mlx.py").write_text("my unsaved work\n")
    (bed.repo / "untracked.txt").write_text("mine\n")
    for ruin in ("unlink", "point", "folder", "all"):
        pointer = worktree.path / ".git"
        if ruin == "all":
            shutil.rmtree(worktree.path)
        else:
            pointer.unlink()
        if ruin == "point":
            pointer.write_text(f"gitdir: {bed.repo / '.git'}\n")
        elif ruin == "folder":
            pointer.mkdir()
            (pointer / "HEAD").write_text("ref: refs/heads/main\n")
        worktree.reset(worktree.repository.head)
        assert (bed.repo / "train_mlx.py").read_text() == "my unsaved work\n"
        assert (bed.repo / "untracked.txt").read_text() == "mine\n"
        assert (worktree.path / "train_mlx.py").read_text() != "my unsaved work\n"
        assert git(worktree.path, "symbolic-ref", "HEAD") == "refs/heads/autoresearch/night"


def test_reset_undoes_whatever_an_agent_did(bed: Bed) -> None:
    worktree = opened(bed)
    base = worktree.repository.head
    git(worktree.path, "checkout", "-q", "-b", "detour")
    edit(worktree)
    git(worktree.path, "commit", "-aqm", "mine")
    (worktree.path / "deep" / "er").mkdir(parents=True)
    (worktree.path / "deep" / "er" / "file").write_text("x")
    (worktree.path / "ignored.txt").write_text("x")
    (worktree.path / "deep").chmod(0o500)
    git(worktree.path, "init", "-q", "nested")
    (worktree.path / "program.md").unlink()
    admin = Path(git(worktree.path, "rev-parse", "--absolute-git-dir"))
    (admin / "index.lock").write_text("")
    worktree.reset(base)
    assert git(worktree.path, "status", "--porcelain", "--ignored") == ""
    assert git(worktree.path, "rev-parse", "--abbrev-ref", "HEAD") == "autoresearch/night"
    assert not (worktree.path / "deep").exists()
    assert not (worktree.path / "nested").exists()


@pytest.mark.parametrize("ruin", ["folder", "admin", "lock", "half"])
def test_open_repairs_a_worktree_that_a_crash_left_half_made(bed: Bed, ruin: str) -> None:
    worktree = opened(bed)
    admin = Path(git(worktree.path, "rev-parse", "--absolute-git-dir"))
    if ruin == "folder":
        shutil.rmtree(worktree.path)
    elif ruin == "admin":
        shutil.rmtree(admin)
    elif ruin == "lock":
        (admin / "index.lock").write_text("")
        (bed.repo / ".git/refs/heads/autoresearch/night.lock").write_text("")
    else:
        (admin / "locked").write_text("initializing")
        (admin / "HEAD").unlink()
        (worktree.path / ".git").unlink()
    again = opened(bed)
    edit(again)
    assert again.commit(1, again.repository.head, "train_mlx.py", "works again")
    assert git(bed.repo, "worktree", "list").count("\n") == 1


def test_another_worktree_of_the_user_is_left_alone(bed: Bed, tmp_path: Path) -> None:
    git(bed.repo, "worktree", "add", "-q", str(tmp_path / "on a stick"), "-b", "side")
    shutil.move(tmp_path / "on a stick", tmp_path / "unplugged")
    opened(bed).close()
    assert len(list((bed.repo / ".git/worktrees").iterdir())) == 1, "a worktree that is away for a while was pruned"


@pytest.mark.parametrize("name", ["mit Leerzeichen", "日本語 – ünï", "quote'\"s", "-dash"])
def test_paths_with_spaces_and_unicode(tmp_path: Path, name: str) -> None:
    bed = Bed(tmp_path / "bed", name=name)
    worktree = opened(bed)
    edit(worktree)
    commit = worktree.commit(1, worktree.repository.head, "train_mlx.py", "x")
    worktree.reset(commit)
    opened(bed).close()


def test_a_detached_head_and_a_linked_worktree_are_fine(bed: Bed, tmp_path: Path) -> None:
    git(bed.repo, "checkout", "-q", "--detach")
    before = checkout_digest(bed.repo)
    opened(bed, "detached").close()
    assert checkout_digest(bed.repo) == before
    git(bed.repo, "worktree", "add", "-q", str(tmp_path / "linked"), "-b", "side")
    linked = Repository(tmp_path / "linked")
    assert linked.root == tmp_path / "linked"
    (linked.root / "runs").mkdir()
    worktree = Worktree(linked, "night", linked.root / "runs" / "worktree")
    worktree.open(linked.head)
    edit(worktree)
    assert worktree.commit(1, linked.head, "train_mlx.py", "x")
    worktree.close()


def test_a_submodule_in_the_base_does_not_disturb(bed: Bed, tmp_path: Path) -> None:
    other = Bed(tmp_path / "other")
    git(bed.repo, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(other.repo), "lib")
    git(bed.repo, "commit", "-qm", "with a submodule")
    worktree = opened(bed)
    edit(worktree)
    commit = worktree.commit(1, worktree.repository.head, "train_mlx.py", "x")
    assert git(bed.repo, "diff", "--name-only", "main", commit) == "train_mlx.py"
    worktree.reset(commit)
    worktree.close()
    assert Repository(bed.repo / "lib").root == bed.repo / "lib"


def test_refusals_are_one_clear_line(bed: Bed, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(UsageError, match="is not in a git repository"):
        Repository(plain)
    git(plain, "init", "-q")
    with pytest.raises(UsageError, match="has no commit yet"):
        Repository(plain)
    git(tmp_path, "init", "-q", "--bare", "bare.git")
    with pytest.raises(UsageError, match="bare repository"):
        Repository(tmp_path / "bare.git")
    (bed.repo / "sub").mkdir()
    with pytest.raises(UsageError, match="run from its top"):
        Repository(bed.repo / "sub")
    with pytest.raises(UsageError, match=r"nothing\.py is not in commit"):
        Repository(bed.repo).file_at("HEAD", "nothing.py")


def test_a_taken_branch_name_is_refused(bed: Bed) -> None:
    repository = Repository(bed.repo)
    Worktree(repository, "night", bed.repo / "runs/night/worktree").check_free()
    git(bed.repo, "branch", "autoresearch/night")
    with pytest.raises(UsageError, match="branch autoresearch/night exists already"):
        Worktree(repository, "night", bed.repo / "runs/night/worktree").check_free()
    Worktree(repository, "other", bed.repo / "runs/other/worktree").check_free()
    with pytest.raises(UsageError, match="not usable in a branch name"):
        Worktree(repository, "a..b", bed.repo / "runs/x/worktree").check_free()
    git(bed.repo, "branch", "-D", "autoresearch/night")
    git(bed.repo, "branch", "autoresearch")
    with pytest.raises(UsageError, match="a branch is called autoresearch"):
        Worktree(repository, "night", bed.repo / "runs/night/worktree").check_free()


def test_a_branch_that_the_user_has_checked_out_is_not_moved_under_their_feet(bed: Bed) -> None:
    worktree = opened(bed)
    worktree.close()
    git(bed.repo, "switch", "-q", "autoresearch/night")
    with pytest.raises(UsageError, match="switch away: git switch -"):
        opened(bed)
    git(bed.repo, "switch", "-q", "main")
    opened(bed).close()


def test_foreign_git_variables_do_not_lead_astray(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Bed(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other.repo / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other.repo / ".git/index"))
    assert Repository(bed.repo).root == bed.repo
    monkeypatch.undo()
