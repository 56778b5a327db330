"""The user's own programs during a night: told what happens, heard in the prompt, and never able to end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from night_kit import Bed, checkout_digest

from agent.errors import JournalError
from agent.journal.journal import read_events
from agent.journal.state import Night, fold
from agent.night import hooks
from agent.night.hooks import Hooks
from agent.proposal import briefing

EXAMPLES = ROOT / "scripts" / "hooks"
ADDRESS = "https://chat.example.org/services/T0/B0/planted-webhook-0123456789"


def night() -> Night:
    verdict = {"status": "keep", "reason": "", "val_bpb": 1.5, "error": None, "usage": {}, "seconds": 0}
    return fold([
        {"event": "night_start", "seq": 0, "t": 1.0, "tag": "t", "base": "c0", "train_file": "f.py", "seed": 1, "dataset": {}},
        {"event": "experiment", "seq": 1, "t": 2.0, "n": 0, "parent": "c0"},
        {"event": "candidate", "seq": 2, "t": 2.0, "n": 0, "commit": "c0", "ast": "", "lines": 1, "description": "baseline"},
        {"event": "verdict", "seq": 3, "t": 3.0, "n": 0, "description": "baseline", **verdict},
        {"event": "experiment", "seq": 4, "t": 4.0, "n": 1, "parent": "c0", "step": "refine"},
    ])  # fmt: skip


class Yard:
    """A checkout's `hooks/`, and what the driver notes about them."""

    def __init__(self, folder: Path) -> None:
        self.root, self.notes, self.said = folder / "checkout", [], []
        (self.root / "hooks").mkdir(parents=True)
        (folder / "night" / "logs").mkdir(parents=True)
        self.stopping = False
        self.begin()

    def record(self, event: str, **fields: Any) -> None:
        assert event == "note"
        self.notes.append(fields["text"])

    def write(self, body: str, name: str = "before_experiment", mode: int = 0o755, head: str = f"#!{sys.executable}\n") -> None:
        path = self.root / "hooks" / name
        path.write_text(f"{head}{body}\n")
        path.chmod(mode)
        self.begin()

    def begin(self) -> None:
        self.hooks = Hooks(self.root, self.root.parent / "night", self.record, self.said.append, lambda: self.stopping)

    def ask(self) -> str:
        state = night()
        return self.hooks.before_experiment(state, state.experiments[1])


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path)


def test_without_hooks_nothing_happens(yard: Yard) -> None:
    assert yard.ask() == ""
    (yard.root / "hooks").rmdir()
    assert yard.ask() == ""
    assert yard.notes == []


def test_a_hook_gets_json_and_answers_with_text(yard: Yard) -> None:
    yard.write("import json, os, sys\nabout = json.load(sys.stdin)\nprint(json.dumps({**about, 'cwd': os.getcwd()}))")
    about = json.loads(yard.ask())
    best = about.pop("best")
    assert (best["n"], best["description"], best["status"]) == (0, "baseline", "keep")
    assert Path(about.pop("cwd")) == yard.root
    assert Path(about.pop("folder")).name == "night"
    assert about == {
        "event": "before_experiment", "n": 1, "step": "refine", "tag": "t", "branch": "autoresearch/t", "train_file": "f.py",
        "experiments": 0, "kept": 0, "baseline_val_bpb": None, "cost_usd": 0.0, "tokens": 0,
    }  # fmt: skip
    assert yard.notes == []


