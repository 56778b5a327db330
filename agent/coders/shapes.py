"""Readers of what the command lines print: one function for each agent's output format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.coders.base import Job, Report
from agent.coders.failures import name_failure


def _failed(text: str, known: Report | None = None) -> Report:
    named = name_failure(text)
    known = known or Report()
    return replace(known, failure=named.failure, detail=named.detail, wait_seconds=named.wait_seconds)


def plain(stdout: str, log: str, job: Job) -> Report:
    """A program that reports nothing: its output is the message."""
    return Report(message=stdout.strip() or None)


def claude(stdout: str, log: str, job: Job) -> Report:
    """One JSON object: `result`, `is_error`, `usage`, `total_cost_usd`."""
    result = _last_object(stdout)
    if result is None:
        return _failed(log or stdout)
    usage = result.get("usage") or {}
    inputs = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    message = (result.get("result") or "").strip() or None
    known = Report(
        tokens_in=sum(usage.get(key) or 0 for key in inputs) if usage else None,
        tokens_out=usage.get("output_tokens"),
        cost_usd=result.get("total_cost_usd"),
        message=message,
    )
    if result.get("is_error"):
        return _failed(f"{result.get('api_error_status') or ''} {message or result.get('subtype')}", known)
    return known


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a text that has one a line; other lines are somebody's warnings."""
    for line in text.splitlines():
        if line.lstrip().startswith("{"):
            try:
                item = json.loads(line)
            except ValueError:
                continue
            if isinstance(item, dict):
                yield item


def _last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object at the end of `text`, on one line or on many, or None."""
    for start in [hit.start() for hit in re.finditer(r"^[ \t]*\{", text, re.M)]:
        try:
            item = json.loads(text[start:])
        except ValueError:
            continue
        if isinstance(item, dict):
            return item
    return None


def scratch_json(job: Job, name: str) -> dict[str, Any]:
    try:
        item = json.loads(Path(job.scratch_file(name)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return item if isinstance(item, dict) else {}
