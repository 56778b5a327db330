"""The terminal: the live panel of a real night at several widths, plain lines, and --status in its forms."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
from night_kit import Bed
from rich.console import Console as Rich
from story_kit import Story, told

from agent.journal.journal import read_events
from agent.journal.state import fold
from agent.views import glance, results
from agent.views.terminal import panel

LONG = "replaces the rotary embedding by one that is learnt, and widens the MLP, 日本語 [bold]markup[/bold]"


def shown(story: Story, folder: Path | None = None, width: int = 80, stage: str = "", words: str = "") -> list[str]:
    now = glance.at_a_glance(story.night, True, 0.01, folder)
    console = Rich(width=width, file=io.StringIO(), record=True)
    console.print(panel(now, width, stage, words))
    return console.export_text().splitlines()


def in_training(folder: Path, scoring: bool = False) -> Story:
    """Experiment 3 in the middle of its first training; two experiments were discarded or kept before."""
    story = told()
    story.events[1]["settings"] = {"experiments": 7}
    story.add("experiment", n=3, parent="c2")
    story.add("candidate", n=3, commit="c3", ast="a3", lines=10, description=LONG, usage={}, seconds=2.0)
    story.add("trial_start", n=3, k=0, seed=1, dir="0003-1")
    run = folder / "trials" / "0003-1"
    run.mkdir(parents=True)
    row = {"step": 50, "loss": 3.25, "tokens_per_second": 48_100.0, "memory_mb": 5210.0, "seconds": 60.0, "progress": 0.25}
    (run / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 51, "lo')
    if scoring:
        (run / "train.json").write_text("{}")
    return story


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_panel_fits_its_terminal_and_says_what_goes_on(tmp_path: Path, width: int) -> None:
    lines = shown(in_training(tmp_path), tmp_path, width)
    assert all(len(line) < width for line in lines)
    assert len(lines) <= 10
    assert lines[0].startswith("experiment 3 of 7: training 1, seed 1")
    assert any("25 %" in line and "loss 3.2500" in line for line in lines), lines
    assert any(line.startswith("best 1.3500 ±0.0071") for line in lines)
    if width >= 80:
        assert any("   1  discard      1.8000 ±0.0100  idea 1" in line for line in lines)
        assert any("3 min left  48,100 tok/s" in line for line in lines), "of the training: 25 % took 60 s"
        assert any("[bold]markup" in line for line in lines) is (width == 120), "an agent's words are no markup"


def test_the_panel_says_that_it_scores_and_does_not_freeze_a_speed(tmp_path: Path) -> None:
    text = "\n".join(shown(in_training(tmp_path, scoring=True), tmp_path, words="loss 3.25, 48,100 tok/s"))
    assert "experiment 3 of 7: scoring" in text
    assert "tok/s" not in text


def test_a_night_that_was_stopped_in_a_training_does_not_look_busy(tmp_path: Path) -> None:
    story = in_training(tmp_path)
    assert any("48,100 tok/s" in line for line in results.status(story.night, 42, 0.01, tmp_path))
    story.add("night_end", reason="stopped", text="")
    first, *lines = results.status(story.night, None, 0.01, tmp_path)
    assert first == "night t: ended: stopped"
    assert any(line.startswith("experiment 3 of 7") and line.endswith("; not finished; trials so far: none") for line in lines)
    assert not any("training 1" in line or "tok/s" in line for line in lines)


def test_the_panel_before_there_is_a_night() -> None:
    console = Rich(width=60, file=io.StringIO(), record=True)
    console.print(panel(None, 60, "preparing data", "12 % of 500 MB"))
    assert console.export_text().splitlines() == ["preparing data", "12 % of 500 MB"]


def test_training_the_best_again_is_told_from_training_the_candidate() -> None:
    story = told()
    story.add("experiment", n=3, parent="c2")
    story.add("candidate", n=3, commit="c3", ast="a3", lines=10, description="idea 3", usage={}, seconds=2.0)
    assert glance.phase(story.night) == "deciding"
    story.trial(3, 0, 1.34)
    story.add("trial_start", n=2, k=2, seed=3, dir="0002-3")
    assert glance.phase(story.night) == "training the best again, seed 3"


@pytest.mark.parametrize("content", ["", "[[[[", '{"loss": 1e999}\n', '{"loss": NaN, "step": "x"}\n', "[" * 100_000 + "\n", "1\n"])
def test_a_metrics_file_may_hold_anything(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert glance.newest(tmp_path / "metrics.jsonl") == {}
    os.mkfifo(tmp_path / "pipe")
    assert glance.newest(tmp_path / "pipe") == {}, "never opened: it would block"


def test_nothing_is_hidden_in_a_diff() -> None:
    """Marks that turn the direction of text can make code read as other code."""
    assert glance.visible("+ a\u202eb\x1b[0m\tü 日本 😀\r\x00\n") == "+ a<U+202E>b<U+001B>[0m\tü 日本 😀<U+000D><U+0000>\n"


def test_time_left_counts_hours_experiments_and_money() -> None:
    """The pace is 100 s an experiment; 10 were done in the 1000 s since the session began."""
    def after(overdue: bool = False, **settings: object) -> dict[str, object]:
        story = Story()
        story.experiment(0, "keep", (1.5, 1.5, 1.5))
        for n in range(1, 11):
            story.experiment(n, "discard", (1.6,), cost=0.1)
        events = story.events
        for event in events:
            event["t"] = max(0.0, 100.0 * (event.get("n") or 0)) if event["event"] == "verdict" else \
                100.0 * max(0, (event.get("n") or 0) - 1) if event["event"] != "session" else 1e-9
        events[1]["settings"] = settings
        if overdue:
            story.add("experiment", n=11, parent="p")
            events[-1]["t"] = 1000.0
        return glance.left(story.night, 2000.0 if overdue else 1000.0)

    assert after(experiments=15)["experiments"] == 5
    assert after(experiments=15)["seconds"] == pytest.approx(500)
    assert after(hours=0.5) == {"seconds": pytest.approx(800), "experiments": 9, "pace": pytest.approx(100)}
    assert after(until=1300.0)["seconds"] == pytest.approx(300)
    assert after(hours=8.0, max_cost=1.3)["experiments"] == 3
    assert after(hours=8.0, max_cost=1.3)["seconds"] == pytest.approx(300)
    assert after() == {"seconds": None, "experiments": None, "pace": pytest.approx(100)}
    assert after(True, experiments=13)["seconds"] == pytest.approx(200), "the open one is overdue, two are still to come"


def test_a_score_is_compared_in_words() -> None:
    night = told().night
    near = glance.compared(night.experiments[1], night.experiments[0], 0.2)
    assert near == "1.8000 is behind baseline (1.6000) by 0.2000, within the noise (±0.4619)"
    far = glance.compared(night.experiments[2], night.experiments[0], 0.01)
    assert far == "1.3500 beats baseline (1.6000) by 0.2500, more than the noise (±0.0183)"


class Terminal:
    """A program on a terminal of this width, and what it has written."""

    def __init__(self, argv: list[str], bed: Bed, columns: int, **env: str) -> None:
        def own() -> None:  # as in a window: the kernel tells us when it is closed
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started by; nohup ignores it
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = bed.environment(TERM="xterm-256color", **env)
        known = {key: value for key, value in env.items() if key not in ("COLUMNS", "NO_COLOR")}
        self.child = subprocess.Popen(argv, cwd=bed.repo, env=known, stdin=slave, stdout=slave, stderr=slave,
                                      preexec_fn=own)
        os.close(slave)
        self.text = ""

    def until(self, words: str | None) -> str:
        """Read until these words were written; None: to the program's end."""
        while words is None or words not in self.text:
            if not self.read():
                assert words is None, f"{words!r} never came: {self.text}"
                os.close(self.master)
                self.child.wait(30)
                break
        return self.text

    def read(self) -> bool:
        """Take what was written meanwhile; False once the program has ended."""
        try:
            part = os.read(self.master, 65536)
        except OSError:  # the other side is closed
            part = b""
        self.text += part.decode(errors="replace")
        return bool(part)


