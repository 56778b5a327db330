"""A coding agent made of one question: any OpenAI-compatible endpoint, answered in SEARCH/REPLACE blocks.

The prompt and the file are sent; the answer is applied as `agent/chat/blocks.py` reads it, or an error that names what was wrong is
sent back, once. A prompt that the model's context can't hold is shortened, once. The last line of standard output is a Reply.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click

from agent.chat.blocks import EditError, apply_answer, spoken
from agent.chat.endpoint import LARGER_CONTEXT, Answer, ChatError
from agent.coders.coder import Failure, Reply, with_last_lines
from agent.text import one_line, redact

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
SENT_BACK = 20_000  # characters of a bad answer that its model gets to see again
LARGEST_PROMPT = 36_000  # characters of a night's prompt, at most: agent/proposal/briefing.py
EDIT_TOKENS = 600  # of an answer with a small edit, for the time that is told before a night
ROOM_FOR_ANSWER = 2048  # tokens
LEAST_PROMPT = 1500  # characters that a shortened prompt has at least: what to do, and some of what is known
CHARACTERS_PER_TOKEN = 3.0  # of Python and English; more only makes a context look smaller than it is
_CUT = "\n\n(... {} characters are left out here: the model's context is too small for them ...)\n\n"


@dataclass
class Conversation:
    """One prompt and file before one model: what is sent, and what it has cost so far."""

    ask: Ask
    prompt: str
    file: str  # with its heading
    question: str = ""  # in place of an edit
    usage: Reply = field(default_factory=Reply)
    since: list[dict[str, str]] = field(default_factory=list)  # an answer that was sent back, and why
    notes: list[str] = field(default_factory=list)  # for the human

    def next(self) -> Answer:
        """The next answer; its tokens are added up. Raises ChatError."""
        try:
            answer = self.ask(self._messages())
        except ChatError as error:
            if not error.too_small:
                raise
            self._shorten(error)
            try:
                answer = self.ask(self._messages())
            except ChatError as again:
                raise _cannot_hold(again, self.length()) if again.too_small else again from None
        self.usage = replace(
            self.usage, tokens_in=_sum(self.usage.tokens_in, answer.tokens_in),
            tokens_out=_sum(self.usage.tokens_out, answer.tokens_out),
            message=printable(spoken(answer.text)[0])[-SENT_BACK:] or None,
        )  # fmt: skip
        return answer

    def send_back(self, answer: Answer, error: EditError) -> None:
        """Let the next question name what was wrong. Servers refuse an empty answer in a conversation: that one is left out."""
        near = f"\nThe nearest lines of the file are, exactly:\n```python\n{error.shown}\n```" if error.shown else ""
        complaint = f"No block was applied. {error}{near}\nSend all blocks again, corrected."
        said = printable(spoken(answer.text)[0])[:SENT_BACK]
        if said.strip():
            self.since = [{"role": "assistant", "content": said}, {"role": "user", "content": complaint}]
        else:
            self.prompt += f"\n\n# An earlier answer to this\n{complaint} Answer with the blocks at once; think less before.\n"

    def _messages(self) -> list[dict[str, str]]:
        content = self.prompt + self.file + (f"\n\n{self.question}\n" if self.question else "")
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}, *self.since]

    def length(self) -> int:
        return sum(len(message["content"]) for message in self._messages())

    def _shorten(self, error: ChatError) -> None:
        """Leave out the middle of the prompt, never of the file. Raises ChatError where even that is too much."""
        length = self.length()
        fits = len(self.prompt) // 3  # where the server tells no number
        if error.context:
            per_token = max(1.0, length / error.sent) if error.sent else CHARACTERS_PER_TOKEN
            room = int((error.context - min(ROOM_FOR_ANSWER, error.context // 3)) * per_token * 0.95)
            fits = len(self.prompt) - (length - room)
        if not LEAST_PROMPT <= fits < len(self.prompt):
            raise _cannot_hold(error, length)
        left_out = len(self.prompt) - fits + len(_CUT)
        head, tail = fits // 3, fits - fits // 3 - len(_CUT)
        size = f" of {error.context:,} tokens" if error.context else ""
        cut = f"{left_out:,} of {length:,} characters were left out"
        self.notes.append(f"the model's context{size} is too small for the prompt: {cut}; {LARGER_CONTEXT}")
        self.prompt = self.prompt[:head] + _CUT.format(f"{left_out:,}") + self.prompt[-tail:]


def _cannot_hold(error: ChatError, length: int) -> ChatError:
    """The failure of a context that is too small for the file itself: no later experiment would fare better."""
    tokens = error.sent or int(length / CHARACTERS_PER_TOKEN)
    size = f" of {error.context:,} tokens" if error.context else ""
    return ChatError(
        "missing", f"the model's context{size} can't hold file, prompt and answer (about {tokens + ROOM_FOR_ANSWER:,} tokens); "
        f"{LARGER_CONTEXT}. The server said: {error}", too_small=True, context=error.context,
    )  # fmt: skip


def edit(ask: Ask, prompt: str, path: Path) -> Reply:
    """Ask for an edit of the file at `path` and write it; an answer that can't be applied is sent back once.

    The reply's failure is None exactly if the file was written. Raises OSError for a file that can't be read or written."""
    source = _read(path)
    if len(source.strip()) > 20:  # it is sent once, where shortening leaves it alone
        prompt = prompt.replace(source.strip(), "(the file is below)")
    talk = Conversation(ask, prompt, _shown(path, source))
    problems: list[str] = []
    for attempt in (1, 2):
        try:
            answer = talk.next()
        except ChatError as error:
            before = f"{problems[-1]}; and then: " if problems and error.failure == "agent_error" else ""
            return _failed(talk.usage, error.failure, f"{before}{error}", error.wait_seconds)
        try:
            if answer.cut_off:
                raise EditError("cut_off", _cut_off(answer))
            edited = apply_answer(source, answer.text, answer.reasoning)
        except EditError as error:
            problems.append(f"{error}{_hint(talk, answer)}")
            print(f"attempt {attempt}: {redact(one_line(problems[-1], 500))}", file=sys.stderr)
            talk.send_back(answer, error)
            continue
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(edited)
        _tell(talk)
        return with_last_lines(talk.usage)
    _tell(talk)
    return _failed(talk.usage, "agent_error", problems[-1])


def check(ask: Ask, prompt: str, path: Path, start_seconds: float = 0.0) -> Reply:
    """Ask two questions and say how long a proposal will take. The file stays.

    The first is short: a server that answers nothing is found out soon, a model is loaded, and it shows how fast that writes. The
    second wants one word, with a prompt as long as a night's longest. `start_seconds`: what each proposal takes before it asks.
    """
    source = _read(path)
    filler = (prompt + f"\n{source}" * (LARGEST_PROMPT // (len(source) + 1) + 1))[:LARGEST_PROMPT]
    talk = Conversation(ask, f"# As long as what an experiment will be told\n{filler}\n", _shown(path, source))
    talk.question = "This only tests the connection. Change nothing, write no blocks; answer with the one word: ready"
    counting = [{"role": "user", "content": "Count from 1 to 60 in digits, separated by blanks. Write nothing else."}]
    try:
        counted = ask(counting)
        answer = talk.next()
    except ChatError as error:
        return _failed(talk.usage, error.failure, str(error), error.wait_seconds)
    if not (answer.text.strip() or answer.reasoning.strip()):
        empty = f"an empty answer to a prompt of {talk.length():,} characters{_hint(talk, answer)}"
        return _failed(talk.usage, "agent_error", empty)
    load = counted.first if counted.first < 0.9 * counted.seconds else 0.0  # of an answer that came at once nothing is known
    tokens = counted.tokens_out or (len(counted.text) + len(counted.reasoning)) / CHARACTERS_PER_TOKEN
    speed = max(tokens, 1.0) / max(counted.seconds - load, 1e-3)
    before = start_seconds + load + answer.seconds
    size = f"{answer.tokens_in:,} tokens" if answer.tokens_in else f"{talk.length():,} characters"
    about = _rounded(before + EDIT_TOKENS / speed)
    words = f"about {about} s a proposal: {before:.0f} s to start and read {size}, then {speed:.0f} tokens/s"
    _tell(talk)
    hint = _hint(talk, answer).lstrip("; ")
    return replace(talk.usage, message="; ".join([words, *talk.notes, *([hint] if hint else [])]))


def answer_prompt(work: Callable[[str], Reply]) -> None:
    """Read the prompt from standard input, do the work, print the reply as the last line, and exit with the code of its failure."""
    prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    if not prompt.strip():
        raise click.UsageError("no prompt; expected it on standard input")
    try:
        reply = work(prompt)
    except ChatError as error:
        reply = Reply(failure=error.failure, detail=str(error), wait_seconds=error.wait_seconds)
    except Exception as error:  # a traceback could show what must stay secret, and says nothing to a person
        reply = Reply(failure="agent_error", detail=redact(f"{type(error).__name__}: {error}")[:500])
    if reply.detail:
        print(f"{reply.failure}: {printable(reply.detail)}", file=sys.stderr)
    print(json.dumps(asdict(reply)), flush=True)
    raise SystemExit(EXIT_CODES[reply.failure])


def printable(text: str) -> str:
    """Text that UTF-8 can hold: half an emoji becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(path: Path) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def _shown(path: Path, source: str) -> str:
    return f"\n\nThe file {path.name} as it is now:\n```python\n{source}\n```\n"


