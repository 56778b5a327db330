"""Tell what an agent's error text means: a rate limit and how long to wait, an expired login, or any other failure."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Literal
from zoneinfo import ZoneInfo

from dateutil import parser as dates

Failure = Literal["rate_limit", "login", "missing", "agent_error"]

_RATE = (
    r"(?<!line )\b(?:429|529)\b|rate.?limit|too many requests|usage limit|limit reached|insufficient.?quota|resource.?exhausted"
    r"|quota.{0,20}(?:exceeded|exhausted|reached|used up)|(?:exceed\w*|exhausted|over|out of).{0,20}quota|overloaded"
    r"|out of (?:credits|tokens)|hit your .{0,20}limit|insufficient.{0,10}(?:credit|balance|funds)"
)
_LOGIN = (
    r"(?<!line )\b401\b|unauthori[sz]ed|authenticat(?:ion|e)\b|(?:not |un)authenticated|not (?:logged|signed) in"
    r"|(?:log|sign) ?in (?:to|again|first|with)|/login\b"
    r"|invalid.{0,20}api.?key|incorrect api.?key|api.?key not valid|token (?:has )?expired|auth method"
    r"|(?:missing|no|set).{0,30}api.?key|api.?key.{0,30}(?:required|not set|missing)|no credentials"
)
RATE, LOGIN = re.compile(_RATE, re.I), re.compile(_LOGIN, re.I)
LIMIT_OR_LOGIN = re.compile(f"{_RATE}|{_LOGIN}", re.I)

_PART = r"(\d+(?:\.\d+)?)\s*(milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)(?![a-z])"
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_CUE = re.compile(r"\b(?:retry-?after|retry(?!ing| wait)|try again|wait(?! time)|retryDelay|resets?|available|again|until)\b", re.I)
_SPAN = re.compile(rf"^\D{{0,40}}?({_PART}(?:[\s,]*(?:and\s+)?{_PART})*)", re.I)
_HEADER = re.compile(r"(?:retry-?after|ratelimit-reset)(?:-?seconds)?[\s:=\"']{0,4}(\d+(?:\.\d+)?)(?![\w:.-])", re.I)
_EPOCH = re.compile(r"(?:limit reached\||resets?[_ ]?(?:at|time)?\W{1,4})(\d{10})(\d{3})?\b", re.I)
_MONTH = r"(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*\.?"
_DAY = rf"(?:\d{{4}}-\d\d-\d\d|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?|\d{{1,2}}(?:st|nd|rd|th)? {_MONTH}(?:,? \d{{4}})?)"
_TIME = r"\d{1,2}(?::\d\d(?::\d\d(?:\.\d+)?)?(?: ?[ap]\.?m\b\.?)?| ?[ap]\.?m\b\.?)"
_ZONE = r"(?:Z|[+-]\d\d:?\d\d|\(?(?:UTC|GMT|[A-Z][a-z]+/[A-Za-z_]+|[PMCE][SD]?T)\)?)"
_WEEKDAY = r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]{0,6},? )?"
_WHEN = re.compile(
    rf"^\W{{0,4}}(?:(?:at|on|by|time)\W{{1,3}}){{0,2}}{_WEEKDAY}({_DAY})?(?:[, T]| at ){{0,3}}({_TIME})(?: ?({_ZONE}))?",
    re.I,
)
_US = {"P": "America/Los_Angeles", "M": "America/Denver", "C": "America/Chicago", "E": "America/New_York"}
LONGEST_WAIT = 7 * 86400.0  # seconds; a number that claims more than a week is not a wait
MOST_TEXT = 100_000  # characters at the beginning of a log, and as many at its end
MOST_CUES = 100  # the last ones: a log may hold the same refusal thousands of times
JUST_PAST = 900.0  # seconds; a moment this long ago means that the limit lifts now: clocks differ, and the message took a while
SOON = 30.0  # seconds to wait for a limit that lifts now


@dataclass(frozen=True)
class Named:
    failure: Failure
    detail: str  # the line that says so
    wait_seconds: float | None = None


def name_failure(text: str) -> Named:
    """Name the failure that an agent's error text tells of. Neither a limit nor a login: `agent_error`.

    Of a long text its beginning and its end are read."""
    if len(text) > 2 * MOST_TEXT:
        text = f"{text[:MOST_TEXT]}\n{text[-MOST_TEXT:]}"
    if hit := RATE.search(text):
        return Named("rate_limit", line_at(text, hit.start()), wait_seconds(text))
    if hit := LOGIN.search(text):
        return Named("login", line_at(text, hit.start()))
    words = [hit.start() for hit in re.finditer(r"[^\W\d]{3}", text)]  # not the closing bracket of some JSON
    return Named("agent_error", line_at(text, words[-1] if words else 0))


def wait_seconds(text: str, now: float | None = None) -> float | None:
    """The longest wait that a rate limit's text gives, in seconds, or None.

    Understood: `try again in 1h 20m`, `retry-after: 20`, a Unix time, `resets 3pm (Europe/Berlin)`, `at 21:00`, `Nov 28, 9am`, ISO
    8601. A time without a zone is local. A moment that has just passed means soon. now: a Unix time."""
    now = time.time() if now is None else now
    text = " ".join(text.split())  # a wait may be wrapped over two lines
    waits = [float(hit[1]) for hit in _HEADER.finditer(text)]
    moments = [float(hit[1]) for hit in _EPOCH.finditer(text)]
    for cue in list(_CUE.finditer(text))[-MOST_CUES:]:
        following = text[cue.end() : cue.end() + 120]
        if (moment := _moment(following, now)) is not None:
            moments.append(moment)
        elif span := _SPAN.search(following):
            waits.append(sum(_in_seconds(number, unit) for number, unit in re.findall(_PART, span[1], re.I)))
    waits += [SOON if -JUST_PAST < moment - now <= 0 else moment - now for moment in moments]
    waits = [wait for wait in waits if 0 < wait <= LONGEST_WAIT]
    return max(waits) if waits else None


def _moment(text: str, now: float) -> float | None:
    """The Unix time of the date and time that a text begins with, if it does."""
    hit = _WHEN.search(text)
    if hit is None:
        return None
    day, clock, zone = hit.groups()
    try:
        here = datetime.fromtimestamp(now, _zone(zone))
        found = dates.parse(f"{day or ''} {clock}".strip(), default=here.replace(minute=0, second=0, microsecond=0))
        if day is None and found.timestamp() <= now - JUST_PAST:
            found += timedelta(days=1)
        elif day and not re.search(r"\d{4}", day) and found.timestamp() < now - 182 * 86400:
            found = found.replace(year=found.year + 1)  # "Jan 2", said in December
        return found.timestamp()
    except (ValueError, OverflowError):  # there is no such moment: a zone of +99:99, 25:00, the year 0, a leap day next year
        return None


def _zone(text: str | None) -> tzinfo | None:
    """A time zone by its name, abbreviation or offset. None: this machine's."""
    name = (text or "").strip("()")
    if name.upper() in ("Z", "UTC", "GMT"):
        return timezone.utc
    if offset := re.fullmatch(r"([+-])(\d\d):?(\d\d)", name):
        minutes = int(offset[2]) * 60 + int(offset[3])
        return timezone(timedelta(minutes=-minutes if offset[1] == "-" else minutes))
    try:
        return ZoneInfo(name if "/" in name else _US[name[:1].upper()]) if name else None
    except (KeyError, ValueError, OSError):
        return None


def _in_seconds(number: str, unit: str) -> float:
    if unit.lower().startswith(("ms", "mill")):
        return float(number) / 1000
    return float(number) * _SECONDS[unit[0].lower()]


def line_at(text: str, position: int, width: int = 300) -> str:
    """The line of `text` around `position`, at most `width` characters: enough to name a failure by."""
    position = max(0, position)
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : len(text) if end < 0 else end]
    middle = max(0, min(position - start - width // 2, len(line) - width))
    return line[middle : middle + width].strip()
