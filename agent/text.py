"""Text from outside, made safe: without secrets, control characters or line breaks. For logs, journal, prompts and report.

A secret is the value of an environment variable whose name looks like a key, or the password inside a URL. What this cannot
catch: a secret that is in no variable of the driver's (a key in a file), or one that a program prints transformed (base64,
reversed, a character a line).
"""

import ast
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from agent.files import read_part

SHORTEST = 8  # characters; a shorter value (`true`, `1`, `dev`) would blot out ordinary words

# KEY and TOKEN also live in harmless names: TOKENIZERS_PARALLELISM, KEYBOARD_LAYOUT, GNOME_KEYRING_CONTROL, MAX_TOKENS
_NAME = re.compile(
    r"KEY(?!BOARD|RING|MAP|TIMEOUT)|TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|(?:^|_)PASS(?:_|$)|CREDENTIAL|(?:^|_)PAT(?:_|$)"
    r"|(?:^|_)AUTH(?:_|$)|COOKIE|BEARER|PRIVATE|SIGNATURE|WEBHOOK|(?:^|_)DSN(?:_|$)",
    re.IGNORECASE,
)
_PART = re.compile(rb"[\s\\]*[\w\x80-\xff][\w\s\\\x80-\xff]*")  # of a dotted name, also where it is broken into lines
_MOST_DOTS = 500
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-_]?")  # colours, titles, the rest
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # can make text read as something else
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name is taken for a secret."""
    return _NAME.search(name) is not None


def secrets_in(env: Mapping[str, str]) -> dict[str, str]:
    """Secret text -> name of the variable that holds it, in every form in which it is likely to be printed."""
    found: dict[str, str] = {}
    for name, value in env.items():
        for secret in _secret_parts(name, value):
            lines = [line.strip() for line in secret.splitlines() if len(line.strip()) >= 20]  # a PEM key, shown in part
            for plain in [secret, secret.strip(), *lines]:
                # as itself, inside a JSON string, inside a URL
                for form in (plain, json.dumps(plain)[1:-1], json.dumps(plain, ensure_ascii=False)[1:-1], quote(plain, safe="")):
                    if len(form) >= SHORTEST:
                        found.setdefault(form, name)
    return found


def redact(text: str, env: Mapping[str, str] | None = None) -> str:
    """`text` with every secret of `env` (default: the driver's own environment) replaced by `[redacted NAME]`."""
    redactor = Redactor(secrets_in(os.environ if env is None else env))
    clean = redactor.feed(text.encode("utf-8", "surrogatepass")) + redactor.end()
    return clean.decode("utf-8", "surrogatepass")


class Redactor:
    """Replaces secrets in a stream of bytes, also one that is split over two or more chunks."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        longest_first: Iterable[tuple[str, str]] = sorted(secrets.items(), key=lambda item: -len(item[0]))
        self._names = {text.encode("utf-8", "surrogateescape"): name.encode() for text, name in longest_first}
        self._pattern = re.compile(b"|".join(re.escape(secret) for secret in self._names) or b"(?!)")
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What can be written now; the rest may be the beginning of a secret and waits for the next chunk."""
        text = self._held + chunk
        cut = len(text) - max((_overlap(text, secret) for secret in self._names), default=0)
        present = any(secret in text for secret in self._names)  # a plain search is 20 times faster than the pattern
        if present:
            for match in self._pattern.finditer(text):
                if match.start() < cut < match.end():
                    cut = match.start()
        self._held = text[cut:]
        return self._clean(text[:cut]) if present else text[:cut]

    def end(self) -> bytes:
        """What is still held back, when no more will come."""
        rest, self._held = self._held, b""
        return self._clean(rest)

    def _clean(self, text: bytes) -> bytes:
        return self._pattern.sub(lambda match: b"[redacted " + self._names[match.group()] + b"]", text)


def clean(value: Any) -> Any:
    """The value with every secret in it redacted, in nested fields too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value


def safe_text(raw: bytes) -> str:
    """Bytes of unknown origin as text that a terminal, a prompt and JSON can hold: valid, no control characters, no escapes.

    Of a line that was overwritten by carriage returns (a progress bar), its last state is kept.
    """
    text = _ESCAPES.sub("", raw.decode("utf-8", "replace")).replace("\r\n", "\n")
    lines = (line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    return "".join(char for char in "\n".join(lines) if char in "\n\t" or not _unsafe(char))


def safe_tail(path: Path, max_chars: int) -> str:
    """At most `max_chars` characters from the end of a file; empty if there is no such file."""
    if max_chars <= 0:
        return ""
    try:
        raw = read_part(path, -8 * max_chars, 8 * max_chars)  # UTF-8 needs 4 bytes a character, escapes take some more
    except OSError:
        return ""
    return safe_text(raw)[-max_chars:]


def one_line(text: str, limit: int = 120) -> str:
    """Text of an agent as one harmless line: control characters, tabs and directional marks become spaces."""
    clean = " ".join(_BREAKS.sub(" ", text.encode("utf-8", "replace").decode()).split())
    return clean if len(clean) <= limit else clean[: limit - 1].rstrip() + "…"


def parsed(source: bytes) -> ast.Module:
    """A Python file that somebody else wrote, not larger than a train file may be.

    SyntaxError, ValueError, RecursionError or MemoryError if it cannot be parsed."""
    dotted = (_PART.fullmatch(part) is not None for part in source.split(b"."))
    if max((len(list(run)) for names, run in groupby(dotted) if names), default=0) > _MOST_DOTS:
        raise ValueError(f"a dotted name of more than {_MOST_DOTS} parts")  # the parser keeps each beginning of it: gigabytes
    return ast.parse(source)


def _overlap(text: bytes, secret: bytes) -> int:
    """Length of the longest end of `text` that begins `secret` without completing it."""
    first = secret[:1]
    start = text.find(first, max(0, len(text) - len(secret) + 1))
    while start >= 0:
        if secret.startswith(text[start:]):
            return len(text) - start
        start = text.find(first, start + 1)
    return 0


def _secret_parts(name: str, value: str) -> list[str]:
    """The parts of a variable's value that must not be shown."""
    parts = []
    if "://" in value and "@" in value:  # https://user:password@host, in any variable: proxies, indexes, databases
        try:
            password = urlsplit(value).password
        except ValueError:
            password = None
        if password:
            parts += [password, unquote(password)]
    if is_secret_name(name) and len(value) >= SHORTEST:
        counts = value.isdigit() and name.upper().endswith("TOKENS")  # MAX_OUTPUT_TOKENS=100000000
        if not counts and not os.path.exists(value):  # SSH_AUTH_SOCK, SSL_KEY_FILE: the name of a file is no secret
            parts.append(value)
    return parts


def _unsafe(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") or char in _BIDI


def failure_record(kind: str, message: str, step: int | None = None, tail: str = "") -> dict[str, Any]:
    """A failure as the journal keeps it and prompts quote it: its name, one line about it, the training step, the log's end."""
    return {"kind": kind, "message": redact(one_line(message, 500)), "step": step, "tail": tail}
