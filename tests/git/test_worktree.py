"""Git as a night uses it, on real repositories: what is refused, what is repaired, and that the user's things stay as they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gitdb import GitDB
from night_kit import Bed, checkout_digest, git

from agent.errors import UsageError
from agent.git.guard import remember
from agent.git.worktree import GuardError, Repository, Worktree


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


def commit_of(worktree: Worktree, message: str = "x", text: bytes = b"GAIN = 1\n") -> str:
    """A candidate: the train file with some lines more, committed on top of where the repository stands."""
    base = worktree.repository.head
    return worktree.repository.commit(base, "train_mlx.py", worktree.repository.file_at(base, "train_mlx.py") + text, message)


@pytest.mark.parametrize("name", ["bed", "a bed, möbliert", '"quoted"', "of two\nlines"])
def test_readers_of_git_other_than_git_find_the_borrowed_objects(tmp_path: Path, name: str) -> None:
    """aider reads objects through gitdb, which knows no quotes; they stand only where git itself needs them."""
    worktree = opened(Bed(tmp_path / name))
    worktree.lend(worktree.repository.head)
    if "\n" not in name:
        found = GitDB(str(worktree.path / ".git" / "objects")).info(bytes.fromhex(worktree.repository.head))
        assert found.type == b"commit"
    assert git(worktree.path, "cat-file", "-t", worktree.repository.head) == "commit"


def test_candidates_stay_reachable_and_the_branch_moves_only_when_it_is_moved(bed: Bed) -> None:
    worktree = opened(bed)
    base = git(bed.repo, "rev-parse", "main")
    commit = commit_of(worktree, "one idea — with ünicode")
    worktree.keep_refs({1: commit})
    assert git(bed.repo, "rev-parse", "refs/autoresearch/night/0001") == commit
    assert git(bed.repo, "rev-parse", "autoresearch/night", "main").split() == [base, base]
    whose = git(bed.repo, "log", "-1", "--format=%an %ae %s", commit)
    assert whose == "autoresearch autoresearch@localhost one idea — with ünicode"
    assert git(bed.repo, "diff", "--name-only", base, commit) == "train_mlx.py"
    assert (worktree.path / "train_mlx.py").read_bytes() == (bed.repo / "train_mlx.py").read_bytes()
    worktree.fill(commit)
    assert (worktree.path / "train_mlx.py").read_text().endswith("GAIN = 1\n")
    assert worktree.move(commit) == ""
    assert git(bed.repo, "rev-parse", "autoresearch/night") == commit
    worktree.close()
    assert not worktree.path.exists()
    assert git(bed.repo, "worktree", "list").count("\n") == 0
    assert git(bed.repo, "branch", "--list", "autoresearch/*").strip() == "autoresearch/night"


def test_commits_bear_the_users_name_where_there_is_one(bed: Bed) -> None:
    git(bed.repo, "config", "user.name", "Ada")
    git(bed.repo, "config", "user.email", "ada@example.org")
    assert git(bed.repo, "log", "-1", "--format=%an <%ae>", commit_of(opened(bed))) == "Ada <ada@example.org>"


def test_a_description_that_the_locale_cannot_encode_is_committed(bed: Bed) -> None:
    code = """if True:
        from pathlib import Path
        from agent.git.worktree import Repository
        here = Repository(Path("."))
        print(here.commit(here.head, "train_mlx.py", b"LR = 0.2", "LR 0.1 \\u2192 0.2"))
    """
    env = bed.environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run([sys.executable, "-c", code], cwd=bed.repo, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert git(bed.repo, "log", "-1", "--format=%B", done.stdout.strip()) == "LR 0.1 \u2192 0.2"


def test_no_hook_runs_and_nothing_is_signed(bed: Bed) -> None:
    for hook in ("pre-commit", "post-commit", "post-checkout", "reference-transaction", "post-index-change", "commit-msg"):
        path = bed.repo / ".git" / "hooks" / hook
        path.write_text(f"#!/bin/sh\necho {hook} >> '{bed.tools / 'hooked'}'\n")
        path.chmod(0o755)
    git(bed.repo, "config", "commit.gpgSign", "true")
    git(bed.repo, "config", "user.signingKey", "nobody")
    worktree = opened(bed)
    worktree.lend(worktree.repository.head)
    worktree.move(commit_of(worktree))
    worktree.close()
    assert not (bed.tools / "hooked").exists()


@pytest.mark.parametrize("setting", ["core.autocrlf=true", "core.safecrlf=true", "core.eol=crlf", "filter.lfs.clean=false"])
def test_the_users_settings_for_line_ends_and_filters_decide_nothing(bed: Bed, setting: str) -> None:
    (bed.repo / ".gitattributes").write_text("*.py text filter=lfs\n")
    git(bed.repo, "add", ".gitattributes")
    git(bed.repo, "commit", "-qm", "attributes")
    for key in (setting, "filter.lfs.required=true"):
        git(bed.repo, "config", *key.split("="))
    worktree = opened(bed)
    commit = commit_of(worktree, text=b"A = 1\nB = 2\r\n")
    worktree.fill(commit)
    assert (worktree.path / "train_mlx.py").read_bytes().endswith(b"A = 1\nB = 2\r\n")


POINTER = b"version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(("content", "tool"), [(POINTER, "Git LFS"), (b"\0GITCRYPT\0", "git-crypt")])
def test_a_file_that_a_filter_keeps_elsewhere_is_named_with_the_mend(bed: Bed, content: bytes, tool: str) -> None:
    (bed.repo / "train_mlx.py").write_bytes(content)
    git(bed.repo, "commit", "-qam", "stored elsewhere")
    repository = Repository(bed.repo)
    with pytest.raises(UsageError, match=f"stored through {tool}.*take train_mlx.py out of .gitattributes"):
        repository.refuse_stored_elsewhere(repository.head, "train_mlx.py")


@pytest.mark.parametrize("ruin", ["removed", "a file", "a link", "filled", "locked", "git"])
def test_a_worktree_is_made_anew_whatever_was_done_to_it(bed: Bed, tmp_path: Path, ruin: str) -> None:
    worktree, outside = opened(bed), tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (bed.repo / "train_mlx.py").write_text("my unsaved work\n")
    before = listing(worktree.path)
    worktree.lend(worktree.repository.head)
    if ruin in ("removed", "a file", "a link"):
        shutil.rmtree(worktree.path)
    if ruin == "a file":
        worktree.path.write_text("")
    elif ruin == "a link":
        worktree.path.symlink_to(outside)
    elif ruin == "filled":
        (worktree.path / "deep" / "er").mkdir(parents=True)
        (worktree.path / "deep" / "er" / "file").write_text("x")
        (worktree.path / "program.md").unlink()
        (worktree.path / "link").symlink_to(outside)
    elif ruin == "locked":
        (worktree.path / "deep").mkdir()
        (worktree.path / "deep" / "file").write_text("x")
        (worktree.path / "deep").chmod(0)
    elif ruin == "git":
        git(worktree.path, "commit", "-q", "--allow-empty", "-am", "mine")
        (worktree.path / ".git" / "index.lock").write_text("")
    worktree.fill(worktree.repository.head)
    assert listing(worktree.path) == before
    assert (outside / "mine").read_text() == "mine"
    assert (bed.repo / "train_mlx.py").read_text() == "my unsaved work\n"


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_lock_that_a_killed_git_left_on_the_nights_branch_is_removed(bed: Bed) -> None:
    worktree = opened(bed)
    lock = bed.repo / ".git/refs/heads/autoresearch/night.lock"
    lock.write_text("")
    (bed.repo / ".git/index.lock").write_text("")  # the user's: not ours to touch, and not needed
    commit = commit_of(worktree)
    assert worktree.move(commit) == ""
    assert git(bed.repo, "rev-parse", "autoresearch/night") == commit
    assert not lock.exists()
    assert (bed.repo / ".git/index.lock").exists()


def test_a_damaged_index_of_the_users_is_not_read(bed: Bed) -> None:
    worktree = opened(bed)
    (bed.repo / ".git/index").write_bytes(b"DIRC nonsense")
    (bed.repo / ".git/index.lock").touch()
    commit = commit_of(worktree, text=b"WIDTH = 8\n")
    assert "+WIDTH = 8" in worktree.diff(worktree.repository.head, commit)
    worktree.lend(commit)
    worktree.keep_refs({1: commit})
    assert worktree.move(commit) == ""
    assert (bed.repo / ".git/index").read_bytes() == b"DIRC nonsense"


def test_a_ref_that_cannot_be_set_and_a_commit_that_is_gone_are_told_once(bed: Bed) -> None:
    worktree = opened(bed)
    commit, base = commit_of(worktree), worktree.repository.head
    git(bed.repo, "update-ref", "refs/autoresearch/night", base)  # no ref can be below it now
    assert "refs/autoresearch/night/0001 stays where it is" in worktree.keep_refs({1: commit})[0]
    git(bed.repo, "update-ref", "-d", "refs/autoresearch/night")
    git(bed.repo, "gc", "-q", "--prune=now")
    assert f"commit {commit[:9]} is gone from git" in worktree.keep_refs({0: base, 1: commit})[0]
    assert worktree.keep_refs({0: base, 1: commit}) == []
    assert git(bed.repo, "rev-parse", "refs/autoresearch/night/0000") == base
    with pytest.raises(GuardError, match="is gone from git: refs/heads/autoresearch/night was deleted"):
        worktree.move(commit)


def test_refs_that_somebody_deleted_come_back(bed: Bed) -> None:
    worktree = opened(bed)
    commits = {n: commit_of(worktree, f"idea {n}") for n in range(3)}
    worktree.keep_refs(commits)
    git(bed.repo, "update-ref", "-d", "refs/autoresearch/night/0001")
    worktree.keep_refs(commits)
    assert git(bed.repo, "rev-parse", "refs/autoresearch/night/0001") == commits[1]


def test_two_nights_of_one_repository_do_not_see_each_other(bed: Bed) -> None:
    first, second = opened(bed, "one"), opened(bed, "two")
    before = remember(first.repository)
    second.keep_refs({1: commit_of(second)})
    second.move(commit_of(second))
    assert remember(first.repository) == before
    assert set(second.refs()) == {"refs/heads/autoresearch/two", "refs/autoresearch/two/0001"}


def test_another_worktree_of_the_user_is_left_alone(bed: Bed, tmp_path: Path) -> None:
    git(bed.repo, "worktree", "add", "-q", str(tmp_path / "on a stick"), "-b", "side")
    shutil.move(tmp_path / "on a stick", tmp_path / "unplugged")
    opened(bed).close()
    assert len(list((bed.repo / ".git/worktrees").iterdir())) == 1, "a worktree that is away for a while was pruned"


@pytest.mark.parametrize("name", ["mit Leerzeichen", "日本語 – ünï", "quote'\"s", "-dash"])
def test_paths_with_spaces_and_unicode(tmp_path: Path, name: str) -> None:
    bed = Bed(tmp_path / "bed", name=name)
    worktree = opened(bed)
    commit = commit_of(worktree)
    worktree.lend(commit)
    assert git(worktree.path, "status", "--porcelain") == ""
    assert git(worktree.path, "log", "-1", "--format=%H") == commit
    worktree.move(commit)
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
    assert commit_of(worktree)
    worktree.close()


def test_a_submodule_in_the_base_does_not_disturb(bed: Bed, tmp_path: Path) -> None:
    other = Bed(tmp_path / "other")
    git(bed.repo, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(other.repo), "lib")
    git(bed.repo, "commit", "-qm", "with a submodule")
    worktree = opened(bed)
    commit = commit_of(worktree)
    assert git(bed.repo, "diff", "--name-only", "main", commit) == "train_mlx.py"
    worktree.lend(commit)
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
