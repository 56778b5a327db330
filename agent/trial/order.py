"""What is asked of a trial, and what comes back."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from agent.errors import UsageError


def parse_budget(text: str) -> tuple[float, str]:
    """Amount and unit (s, steps or tokens) of a budget like 300s, 200steps or 5Mtokens. UsageError if it is none.

    The harness has its own parser, because the two parts import nothing of each other; a test holds that they agree.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kM]?)(s|steps|tokens)", text.strip(), re.ASCII)
    amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]] if match else 0.0
    if match is None or not 0 < amount < math.inf:
        raise UsageError(f"--budget {text}: expected something like 300s, 200steps or 5Mtokens")
    return amount, match[3]


@dataclass(frozen=True)
class TrialResult:
    """`status` is ok, interrupted, disturbed or a failure's name; `val_bpb` in bits per byte, with ok and disturbed. `error` has a
    failure's name, too, or what interrupted the trial: slept, watchdog or removed."""

    status: str
    seconds: float
    val_bpb: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """Its status; of an interrupted one, what interrupted it."""
        return str((self.error or {}).get("kind") or self.status)
