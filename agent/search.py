"""The built-in proposer, without a language model: `python -m agent.search`, the control of every claim about agents.

It is started like any coding agent: in a private worktree, with the briefing on standard input (which it does not need), and
it edits the train file and exits. It reads the file by its syntax tree, the night by its journal, and picks one change of the
catalogue by Thompson sampling (`agent/bandit.py`). What was trained before is never proposed again: the journal has the identity
of every source. Now and then, and more often the longer nothing was kept, two changes go together, rather coupled ones.

`--random` draws uniformly from the same catalogue and learns nothing: the control of the control.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent.bandit import Bandit, Uniform, lessons
from agent.candidate import SourceError, fingerprint
from agent.catalogue import COUPLED
from agent.edits import TrainFile
from agent.errors import JournalError
from agent.journal import read_events
from agent.moves import Change, changes, trains
from agent.night import Night, fold

PAIRS = 0.12  # of proposals, right after a keep
MOST_PAIRS = 0.4
LAST_PAIRS = 200  # pairs that are drawn once every single change was tried

Found = tuple[list[Change], bytes]


def propose(file: TrainFile, state: Night | None, draw: random.Random, *, learn: bool = True) -> Found | None:
    """A change (or two) and the file with it; None if everything in the catalogue was tried."""
    seq_len = state.dataset.get("seq_len") if state else None
    options = changes(file, seq_len)
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
            data = b""  # two changes of one place
        if data and identity(data) not in tried and (len(chosen) == 1 or _trains(data, file.tier, seq_len)):
            return chosen, data
        if len(chosen) == 1 and left:
            left.remove(first)
        patience -= not left
    return None


def _trains(data: bytes, tier: str, seq_len: int | None) -> bool:
    """Whether two changes, each sane alone, are so together."""
    return trains({name: c.value for name, c in TrainFile(data, tier).constants.items()}, seq_len)


def identity(data: bytes) -> str:
    """The identity of a source as the driver knows it; "" if it does not parse."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "candidate.py")
        path.write_bytes(data)
        try:
            return fingerprint(path).identity
        except SourceError:
            return ""


def night_tier(source: bytes, state: Night | None, environ: Mapping[str, str]) -> str:
    """The size of machine whose entries the trainer uses: told, or as the journal says, or by the look of this machine."""
    if told := environ.get("AUTORESEARCH_TIER"):
        return told
    tier = str(state.dataset.get("device") or "") if state else ""
    tier = tier or _this_machine()
    depth = state.leader.summary().get("depth") if state and state.best is not None else None
    depths = TrainFile(source, tier).tables.get("DEPTH", {})
    if depth is None or depths.get(tier) == depth:
        return tier
    fitting = [name for name, value in depths.items() if value == depth]
    return fitting[0] if len(fitting) == 1 else tier  # a CUDA machine whose framework has only the CPU, for example


def _this_machine() -> str:
    if sys.platform == "darwin" and platform.machine() == "arm64":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return "mac-max" if memory >= 34 << 30 else "mac"
    return "cuda" if shutil.which("nvidia-smi") else "cpu"


def read_night(path: str | None) -> Night | None:
    """The night of a journal, None without one; a damaged one is said and passed over."""
    if not path:
        return None
    try:
        events, _ = read_events(Path(path))
        return fold(events) if events else None
    except (JournalError, OSError, KeyError) as error:
        print(f"the journal can't be read ({error}); the priors alone decide")
        return None


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Edit the train file, say what and why. Exit codes: 0 done, 1 nothing is left to try, 2 no file to edit."""
    parser = argparse.ArgumentParser(prog="agent.search", description="Propose a change of the train file, by no language model.")
    parser.add_argument("--random", action="store_true", help="draw uniformly from the catalogue, learn nothing")
    parser.add_argument("--model", choices=("bandit", "random"), default="bandit", help="the same, as the driver's --model")
    parser.add_argument("--train-file", default=environ.get("AUTORESEARCH_TRAIN_FILE") or "train_mlx.py")
    parser.add_argument("--list", action="store_true", help="print what could be tried, change nothing")
    options = parser.parse_args(arguments)
    path = Path(options.train_file)
    state = read_night(environ.get("AUTORESEARCH_JOURNAL"))
    try:
        source = path.read_bytes()
        file = TrainFile(source, night_tier(source, state, environ))
    except (OSError, SyntaxError, ValueError) as error:
        print(f"error: {path} can't be read as Python: {error}", file=sys.stderr)
        return 2
    if file.lacking:
        print(f"no entry for this machine's tier {file.tier!r} in {', '.join(file.lacking)}: left alone")
    if options.list:
        print("\n".join(map(str, changes(file, state.dataset.get("seq_len") if state else None))))
        return 0
    turn = environ.get("AUTORESEARCH_EXPERIMENT") or (len(state.experiments) if state else 0)
    draw = random.Random(f"{environ.get('AUTORESEARCH_SEED', '0')} {turn}")
    found = propose(file, state, draw, learn=not (options.random or options.model == "random"))
    if found is None:
        print(f"error: nothing in the catalogue is left to try on this {path.name}", file=sys.stderr)
        return 1
    chosen, data = found
    path.write_bytes(data)
    print("HYPOTHESIS: " + "; ".join(change.why for change in chosen))
    print("DESCRIPTION: " + " + ".join(map(str, chosen)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
