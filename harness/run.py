"""A training run as its train file sees it: batches from the token shard, the run directory, the result, progress."""

import argparse
import json
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

import numpy as np

from harness import PROGRAM, TRAIN_FILES, HarnessError, fail, home, kind_of, write_atomically
from harness.clock import Budget

# ---------------------------------------------------------------------------------------------------------------------
# Batches: slices of the token shard
# ---------------------------------------------------------------------------------------------------------------------

def row_starts(tokens: np.ndarray, bos_id: int, seq_len: int) -> np.ndarray:
    """Choose where the training rows of one epoch start: int64 [rows]. A row is tokens[start : start + seq_len + 1].

    The rows cover every token. A row starts at a document's start if that repeats at most a quarter of a row. The last row ends
    with the text.
    """
    piece = 1 << 24  # tokens compared at once
    marks = [a + m for a in range(0, len(tokens), piece) for m in np.flatnonzero(tokens[a : a + piece] == bos_id).tolist()]
    starts, position, last, document = [], 0, len(tokens) - seq_len - 1, 0
    while position < last:
        starts.append(position)
        position += seq_len
        while document < len(marks) and marks[document] <= position:
            document += 1
        if document and position - seq_len // 4 <= marks[document - 1]:
            position = marks[document - 1]
    return np.array([*starts, last] if last >= 0 else [], dtype=np.int64)


