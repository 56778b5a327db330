"""How fast does a train file train on this machine: beside the other framework, technique by technique, and beside peers?

    python scripts/benchmark.py compare --backends mlx,mps   # train_mlx.py and train_torch.py from the same weights and batches
    python scripts/benchmark.py ablation                     # on the data prepared last, at this machine's size
    python scripts/benchmark.py anchor --peer fork=CHECKOUT  # depth 4, width 256, T 256, vocabulary 8192, fp32, 4,096 tokens a step

Every measurement is a process of its own, and the tables show medians over interleaved rounds. `compare` times only what passes a
test of parity first, and writes a table, a picture and JSON to docs/benchmarks/. Each variant of the ablation is an edit of the
file as it is now: one technique taken out; tokens/s is of its median step after warm-up. The anchor trains on random
tokens of Zipf's frequencies: speed is compared there, not loss.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
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
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness import home, write_atomically  # noqa: E402
from harness.machine import TIERS, detect_preset  # noqa: E402
from scripts.ablations import ABLATIONS, ADAMW_FOR_ALL, BASE, Edits  # noqa: E402
from scripts.compare_peers import (  # noqa: E402
    TRAIN_FILE,
    Failed,
    adapt,
    launch,
    named_path,
    prepared,
    scored,
    wide_console,
    with_constants,
)

LIMIT = 1800                                                                    # seconds that one measurement may take
ROW, VOCAB = 256, 8192                                                          # the anchor: everybody at one size
COMMON = {"DEPTH": 4, "HEAD_DIM": 128}
PEERS = {**COMMON, "WINDOW_PATTERN": '"L"', "ASPECT_RATIO": 64, "TOTAL_BATCH_SIZE": 4096, "DEVICE_BATCH_SIZE": 4096 // ROW}
OURS = {**COMMON, "WIDTH": 256, "SEQ_LEN": ROW, "NGRAM_BUCKETS": "()", "SOFTCAP": 15.0, "BATCH_TOKENS": 4096}


def edited(source: str, edits: Edits) -> str:
    """`source` with every old text replaced. Failed where one isn't there: the file has changed, and the table must follow."""
    for old, new in edits:
        if old not in source:
            raise Failed(f"{TRAIN_FILE.name} no longer has the text {old!r}: adapt scripts/ablations.py")
        source = source.replace(old, new)
    return source


def variant(source: str, name: str) -> str:
    """The train file as the ablation `name` has it. Failed where it no longer fits."""
    _, constants, edits = ABLATIONS[name]
    return edited(with_constants(source, constants), edits)


