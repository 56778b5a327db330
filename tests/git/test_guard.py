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
from agent.git.guard import Findings, check, remember
from agent.git.worktree import GuardError, Repository, Worktree

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


class Lent:
    """A worktree with an agent in it: what the guard finds, and the files put back."""

    def __init__(self, root: Path, path: Path) -> None:
        self.repository = Repository(root)
        self.worktree = Worktree(self.repository, "t", path)
        path.parent.mkdir(exist_ok=True)
        self.base = self.repository.head
        self.worktree.open(self.base)
        self.worktree.lend(self.base)
        self.path, self.before = path, remember(self.repository)
        self.source = (path / TRAIN).read_bytes()

    def check(self) -> Findings:
        return check(self.repository, self.path, self.worktree.tree(self.base), TRAIN, self.source, self.before)

    def restore(self) -> None:
        self.worktree.fill(self.base)


@pytest.fixture
def lent(repository, tmp_path):
    return Lent(Path(repository.working_dir), tmp_path / "night" / "worktree")


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
    with git.Repo(tree) as own:
        own.git.update_index("--assume-unchanged", "prepare_mlx.py")
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


def module_that_is_imported(tree, outside):
    (tree / "helper.py").write_text("1\n")
    (tree / TRAIN).write_text("import helper\n")


def file_that_is_read(tree, outside):
    (tree / "sub" / "weights.bin").write_text("1\n")
    (tree / TRAIN).write_text("data = open('sub/weights.bin').read()\n")


def package_that_is_imported(tree, outside):
    (tree / "pack").mkdir()
    (tree / "pack" / "__init__.py").write_text("1\n")
    (tree / TRAIN).write_text("from pack import x\n")


def module_in_place_of_another(tree, outside):
    (tree / "math.cpython-311-darwin.so").write_text("1\n")
    (tree / TRAIN).write_text("from math import pi\n")


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
    folder_becomes_link: ("sub/deep/notes.md", "its folder sub was replaced by a symbolic link"),
    module_that_is_imported: ("helper.py", "now names it"),
    file_that_is_read: ("sub/weights.bin", "now names it"),
    package_that_is_imported: ("pack", "now names it"),
    module_in_place_of_another: ("math.cpython-311-darwin.so", "now names it"),
    link_retargeted: ("link", "content was changed"),
    train_file_becomes_link: (TRAIN, "replaced by a symbolic link"),
    train_file_becomes_hard_link: (TRAIN, "hard link"),
    train_file_becomes_folder: (TRAIN, "replaced by a folder"),
    train_file_becomes_pipe: (TRAIN, "replaced by a pipe"),
    train_file_deleted: (TRAIN, "was deleted"),
    train_file_huge: (TRAIN, f"at most {guard.TRAIN_FILE_BYTES}"),
    train_file_not_utf8: (TRAIN, "not UTF-8 text"),
    train_file_with_nul: (TRAIN, "NUL"),
}



