"""A night as pandas data frames, for notebooks. pandas is an extra: pip install '.[notebook]'."""

from __future__ import annotations

import pandas as pd

from agent.journal.state import Night
from agent.views import glance


def experiments(night: Night) -> pd.DataFrame:
    """A row for each experiment and the baseline. val_bpb: mean of its trainings. hours: from the start of the night to the end of
    the experiment. cost: US dollars. best: val_bpb of the best experiment so far."""
    rows = [
        {
            "n": e.n, "status": e.status, "val_bpb": e.mean, "trainings": len(e.scores), "lines": e.lines, "family": e.family,
            "description": e.description, "hypothesis": e.hypothesis, "reason": e.reason, "commit": e.commit, "parent": e.parent,
            "hours": ((e.ended or night.last) - night.started) / 3600, "cost": e.cost, "tokens": e.tokens,
        }
        for e in night.experiments
    ]  # fmt: skip
    frame: pd.DataFrame = pd.DataFrame(rows).set_index("n")
    kept = frame["val_bpb"].where(frame["status"] == "keep")
    frame["best"] = kept.ffill()
    return frame


def trainings(night: Night) -> pd.DataFrame:
    """A row for each finished training: experiment, seed, val_bpb, seconds, and all values of its summary."""
    frame: pd.DataFrame = pd.DataFrame(
        [{"n": e.n, "seed": t.seed, "status": t.status, "val_bpb": t.val_bpb, "seconds": t.seconds, **t.summary}
         for e in night.experiments for t in e.trials if t.status != "running"]
    )  # fmt: skip
    return frame


def families(night: Night) -> pd.DataFrame:
    """For each kind of idea: how many were tried, kept and failed, and the share of keeps."""
    rows = glance.families(night.done)
    frame: pd.DataFrame = pd.DataFrame(rows, columns=["family", "tried", "kept", "failed"]).set_index("family")
    frame["share kept"] = frame["kept"] / frame["tried"]
    return frame
