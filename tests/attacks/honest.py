"""An honest train file, as small as one can be: it counts pairs of tokens until its budget is used.

The other files here are attacks: each is put before the last two lines of this one, so that it can replace what it likes.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import prepare_mlx
from prepare_mlx import start_run

log = np.log


def train(run):
    counts = np.full((run.vocab_size, run.vocab_size), 0.1)
    run.budget.start()
    batches, step = run.batches(16, 32), 0
    while run.budget.progress(step, step * 512) < 1:
        np.add.at(counts, next(batches), 1)
        step += 1
    return save(run, counts, step)


def save(run, counts, steps):
    np.save(run.dir / "weights.npy", log(counts).astype(np.float32))
    return {"training_seconds": run.budget.seconds, "peak_vram_mb": 1.0, "mfu_percent": 1.0, "total_tokens": steps * 512,
            "num_steps": steps, "num_params": counts.size, "depth": 1, "device": "cpu"}


def load_model(run_dir):
    table = np.load(run_dir / "weights.npy")
    return lambda tokens: table[tokens]


def main():
    with start_run(__file__) as run:
        run.finish(**train(run))


if __name__ == "__main__":
    main()
