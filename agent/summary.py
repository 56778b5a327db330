"""The summary block, read strictly: exactly one block, every key there once, every number finite, or it is no score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NUMBERS = (
    "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps", "num_params_M",
    "depth", "val_bytes", "seq_len", "seed",
)  # fmt: skip
TEXTS = ("val_sha256", "data_hash", "tokenizer_hash", "budget", "device")
COMPARED = ("data_hash", "tokenizer_hash", "seq_len", "budget", "device")


class SummaryError(Exception):
    """The scorer's output is not one whole summary block; the message says what was expected and what came."""


def parse(text: str, split: str = "val") -> dict[str, Any]:
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
