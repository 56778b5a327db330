"""MLX and PyTorch on this machine, the same training on each: `benchmark.py compare`.

A leg is a train file on a device. All legs start from the same weights and see the same batches. A leg whose losses or gradients
differ from those of the first one is not timed. The others are timed in rounds, each measurement in a process of its own (leg.py);
then the fastest leg of each backend trains for equal steps and for equal seconds. Table, picture and JSON go to docs/benchmarks/.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from harness import HarnessError, home, write_atomically
from harness.clock import Budget
from harness.machine import TIERS, detect_preset
from scripts.compare_peers import ROOT, TRAIN_FILE, Failed, launch, prepared, run_environment, scored, wide_console, with_constants
from scripts.meters import conditions, others_percent

LEG = Path(__file__).resolve().parent / "leg.py"
TORCH_FILE = ROOT / "train_torch.py"
# A leg: a train file on a device. name: (backend, "mlx" or "torch", mode: see leg.py)
LEGS: dict[str, tuple[str, str, str]] = {
    "mlx": ("mlx", "mlx", "compiled"), "mlx, not compiled": ("mlx", "mlx", "eager"),
    "mps": ("mps", "torch", "eager"), "mps, compiled": ("mps", "torch", "compiled"),
    "mps, 16-bit attention scores": ("mps", "torch", "reductions"),
    "mlx-cuda": ("mlx-cuda", "mlx", "compiled"), "mlx-cuda, not compiled": ("mlx-cuda", "mlx", "eager"),
    "cuda": ("cuda", "torch", "compiled"), "cuda, not compiled": ("cuda", "torch", "eager"),
    "mlx-cpu": ("mlx-cpu", "mlx", "eager"), "mlx-cpu, compiled": ("mlx-cpu", "mlx", "compiled"),
    "cpu": ("cpu", "torch", "eager"), "cpu, compiled": ("cpu", "torch", "compiled"),
}
BACKENDS = tuple(dict.fromkeys(backend for backend, *_ in LEGS.values()))
CPUS = {"cpu", "mlx-cpu"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2}                         # relative, of each of ten losses
GPU_FP32 = 1e-3                                                                 # a GPU adds in another order in each run
BPB_TOLERANCE = 0.01                                                            # relative, of val_bpb after equal steps
SWEEP = 1, 2, 4                                                                 # times depth, batch or row length
LIMIT = 1800                                                                    # seconds that one leg may take
SWAPPED_MB = 1.0                                                                # during a leg, from which on it doesn't count
BUSY_PERCENT = 20                                                               # of the CPU, from which on a machine is loaded
# steps of a window; windows of each part in a round; steps before a window, not counted; seconds of rest before a leg; percent by
# which a matrix product may change its speed during a leg: beyond it the leg is repeated once
GPU_PACE = {"steps": 50, "repeats": 3, "warmup": 10, "rest": 10, "max_drift": 3}
CPU_PACE = {"steps": 5, "repeats": 1, "warmup": 2, "rest": 0, "max_drift": 10}
CANNOT = {
    "mlx": "the backward pass of attention is fused for heads of 64 and 128 channels only",
    "mps": "attention has no fused backward pass and RMSNorm is composed of smaller operations; torch.compile is a prototype",
    "mlx-cuda": "MLX's CUDA backend is younger than its Metal backend",
    "mlx-cpu": "MLX computes everything but matrix products on two threads, one for each of two passes",
    "cpu": "PyTorch doesn't count the memory of its arrays on a CPU",
}
WINDOWS = ("forward", "gradients", "step", "training")                          # each holds what the one before holds, and a part
PARTS = ("forward", "backward", "optimizer", "loader")
FRAMEWORKS = {"mlx": "MLX", "torch": "PyTorch"}
INSTALL = {"mlx": "scripts/setup.sh", "torch": "scripts/setup.sh torch"}


def available() -> tuple[list[str], list[str]]:
    """The backends that this machine has, by asking both frameworks in processes of their own; and why others are not there."""
    asked = {
        "mlx": "import mlx.core as mx; print('mlx-cpu', *['mlx'] * mx.metal.is_available(), "
               "*['mlx-cuda'] * (hasattr(mx, 'cuda') and mx.cuda.is_available()))",
        "torch": "import torch; print('cpu', *['mps'] * torch.backends.mps.is_available(), *['cuda'] * torch.cuda.is_available())"}
    found, missing = [], []
    for framework, code in asked.items():
        if not importlib.util.find_spec(framework):
            missing.append(f"{FRAMEWORKS[framework]} is not installed ({INSTALL[framework]} installs it)")
            continue
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        found += done.stdout.split()
        if done.returncode:
            missing.append(f"{FRAMEWORKS[framework]} can't be imported ({last_line(done.stderr)})")
    return [backend for backend in BACKENDS if backend in found], missing


def last_line(text: str) -> str:
    """What a failed program said last, where its error stands."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def machine() -> dict[str, Any]:
    """This machine in words and numbers, with the versions that were measured. No host name."""
    import psutil
    name = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip() or name
    elif Path("/proc/cpuinfo").exists():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    versions = {p: importlib.metadata.version(p) for p in ("mlx", "torch", "numpy") if importlib.util.find_spec(p)}
    return {"processor": name, "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
            "python": platform.python_version(), "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "conditions": conditions(), **versions}


class Comparison:
    """What all legs of one comparison share: constants, data, initial weights. pace: see GPU_PACE. `folder` is removed by the
    caller. `failed` says why a leg has no result."""

    def __init__(self, folder: Path, data: Path, tier: str, dtype: str, constants: dict[str, str], pace: dict[str, Any],
                 tell: Callable[[str], None]):
        self.folder, self.data, self.tier, self.dtype, self.constants = folder, data, tier, dtype, constants
        self.pace, self.tell = pace, tell
        self.sources = {"mlx": TRAIN_FILE.read_text(), "torch": TORCH_FILE.read_text()}  # read once: they may be edited meanwhile
        self.weights, self.failed = folder / "weights.npz", {}

    def variables(self, backend: str, dtype: str) -> dict[str, str]:
        """The environment of a leg, in which both train files choose the same tier, and the CPU if that is meant. In fp32 MLX must
        not round factors to TF32: PyTorch doesn't, unless it is asked to."""
        return ({"AUTORESEARCH_TIER": self.tier} | ({"AUTORESEARCH_DEVICE": "cpu"} if backend in CPUS else {})
                | ({"MLX_ENABLE_TF32": "0"} if dtype == "fp32" else {}))

    def start(self, leg: str, do: str, constants: dict[str, str] | None = None, environment: dict[str, str] | None = None,
              dtype: str = "", **settings: Any) -> dict[str, Any]:
        """Let the leg do one thing, see leg.py. Returns its report. Failed if it failed."""
        (backend, framework, mode), dtype = LEGS[leg], dtype or self.dtype
        prefix = "mx" if framework == "mlx" else "torch"
        chosen = self.constants | {"DTYPE": f"{prefix}.{DTYPES[dtype]}"} | (constants or {})
        source = with_constants(self.sources[framework], chosen)
        variables = self.variables(backend, dtype) | (environment or {})
        settings = {"do": do, "data": str(self.data), "weights": str(self.weights), "mode": mode, "backend": backend} | settings
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return launch((TRAIN_FILE if framework == "mlx" else TORCH_FILE).name, source, Path(folder), settings, LIMIT, child=LEG,
                          **variables)

    def attempt(self, what: Callable[..., dict[str, Any]], leg: str, *args: Any, during: str = "", **settings: Any,
                ) -> dict[str, Any] | None:
        """The report of `what`, or None, and why in `failed`."""
        try:
            return what(leg, *args, **settings)
        except Failed as failure:
            self.failed[leg + during] = said = last_line(str(failure))
            hint = "; smaller passes for all: --constant MICRO_TOKENS=..." if "memory" in said.lower() else ""
            self.tell(f"{leg}{during} failed: {said}{hint}")
            return None

    def new_weights(self, leg: str, constants: dict[str, str] | None = None) -> dict[str, Any]:
        """Draw initial weights once, for every leg: equal seeds draw different numbers in each framework. Returns the shape."""
        return self.start(leg, "save_weights", constants)

    def trained(self, leg: str, budget: str) -> dict[str, Any]:
        """A whole training and its val_bpb."""
        with tempfile.TemporaryDirectory(dir=self.folder) as run_dir:
            report = self.start(leg, "train", environment=run_environment(self.data, Path(run_dir), budget, 1))
            held = home() / "held" / self.data.name
            return report | {"val_bpb": scored(Path(run_dir), held, **self.variables(LEGS[leg][0], self.dtype))}

    def check(self, legs: list[str], shape: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Parity of each leg that trains at all, before anything is timed: in fp32 the gradients of one batch and ten losses, then
        ten losses in the dtype that is timed. A batch is four rows in two passes."""
        row = shape["seq_len"]
        few = {"BATCH_TOKENS": str(min(shape["batch_tokens"], 4 * row)), "MICRO_TOKENS": str(2 * row)} | self.constants
        checked: dict[str, dict[str, Any]] = {leg: {} for leg in legs}
        for dtype in dict.fromkeys(("fp32", self.dtype)):
            gradients = str(self.folder / "gradients.npz") if dtype == "fp32" else ""
            reports = {leg: report for leg in checked if (report := self.attempt(
                self.start, leg, "parity", few, dtype=dtype, steps=10, fill_zeros=True, gradients=gradients))}
            found = parity(reports, dtype)
            checked = {leg: checked[leg] | {dtype: found[leg]} for leg in found}
        (self.folder / "gradients.npz").unlink(missing_ok=True)
        for leg, p in checked.items():
            p["passed"] = all(p[dtype]["passed"] for dtype in ("fp32", self.dtype))
            self.tell(parity_sentence(leg, p))
        return checked

    def time(self, legs: list[str], count: int, timed: dict[str, list[dict[str, Any]]]) -> None:
        """Time the legs in `count` rounds, each a fresh process, in the order ABBA from a random end; reports go to `timed`. A leg
        that is spoiled is repeated once."""
        backward, began, left = random.random() < 0.5, time.monotonic(), list(legs)
        for i in range(count):
            for leg in sorted(left, key=legs.index, reverse=backward != (i % 2 == 1)):
                for again in (True, False):
                    time.sleep(self.pace["rest"])
                    busy = others_percent()
                    report = self.attempt(self.start, leg, "times", pieces=True, windows=WINDOWS, **self.pace)
                    if not report or not (problem := spoiled(report, self.pace["max_drift"])):
                        break
                    self.tell(f"round {i + 1}, {leg}: {problem}" + ("; once more" if again else ""))
                if not report:
                    left.remove(leg)
                elif report["swapped_mb"] > SWAPPED_MB:
                    self.failed[leg] = f"in round {i + 1} {problem}: thrown away; close other programs"
                    self.tell(f"{leg}: {self.failed[leg]}")
                else:
                    timed.setdefault(leg, []).append(report | {"round": i, "others_percent": busy})
                    self.tell(f"round {i + 1}, {leg}: {report['tokens_per_second']:,.0f} tokens/s")
            if i == 0 and count > 1:
                self.tell(f"{count - 1} more rounds: about {(count - 1) * (time.monotonic() - began) / 60:.0f} min")

    def sweep(self, legs: list[str], base: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Seconds a step as depth, batch and row length grow, one at a time, and the exponents of the growth."""
        shapes = np.load(self.weights)
        depth = len({n.split(".")[1] for n in shapes.files if n.startswith("blocks.")})
        width, tokens, row = shapes["wte.weight"].shape[1], base["batch_tokens"], base["seq_len"]
        fixed = {"DEPTH": depth, "WIDTH": width, "BATCH_TOKENS": tokens, "SEQ_LEN": row}
        axes = {"depth": ("DEPTH", depth), "batch": ("BATCH_TOKENS", tokens), "row length": ("SEQ_LEN", row)}
        results: dict[str, dict[str, Any]] = {}
        for what, (constant, first) in axes.items():
            found: dict[str, dict[int, float]] = {leg: {} for leg in legs}
            for size in (factor * first for factor in SWEEP):
                constants = {k: str(v) for k, v in (fixed | {constant: size}).items()}
                if what == "row length":  # whole rows
                    constants["BATCH_TOKENS"] = str(max(tokens, size))
                during = f", {what} {size}"
                if not self.attempt(self.new_weights, legs[0], constants, during=during):
                    continue
                for leg in legs:
                    if report := self.attempt(self.start, leg, "times", constants, during=during, windows=["step"], **self.pace):
                        found[leg][size] = report["seconds"]["step"]
                        self.tell(f"{what} {size}, {leg}: {1000 * found[leg][size]:.1f} ms a step")
            results[what] = {leg: {"sizes": list(times), "seconds": list(times.values()),
                                   "exponent": exponent(list(times), list(times.values()))}
                             for leg, times in found.items() if len(times) > 1}
        return results

    def measure(self, legs: list[str], count: int, budgets: dict[str, str], sweep: bool) -> dict[str, Any]:
        """Parity, rounds, whole trainings, growth: the result as JSON holds it. Once something is timed, Ctrl-C ends it early with
        what there is. Errors: Failed if there is nothing."""
        timed: dict[str, list[dict[str, Any]]] = {}
        more: dict[str, Any] = {}

        def best() -> list[str]:
            """The fastest leg of each backend."""
            rate = {leg: statistics.median(r["tokens_per_second"] for r in timed[leg]) for leg in legs if leg in timed}
            fastest: dict[str, str] = {}
            for leg in sorted(rate, key=lambda leg: -rate[leg]):
                fastest.setdefault(LEGS[leg][0], leg)
            return [leg for leg in legs if leg in fastest.values()]

        try:
            shape = next((s for leg in legs if (s := self.attempt(self.new_weights, leg))), None)
            checked = self.check(legs, shape) if shape else {}
            if not checked:
                raise Failed("no leg could train; the messages above say why")
            self.time([leg for leg, p in checked.items() if p["passed"]], count, timed)
            if not timed:
                raise Failed("no leg was timed; the messages above say why")
            for key, budget in budgets.items():
                runs = more.setdefault(key, {"budget": budget, "legs": {}})["legs"]
                for leg in best():
                    if run := self.attempt(self.trained, leg, budget, during=f", {budget}"):
                        runs[leg] = run
                        self.tell(f"{leg}: val_bpb {run['val_bpb']:.4f} after {run['num_steps']} steps")
            if sweep:
                more["sweep"] = self.sweep(best(), next(iter(timed.values()))[0])
        except KeyboardInterrupt:
            if not timed:
                raise
            more["interrupted"] = True
            self.tell("interrupted: this was measured so far")
        if steps := more.get("equal_steps"):
            scores = [run["val_bpb"] for run in steps["legs"].values()]
            steps["difference"] = max(scores) / min(scores) - 1 if scores else math.nan
            steps["agree"] = steps["difference"] <= BPB_TOLERANCE
        timed = {leg: timed[leg] for leg in legs if leg in timed}
        first = next(iter(timed.values()))[0]
        shape = {k: first[k] for k in ("batch_tokens", "passes", "seq_len", "flops_per_token", "parameters")}
        return {
            "machine": machine(), "date": time.strftime("%Y-%m-%d"), "parity": checked,
            "settings": {"tier": self.tier, "dtype": self.dtype, "constants": self.constants, "data": self.data.name,
                         "rounds": count, **self.pace, **shape},
            "legs": {leg: medians(reports) for leg, reports in timed.items()}, "ratios": ratios(timed, next(iter(timed))),
            "best": best(), "failed": self.failed, "reports": timed, **more}


def parity(found: dict[str, dict[str, Any]], dtype: str) -> dict[str, dict[str, Any]]:
    """For each leg the largest relative difference of its losses and of its gradients from those of the first leg, and whether it
    may be timed. found: {leg: {"losses": [nats], "gradients": {name: relative difference}}}."""
    results: dict[str, dict[str, Any]] = {}
    first = next(iter(found.values()))["losses"] if found else []
    for leg, report in found.items():
        off = max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(report["losses"], first, strict=True))
        worst, by = max(report["gradients"].items(), key=lambda item: item[1] if math.isfinite(item[1]) else math.inf,
                        default=("", 0.0))
        tolerance = GPU_FP32 if LEGS[leg][0] not in CPUS and dtype == "fp32" else TOLERANCES[dtype]
        results[leg] = {"losses": report["losses"], "difference": off, "gradient_difference": by, "gradient": worst,
                        "tolerance": tolerance, "passed": off <= tolerance and by <= tolerance}
    return results


def parity_sentence(leg: str, p: dict[str, Any]) -> str:
    """Parity of one leg with the first one, in words."""
    parts = []
    for dtype in (key for key in p if key in DTYPES):
        own = p[dtype]
        gradients = f" and gradients within {own['gradient_difference']:.1e} ({own['gradient']})" if own["gradient"] else ""
        parts.append(f"{len(own['losses'])} losses in {dtype} within {own['difference']:.1e}{gradients} (tolerance "
                     f"{own['tolerance']:.0e})")
    return f"Parity of {leg}: {', '.join(parts)}" + ("." if p["passed"] else ": failed, so it was not timed.")


def spoiled(report: dict[str, Any], max_drift: float) -> str:
    """Why a measurement may be wrong, "" if nothing is known."""
    if report["swapped_mb"] > SWAPPED_MB:
        return f"the machine wrote {report['swapped_mb']:,.0f} MB to swap"
    return f"a matrix product changed its speed by {report['drift']:+.0%}" if abs(report["drift"]) > max_drift / 100 else ""


def split(seconds: dict[str, float]) -> dict[str, float]:
    """Milliseconds a step by part, as differences of windows that hold more and more of the step."""
    windows = [1000 * seconds[name] for name in WINDOWS]
    return dict(zip(PARTS, (b - a for a, b in zip([0.0, *windows[:-1]], windows, strict=True)), strict=True))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """A 95 % interval of the median by order statistics, without assuming a distribution; None below six values."""
    n, values = len(values), sorted(values)
    for k in range(n // 2, 0, -1):  # the median lies outside of [k-th, k-th from the end] with this chance
        if 2 * sum(math.comb(n, i) for i in range(k)) / 2**n <= 0.05:
            return values[k - 1], values[n - k]
    return None


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(value) over log(size): 1 is proportional, 0 is constant."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def medians(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one leg: median of each figure, spread of tokens/s, parts of a step, single operations."""
    def median(rows: list[dict[str, Any]], *names: str) -> dict[str, Any]:
        known = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
        return {name: statistics.median(values) if values else None for name, values in known.items()}

    rates = [r["tokens_per_second"] for r in reports]
    return {
        **median(reports, "tokens_per_second", "mfu_percent", "product_tflops", "framework_mb", "process_mb", "import_seconds"),
        **median([r["energy"] for r in reports], "joules_per_1000_tokens", "watts"),
        "lowest": min(rates), "highest": max(rates), "rounds": len(reports),
        "step_ms": statistics.median(1000 * r["seconds"]["training"] for r in reports),
        "parts_ms": split(median([r["seconds"] for r in reports], *WINDOWS)),
        "pieces_ms": median([r["pieces_ms"] for r in reports], *reports[0]["pieces_ms"]),
        "first_step_seconds": statistics.median(r["first_seconds"]["step"] for r in reports),
        "largest_drift": max(abs(r["drift"]) for r in reports)}


def others(reports: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """Percent of the CPU that other programs used before a leg: median and most."""
    percents = [r["others_percent"] for own in reports.values() for r in own]
    return statistics.median(percents), max(percents)


def ratios(reports: dict[str, list[dict[str, Any]]], first: str) -> dict[str, dict[str, Any]]:
    """tokens/s of each leg over those of the leg `first`, round by round. A winner is named only if the interval excludes 1, and
    the machine was not loaded: there the system's scheduler decides, and one framework's threads wait for each other longer."""
    results, calm = {}, others(reports)[0] <= BUSY_PERCENT
    base = {r["round"]: r["tokens_per_second"] for r in reports[first]}
    for leg in (leg for leg in reports if leg != first):
        pairs = [r["tokens_per_second"] / base[r["round"]] for r in reports[leg] if r["round"] in base]
        if pairs:
            bounds = interval(pairs)
            faster = None if not (bounds and calm) else leg if bounds[0] > 1 else first if bounds[1] < 1 else None
            results[leg] = {"against": first, "pairs": pairs, "median": statistics.median(pairs), "interval_95": bounds,
                            "faster": faster}
    return results


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table of a comparison as rows of cells, a column for each leg, heading first."""
    def trained(key: str, title: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        runs = result[key]["legs"]
        return [f"{title} {result[key]['budget']}", *(cell(runs[leg]) if leg in runs else "-" for leg in result["legs"])]

    def number(form: str, value: float | None) -> str:
        return format(value, form) if value is not None else "-"

    rows = [["", *result["legs"]]]
    pieces = dict.fromkeys(name for leg in result["legs"].values() for name in leg["pieces_ms"])
    for title, cell in (
            ("tokens/s, median", lambda m: f"{m['tokens_per_second']:,.0f}"),
            ("lowest to highest", lambda m: f"{m['lowest']:,.0f} to {m['highest']:,.0f}"),
            ("ms a step", lambda m: f"{m['step_ms']:.1f}"),
            *((part, lambda m, part=part: f"{m['parts_ms'][part]:.1f}") for part in PARTS),
            *((f"{name} alone, ms", lambda m, name=name: number(".2f", m["pieces_ms"].get(name))) for name in pieces),
            ("MFU, % of a product", lambda m: f"{m['mfu_percent']:.1f}"),
            ("product, TFLOP/s", lambda m: f"{m['product_tflops']:.2f}"),
            ("arrays at their peak, MB", lambda m: number(",.0f", m["framework_mb"])),
            ("process at its peak, MB", lambda m: f"{m['process_mb']:,.0f}"),
            ("energy, J per 1,000 tokens", lambda m: number(".2f", m["joules_per_1000_tokens"])),
            ("power, W", lambda m: number(".1f", m["watts"])),
            ("import, s (not counted)", lambda m: f"{m['import_seconds']:.1f}"),
            ("first step, s (not counted)", lambda m: f"{m['first_step_seconds']:.1f}")):
        rows.append([title, *(cell(m) for m in result["legs"].values())])
    for key in ("equal_steps", "equal_seconds"):
        if key in result:
            rows.append(trained(key, "val_bpb after", lambda run: f"{run['val_bpb']:.4f}"))
    if "equal_seconds" in result:
        rows.append(trained("equal_seconds", "steps in", lambda run: f"{run['num_steps']:,}"))
    return rows


def table_of(result: dict[str, Any]) -> Table:
    """The table for the terminal."""
    heading, *rows = rows_of(result)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for leg in heading[1:]:
        table.add_column(leg, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def sentences(result: dict[str, Any]) -> list[str]:
    """What the table doesn't show, one sentence a line."""
    m, s, (busy, busiest) = result["machine"], result["settings"], others(result["reports"])
    loaded = " (a loaded machine: figures are low and spread)" if busy > BUSY_PERCENT else ""
    lines = [f"{m['processor']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}; CPU threads: {m['threads']}; "
             f"MLX {m.get('mlx', '-')}, PyTorch {m.get('torch', '-')}. {result['date']}.",
             f"Before each leg other programs used {busy:.0f} % of the CPU in the median, at most "
             f"{busiest:.0f} %{loaded}. No leg counts in which the machine swapped.",
             *(f"About this machine: {line}." for line in m["conditions"]),
             f"{s['parameters'] / 1e6:.2f} M parameters, {s['batch_tokens']:,} tokens a step in rows of {s['seq_len']}, gradient "
             f"accumulation steps: {s['passes']}; {s['flops_per_token'] / 1e6:.2f} MFLOPs a token, {s['dtype']}, tier {s['tier']}, "
             f"data {s['data']}; in both files {', '.join(f'{k} = {v}' for k, v in s['constants'].items())}.",
             f"{s['rounds']} rounds in fresh processes, windows of {s['steps']} steps after {s['warmup']} of "
             f"warm-up, windows of each part: {s['repeats']}."]
    if result.get("interrupted"):
        lines.append("It was interrupted: what is missing was not measured.")
    lines += [parity_sentence(leg, p) for leg, p in result["parity"].items() if leg != next(iter(result["parity"]))]
    for leg, r in result["ratios"].items():
        bounds = f"95 % interval {r['interval_95'][0]:.2f} to {r['interval_95'][1]:.2f}" if r["interval_95"] else \
            "too few rounds for an interval, six are needed"
        verdict = f"{r['faster']} is faster" if r["faster"] else "no winner" + ", as the machine was loaded" * bool(loaded)
        lines.append(f"{leg} over {r['against']}: {r['median']:.2f} times the tokens/s, {bounds}: {verdict}.")
    if (steps := result.get("equal_steps")) and len(steps["legs"]) > 1:
        lines.append(f"val_bpb after {steps['budget']}: apart by {steps['difference']:.2%} "
                     f"({'they agree' if steps['agree'] else 'they disagree, so one is wrong'}; tolerance {BPB_TOLERANCE:.0%}).")
    for what, legs in result.get("sweep", {}).items():
        if legs:
            lines.append(f"Time of a step grows with {what} to the power of "
                         + ", ".join(f"{leg['exponent']:.2f} ({name})" for name, leg in legs.items()) + ".")
    for told in ("source", "untold"):
        by_words: dict[str, list[str]] = {}
        for leg, own in result["reports"].items():
            for words in dict.fromkeys(r["energy"][told] for r in own if told in r["energy"]):
                by_words.setdefault(words, []).append(leg)
        lines += [f"Energy of {', '.join(legs)}{' is not told' if told == 'untold' else ''}: {words}."
                  for words, legs in by_words.items()]
    drifted = [f"{leg} {m['largest_drift']:.0%}" for leg, m in result["legs"].items() if m["largest_drift"] > s["max_drift"] / 100]
    lines += [f"The speed of a matrix product drifted during a leg: {', '.join(drifted)}."] if drifted else []
    if any(ms < 0 for leg in result["legs"].values() for ms in leg["parts_ms"].values()):
        lines.append("Parts of a step are differences of windows: a negative one is smaller than the spread of the windows.")
    lines += [f"{leg} failed: {said}." for leg, said in result["failed"].items()]
    lines += [f"{words[0].upper()}{words[1:]}." for words in result["missing"]]
    backends = dict.fromkeys(LEGS[leg][0] for leg in result["legs"])
    return lines + [f"{backend}: {CANNOT[backend]}." for backend in backends if backend in CANNOT]


def picture(result: dict[str, Any], path: Path) -> None:
    """Bars of milliseconds a step, split into parts, with tokens/s beside them."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    legs, m, s = result["legs"], result["machine"], result["settings"]
    loaded = ", loaded" if others(result["reports"])[0] > BUSY_PERCENT else ""
    figure, axes = pyplot.subplots(figsize=(9, 1.7 + 0.62 * len(legs)), dpi=120)
    longest = max(leg["step_ms"] for leg in legs.values())
    for row, leg in enumerate(legs.values()):
        left = end = 0.0
        for part, colour in zip(PARTS, ("#4477aa", "#66ccee", "#ccbb44", "#bbbbbb"), strict=True):
            end += leg["parts_ms"][part]
            width = max(0.0, min(end, leg["step_ms"]) - left)                   # a part may be negative, a bar may not
            axes.barh(row, width, left=left, color=colour, height=0.6, label=part if row == 0 else None)
            left += width
        axes.text(left + 0.01 * longest, row, f"{leg['tokens_per_second']:,.0f} tokens/s\n"
                  f"{leg['lowest']:,.0f} to {leg['highest']:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(legs)), [f"{FRAMEWORKS[LEGS[leg][1]]}\n{leg}" for leg in legs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * longest)
    axes.set_xlabel("milliseconds a step (median)")
    axes.set_title(f"{m['processor']}, {m['cores']} cores{loaded}: "
                   f"{s['parameters'] / 1e6:.1f} M parameters, {s['batch_tokens']:,} tokens a step, rows of {s['seq_len']}, "
                   f"{s['dtype']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), ncol=len(PARTS), frameon=False, fontsize=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})
    pyplot.close(figure)


def write(result: dict[str, Any], folder: Path, name: str) -> None:
    """NAME.json with everything, NAME.md with the table, NAME.png with the picture."""
    rows = rows_of(result)
    lines = [f"# {' and '.join(result['legs'])}", "", f"![milliseconds a step]({name}.png)", "",
             *("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])), "",
             *(f"- {line}" for line in sentences(result)), "", f"Every measurement: [{name}.json]({name}.json)."]
    write_atomically(folder / f"{name}.md", ("\n".join(lines) + "\n").encode())
    write_atomically(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    picture(result, folder / f"{name}.png")


def chosen_backends(context: click.Context, option: click.Parameter, value: str | None) -> tuple[list[str], list[str]]:
    """--backends as a list, default: all this machine has; and why others are not there."""
    here, missing = available()
    asked = value.split(",") if value else here
    if wrong := [backend for backend in asked if backend not in here]:
        raise click.BadParameter(f"{', '.join(wrong)}: expected some of those that this machine has: {', '.join(here) or 'none'}"
                                 + "".join(f"; {reason}" for reason in missing))
    if not asked:
        raise click.BadParameter(f"there is nothing to measure here: {'; '.join(missing)}")
    return list(dict.fromkeys(asked)), missing


def assignments(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """--constant NAME=VALUE options as a dictionary."""
    pairs = [v.partition("=") for v in values]
    if not all(equals and name.isidentifier() for name, equals, _ in pairs):
        raise click.BadParameter(f"expected NAME=VALUE, got {', '.join(values)}")
    return {name: value for name, _, value in pairs}


def budget(context: click.Context, option: click.Parameter, value: str) -> str:
    """--equal-steps or --equal-seconds, "" for none."""
    try:
        return "" if value == "0" else Budget(value).text
    except HarnessError as error:
        raise click.BadParameter(str(error)) from error


def writable(context: click.Context, option: click.Parameter, folder: Path) -> Path:
    """--out, tried before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise click.BadParameter(f"{folder} can't be written: {error.strerror}") from error


@click.command()
@click.option("--backends", callback=chosen_backends, help=f"Some of {','.join(BACKENDS)}. Default: all this machine has.")
@click.option("--tier", "tiers", multiple=True, type=click.Choice(TIERS),
              help="Tier whose constants are used; can be repeated. Default: this "
              "machine's, and on a GPU also cuda, upstream's shape.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Of activations; can be repeated. Default: "
              "fp32 on a CPU, else bf16.")
@click.option("--constant", "constants", multiple=True, callback=assignments, help="NAME=VALUE in both files; can be repeated.")
@click.option("--rounds", "count", type=click.IntRange(1), default=6, show_default=True, help="Six give a 95 % interval.")
@click.option("--steps", type=click.IntRange(1), help=f"Steps in each window. Default: {GPU_PACE['steps']} with a GPU, else "
              f"{CPU_PACE['steps']}.")
@click.option("--equal-steps", default="200steps", show_default=True, callback=budget,
              help="Budget of one more training per backend, which is scored; 0 skips it.")
@click.option("--equal-seconds", default="60s", show_default=True, callback=budget,
              help="Budget of one more training per backend, which is scored; 0 skips it.")
@click.option("--sweep", is_flag=True, help="Double depth, batch and row length twice each, and report growth exponents.")
@click.option("--compile-cpu", is_flag=True, help="Time compiled legs on a CPU, too: a C++ compiler runs for minutes in each.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="train/<id>. Default: prepared last.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "docs" / "benchmarks", show_default=True,
              callback=writable)
@click.option("--name", help="Of the files. Default: backends, tier and dtype.")
def compare(backends: tuple[list[str], list[str]], tiers: tuple[str, ...], dtypes: tuple[str, ...], constants: dict[str, str],
            count: int, steps: int | None, equal_steps: str, equal_seconds: str, sweep: bool, compile_cpu: bool,
            data: Path | None, out: Path, name: str | None) -> None:
    """MLX and PyTorch on this machine: the same model, optimizer, batches, initial weights and dtype on each. Ctrl-C writes what
    has been measured."""
    console, (chosen, missing) = wide_console(), backends
    on_cpu = set(chosen) <= CPUS
    pace = (CPU_PACE if on_cpu else GPU_PACE) | ({"steps": steps} if steps else {})
    data = prepared(data)
    tiers = tiers or (("cpu",) if on_cpu else tuple(dict.fromkeys((detect_preset(), "cuda"))))
    dtypes = dtypes or ("fp32" if on_cpu else "bf16",)
    legs = [leg for backend in chosen for leg in LEGS if LEGS[leg][0] == backend]
    if CPUS & set(chosen) and not (compile_cpu and shutil.which("c++")):
        legs = [leg for leg in legs if LEGS[leg][0] not in CPUS or LEGS[leg][2] != "compiled"]
        missing = [*missing, "neither framework compiles for the CPU: " + (
            "no C++ compiler was found" if compile_cpu else "both train files leave it off there, --compile-cpu turns it on")]
    budgets = {key: b for key, b in (("equal_steps", equal_steps), ("equal_seconds", equal_seconds)) if b}
    if not (home() / "held" / data.name).is_dir():
        missing, budgets = [*missing, f"{data.name} has no held-out text here, so val_bpb is left out"], {}

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for words in missing:
        tell(f"note: {words}")
    for tier, dtype in itertools.product(tiers, dtypes):
        own = name if name and len(tiers) == len(dtypes) == 1 else f"{name or '-vs-'.join(chosen)}-{tier}-{dtype}"
        tell(f"{tier}, {dtype}: {', '.join(legs)}")
        with tempfile.TemporaryDirectory() as folder:
            shared = Comparison(Path(folder), data, tier, dtype, {"DROPOUT": "(0.0,)"} | constants, pace, tell)
            result = shared.measure(legs, count, budgets, sweep) | {"missing": missing}
        write(result, out, own)
        console.print(table_of(result))
        for line in sentences(result):
            tell(line)
        tell(f"written: {own}.json, .md and .png in {out}")
        if result.get("interrupted"):
            raise click.Abort