def random_text(folder: Path) -> Path:
    """A train/<id> directory of a million random tokens, frequent ones first."""
    chances = 1 / (np.arange(VOCAB) + 10.0)
    tokens = np.random.default_rng(1).choice(VOCAB, 1_000_000, p=chances / chances.sum()).astype(np.uint16)
    (folder / "train.bin").write_bytes(tokens.tobytes())
    (folder / "tokenizer.model").write_bytes(b"")
    meta = {"vocab_size": VOCAB, "seq_len": ROW, "dtype": "uint16", "bos_id": VOCAB - 1, "budget": "1steps"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def measure_ours(source: str, data: Path, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        variables = {"DATA": str(data), "RUN_DIR": f"{folder}/run", "BUDGET": f"{steps}steps", "SEED": "1", "SCORE": "0"}
        return launch(TRAIN_FILE.name, source, Path(folder), {}, LIMIT, **{f"AUTORESEARCH_{k}": v for k, v in variables.items()})


def measure_peer(source: str, data: Path, steps: int, python: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"data": str(data), "seq_len": ROW, "seconds": 1e6, "seed": 1, "steps": steps}
        return launch("train.py", source, Path(folder), settings, LIMIT, python)


def rounds(todo: dict[str, Callable[[], dict[str, Any]]], count: int, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Every measurement `count` times, interleaved: whatever else the machine does hits all of them. What fails is left out."""
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in todo}
    for i in range(count):
        for name, measure in todo.items():
            if len(reports[name]) < i:  # it failed before
                continue
            try:
                reports[name].append(measure())
                said = f"{reports[name][-1]['tokens_per_second']:,.0f} tokens/s"
            except Failed as failure:
                said = str(failure)
            console.print(f"round {i + 1}, {name}: {said}", markup=False, highlight=False, soft_wrap=True)
    return reports


def show(reports: dict[str, list[dict[str, Any]]], against: dict[str, str], out: Path | None, console: Console) -> None:
    """The table of medians; `against` says what each is compared with."""
    def median(name: str, key: str = "tokens_per_second") -> float:
        return statistics.median(r[key] for r in reports[name])

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("tokens/s", "lowest", "highest", "change", "arrays MB", "process MB"):
        table.add_column(title, justify="right")
    for name, base in against.items():
        if not reports[name]:
            table.add_row(Text(name), "failed")
            continue
        rates = [r["tokens_per_second"] for r in reports[name]]
        change = f"{100 * median(name) / median(base) - 100:+.1f} %" if reports[base] and name != base else ""
        arrays = median(name, "framework_mb")
        table.add_row(Text(name if base in (name, next(iter(against))) else f"{name} (against {base})"), f"{median(name):,.0f}",
                      f"{min(rates):,.0f}", f"{max(rates):,.0f}", change, f"{arrays:,.0f}" if arrays else "-",
                      f"{median(name, 'process_mb'):,.0f}")
    console.print(table)
    if out:
        out.write_text(json.dumps(reports, indent=1))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Speed and memory of the train file, in interleaved runs."""


def common(command: Callable) -> Callable:
    """The options of both commands."""
    for option in (click.option("--rounds", "count", type=click.IntRange(1), default=5, show_default=True, help="Measurements."),
                   click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write all reports here.")):
        command = option(command)
    return command


@main.command()
@common
@click.option("--steps", type=click.IntRange(3), default=60, show_default=True, help="Of each measurement, warm-up included.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="train/<id>. Default: prepared last.")
@click.option("--only", multiple=True, type=click.Choice(list(ABLATIONS)), help="These variants (and what they are compared with).")
def ablation(count: int, out: Path | None, steps: int, data: Path | None, only: tuple[str, ...]) -> None:
    """What each technique of train_mlx.py gives."""
    data = prepared(data)
    chosen = {BASE, *only, *(ABLATIONS[name][0] for name in only)} if only else set(ABLATIONS)
    source, console = TRAIN_FILE.read_text(), wide_console()  # read once: it may be edited meanwhile
    todo = {name: lambda name=name: measure_ours(variant(source, name), data, steps) for name in ABLATIONS if name in chosen}
    show(rounds(todo, count, console), {name: ABLATIONS[name][0] for name in todo}, out, console)


@main.command()
@common
@click.option("--steps", type=click.IntRange(3), default=12, show_default=True, help="Of each measurement, warm-up included.")
@click.option("--peer", "peers", multiple=True, callback=named_path, help="NAME=PATH of a checkout, in fp32; can be repeated.")
@click.option("--peer-bf16", "shipped", multiple=True, callback=named_path, help="NAME=PATH, in the dtypes it was shipped with.")
@click.option("--peer-python", default=sys.executable, help="The peers' interpreter: with NumPy, sentencepiece, their framework.")
def anchor(count: int, out: Path | None, steps: int, peers: dict[str, Path], shipped: dict[str, Path], peer_python: str) -> None:
    """Ours set to upstream's model, and peers, at one size."""
    console, ours = wide_console(), adapt(TRAIN_FILE.read_text(), OURS)
    with tempfile.TemporaryDirectory() as folder:
        data = random_text(Path(folder))
        frugal = with_constants(ours, {"MICRO_TOKENS": 1024})
        todo = {"ours, Muon and AdamW": lambda: measure_ours(ours, data, steps),
                "ours, AdamW for all": lambda: measure_ours(edited(ours, ADAMW_FOR_ALL), data, steps),
                "ours, Muon, small passes": lambda: measure_ours(frugal, data, steps),
                "ours, AdamW, small passes": lambda: measure_ours(edited(frugal, ADAMW_FOR_ALL), data, steps)}
        for dtype, group in (("fp32", peers), ("as shipped", shipped)):
            for name, path in group.items():
                todo[f"{name}, {dtype}"] = lambda path=path, fp32=dtype == "fp32": measure_peer(
                    adapt((path / "train.py").read_text(), PEERS, fp32=fp32), data, steps, peer_python)
        show(rounds(todo, count, console), dict.fromkeys(todo, next(iter(todo))), out, console)


# ---------------------------------------------------------------------------------------------------------------------
# Compare: MLX and PyTorch, the same training on each
# ---------------------------------------------------------------------------------------------------------------------

LEG = Path(__file__).resolve().parent / "leg.py"
TORCH_FILE = ROOT / "train_torch.py"
# A leg: a train file on a device. name: (backend, "mlx" or "torch", mode: see leg.py; "" is as the file has it)
LEGS: dict[str, tuple[str, str, str]] = {
    "mlx": ("mlx", "mlx", "compiled"), "mlx, not compiled": ("mlx", "mlx", "eager"),
    "mps": ("mps", "torch", "eager"), "mps, compiled": ("mps", "torch", "compiled"),
    "mps, 16-bit attention scores": ("mps", "torch", "reductions"),
    "mlx-cuda": ("mlx-cuda", "mlx", "compiled"), "mlx-cuda, not compiled": ("mlx-cuda", "mlx", "eager"),
    "cuda": ("cuda", "torch", "compiled"), "cuda, not compiled": ("cuda", "torch", "eager"),
    "mlx-cpu": ("mlx-cpu", "mlx", ""), "cpu": ("cpu", "torch", ""),
}
BACKENDS = tuple(dict.fromkeys(backend for backend, *_ in LEGS.values()))
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2}                         # relative, of each of ten losses
GPU_FP32 = 1e-3                                                                 # a GPU may multiply fp32 in fewer bits
BPB_TOLERANCE = 0.01                                                            # relative, of val_bpb after equal steps
CANNOT = {
    "mlx": "no separate attention kernels are timed; the backward pass of attention is fused for heads of 64 and 128 only",
    "mps": "attention has no fused backward pass and RMSNorm is composed of smaller operations; torch.compile is a prototype",
    "mlx-cuda": "MLX's CUDA backend is younger than its Metal backend",
    "mlx-cpu": "MLX computes everything but matrix products on one thread; mx.compile is off, as it needs a C++ compiler",
    "cpu": "torch.compile is off, as it needs a C++ compiler; PyTorch doesn't count the memory of its arrays on a CPU",
}
PARTS = ("forward", "backward", "optimizer", "loader")


def available() -> list[str]:
    """The backends that this machine has, by asking both frameworks in processes of their own."""
    asked = {
        "mlx": "import mlx.core as mx; print('mlx-cpu', *['mlx'] * mx.metal.is_available(), "
               "*['mlx-cuda'] * (hasattr(mx, 'cuda') and mx.cuda.is_available()))",
        "torch": "import torch; print('cpu', *['mps'] * torch.backends.mps.is_available(), *['cuda'] * torch.cuda.is_available())"}
    found: list[str] = []
    for framework, code in asked.items():
        if importlib.util.find_spec(framework):
            found += subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    return [backend for backend in BACKENDS if backend in found]


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
            "python": platform.python_version(), "threads": os.environ.get("OMP_NUM_THREADS", "all"), **versions}


def load() -> float:
    """Running programs per core, ours included: above 1, they wait for each other."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


class Comparison:
    """What all legs of one comparison share: constants, data, initial weights. `folder` is removed by the caller."""

    def __init__(self, folder: Path, data: Path, tier: str, dtype: str, constants: dict[str, str]):
        self.folder, self.data, self.tier, self.dtype, self.constants = folder, data, tier, dtype, constants
        self.sources = {"mlx": TRAIN_FILE.read_text(), "torch": TORCH_FILE.read_text()}  # read once: they may be edited meanwhile
        self.weights = folder / "weights.npz"

    def variables(self, backend: str) -> dict[str, str]:
        """The environment of a leg, in which both train files choose the same tier, and the CPU if that is meant."""
        return {"AUTORESEARCH_TIER": self.tier} | ({"AUTORESEARCH_DEVICE": "cpu"} if backend in ("cpu", "mlx-cpu") else {})

    def start(self, leg: str, do: str, constants: dict[str, str] | None = None, environment: dict[str, str] | None = None,
              **settings: Any) -> dict[str, Any]:
        """Let the leg do one thing, see leg.py. Returns its report. Failed if it failed."""
        backend, framework, mode = LEGS[leg]
        prefix = "mx" if framework == "mlx" else "torch"
        chosen = self.constants | {"DTYPE": f"{prefix}.{DTYPES[self.dtype]}"} | (constants or {})
        source = with_constants(self.sources[framework], chosen)
        variables = self.variables(backend) | (environment or {})
        settings = {"do": do, "data": str(self.data), "weights": str(self.weights), "mode": mode} | settings
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return launch((TRAIN_FILE if framework == "mlx" else TORCH_FILE).name, source, Path(folder), settings, LIMIT, child=LEG,
                          **variables)

    def new_weights(self, leg: str, constants: dict[str, str] | None = None) -> None:
        """Initial weights, drawn once and loaded by every leg: equal seeds draw different numbers in each framework."""
        self.start(leg, "save_weights", constants)

    def trained(self, leg: str, budget: str, constants: dict[str, str] | None = None) -> dict[str, Any]:
        """A whole training and its val_bpb."""
        with tempfile.TemporaryDirectory(dir=self.folder) as run_dir:
            names = {"DATA": str(self.data), "RUN_DIR": run_dir, "BUDGET": budget, "SEED": "1", "SCORE": "0"}
            environment = {f"AUTORESEARCH_{k}": v for k, v in names.items()}
            report = self.start(leg, "train", constants, environment)
            held = home() / "held" / self.data.name
            return report | {"val_bpb": scored(Path(run_dir), held, **self.variables(LEGS[leg][0]))}


def parity(found: dict[str, list[float]], dtype: str) -> dict[str, dict[str, Any]]:
    """For each leg the largest relative difference of its losses from those of the first leg, and whether it may be timed."""
    first = next(iter(found.values()))
    results = {}
    for leg, losses in found.items():
        off = max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(losses, first, strict=True))
        on_gpu = LEGS[leg][0] not in ("cpu", "mlx-cpu")
        tolerance = GPU_FP32 if on_gpu and dtype == "fp32" else TOLERANCES[dtype]
        results[leg] = {"losses": losses, "difference": off, "tolerance": tolerance, "passed": off <= tolerance}
    return results


def split(seconds: dict[str, float]) -> dict[str, float]:
    """Milliseconds a step by part, as differences of windows that hold more and more of the step."""
    windows = [1000 * seconds[name] for name in ("forward", "gradients", "step", "training")]
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
    """Of one leg: median of each figure, spread of tokens/s, parts of a step."""
    figures = ("tokens_per_second", "mfu_percent", "product_tflops", "framework_mb", "process_mb", "import_seconds")
    result = {key: statistics.median(r[key] for r in reports) if reports[0][key] is not None else None for key in figures}
    rates = [r["tokens_per_second"] for r in reports]
    parts = [split(r["seconds"]) for r in reports]
    return result | {"lowest": min(rates), "highest": max(rates), "rounds": len(reports),
                     "step_ms": statistics.median(1000 * r["seconds"]["training"] for r in reports),
                     "parts_ms": {part: statistics.median(p[part] for p in parts) for part in PARTS},
                     "first_step_seconds": statistics.median(r["first_seconds"]["step"] for r in reports),
                     "largest_drift": max(abs(r["drift"]) for r in reports)}


def ratios(reports: dict[str, list[dict[str, Any]]], first: str) -> dict[str, dict[str, Any]]:
    """tokens/s of each leg over those of the leg `first`, round by round. A winner is named only if the interval excludes 1."""
    results = {}
    for leg in (leg for leg in reports if leg != first):
        pairs = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(reports[leg], reports[first], strict=False)]
        bounds = interval(pairs)
        faster = leg if bounds and bounds[0] > 1 else first if bounds and bounds[1] < 1 else None
        results[leg] = {"against": first, "pairs": pairs, "median": statistics.median(pairs), "interval_95": bounds,
                        "faster": faster}
    return results


def table_of(result: dict[str, Any]) -> list[list[str]]:
    """The table of a comparison as rows of cells, a column for each leg, heading first."""
    def scores(key: str) -> list[str]:
        runs = result[key]["legs"]
        return [f"val_bpb after {result[key]['budget']}",
                *(f"{runs[leg]['val_bpb']:.4f}" if leg in runs else "-" for leg in result["legs"])]

    rows = [["", *result["legs"]]]
    for title, cell in (
            ("tokens/s, median", lambda m: f"{m['tokens_per_second']:,.0f}"),
            ("lowest to highest", lambda m: f"{m['lowest']:,.0f} to {m['highest']:,.0f}"),
            ("ms a step", lambda m: f"{m['step_ms']:.1f}"),
            *((part, lambda m, part=part: f"{m['parts_ms'][part]:.1f}") for part in PARTS),
            ("MFU of a product, %", lambda m: f"{m['mfu_percent']:.1f}"),
            ("product, TFLOP/s", lambda m: f"{m['product_tflops']:.2f}"),
            ("arrays at their peak, MB", lambda m: f"{m['framework_mb']:,.0f}" if m["framework_mb"] is not None else "-"),
            ("process at its peak, MB", lambda m: f"{m['process_mb']:,.0f}"),
            ("import, s (not counted)", lambda m: f"{m['import_seconds']:.1f}"),
            ("first step, s (not counted)", lambda m: f"{m['first_step_seconds']:.1f}")):
        rows.append([title, *(cell(m) for m in result["legs"].values())])
    return rows + [scores(key) for key in ("equal_steps", "equal_seconds") if key in result]


def sentences(result: dict[str, Any]) -> list[str]:
    """What the table doesn't show, one sentence a line."""
    m, s = result["machine"], result["settings"]
    loaded = " (a loaded machine: figures are low and spread)" if result["load"] > 1.2 else ""
    lines = [f"{m['processor']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}; CPU threads: {m['threads']}; "
             f"MLX {m.get('mlx', '-')}, PyTorch {m.get('torch', '-')}. {result['date']}. "
             f"Programs per core during the rounds: {result['load']:.1f}{loaded}.",
             f"{s['parameters'] / 1e6:.2f} M parameters, {s['batch_tokens']:,} tokens a step in rows of {s['seq_len']}, gradient "
             f"accumulation steps: {s['passes']}; {s['flops_per_token'] / 1e6:.2f} MFLOPs a token, {s['dtype']}, tier {s['tier']}, "
             f"data {s['data']}. {s['rounds']} rounds in fresh processes, windows of {s['steps']} steps after {s['warmup']} of "
             f"warm-up, windows of each part: {s['repeats']}."]
    for leg, p in result["parity"].items():
        if leg != next(iter(result["parity"])):
            lines.append(f"Parity of {leg}: {len(p['losses'])} losses within {p['difference']:.1e} (tolerance {p['tolerance']:.0e})"
                         + ("." if p["passed"] else ": failed, so it was not timed."))
    for leg, r in result["ratios"].items():
        bounds = f"95 % interval {r['interval_95'][0]:.2f} to {r['interval_95'][1]:.2f}" if r["interval_95"] else \
            "too few rounds for an interval, six are needed"
        verdict = f"{r['faster']} is faster" if r["faster"] else "no winner"
        lines.append(f"{leg} over {r['against']}: {r['median']:.2f} times the tokens/s, {bounds}: {verdict}.")
    if steps := result.get("equal_steps"):
        lines.append(f"val_bpb after {steps['budget']}: apart by {steps['difference']:.2%} "
                     f"({'they agree' if steps['agree'] else 'they disagree, so one is wrong'}; tolerance {BPB_TOLERANCE:.0%}).")
    for what, legs in result.get("sweep", {}).items():
        lines.append(f"Time of a step grows with {what} to the power of "
                     + ", ".join(f"{leg['exponent']:.2f} ({name})" for name, leg in legs.items()) + ".")
    drifted = [f"{leg} {m['largest_drift']:.0%}" for leg, m in result["legs"].items() if m["largest_drift"] > s["max_drift"] / 100]
    lines += [f"The speed of a matrix product drifted during a leg: {', '.join(drifted)}."] if drifted else []
    lines += [f"{leg} failed: {said.splitlines()[-1][:300]}" for leg, said in result["failed"].items()]
    backends = dict.fromkeys(LEGS[leg][0] for leg in result["legs"])
    return lines + [f"{backend}: {CANNOT[backend]}." for backend in backends if backend in CANNOT]


def picture(result: dict[str, Any], path: Path) -> None:
    """Bars of milliseconds a step, split into parts, with tokens/s beside them."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    legs, m, s = result["legs"], result["machine"], result["settings"]
    figure, axes = pyplot.subplots(figsize=(9, 1.7 + 0.62 * len(legs)), dpi=120)
    longest = max(leg["step_ms"] for leg in legs.values())
    for row, leg in enumerate(legs.values()):
        left = 0.0
        for part, colour in zip(PARTS, ("#4477aa", "#66ccee", "#ccbb44", "#bbbbbb"), strict=True):
            width = max(0.0, leg["parts_ms"][part])
            axes.barh(row, width, left=left, color=colour, height=0.6, label=part if row == 0 else None)
            left += width
        axes.text(left + 0.01 * longest, row, f"{leg['tokens_per_second']:,.0f} tokens/s\n"
                  f"{leg['lowest']:,.0f} to {leg['highest']:,.0f}", va="center", fontsize=8)
    frameworks = {"mlx": "MLX", "torch": "PyTorch"}
    axes.set_yticks(range(len(legs)), [f"{frameworks[LEGS[leg][1]]}\n{leg}" for leg in legs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * longest)
    axes.set_xlabel("milliseconds a step (median)")
    axes.set_title(f"{m['processor']}, {m['cores']} cores{', loaded' if result['load'] > 1.2 else ''}: "
                   f"{s['parameters'] / 1e6:.1f} M parameters, {s['batch_tokens']:,} tokens a step, rows of {s['seq_len']}, "
                   f"{s['dtype']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), ncol=len(PARTS), frameon=False, fontsize=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})
    pyplot.close(figure)


def write(result: dict[str, Any], folder: Path, name: str) -> None:
    """NAME.json with everything, NAME.md with the table, NAME.png with the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = table_of(result)
    lines = [f"# {' and '.join(result['legs'])}", "", f"![milliseconds a step]({name}.png)", "",
             *("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])), "",
             *(f"- {line}" for line in sentences(result)), "", f"Every measurement: [{name}.json]({name}.json)."]
    write_atomically(folder / f"{name}.md", ("\n".join(lines) + "\n").encode())
    write_atomically(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    picture(result, folder / f"{name}.png")


def chosen_backends(context: click.Context, option: click.Parameter, value: str | None) -> list[str]:
    """--backends as a list; default: all this machine has."""
    here = available()
    asked = value.split(",") if value else here
    if missing := [backend for backend in asked if backend not in here]:
        raise click.BadParameter(f"{', '.join(missing)}: expected some of those that this machine has: {', '.join(here) or 'none'}")
    return list(dict.fromkeys(asked))


def assignments(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """--constant NAME=VALUE options as a dictionary."""
    pairs = [v.partition("=") for v in values]
    if not all(equals and name.isidentifier() for name, equals, _ in pairs):
        raise click.BadParameter(f"expected NAME=VALUE, got {', '.join(values)}")
    return {name: value for name, _, value in pairs}


@main.command()
@click.option("--backends", callback=chosen_backends, help=f"Some of {','.join(BACKENDS)}. Default: all this machine has.")
@click.option("--tier", type=click.Choice(TIERS), help="Whose constants. Default: this machine's; cuda is upstream's shape.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of activations. Default: fp32 on a CPU, else bf16.")
@click.option("--constant", "constants", multiple=True, callback=assignments, help="NAME=VALUE in both files; can be repeated.")
@click.option("--rounds", "count", type=click.IntRange(1), default=6, show_default=True, help="Six give a 95 % interval.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Of each window.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Windows of each part in a round.")
@click.option("--max-drift", type=click.FloatRange(0), default=3, show_default=True,
              help="Percent: a leg during which a matrix product changed its speed by more is repeated once.")
@click.option("--warmup", type=click.IntRange(1), default=10, show_default=True, help="Steps before each window, not counted.")
@click.option("--rest", type=click.FloatRange(0), help="Seconds before each leg. Default: 10 with a GPU, else 0.")
@click.option("--equal-steps", default="200steps", show_default=True, help="Budget of a training each; 0: none.")
@click.option("--equal-seconds", default="60s", show_default=True, help="Budget of a training each; 0: none.")
@click.option("--sweep", is_flag=True, help="Double depth, batch and row length twice each, and report growth exponents.")
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="train/<id>. Default: prepared last.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "docs" / "benchmarks", show_default=True)
@click.option("--name", help="Of the files. Default: backends, tier and dtype.")
def compare(backends: list[str], tier: str | None, dtype: str | None, constants: dict[str, str], count: int, steps: int,
            repeats: int, max_drift: float, warmup: int, rest: float | None, equal_steps: str, equal_seconds: str, sweep: bool,
            data: Path | None, out: Path, name: str | None) -> None:
    """MLX and PyTorch on this machine: the same model, optimizer, batches, initial weights and dtype on each."""
    console, on_cpu = wide_console(), {"cpu", "mlx-cpu"} >= set(backends)
    tier, dtype = tier or ("cpu" if on_cpu else detect_preset()), dtype or ("fp32" if on_cpu else "bf16")
    rest = rest if rest is not None else 0 if on_cpu else 10
    data = prepared(data)
    legs = [leg for leg, (backend, *_) in LEGS.items() if backend in backends]
    legs.sort(key=lambda leg: backends.index(LEGS[leg][0]))
    failed: dict[str, str] = {}

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def attempt(what: Callable[..., dict[str, Any]], leg: str, *args: str, **settings: Any) -> dict[str, Any] | None:
        try:
            return what(leg, *args, **settings)
        except Failed as failure:
            failed[leg] = str(failure)
            tell(f"{leg}: failed: {failure}")
            return None

    with tempfile.TemporaryDirectory() as folder:
        shared = Comparison(Path(folder), data, tier, dtype, {"DROPOUT": "(0.0,)"} | constants)
        shared.new_weights(legs[0])
        losses = {leg: report["losses"] for leg in legs
                  if (report := attempt(shared.start, leg, "losses", steps=10, fill_zeros=True))}
        if not losses:
            raise click.ClickException("no leg could train; the first message above says why")
        checked = parity(losses, dtype)
        for leg, p in checked.items():
            tell(f"{leg}: ten losses from {p['losses'][0]:.4f} to {p['losses'][-1]:.4f} nats, off by {p['difference']:.1e}, "
                 + ("timed" if p["passed"] else f"more than {p['tolerance']:.0e}: not timed"))
        timed: dict[str, list[dict[str, Any]]] = {leg: [] for leg, p in checked.items() if p["passed"]}

        lengths = {"steps": steps, "repeats": repeats, "warmup": warmup}
        loads, backward = [], random.random() < 0.5
        for i in range(count):
            for leg in sorted(timed, key=legs.index, reverse=backward != (i % 2 == 1)):  # ABBA
                for attempt_number in (0, 1):
                    time.sleep(rest)
                    loads.append(load())
                    report = attempt(shared.start, leg, "times", windows=["forward", "gradients", "step", "training"], **lengths)
                    if not report or abs(report["drift"]) <= max_drift / 100 or attempt_number:
                        break
                if not report:
                    del timed[leg]
                    continue
                timed[leg].append(report)
                tell(f"round {i + 1}, {leg}: {report['tokens_per_second']:,.0f} tokens/s, product drift {report['drift']:+.1%}")
        if not timed:
            raise click.ClickException("no leg was timed; the messages above say why")

        result: dict[str, Any] = {
            "machine": machine(), "date": time.strftime("%Y-%m-%d"), "load": statistics.median(loads), "parity": checked,
            "settings": {"tier": tier, "dtype": dtype, "constants": constants, "data": data.name, "rounds": count,
                         "max_drift": max_drift, **lengths,
                         **{k: next(iter(timed.values()))[0][k] for k in (
                             "batch_tokens", "passes", "seq_len", "flops_per_token", "parameters")}},
            "legs": {leg: medians(reports) for leg, reports in timed.items()}, "ratios": ratios(timed, next(iter(timed))),
            "failed": failed, "reports": timed}
        best = [max(group, key=lambda leg: result["legs"][leg]["tokens_per_second"]) for backend in backends
                if (group := [leg for leg in timed if LEGS[leg][0] == backend])]
        result["best"] = best
        for key, budget in (("equal_steps", equal_steps), ("equal_seconds", equal_seconds)):
            if budget != "0":
                runs = {leg: run for leg in best if (run := attempt(shared.trained, leg, budget))}
                scores = [run["val_bpb"] for run in runs.values()]
                off = max(scores) / min(scores) - 1 if scores else math.nan
                result[key] = {"budget": budget, "legs": runs} | (
                    {"difference": off, "agree": off <= BPB_TOLERANCE} if key == "equal_steps" else {})
        if sweep:
            result["sweep"] = swept(shared, best, lengths, next(iter(timed.values()))[0], tell)
    name = name or f"{'-vs-'.join(backends)}-{tier}-{dtype}"
    write(result, out, name)
    rows = table_of(result)
    table = Table(*rows[0], show_edge=False, pad_edge=False)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    for line in sentences(result):
        tell(line)
    tell(f"written: {name}.json, .md and .png in {out}")


def swept(shared: Comparison, legs: list[str], lengths: dict[str, int], base: dict[str, Any],
          tell: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Seconds a step as depth, batch and row length double twice, one at a time, and the exponents of their growth."""
    shapes = np.load(shared.weights)
    depth = len({n.split(".")[1] for n in shapes.files if n.startswith("blocks.")})
    width, tokens, row = shapes["wte.weight"].shape[1], base["batch_tokens"], base["seq_len"]
    fixed = {"DEPTH": depth, "WIDTH": width, "BATCH_TOKENS": tokens, "SEQ_LEN": row}
    axes = {"depth": ("DEPTH", [depth, 2 * depth, 4 * depth]), "batch": ("BATCH_TOKENS", [tokens, 2 * tokens, 4 * tokens]),
            "row length": ("SEQ_LEN", [row, 2 * row, 4 * row])}
    results: dict[str, dict[str, Any]] = {}
    for what, (constant, sizes) in axes.items():
        found: dict[str, list[dict[str, Any]]] = {leg: [] for leg in legs}
        for size in sizes:
            constants = {k: str(v) for k, v in (fixed | {constant: size}).items()}
            if what == "row length":  # whole rows
                constants["BATCH_TOKENS"] = str(max(tokens, size))
            shared.new_weights(legs[0], constants)
            for leg in legs:
                found[leg].append(shared.start(leg, "times", constants, windows=["step"], long_rows=True, **lengths))
                tell(f"{what} {size}, {leg}: {1000 * found[leg][-1]['seconds']['step']:.1f} ms a step")
        results[what] = {leg: {"sizes": sizes, "seconds": (times := [r["seconds"]["step"] for r in reports]),
                               "exponent": exponent(sizes, times)} for leg, reports in found.items()}
    return results


if __name__ == "__main__":
    main()
