"""What is asked of a trial, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrialResult:
    """`status` is ok, interrupted, disturbed or a failure's name; `val_bpb` in bits per byte, with ok and disturbed."""

    status: str
    seconds: float
    val_bpb: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
