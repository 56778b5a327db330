"""A night as data frames, and the notebook that shows them."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from story_kit import long_night, told

frames = pytest.importorskip("agent.views.frames")


def test_experiments_trainings_and_families_as_frames() -> None:
    night = told().night
    frame = frames.experiments(night)
    assert list(frame.index) == [0, 1, 2]
    assert list(frame["best"]) == pytest.approx([1.6, 1.6, 1.35])
    assert list(frame["trainings"]) == [3, 1, 2]
    assert frames.trainings(night).groupby("n")["val_bpb"].mean()[2] == pytest.approx(1.35)
    families = frames.families(night)
    assert (families["tried"].sum(), families["kept"].sum()) == (2, 1)


def test_every_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.journal.journal import Journal

    with Journal(tmp_path / "runs" / "night") as journal:
        for event in long_night(60).events:
            journal.append(event["event"], **{k: v for k, v in event.items() if k not in ("v", "seq", "t", "event")})
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "analysis.ipynb").read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "a notebook is committed without outputs"
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(names["frame"]) == 60