def stop(bed: Bed) -> None:
    for _ in range(2):
        assert bed.loop("--stop").returncode == 0


def test_a_real_night_on_a_terminal_draws_a_panel_and_in_plain_none(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "slow better")
    lively = Terminal(bed.command("--experiments", "2", "--no-sandbox"), bed, 60, AUTORESEARCH_SLOW="600")
    lively.until("experiment 1 of 2: training 1, seed 1")
    stop(bed)
    assert "\x1b[2K" in lively.until(None), "the panel is drawn over"
    assert lively.child.returncode == 130
    plain = Terminal(bed.command("--plain", "--resume"), bed, 60, AUTORESEARCH_SLOW="0")
    text = plain.until(None)
    assert plain.child.returncode == 0, text
    assert "\x1b[2K" not in text
    lines = text.replace("\r", "").splitlines()
    assert all(len(line) <= 60 for line in lines)
    words = {word.rstrip(";") for line in lines for word in line.split()}
    assert {"experiments,", "autoresearch/night"} <= words, f"wrapped between words: {text}"


@pytest.mark.parametrize("words", [(), ("--plain",)])
def test_a_closed_terminal_is_survived_and_told(tmp_path: Path, words: tuple[str, ...]) -> None:
    """The window is closed in the middle of a training. The night ends as planned, and says where its words went."""
    bed = Bed(tmp_path, "slow worse better")
    window = Terminal(bed.command("--experiments", "3", "--no-sandbox", *words), bed, 80, AUTORESEARCH_SLOW="1")
    journal = bed.folder() / "journal.jsonl"
    while not journal.exists() or b'"trial_start","n":1' not in journal.read_bytes():
        window.read()
    os.close(window.master)
    assert window.child.wait(60) == 0
    night = fold(read_events(bed.folder() / "journal.jsonl")[0])
    assert (len(night.done), night.ended) == (3, "experiments")
    assert [note for note in night.notes if "the terminal was closed; the night went on" in note]
    said = (bed.folder() / "logs" / "terminal.log").read_text()
    assert "experiment 3: keep" in said
    assert "1 kept; branch autoresearch/night" in said.splitlines()[-1]
    assert "\x1b" not in said, "no panel is drawn into a file"
    assert "Traceback" not in said
    assert "note: the terminal was closed" in bed.loop("--status").stdout


