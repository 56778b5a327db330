"""
What a machine can do, as a train file is told before it trains, and what it says of itself while it trains.

Its tier, its peak, how often a budget reads the text, what fits in memory; the loss, metrics.jsonl and the line on the terminal.
Python only: the train file brings the product to time and the memory it measured, on MLX or on PyTorch.
"""

import math
import os
import re
import time
from collections.abc import Callable

from prepare_mlx import Budget, HarnessError, Run

TIERS = ("cpu", "mac", "mac-max", "cuda")
STEP = 6  # peak bytes of an update over bytes of weights and moments; 4.4 to 5.7 measured on the CPU, where nothing is compiled
PEAK_TFLOPS = {  # what makers or core counts say, bf16 where tensor units do it; the longest name that a device's name holds
    "M1": 2.6, "M1 Pro": 5.2, "M1 Max": 10.4, "M1 Ultra": 21, "M2": 3.6, "M2 Pro": 6.8, "M2 Max": 13.5, "M2 Ultra": 27.2,
    "M3": 4.1, "M3 Pro": 7.4, "M3 Max": 14.2, "M3 Ultra": 28, "M4": 4.6, "M4 Pro": 9.2, "M4 Max": 18.4,
    "M5": 16, "M5 Pro": 35, "M5 Max": 70, "A100": 312, "RTX 4090": 165, "H100": 989, "H200": 989,
}  # fmt: skip


def find_tier(own: str) -> str:
    """Whose constants a train file takes: its `own`, by device and memory, or what $AUTORESEARCH_TIER says instead."""
    tier = os.environ.get("AUTORESEARCH_TIER") or own
    if tier not in TIERS:
        raise SystemExit(f"error: AUTORESEARCH_TIER={tier}: expected one of {', '.join(TIERS)}")
    return tier


def peak_flops(device: str, product: Callable[[], object], flops: float) -> tuple[float, float]:
    """FLOP/s that MFU is told by: the device's by PEAK_TFLOPS, or else of the fastest of four products; and the latter.

    product: does a large matrix product of `flops` FLOPs once, and waits for it.
    """
    times = []
    for _ in range(4):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    names = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device)]
    measured = flops / min(times)
    return (PEAK_TFLOPS[max(names, key=len)] * 1e12 if names else measured), measured


def readings(budget: Budget, step_seconds: float, batch_tokens: int, train_tokens: int) -> float:
    """How often the budget reads a training text of so many tokens, from the seconds and the tokens of a step."""
    steps = {"s": budget.amount / step_seconds, "steps": budget.amount, "tokens": budget.amount / batch_tokens}[budget.unit]
    return steps * batch_tokens / train_tokens


