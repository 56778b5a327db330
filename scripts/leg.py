"""One backend's part of `benchmark.py compare`, in a process of its own: started by benchmark.py, not by hand.

    PEER_SETTINGS='{"do": "times", ...}' python leg.py TRAIN_FILE

train_mlx.py and train_torch.py have the same names, so one text here drives both; what differs stands in the two classes. A
mode is "compiled", "eager" or "reductions" (eager, with 16-bit attention scores in PyTorch). Parts of a step are differences of
whole windows: nothing waits for the device inside a step, because that would slow it down.
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
from harness.machine import process_peak
from harness.run import batches, row_starts
from scripts.meters import Macmon, Untold, energy_meter, swapped_out

ENERGY_SECONDS = 1.0                                                            # of windows, from which on energy is told
PROBE_SECONDS = 0.3                                                             # of matrix products, before and after a leg


class OnMLX:
    """train_mlx.py, driven step by step."""

    def __init__(self, module: ModuleType, mode: str):
        import mlx.core as mx
        from mlx.utils import tree_flatten, tree_unflatten
        self.module, self.mx, self.flatten, self.unflatten = module, mx, tree_flatten, tree_unflatten
        (mx.enable_compile if mode == "compiled" else mx.disable_compile)()
        self.array, self.numbers, self.compiled = mx.array, np.array, mx.compile

    def parameters(self, model: Any) -> dict[str, Any]:
        return dict(self.flatten(model.parameters()))

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
            if self.module.NGRAMS in params:  # as `build` does: a table that the model holds couldn't be updated in place
                model.ngrams.weight = self.mx.zeros((0,))
            return result
        return call

    def random(self, *shape: int) -> Any:
        return self.mx.random.normal(shape).astype(self.module.DTYPE)

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        return self.module.attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")

    def gradient(self, function: Callable) -> Callable:
        """The gradients of the sum of what `function` returns, for each of its arrays."""
        mx = self.mx

        def both(*arrays: Any) -> Any:
            return mx.grad(lambda *a: function(*a).astype(mx.float32).sum(), tuple(range(len(arrays))))(*arrays)
        return mx.compile(both)

    def begin(self, *values: Any) -> None:
        self.mx.async_eval(values)

    def begin_pass(self, last: Any, result: Any) -> None:
        """As the train file does: on a CPU, every second call begins this pass and the last one."""
        self.module.async_eval(last, result)

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
        setattr(module, "compiled", lambda f: torch.compile(f, dynamic=False) if mode == "compiled" else f)  # noqa: B010
        self.compiled = module.compiled

    def array(self, numbers: np.ndarray) -> Any:
        t = self.module.to_device(self.torch.from_numpy(np.ascontiguousarray(numbers)))
        return t if t.is_floating_point() else t.long()

    def numbers(self, t: Any) -> np.ndarray:
        return t.detach().cpu().numpy()

    def parameters(self, model: Any) -> dict[str, Any]:
        return dict(model.named_parameters())

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

    def random(self, *shape: int) -> Any:
        return self.module.to_device(self.torch.randn(shape)).to(self.module.DTYPE)

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        return self.module.attention(q, k, v)

    def gradient(self, function: Callable) -> Callable:
        """The gradients of the sum of what `function` returns, for each of its tensors."""
        forward = self.module.compiled(lambda *tensors: function(*tensors).float().sum())

        def both(*tensors: Any) -> Any:
            tensors = tuple(t.detach().requires_grad_() for t in tensors)
            return self.torch.autograd.grad(forward(*tensors), tensors)
        return both

    def begin(self, *values: Any) -> None:
        """PyTorch begins by itself."""

    begin_pass = begin

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
        self.on: Any = ours(self.module, settings["mode"])
        self.facts: dict[str, Any] = {"import_seconds": time.perf_counter() - began, "device": self.module.device_name()}
        self.data = Path(settings["data"])
        self.meta = json.loads((self.data / "meta.json").read_text())
        m = self.module
        self.seq_len = m.SEQ_LEN  # also where the data asks for shorter rows: the shape that is measured is the file's
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
        starts = row_starts(text, self.meta["bos_id"], self.seq_len)
        return batches(text, starts, self.rows, self.seq_len, seed=1)

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
        np.savez(self.settings["weights"], **{n: self.on.numbers(p) for n, p in self.on.parameters(model).items()})
        return self.facts | {"seq_len": self.seq_len, "batch_tokens": self.batch_tokens}

    def parity(self) -> dict[str, Any]:
        """The losses in nats of the first steps from the same weights on the same batches. With settings["gradients"], a file, also
        the gradients of the first batch: the first leg writes them there, another one tells how far its own are from those,
        {name: norm of the difference over norm}."""
        model, params, moments, step = self.build()
        off = {}
        if self.settings.get("gradients"):
            batch = map(self.on.array, next(self.loader()))
            _, grads, _ = self.module.make_gradients(model)(params, self.on.rates(), *batch)
            own, place = {n: self.on.numbers(g) for n, g in grads.items()}, Path(self.settings["gradients"])
            if not place.exists():
                np.savez(place, **own)
            first = np.load(place)
            off = {n: float(np.linalg.norm(own[n] - first[n]) / np.linalg.norm(first[n])) for n in first.files}
        loader, losses, n = self.loader(), [], self.settings["steps"]
        for i in range(n):
            params, moments, loss = step(params, moments, self.module.schedule(i / n, i), loader)
            losses.append(loss.item())
        return self.facts | {"losses": losses, "gradients": off}

    def pieces(self, moments: dict[str, Any]) -> dict[str, float]:
        """Milliseconds of single operations at this model's shapes: forward and backward pass of attention and of a norm, the
        update of the n-gram tables by one batch, a Muon step on the largest group of matrices. The two updates are awaited one by
        one: MLX copies an array instead of updating it in place while an unfinished operation still holds it."""
        m, on, rng = self.module, self.on, np.random.default_rng(3)
        rows, T, C, heads = self.rows, self.seq_len, m.WIDTH, max(1, m.WIDTH // m.HEAD_DIM)
        weights, state = self.weights(), {}
        attention, norm = on.gradient(on.attention), on.gradient(m.norm)
        qkv, x = [on.random(rows, heads, T, C // heads) for _ in range(3)], on.random(rows, T, C)
        todo: dict[str, Callable] = {"attention": lambda: attention(*qkv), "norm": lambda: norm(x)}

        def updates(name: str, function: Callable, *first: Any) -> None:
            state[name] = first

            def one() -> Any:  # nobody else holds what it takes, so that an update may happen in place
                state[name] = tuple(function(*state.pop(name)))
                return state[name]
            todo[name] = one

        groups = m.matrix_groups(weights)
        largest = max(groups, key=lambda key: sum(weights[n].size for n in groups[key]))
        matrices = np.stack([weights[n] for n in groups[largest]])
        grads = on.array(rng.standard_normal(matrices.shape, dtype=np.float32))
        muon = on.compiled(lambda p, a, b: m.muon(p, grads, a, b, 0.02, 0.9, 0.1))
        updates("Muon", muon, on.array(matrices), *moments[largest])
        if m.NGRAMS in weights:
            seen = m.ngram_rows(on.array(next(self.loader())[0]), m.NGRAM_BUCKETS)[0]
            g = on.array(rng.standard_normal((rows, T, C), dtype=np.float32))
            table = on.array(weights[m.NGRAMS])
            updates("n-gram rows", lambda table, v: m.adagrad_rows(table, v, seen, g, 0.1), table, *moments[m.NGRAMS])
            del table  # or no update could happen in place
        found = {}
        for name, piece in todo.items():
            times = []
            for _ in range(1 + self.settings["repeats"]):  # the first may compile
                start = time.perf_counter()
                for _ in range(self.settings["steps"]):
                    on.begin(piece())
                    if name in state:
                        on.wait()
                on.wait()
                times.append((time.perf_counter() - start) / self.settings["steps"])
            found[name] = 1000 * statistics.median(times[1:])
        return found

    def times(self) -> dict[str, Any]:
        """Seconds a step of windows that hold more and more of it, and what follows from them."""
        probe, probe_flops = self.module.matmul_probe()
        before, swapped = speed(probe, PROBE_SECONDS) * probe_flops, swapped_out()
        try:
            meter, untold = energy_meter(self.settings["backend"] in ("cuda", "mlx-cuda")), ""
        except Untold as error:
            meter, untold = None, str(error)
        model, params, moments, step = self.build()
        loader, rates, on = self.loader(), self.on.rates(), self.on
        kept = list(islice(loader, 4 * self.passes))
        ready, host = cycle([tuple(map(on.array, pair)) for pair in kept]), cycle(kept)
        forward, gradients = on.forward(model), self.module.make_gradients(model)
        first_seconds: dict[str, float] = {}
        measured: dict[str, list[float]] = defaultdict(list)

        def passes(function: Callable) -> None:
            last, result = (), ()
            for _ in range(self.passes):
                last, result = result, function(*next(ready))
                on.begin_pass(last, result)
            on.begin(result)  # if their number is odd, the last one has not begun

        def steps_on(source: Iterator) -> Callable:
            def one() -> None:  # returns nothing: whoever held old weights would keep them from being updated in place
                nonlocal params, moments
                params, moments, loss = step(params, moments, self.module.schedule(0.1, 100), source)
                on.begin(params, moments, loss)
            return one

        windows = {"forward": lambda: passes(lambda x, y: forward(params, x, y)),
                   "gradients": lambda: passes(lambda x, y: gradients(params, rates, x, y)[:2]),
                   "step": steps_on(host), "training": steps_on(loader)}
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
        joules = 0.0
        for _ in range(self.settings["repeats"]):
            for name in names:  # in turn, so that a slow second hits one window of each
                counted, start = meter.joules() if meter and name == "training" else 0.0, time.perf_counter()
                for _ in range(self.settings["steps"]):
                    windows[name]()
                on.wait()
                measured[name].append((time.perf_counter() - start) / self.settings["steps"])
                joules += meter.joules() - counted if meter and name == "training" else 0.0
        seconds, peak, memory = {name: statistics.median(measured[name]) for name in names}, on.peak(), process_peak()
        after, swapped = speed(probe, PROBE_SECONDS) * probe_flops, swapped_out() - swapped
        trained = sum(measured["training"]) * self.settings["steps"]
        if meter and not (trained >= ENERGY_SECONDS and math.isfinite(joules)):
            untold = f"the windows lasted {trained:.1f} s, expected at least {ENERGY_SECONDS:.0f}: ask for more --steps"
        energy = {"untold": untold} if untold or not meter else {
            "watts": joules / trained, "source": meter.source,
            "joules_per_1000_tokens": 1000 * joules / (len(measured["training"]) * self.settings["steps"] * self.batch_tokens)}
        if isinstance(meter, Macmon):
            meter.close()
        whole = seconds.get("training") or seconds["step"]
        shapes = {n: tuple(p.shape) for n, p in self.weights().items()}
        flops, product = model.flops_per_token(self.seq_len), (before + after) / 2
        return self.facts | {
            "seconds": seconds, "windows": measured, "first_seconds": first_seconds, "tokens_per_second": self.batch_tokens / whole,
            "batch_tokens": self.batch_tokens, "passes": self.passes, "seq_len": self.seq_len, "flops_per_token": flops,
            "parameters": sum(math.prod(s) for s in shapes.values()), "product_tflops": product / 1e12, "drift": after / before - 1,
            "mfu_percent": 100 * flops * self.batch_tokens / whole / product,
            "framework_mb": peak / 2**20 if peak is not None else None, "process_mb": memory / 2**20,
            "swapped_mb": swapped / 2**20, "energy": energy,
            "pieces_ms": self.pieces(moments) if self.settings.get("pieces") else {}}

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
