"""`python -m agent.search`: propose one change of the train file, without a language model."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent.search.proposer import night_tier, propose, read_night
from agent.search.trainfile import TrainFile


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Edit the train file; print what was changed and why. Exit codes: 0 done, 1 nothing is left to try, 2 no file to edit."""
    about = "Propose one change of the train file, without a language model."
    parser = argparse.ArgumentParser(prog="agent.search", description=about)
    parser.add_argument("--model", choices=("bandit", "random"), default="bandit",
                        help="bandit: learn from this night's results; random: draw uniformly from the catalogue")
    parser.add_argument("--train-file", default="train_mlx.py")
    options = parser.parse_args(arguments)
    path = Path(options.train_file)
    state = read_night(environ.get("AUTORESEARCH_JOURNAL"))
    try:
        file = TrainFile(path.read_bytes(), night_tier(state, environ))
    except (OSError, SyntaxError, ValueError) as error:
        print(f"error: {path} can't be read as Python: {error}", file=sys.stderr)
        return 2
    if file.lacking:
        print(f"no entry for this machine's tier {file.tier!r} in {', '.join(file.lacking)}: left alone")
    turn = environ.get("AUTORESEARCH_EXPERIMENT") or (len(state.experiments) if state else 0)
    draw = random.Random(f"{environ.get('AUTORESEARCH_SEED', '0')} {turn}")
    found = propose(file, state, draw, learn=options.model != "random")
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
