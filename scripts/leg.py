"""One backend's part of `benchmark.py compare`, in a process of its own: started by benchmark.py, not by hand.

    PEER_SETTINGS='{"do": "times", ...}' python leg.py TRAIN_FILE

train_mlx.py and train_torch.py have the same names, so one text here drives both; what differs stands in the two classes. A
mode is "compiled", "eager", "reductions" (eager, with 16-bit attention scores in PyTorch) or "", as the file has it.
Parts of a step are differences of whole windows: nothing waits for the device inside a step, because that would slow it down.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.clock import speed
from harness.run import batches

PROBE_SECONDS = 0.3                                                             # of matrix products, before and after a leg


def flops_per_token(shapes: dict[str, tuple[int, ...]], seq_len: int) -> int:
    """FLOPs of a forward and backward pass over one token, from the shapes of all weights. The one count for every backend: 6 per
    weight of a matrix product, 12 per channel, layer and token of the row in attention (upstream's count)."""
    products = [n for n in shapes if n.startswith("blocks.") or n == "lm_head.weight"]
    depth = len({n.split(".")[1] for n in products if n.startswith("blocks.")})
    return 6 * sum(math.prod(shapes[n]) for n in products) + 12 * shapes["wte.weight"][1] * seq_len * depth


def process_peak() -> float:
    """Peak bytes that this process held in memory."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class OnMLX:
    """train_mlx.py, driven step by step."""

    def __init__(self, module: ModuleType, mode: str):
        import mlx.core as mx
        from mlx.utils import tree_flatten, tree_unflatten
        self.module, self.mx, self.flatten, self.unflatten = module, mx, tree_flatten, tree_unflatten
        if mode:
            (mx.enable_compile if mode == "compiled" else mx.disable_compile)()
        self.array = mx.array

    def numbers(self, model: Any) -> dict[str, np.ndarray]:
        return {n: np.array(p) for n, p in self.flatten(model.parameters())}

    def fill(self, model: Any, weights: dict[str, np.ndarray]) -> None:
        model.update(self.unflatten([(n, self.mx.array(p)) for n, p in weights.items()]))

    def rates(self) -> dict[str, Any]:
        return self.module.schedule(0.1, 100)

    def forward(self, model: Any) -> Callable:
        @self.mx.compile
        def loss(params: dict[str, Any], x: Any, y: Any) -> Any:
            return self.mx.mean(self.module.cross_entropy(self.module.with_weights(model, params)(x), y))

        def call(params: dict[str, Any], x: Any, y: Any) -> Any:
            result = loss(params, x, y)
            self.begin(result)
            if self.module.NGRAMS in params:  # as `build` does: a table that the model holds couldn't be updated in place
                model.ngrams.weight = self.mx.zeros((0,))
            return result
        return call

    def begin(self, *values: Any) -> None:
        self.mx.async_eval(values)

    def wait(self) -> None:
        self.mx.synchronize()

    def reset_peak(self) -> None:
        self.mx.clear_cache()
        self.mx.reset_peak_memory()

    def peak(self) -> float | None:
        return self.mx.get_peak_memory()


class OnTorch:
    """train_torch.py, driven step by step."""

    def __init__(self, module: ModuleType, mode: str):
        import torch
        self.module, self.torch = module, torch
        if mode == "reductions":  # attention without a fused kernel keeps its scores in 16 bits, half the memory
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        if mode:
            setattr(module, "compiled", lambda f: torch.compile(f, dynamic=False) if mode == "compiled" else f)  # noqa: B010

    def array(self, numbers: np.ndarray) -> Any:
        t = self.module.to_device(self.torch.from_numpy(np.ascontiguousarray(numbers)))
        return t if t.is_floating_point() else t.long()

    def numbers(self, model: Any) -> dict[str, np.ndarray]:
        return {n: p.detach().cpu().numpy() for n, p in model.named_parameters()}

    def fill(self, model: Any, weights: dict[str, np.ndarray]) -> None:
        with self.torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(self.torch.from_numpy(weights[n]))

    def rates(self) -> dict[str, Any]:
        return {n: self.module.to_device(t) for n, t in self.module.schedule(0.1, 100).items()}

    def forward(self, model: Any) -> Callable:
        @self.module.compiled
        def loss(params: dict[str, Any], x: Any, y: Any) -> Any:
            logits = self.module.with_weights(model, params)(x)
            return self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

        def call(params: dict[str, Any], x: Any, y: Any) -> Any:  # with gradients required, it keeps what backward needs
            return loss({n: p.detach().requires_grad_(n != self.module.NGRAMS) for n, p in params.items()}, x, y)
        return call

    def begin(self, *values: Any) -> None:
        """PyTorch begins by itself."""

    def wait(self) -> None:
        self.module.synchronize()

    def reset_peak(self) -> None:
        self.module.reset_peak_memory()

    def peak(self) -> float | None:
        return self.module.peak_memory() if self.module.GPU else None  # PyTorch doesn't count on a CPU


class Leg:
    """A model of the train file with the weights of `settings["weights"]`, and the batches it trains on."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        began = time.perf_counter()
        spec = importlib.util.spec_from_file_location("train_file", path)
        self.module: Any = importlib.util.module_from_spec(spec)                # type: ignore[arg-type]
        self.path, self.settings = path, settings
        sys.modules["train_file"] = self.module  # dataclasses look their module up
        spec.loader.exec_module(self.module)  # type: ignore[union-attr]
        ours = OnMLX if "\nimport mlx" in path.read_text() else OnTorch
        self.on: Any = ours(self.module, settings.get("mode", ""))
        self.facts: dict[str, Any] = {"import_seconds": time.perf_counter() - began, "device": self.module.device_name()}
        self.data = Path(settings["data"])
        self.meta = json.loads((self.data / "meta.json").read_text())
        m = self.module
        self.seq_len = m.SEQ_LEN if settings.get("long_rows") else min(m.SEQ_LEN, self.meta["seq_len"])
        rows = max(1, m.BATCH_TOKENS // self.seq_len)
        fewest = math.ceil(rows * self.seq_len / m.MICRO_TOKENS)
        self.passes = next((n for n in range(fewest, rows) if rows % n == 0), rows)  # as `train` does
        self.rows, self.batch_tokens = rows // self.passes, rows * self.seq_len

    def weights(self) -> dict[str, np.ndarray]:
        """The initial weights. With `fill_zeros` those that start at 0 are random as well: as long as output projections are 0, the
        gradient of a scalar is rounding error, AdamW steps by its sign, and two right answers part."""
        weights, rng = dict(np.load(self.settings["weights"])), np.random.default_rng(2)
        for name, p in weights.items() if self.settings.get("fill_zeros") else ():
            if not p.any():
                weights[name] = 0.3 * p.shape[-1] ** -0.5 * rng.standard_normal(p.shape, dtype=np.float32)
        return weights

    def loader(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        text = np.memmap(self.data / "train.bin", dtype=self.meta["dtype"], mode="r")
        return batches(text, self.meta["bos_id"], self.rows, self.seq_len, seed=1)

    def build(self) -> tuple[Any, dict[str, Any], dict[str, Any], Callable]:
        """As the train file builds them, from our weights."""
        run = type("Run", (), {"vocab_size": self.meta["vocab_size"], "seed": 1})
        weights = self.weights()
        self.module.GPT.init_weights = lambda model, seed: self.on.fill(model, weights)
        return self.module.build(run, self.passes)

    # What a leg does -------------------------------------------------------------------------------------------------

    def save_weights(self) -> dict[str, Any]:
        """Write the initial weights that every leg starts from."""
        model = self.module.GPT(self.module.GPTConfig(vocab_size=self.meta["vocab_size"]))
        model.init_weights(1)
        np.savez(self.settings["weights"], **self.on.numbers(model))
        return self.facts

    def losses(self) -> dict[str, Any]:
        """The losses in nats of the first steps from the same weights on the same batches."""
        _, params, moments, step = self.build()
        loader, found, n = self.loader(), [], self.settings["steps"]
        for i in range(n):
            params, moments, loss = step(params, moments, self.module.schedule(i / n, i), loader)
            found.append(loss.item())
        return self.facts | {"losses": found}

    def times(self) -> dict[str, Any]:
        """Seconds a step of windows that hold more and more of it, and what follows from them."""
        probe, probe_flops = self.module.matmul_probe()
        before = speed(probe, PROBE_SECONDS) * probe_flops
        model, params, moments, step = self.build()
        loader, rates, on = self.loader(), self.on.rates(), self.on
        kept = list(islice(loader, 4 * self.passes))
        ready, host = cycle([tuple(map(on.array, pair)) for pair in kept]), cycle(kept)
        forward, gradients = on.forward(model), self.module.make_gradients(model)
        first_seconds: dict[str, float] = {}
        measured: dict[str, list[float]] = defaultdict(list)

        def forward_only() -> None:
            for _ in range(self.passes):
                on.begin(forward(params, *next(ready)))

        def with_backward() -> None:
            for _ in range(self.passes):
                on.begin(*gradients(params, rates, *next(ready))[:2])

        def steps_on(source: Iterator) -> Callable:
            def one() -> None:  # returns nothing: whoever held old weights would keep them from being updated in place
                nonlocal params, moments
                params, moments, loss = step(params, moments, self.module.schedule(0.1, 100), source)
                on.begin(params, moments, loss)
            return one

        windows = {"forward": forward_only, "gradients": with_backward, "step": steps_on(host), "training": steps_on(loader)}
        names = self.settings["windows"]
        for name in names:
            start = time.perf_counter()
            windows[name]()
            on.wait()
            first_seconds[name] = time.perf_counter() - start                   # compiles
            for _ in range(self.settings["warmup"]):
                windows[name]()
            on.wait()
        on.reset_peak()
        for _ in range(self.settings["repeats"]):
            for name in names:  # in turn, so that a slow second hits one window of each
                start = time.perf_counter()
                for _ in range(self.settings["steps"]):
                    windows[name]()
                on.wait()
                measured[name].append((time.perf_counter() - start) / self.settings["steps"])
        seconds, peak = {name: statistics.median(measured[name]) for name in names}, on.peak()
        after = speed(probe, PROBE_SECONDS) * probe_flops
        whole = seconds.get("training") or seconds["step"]
        shapes = {n: tuple(p.shape) for n, p in self.weights().items()}
        flops, product = flops_per_token(shapes, self.seq_len), (before + after) / 2
        return self.facts | {
            "seconds": seconds, "windows": measured, "first_seconds": first_seconds, "tokens_per_second": self.batch_tokens / whole,
            "batch_tokens": self.batch_tokens, "passes": self.passes, "seq_len": self.seq_len, "flops_per_token": flops,
            "parameters": sum(math.prod(s) for s in shapes.values()), "product_tflops": product / 1e12, "drift": after / before - 1,
            "mfu_percent": 100 * flops * self.batch_tokens / whole / product,
            "framework_mb": peak / 2**20 if peak is not None else None, "process_mb": process_peak() / 2**20}

    def train(self) -> dict[str, Any]:
        """A whole training by the file's own loop from our weights, for the scorer."""
        weights = self.weights()
        self.module.GPT.init_weights = lambda model, seed: self.on.fill(model, weights)
        sys.argv = [str(self.path)]
        with self.module.start_run(str(self.path)) as run:
            run.finish(**self.module.train(run))
        facts = json.loads((run.dir / "train.json").read_text())
        return self.facts | {k: facts[k] for k in ("num_steps", "total_tokens", "training_seconds")}


def main() -> None:
    settings = json.loads(os.environ["PEER_SETTINGS"])
    leg = Leg(Path(sys.argv[1]), settings)
    report = getattr(leg, settings["do"])()
    Path(settings["report"]).write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # the loader's thread may hold a lock of the framework


if __name__ == "__main__":
    main()