def attacked(lent: Lent, repository, tmp_path: Path, attack) -> Findings:
    """What the guard finds; everything is put back, and nothing else was touched."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("precious\n")
    (outside / "deep").mkdir()
    lent.restore()
    original, checkout = listing(lent.path), listing(Path(repository.working_dir))
    lent.worktree.lend(lent.base)
    attack(lent.path, outside)
    found = lent.check()
    lent.restore()
    assert listing(lent.path) == original
    assert listing(outside) == {"victim": (0o644, b"precious\n"), "deep": (0o755, stat.S_IFDIR)}
    assert listing(Path(repository.working_dir)) == checkout
    return found


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_is_named_and_undone_without_touching_anything_else(lent, repository, tmp_path, attack):
    assert lent.check() == Findings()
    found = attacked(lent, repository, tmp_path, attack)
    path, words = ATTACKS[attack]
    assert [str(one) for one in found.violations if one.path == path and words in one.what], found


DROPPINGS = [
    new_file, ignored_file, ignored_folder, file_in_known_folder, link_to_outside, nested_repository,
    nested_repository_in_known_folder, add_socket, locked_folder, endless_folder,
]


@pytest.mark.parametrize("attack", DROPPINGS, ids=lambda attack: attack.__name__)
def test_what_is_only_left_beside_the_edit_is_told_and_removed(lent, repository, tmp_path, attack):
    found = attacked(lent, repository, tmp_path, attack)
    assert found.violations == []
    assert len(found.droppings) == 1


def test_the_train_file_may_change_and_bytecode_may_appear(lent):
    (lent.path / TRAIN).write_text("LR = 2  # größer\n")
    (lent.path / "__pycache__").mkdir()
    (lent.path / "__pycache__" / "prepare_mlx.cpython-311.pyc").write_bytes(b"planted")
    assert lent.check() == Findings()
    lent.restore()
    assert (lent.path / TRAIN).read_text() == "LR = 1\n"
    assert not (lent.path / "__pycache__").exists()


# --- git's own folder


def add_hook(repo):
    hook = Path(repo.git_dir) / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)


def redirect_hooks(repo):
    repo.git.config("core.hooksPath", "/tmp/evil")


def add_filter(repo):
    repo.git.config("filter.x.smudge", "touch /tmp/evil")


def add_shell_alias(repo):
    repo.git.config("alias.st", "!touch /tmp/evil")


def add_attributes(repo):
    (Path(repo.git_dir) / "info").mkdir(exist_ok=True)
    (Path(repo.git_dir) / "info" / "attributes").write_text("* filter=x\n")


def borrow_objects(repo):
    (Path(repo.git_dir) / "objects" / "info").mkdir(exist_ok=True)
    (Path(repo.git_dir) / "objects" / "info" / "alternates").write_text("/tmp/evil\n")


def hook_becomes_pipe(repo):
    (Path(repo.git_dir) / "hooks").mkdir(exist_ok=True)
    os.mkfifo(Path(repo.git_dir) / "hooks" / "pre-push")


GIT_ATTACKS = {
    add_hook: ".git/hooks/post-checkout",
    redirect_hooks: ".git/config core.hookspath",
    add_filter: ".git/config filter.x.smudge",
    add_shell_alias: ".git/config alias.st",
    add_attributes: ".git/info/attributes",
    borrow_objects: ".git/objects/info/alternates",
    hook_becomes_pipe: ".git/hooks/pre-push",
}


@pytest.mark.parametrize("attack", GIT_ATTACKS, ids=lambda attack: attack.__name__)
def test_what_can_run_a_program_in_the_users_git_folder_is_named(lent, repository, attack):
    attack(repository)
    assert [one.path for one in lent.check().violations] == [GIT_ATTACKS[attack]]
    lent.restore()


def test_the_users_own_work_in_git_is_no_violation(lent, repository):
    repository.git.checkout("-q", "-b", "feature")
    repository.git.commit("-q", "--allow-empty", "-m", "mine")
    repository.git.config("branch.feature.merge", "refs/heads/main")
    repository.git.remote("add", "origin", "https://example.org/x.git")
    repository.git.config("user.signingkey", "mine")
    repository.git.config("alias.co", "checkout")
    repository.git.config("pull.rebase", "true")
    repository.git.tag("v1")
    repository.git.replace(repository.git.rev_parse("HEAD"), repository.git.rev_parse("HEAD~1"))
    assert lent.check() == Findings()


def test_nothing_in_the_repository_is_executed(repository, tmp_path):
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
    (Path(repository.git_dir) / "info").mkdir(exist_ok=True)
    (Path(repository.git_dir) / "info" / "attributes").write_text("* filter=x diff=x\n")
    lent = Lent(Path(repository.working_dir), tmp_path / "night" / "worktree")
    (lent.path / ".gitattributes").write_text("* filter=x diff=x\n")
    (lent.path / "prepare_mlx.py").write_text("changed\n")
    found = lent.check()
    assert ([one.path for one in found.violations], found.droppings) == (["prepare_mlx.py"], [".gitattributes"])
    commit = lent.worktree.repository.commit(lent.base, TRAIN, b"LR = 2\n", "candidate")
    assert "+LR = 2" in lent.worktree.diff(lent.base, commit)
    lent.restore()
    assert (lent.path / "prepare_mlx.py").read_text() == "frozen\n"
    assert not proof.exists()


def test_a_changed_submodule_is_told_and_emptied(repository, tmp_path):
    inner = git.Repo.init(tmp_path / "inner")
    inner.git.config("user.email", "t@localhost")
    inner.git.config("user.name", "t")
    inner.git.commit("-q", "--allow-empty", "-m", "inner")
    repository.git.update_index("--add", "--cacheinfo", f"160000,{inner.head.commit.hexsha},module")
    repository.git.commit("-qm", "with a submodule")
    inner.close()
    lent = Lent(Path(repository.working_dir), tmp_path / "night" / "worktree")
    assert lent.check() == Findings()
    (lent.path / "module" / "x.py").write_text("1\n")
    assert lent.check().droppings == ["module/x.py"]
    lent.restore()
    assert list((lent.path / "module").iterdir()) == []


def test_a_replaced_worktree_is_named_and_rebuilt(lent, tmp_path):
    lent.restore()
    original, outside = listing(lent.path), tmp_path / "outside"
    shutil.move(lent.path, outside)
    kept = listing(outside)
    lent.path.symlink_to(outside)
    assert [one.path for one in lent.check().violations] == ["."]
    lent.restore()
    assert not lent.path.is_symlink()
    assert listing(lent.path) == original
    assert listing(outside) == kept


def test_damaged_objects_are_an_error_that_names_the_mend(lent, repository):
    oid = repository.git.rev_parse(f"{lent.base}:prepare_mlx.py")
    stored = Path(repository.git_dir) / "objects" / oid[:2] / oid[2:]
    (lent.path / "prepare_mlx.py").unlink()
    stored.unlink()
    with pytest.raises(GuardError, match="git fsck"):
        lent.restore()
    other = repository.git.rev_parse(f"{lent.base}:{TRAIN}")
    shutil.copy(Path(repository.git_dir) / "objects" / other[:2] / other[2:], stored)
    with pytest.raises(GuardError, match="git fsck"):
        lent.restore()
    with pytest.raises(GuardError, match="expected nonsense to be a commit"):
        lent.worktree.fill("nonsense")


def test_many_findings_are_cut_short(lent):
    for number in range(300):
        (lent.path / f"f{number}").touch()
    assert len(lent.check().droppings) == guard.MOST_DROPPINGS


@pytest.mark.skipif(sys.platform != "linux", reason="file names on macOS are Unicode")
def test_names_that_are_no_unicode(lent):
    name = os.path.join(os.fsencode(lent.path), b"\xff\n.py")
    Path(os.fsdecode(name)).touch()
    assert lent.check().droppings == [r"\udcff\n.py"]  # as text that a terminal and JSON can hold
    lent.restore()
    assert lent.check() == Findings()


def test_what_could_run_in_every_training_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python reads them at each start: a .pth file, sitecustomize, a module of its own, and the program `python` itself."""
    for name in ("stdlib", "scripts", "my-packages"):
        (tmp_path / name / "kit").mkdir(parents=True)
    monkeypatch.setattr(guard.sysconfig, "get_path", lambda name: str(tmp_path / name))
    (tmp_path / "linked-packages").symlink_to("my-packages")  # as lib64 leads to lib
    monkeypatch.setattr(guard.sys, "path", [str(tmp_path / name) for name in ("my-packages", "linked-packages")])
    monkeypatch.setattr(guard.sys, "prefix", "a virtual environment")
    before = guard.in_python()
    files = ("my-packages/x.pth", "my-packages/kit/__init__.py", "stdlib/sitecustomize.py", "scripts/python")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    changed = guard.changed(before, guard.in_python())
    assert changed == {"package x.pth", "package kit", "package sitecustomize.py", "package python"}
