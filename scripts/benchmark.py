"""How fast does train_mlx.py train on this machine, and what does each technique in it give?

    python scripts/benchmark.py ablation                     # on the data prepared last, at this machine's size
    python scripts/benchmark.py anchor --peer fork=CHECKOUT  # depth 4, width 256, T 256, vocabulary 8192, fp32, 4,096 tokens a step

Each variant of the ablation is an edit of the file as it is now: one technique taken out. Every measurement is a process of its
own that trains some steps; tokens/s is of its median step after warm-up, and the table shows medians over interleaved rounds.
The anchor trains on random tokens of Zipf's frequencies: speed is compared there, not loss.
"""

from __future__ import annotations

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
from prepare_mlx import home  # noqa: E402
from scripts.compare_peers import TRAIN_FILE, Failed, adapt, launch, named_path, wide_console  # noqa: E402

LIMIT = 1800                                                                    # seconds that one measurement may take
BASE = "train_mlx.py"

# ---------------------------------------------------------------------------------------------------------------------
# The ablation: name: (compared with, edits (old text, new text) of the file)
# ---------------------------------------------------------------------------------------------------------------------

Edits = list[tuple[str, str]]
WINDOWS: Edits = [('WINDOW_PATTERN = "L"', 'WINDOW_PATTERN = "S"'), ('SEQ_LEN = {"cpu": 64', 'SEQ_LEN = {"cpu": 2048')]
ROTATED = '''def rotated(t, base):
    half = t.shape[-1] // 2
    angle = mx.arange(t.shape[-2])[:, None] * base ** (-mx.arange(half) / half)
    cos, sin, a, b = mx.cos(angle).astype(t.dtype), mx.sin(angle).astype(t.dtype), t[..., :half], t[..., half:]
    return mx.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def attend('''
INLINE = '''def inline(run, rows, seq_len):
    tokens, rng = run.tokens(), np.random.default_rng(run.seed)
    while True:
        starts = rng.integers(0, len(tokens) - seq_len, rows)
        block = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
        yield block[:, :-1], block[:, 1:]


def train('''
ABLATIONS: dict[str, tuple[str, Edits]] = {
    BASE: (BASE, []),
    "array mask on full layers": (BASE, [
        ('return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")',
         "return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mx.arange(T)[:, None] >= mx.arange(T))")]),
    "windows (S), banded": (BASE, WINDOWS),
    "windows (S), dense mask": ("windows (S), banded", [
        *WINDOWS,
        ("    first = slice(0, window)\n",
         "    row, column = mx.arange(T)[:, None], mx.arange(T)[None, :]\n"
         "    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=(column <= row) & (column >= row - window))\n"
         "    first = slice(0, window)\n")]),
    "rms_norm written out": (BASE, [
        ("return mx.fast.rms_norm(x, None, EPS)", "return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + EPS)")]),
    "rope written out": (BASE, [
        ("def attend(", ROTATED),
        ("mx.fast.rope(t, D, traditional=False, base=self._rope_base, scale=-1.0, offset=0)", "rotated(t, self._rope_base)")]),
    "relu² as a power": (BASE, [("mx.square(mx.maximum(self.c_fc(x), 0))", "mx.maximum(self.c_fc(x), 0) ** 2")]),
    "cross entropy by logsumexp": (BASE, [
        ('targets int [B, T]."""\n',
         'targets int [B, T]."""\n'
         "    return (mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]).mean()\n")]),
    "no softcap (another model)": (BASE, [("SOFTCAP = 15.0", "SOFTCAP = 0.0")]),
    "no n-grams (another model)": (BASE, [("NGRAM_BUCKETS = (8192, 16384)", "NGRAM_BUCKETS = ()")]),
    "Muon a matrix at a time": (BASE, [
        ("        p, *moments[key] = muon(p, g, *state[key], lr * MATRIX_LR, momentum, weight_decay)\n",
         "        one = [muon(*(a[i : i + 1] for a in (p, g, *state[key])), lr * MATRIX_LR, momentum, weight_decay)\n"
         "               for i in range(len(names))]\n"
         "        p, *moments[key] = (mx.concatenate(parts) for parts in zip(*one, strict=True))\n")]),
    "each step awaited": (BASE, [("mx.async_eval(params, state, loss)", "mx.eval(params, state, loss)")]),
    "loader in the loop": (BASE, [("def train(", INLINE), ("batches = run.batches(rows, seq_len)",
                                                          "batches = inline(run, rows, seq_len)")]),
    "compile turned round": (BASE, [  # on the CPU it is off
        ("if not GPU:\n    mx.disable_compile()", "if GPU:\n    mx.disable_compile()")]),
    "MLX's own BLAS": (BASE, [("load_fast_blas()  # has to come before MLX\n", "\n")]),
}


