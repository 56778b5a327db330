"""
What a machine can do, as a train file is told before it trains: its peak, how often a budget reads the text, what fits in memory.

Python only: the train file brings the product to time and the memory it measured, on MLX or on PyTorch.
"""

import re
import time
from collections.abc import Callable

from prepare_mlx import Budget, HarnessError

PEAK_TFLOPS = {  # what makers or core counts say, bf16 where tensor units do it; the longest name that a device's name holds
    "M1": 2.6, "M1 Pro": 5.2, "M1 Max": 10.4, "M1 Ultra": 21, "M2": 3.6, "M2 Pro": 6.8, "M2 Max": 13.5, "M2 Ultra": 27.2,
    "M3": 4.1, "M3 Pro": 7.4, "M3 Max": 14.2, "M3 Ultra": 28, "M4": 4.6, "M4 Pro": 9.2, "M4 Max": 18.4,
    "M5": 16, "M5 Max": 70, "A100": 312, "RTX 4090": 165, "H100": 989, "H200": 989,
}  # fmt: skip


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


def passes(budget: Budget, step_seconds: float, batch_tokens: int, train_tokens: int) -> float:
    """How often the budget reads a training text of so many tokens, from the seconds and the tokens of a step."""
    steps = {"s": budget.amount / step_seconds, "steps": budget.amount, "tokens": budget.amount / batch_tokens}[budget.unit]
    return steps * batch_tokens / train_tokens


def check_memory(expected: Callable[[int], float] | None, rows: int, seq_len: int, limit: float | None) -> None:
    """Refuses a pass of so many rows that won't fit into `limit` bytes: HarnessError("oom").

    expected: peak bytes by rows, None where unknown; limit: None where the device doesn't say.
    """
    if expected and limit and expected(rows) > limit:
        fits = max((n for n in range(rows) if expected(n) <= limit), default=0) * seq_len
        raise HarnessError("oom", f"a pass of {rows * seq_len:,} tokens is expected to take {expected(rows) / 2**30:.1f} GiB, this "
                           f"device has {limit / 2**30:.1f}; " + (f"the largest that fits is MICRO_TOKENS = {fits}" if fits else
                           "not even one row fits: lower DEPTH or WIDTH"))
