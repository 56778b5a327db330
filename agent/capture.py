"""The output of a child on disk: bounded, without secrets; and its end as text that is safe to show."""

import re
import unicodedata
from collections import deque
from pathlib import Path

from agent.redact import Redactor

_TAIL_BYTES = 256 * 1024  # of a log that overflows, at most this much of its end is kept (in memory until the child ends)
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-_]?")  # colours, titles, the rest
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # can make text read as something else


class BoundedLog:
    """A file that takes any amount of output and keeps its head and its tail: never more than `limit` bytes and one line.

    The head is on disk as soon as it is written; past the bound the tail waits in memory until `close`.
    """

    def __init__(self, path: Path, limit: int, secrets: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.received = 0  # bytes that came, kept or not
        self._file = path.open("wb", buffering=0)
        self._redactor = Redactor(secrets)
        self._tail: deque[bytes] = deque()
        self._tail_limit = min(limit // 2, _TAIL_BYTES)
        self._tail_size = 0
        self._head_left = limit - self._tail_limit
        self._dropped = 0

    def write(self, chunk: bytes) -> None:
        self.received += len(chunk)
        self._keep(self._redactor.feed(chunk))

    def close(self) -> None:
        if self._file.closed:
            return
        self._keep(self._redactor.end())
        tail = b"".join(self._tail)
        cut = max(0, len(tail) - self._tail_limit)
        self._dropped += cut
        if self._dropped:
            self._file.write(b"\n[... %d bytes left out ...]\n" % self._dropped)
        self._file.write(tail[cut:])
        self._file.close()

    def _keep(self, clean: bytes) -> None:
        head, rest = clean[: self._head_left], clean[self._head_left :]
        if head:
            self._file.write(head)
            self._head_left -= len(head)
        if rest:
            self._tail.append(rest)
            self._tail_size += len(rest)
            while self._tail_size - len(self._tail[0]) >= self._tail_limit:
                self._dropped += len(self._tail[0])
                self._tail_size -= len(self._tail.popleft())


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
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8 * max_chars))  # UTF-8 needs 4 bytes a character, escapes take some more
            raw = file.read()
    except OSError:
        return ""
    return safe_text(raw)[-max_chars:]


def _unsafe(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") or char in _BIDI
