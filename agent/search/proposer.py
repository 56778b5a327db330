"""The built-in proposer without a language model, `python -m agent.search`: the control experiment for every coding agent.

The driver starts it like any coding agent: in a private worktree, with the prompt on standard input, which it ignores. It
parses the train file, reads the night's journal, chooses one change of the catalogue by Thompson sampling
(`agent/search/bandit.py`), edits the file and exits. It never proposes a file that was trained before, because the journal
records the identity of each. Sometimes it combines two changes: more often the longer nothing was kept, and preferably two that
are coupled.

`--model random` draws uniformly from the same catalogue and learns nothing: the control experiment for the bandit.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from agent.errors import JournalError
from agent.journal.journal import read_events
from agent.journal.state import Night, fold
from agent.judgement.novelty import SourceError, fingerprint
from agent.search.bandit import Bandit, Uniform, lessons
from agent.search.catalogue import COUPLED
from agent.search.changes import Change, changes, trains
from agent.search.trainfile import TrainFile

PAIRS = 0.12  # share of proposals that combine two changes, right after a keep
MOST_PAIRS = 0.4  # the same share, at most
LAST_PAIRS = 200  # how many pairs are drawn once every single change was tried, before giving up

Found = tuple[list[Change], bytes]


def propose(file: TrainFile, state: Night | None, draw: random.Random, *, learn: bool = True) -> Found | None:
    """Choose one or two changes and apply them. Returns the changes and the new source; None if everything was tried."""
    seq_len = state.dataset.get("seq_len") if state else None
    steps = state.leader.summary().get("num_steps") if state and state.best is not None else None
    options = changes(file, seq_len, steps)
    tried = {e.ast for e in state.experiments if e.ast} if state else set()
    tried.add(identity(file.data))
    bandit = (Bandit if learn else Uniform)(lessons(state) if state and learn else (), draw)
    stuck = state.since_keep() if state and learn else 0
    pairs = min(MOST_PAIRS, PAIRS + 0.02 * stuck)
    left, patience = list(options), LAST_PAIRS
    while options and patience:
        chosen = [bandit.pick(left or options)]
        first = chosen[0]
        others = [c for c in options if c.key != first.key]
        if others and (not left or draw.random() < pairs):
            coupled = [c for c in others if c.key in COUPLED.get(first.key.partition("[")[0], ())]
            chosen.append(bandit.pick(coupled if coupled and learn and draw.random() < 0.5 else others))
        try:
            data = file.apply(edit for change in chosen for edit in change.edits)
        except (ValueError, SyntaxError):
            data = b""  # both changes edit the same place
        if data and identity(data) not in tried:
            values = {name: c.value for name, c in TrainFile(data, file.tier).constants.items()}
            if len(chosen) == 1 or trains(values, seq_len):  # of two changes, each alone can train
                return chosen, data
        if len(chosen) == 1 and left:
            left.remove(first)
        patience -= not left
    return None


def identity(data: bytes) -> str:
    """The identity that the journal records for this source; "" if it does not parse."""
    try:
        return fingerprint(data).identity
    except SourceError:
        return ""


def night_tier(state: Night | None, environ: Mapping[str, str]) -> str:
    """The tier whose constants the trainer uses: as it told of the best, else what the user chose, else this machine's."""
    trained = state.leader.summary().get("tier") if state and state.best is not None else None
    machine = state.machine if state else {}
    chosen = machine.get("tier") or ("cpu" if machine.get("device") == "cpu" else environ.get("AUTORESEARCH_TIER"))
    return str(trained or chosen or _this_machine())


def _this_machine() -> str:
    if sys.platform == "darwin" and platform.machine() == "arm64":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return "mac-max" if memory >= 34 << 30 else "mac"
    return "cuda" if shutil.which("nvidia-smi") else "cpu"


def read_night(path: str | None) -> Night | None:
    """The night of a journal. None without a journal; None and a printed line if the journal is damaged."""
    if not path:
        return None
    try:
        events, _ = read_events(Path(path))
        return fold(events) if events else None
    except (JournalError, OSError, KeyError) as error:
        print(f"the journal can't be read ({error}); the priors alone decide")
        return None
