"""Names for what an agent's error text says: a rate limit and how long to wait, an expired login, anything else."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from agent.coders.base import Failure

_RATE = re.compile(
    r"\b(?:429|529)\b|rate.?limit|too many requests|usage limit|quota|resource.?exhausted|overloaded"
    r"|out of (?:credits|tokens)|hit your .{0,20}limit",
    re.I,
)
_LOGIN = re.compile(
    r"\b401\b|unauthori[sz]ed|authenticat|not (?:logged|signed) in|(?:log|sign) ?in (?:to|again|first|with)|/login\b"
    r"|invalid (?:x-)?api.?key|incorrect api.?key|api.?key not valid|token (?:has )?expired|auth method"
    r"|(?:missing|no|set) .{0,30}api.?key|api.?key .{0,30}(?:required|not set|missing)|credentials",
    re.I,
)
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_PART = r"(\d+(?:\.\d+)?)\s*(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)\b"
_SPAN = re.compile(
    r"(?:retry|try again|wait|resets?|reset|available|again)[^.\n]{0,40}?\b(?:in|after|for)?:?\s*"
    rf"((?:{_PART.replace('(', '(?:', 1).replace('(milli', '(?:milli')}[\s,and]*)+)",
    re.I,
)
_HEADER = re.compile(r"retry-?after(?:-?seconds)?[\"']?\s*[:=]?\s*[\"']?(\d+(?:\.\d+)?)(ms|s)?\b", re.I)
_EPOCH = re.compile(r"limit reached\|(\d{10})\b|resets?_?at[\"']?\s*[:=]\s*(\d{10})\b", re.I)
LONGEST_WAIT = 7 * 86400.0  # a number that claims more than a week is not a wait


@dataclass(frozen=True)
class Named:
    failure: Failure
    detail: str
    wait_seconds: float | None = None


def name_failure(text: str) -> Named:
    """Names an error text that some agent printed. Whatever is neither a limit nor a login is an `agent_error`."""
    for pattern, failure in ((_RATE, "rate_limit"), (_LOGIN, "login")):
        if hit := pattern.search(text):
            wait = wait_seconds(text) if failure == "rate_limit" else None
            return Named("rate_limit" if failure == "rate_limit" else "login", line_at(text, hit.start()), wait)
    return Named("agent_error", line_at(text, len(text.rstrip())))


def wait_seconds(text: str, now: float | None = None) -> float | None:
    """The wait a rate limit's text gives, in seconds, or None. `now` is the wall clock, for absolute times."""
    if hit := _EPOCH.search(text):
        seconds = float(hit[1] or hit[2]) - (time.time() if now is None else now)
        return seconds if 0 < seconds <= LONGEST_WAIT else None
    spans = [_seconds(hit[1]) for hit in _SPAN.finditer(text)]
    spans += [float(value) * (0.001 if unit == "ms" else 1.0) for value, unit in _HEADER.findall(text)]
    spans = [span for span in spans if 0 < span <= LONGEST_WAIT]
    return max(spans) if spans else None


def _seconds(span: str) -> float:
    total = 0.0
    for value, unit in re.findall(_PART, span, re.I):
        key = "ms" if unit.lower().startswith(("ms", "milli")) else unit[0].lower()
        total += float(value) * _UNITS[key]
    return total


def line_at(text: str, position: int, width: int = 300) -> str:
    """The line of `text` around `position`, at most `width` characters: enough to name a failure by."""
    position = max(0, min(position, len(text)) - (position >= len(text.rstrip()) > 0))
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : len(text) if end < 0 else end].strip()
    if len(line) <= width:
        return line
    middle = max(0, position - start - width // 2)
    return line[middle : middle + width]
