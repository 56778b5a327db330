"""Whole nights in small: real git, real children, real signals; only the model is a toy."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from night_kit import Bed, checkout_digest, git

from agent.journal.journal import decode, encode, read_events
from agent.journal.settings import Settings
from agent.journal.state import Night, fold
from agent.night.limits import next_time
from agent.night.setup import chosen, in_plain_words

QUICK = "--no-sandbox"


def night_of(bed: Bed) -> Night:
    return fold(read_events(bed.folder() / "journal.jsonl")[0])


def wait_for(what: Callable[[], bool], driver: subprocess.Popen[str], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def has(bed: Bed, event: str, n: int) -> Callable[[], bool]:
    """Whether the journal holds such an event of such an experiment."""

    def look() -> bool:
        path = bed.folder() / "journal.jsonl"
        return path.exists() and f'"event":"{event}","n":{n},'.encode() in path.read_bytes()

    return look


def living(bed: Bed) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(bed.repo)):
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def test_a_night_with_every_outcome(tmp_path: Path) -> None:
    words = "better worse crash nan oom comment seed violation extra fail noop syntax import unscorable silent simpler better"
    bed = Bed(tmp_path, words)
    before = checkout_digest(bed.repo)
    done = bed.run("--experiments", str(len(words.split())), "--breaker", "9", "--picture")
    assert done.returncode == 0, done.stdout + done.stderr
    night = night_of(bed)
    assert [e.status for e in night.done] == [
        "keep", "discard", "crash", "nan", "oom", "noop", "noop", "violation", "keep", "agent_error", "noop", "crash", "crash",
        "violation", "crash", "keep", "keep",
    ]  # fmt: skip
    assert night.experiments[16].reason.startswith("simpler")
    rows = (bed.folder() / "results.tsv").read_text().splitlines()
    assert rows[0] == "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
    assert len(rows) == 1 + 1 + len(words.split())
    assert (bed.folder() / "progress.png").read_bytes().startswith(b"\x89PNG")
    won = r"\d best \d\.\d{4} from baseline 1\.\d{4}: -\d+\.\d % in 17 experiments, 4 kept; branch autoresearch/night"
    assert re.search(won, done.stdout.splitlines()[-1])
    assert "step 2, loss" in done.stdout or "loss nan" in done.stdout
    assert checkout_digest(bed.repo) == before
    assert git(bed.repo, "status", "--porcelain") == ""
    assert living(bed) == []
    assert "only the train file may change" in night.experiments[8].reason
    assert any("removed what the agent left beside its edit: notes.txt" in note for note in night.notes)
    assert "shapes do not fit" in (bed.tools / "prompt-4").read_text(), "the next prompt tells what failed"
    assert {trial.seed for trial in night.experiments[0].trials} >= {1, 2, 3}
    assert [trial.seed for trial in night.experiments[1].trials][:2] == [1, 2], "trials are paired by seed"
    assert "sandbox" in done.stdout


def test_the_checkout_is_the_users_while_they_work_in_it(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better slow worse", name="mein Repo ü")
    repo = bed.repo
    (repo / "staged.txt").write_text("staged")
    git(repo, "add", "staged.txt")
    (repo / "program.md").write_text("# Program\nunstaged words\n")
    (repo / "train_mlx.py").write_text((repo / "train_mlx.py").read_text() + "raise SystemExit('never trained')\n")
    (repo / "untracked.txt").write_text("mine")
    (repo / "ignored.txt").write_text("ignored")
    (repo / "stashed.txt").write_text("stashed")
    git(repo, "add", "stashed.txt")
    git(repo, "stash", "push", "-q", "--", "stashed.txt")
    before = checkout_digest(repo)
    driver = bed.start("--experiments", "3", QUICK, AUTORESEARCH_SLOW="3")
    wait_for(has(bed, "verdict", 1), driver)
    assert checkout_digest(repo) == before
    assert "unstaged words" in (bed.tools / "prompt-1").read_text(), "program.md is the user's, as it lies there"
    git(repo, "commit", "-qm", "while the night runs")
    (repo / "program.md").write_text("# Program\nnew direction\n")
    git(repo, "stash", "push", "-q", "--", "train_mlx.py")
    git(repo, "switch", "-q", "-c", "feature")
    (repo / "staged.txt").write_text("edited again")
    git(repo, "config", "user.signingKey", "mine")
    during = checkout_digest(repo)
    assert driver.wait(120) == 0, driver.communicate()[0]
    assert checkout_digest(repo) == during
    assert "new direction" in (bed.tools / "prompt-3").read_text()
    assert [e.status for e in night_of(bed).done] == ["keep", "discard", "discard"]
    output = driver.communicate()[0]
    assert "train_mlx.py has changes that are not committed; the night uses the committed version" in output


def test_ctrl_c_once_finishes_the_experiment(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "slow better")
    driver = bed.start("--experiments", "9", QUICK, AUTORESEARCH_SLOW="1")
    wait_for(has(bed, "trial_start", 1), driver)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: the driver and all in its process group
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0, output
    assert "stopping after this experiment" in output
    night = night_of(bed)
    assert (night.ended, len(night.done), night.open) == ("stopped", 1, None)
    assert output.splitlines()[-1].split(" ", 1)[1].startswith("best ")
    again = bed.loop("--resume", "--experiments", "2", "--no-picture")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [e.status for e in night_of(bed).done] == ["discard", "keep"]


def test_a_night_outlives_whoever_reads_its_output(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better worse")
    driver = bed.start("--experiments", "2", QUICK)
    assert driver.stdout is not None
    driver.stdout.readline()
    driver.stdout.close()
    assert driver.wait(60) == 0
    assert "experiments done, as asked" in (bed.folder() / "logs" / "terminal.log").read_text()
    assert (len(night_of(bed).done), night_of(bed).ended) == (2, "experiments")


def test_ctrl_c_twice_stops_now_and_resumes(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "hang better")
    driver = bed.start("--experiments", "2", "--budget", "1s", QUICK)
    wait_for(has(bed, "trial_start", 1), driver)
    begin = time.monotonic()
    driver.send_signal(signal.SIGINT)
    time.sleep(0.3)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=60)
    assert time.monotonic() - begin < 15
    assert driver.returncode == 130, output
    assert "go on with: python -m agent.loop --resume --tag night" in output
    assert living(bed) == []
    night = night_of(bed)
    assert night.open is not None
    assert night.open.n == 1
    commit = night.open.commit
    again = bed.run("--resume", "--startup", "1", QUICK)
    assert again.returncode == 0, again.stdout + again.stderr
    night = night_of(bed)
    assert [e.status for e in night.done] == ["timeout", "keep"]
    assert night.experiments[1].commit == commit
    assert bed.calls() == ["1 hang", "2 better"], "the agent was not asked again for what it had delivered"


def test_status_stop_and_the_lock_from_another_terminal(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "hangs better")
    driver = bed.start("--experiments", "5", QUICK)
    wait_for(has(bed, "experiment", 1), driver)
    status = bed.loop("--status")
    assert status.returncode == 0, status.stderr
    assert f"process {driver.pid} works on it" in status.stdout
    assert "experiment 1" in status.stdout
    second = bed.run(QUICK)
    assert second.returncode == 8
    assert f"process {driver.pid} already works on the night night" in second.stderr
    assert "after this experiment" in bed.loop("--stop").stdout
    assert "now" in bed.loop("--stop", "--tag", "night").stdout
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, output
    assert living(bed) == []
    none = bed.loop("--stop")
    assert (none.returncode, "no driver works" in none.stderr) == (2, True)
    assert "ended: stopped" in bed.loop("--status").stdout


def test_a_rate_limit_is_waited_out_and_uses_no_experiment(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "limit")
    done = bed.run("--experiments", "1", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"rate limit: .*waiting [12] s", done.stdout)
    assert bed.calls() == ["1 limit", "1 limit"]
    told = [event["event"] for event in read_events(bed.folder() / "journal.jsonl")[0] if event.get("n") == 1]
    assert told[:5] == ["experiment", "asked", "agent_failed", "asked", "candidate"], "each call is journalled before it is made"
    night = night_of(bed)
    assert ([e.status for e in night.done], night.unpriced) == (["keep"], 1), "the refused one is known to cost nothing"


def test_an_expired_login_ends_the_night_at_once_with_the_mend(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "login better")
    done = bed.run("--experiments", "3", QUICK)
    night = night_of(bed)
    assert (done.returncode, night.ended) == (1, "login"), done.stdout
    assert "log in to" in done.stdout
    assert (len(night.done), bed.calls()) == (0, ["1 login"])
    bed.plan("better")
    assert bed.run("--experiments", "1", QUICK).returncode == 0
    assert [e.status for e in night_of(bed).done] == ["keep"]


def test_failures_of_one_kind_pause_and_then_end_the_night(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "fail")
    done = bed.run("--experiments", "50", "--breaker", "2", QUICK)
    assert done.returncode == 1
    assert "2 experiments in a row ended as agent_error; pausing" in done.stdout
    assert "4 experiments in a row ended as agent_error; see the logs" in done.stdout
    night = night_of(bed)
    assert (night.ended, len(night.done)) == ("failures", 4)


def test_an_agent_that_hangs_costs_one_experiment(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "hangs better")
    done = bed.run("--experiments", "2", "--max-agent-minutes", "0.1", QUICK)
    assert done.returncode == 0, done.stdout
    assert [e.status for e in night_of(bed).done] == ["agent_error", "keep"]
    assert "limit wall" in night_of(bed).done[0].reason


def test_no_secret_is_written_anywhere(tmp_path: Path) -> None:
    secret = "sk-planted-0123456789abcdef"
    bed = Bed(tmp_path, "leak plant fail")
    (bed.repo / "program.md").write_text(f"# Program\nmy key is {secret}\n")
    done = bed.run("--experiments", "3", "--agent-env", "PLANTED_API_KEY", QUICK, PLANTED_API_KEY=secret)
    assert done.returncode == 0, done.stdout + done.stderr
    night = night_of(bed)
    assert [e.status for e in night.done] == ["keep", "violation", "agent_error"]
    assert "[redacted PLANTED_API_KEY]" in night.done[0].description
    assert "looks like a key" in night.done[1].reason
    found = [path for path in bed.folder().rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert found == []
    assert secret not in done.stdout + done.stderr
    assert secret not in (bed.tools / "prompt-1").read_text()
    assert secret not in git(bed.repo, "log", "--all", "--format=%B", "-p", "--glob=refs/autoresearch")


def test_limits_on_the_command_line(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    done = bed.run("--target", "1.42", "--hours", "1", QUICK)
    assert night_of(bed).ended == "target", done.stdout
    assert len(night_of(bed).done) == 2
    done = bed.run("--target", "0.1", "--disk-gb", "100000000", QUICK)
    assert night_of(bed).ended == "disk"
    assert "free some and resume" in done.stdout
    done = bed.run("--disk-gb", "0", "--hours", "0", QUICK)
    assert night_of(bed).ended == "hours"


def test_a_night_goes_on_with_another_agent_and_another_end(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    assert bed.run("--experiments", "0", "--model", "large", QUICK).returncode == 0
    end = next_time("07:00")
    for options in (["--agent", "search", "--until", "07:00"], ["--agent-cmd", bed.agent]):
        done = bed.loop("--resume", "--no-picture", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        settings, cmd = night_of(bed).settings, bed.agent if "--agent-cmd" in options else None
        assert (settings["agent"], settings["agent_cmd"], settings["model"]) == (None if cmd else "search", cmd, None)
        assert settings["until"] == end


@pytest.mark.parametrize(("given", "kept"), [
    ({"agent": "acp"}, True), ({"agent_cmd": "gemini --acp"}, True), ({"model": "small"}, True), ({"hours": 1.0}, True),
    ({"agent": "codex"}, False), ({"agent_cmd": "./mine"}, False), ({"agent": "acp", "agent_cmd": "./mine"}, False),
])  # fmt: skip
def test_what_was_said_of_an_agent_holds_for_no_other(given: dict[str, Any], kept: bool) -> None:
    said = {"agent": "acp", "agent_cmd": "gemini --acp", "agent_args": "--fast", "model": "large", "base_url": "http://here",
            "agent_env": ("KEY",), "price_in": 1.0, "price_out": 2.0}  # fmt: skip
    none = {name: getattr(Settings(), name) for name in said}
    settings = Settings(**said, experiments=5).updated(given)
    assert settings == Settings(**{**(said if kept else none), "experiments": 5, **given})


def test_an_agent_that_was_found_may_be_named_at_a_resume() -> None:
    night = Night(agent="claude", settings=Settings(model="large").to_json())
    assert chosen(night, {"agent": "claude"}).model == "large"
    assert chosen(night, {"agent": "codex"}).model is None


def test_a_known_file_is_recalled_not_trained_again(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "crash")
    agent = (bed.tools / "agent.py").read_text().replace("gain - n / 1000", "gain - 0.5")
    (bed.tools / "agent.py").write_text(agent)
    bed.run("--experiments", "2", QUICK)
    first, second = night_of(bed).done
    assert (first.status, second.status) == ("crash", "crash")
    assert second.reason == "trained before as experiment 1"
    assert second.trials == []


def test_a_baseline_that_does_not_train_ends_with_its_traceback(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    source = (bed.repo / "train_mlx.py").read_text().replace('MODE = "ok"', 'MODE = "crash"')
    (bed.repo / "train_mlx.py").write_text(source)
    git(bed.repo, "commit", "-qam", "broken")
    done = bed.run(QUICK)
    assert done.returncode == 11
    assert "shapes do not fit" in done.stderr
    assert "another --tag" in done.stderr
    assert bed.calls() == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--agent", "nobody"], 2, "unknown agent 'nobody'"),
        (["--agent", "search", "--agent-cmd", "x"], 2, "not both"),
        (["--agent-cmd", "no-such-program --flag"], 2, "no program 'no-such-program'"),
        (["--agent", "search", "--budget", "5 minutes"], 2, "expected something like 300s"),
        (["--agent", "search", "--budget", "1.2.3s"], 2, "expected something like 300s"),
        (["--agent", "search", "--budget", ".s"], 2, "expected something like 300s"),
        (["--agent", "search", "--budget", "0.0Mtokens"], 2, "expected something like 300s"),
        (["--agent", "search", "--budget", "9" * 400 + "s"], 2, "expected something like 300s"),
        (["--agent", "search", "--budget", ""], 2, "expected something like 300s"),
        (["--agent", "search", "--tag", "a b"], 2, "not usable in a branch name"),
        (["--agent", "search", "--tag", "../x"], 2, "expected letters"),
        (["--agent", "search", "--train-file", "other.py"], 2, "other.py is not in commit"),
        (["--resume"], 2, "there is no night"),
        (["--resume", "--tag", "gone"], 2, "there is no night runs/gone"),
        (["--status"], 2, "there is no night"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path: Path, options: list[str], code: int, words: str) -> None:
    bed = Bed(tmp_path)
    before = checkout_digest(bed.repo)
    done = bed.loop(*options)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert checkout_digest(bed.repo) == before
    assert not list((bed.repo / "runs").glob("*/journal.jsonl"))


def test_data_that_cannot_be_prepared_is_said(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    harness = (bed.repo / "prepare_mlx.py").read_text()
    harness = harness.replace("def prepare(out):", "def prepare(out):\n    sys.exit('no such dataset')")
    (bed.repo / "prepare_mlx.py").write_text(harness)
    git(bed.repo, "commit", "-qam", "no data")
    done = bed.run(QUICK)
    assert done.returncode == 10
    assert "no such dataset" in done.stderr


def test_the_live_line_on_a_terminal(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    ours, theirs = pty.openpty()
    env = bed.environment(TERM="xterm-256color")
    driver = subprocess.Popen(
        bed.command("--experiments", "1", QUICK), cwd=bed.repo, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so when the last writer has closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert driver.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert "experiment 1, trial 1" in text
    assert "1 kept; branch autoresearch/night" in text


def test_the_journal_names_sources_and_seeds(tmp_path: Path) -> None:
    import hashlib

    bed = Bed(tmp_path, "worse")
    (bed.repo / "harness" / "deep").mkdir(parents=True)
    for name in ("__init__.py", "deep/part.py"):
        (bed.repo / "harness" / name).write_text("# a part of the harness\n")
    git(bed.repo, "add", "harness")
    git(bed.repo, "commit", "-m", "the folder")
    bed.run("--experiments", "1", "--seed", "40", QUICK)
    lines = [json.loads(line) for line in (bed.folder() / "journal.jsonl").read_text().splitlines()]
    start = lines[0]
    assert start["event"] == "night_start"
    held = ["prepare_mlx.py", "train_mlx.py", "harness/__init__.py", "harness/deep/part.py"]
    assert start["sources"] == {name: hashlib.sha256((bed.repo / name).read_bytes()).hexdigest() for name in held}
    assert start["base"] == git(bed.repo, "rev-parse", "HEAD")
    assert [e["seed"] for e in lines if e["event"] == "trial_end"] == [40, 41, 42, 40]


def test_a_night_of_an_earlier_version_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """Its harness was a list of files beside prepare_mlx.py, which the journal names; nothing of the night is touched."""
    bed = Bed(tmp_path, "worse worse")
    assert bed.run("--experiments", "1", QUICK).returncode == 0
    journal = bed.folder() / "journal.jsonl"
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    start = decode(first, 0)
    start["sources"] |= {"corpus.py": "0" * 64, "probes.py": "0" * 64}
    journal.write_bytes(b"".join([encode(start), *rest]))
    before = journal.read_bytes()
    done = bed.run("--resume", "--experiments", "2", QUICK)
    assert done.returncode == 2
    assert "begun by another version of this project" in done.stderr
    assert f"git checkout {start['base'][:9]}" in done.stderr
    assert "another --tag" in done.stderr
    assert journal.read_bytes() == before


def test_a_resumed_night_trains_with_the_tier_the_device_and_the_dtype_that_it_began_with(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "worse")
    trainer = bed.repo / "train_mlx.py"
    say = 'def main():\n    print(*[os.environ.get(f"AUTORESEARCH_{name}") for name in ("TIER", "DEVICE", "DTYPES")])\n'
    trainer.write_text(trainer.read_text().replace("def main():\n", say))
    git(bed.repo, "commit", "-am", "say the tier")
    (bed.home / "data").mkdir(exist_ok=True)
    (measured := bed.home / "data" / "dtypes.json").write_text('{"a device": "float32"}')
    assert bed.run("--experiments", "1", QUICK, AUTORESEARCH_TIER="mac", AUTORESEARCH_DEVICE="cpu").returncode == 0
    measured.write_text('{"a device": "float16"}')
    assert bed.run("--experiments", "2", "--resume", QUICK, AUTORESEARCH_TIER="cuda").returncode == 0
    logs = sorted((bed.folder() / "logs").glob("*.train.log"))
    assert len(logs) >= 5
    assert {log.read_text().splitlines()[0] for log in logs} == {'mac cpu {"a device": "float32"}'}


def test_the_first_lines_say_in_plain_words_what_was_chosen_and_what_it_takes(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "worse")
    done = bed.run("--experiments", "1", "--max-cost", "2", "--budget", "300s", "--hours", "0", QUICK)
    said = done.stdout
    assert re.search(r"data: toy, preset tiny, this machine's default; others: --dataset, --preset", said), said
    first = r"3 for the baseline first \(17 min\)"
    assert re.search(rf"time: about 5.8 min a training, {first}; then 1 experiment or until \w+ \d", said), said
    assert re.search(r"cost: at most \$2.00; disk: \d+ GB free", said), said
    assert all(len(line) < 140 for line in said.splitlines()[:8])


def test_the_users_own_text_is_named_though_its_path_is_not() -> None:
    """Agents may read the journal, so the path is not in it."""
    data = {"id": "notes-320-0123456789", "name": "text:", "preset": "tiny", "budget": "20steps"}
    night = Night(tag="one", base="0" * 40, train_file="train_mlx.py", dataset=data)
    lines = in_plain_words(night, Settings(experiments=5), "agent: search", 9.0)
    assert lines[1].startswith("data: notes-320-0123456789, preset tiny; others: --dataset")
    assert lines[3].startswith("time: 20steps a training, ")
    assert lines[3].endswith(" for the baseline first; then 5 experiments")
