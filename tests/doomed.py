"""`python -m agent.loop`, but for the end: it kills itself with SIGKILL just before or after its N-th journal line.

`DOOM="after 5"` dies with the line on the disk, `DOOM="before 5"` with the line not written, `DOOM="torn 5"` with half of it
written, as a power cut would leave it.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from agent import journal
from agent.loop import main

WHEN, COUNT = os.environ["DOOM"].split()
appends = 0
honest = journal.Journal.append


def append(self: journal.Journal, event: str, **fields: Any) -> journal.Event:
    global appends
    appends += 1
    if appends < int(COUNT):
        return honest(self, event, **fields)
    if WHEN == "after":
        honest(self, event, **fields)
    if WHEN == "torn":
        line = journal.encode({"v": journal.SCHEMA, "seq": len(self.events), "t": 0.0, "event": event, **fields})
        os.write(self._file, line[: len(line) // 2])
    with open(os.environ["DOOM_LOG"], "a") as log:
        log.write(f"{WHEN} {event}\n")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


journal.Journal.append = append  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