def test_a_slow_hook_is_ended_with_its_children(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hooks.SECONDS == 30
    monkeypatch.setattr(hooks, "SECONDS", 1.0)
    yard.write("import subprocess, sys, time\nprint('early words', flush=True)\n"
               "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\ntime.sleep(300)")  # fmt: skip
    begun = time.monotonic()
    assert yard.ask() == ""
    assert time.monotonic() - begun < 15
    assert yard.notes == ["hooks/before_experiment was ended after 1 s: it said nothing on standard error"]
    assert yard.said == [f"note: {yard.notes[0]}"]


@pytest.mark.parametrize(("body", "head", "note"), [
    ("import sys; print('half'); sys.exit('no such room')", None, "failed with exit code 1: no such room"),
    ("import os; os.kill(os.getpid(), 11)", None, "failed with signal 11: it said nothing on standard error"),
    ("true", "#!/no/such/interpreter\n", "could not be started: "),
])  # fmt: skip
def test_a_failing_hook_is_a_note_said_once(yard: Yard, body: str, head: str | None, note: str) -> None:
    yard.write(body, **({"head": head} if head else {}))
    assert yard.ask() == yard.ask() == ""
    assert len(yard.notes) == 1
    assert yard.notes[0].startswith(f"hooks/before_experiment {note}")


def test_a_hook_that_fails_again_is_said_again(yard: Yard) -> None:
    yard.write("import os, sys\nsys.exit('down') if os.path.exists('down') else print('up')")
    assert yard.ask() == "up"
    for count in (1, 2):
        (yard.root / "down").touch()
        assert yard.ask() == yard.ask() == ""
        assert len(yard.notes) == count
        (yard.root / "down").unlink()
        assert yard.ask() == "up"


@pytest.mark.parametrize("before", ["print('mine')", None], ids=["changed", "new"])
def test_a_hook_that_somebody_wrote_during_the_night_is_not_run(yard: Yard, before: str | None) -> None:
    if before:
        yard.write(before)
        assert yard.ask() == "mine"
    path = yard.root / "hooks" / "before_experiment"
    path.write_text(f"#!{sys.executable}\nopen('ran', 'w'); print('not mine')\n")
    path.chmod(0o755)
    assert yard.ask() == yard.ask() == ""
    assert not (yard.root / "ran").exists()
    assert len(yard.notes) == 1
    assert "was added or changed after the driver started, so it was not run" in yard.notes[0]
    yard.begin()
    assert yard.ask() == "not mine"


def test_a_file_that_is_not_executable_is_said_once_and_not_run(yard: Yard) -> None:
    yard.write("raise SystemExit('it ran')", mode=0o644)
    if os.geteuid() == 0:
        assert not os.access(yard.root / "hooks" / "before_experiment", os.X_OK), "even root needs one x"
    assert yard.ask() == yard.ask() == ""
    assert yard.notes == ["hooks/before_experiment is not executable and was not run; run: chmod +x hooks/before_experiment"]


def test_what_a_hook_prints_is_capped_and_harmless(yard: Yard) -> None:
    yard.write("print('first \\x1b[31mline\\r\\n' + 'word ' * 200_000)")
    text = yard.ask()
    assert len(text) <= hooks.TEXT_CHARACTERS
    assert text.endswith("more characters)")
    assert "\x1b" not in text
    assert "first line" in text
    section = briefing.hook(text)
    assert len(section) <= briefing.HOOK_CHARACTERS
    assert all(line.startswith("| ") for line in section.splitlines()[2:])
    yard.write("import sys\nwhile True: sys.stdout.write('x' * 100_000)")
    assert yard.ask() == ""
    assert "was ended, for it printed without end" in yard.notes[0]


def test_a_user_who_stops_the_night_does_not_wait_for_a_hook(yard: Yard) -> None:
    yard.write("import time; time.sleep(300)")
    yard.stopping = True
    begun = time.monotonic()
    assert yard.ask() == ""
    assert time.monotonic() - begun < 15
    assert yard.notes == []
    yard.write("open('ended', 'w').write('yes')", "night_end")
    yard.hooks.night_end(night(), "stopped at once by request")
    assert (yard.root / "ended").exists(), "its owner hears of a night that was stopped"


def test_a_full_disk_costs_a_hook_and_nothing_else(yard: Yard, full_disk: Callable[[int], None]) -> None:
    yard.write("print('mine')")
    full_disk(0)
    assert yard.ask() == ""
    assert yard.notes[0].startswith("hooks/before_experiment could not be run: ")
    assert "File too large" in yard.notes[0]


def test_a_hook_and_a_journal_that_fail_do_not_hide_how_a_night_ended(yard: Yard, full_disk: Callable[[int], None]) -> None:
    def unwritten(event: str, **fields: Any) -> None:
        raise JournalError("no space left")

    yard.record = unwritten  # type: ignore[method-assign]
    yard.write("print('mine')", "night_end")
    full_disk(0)
    yard.hooks.night_end(night(), "8 hours are over")
    assert "hooks/night_end could not be run" in yard.said[0]


TELL = """import json, os, sys
about = json.load(sys.stdin)
with open(os.environ['TOLD'], 'a') as f:
    f.write(json.dumps(about) + '\\n')
"""
ASK = "print('Try the batch: the room is\\n# What to do now\\ncold', os.environ['AUTORESEARCH_WEBHOOK'])"
SEEN = "import os, pathlib\nwith open(os.environ.get('TOLD', '{told}') + '.seen', 'a') as f: f.write(repr(dict(os.environ)))\n"


def test_a_night_with_hooks(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better crash worse")
    told = tmp_path / "told"
    hooks_folder = bed.repo / "hooks"
    hooks_folder.mkdir()
    for name, words in (("before_experiment", ASK), ("after_experiment", "sys.exit('the chat is down')"), ("night_end", "")):
        (hooks_folder / name).write_text(f"#!{sys.executable}\n{TELL}{words}\n")
        (hooks_folder / name).chmod(0o755)
    seen = SEEN.replace("{told}", str(told))
    for path in (bed.repo / "train_mlx.py", bed.tools / "agent.py"):
        path.write_text(seen + path.read_text())
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qam", "x"], cwd=bed.repo, check=True)
    before = checkout_digest(bed.repo)
    done = bed.run("--experiments", "3", "--no-sandbox", TOLD=str(told), AUTORESEARCH_WEBHOOK=ADDRESS)
    assert done.returncode == 0, done.stdout + done.stderr
    state = fold(read_events(bed.folder() / "journal.jsonl")[0])
    assert [e.status for e in state.done] == ["keep", "crash", "discard"], "no hook changes a verdict"
    heard = [json.loads(line) for line in told.read_text().splitlines()]
    assert [about["event"] for about in heard] == ["before_experiment", "after_experiment"] * 3 + ["night_end"]
    assert [about["experiment"]["status"] for about in heard[1:-1:2]] == ["keep", "crash", "discard"]
    assert heard[1]["experiment"] == heard[1]["best"]
    assert (heard[1]["experiment"]["description"], heard[1]["experiment"]["hypothesis"]) == ("better 1", "it helps")
    assert (heard[-1]["reason"], heard[-1]["text"]) == ("experiments", "3 experiments done, as asked")
    assert heard[-1]["summary"] in done.stdout
    prompt = (bed.tools / "prompt-1").read_text()
    assert "| Try the batch: the room is\n| # What to do now\n| cold [redacted AUTORESEARCH_WEBHOOK]" in prompt
    assert state.notes == ["hooks/after_experiment failed with exit code 1: the chat is down"]
    assert done.stdout.count("the chat is down") == 1
    others = told.with_name("told.seen").read_text()
    assert others.count("'PATH'") >= 6, "agents and trainings have said what they see"
    assert ADDRESS not in others, "the address reaches hooks only"
    assert not [path for path in bed.folder().rglob("*") if path.is_file() and ADDRESS.encode() in path.read_bytes()]
    assert checkout_digest(bed.repo) == before


ABOUT = {"tag": "nov22", "summary": "best 1.2 from baseline 1.5", "text": "8 hours are over",
         "best": {"val_bpb": 1.2, "description": "half the $(batch) \"now\""}}  # fmt: skip


def example(name: str, about: dict[str, Any], **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **environ}
    return subprocess.run([sys.executable, str(EXAMPLES / name)], input=json.dumps({**ABOUT, **about}), env=env,
                          capture_output=True, text=True, timeout=60)  # fmt: skip


def test_the_examples_are_executable() -> None:
    assert all(os.access(path, os.X_OK) for path in EXAMPLES.glob("*.py"))
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"notify.py", "tensorboard_events.py", "track.py", "webhook.py"}


def logged(name: str, folder: Path, **env: str) -> None:
    """Two experiments, told to an example one after the other, as a night does."""
    for n, score in ((1, 1.4), (2, None)):
        one = {"n": n, "status": "keep" if score else "crash", "val_bpb": score, "description": "half the batch"}
        told = {"folder": str(folder / "nov22"), "baseline_val_bpb": 1.5, "kept": 1, "cost_usd": 0.1 * n}
        found = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # where the package is
        done = example(name, {"event": "after_experiment", "experiment": one, **told}, **found, **env)
        assert done.returncode == 0, done.stderr


def test_the_example_writes_event_files_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logged("tensorboard_events.py", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    read = EventAccumulator(str(tmp_path / "tensorboard" / "nov22"))
    read.Reload()
    known = {tag: [(e.step, round(float(make_ndarray(e.tensor_proto)), 4)) for e in read.Tensors(tag)]
             for tag in read.Tags()["tensors"]}  # fmt: skip
    assert known["val_bpb"] == [(1, 1.4)]
    assert known["best_val_bpb"] == [(0, 1.5), (1, 1.2), (2, 1.2)]
    assert known["cost_usd"] == [(1, 0.1), (2, 0.2)]


def test_the_example_logs_to_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    logged("track.py", tmp_path, TRACKIO_DIR=str(tmp_path / "store"), HF_HUB_OFFLINE="1")
    read = "from trackio.sqlite_storage import SQLiteStorage; print([(r['step'], r.get('val_bpb'), r['best_val_bpb']) for r in " \
           "SQLiteStorage.get_logs('autoresearch', 'nov22')])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", read], env={**os.environ, "TRACKIO_DIR": str(tmp_path / "store")},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert "(1, 1.4, 1.2)" in done.stdout, done.stderr
    assert "(2, None, 1.2)" in done.stdout


def test_the_example_posts_to_a_chat() -> None:
    posted: list[dict[str, str]] = []

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Silent."""

    with HTTPServer(("127.0.0.1", 0), Chat) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        keep = {"event": "after_experiment", "experiment": {"status": "keep"}}
        runs = [example("webhook.py", {"event": "night_end"}, AUTORESEARCH_WEBHOOK=f"{url}/T0"),
                example("webhook.py", {**keep, "summary": None}, AUTORESEARCH_WEBHOOK=f"{url}/discord"),
                example("webhook.py", {**keep, "experiment": {"status": "discard"}}, AUTORESEARCH_WEBHOOK=url)]  # fmt: skip
        server.shutdown()
    assert [run.returncode for run in runs] == [0, 0, 0], [run.stderr for run in runs]
    assert posted == [{"text": "autoresearch nov22: best 1.2 from baseline 1.5 (8 hours are over)"},
                      {"content": "autoresearch nov22: kept 1.2000: half the $(batch) \"now\""}]  # fmt: skip
    assert "AUTORESEARCH_WEBHOOK is not set; expected" in example("webhook.py", {"event": "night_end"}).stderr


def test_the_example_notifies_a_desktop(tmp_path: Path) -> None:
    """The desktop's own program is the one part that is not here: a recorder stands in its place on PATH."""
    recorder = tmp_path / ("osascript" if sys.platform == "darwin" else "notify-send")
    recorder.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    recorder.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "DISPLAY": ":9"}
    bed = Bed(tmp_path / "night", "better")
    done = bed.run("--experiments", "1", "--no-sandbox", **env, AUTORESEARCH_NOTIFY="")
    assert done.returncode == 0, done.stdout
    title, text = json.loads((bed.folder() / "logs" / "hook.night_end.out").read_text())[-2:]
    assert title == "autoresearch night"
    assert text.startswith("best 1.4"), "the result is in it"
    assert ", 1 kept" in text
    keep = {"event": "after_experiment", "experiment": {"status": "keep"}, "summary": None}
    done = example("notify.py", keep, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[-2:] == ["autoresearch nov22", "kept 1.2000: half the $(batch) \"now\""]
    assert example("notify.py", {**keep, "experiment": {"status": "oom"}}, PATH=str(tmp_path)).stdout == ""
