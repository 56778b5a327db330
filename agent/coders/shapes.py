"""Readers of what the command lines print: one function for each agent's output format.

A reader may raise on a shape it doesn't know; `Coder.reply` turns that into an `agent_error`. Text that an agent's model
wrote is never searched for failures: only error fields and standard error are.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from agent.coders.coder import Job, Reply
from agent.coders.error_text import LIMIT_OR_LOGIN, name_failure

MOST_STARTS = 1000  # tries to read an object in an output: each that fails takes time


def plain(stdout: str, log: str, job: Job) -> Reply:
    """A program that reports nothing: its output is the message."""
    reply = Reply(message=stdout.strip() or None)
    return _failed("", reply, log) if LIMIT_OR_LOGIN.search(log) else reply


def command(stdout: str, log: str, job: Job) -> Reply:
    """A user's own command, read as `plain`; a last line such as {"cost_usd": 0.02, "tokens_in": 900} tells what it used."""
    before, _, last = stdout.rstrip().rpartition("\n")
    told = next(_lines(last), {})
    known = {name: told[name] for name in ("cost_usd", "tokens_in", "tokens_out") if name in told}
    return replace(plain(before, log, job), **known) if known else plain(stdout, log, job)


def claude(stdout: str, log: str, job: Job) -> Reply:
    """One JSON object: `result`, `is_error`, `usage`, `total_cost_usd`. Cursor prints the same without the usage.

    With other settings it is the last of several, one a line or in an array."""
    result = _object(stdout)
    if result is None or (result.get("type") or "result") != "result":
        several = [*_lines(stdout), *_array(stdout)]
        result = next((item for item in reversed(several) if item.get("type") == "result"), None)
    if result is None:
        return _failed("", log=log or stdout)
    usage = result.get("usage") or {}
    inputs = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    cost, message = result.get("total_cost_usd"), _text(result.get("result"))
    known = Reply(_total(usage, *inputs), usage.get("output_tokens"), cost, message)
    if result.get("is_error"):
        return _failed(f"{result.get('api_error_status') or ''} {known.message or result.get('subtype')}", known)
    return known


def codex(stdout: str, log: str, job: Job) -> Reply:
    """JSON lines: `agent_message` items, `turn.completed` with usage, `turn.failed` and `error` with a message.

    Items of type `error` are warnings: a turn that has completed has not failed."""
    known, errors, completed, at_work = Reply(), [], False, ""
    for event in _lines(stdout):
        kind = event.get("type")
        item = event.get("item") or {}
        if kind == "item.completed" and item.get("type") != "error":
            at_work = _text(item.get("type")) or at_work
        if kind == "item.completed" and item.get("type") == "agent_message":
            known = replace(known, message=_text(item.get("text")))
        elif kind == "turn.completed":
            completed = True
            known = _add(known, _total(event["usage"], "input_tokens"), _total(event["usage"], "output_tokens"))
        elif kind in ("error", "turn.failed"):
            errors.append(str(event.get("message") or (event.get("error") or {}).get("message")))
    if completed and not known.tokens_out and not known.message:
        return _failed("an empty turn: the model said nothing", known)
    if completed:
        return known
    known = replace(known, message=known.message or at_work or None)  # a turn that fails tells no tokens, but has used some
    return _failed("\n".join(errors), known, log or stdout)


def gemini(stdout: str, log: str, job: Job) -> Reply:
    """One JSON object: `response`, `stats.models.*.tokens`; on failure an `error` object, on standard error."""
    result = _object(stdout)
    if result is None:
        error = (_object(log) or {}).get("error")
        return _failed(f"{error.get('code')} {error.get('message')}" if error else "", log=log or stdout)
    known = Reply(message=_text(result.get("response")))
    for model in (result.get("stats") or {}).get("models", {}).values():
        known = _add(known, _total(model["tokens"], "prompt"), _total(model["tokens"], "candidates", "thoughts"))
    if error := result.get("error"):
        return _failed(f"{error.get('code')} {error.get('message')}", known)
    if known.tokens_out is None:  # it has stopped a model that went round in circles
        return _failed("; ".join(map(str, result.get("warnings") or [])), known, log or "no answer was finished")
    return known


def opencode(stdout: str, log: str, job: Job) -> Reply:
    """JSON lines: `text`, `step_finish` with tokens and cost, `error` with status and headers."""
    known, error, cost, finished = Reply(), "", 0.0, False
    for event in _lines(stdout):
        part = event.get("part") or {}
        if event.get("type") == "text":
            known = replace(known, message=_text(part.get("text")))
        elif event.get("type") == "step_finish":
            tokens, finished = part["tokens"], part.get("reason") == "stop"
            cache = _total(tokens.get("cache") or {}, "read", "write") or 0
            known = _add(known, (_total(tokens, "input") or 0) + cache, _total(tokens, "output", "reasoning"))
            cost += part.get("cost") or 0
        elif event.get("type") == "error":
            data = event["error"].get("data") or {}
            wait = (data.get("responseHeaders") or {}).get("retry-after")
            error = f"{data.get('statusCode') or ''} {data.get('message') or event['error'].get('name')}"
            if event["error"].get("name") == "UnknownError":  # only the log says what it was
                error += "\n" + "\n".join(re.findall(r"^ERROR.*?error=(.*)", log, re.M))
            error += f" (retry-after: {wait})" if wait else ""
    known = replace(known, cost_usd=cost or None)  # 0 is what it says of a model whose price it doesn't know
    return known if finished and not error else _failed(error, known, log or stdout)


