"""What trainer and scorer tell, read strictly.

The summary block: exactly one, every key there once, every number finite, or it is no score. `metrics.jsonl`: read as it grows,
for the eye, and to stop a training that is lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.files import read_part

NUMBERS = (
    "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps", "num_params_M",
    "depth", "val_bytes", "seq_len", "seed",
)  # fmt: skip
TEXTS = ("val_sha256", "data_hash", "tokenizer_hash", "budget", "device")
COMPARED = ("data_hash", "tokenizer_hash", "seq_len", "budget", "device")


class SummaryError(Exception):
    """The scorer's output is not one whole summary block; the message says what was expected and what came."""


def read_summary(text: str, split: str = "val") -> dict[str, Any]:
    """The block in the scorer's standard output: numbers as float, the rest as text.

    The score is `val_bpb` or `test_bpb`, in bits per byte. With the test split, keys of the validation text are optional.
    """
    lines = [line.rstrip() for line in text.splitlines()]
    if lines.count("---") != 1:
        raise SummaryError(f"expected exactly one summary block (a line ---), found {lines.count('---')}")
    block: dict[str, Any] = {}
    for line in lines[lines.index("---") + 1 :]:
        if not line:
            continue
        key, colon, value = line.partition(":")
        key, value = key.strip(), value.strip()
        if not colon or not value:
            raise SummaryError(f"expected 'key: value' in the summary block, found {line[:80]!r}")
        if key in block:
            raise SummaryError(f"expected each key once in the summary block, found {key} twice")
        block[key] = value
    score = f"{split}_bpb"
    wanted: tuple[str, ...] = (score, *NUMBERS, *TEXTS)
    if split != "val":
        wanted = tuple(key for key in wanted if not key.startswith("val_"))
    if missing := [key for key in wanted if key not in block]:
        raise SummaryError(f"the summary block lacks {', '.join(missing)}")
    for key, value in block.items():
        if key in TEXTS:
            continue
        try:
            number = float(value)
        except ValueError:
            if key in wanted:
                raise SummaryError(f"{key}: expected a number, found {value[:40]!r}") from None
            continue
        if not math.isfinite(number):
            raise SummaryError(f"{key}: expected a finite number, found {value[:40]!r}")
        block[key] = number
    if block[score] <= 0:
        raise SummaryError(f"{score}: expected a positive number, found {block[score]}")
    return block


def differences(summary: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Why the scores of two summaries cannot be compared: one text a key that differs, [] if they can."""
    return [
        f"{key}: expected {reference[key]}, found {summary.get(key)}"
        for key in COMPARED
        if summary.get(key) != reference[key]
    ]

_LONGEST_INTEGER = 18  # digits; a longer one is taken as a float, which is infinite where it is too large
_LARGEST_READ = 1 << 20  # bytes a look; a trainer that floods its metrics must not fill the driver's memory


class Tail:
    """New lines of a metrics file at every look. The file is the candidate's: anything may be in it."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, b""

    def new(self) -> list[dict[str, Any]]:
        """The whole lines since the last look that are JSON objects."""
        try:
            data = read_part(self._path, self._offset, _LARGEST_READ)
        except OSError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_LARGEST_READ:]
        rows = []
        for line in whole:
            try:
                row = json.loads(line, parse_int=_integer)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows


class Watch:
    """Called again and again while a trainer runs: shows the newest line, answers `nan` once the training is lost, and `memory`
    once it tells a peak of more than `memory_bytes`, which on a GPU the system may not count as its memory."""

    def __init__(
        self, path: Path, abort_loss: float, show: Callable[[dict[str, Any]], None], memory_bytes: int | None = None
    ) -> None:  # fmt: skip
        self._tail, self._abort_loss, self._show, self._memory_bytes = Tail(path), abort_loss, show, memory_bytes
        self.step: int | None = None
        self.message = ""

    def __call__(self) -> str | None:
        """`nan` at a loss that is not finite or above `abort_loss` (nats a token); `memory`; None while all is well."""
        rows = self._tail.new()
        for row in rows:
            loss, step = row.get("loss"), row.get("step")
            if isinstance(step, int):
                self.step = step
            if isinstance(loss, (int, float)) and not loss <= self._abort_loss:  # NaN fails every comparison
                self.message = f"loss {loss} at step {step}; trainings are stopped above {self._abort_loss:.1f}"
                return "nan"
            memory = row.get("memory_mb")
            if self._memory_bytes is not None and isinstance(memory, (int, float)) and memory * 2**20 > self._memory_bytes:
                return "memory"
        if rows:
            self._show({key: value for key, value in rows[-1].items() if _number(value)})
        return None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
