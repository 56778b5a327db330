"""The clock: how long a training may run, how fast the machine is, and how many epochs the budget allows."""

import math
import re
import time
from collections.abc import Callable

import numpy as np

from harness import HarnessError

STARTUP_LIMIT = 180             # seconds from process start to Budget.start(): compiling takes time, but training must wait
OVERRUN = 1.25, 10              # a training may take 1.25 times its budget, or 10 s more if that is longer: its last step, saving


class Budget:
    """The budget of one training: "300s", "200steps" or "5Mtokens". Seconds are monotonic and start with `start()`.

    age: seconds since the process started. Errors: HarnessError("usage") if `text` is no budget.
    """

    def __init__(self, text: str, age: float = 0.0):
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kM]?)(s|steps|tokens)", text.strip(), re.ASCII)
        self.amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]] if match else 0.0
        if not 0 < self.amount < math.inf:
            raise HarnessError("usage", f"budget {text[:80]!r}: expected something like 300s, 200steps or 5Mtokens")
        self.text, self.unit = text.strip(), match[3]
        self.started, self._born = False, time.monotonic() - age

    def start(self, work: Callable[[], object] | None = None) -> None:
        """Start the clock, once, after warm-up. `work` measures the machine's speed, see `speed`.

        Errors: HarnessError("timeout") if more than STARTUP_LIMIT seconds have passed, ("violation") on a second start.
        """
        waited = time.monotonic() - self._born
        if self.started:
            raise HarnessError("violation", "the budget was started a second time; call run.budget.start() once")
        if waited > STARTUP_LIMIT:
            raise HarnessError("timeout", f"{waited:.0f} s passed before training began, expected at most {STARTUP_LIMIT}: use "
                               "warm-up to compile, not to train")
        self._work, self._probe_seconds = work, min(1.0, max(0.2, self.amount / 30)) if self.unit == "s" else 0.2
        self._speed = speed(work, self._probe_seconds)
        self.started, self._start, self._wall = True, time.monotonic(), time.time()

    @property
    def seconds(self) -> float:
        """Seconds since `start()`, without time asleep; 0 before the start."""
        return time.monotonic() - self._start if self.started else 0.0

    def progress(self, steps: int, tokens: int) -> float:
        """The used share of the budget: 0 at the start, 1 at the end, more beyond."""
        return {"s": self.seconds, "steps": steps, "tokens": tokens}[self.unit] / self.amount

    def close(self) -> dict[str, float]:
        """Measure the speed again and return `suspended_seconds` (time asleep: the wall clock ran, the monotonic clock did not),
        `speed_index` (speed now over speed at the start) and `products_per_second` (mean of both speeds).

        Errors: HarnessError("violation") if the clock never started, ("timeout") if the training overran its budget by far.
        """
        if not self.started:
            raise HarnessError("violation", "the training ended, but run.budget.start() was never called")
        used, limit = self.seconds, max(OVERRUN[0] * self.amount, self.amount + OVERRUN[1])
        if self.unit == "s" and used > limit:
            raise HarnessError("timeout", f"the training took {used:.0f} s, expected at most {limit:.0f} for {self.text}; "
                               "ask run.budget.progress() more often, or make a step shorter")
        slept = max(0.0, time.time() - self._wall - used)
        now = speed(self._work, self._probe_seconds)
        return {"suspended_seconds": slept, "speed_index": now / self._speed, "products_per_second": (now + self._speed) / 2}


def speed(work: Callable[[], object] | None, seconds: float) -> float:
    """Measure for `seconds` how many times a second this machine completes `work`, by the median time.

    work: does a fixed amount of work, such as a matrix product, on the device that trains, and waits for the result. None: a
    NumPy product, which sees the load of the CPU only.
    """
    square = np.ones((384, 384), np.float32)
    work = work or (lambda: square @ square)
    work()  # the first call may compile
    times, began = [], time.perf_counter()
    while not times or times[-1] - began < seconds:
        work()
        times.append(time.perf_counter())
    return 1 / float(np.median(np.diff([began, *times])))


def expected_epochs(budget: Budget, step_seconds: float, batch_tokens: int, train_tokens: int) -> float:
    """Estimate how many epochs over `train_tokens` tokens the budget allows, given the seconds and tokens of one step."""
    steps = {"s": budget.amount / step_seconds, "steps": budget.amount, "tokens": budget.amount / batch_tokens}[budget.unit]
    return steps * batch_tokens / train_tokens