def edited(source: str, edits: Edits) -> str:
    """`source` with every old text replaced. Failed where one isn't there: the file has changed, and the table must follow."""
    for old, new in edits:
        if old not in source:
            raise Failed(f"{TRAIN_FILE.name} no longer has the text {old!r}: adapt ABLATIONS or ADAMW_FOR_ALL")
        source = source.replace(old, new)
    return source


# ---------------------------------------------------------------------------------------------------------------------
# The anchor: everybody at one size
# ---------------------------------------------------------------------------------------------------------------------

ROW, VOCAB = 256, 8192
COMMON = {"DEPTH": 4, "HEAD_DIM": 128, "WINDOW_PATTERN": '"SSSL"'}
PEERS = {**COMMON, "ASPECT_RATIO": 64, "TOTAL_BATCH_SIZE": 4096, "DEVICE_BATCH_SIZE": 4096 // ROW}
OURS = {**COMMON, "WIDTH": 256, "SEQ_LEN": ROW, "NGRAM_BUCKETS": "()", "SOFTCAP": 15.0, "BATCH_TOKENS": 4096, "MICRO_TOKENS": 4096}
ADAMW_FOR_ALL: Edits = [  # what the MLX fork does: no Muon, and AdamW with decay
    ('return name.startswith("blocks.")', "return False"),
    ("return p - lr * update, m, v", "return p * (1 - lr * WEIGHT_DECAY) - lr * update, m, v"),
]


def random_text(folder: Path) -> Path:
    """A train/<id> directory of a million random tokens, frequent ones first."""
    chances = 1 / (np.arange(VOCAB) + 10.0)
    tokens = np.random.default_rng(1).choice(VOCAB, 1_000_000, p=chances / chances.sum()).astype(np.uint16)
    (folder / "train.bin").write_bytes(tokens.tobytes())
    (folder / "tokenizer.model").write_bytes(b"")
    meta = {"vocab_size": VOCAB, "seq_len": ROW, "dtype": "uint16", "bos_id": VOCAB - 1, "budget": "1steps"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


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
    data = data or Path(json.loads((home() / "current.json").read_text())["train_dir"])
    chosen = {BASE, *only, *(ABLATIONS[name][0] for name in only)} if only else set(ABLATIONS)
    source, console = TRAIN_FILE.read_text(), wide_console()
    todo = {name: lambda edits=edits: measure_ours(edited(source, edits), data, steps)
            for name, (_, edits) in ABLATIONS.items() if name in chosen}
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
        todo = {"ours, Muon and AdamW": lambda: measure_ours(ours, data, steps),
                "ours, AdamW for all": lambda: measure_ours(edited(ours, ADAMW_FOR_ALL), data, steps)}
        for dtype, group in (("fp32", peers), ("as shipped", shipped)):
            for name, path in group.items():
                todo[f"{name}, {dtype}"] = lambda path=path, fp32=dtype == "fp32": measure_peer(
                    adapt((path / "train.py").read_text(), PEERS, fp32=fp32), data, steps, peer_python)
        show(rounds(todo, count, console), dict.fromkeys(todo, next(iter(todo))), out, console)


if __name__ == "__main__":
    main()
