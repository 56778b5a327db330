"""Train other projects' train.py and ours: same wall-clock budget, same text, same tokenizer, same evaluation, interleaved.

    python prepare_mlx.py --dataset text:PATH --preset cpu
    python scripts/compare_peers.py --budget 60s --seeds 3 --peer upstream=CHECKOUT --peer fork=CHECKOUT

A peer's train.py runs as its authors wrote it, but for what SUBSTITUTIONS says, and for the size: as shipped (depth 4 to 8, 2^16
tokens a step and more) a CPU makes a handful of steps, so SETUPS gives every peer the shape that our file has there, and keeps
its learning rates, schedule and optimizer. Its harness is peer_shim.py over our data. Upstream's file needs CUDA and a Hopper
kernel: on another machine it runs with PyTorch's own attention, `cpu` for `cuda` and, like every peer, in fp32, which is faster
than bf16 on CPUs without it (--peer-bf16 keeps the dtypes of a peer and of our file as shipped). Each peer keeps its own clock,
which does not count the first step, because that step compiles. Upstream leaves out ten more steps; here they count, because they
would be most of a short training. Our clock counts every step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness import home  # noqa: E402
from harness.machine import detect_preset, measured_dtypes  # noqa: E402

SHIM = Path(__file__).resolve().parent / "peer_shim.py"
TRAIN_FILE = ROOT / "train_mlx.py"
LIMIT = 3, 300                                                                  # of the budget, and seconds: what a peer may take

# (what, pattern, replacement), applied wherever a file has them
SUBSTITUTIONS = [
    ("the seed is ours to choose", r"seed\(42\)", "seed({seed})"),
    ("a check that this is a Mac", r"^verify_macos_env\(\)$", ""),
    ("11 steps free of charge; one may compile", r"\bstep > 10\b", "step > 0"),
]
NO_CUDA = [
    ("upstream's device", r'^device = torch\.device\("cuda"\)', 'device = torch.device("cpu")'),
    ("and its autocast", r'^(autocast_ctx = torch\.amp\.autocast\(device_type=)"cuda"', r'\1"cpu"'),
]
IN_FP32 = [
    ("dtypes", r"\b(torch|mx)\.bfloat16", r"\1.float32"),
    ("casts", r"\.bfloat16\(\)", ".float()"),
]
SHAPE = {"DEPTH": 2, "ASPECT_RATIO": 64, "HEAD_DIM": 64, "WINDOW_PATTERN": '"L"', "TOTAL_BATCH_SIZE": 1024}
SETUPS: dict[str, tuple[str, dict[str, Any]]] = {"cpu": ("our cpu tier's shape", SHAPE), "shipped": ("constants as shipped", {})}


class Failed(click.ClickException):
    """A run without a result; the message ends with what the run said last."""


def with_constants(source: str, constants: dict[str, Any]) -> str:
    """A train file with other values of its constants. Failed if it doesn't have one of them."""
    for name, value in constants.items():
        source, found = re.subn(rf"^{name} = (?:{{[^}}]*}}\[TIER\])?[^#\n]*", f"{name} = {value}  ", source, count=1, flags=re.M)
        if not found:
            raise Failed(f"expected a line `{name} = ...` in the train file")
    return source


def adapt(source: str, constants: dict[str, Any], seed: int = 1, fp32: bool = True) -> str:
    """A peer's file with other constants, for this machine. Failed if it doesn't have one of them."""
    source = with_constants(source, constants)
    changes = [*SUBSTITUTIONS, *([] if detect_preset() == "cuda" else NO_CUDA), *(IN_FP32 if fp32 else [])]
    for _, pattern, replacement in changes:
        source = re.sub(pattern, replacement.replace("{seed}", str(seed)), source, flags=re.M)
    return source


def launch(name: str, source: str, folder: Path, settings: dict[str, Any], limit: float, python: str = sys.executable,
           child: Path = SHIM, **environment: str) -> dict[str, Any]:
    """Run `child` on `source`, saved as folder/name, in a process of its own. Returns the child's report. Failed if the child
    failed or took more than `limit` seconds."""
    (folder / name).write_text(source)
    settings = settings | {"report": str(folder / "report.json")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTORESEARCH_", "PEER_"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1", "PEER_SETTINGS": json.dumps(settings),
                   **environment}
    with open(folder / "output.txt", "w+") as output:
        command = [python, str(child), str(folder / name)]
        try:
            code = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            raise Failed(f"no end within {limit:.0f} s") from None
        if code or not (folder / "report.json").exists():
            output.seek(0)
            raise Failed(f"exit code {code}: ...{output.read()[-1500:]}")
    return json.loads((folder / "report.json").read_text())


