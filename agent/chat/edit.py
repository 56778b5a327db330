"""A coding agent made of one question: any OpenAI-compatible endpoint, answered in SEARCH/REPLACE blocks.

The prompt and the file are sent; blocks of the answer are applied exactly, or an error that names what was wrong is sent back,
once. The file is written only if the result is Python. The last line of standard output is a Reply as JSON.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from agent.chat.endpoint import Answer, ChatError
from agent.coders.coder import Reply, with_last_lines

Ask = Callable[[list[dict[str, str]]], Answer]

SYSTEM = """\
You improve one Python file. Change it with blocks of exactly this form, as many as you need, each for one place:

<<<<<<< SEARCH
lines of the file, exactly as they are now, enough of them to occur only once
=======
the lines to put there instead
>>>>>>> REPLACE

Lines in SEARCH must be complete and keep their indentation. Blocks are applied in order. Change no other file.
Then end with two lines:
HYPOTHESIS: why this should help
DESCRIPTION: what was changed, in a few words
"""
EXIT_CODES = {None: 0, "agent_error": 1, "login": 3, "rate_limit": 4, "missing": 5}  # 2 is usage


class EditError(Exception):
    """An answer that can't be applied. The message is written for the model: what was expected, what came."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


_THOUGHTS = re.compile(r"\A.*</think>", re.S)  # where the prompt's template opens them, the answer only closes them
_BLOCK = re.compile(r"^<{5,9} SEARCH[ \t]*\n(.*?)^={5,9}[ \t]*\n(.*?)^>{5,9} REPLACE[ \t]*$", re.M | re.S)


def apply_blocks(source: str, answer: str) -> str:
    """`source` with the answer's SEARCH/REPLACE blocks applied, in order. Raises EditError, and then nothing is applied:

    no_blocks, unfinished_block, empty_search, not_found, ambiguous, no_change, not_python."""
    answer = _THOUGHTS.sub("", answer).replace("\r\n", "\n")
    blocks = _BLOCK.findall(answer)
    opened = len(re.findall(r"^<{5,9} SEARCH", answer, re.M))
    if not opened:
        raise EditError("no_blocks", "expected at least one SEARCH/REPLACE block, found none")
    if opened != len(blocks):
        raise EditError("unfinished_block", f"{opened} blocks begin, {len(blocks)} are complete: SEARCH, =======, REPLACE")
    newline = "\r\n" if "\r\n" in source else "\n"
    text = source.replace("\r\n", "\n")
    for number, (search, replacement) in enumerate(blocks, 1):
        text = _replace(text, search, replacement, f"block {number} of {len(blocks)}")
    if text == source.replace("\r\n", "\n"):
        raise EditError("no_change", "the blocks leave the file as it was")
    try:
        ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        shown = text.splitlines()[line - 1].strip()[:120] if line and line <= len(text.splitlines()) else ""
        raise EditError("not_python", f"the edited file does not parse: {error}: {shown!r}") from error
    return text.replace("\n", newline)


def _replace(text: str, search: str, replacement: str, where: str) -> str:
    if not search.strip():
        raise EditError("empty_search", f"{where} searches for nothing; put the lines to replace there, or lines to extend")
    body = text if text.endswith("\n") else text + "\n"
    starts = [hit.start() for hit in re.finditer("^" + re.escape(search), body, re.M)]
    first = next(line for line in search.splitlines() if line.strip()).strip()[:120]
    if not starts:
        raise EditError("not_found", f"{where}: the lines of SEARCH, from {first!r}, are not in the file as they stand")
    if len(starts) > 1:
        raise EditError("ambiguous", f"{where}: the lines of SEARCH, from {first!r}, occur {len(starts)} times; add lines")
    return body[: starts[0]] + replacement + body[starts[0] + len(search) :]


def edit(ask: Ask, prompt: str, path: Path) -> Reply:
    """Asks for an edit of the file at `path` and writes it; an answer that can't be applied is sent back once.

    The reply's failure is None exactly if the file was written. Raises OSError for a file that can't be read or written."""
    with open(path, encoding="utf-8", newline="") as file:
        source = file.read()
    # a prompt that has the file in it already is not made twice as long
    shown = "" if source.strip() in prompt else f"\n\nThe file {path.name} as it is now:\n```python\n{source}\n```\n"
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt + shown}]
    reply = Reply()
    for attempt in (1, 2):
        try:
            answer = ask(messages)
        except ChatError as error:
            return _with(reply, None, error.failure, str(error), error.wait_seconds)
        reply = _with(reply, answer)
        try:
            if answer.cut_off:
                raise EditError("cut_off", "the reply was cut off by its length; use fewer and smaller blocks")
            edited = apply_blocks(source, answer.text)
        except EditError as error:
            problem = f"{error}"
            print(f"attempt {attempt}: {problem}", file=sys.stderr)
            messages += [
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": f"No block was applied. {problem}\nSend all blocks again, corrected."},
            ]
            continue
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(edited)
        return with_last_lines(reply)
    return _with(reply, None, "agent_error", problem)


def _with(
    before: Reply, answer: Answer | None, failure: str | None = None, detail: str | None = None, wait: float | None = None
) -> Reply:
    """`before` with an answer's usage added, or with a failure."""
    fields = asdict(before)
    if answer is not None:
        fields["message"] = _THOUGHTS.sub("", answer.text).strip() or None
        for key, count in (("tokens_in", answer.tokens_in), ("tokens_out", answer.tokens_out)):
            fields[key] = None if count is None and fields[key] is None else (fields[key] or 0) + (count or 0)
    return Reply(**{**fields, "failure": failure, "detail": detail, "wait_seconds": wait})


def finish(reply: Reply) -> None:
    """Prints the reply as the last line, and exits with the code of its failure."""
    if reply.detail:
        print(f"{reply.failure}: {reply.detail}", file=sys.stderr)
    print(json.dumps(asdict(reply), ensure_ascii=False), flush=True)
    raise SystemExit(EXIT_CODES[reply.failure])
