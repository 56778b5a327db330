"""Nights written by hand, as events of their journal."""

from __future__ import annotations

from typing import Any

from agent.journal.state import Night, fold


class Story:
    """Events of a night, written by hand."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.add("night_start", tag="t", base="b0", train_file="train_mlx.py", seed=1, dataset={})
        self.add("session", settings={}, pid=1)

    def add(self, event: str, **fields: Any) -> None:
        self.events.append({"v": 1, "seq": len(self.events), "t": float(len(self.events) + 1), "event": event, **fields})

    def experiment(self, n: int, status: str, scores: tuple[float, ...] = (), cost: float = 0.0, **more: Any) -> None:
        self.add("experiment", n=n, parent="p")
        if scores or status == "keep":
            self.add("candidate", n=n, commit=f"c{n}", ast=f"a{n}", lines=10, description=f"idea {n}",
                     usage={"cost": cost, "tokens": 10}, seconds=2.0)  # fmt: skip
        for k, score in enumerate(scores):
            self.trial(n, k, score)
        mean = sum(scores) / len(scores) if scores else None
        self.add("verdict", n=n, status=status, reason="r", val_bpb=mean, description="", error=None, usage={}, seconds=0.0, **more)

    def trial(self, n: int, k: int, score: float | None, status: str = "ok") -> None:
        self.add("trial_start", n=n, k=k, seed=1 + k, dir=f"{n:04d}-{k}")
        self.add("trial_end", n=n, k=k, seed=1 + k, dir=f"{n:04d}-{k}", status=status, val_bpb=score, summary={}, seconds=1.0,
                 error=None)  # fmt: skip

    @property
    def night(self) -> Night:
        return fold(self.events)


def told() -> Story:
    story = Story()
    story.experiment(0, "keep", (1.5, 1.6, 1.7))
    story.experiment(1, "discard", (1.8,), cost=0.5)
    story.experiment(2, "keep", (1.3, 1.4), cost=0.25)
    return story


def long_night(count: int = 300) -> Story:
    story = told()
    for n in range(3, count):
        status = ("discard", "crash", "nan", "noop", "agent_error", "keep")[n % 6 if n % 30 == 5 or n % 6 != 5 else 0]
        story.experiment(n, status, (1.5 - n / 1000, 1.51 - n / 1000) if status in ("discard", "keep") else ())
        story.events[-1]["description"] = f"idea {n} " + "with many words " * 20
        if status not in ("discard", "keep"):
            story.events[-1]["error"] = {"kind": status, "message": "it broke", "step": 3, "tail": "line\n" * 5000}
    return story
