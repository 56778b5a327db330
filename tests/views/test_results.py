"""What people are shown of a night: results.tsv, the last line, the status."""

from __future__ import annotations

import csv
import io

from story_kit import Story, told

from agent.journal.state import fold
from agent.views import results


def test_results_have_upstreams_five_columns() -> None:
    story = told()
    story.experiment(3, "crash")
    story.events[-1]["description"] = "tab\there, newline\nthere"
    rows = list(csv.DictReader(io.StringIO(results.results(story.night)), delimiter="\t"))
    assert list(rows[0]) == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert [(row["val_bpb"], row["status"]) for row in rows] == [
        ("1.600000", "keep"), ("1.800000", "discard"), ("1.350000", "keep"), ("0.000000", "crash"),
    ]  # fmt: skip
    assert rows[3]["description"] == "tab here, newline there"
    assert rows[3]["memory_gb"] == "0.0"


def test_last_line() -> None:
    line = results.last_line(told().night)
    assert line == "best 1.3500 from baseline 1.6000: -15.6 % in 2 experiments, 1 kept; branch autoresearch/t"
    assert "no baseline" in results.last_line(fold([]))
    story = Story()
    story.experiment(0, "keep", (1.5, 1.6))
    assert "nothing won in 0 experiments" in results.last_line(story.night)


def test_status_says_who_works_on_what() -> None:
    story = told()
    story.add("experiment", n=3, parent="c2")
    assert "process 42 works on it" in results.status(story.night, 42)[0]
    assert "not running" in results.status(story.night, None)[0]
    assert any("experiment 3" in line for line in results.status(story.night, 42))


def test_a_refused_held_out_test_stands_in_the_last_line() -> None:
    story = told()
    story.add("test_score", n=0, split="test", val_bpb=1.6, test_bpb=1.61, summary={}, error=None)
    assert results.refused(story.night) == ""
    error = {"kind": "violation", "message": "scoring failed: non_causal"}
    story.add("test_score", n=2, split="test", val_bpb=1.35, test_bpb=None, summary={}, error=error)
    assert results.refused(story.night) == "violation: scoring failed: non_causal"
    line = results.last_line(story.night)
    assert line.startswith("nothing was won: experiment 2 was the best, 1.3500 from baseline 1.6000, but its held-out test was")
    assert line in results.status(story.night, None)
