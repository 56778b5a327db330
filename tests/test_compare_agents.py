"""Nights side by side: the numbers are the journals', equal effort is compared with equal effort, and luck is called luck."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from agent.journal import journal
from scripts import compare_agents
from scripts.compare_agents import Point

FACTS = {"data_hash": "d", "tokenizer_hash": "t", "seq_len": 64, "budget": "30s", "device": "cpu"}


class Told:
    """A journal on disk with times of our own. Every experiment takes `minutes`."""

    def __init__(self, folder: Path, agent: str = "search", minutes: float = 6.0, **facts: Any) -> None:
        self.path, self.minutes, self.facts = folder / "journal.jsonl", minutes, {**FACTS, **facts}
        self.t, self.seq, self.n, self.level, self.best = 1_000.0, 0, -1, 1.0, "c0"
        folder.mkdir(parents=True)
        self.add("night_start", tag=folder.name, base="c0", train_file="train_mlx.py", seed=1, dataset={}, sources={})
        self.session(agent)
        self.experiment("keep", *(1.0, 1.002, 0.998))

    def add(self, event: str, **fields: Any) -> None:
        with open(self.path, "ab") as file:
            file.write(journal.encode({"v": 1, "seq": self.seq, "t": self.t, "event": event, **fields}))
        self.seq += 1

    def session(self, agent: str = "search", model: str | None = None) -> None:
        self.add("session", settings={"agent": agent, "model": model}, pid=1)

    def experiment(self, status: str, *scores: float, usage: dict[str, Any] | None = None) -> Told:
        self.n += 1
        self.add("experiment", n=self.n, parent=self.best)
        if status not in ("agent_error", "noop"):
            self.add("candidate", n=self.n, commit=f"c{self.n}", ast=f"a{self.n}", lines=1, description="x", usage=usage or {},
                     seconds=36.0)  # fmt: skip
        for k, score in enumerate(scores):
            self.add("trial_start", n=self.n, k=k, seed=k, dir=f"{self.n}-{k}")
            self.add("trial_end", n=self.n, k=k, seed=k, dir=f"{self.n}-{k}", status="ok", val_bpb=score, summary=self.facts,
                     seconds=1.0, error=None)  # fmt: skip
        self.t += 60 * self.minutes
        mean = sum(scores) / len(scores) if scores else None
        self.add("verdict", n=self.n, status=status, reason="", val_bpb=mean, description="x", error=None, usage={}, seconds=0.0)
        if status == "keep":
            self.best = f"c{self.n}"
        return self


@pytest.fixture
def nights(tmp_path: Path) -> tuple[Path, Path]:
    """One that keeps two of three, and one that takes twice as long, keeps one of five and fails twice."""
    first = Told(tmp_path / "first", "claude")
    first.experiment("keep", 0.95, 0.95, usage={"cost": 0.25, "tokens": 1000})
    first.experiment("discard", 0.97, usage={"cost": 0.5, "tokens": 500})
    first.experiment("keep", 0.9, 0.9)
    first.add("test_score", n=0, split="test", val_bpb=1.0, test_bpb=1.01, summary={}, error=None)
    first.add("test_score", n=3, split="test", val_bpb=0.9, test_bpb=0.92, summary={}, error=None)
    second = Told(tmp_path / "second", "search", minutes=12.0)
    second.experiment("discard", 1.1).experiment("oom").experiment("agent_error")
    second.experiment("keep", 0.85).experiment("discard", 0.9)
    return first.path.parent, second.path.parent


def cells(*paths: Path) -> dict[str, list[str]]:
    return dict(compare_agents.rows([compare_agents.load(path) for path in paths]))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "scripts/compare_agents.py"), *map(str, arguments)], capture_output=True,
                          text=True, timeout=120, cwd=ROOT.parent, env={"PATH": "", "COLUMNS": "160"})  # fmt: skip


def test_the_table_has_the_journals_numbers(nights: tuple[Path, Path]) -> None:
    table = cells(*nights)
    assert table["baseline val_bpb"] == ["1.0000", "1.0000"]
    assert table["best val_bpb"] == ["0.9000", "0.8500"]
    assert table["gain"] == ["10.00 %", "15.00 %"]
    assert table["held-out test_bpb"] == ["0.9200 from 1.0100", "-"]
    assert table["experiments"] == ["3", "5"]
    assert table["keeps"] == ["2 (67 %)", "1 (20 %)"]
    assert table["discards"] == ["1", "2"]
    assert table["failures"] == ["0", "2 (1 oom, 1 agent_error)"]
    assert table["trainings"] == ["8", "6"]
    assert table["agent's tokens"] == ["1,500", "0"]
    assert table["cost"] == ["$0.75", "$0.00"]


def test_equal_effort_is_compared(nights: tuple[Path, Path]) -> None:
    table = cells(*nights)
    assert table["best after 3 experiments"] == ["0.9000", "1.0000"]  # the keep of the second was its fourth
    assert table["best after 0.40 h"] == ["0.9000", "1.0000"]
    assert table["hours"] == ["0.40", "1.20"]


def test_the_staircase_starts_at_the_baseline_and_ends_at_the_best(nights: tuple[Path, Path]) -> None:
    points = compare_agents.load(nights[0]).curve
    expected = [(0, 0.1, 1.0), (1, 0.2, 0.95), (2, 0.3, 0.95), (3, 0.4, 0.9)]
    assert [(p.experiments, round(p.hours, 6), p.best) for p in points] == expected
    side = compare_agents.Side("a", compare_agents.load(nights[0]).night, [Point(0, 0.1, 1.0), Point(1, 0.2, 0.9)])
    assert [side.best_after(hours=h) for h in (0.05, 0.1, 0.2)] == [None, 1.0, 0.9]


def test_the_clock_stands_still_while_no_driver_works(tmp_path: Path) -> None:
    told = Told(tmp_path / "night").experiment("keep", 0.9, 0.9)
    told.add("night_end", reason="stopped", text="")
    told.t += 8 * 3600
    told.session()
    told.experiment("discard", 0.95)
    assert [round(p.hours, 6) for p in compare_agents.load(told.path).curve] == [0.1, 0.2, 0.3]


def test_a_lead_within_the_noise_is_called_luck(tmp_path: Path) -> None:
    def line(score: float) -> str:
        Told(tmp_path / f"a{score}", "claude").experiment("keep", score, score)
        Told(tmp_path / f"b{score}", "search").experiment("keep", 0.95, 0.95)
        return compare_agents.verdict([compare_agents.load(tmp_path / f"{which}{score}") for which in "ab"])

    clear, close = line(0.8), line(0.949)  # the baselines' trials say 0.001 to 0.002
    assert clear.startswith("after 1 experiments each: claude leads search by 0.1500 bpb, ")
    assert clear.endswith(" sigma of one training")
    assert "claude leads search by 0.0010 bpb" in close
    assert close.endswith("that may be luck: compare more nights")
    assert line(0.95) == "after 1 experiments each: claude and search are equal"


def test_nights_of_other_data_are_named_not_comparable(tmp_path: Path) -> None:
    paths = [Told(tmp_path / "a").path, Told(tmp_path / "b", budget="300s", data_hash="e").path]
    sides = [compare_agents.load(path) for path in paths]
    assert compare_agents.differences(sides) == ["data_hash differs: d, e", "budget differs: 30s, 300s"]
    assert "not comparable: budget differs: 30s, 300s" in command(*paths).stdout


def test_unknown_cost_is_not_free(tmp_path: Path) -> None:
    told = Told(tmp_path / "a").experiment("discard", 1.1, usage={"tokens": 7, "cost": None})
    assert cells(told.path, told.path)["cost"] == ["unknown", "unknown"]


def test_the_command_prints_the_table_and_draws_the_picture(nights: tuple[Path, Path], tmp_path: Path) -> None:
    done = command(*nights, "--out", tmp_path / "c.svg")
    assert done.returncode == 0, done.stderr
    heading = done.stdout.splitlines()[0]
    assert heading.index("claude") < heading.index("search")
    assert "claude leads search by 0.1000 bpb" in done.stdout
    picture = (tmp_path / "c.svg").read_text()
    assert "<svg" in picture
    assert picture.count("stroke: #1a7f37") >= 2, "the first night's staircase in both panels"
    assert picture.count("stroke: #0969da") >= 2


def test_labels_replace_and_equal_names_are_told_apart(nights: tuple[Path, Path], tmp_path: Path) -> None:
    done = command(*nights, "--label", "[red]one", "--label", "two")
    assert "[red]one" in done.stdout
    same = command(Told(tmp_path / "x").path.parent, Told(tmp_path / "y").path.parent)
    assert "search (x)" in same.stdout
    assert "search (y)" in same.stdout


def test_errors_say_what_was_expected(nights: tuple[Path, Path], tmp_path: Path) -> None:
    assert "at least two nights" in command(nights[0]).stderr
    assert "expected 2 labels, one for each night, got 1" in command(*nights, "--label", "a").stderr
    (tmp_path / "empty").mkdir()
    done = command(nights[0], tmp_path / "empty")
    assert done.returncode == 1
    assert "expected the journal of a night with a baseline" in done.stderr
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"event": "night_start"}) + "\nnonsense\n")
    assert command(nights[0], broken).returncode == 1
