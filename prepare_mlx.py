"""
The command line of the harness, and the names that train files import. The code is in harness/.

    python prepare_mlx.py --dataset stories            prepare data (also: tinystories, climbmix, fineweb-edu, text:PATH)
    python prepare_mlx.py --list                       list datasets and presets
    python prepare_mlx.py score RUN_DIR                print val_bpb of a trained model, computed from its logits
    python prepare_mlx.py screen FILE --held FOLDER    search a train file for held-out text

A train file calls `start_run()`, `run.budget.start()`, `run.batches()` and `run.finish()`, and defines `load_model(run_dir)`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from harness import HarnessError, fail, write_atomically
from harness.clock import expected_epochs
from harness.machine import (
    PRESETS,
    check_memory,
    check_weights,
    detect_preset,
    extrapolate,
    find_dtype,
    find_tier,
    peak_flops,
    process_peak,
    recall,
    remember,
)
from harness.run import Progress, start_run

# Re-exported, so that a train file has one place to import from, whichever module of the harness a name lives in.
__all__ = ["HarnessError", "Progress", "check_memory", "check_weights", "expected_epochs", "extrapolate", "find_dtype", "find_tier",
           "peak_flops", "process_peak", "recall", "remember", "start_run"]


def options() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="Prepare data for autoresearch, or score a trained model.")
    parser.add_argument("--dataset", default=None,
                        help="dataset from --list, or text:PATH (default: stories on a CPU, climbmix for the preset upstream, "
                             "else tinystories)")
    parser.add_argument("--preset", default=None, help=f"machine size: {', '.join(PRESETS)} (default: this machine's)")
    parser.add_argument("--vocab-size", type=int, default=0,
                        help="vocabulary size in tokens, 256 for plain bytes (default: the preset's)")
    parser.add_argument("--field", default="text", help="field of JSON objects or column of tables with the text (default: text)")
    parser.add_argument("--allow-loss", action="store_true", help="go on even if more than 2 %% of the text cannot be read")
    parser.add_argument("--shards", type=int, default=1, help="number of files to fetch of a hub dataset (default: 1)")
    parser.add_argument("--revision", default="", help="commit, branch or tag of a hub dataset (default: the commit in --list)")
    parser.add_argument("--json", type=Path, 
                        help="write a description of the dataset to this file, and leave the current dataset as it is")
    parser.add_argument("--list", action="store_true", help="list datasets with source and licence, and presets")
    commands = parser.add_subparsers(dest="command", metavar="score | serve | screen")
    file = commands.add_parser("screen", help="search a train file for held-out text")
    file.add_argument("file", type=Path)
    file.add_argument("--parent", type=Path, help="train file that it was made from: what that holds, too, does not count")
    file.add_argument("--held", type=Path, required=True, help="folder of the held-out shards")
    for name, text in (("score", "print val_bpb of a trained model"), ("serve", "run the logits server; `score` starts it")):
        command = commands.add_parser(name, help=text)
        command.add_argument("run_dir", type=Path)
        if name == "score":
            command.add_argument("--split", choices=("val", "test"), default="val", help="text to score (default: val)")
            command.add_argument("--held", type=Path, help="folder of the held-out shards (default: those of the run's dataset)")
            command.add_argument("--wrap", type=json.loads, default=[],
                                 help="JSON list: command to start the logits server under, such as a sandbox")
            command.add_argument("--scratch", type=Path, help="folder for the logits server's copy of RUN_DIR and its TMPDIR, "
                                 "emptied for each server (default: a new folder)")
            command.add_argument("--load-limit", type=float, default=120.0,
                                 help="seconds that importing the train file and load_model may take (default: 120)")
            command.add_argument("--verify", action="store_true",
                                 help="probe every row for look-ahead; takes three times as long or more")
            command.add_argument("--private", action="store_true",
                                 help="read held, wrap and verify as JSON on standard input: others can see a command line")
            command.add_argument("--rows", type=int, default=0,
                                 help="maximum rows per batch (default: 256; never more than fit in 96 MB, or an eighth of all)")
    return parser


def main() -> int:
    """Run the command line. Returns the exit code."""
    args = options().parse_args()
    try:  # imports where they are needed: a process loads only its own part of the harness
        if args.command == "serve":
            from harness.server import serve
            serve(args.run_dir.resolve())
        elif args.command == "score":
            from harness.score import score
            if args.private:
                told = json.load(sys.stdin)
                args.held, args.wrap, args.verify = Path(told["held"]), told["wrap"], told["verify"]
            summary = score(args.run_dir.resolve(), args.held, args.split, args.wrap, args.rows, args.scratch, args.load_limit,
                            args.verify)
            print("---", *(f"{key + ': ':<18}{value}" for key, value in summary.items()), sep="\n")
        elif args.command == "screen":
            from harness.screen import screen
            screen(args.file, args.parent, args.held)
        elif args.list:
            from harness.corpus import DATASETS
            print(*(f"{name:<12} {source:<32} {revision:<41}{licence}"
                    for name, (licence, source, _, revision) in DATASETS.items()), sep="\n")
            for name, preset in PRESETS.items():
                print(f"preset {name:<8} {preset}{'   <- this machine' if name == detect_preset() else ''}")
        else:
            from harness.corpus import prepare
            preset = args.preset or detect_preset()
            usual = {"upstream": "climbmix", "tiny": "stories", "demo": "stories", "cpu": "stories"}
            dataset = args.dataset or usual.get(preset, "tinystories")
            entry = prepare(dataset, preset, vocab_size=args.vocab_size, field=args.field, shards=args.shards,
                            revision=args.revision, allow_loss=args.allow_loss,
                            make_current=args.json is None)
            if args.json:
                write_atomically(args.json, json.dumps(entry, indent=1).encode())
            print(f"ready: {entry['id']}  vocabulary {entry['vocab_size']:,}, {entry['seq_len']} tokens of context, "
                  f"budget {entry['budget']}, data {entry['data_hash']}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue from here", file=sys.stderr)
        os._exit(130)  # without waiting for downloads
    except HarnessError as error:
        if args.command:
            return fail(error.kind, str(error), getattr(args, "run_dir", None))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