def extrapolate(peak: Callable[[int], float], rows: int) -> Callable[[int], float]:
    """Peak bytes of a pass by its number of rows: a line through what `peak` measures at an eighth and a quarter of `rows`."""
    few, more = max(1, rows // 8), max(2, rows // 4)
    low, high = peak(few), peak(more)
    return lambda n: high + (high - low) / (more - few) * (n - more)


def check_weights(held: Callable[[int], int], depth: int, limit: float | None) -> None:
    """Refuses a model whose weights and moments won't fit into `limit` bytes, None where unknown: HarnessError("oom"), which
    names the largest that will. held: their bytes by depth."""
    if limit and held(depth) > limit:
        fits = next((n for n in range(depth - 1, 0, -1) if STEP * held(n) <= limit), 0)
        raise HarnessError("oom", f"weights and moments of depth {depth} take {held(depth) / 2**30:.2f} GiB, this device has "
                           f"{limit / 2**30:.2f}; " + (f"the largest that fits: DEPTH = {fits}, with the width that goes with it"
                                                       if fits else "lower WIDTH or NGRAM_BUCKETS"))


def check_memory(expected: Callable[[int], float] | None, passes: int, rows: int, seq_len: int, limit: float | None,
                 held: Callable[[int], int], depth: int) -> None:
    """Refuses a step of so many passes of so many rows that won't fit into `limit` bytes: HarnessError("oom").

    expected: peak bytes by passes, as the same step is cut into more of them; either is None where unknown; held: as above.
    """
    if not expected or not limit or expected(passes) <= limit:
        return
    every, has = passes * rows, f"GiB, this device has {limit / 2**30:.2f}"
    if fits := next((n for n in range(passes + 1, every + 1) if every % n == 0 and expected(n) <= limit), 0):
        raise HarnessError("oom", f"passes of {rows * seq_len:,} tokens are expected to take {expected(passes) / 2**30:.2f} {has}; "
                           f"the largest that fits: MICRO_TOKENS = {every // fits * seq_len}")
    fits = next((n for n in range(depth - 1, 0, -1) if expected(every) * held(n) <= limit * held(depth)), 0)
    raise HarnessError("oom", f"even passes of one row are expected to take {expected(every) / 2**30:.2f} {has}; lower BATCH_TOKENS"
                       + (f", or DEPTH to {fits}" if fits else ", WIDTH or NGRAM_BUCKETS"))


class Meter:
    """How a training goes: its smoothed loss, the lines of metrics.jsonl and the one on the terminal; it ends one that diverges.

    batch_tokens: of a step; flops: of a token; peak: FLOP/s; above: nats that the mean loss may be above ln(vocabulary), what
    a model that knows nothing has. `step`: those whose loss is known.
    """

    def __init__(self, run: Run, batch_tokens: int, flops: float, peak: float, above: float):
        self.run, self.batch_tokens, self.flops, self.peak = run, batch_tokens, flops, peak
        self.limit, self.step, self.smooth, self.window = math.log(run.vocab_size) + above, 0, 0.0, (0, run.budget.seconds)

    @property
    def loss(self) -> float:
        """Nats: the mean over about 20 steps, without the weight of the zero that it began with."""
        return self.smooth / (1 - 0.95**self.step)

    def take(self, loss: float) -> None:
        """The loss of the next step, nats. Errors: HarnessError("nan") where it is none, or the training diverged."""
        self.step, self.smooth = self.step + 1, 0.95 * self.smooth + 0.05 * loss
        if not math.isfinite(loss) or (self.step >= 20 and self.loss > self.limit):  # before that it may still be on its way down
            raise HarnessError("nan", f"the loss became {loss:.4g} at step {self.step}, {self.loss:.4g} in the mean; a model that "
                               f"knows nothing has {math.log(self.run.vocab_size):.4g}")

    def tell(self, lr: Callable[[], float], memory: Callable[[], float]) -> None:
        """Once a second, every 500 steps and at the end. lr, memory (peak bytes): asked only when it is time, as the device may
        have to be waited for."""
        step, tokens, seconds = self.step, self.step * self.batch_tokens, self.run.budget.seconds
        progress = min(self.run.budget.progress(step, tokens), 1.0)
        if step == self.window[0] or not (seconds - self.window[1] >= 1 or step % 500 == 0 or progress == 1):
            return
        rate, factor, memory_mb = (step - self.window[0]) * self.batch_tokens / (seconds - self.window[1]), lr(), memory() / 2**20
        self.window, mfu, left = (step, seconds), 100 * rate * self.flops / self.peak, (1 - progress) * seconds / progress
        self.run.log(step=step, tokens=tokens, seconds=seconds, loss=self.loss, lr=factor, tokens_per_second=rate, mfu_percent=mfu,
                     memory_mb=memory_mb)
        ends = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
        print(f"\rstep {step:5d} ({100 * progress:3.0f} %)  loss {self.loss:.4f}  lr x{factor:.2f}  {rate:,.0f} tok/s  "
              f"mfu {mfu:.1f} %  {memory_mb:,.0f} MB  {left:.0f} s left, ends {ends}   ", end="", flush=True)