def batches(tokens: np.ndarray, starts: np.ndarray, batch_size: int, seq_len: int,
            seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, targets) without end, int32 [batch_size, seq_len] each. Every row of `starts` comes once an epoch, in an
    order that `seed` decides. A thread prepares a few batches ahead.

    Errors: HarnessError("data") if the shard has fewer rows than a batch.
    """
    if len(starts) < batch_size:
        raise HarnessError("data", f"a batch of {batch_size} rows of {seq_len} tokens was asked for, the training text has only "
                           f"{len(starts)} such rows; use a smaller batch or more text")
    ready: queue.Queue = queue.Queue(maxsize=4)
    offsets = np.arange(seq_len + 1)

    def produce() -> None:
        try:
            rng = np.random.default_rng(seed)
            order = np.empty(0, dtype=np.int64)
            while True:
                while len(order) < batch_size:
                    order = np.concatenate([order, rng.permutation(starts)])
                rows, order = order[:batch_size], order[batch_size:]
                block = tokens[rows[:, None] + offsets].astype(np.int32)       # [B, T + 1]
                ready.put((block[:, :-1], block[:, 1:]))
        except Exception as error:
            ready.put(error)  # else the training would wait for ever

    threading.Thread(target=produce, daemon=True).start()
    while True:
        batch = ready.get()
        if isinstance(batch, Exception):
            raise batch
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

OPTIONS = {  # of a train file's command line
    "budget": "300s, 200steps or 5Mtokens (default: the prepared data's)",
    "seed": "an integer, 0 or more (default: 1)",
    "data": "a train/<id> folder (default: the data prepared last)",
    "run-dir": "folder to write to (default: runs/manual/<time>)",
}


def variable(option: str) -> str:
    """The environment variable that says the same as a command line option."""
    return "AUTORESEARCH_" + option.replace("-", "_").upper()


class Run:
    """One training: its data, its budget, its run directory. Use it as `with start_run(__file__) as run:`. An exception inside
    becomes error.json, a traceback, and an exit code that names the kind of failure."""

    def __init__(self, train_file: str):
        import psutil
        self.born = time.monotonic()
        if not fnmatch(name := Path(train_file).name, TRAIN_FILES):
            raise HarnessError("usage", f"expected a file named {TRAIN_FILES}, which the scorer looks for, got {name}; rename it")
        place = os.environ.get("AUTORESEARCH_DATA")
        if not place:
            place = json.loads((home() / "current.json").read_text())["train_dir"]
        self.data = Path(place)
        self.meta = json.loads((self.data / "meta.json").read_text())
        text, age = os.environ.get("AUTORESEARCH_BUDGET") or self.meta["budget"], time.time() - psutil.Process().create_time()
        self.budget = Budget(text, age)
        self.seed = int(os.environ.get("AUTORESEARCH_SEED") or 1)
        if self.seed < 0:
            raise HarnessError("usage", f"expected a seed of 0 or more, got {self.seed}")
        self.vocab_size, self.seq_len = self.meta["vocab_size"], self.meta["seq_len"]
        self.train_tokens = (self.data / "train.bin").stat().st_size // np.dtype(self.meta["dtype"]).itemsize
        self.epoch_tokens = self.train_tokens  # from the first batch on the tokens in the rows of an epoch, which may overlap
        self.step = 0
        self.dir = Path(os.environ.get("AUTORESEARCH_RUN_DIR") or Path("runs", "manual", time.strftime("%Y%m%d-%H%M%S"))).resolve()
        self.dir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(train_file, self.dir / name)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        if not isinstance(error, HarnessError):
            sys.excepthook(kind, error, trace)
        sys.exit(fail(kind_of(error), str(error) or kind.__name__, self.dir, self.step))

    def tokens(self) -> np.ndarray:
        """The training shard, memory-mapped: uint16 or uint32 [n].

        Errors: HarnessError("violation") before the clock has started, because warm-up must use dummy data.
        """
        if not self.budget.started:
            raise HarnessError("violation", "training data was asked for before run.budget.start(); warm up on dummy data")
        return np.memmap(self.data / "train.bin", dtype=self.meta["dtype"], mode="r")

    def batches(self, batch_size: int, seq_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (inputs, targets) without end, int32 [batch_size, seq_len] each. Take the first batch after run.budget.start().
        Errors: those of `tokens` and of `harness.run.batches`."""
        tokens = self.tokens()
        starts = row_starts(tokens, self.meta["bos_id"], seq_len)
        self.epoch_tokens = len(starts) * seq_len
        yield from batches(tokens, starts, batch_size, seq_len, self.seed)

    def log(self, **window) -> None:
        """Append a line to metrics.jsonl: step, tokens, seconds, progress (used share of the budget), loss (nats), lr,
        tokens_per_second, mfu_percent, memory_mb. Errors: HarnessError("nan") if the loss is not finite."""
        self.step = window.get("step", self.step)
        with open(self.dir / "metrics.jsonl", "a") as f:
            f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in window.items()}) + "\n")
        if not math.isfinite(window.get("loss", 0.0)):
            raise HarnessError("nan", f"the loss became {window['loss']} at step {self.step}")

    def finish(self, **facts) -> None:
        """Write train.json, then replace this process by the scorer, which prints the summary. With AUTORESEARCH_SCORE=0 the
        score is left to the caller. Errors: those of `Budget.close`."""
        facts |= self.budget.close()
        facts |= {"total_seconds": time.monotonic() - self.born, "budget": self.budget.text, "seed": self.seed,
                  "data": self.data.name}
        write_atomically(self.dir / "train.json", json.dumps(facts, indent=1).encode())
        if os.environ.get("AUTORESEARCH_SCORE") != "0":
            print(f"trained; scoring on the validation text of {self.data.name}", flush=True)
            command = [sys.executable, str(PROGRAM), "score", str(self.dir)]
            if sys.platform == "win32":  # execv begins a new process there, and its exit code is lost
                sys.exit(subprocess.run(command).returncode)
            os.execv(sys.executable, command)  # frees the trainer's memory


def prepare_and_begin_again() -> NoReturn:
    """Prepare this machine's dataset, then train in a new process, whose clock starts afresh. SystemExit with the exit code."""
    print("no data is prepared yet, so this machine's dataset is prepared first, as by: python prepare_mlx.py", flush=True)
    try:
        code = subprocess.run([sys.executable, str(PROGRAM)]).returncode
        sys.exit(code or subprocess.run([sys.executable, *sys.argv]).returncode)
    except KeyboardInterrupt:
        sys.exit(130)


