"""Write the output of a child to a file of bounded size, without secrets."""

from collections import deque
from pathlib import Path

from agent.files import remove
from agent.text import Redactor

_TAIL_BYTES = 256 * 1024  # how much of the end of an overflowing log is kept, in memory until the child ends


class BoundedLog:
    """A log file that accepts any amount of output and keeps its head and its tail, together at most `limit` bytes plus one line.

    The head is written to disk at once. What exceeds it is kept in memory, and its tail is written by `close`.
    """

    def __init__(self, path: Path, limit: int, secrets: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(path)  # an older log, or a named pipe that a candidate has put there, which would block
        self.received = 0  # bytes received, kept or dropped
        self._file = path.open("xb", buffering=0)
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
        with self._file:
            self._keep(self._redactor.end())
            tail = b"".join(self._tail)
            cut = max(0, len(tail) - self._tail_limit)
            self._dropped += cut
            if self._dropped:
                self._file.write(b"\n[... %d bytes left out ...]\n" % self._dropped)
            self._file.write(tail[cut:])

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
