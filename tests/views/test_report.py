"""The report of a night: the picture and the text."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from night_kit import ROOT, Bed
from story_kit import Story, long_night, told

from agent.journal.journal import Journal
from agent.views import glance, report, results


def written(folder: Path, story: Story) -> Path:
    with Journal(folder) as journal:
        for event in story.events:
            fields = {key: value for key, value in event.items() if key not in ("v", "seq", "t", "event")}
            journal.append(event["event"], **fields)
    return folder


@pytest.mark.parametrize("size", ["none", "baseline", "short", "long"])
def test_report_draws_a_picture(tmp_path: Path, size: str) -> None:
    story = Story() if size in ("none", "baseline") else told() if size == "short" else long_night()
    if size == "baseline":
        story.experiment(0, "keep", (1.5, 1.5))
    if size == "long":
        story.events[-1]["description"] = "costs $5 and $6, 日本語"
    folder = written(tmp_path, story)
    done = subprocess.run([sys.executable, str(ROOT / "scripts/report.py"), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    picture = (folder / "progress.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    assert results.last_line(story.night) in done.stdout
    assert not list(folder.glob(".*.new"))


@pytest.mark.parametrize(
    ("baseline", "best", "discards", "shown"),
    [
        (0.690, 0.690, [0.70, 0.79, 0.86, 0.95, 1.05], 5),  # nothing kept: what was tried is to be seen
        (0.690, 0.690, [0.70, 0.72, 5.0, 9.0], 2),  # what diverged must not flatten the rest
        (1.550, 1.490, [1.56, 1.57, 1.50, 1.52, 4.0, 1.6], 5),
        (1.350, 1.346, [1.45, 1.46, 1.47], 0),  # what was won must not be flattened either
        (1.350, 1.350, [], 0),
    ],
)
def test_picture_shows_what_was_won_and_most_of_what_was_tried(
    baseline: float, best: float, discards: list[float], shown: int
) -> None:
    low, high = report.limits(baseline, best, [baseline - 0.001, baseline + 0.001], discards)
    assert low < best - 0.001
    assert baseline + 0.001 < high
    assert sum(score < high for score in discards) == shown
    assert not 0 < baseline - best < 0.1 * (high - low)


MARKUP = "<img src=x onerror=alert(1)> <script>alert(1)</script> | [a](http://x) @someone `b`"


def full(folder: Path) -> Path:
    """A night with keeps, a near miss, failures, tests and stories, and markup in every field of an agent or a model."""
    story = told()
    story.experiment(3, "discard", (1.345,), cost=0.5)
    story.experiment(4, "crash")
    for n, val in ((0, 1.6), (2, 1.35)):
        story.add("test_score", n=n, split="test", val_bpb=val, test_bpb=val + 0.02 * (n + 1), summary={}, error=None)
        texts = [{"prompt": "", "text": f"A dog {n}. {MARKUP}"}, {"prompt": MARKUP, "text": f"A cat {n}."}]
        story.add("stories", n=n, texts=texts)
    story.add("note", text=MARKUP)
    for event in story.events:
        for name in ("description", "hypothesis", "reason"):
            if event["event"] in ("candidate", "verdict") and (name in event or name == "hypothesis"):
                event[name] = f"{name} {event['n']} {MARKUP}"
        if event["event"] == "candidate":
            event["family"] = MARKUP
    return written(folder, story)


def test_the_report_stands_alone_and_holds_no_markup_of_an_agent(tmp_path: Path) -> None:
    folder = full(tmp_path / "night")
    done = subprocess.run([sys.executable, str(ROOT / "scripts/report.py"), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = (folder / "report.html").read_text()
    assert re.findall(r"<(?:script|iframe|link|form)", html) == []
    assert set(re.findall(r"<img[^>]* src=\"([^,\"]*)", html)) == {"data:image/png;base64"}
    assert re.findall(r"(?:href|src)=(?!\"data:)[^x]", html) == [], "nothing is loaded from elsewhere"
    assert "default-src 'none'" in html
    for words in ("best 1.3500 from baseline 1.6000: -15.6 % in 4 experiments, 1 kept", "hypothesis 2", "+0.2500", "1.4100",
                  "+0.0600", "A dog 0.", "A dog 2.", "A cat 2.", "description 3", "description 4", "within the noise (±",
                  "beats experiment 2 (1.3500) by 0.0050"):  # fmt: skip
        assert words in html, words
    brief = (folder / "report.md").read_text()
    assert "| 2 | description 2" in brief
    assert "+0.2500 |" in brief
    assert "<img" not in brief.replace("\\<img", "")
    assert not re.search(r"(?<!\\)[`@\[]", brief.replace("`autoresearch/t`", ""))
    table = [line for line in brief.splitlines() if line.startswith("| 2 ")]
    assert re.sub(r"\\\|", "", table[0]).count("|") == 5, "a bar in a description is no column"


def test_the_report_shows_the_commits_difference(tmp_path: Path) -> None:
    """In a real night: its commits are in the checkout."""
    bed = Bed(tmp_path, "better")
    done = bed.run("--experiments", "1", "--no-sandbox")
    assert done.returncode == 0, done.stdout
    command = [sys.executable, str(ROOT / "scripts/report.py")]
    done = subprocess.run(command, cwd=bed.repo, env=bed.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = (bed.folder() / "report.html").read_text()
    assert html.count('<span class="plus">+GAIN = 0.05</span>') == 2, "of the keep, and of the whole night"


def test_near_misses_are_those_ahead_of_the_best_of_their_time_or_within_the_noise() -> None:
    story = told()  # baseline 1.6, then 1.8 discarded, then 1.35 kept
    story.experiment(3, "discard", (1.34,))
    story.experiment(4, "discard", (1.36,))
    story.experiment(5, "discard", (1.5,))
    story.experiment(6, "discard", (1.3, 1.34))
    found = report.near_misses(story.night, 0.02)
    assert [(e.n, round(gain, 4)) for e, gain, _ in found] == [(6, 0.03), (3, 0.01), (4, -0.01)]
    assert found[0][2].endswith("after 2 trainings")
    assert [e.n for e, _, _ in report.near_misses(story.night, 0.002)] == [6, 3], "with less noise 4 is plainly worse"
    story.events[-1]["reason"] = "within the noise: ahead of the best by 0.0010 in 7 pairs trained side by side (noise ±0.0036)"
    words = next(words for e, _, words in report.near_misses(story.night, 0.002) if e.n == story.night.done[-1].n)
    assert "noise" not in words, "one comparison with the noise is enough, and the verdict has it"


def test_names_of_keeps_do_not_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.text import Text

    story = Story()
    story.experiment(0, "keep", (1.5, 1.51))
    for n in range(1, 60):
        story.experiment(n, "keep" if n in (1, 2, 3, 5, 20, 40) else "discard", (1.5 - n / 200,) * 2)
        story.events[-1]["description"] = f"idea {n} in some words"
    shut = pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    report.draw(story.night, tmp_path / "progress.png")
    figure = pyplot.gcf()
    boxes = [Text.get_window_extent(note) for note in figure.axes[0].texts]  # without their lines
    shut(figure)
    names = {note.get_text().split(":")[0] for note in figure.axes[0].texts}
    assert names >= {"20", "40"}
    assert names <= {"1", "2", "3", "5", "20", "40"}
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_report_shows_keeps_and_the_gap_to_the_held_out_test(tmp_path: Path) -> None:
    story = told()
    for n, val, test in ((0, 1.6, 1.62), (2, 1.35, 1.38)):
        story.add("test_score", n=n, split="test", val_bpb=val, test_bpb=test, summary={}, error=None)
    folder = written(tmp_path, story)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/report.py"), str(folder), "--no-picture"], capture_output=True, text=True
    )
    assert re.search(r"2  c2  1\.3500 \(-0\.2500\)  idea 2", done.stdout)
    assert "held-out test, experiment 2: test_bpb 1.3800, val_bpb 1.3500, gap +0.0300" in done.stdout
    assert not (folder / "progress.png").exists()


def test_report_tells_what_the_agent_used_by_experiment(tmp_path: Path) -> None:
    story = told()
    story.experiment(3, "discard", (1.4,))
    story.events[-1]["description"] = "wider"
    candidate = next(e for e in story.events if e["event"] == "candidate" and e["n"] == 3)
    candidate["usage"] = {"tokens": 12_345, "cost": 0.25}
    folder = written(tmp_path, story)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/report.py"), str(folder), "--no-picture"], capture_output=True, text=True
    )
    assert "what the agent used, by experiment:\n" in done.stdout
    assert re.search(r"\n +3 +12,345 tokens +\$0\.2500 +discard ", done.stdout)


def test_report_without_a_night_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts/report.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no night in" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_end_of_a_night_has_words() -> None:
    """Names that limits.py and session.py give."""
    source = "".join((ROOT / "agent" / "night" / name).read_text() for name in ("limits.py", "session.py", "engine.py"))
    names = set(re.findall(r'return "(\w+)", f?"', source)) | set(re.findall(r'reason="(\w+)"', source))
    assert {"hours", "experiments", "stopped"} <= names <= set(glance.ENDS)
