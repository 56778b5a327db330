"""Names for what an agent's error text says: a rate limit and how long to wait, an expired login, anything else."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from agent.coders.coder import Failure

_RATE = (
    r"(?<!line )\b(?:429|529)\b|rate.?limit|too many requests|usage limit|limit reached|quota|resource.?exhausted|overloaded"
    r"|out of (?:credits|tokens)|hit your .{0,20}limit|insufficient.{0,10}(?:credit|balance|funds)"
)
_LOGIN = (
    r"(?<!line )\b401\b|unauthori[sz]ed|authenticat|not (?:logged|signed) in|(?:log|sign) ?in (?:to|again|first|with)|/login\b"
    r"|invalid.{0,20}api.?key|incorrect api.?key|api.?key not valid|token (?:has )?expired|auth method"
    r"|(?:missing|no|set).{0,30}api.?key|api.?key.{0,30}(?:required|not set|missing)|no credentials"
)
RATE, LOGIN = re.compile(_RATE, re.I), re.compile(_LOGIN, re.I)
LIMIT_OR_LOGIN = re.compile(f"{_RATE}|{_LOGIN}", re.I)

_PART = r"(\d+(?:\.\d+)?)\s*(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)(?![a-z])"
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_CUE = re.compile(r"\b(?:retry(?!ing| wait)|try again|wait(?! time)|retryDelay|resets?|available|again)\b", re.I)
_SPAN = re.compile(rf"^\D{{0,40}}?({_PART}(?:[\s,]*(?:and\s+)?{_PART})*)", re.I)
_HEADER = re.compile(r"retry-?after(?:-?seconds)?\W{0,4}(\d+(?:\.\d+)?)(?![\d:.-])", re.I)
_EPOCH = re.compile(r"(?:limit reached\||resets?[_ ]?(?:at|time)?\W{1,4})(\d{10})\b", re.I)
_CLOCK = re.compile(r"\b(?:resets?|again)(?: at)? (\d{1,2})(?::(\d{2}))? ?([ap])\.?m\b", re.I)
LONGEST_WAIT = 7 * 86400.0  # a number that claims more than a week is not a wait


@dataclass(frozen=True)
class Named:
    failure: Failure
    detail: str  # the line that says so
    wait_seconds: float | None = None


def name_failure(text: str) -> Named:
    """Names an error text that some agent printed. Whatever is neither a limit nor a login is an `agent_error`."""
    if hit := RATE.search(text):
        return Named("rate_limit", line_at(text, hit.start()), wait_seconds(text))
    if hit := LOGIN.search(text):
        return Named("login", line_at(text, hit.start()))
    words = [hit.start() for hit in re.finditer(r"[^\W\d]{3}", text)]  # not the closing bracket of some JSON
    return Named("agent_error", line_at(text, words[-1] if words else 0))


def wait_seconds(text: str, now: float | None = None) -> float | None:
    """The longest wait that a rate limit's text gives, in seconds, or None.

    Understood: `try again in 1h 20m`, `retry-after: 20`, `resets 3pm` (local time), a Unix time. `now` is a Unix time."""
    now = time.time() if now is None else now
    text = " ".join(text.split())  # a wait may be wrapped over two lines
    waits = [float(hit[1]) for hit in _HEADER.finditer(text)]
    waits += [float(hit[1]) - now for hit in _EPOCH.finditer(text)]
    waits += [_until(int(hit[1]), int(hit[2] or 0), hit[3].lower() == "p", now) for hit in _CLOCK.finditer(text)]
    for cue in _CUE.finditer(text):
        if span := _SPAN.search(text[cue.end() : cue.end() + 120]):
            waits.append(sum(_in_seconds(number, unit) for number, unit in re.findall(_PART, span[1], re.I)))
    waits = [wait for wait in waits if 0 < wait <= LONGEST_WAIT]
    return max(waits) if waits else None


def _in_seconds(number: str, unit: str) -> float:
    if unit.lower().startswith(("ms", "mill")):
        return float(number) / 1000
    return float(number) * _SECONDS[unit[0].lower()]


def _until(hour: int, minute: int, afternoon: bool, now: float) -> float:
    local = time.localtime(now)
    seconds = ((hour % 12 + 12 * afternoon) * 60 + minute) * 60
    return float((seconds - (local.tm_hour * 60 + local.tm_min) * 60 - local.tm_sec) % 86400)


def line_at(text: str, position: int, width: int = 300) -> str:
    """The line of `text` around `position`, at most `width` characters: enough to name a failure by."""
    position = max(0, position)
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : len(text) if end < 0 else end]
    if len(line) > width:
        middle = max(0, min(position - start - width // 2, len(line) - width))
        line = line[middle : middle + width]
    return line.strip()
