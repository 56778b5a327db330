"""Measure the speed of a train file: MLX against PyTorch, with one technique removed at a time, and against other projects.

    python scripts/benchmark.py compare --backends mlx,mps   # train_mlx.py and train_torch.py from the same weights and batches
    python scripts/benchmark.py dtype                        # which dtype is fastest on this GPU? trainings take it from then on
    python scripts/benchmark.py ablation                     # on the data prepared last, at this machine's size
    python scripts/benchmark.py anchor --peer fork=CHECKOUT  # depth 4, width 256, T 256, vocabulary 8192, fp32, 4,096 tokens a step

Every measurement is a process of its own, and the tables show medians over interleaved rounds. `compare` is explained in
compare_backends.py. Each variant of the ablation is the file as it is now with one technique taken out; tokens/s is of its median
step after warm-up. The anchor trains on random tokens of Zipf's frequencies: speed is compared there, not loss.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
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
from scripts.ablations import ABLATIONS, ADAMW_FOR_ALL, BASE, Edits  # noqa: E402
from scripts.compare_backends import TORCH_FILE, available, compare  # noqa: E402
from scripts.compare_peers import (  # noqa: E402
    TRAIN_FILE,
    Failed,
    adapt,
    interpreter,
    launch,
    named_path,
    prepared,
    run_environment,
    wide_console,
    with_constants,
)

LIMIT = 1800                                                                    # seconds that one measurement may take
ROW, VOCAB = 256, 8192                                                          # the anchor: everybody at one size
COMMON = {"DEPTH": 4, "HEAD_DIM": 128}
PEERS = {**COMMON, "WINDOW_PATTERN": '"L"', "ASPECT_RATIO": 64, "TOTAL_BATCH_SIZE": 4096, "DEVICE_BATCH_SIZE": 4096 // ROW}
OURS = {**COMMON, "DTYPE": "mx.float32", "WIDTH": 256, "SEQ_LEN": ROW, "NGRAM_BUCKETS": "()", "SOFTCAP": 15.0, "BATCH_TOKENS": 4096}


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


def measure_ours(source: str, data: Path, steps: int, name: str = "train_mlx.py") -> dict[str, Any]:
    """Train so many steps. Returns the shim's report and the name of the device."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        report = launch(name, source, Path(folder), {}, LIMIT, **run_environment(data, run_dir, f"{steps}steps", 1))
        return report | {"device": json.loads((run_dir / "train.json").read_text())["device"]}


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


ROUNDS = click.option("--rounds", "count", type=click.IntRange(1), default=5, show_default=True, help="Measurements of each.")
STEPS = click.option("--steps", type=click.IntRange(3), default=60, show_default=True,
                     help="Steps of each measurement, warm-up included.")
DATA = click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path),
                    help="train/<id>. Default: prepared last.")
JSON = click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path),
                    help="Write the measurements to this JSON file.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Speed and memory of the train files, in interleaved runs."""


main.add_command(compare)


@main.command()
@ROUNDS
@STEPS
@DATA
@JSON
@click.option("--only", multiple=True, type=click.Choice(list(ABLATIONS)), help="These variants (and what they are compared with).")
def ablation(count: int, out: Path | None, steps: int, data: Path | None, only: tuple[str, ...]) -> None:
    """What each technique of train_mlx.py gives."""
    data = prepared(data)
    chosen = {BASE, *only, *(ABLATIONS[name][0] for name in only)} if only else set(ABLATIONS)
    source, console = TRAIN_FILE.read_text(), wide_console()  # read once: it may be edited meanwhile
    todo = {name: lambda name=name: measure_ours(variant(source, name), data, steps) for name in ABLATIONS if name in chosen}
    show(rounds(todo, count, console), {name: ABLATIONS[name][0] for name in todo}, out, console)


@main.command()
@ROUNDS
@JSON
@click.option("--steps", type=click.IntRange(3), default=12, show_default=True,
                     help="Steps of each measurement, warm-up included.")
@click.option("--peer", "peers", multiple=True, callback=named_path, help="NAME=PATH of a checkout, in fp32; can be repeated.")
@click.option("--peer-bf16", "shipped", multiple=True, callback=named_path, help="NAME=PATH, in the dtypes it was shipped with.")
@click.option("--peer-python", default=sys.executable, callback=interpreter,
              help="The peers' interpreter: with NumPy, sentencepiece, their framework.")
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
# Dtype: measured on this device, remembered for its trainings
# ---------------------------------------------------------------------------------------------------------------------

USUAL, *OTHERS = "bfloat16", "float16", "float32"
GAIN = 1.05                                                                     # that another dtype than the usual one must bring


def fastest(rates: dict[str, list[float]]) -> str:
    """The dtype to compute in, from tokens/s of several rounds each. Another one than USUAL only where it is faster by GAIN in the
    median, and its slowest round is faster than the fastest one of USUAL."""
    able = {name: values for name, values in rates.items() if values}
    if not able:
        raise Failed("no dtype was measured; the messages above say why")
    middle = {name: statistics.median(values) for name, values in able.items()}
    best = max(middle, key=lambda name: middle[name])
    clear = USUAL not in able or (middle[best] >= GAIN * middle[USUAL] and min(able[best]) > max(able[USUAL]))
    return best if clear else USUAL


def remember(device: str, dtype: str) -> Path:
    """Write the dtype of a device to the file that trainings and nights read; bf16 is no entry, so that the train file decides.
    Returns the file."""
    place, known = home() / "dtypes.json", {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(json.loads(place.read_text()))
    place.parent.mkdir(parents=True, exist_ok=True)
    known.pop(device, None)
    write_atomically(place, json.dumps(known | ({device: dtype} if dtype != USUAL else {}), indent=1).encode())
    return place


@main.command(name="dtype")
@click.option("--framework", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
@ROUNDS
@STEPS
@DATA
@JSON
def measure_dtypes(framework: str, count: int, steps: int, data: Path | None, out: Path | None) -> None:
    """Train in bf16, fp16 (with loss scaling) and fp32, and let trainings and nights compute in the fastest from now on."""
    data, console = prepared(data), wide_console()
    file, prefix, gpus = (TRAIN_FILE, "mx", {"mlx", "mlx-cuda"}) if framework == "mlx" else (TORCH_FILE, "torch", {"mps", "cuda"})
    source = file.read_text()
    todo = {name: lambda name=name: measure_ours(with_constants(source, {"DTYPE": f"{prefix}.{name}"}), data, steps, file.name)
            for name in (USUAL, *OTHERS)}
    reports = rounds(todo, count, console)
    rates = {name: [r["tokens_per_second"] for r in own] for name, own in reports.items()}
    chosen = fastest(rates)
    device = reports[chosen][0]["device"]
    if not gpus & set(available()[0]):
        said = f"{chosen} is fastest; nothing is changed: {file.name} computes in float32 on every CPU"
    else:
        place = str(remember(device, chosen)).replace(str(Path.home()), "~")    # it is told in public, too: doctor --deep
        said = f"{file.name} computes in {chosen} on {device} from now on; to forget it, delete {place}" if chosen != USUAL else \
            f"{file.name} stays with its usual dtype on {device}: no other is clearly faster"
    show(reports, dict.fromkeys(todo, USUAL), None, console)
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    if out:
        write_atomically(out, json.dumps({"device": device, "tokens_per_second": rates, "chosen": chosen, "said": said}).encode())


if __name__ == "__main__":
    main()
