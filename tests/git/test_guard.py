"""The guard against agents that change more than the train file, on real repositories."""

import os
import shutil
import socket
import stat
import sys
from pathlib import Path

import git
import pytest

from agent.git import guard
from agent.git.guard import GuardError, check, remember, scrub

TRAIN = "train_mlx.py"


@pytest.fixture
def repository(tmp_path):
    """A user's repository with everything git can hold, and something in it that a careless checkout would run."""
    root = tmp_path / "user's repo ü"
    repo = git.Repo.init(root)
    with repo.config_writer() as config:
        config.set_value("user", "name", "t")
        config.set_value("user", "email", "t@localhost")
        config.set_value("core", "autocrlf", "false")
    files = {TRAIN: "LR = 1\n", "prepare_mlx.py": "frozen\n", "sub/deep/notes.md": "a\r\nb\n", "ünï code.txt": "x\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    (root / "tool.sh").write_text("#!/bin/sh\n")
    (root / "tool.sh").chmod(0o755)
    (root / "link").symlink_to("sub/deep/notes.md")
    (root / ".gitignore").write_text("runs/\n*.log\n__pycache__/\n")
    repo.git.add("-A")
    repo.git.commit("-m", "base")
    yield repo
    repo.close()


@pytest.fixture
def worktree(repository, tmp_path):
    path = tmp_path / "night" / "worktree"
    repository.git.worktree("add", "-q", "-b", "autoresearch/t", str(path))
    return path


@pytest.fixture
def base(repository):
    return repository.head.commit.hexsha


def listing(root: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, mode, content."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            what = os.readlink(path)
        else:
            what = path.read_bytes() if stat.S_ISREG(status.st_mode) else stat.S_IFMT(status.st_mode)
        found[str(path.relative_to(root))] = (stat.S_IMODE(status.st_mode), what)
    return found


# Each takes the worktree and a folder outside; what must be named, and by which words.
def edit_other(tree, outside):
    (tree / "prepare_mlx.py").write_text("val_bpb = 0\n")


def edit_keeping_size_and_time(tree, outside):
    file = tree / "prepare_mlx.py"
    status = file.stat()
    file.write_text("FROZEN\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit_hidden_from_the_index(tree, outside):
    git.Repo(tree).git.update_index("--assume-unchanged", "prepare_mlx.py")
    edit_other(tree, outside)


def delete(tree, outside):
    (tree / "prepare_mlx.py").unlink()


def delete_folder(tree, outside):
    shutil.rmtree(tree / "sub")


def make_executable(tree, outside):
    (tree / "prepare_mlx.py").chmod(0o755)


def make_train_file_executable(tree, outside):
    (tree / TRAIN).chmod(0o755)


def set_user_id(tree, outside):
    (tree / "tool.sh").chmod(0o4755)


def new_file(tree, outside):
    (tree / "helper.py").write_text("1\n")


def ignored_file(tree, outside):
    (tree / "trace.log").write_text("1\n")


def ignored_folder(tree, outside):
    (tree / "runs").mkdir()
    (tree / "runs" / "x").write_text("1\n")


def file_in_known_folder(tree, outside):
    (tree / "sub" / "deep" / "mlx.py").write_text("1\n")


def link_to_outside(tree, outside):
    (tree / "data").symlink_to(outside)


def folder_becomes_link(tree, outside):
    shutil.rmtree(tree / "sub")
    (tree / "sub").symlink_to(outside)


def link_retargeted(tree, outside):
    (tree / "link").unlink()
    (tree / "link").symlink_to(outside / "victim")


def train_file_becomes_link(tree, outside):
    (tree / TRAIN).unlink()
    (tree / TRAIN).symlink_to(outside / "victim")


def train_file_becomes_hard_link(tree, outside):
    (tree / TRAIN).unlink()
    os.link(outside / "victim", tree / TRAIN)


def train_file_becomes_folder(tree, outside):
    (tree / TRAIN).unlink()
    (tree / TRAIN).mkdir()
    (tree / TRAIN / "x").write_text("1\n")


def train_file_becomes_pipe(tree, outside):
    (tree / TRAIN).unlink()
    os.mkfifo(tree / TRAIN)


def train_file_deleted(tree, outside):
    (tree / TRAIN).unlink()


def train_file_huge(tree, outside):
    (tree / TRAIN).write_text("#" * (guard.TRAIN_FILE_BYTES + 1))


def train_file_not_utf8(tree, outside):
    (tree / TRAIN).write_bytes(b"x = '\xff'\n")


def train_file_with_nul(tree, outside):
    (tree / TRAIN).write_bytes(b"x = 1\n\0")


def nested_repository(tree, outside):
    git.Repo.init(tree / "vendor").close()


def nested_repository_in_known_folder(tree, outside):
    git.Repo.init(tree / "sub").close()


def add_socket(tree, outside):
    where = os.getcwd()
    os.chdir(tree)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s")
    os.chdir(where)


def locked_folder(tree, outside):
    (tree / "locked").mkdir()
    (tree / "locked" / "x").write_text("1\n")
    (tree / "locked").chmod(0)


def endless_folder(tree, outside):
    where = os.getcwd()
    os.chdir(tree)
    for _ in range(1500):
        os.mkdir("deeper")
        os.chdir("deeper")
    Path("x").touch()
    os.chdir(where)


ATTACKS = {
    edit_other: ("prepare_mlx.py", "content was changed"),
    edit_keeping_size_and_time: ("prepare_mlx.py", "content was changed"),
    edit_hidden_from_the_index: ("prepare_mlx.py", "content was changed"),
    delete: ("prepare_mlx.py", "was deleted"),
    delete_folder: ("sub/deep/notes.md", "was deleted"),
    make_executable: ("prepare_mlx.py", "from 100644 to 100755"),
    make_train_file_executable: (TRAIN, "from 100644 to 100755"),
    set_user_id: ("tool.sh", "changed to 4755"),
    new_file: ("helper.py", "a file was added"),
    ignored_file: ("trace.log", "a file was added"),
    ignored_folder: ("runs", "a folder was added"),
    file_in_known_folder: ("sub/deep/mlx.py", "a file was added"),
    link_to_outside: ("data", "a symbolic link was added"),
    folder_becomes_link: ("sub", "a symbolic link was added"),
    link_retargeted: ("link", "content was changed"),
    train_file_becomes_link: (TRAIN, "replaced by a symbolic link"),
    train_file_becomes_hard_link: (TRAIN, "hard link"),
    train_file_becomes_folder: (TRAIN, "replaced by a folder"),
    train_file_becomes_pipe: (TRAIN, "replaced by a pipe"),
    train_file_deleted: (TRAIN, "was deleted"),
    train_file_huge: (TRAIN, f"at most {guard.TRAIN_FILE_BYTES}"),
    train_file_not_utf8: (TRAIN, "not UTF-8 text"),
    train_file_with_nul: (TRAIN, "NUL"),
    nested_repository: ("vendor", "git repository"),
    nested_repository_in_known_folder: ("sub/.git", "a folder was added"),
    add_socket: ("s", "a pipe, socket or device was added"),
    locked_folder: ("locked", "a folder was added"),
    endless_folder: ("deeper", "a folder was added"),
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("remembered", [True, False], ids=["remembered", "from commit"])
def test_an_attack_is_named_and_undone_without_touching_anything_else(worktree, repository, base, tmp_path, attack, remembered):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("precious\n")
    (outside / "deep").mkdir()
    original, checkout = listing(worktree), listing(Path(repository.working_dir))
    before = remember(worktree) if remembered else None
    assert check(worktree, base, TRAIN, before) == []

    attack(worktree, outside)
    found = check(worktree, base, TRAIN, before)
    path, words = ATTACKS[attack]
    assert [str(one) for one in found if one.path == path and words in one.what], found

    scrub(worktree, base, before)
    assert listing(worktree) == original
    assert check(worktree, base, TRAIN, before) == []
    assert listing(outside) == {"victim": (0o644, b"precious\n"), "deep": (0o755, stat.S_IFDIR)}
    ours = {name: what for name, what in listing(Path(repository.working_dir)).items() if not name.startswith(".git/worktrees")}
    assert ours == {name: what for name, what in checkout.items() if not name.startswith(".git/worktrees")}
    if attack is not edit_hidden_from_the_index:
        assert git.Repo(worktree).git.status("--porcelain", "--ignored") == ""


@pytest.mark.parametrize("remembered", [True, False], ids=["remembered", "from commit"])
def test_the_train_file_may_change_and_bytecode_may_appear(worktree, base, remembered):
    before = remember(worktree) if remembered else None
    (worktree / TRAIN).write_text("LR = 2  # größer\n")
    (worktree / "__pycache__").mkdir()
    (worktree / "__pycache__" / "prepare_mlx.cpython-311.pyc").write_bytes(b"planted")
    (worktree / "empty").mkdir()
    assert check(worktree, base, TRAIN, before) == []
    scrub(worktree, base, before)
    assert (worktree / TRAIN).read_text() == "LR = 1\n"
    assert not (worktree / "__pycache__").exists()
    assert not (worktree / "empty").exists()


def test_scrubbing_to_a_candidate_keeps_the_candidate(worktree, repository, base):
    (worktree / TRAIN).write_text("LR = 2\n")
    tree = git.Repo(worktree)
    tree.git.commit("-aqm", "candidate")
    candidate = tree.head.commit.hexsha
    scrub(worktree, base)
    assert (worktree / TRAIN).read_text() == "LR = 1\n"
    scrub(worktree, candidate)
    assert (worktree / TRAIN).read_text() == "LR = 2\n"


# --- git's own folder


def add_hook(repo, tree):
    hook = Path(repo.git_dir) / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)


def redirect_hooks(repo, tree):
    git.Repo(tree).git.config("core.hooksPath", "/tmp/evil")


def add_filter(repo, tree):
    git.Repo(tree).git.config("filter.x.smudge", "touch /tmp/evil")


def add_attributes(repo, tree):
    (Path(repo.git_dir) / "info").mkdir(exist_ok=True)
    (Path(repo.git_dir) / "info" / "attributes").write_text("* filter=x\n")


def commit(repo, tree):
    (tree / TRAIN).write_text("LR = 3\n")
    git.Repo(tree).git.commit("-aqm", "mine")


def leave_branch(repo, tree):
    git.Repo(tree).git.checkout("-q", "--detach")


def replace_object(repo, tree):
    fake = repo.git.hash_object("-w", str(tree / TRAIN))
    repo.git.replace(repo.git.rev_parse("HEAD:prepare_mlx.py"), fake)


def move_pointer(repo, tree):
    (tree / ".git").write_text(f"gitdir: {repo.git_dir}\n")


def remove_pointer(repo, tree):
    (tree / ".git").unlink()


def pointer_becomes_repository(repo, tree):
    (tree / ".git").unlink()
    git.Repo.init(tree).close()


GIT_ATTACKS = {
    add_hook: ".git/hooks/post-checkout",
    redirect_hooks: ".git/config core.hookspath",
    add_filter: ".git/config filter.x.smudge",
    add_attributes: ".git/info/attributes",
    commit: ".git/refs/heads/autoresearch/t",
    leave_branch: ".git/worktrees/worktree/HEAD",
    replace_object: ".git/refs/replace/",
    move_pointer: ".git",
    remove_pointer: ".git",
    pointer_becomes_repository: ".git",
}


@pytest.mark.parametrize("attack", GIT_ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_writes_to_gits_folder_are_named_and_the_files_still_come_back(worktree, repository, base, attack):
    before, original = remember(worktree), listing(worktree)
    attack(repository, worktree)
    found = check(worktree, base, TRAIN, before)
    assert [one.path.startswith(GIT_ATTACKS[attack]) for one in found] == [True], found
    scrub(worktree, base, before)
    assert listing(worktree) == original


def test_the_users_own_work_in_git_is_no_violation(worktree, repository, base):
    before = remember(worktree)
    repository.git.checkout("-q", "-b", "feature")
    repository.git.commit("-q", "--allow-empty", "-m", "mine")
    repository.git.config("branch.feature.merge", "refs/heads/main")
    repository.git.remote("add", "origin", "https://example.org/x.git")
    repository.git.tag("v1")
    assert check(worktree, base, TRAIN, before) == []


def test_nothing_in_the_repository_is_executed(worktree, repository, base, tmp_path):
    proof = tmp_path / "executed"
    script = tmp_path / "evil.sh"
    script.write_text(f"#!/bin/sh\ntouch '{proof}'\ncat\n")
    script.chmod(0o755)
    hooks = Path(repository.git_dir) / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("post-checkout", "post-index-change", "reference-transaction", "pre-commit", "fsmonitor-watchman"):
        shutil.copy(script, hooks / name)
    for key in ("core.fsmonitor", "filter.x.smudge", "filter.x.clean", "diff.x.textconv", "diff.external", "core.pager"):
        repository.git.config(key, str(script))
    (worktree / ".gitattributes").write_text("* filter=x diff=x\n")
    (worktree / "prepare_mlx.py").write_text("changed\n")
    before = remember(worktree)
    assert [one.path for one in check(worktree, base, TRAIN)] == [".gitattributes", "prepare_mlx.py"]
    assert check(worktree, base, TRAIN, before) == []
    scrub(worktree, base, before)
    assert (worktree / "prepare_mlx.py").read_text() == "frozen\n"
    assert not proof.exists()


def test_a_changed_submodule_is_named_and_emptied(repository, tmp_path):
    inner = git.Repo.init(tmp_path / "inner")
    inner.git.config("user.email", "t@localhost")
    inner.git.config("user.name", "t")
    inner.git.commit("-q", "--allow-empty", "-m", "inner")
    repository.git.update_index("--add", "--cacheinfo", f"160000,{inner.head.commit.hexsha},module")
    repository.git.commit("-qm", "with a submodule")
    base = repository.head.commit.hexsha
    path = tmp_path / "worktree"
    repository.git.worktree("add", "-q", "--detach", str(path), base)
    assert check(path, base, TRAIN) == []
    (path / "module" / "x.py").write_text("1\n")
    assert [one.path for one in check(path, base, TRAIN)] == ["module"]
    scrub(path, base)
    assert check(path, base, TRAIN) == []
    assert list((path / "module").iterdir()) == []
    inner.close()


def test_a_replaced_worktree_is_named_and_rebuilt(worktree, base, tmp_path):
    before, original = remember(worktree), listing(worktree)
    outside = tmp_path / "outside"
    shutil.move(worktree, outside)
    kept = listing(outside)
    worktree.symlink_to(outside)
    assert [one.path for one in check(worktree, base, TRAIN, before)] == ["."]
    scrub(worktree, base, before)
    assert not worktree.is_symlink()
    assert listing(worktree) == original
    assert listing(outside) == kept


def test_damaged_objects_are_an_error_that_names_the_mend(worktree, repository, base):
    oid = repository.git.rev_parse(f"{base}:prepare_mlx.py")
    stored = Path(repository.git_dir) / "objects" / oid[:2] / oid[2:]
    (worktree / "prepare_mlx.py").unlink()
    stored.unlink()
    with pytest.raises(GuardError, match="git fsck"):
        scrub(worktree, base)
    other = repository.git.rev_parse(f"{base}:{TRAIN}")
    shutil.copy(Path(repository.git_dir) / "objects" / other[:2] / other[2:], stored)
    with pytest.raises(GuardError, match="git fsck"):
        scrub(worktree, base)


def test_what_is_no_worktree_is_refused(tmp_path, worktree):
    with pytest.raises(GuardError, match=r"expected .*\.git"):
        remember(tmp_path)
    with pytest.raises(GuardError, match="expected nonsense to be a commit"):
        check(worktree, "nonsense", TRAIN)


def test_many_violations_are_cut_short(worktree, base):
    for number in range(100):
        (worktree / f"f{number}").touch()
    assert len(check(worktree, base, TRAIN)) == guard.MOST_VIOLATIONS


@pytest.mark.skipif(sys.platform != "linux", reason="file names on macOS are Unicode")
def test_names_that_are_no_unicode(worktree, base):
    name = os.path.join(os.fsencode(worktree), b"\xff\n.py")
    Path(os.fsdecode(name)).touch()
    assert [one.path for one in check(worktree, base, TRAIN)] == [r"\udcff\n.py"]  # as text that a terminal and JSON can hold
    scrub(worktree, base)
    assert check(worktree, base, TRAIN) == []
