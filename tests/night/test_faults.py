"""What agents, candidates and other programs do to files, git and the disk costs one experiment, never the night."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from night_kit import ROOT, Bed, git

from agent.journal.folder import choose_tag, clear_leftovers, runs_folder
from agent.journal.journal import read_events
from agent.journal.state import Night, fold

QUICK = "--no-sandbox"
AGENT = """
import os, re, shutil, signal, subprocess, sys
from pathlib import Path
sys.stdin.read()
n, file, night = int(os.environ["AUTORESEARCH_EXPERIMENT"]), Path("train_mlx.py"), Path(os.getcwd()).parent
def put(name, change):
    text = file.read_text()
    old = re.search(rf"^{name} = (.*)$", text, re.M)[1]
    file.write_text(re.sub(rf"^{name} = .*$", f"{name} = {change(old)}", text, flags=re.M))
def better():
    put("GAIN", lambda old: round(float(old) + 0.05, 4))
def worse():  # honest, too, and decided by one training
    put("GAIN", lambda old: round(float(old) - 0.05 - n / 1000, 4))
def run(*command, check=True):
    subprocess.run(command, check=check, stdout=2)
"""


def scripted(bed: Bed, body: str) -> None:
    """Have the bed's agent run these lines of Python; `better()` is an honest edit."""
    (bed.tools / "agent.py").write_text(AGENT + textwrap.dedent(body) + "\nprint('DESCRIPTION: it', n)\n")


def hook(bed: Bed, name: str, body: str) -> None:
    path = bed.repo / "hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport json, os, subprocess, sys\nabout = json.load(sys.stdin)\n{textwrap.dedent(body)}")
    path.chmod(0o755)


def night_of(bed: Bed, tag: str = "night") -> Night:
    return fold(read_events(bed.folder(tag) / "journal.jsonl")[0])