def train_peer(path: Path, setup: str, data: Path, held: Path, seconds: float, seed: int, fp32: bool = True,
               python: str = sys.executable) -> dict[str, Any]:
    """One training of a peer: report with val_bpb."""
    row, (_, constants) = json.loads((held / "meta.json").read_text())["seq_len"], SETUPS[setup]
    if constants:
        constants = constants | {"DEVICE_BATCH_SIZE": constants["TOTAL_BATCH_SIZE"] // row}
    with tempfile.TemporaryDirectory() as folder:
        source = adapt((path / "train.py").read_text(), constants, seed, fp32)
        settings = {"data": str(data), "held": str(held), "seq_len": row, "seconds": seconds, "seed": seed}
        report = launch("train.py", source, Path(folder), settings, LIMIT[0] * seconds + LIMIT[1], python)
    if not {"val_bpb", "tokens"} <= report.keys():
        raise Failed("it ended without a step, or without asking for its score")
    return report


def prepared(data: Path | None = None) -> Path:
    """The train/<id> folder to use: `data`, else $AUTORESEARCH_DATA, else the data prepared last. Failed if there is none."""
    try:
        place = data or os.environ.get("AUTORESEARCH_DATA") or json.loads((home() / "current.json").read_text())["train_dir"]
    except FileNotFoundError:
        raise Failed("expected prepared data, found none: run `python prepare_mlx.py --dataset stories` first") from None
    return Path(place).resolve()


def scored(run_dir: Path, held: Path, **environment: str) -> float:
    """val_bpb of a run of ours, by the scorer. Failed if it has none."""
    command = [sys.executable, str(ROOT / "prepare_mlx.py"), "score", str(run_dir), "--held", str(held)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if not (found := re.search(r"^val_bpb: +(\S+)", done.stdout, re.M)):
        raise Failed(f"no score of our own run: {done.stderr[-1500:]}")
    return float(found[1])


def run_environment(data: Path, run_dir: Path, budget: str, seed: int) -> dict[str, str]:
    """The environment of a training of ours that is not scored at its end."""
    variables = {"DATA": str(data), "RUN_DIR": str(run_dir), "BUDGET": budget, "SEED": str(seed), "SCORE": "0",
                 "DTYPES": measured_dtypes()}
    return {f"AUTORESEARCH_{k}": v for k, v in variables.items()}


def train_ours(source: str, data: Path, held: Path, seconds: float, seed: int) -> dict[str, Any]:
    """One training of our file, scored by `prepare_mlx.py score`: report with val_bpb."""
    with tempfile.TemporaryDirectory() as folder:
        (run_dir := Path(folder, "run")).mkdir()
        report = launch(TRAIN_FILE.name, source, Path(folder), {}, LIMIT[0] * seconds + LIMIT[1],
                        **run_environment(data, run_dir, f"{seconds}s", seed))
        return report | {"val_bpb": scored(run_dir, held)}


def summary(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and median of the score, medians of the rest."""
    scores = [t["val_bpb"] for t in trials]
    measured = ("mean_tokens_per_second", "tokens", "framework_mb", "process_mb")
    medians = {k: statistics.median(t[k] for t in trials) for k in measured}
    return {"n": len(scores), "mean": statistics.fmean(scores), "sd": statistics.stdev(scores) if len(scores) > 1 else None,
            "median": statistics.median(scores), **medians}


def render(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("val_bpb", "sd", "median", "n", "tokens/s", "M tokens", "arrays MB", "process MB"):
        table.add_column(title, justify="right")
    for name, result in results.items():
        s = result.get("summary")
        cells = [f"{s['mean']:.4f}", f"{s['sd']:.4f}" if s["sd"] is not None else "-", f"{s['median']:.4f}", str(s["n"]),
                 f"{s['mean_tokens_per_second']:,.0f}", f"{s['tokens'] / 1e6:.2f}",
                 f"{s['framework_mb']:,.0f}" if s["framework_mb"] else "-", f"{s['process_mb']:,.0f}"] if s else ["failed"]
        table.add_row(Text(name), *cells)
    return table


def wide_console() -> Console:
    """Standard output; tables keep their width in a file."""
    return Console(width=None if sys.stdout.isatty() else 132)


def named_path(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """NAME=PATH options as a dictionary."""
    paths = {name: Path(path) for name, equals, path in (v.partition("=") for v in values) if equals}
    if len(paths) < len(values) or not all((p / "train.py").is_file() for p in paths.values()):
        raise click.BadParameter(f"expected NAME=PATH of checkouts with a train.py, each name once, got {', '.join(values)}")
    return paths


def interpreter(context: click.Context, option: click.Parameter, value: str) -> str:
    """A program's absolute path, because it is started in another folder. A link stays one: it may be a virtual environment's."""
    if found := shutil.which(value):
        return os.path.abspath(found)
    raise click.BadParameter(f"expected a Python interpreter, got {value}, which is no program here")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--budget", default="60s", show_default=True, help="Of each training, in seconds.")
@click.option("--seeds", default=3, show_default=True, help="Trainings of each, with seeds 1, 2, ...")
@click.option("--peer", "peers", multiple=True, callback=named_path, help="NAME=PATH of a checkout, in fp32; can be repeated.")
@click.option("--peer-bf16", "shipped", multiple=True, callback=named_path, help="NAME=PATH, in the dtypes it was shipped with.")
@click.option("--setup", "setups", multiple=True, type=click.Choice(list(SETUPS)), default=("cpu",), show_default=True,
              help="Size of the peers: " + "; ".join(f"{k}: {what}" for k, (what, _) in SETUPS.items()))
@click.option("--peer-python", default=sys.executable, callback=interpreter,
              help="The peers' interpreter: with NumPy, sentencepiece, their framework.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), default="runs/peers.json", show_default=True)
def main(budget: str, seeds: int, peers: dict[str, Path], shipped: dict[str, Path], setups: tuple[str, ...],
         peer_python: str, out: Path) -> None:
    """Train peers and our file with the same budget, and compare their val_bpb."""
    if not (peers or shipped):
        raise click.UsageError("expected at least one --peer or --peer-bf16")
    if not re.fullmatch(r"\d+(\.\d+)?s", budget) or seeds < 1:
        raise click.UsageError(f"expected a budget in seconds like 60s and at least one seed, got {budget} and {seeds}")
    seconds = float(budget[:-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    data = prepared()
    held = home() / "held" / data.name
    source, todo = TRAIN_FILE.read_text(), {}  # read once: it may be edited meanwhile
    for dtype, group in (("", peers), (" as shipped", shipped)):
        if group:
            ours = source if dtype else with_constants(source, {"DTYPE": "mx.float32"})
            todo[f"ours{dtype}"] = lambda seed, ours=ours: train_ours(ours, data, held, seconds, seed)
        for name, path in group.items():
            for setup in setups:
                todo[f"{name} {setup}{dtype}"] = lambda seed, path=path, setup=setup, fp32=not dtype: train_peer(
                    path, setup, data, held, seconds, seed, fp32, peer_python)
    console, results = wide_console(), {name: {"trials": [], "failures": []} for name in todo}
    facts = {"budget": budget, "data": data.name, "meta": json.loads((data / "meta.json").read_text())["data_hash"]}
    for seed in range(1, seeds + 1):  # interleaved: a slow hour hits all of them
        for name, run in todo.items():
            try:
                trial = run(seed)
                results[name]["trials"].append(trial | {"seed": seed})
                said = f"{trial['val_bpb']:.4f} bpb, {trial['mean_tokens_per_second']:,.0f} tokens/s"
            except Failed as failure:
                results[name]["failures"].append(said := str(failure))
            console.print(f"{name}, seed {seed}: {said}", markup=False, highlight=False, soft_wrap=True)
            if results[name]["trials"]:
                results[name]["summary"] = summary(results[name]["trials"])
            out.write_text(json.dumps(facts | {"results": results}, indent=1))
    console.print(render(results))


if __name__ == "__main__":
    main()
