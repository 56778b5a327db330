"""`metrics.jsonl` of a running training, read as it grows: for the eye, and to stop a training that is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LARGEST_READ = 1 << 20  # bytes a look; a trainer that floods its metrics must not fill the driver's memory


class Tail:
    """New lines of a metrics file at every look. The file is the candidate's: anything may be in it."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, b""

    def new(self) -> list[dict[str, Any]]:
        """The whole lines since the last look that are JSON objects."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read(_LARGEST_READ)
        except OSError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_LARGEST_READ:]
        rows = []
        for line in whole:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows


class Watch:
    """Called again and again while a trainer runs: shows the newest line, answers `nan` once the training is lost."""

    def __init__(self, path: Path, abort_loss: float, show: Callable[[dict[str, Any]], None]) -> None:
        self._tail, self._abort_loss, self._show = Tail(path), abort_loss, show
        self.step: int | None = None
        self.message = ""

    def __call__(self) -> str | None:
        """`nan` at a loss that is not finite or above `abort_loss` (nats a token), None otherwise."""
        rows = self._tail.new()
        for row in rows:
            loss, step = row.get("loss"), row.get("step")
            if isinstance(step, int):
                self.step = step
            if isinstance(loss, (int, float)) and not loss <= self._abort_loss:  # NaN fails every comparison
                self.message = f"loss {loss} at step {step}; trainings are stopped above {self._abort_loss:.1f}"
                return "nan"
        if rows:
            self._show({key: value for key, value in rows[-1].items() if _number(value)})
        return None


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