def wait_for(what: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def in_training(bed: Bed, n: int) -> Callable[[], bool]:
    """Whether a training of an experiment is under way: its metrics are there."""
    return lambda: bool(list(bed.folder().glob(f"trials/{n:04d}-*/metrics.jsonl")))


def test_an_agent_costs_at_most_its_own_experiment(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    (bed.repo / "program.md").write_text("my unsaved idea\n")
    git(bed.repo, "stash", "push", "-q", "-m", "my own work")
    stash = git(bed.repo, "stash", "list", "--format=%H %gs")
    scripted(bed, """
        harm = [
            lambda: shutil.rmtree(os.getcwd()),
            lambda: (worse(), run("git", "stash"), run("git", "stash", "pop")),
            lambda: (worse(), Path(".git/index.lock").touch(), Path(".git/HEAD.lock").touch()),
            lambda: (worse(), shutil.rmtree(".git"), run("git", "stash", check=False)),  # finds no other repository
            lambda: (worse(), Path(".ruff_cache").mkdir(), Path(".DS_Store").touch(), Path("train_mlx.py~").touch()),
            lambda: (worse(), [shutil.rmtree(night / name) for name in ("trials", "logs", "frozen")]),
            lambda: (worse(), (night / "results.tsv").unlink(), (night / "results.tsv").mkdir()),
            lambda: (worse(), (night / "agent.pid").unlink(), os.mkfifo(night / "agent.pid"), os.mkfifo(night / "stop")),
            lambda: (file.unlink(), os.mkfifo(file)),
            lambda: (worse(), shutil.rmtree(night)),
            lambda: worse(),
        ]
        harm[n - 1]()
        n != 10 or sys.exit()
    """)  # fmt: skip
    done = bed.run("--experiments", "11", QUICK, "--breaker", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    night = night_of(bed)
    assert [e.status for e in night.done] == [
        "violation", *["discard"] * 7, "violation", "violation", "discard",
    ], [e.reason for e in night.done]  # fmt: skip
    assert "the worktree was removed" in night.done[0].reason
    assert any(".ruff_cache/" in note and "train_mlx.py~" in note for note in night.notes)
    assert any("its journal is there again" in note for note in night.notes)
    assert night.ended == "experiments"
    assert git(bed.repo, "stash", "list", "--format=%H %gs") == stash, "the user's stash is theirs"
    assert len((bed.folder() / "results.tsv").read_text().splitlines()) == 13


def test_a_person_works_in_the_repository_meanwhile(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    scripted(bed, "better()")
    git(bed.repo, "remote", "add", "origin", "https://example.invalid/x.git")
    (bed.repo / ".gitignore").write_text("runs/\n")
    git(bed.repo, "commit", "-qam", "ignore")
    hook(bed, "before_experiment", """
        def git(*words):
            subprocess.run(["git", "-c", "user.name=S", "-c", "user.email=s@example.org", *words], check=True, stdout=2)
        n = about["n"]
        if n == 1:
            git("config", "remote.origin.gh-resolved", "base"), git("config", "core.autocrlf", "true")
            git("config", "core.safecrlf", "true"), git("commit", "-q", "--allow-empty", "-m", "mine")
        elif n == 2:
            git("pack-refs", "--all"), git("config", "core.fsmonitor", "/no/such/program")
            git("branch", "-D", "autoresearch/night"), git("gc", "-q", "--prune=now")
        elif n == 3:
            git("clean", "-ffdxq", "runs")
        elif n == 4:
            git("switch", "-q", "autoresearch/night")
    """)  # fmt: skip
    done = bed.run("--experiments", "4", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    night = night_of(bed)
    assert [e.status for e in night.done] == ["keep"] * 4, [e.reason for e in night.done]
    assert "its journal is there again" in done.stdout
    assert "autoresearch/night checked out, so it stays where it is" in done.stdout
    assert git(bed.repo, "status", "--porcelain") == "?? hooks/", "their index and files are as they left them"
    assert git(bed.repo, "rev-parse", "HEAD") == night.experiments[3].commit
    refs = git(bed.repo, "for-each-ref", "--format=%(objectname)", "refs/autoresearch/night/").split()
    assert refs == [e.commit for e in night.experiments]
    git(bed.repo, "switch", "-q", "main")
    assert bed.run("--experiments", "4", QUICK).returncode == 0
    assert git(bed.repo, "rev-parse", "autoresearch/night") == night.experiments[4].commit, "it follows once they switch away"


def test_what_an_agent_changes_outside_its_worktree_is_told_once_and_left(tmp_path: Path) -> None:
    bed, packages = Bed(tmp_path), tmp_path / "own-packages"
    (packages / "numbers_kit").mkdir(parents=True)
    scripted(bed, f"""
        repo = night.parent.parent
        package = Path({str(packages)!r}) / "numbers_kit" / "x.py"
        for path in (repo / "prepare_mlx.py", repo / "new ü.txt", repo / "ignored.txt", package):
            path.open("a").write("# more\\n")
        worse()
    """)
    done = bed.run("--experiments", "2", QUICK, PYTHONPATH=f"{ROOT}{os.pathsep}{packages}")
    assert done.returncode == 0, done.stdout + done.stderr
    night = night_of(bed)
    assert [e.status for e in night.done] == ["discard", "discard"]
    assert night.notes == [
        "changed while the agent of experiment 1 was at work: new ü.txt, prepare_mlx.py; if it was not you, look at it",
        "Python's packages changed before experiment 1 was trained: package numbers_kit; if it was not you, look at it",
    ]
    assert (bed.repo / "new ü.txt").read_text() == "# more\n" * 2


@pytest.mark.parametrize("harm", ["cleaned", pytest.param("moved", marks=pytest.mark.slow), "worktree"])
def test_a_folder_that_goes_during_a_training_is_no_candidates_fault(tmp_path: Path, harm: str) -> None:
    bed = Bed(tmp_path)
    scripted(bed, "better(); put('MODE', lambda old: '\"slow\"')")
    driver = bed.start("--experiments", "1", QUICK, AUTORESEARCH_SLOW="1")
    wait_for(in_training(bed, 1), driver)
    if harm == "cleaned":
        git(bed.repo, "clean", "-ffdxq")
    elif harm == "moved":
        shutil.copytree(bed.repo / "runs", tmp_path / "big", symlinks=True)
        shutil.rmtree(bed.repo / "runs")
        (bed.repo / "runs").symlink_to(tmp_path / "big")
    else:
        shutil.rmtree(bed.folder() / "worktree")
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, output
    night = night_of(bed)
    assert [e.status for e in night.done] == ["keep"], output
    assert night.ended == "experiments"
    assert "is repeated: a folder that the training needs was removed or moved meanwhile" in output


def test_a_candidate_that_removes_its_folders_each_time_is_a_crash(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    scripted(bed, """
        if n == 1:
            harm = 'import shutil; shutil.rmtree("../worktree")'
            file.write_text(file.read_text().replace("    run = Path", "    " + harm + "\\n    run = Path"))
        else:
            better()
    """)  # fmt: skip
    done = bed.run("--experiments", "2", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [e.status for e in night_of(bed).done] == ["crash", "keep"]


def test_interruptions_of_different_kinds_do_not_add_up_to_a_crash(tmp_path: Path) -> None:
    bed, tries = Bed(tmp_path), tmp_path / "tries"
    scripted(bed, f"""
        harm = [
            'tries = Path("{tries}"); print(file=tries.open("a")); count = len(tries.read_text())',
            'import shutil; count <= 2 and shutil.rmtree("../worktree")',
            'count != 3 or sys.exit("Impacting Interactivity")',
        ]
        better()
        run = "    run = Path"
        file.write_text(file.read_text().replace(run, "".join(f"    {{line}}\\n" for line in harm) + run))
    """)
    done = bed.run("--experiments", "1", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is repeated: ") == 3
    assert [e.status for e in night_of(bed).done] == ["keep"]


def test_two_nights_of_one_repository_take_nothing_from_each_other(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    scripted(bed, "import time; time.sleep(0.5); worse()")
    drivers = [bed.start("--experiments", "3", QUICK, tag=tag) for tag in ("one", "two")]
    for driver, tag in zip(drivers, ("one", "two"), strict=True):
        output, _ = driver.communicate(timeout=120)
        assert driver.returncode == 0, output
        assert [e.status for e in night_of(bed, tag).done] == ["discard"] * 3


def test_runs_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    (bed.repo / "runs").symlink_to(tmp_path / "big")
    done = bed.run("--experiments", "1", QUICK)
    assert (done.returncode, "is not there; mount that disk" in done.stderr) == (2, True), done.stderr
    (tmp_path / "big").mkdir()
    done = bed.run("--experiments", "1", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [e.status for e in night_of(bed).done] == ["keep"]
    assert (tmp_path / "big/night/journal.jsonl").is_file()
    (bed.repo / "runs").unlink()
    (bed.repo / "runs").touch()
    assert "is a file" in bed.run(QUICK).stderr


# Runs the driver with a step that fails as no step should: in the middle of a night, and in what is done at its end
BROKEN = """
import sys
from agent.journal import journal
from agent.loop import main
from agent.night.engine import Engine
where, error = sys.argv.pop(1), eval(sys.argv.pop(1))
def fails(self, *args, **kwargs):
    raise error
setattr(Engine, where, fails)
main()
"""
ENDS = [
    ("before_asking", "ZeroDivisionError('a mistake of ours')"), ("recover", "MemoryError()"),
    ("baseline", "OSError(5, 'Input/output error')"),
]  # fmt: skip


@pytest.mark.parametrize(("where", "error"), ENDS)
def test_whatever_ends_a_night_is_journalled_told_and_resumable(tmp_path: Path, where: str, error: str) -> None:
    bed = Bed(tmp_path)
    scripted(bed, "worse()")
    hook(bed, "night_end", f"open({str(bed.tools / 'told')!r}, 'w').write(json.dumps(about))")
    command = bed.command("--experiments", "1", QUICK)
    command[1:3] = ["-c", BROKEN, where, error]
    done = subprocess.run(command, cwd=bed.repo, env=bed.environment(), capture_output=True, text=True, timeout=120)
    kind = error.partition("(")[0]
    assert done.returncode == 1, done.stdout + done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    end = read_events(bed.folder() / "journal.jsonl")[0][-1]
    assert (end["event"], end["reason"]) == ("night_end", "error")
    told = json.loads((bed.tools / "told").read_text())
    assert (told["reason"], told["text"]) == ("error", end["text"])
    if where != "baseline":
        assert kind in end["text"]
        assert kind in (bed.folder() / "logs" / "driver.log").read_text()
    again = bed.run("--resume", "--experiments", "1", QUICK)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [e.status for e in night_of(bed).done] == ["discard"]


# Runs the driver with git out of reach for a moment, right after the baseline's verdict was journalled
MOMENT = """
from agent.loop import main
from agent.night.engine import Engine
follow, failed = Engine.follow, []
def follows(self):
    if self.night.best is not None and not failed:
        failed.append(True)
        raise OSError(11, "Resource temporarily unavailable")
    follow(self)
Engine.follow = follows
main()
"""


def test_damage_right_after_the_baselines_verdict_is_repaired(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    command = bed.command("--experiments", "1", QUICK)
    command[1:3] = ["-c", MOMENT]
    done = subprocess.run(command, cwd=bed.repo, env=bed.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the baseline: [Errno 11] Resource temporarily unavailable; repairing" in done.stdout
    assert [e.status for e in night_of(bed).experiments] == ["keep", "keep"]


def test_a_mistake_of_ours_over_one_candidate_costs_that_experiment(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better worse")
    only_first = "    if args[0].n != 1:\n        return works(self, *args)\n    raise error"
    once = BROKEN.replace("    raise error", only_first).replace("def fails", "works = getattr(Engine, where)\ndef fails")
    command = bed.command("--experiments", "2", QUICK)
    command[1:3] = ["-c", once, "early_verdict", "ValueError('40 is not a valid Signals')"]
    done = subprocess.run(command, cwd=bed.repo, env=bed.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = night_of(bed).done
    assert (first.status, second.status) == ("crash", "discard")
    assert first.reason == "the driver failed over it, ValueError: 40 is not a valid Signals"
    assert "in fails" in (bed.folder() / "logs" / "driver.log").read_text()


def test_a_repository_that_cannot_be_repaired_ends_the_night_with_a_word(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    objects = bed.repo / ".git" / "objects"
    scripted(bed, f"worse(); os.rename({str(objects)!r}, {str(tmp_path / 'away')!r})")
    hook(bed, "night_end", f"open({str(bed.tools / 'told')!r}, 'w').write(about['text'])")
    done = bed.run("--experiments", "2", QUICK)
    assert done.returncode == 1
    assert "the repair failed, too" in done.stderr
    assert night_of(bed).ended == "error"
    assert "the repair failed, too" in (bed.tools / "told").read_text()
    shutil.rmtree(objects, ignore_errors=True)
    os.rename(tmp_path / "away", objects)
    scripted(bed, "worse()")
    again = bed.run("--experiments", "2", QUICK)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [e.status for e in night_of(bed).done] == ["discard", "discard"]


def test_a_call_that_was_cut_off_is_not_made_again_past_the_limit_of_cost(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    scripted(bed, f"""
        worse()
        open({str(bed.tools / "calls")!r}, "a").write(f"{{n}}\\n")
        n == 1 or os.kill(int((night / "lock").read_text()), 9)
        print('{{"cost_usd": 2.0}}')
        sys.exit()
    """)
    limited = ("--experiments", "5", QUICK, "--max-cost", "5")
    assert bed.run(*limited).returncode == -signal.SIGKILL
    done = bed.run(*limited)
    assert done.returncode == 0, done.stdout + done.stderr
    assert bed.calls() == ["1", "2"], "$4 are spent, and a third call could cost $2 again"
    night = night_of(bed)
    assert (night.ended, night.cost) == ("max_cost", 4.0)


def test_what_a_killed_driver_left_is_ended_before_the_agent_is_asked_for_a_word(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    scripted(bed, f"""
        if n == 1 and not (flag := Path({str(bed.tools / "left")!r})).exists():
            sleep = [sys.executable, "-c", "import time; time.sleep(120)"]
            flag.write_text(str(subprocess.Popen(sleep, start_new_session=True).pid))
            os.kill(os.getppid(), signal.SIGSTOP)  # else the supervisor would end its family with the driver
            os.kill(int((night / "lock").read_text()), 9)
            os.kill(os.getppid(), 9)
            sys.exit()
        worse()
    """)
    assert bed.run("--experiments", "1", QUICK).returncode == -signal.SIGKILL
    left = psutil.Process(int((bed.tools / "left").read_text()))
    assert left.is_running()
    done = bed.run("--experiments", "1", QUICK, "--check-agent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
    assert f"ended process {left.pid}, left by a driver that was killed" in done.stdout


@pytest.mark.slow
def test_a_candidate_that_kills_the_driver_again_and_again_is_a_crash(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    scripted(bed, """
        if n == 1:
            kill = 'os.kill(int(Path("../lock").read_text()), 9); time.sleep(60)'
            file.write_text(file.read_text().replace("    run = Path", "    " + kill + "\\n    run = Path"))
        else:
            better()
    """)  # fmt: skip
    for _ in range(3):
        assert bed.run("--experiments", "2", QUICK).returncode == -signal.SIGKILL
    done = bed.run("--experiments", "2", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = night_of(bed).done
    assert (first.status, second.status) == ("crash", "keep")
    assert "the driver was killed in each of 3 attempts" in first.reason


def test_what_a_tag_has_left_is_refused_or_cleared_and_never_taken_up(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    assert bed.run("--experiments", "1", QUICK).returncode == 0
    old = night_of(bed).experiments[1].commit
    (bed.folder() / "journal.jsonl").unlink()
    git(bed.repo, "branch", "-D", "autoresearch/night")
    done = bed.run("--experiments", "1", QUICK)
    assert (done.returncode, "refs/autoresearch/night" in done.stderr) == (2, True), done.stderr
    mend = done.stderr.partition("all that is left of it: ")[2]
    subprocess.run(mend, shell=True, cwd=bed.repo, check=True)
    (bed.folder() / "tmp/0001").mkdir(parents=True, exist_ok=True)
    (bed.folder() / "tmp/0001/kernels").touch()
    bed.plan("worse")
    done = bed.run("--experiments", "1", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    night = night_of(bed)
    assert [e.status for e in night.done] == ["discard"]
    assert night.experiments[1].commit != old
    assert bed.calls() == ["1 better", "1 worse"], "the agent was asked"


def test_a_ref_that_somebody_planted_is_no_candidate(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    scripted(bed, """
        worse()
        if n == 1:
            run("git", "commit", "-qam", "planted")
            run("git", "-C", str(night.parent.parent), "fetch", "-q", os.getcwd(), "HEAD:refs/autoresearch/night/0002")
    """)  # fmt: skip
    assert bed.run("--experiments", "2", QUICK).returncode == 0
    night = night_of(bed)
    assert [e.description for e in night.done] == ["it 1", "it 2"]
    assert git(bed.repo, "rev-parse", "refs/autoresearch/night/0002") == night.experiments[2].commit


def test_a_file_in_large_file_storage_is_named_at_the_start(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    (bed.repo / ".gitattributes").write_text("*.py filter=lfs\n")
    (bed.repo / "train_mlx.py").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    git(bed.repo, "add", "-A")
    git(bed.repo, "commit", "-qm", "large")
    git(bed.repo, "config", "filter.lfs.clean", "no-such-program")
    git(bed.repo, "config", "filter.lfs.required", "true")
    done = bed.run(QUICK)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert "train_mlx.py is stored through Git LFS" in done.stderr
    assert "take train_mlx.py out of .gitattributes" in done.stderr


def test_a_new_nights_name_passes_over_what_is_taken(tmp_path: Path) -> None:
    today = time.strftime("%b%d").lower()
    assert choose_tag(tmp_path, None, False) == today
    assert choose_tag(tmp_path, None, False, lambda tag: "a branch" if tag == today else "") == f"{today}-2"
    assert runs_folder(tmp_path) == tmp_path / "runs"
    for name in ("trials/0001-1", "tmp/0001", "logs"):
        (tmp_path / "n" / name).mkdir(parents=True)
    clear_leftovers(tmp_path / "n")
    assert [path.name for path in (tmp_path / "n").iterdir()] == ["logs"]