def test_status_once_as_json_and_followed_to_the_end(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "worse hangs")
    driver, command = bed.start("--experiments", "2", "--no-sandbox"), bed.command()[:3]
    while not (bed.folder() / "journal.jsonl").exists():
        time.sleep(0.05)
    followed = Terminal([*command, "--status", "--watch"], bed, 80)
    followed.until("experiment 2 of 2: the agent is at work")
    known = json.loads(bed.loop("--status", "--json").stdout)
    assert (known["running"], known["wanted"], known["best"]) == (True, 2, 0)
    assert [e["status"] for e in known["experiments"]] == ["keep", "discard"]
    stop(bed)
    driver.communicate(timeout=60)
    assert "ended: stopped" in followed.until(None)
    last = bed.loop("--status").stdout
    assert last.startswith("night night: ended: stopped\n")
    assert "   1  discard      1.55" in last, "the score of a discarded one"
    assert bed.loop("--status", "--watch").stdout == last
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does once it has seen enough
    headed = subprocess.run([*command, "--status"], cwd=bed.repo, env=bed.environment(), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (headed.returncode, headed.stderr) == (0, b"")
    assert "need --status, and cannot be combined" in bed.loop("--watch").stderr


def test_every_view_shows_the_mean_of_all_trials(tmp_path: Path) -> None:
    """Experiment 2 was kept with 1.35 and trained again later."""
    story = told()
    story.add("experiment", n=3, parent="c2")
    story.add("candidate", n=3, commit="c3", ast="a3", lines=10, description="idea 3", usage={}, seconds=2.0)
    story.trial(3, 0, 1.36)
    story.trial(2, 2, 1.41)
    story.add("verdict", n=3, status="discard", reason="r", val_bpb=1.36, description="", error=None, usage={}, seconds=0.0)
    night = story.night
    assert "c2\t1.370000\t" in results.results(night)
    assert "best 1.3700 from" in results.last_line(night)
    assert any("1.3700 ±" in line for line in results.status(night, None, 0.01))
    assert glance.at_a_glance(night, False, 0.01)["experiments"][2]["score"] == pytest.approx(1.37)