def _cut_off(answer: Answer) -> str:
    if not answer.text.strip():
        return "the whole reply went into reasoning: raise --max-tokens or the model's context, or let the model reason less"
    return "the reply was cut off by its length: use fewer and smaller blocks, or raise --max-tokens, or the model's context"


def _hint(talk: Conversation, answer: Answer) -> str:
    """What an answer's usage says about a failed edit: some servers cut a prompt silently to their context."""
    length = talk.length()
    if answer.tokens_in and answer.tokens_out == 0:
        return f"; the prompt of {answer.tokens_in:,} tokens may fill the model's context: {LARGER_CONTEXT}"
    if answer.tokens_in and length > 8000 and length > 10 * answer.tokens_in:
        read = f"; the server read {answer.tokens_in:,} tokens of {length:,} characters"
        return f"{read}: its context may be too small; {LARGER_CONTEXT}"
    return ""


def _tell(talk: Conversation) -> None:
    for note in talk.notes:
        print(f"note: {note}", file=sys.stderr)


def _sum(before: int | None, more: int | None) -> int | None:
    return None if before is None and more is None else (before or 0) + (more or 0)


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds < 20 else f"{round(seconds, -1):.0f}"


def _failed(usage: Reply, failure: Failure, detail: str, wait: float | None = None) -> Reply:
    words = redact(printable(re.sub(r"\s+", " ", detail)))[:1500]
    return replace(usage, failure=failure, detail=words, wait_seconds=wait)
