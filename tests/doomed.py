"""`python -m agent.loop`, but for the end: it kills itself with SIGKILL around a line of the journal.

`DOOM="after 5"` dies with its 5th line on the disk, `"before 5"` with the line not written, `"torn 5"` with half of it written, as
a power cut would leave it; `"after verdict"` at its first line of that kind.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from agent.journal import journal
from agent.loop import main

WHEN, COUNT = os.environ["DOOM"].split()
appends = 0
honest = journal.Journal.append


def append(self: journal.Journal, event: str, **fields: Any) -> journal.Event:
    global appends
    appends += 1
    if COUNT not in (str(appends), event):
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