def qwen(stdout: str, log: str, job: Job) -> Reply:
    """A JSON array whose last element is the result. An API error is a result like any other, marked in its text."""
    several = _array(stdout)
    if not several:
        return _failed("", log=log or stdout)
    result = several[-1]
    usage = result.get("usage") or {}
    message = _text(result.get("result"))
    known = Reply(_total(usage, "input_tokens"), _total(usage, "output_tokens"), message=message)
    if result.get("is_error") or (known.message or "").startswith("[API Error"):
        return _failed(known.message or str(result.get("error")), known)
    return known


def copilot(stdout: str, log: str, job: Job) -> Reply:
    """JSON lines: `assistant.message`, `session.error`; tokens in the usage file."""
    known, error, ended = Reply(), "", False
    for event in _lines(stdout):
        data = event.get("data") or {}
        if event.get("type") == "assistant.message" and _text(data.get("content")):
            known, error = replace(known, message=_text(data.get("content"))), ""
        elif event.get("type") == "session.error":
            error = f"{data.get('statusCode') or ''} {data.get('message') or data.get('errorType')}"
        elif event.get("type") == "model.call_failure":  # it tries again, and may be ended while it does
            error = f"{data.get('statusCode') or ''} {data.get('errorMessage') or ''}"
        ended = ended or event.get("type") == "result"
    for model in _file(job.scratch_file("usage.json")).get("modelMetrics", {}).values():
        known = _add(known, _total(model["usage"], "inputTokens"), _total(model["usage"], "outputTokens"))
    return known if ended and not error else _failed(error, known, log or stdout)


_AIDER_TOKENS = re.compile(
    r"^Tokens: ([\d.,]+)([kM]?) sent[^:]{0,100}?([\d.,]+)([kM]?) received\.(?:\s+Cost: \$([\d.]+) message)?", re.M | re.S
)


def aider(stdout: str, log: str, job: Job) -> Reply:
    """Plain text: `Tokens: 1.2k sent, 50 received. Cost: $0.01 message, ...` after every answer."""
    known = Reply(message=_text(stdout.rpartition(" to the chat.\n")[2]))
    cost, end = 0.0, 0
    for line in _AIDER_TOKENS.finditer(stdout):
        known = _add(known, _abbreviated(line[1], line[2]), _abbreviated(line[3], line[4]))
        cost, end = cost + float(line[5] or 0), line.end()
    if end:
        return replace(known, cost_usd=cost or None)
    errors = re.findall(r"^(?:litellm\.|The API provider)[^\n]*(?:\n(?!The API|Retrying)[^\n]+)*", stdout, re.M)
    return _failed("\n".join(errors), known, log or stdout)


def goose(stdout: str, log: str, job: Job) -> Reply:
    """One JSON object with `messages`, as documented; its totals don't tell input from output."""
    result = _object(stdout)
    if result is None:
        return _failed("", log=log or stdout)
    said = [part.get("text") for message in result.get("messages") or [] if message.get("role") == "assistant"
            for part in message.get("content") or []]  # fmt: skip
    return Reply(message=_text("\n".join(text for text in said if text)))


def own(stdout: str, log: str, job: Job) -> Reply:
    """This project's own agents: the last line of standard output is a Reply as JSON."""
    last = stdout.strip().rpartition("\n")[2]
    if not last.startswith("{"):
        return _failed("", log=log or stdout)
    fields = json.loads(last)
    return Reply(**{key: value for key, value in fields.items() if key in Reply.__dataclass_fields__})


def _failed(error: str, known: Reply | None = None, log: str = "") -> Reply:
    """A failure by the text of an error field; by the words of a log where that field is missing or empty."""
    named = name_failure(error or log)
    detail = named.detail or "it said nothing"
    return replace(known or Reply(), failure=named.failure, detail=detail, wait_seconds=named.wait_seconds, structured=bool(error))


def _add(reply: Reply, tokens_in: int | None, tokens_out: int | None) -> Reply:
    sums = (reply.tokens_in or 0) + (tokens_in or 0), (reply.tokens_out or 0) + (tokens_out or 0)
    return replace(reply, tokens_in=sums[0], tokens_out=sums[1])


def _total(counts: dict[str, Any], *keys: str) -> int | None:
    """The sum of the counts that are there, or None where none of them is."""
    present = [int(counts[key]) for key in keys if counts.get(key) is not None]
    return sum(present) if present else None


def _text(value: object) -> str | None:
    return (value.strip() or None) if isinstance(value, str) else None


def _abbreviated(number: str, unit: str) -> int:
    return round(float(number.replace(",", "")) * {"": 1, "k": 1_000, "M": 1_000_000}[unit])


def _lines(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a text that has one a line; other lines are warnings, or cut off by a kill."""
    failed = 0
    for line in text.splitlines():
        if line.lstrip().startswith("{") and line.rstrip().endswith("}") and failed < MOST_STARTS:
            try:
                item = json.loads(line)
            except (ValueError, RecursionError):
                failed += 1
                continue
            if isinstance(item, dict):
                yield item


def _object(text: str) -> dict[str, Any] | None:
    """The first JSON object that starts a line of `text`, however many lines it has, or None."""
    for start in islice(re.finditer(r"^[ \t]*(?=\{\s*\")", text, re.M), MOST_STARTS):
        try:
            item = json.JSONDecoder().raw_decode(text, start.end())[0]
        except (ValueError, RecursionError):
            continue
        if isinstance(item, dict):
            return item
    return None


def _array(text: str) -> list[dict[str, Any]]:
    """The objects of the first JSON array that starts a line of `text`, [] without one."""
    start = re.search(r"^\[", text, re.M)
    try:
        items = json.JSONDecoder().raw_decode(text, start.start())[0] if start else []
    except (ValueError, RecursionError):
        return []
    return [item for item in items if isinstance(item, dict)]


def _file(path: str) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8") as file:
        if isinstance(item := json.load(file), dict):
            return item
    return {}