def start_run(train_file: str) -> Run:
    """Begin a run as the command line and the AUTORESEARCH_* variables say (CONTRIBUTING.md lists them), by default on the data
    prepared last; if there is none, prepare it first. SystemExit with code 2 if the run cannot begin."""
    parser = argparse.ArgumentParser(
        description="Train for the budget, then print the score.", allow_abbrev=False)
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name}", help=f"{text}; or ${variable(name)}")
    for name, value in vars(parser.parse_args()).items():
        if value is not None:
            os.environ[variable(name)] = value
    if not os.environ.get(variable("data")) and not (home() / "current.json").exists():
        prepare_and_begin_again()
    try:
        return Run(train_file)
    except (HarnessError, OSError, ValueError) as error:
        print(f"error: {error}; check --data, --budget, --seed, --run-dir and the AUTORESEARCH_* variables", file=sys.stderr)
        sys.exit(HarnessError.exit_codes["usage"])


class Progress:
    """Progress of a training: smoothed loss, lines of metrics.jsonl, the line on the terminal, and the end of one that diverges.

    batch_tokens: tokens of one step. flops: FLOPs per token. peak: FLOP/s of the device. above: nats by which the smoothed loss
    may exceed ln(vocabulary), the loss of uniform probabilities. `step` counts the steps whose loss is known.
    """

    def __init__(self, run: Run, batch_tokens: int, flops: float, peak: float, above: float):
        self.run, self.batch_tokens, self.flops, self.peak = run, batch_tokens, flops, peak
        self.limit, self.step, self.smooth, self.printed = math.log(run.vocab_size) + above, 0, 0.0, 0
        self.told = self.before = 0, run.budget.seconds  # step and seconds of the last two lines

    @property
    def loss(self) -> float:
        """Mean loss in nats over about 20 steps, corrected for the average's start at zero."""
        return self.smooth / (1 - 0.95**self.step)

    def take(self, loss: float) -> None:
        """Record the loss of the next step, in nats. Errors: HarnessError("nan") if it is not finite or the training diverged."""
        self.step, self.smooth = self.step + 1, 0.95 * self.smooth + 0.05 * loss
        if not math.isfinite(loss) or (self.step >= 20 and self.loss > self.limit):  # early steps may start high
            raise HarnessError("nan", f"the loss became {loss:.4g} at step {self.step}, {self.loss:.4g} in the mean; uniform "
                               f"probabilities have {math.log(self.run.vocab_size):.4g}")

    def tell(self, lr: Callable[[], float], memory: Callable[[], float]) -> None:
        """Log and print the state once a second, every 500 steps and at the end.

        lr: the schedule's factor on the learning rates. memory: peak bytes. Both are called only when a line is due, because
        reading them may wait for the device.
        """
        step, tokens, seconds = self.step, self.step * self.batch_tokens, self.run.budget.seconds
        progress = min(self.run.budget.progress(step, tokens), 1.0)
        if step == self.told[0] or not (seconds - self.told[1] >= 1 or step % 500 == 0 or progress == 1):
            return
        short = seconds - self.told[1] < 1 and step - self.told[0] < 500  # the last line: too short to tell a speed
        first, begin = self.before if short else self.told
        rate, factor, memory_mb = (step - first) * self.batch_tokens / (seconds - begin), lr(), memory() / 2**20
        self.before, self.told = self.told, (step, seconds)
        mfu, left = 100 * rate * self.flops / self.peak, (1 - progress) * seconds / progress
        self.run.log(step=step, tokens=tokens, seconds=seconds, progress=progress, loss=self.loss, lr=factor,
                     tokens_per_second=rate, mfu_percent=mfu, memory_mb=memory_mb)
        ends = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
        self.print_line(f"step {step:5d} ({100 * progress:3.0f} %)", f"loss {self.loss:.4f}", f"{left:.0f} s left, ends {ends}",
                        f"{rate:,.0f} tok/s", f"{memory_mb:,.0f} MB", f"mfu {mfu:.1f} %", f"lr x{factor:.2f}")

    def print_line(self, *parts: str) -> None:
        """Print over the line before: as many of the parts, the most important first, as fit the terminal."""
        room, line = shutil.get_terminal_size().columns - 1, parts[0]  # a full line would wrap, and stay
        for part in parts[1:]:
            if len(line) + 2 + len(part) > room:
                break
            line += f"  {part}"
        line = line[:room]
        print("\r" + line.ljust(min(self.printed, room)), end="", flush=True)
        self.printed = len(line)
