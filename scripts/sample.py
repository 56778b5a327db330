"""Let a trained model write.

    python scripts/sample.py                                    the best model of the latest night
    python scripts/sample.py --compare                          the baseline's text and the best's, side by side
    python scripts/sample.py runs/TAG/trials/0007-1 --prompt "Once upon a time"

A model is asked through the `load_model` of its own train file, whatever an agent has made of it. On MLX a cache of keys and values
is put around it, and dropped where it does not give the model's own logits.

This runs the train file of the run, which an agent wrote, with your rights.
"""

import codecs
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from agent.errors import NightError  # noqa: E402
from agent.journal.folder import latest  # noqa: E402
from agent.journal.journal import read_events  # noqa: E402
from agent.journal.state import Experiment, fold  # noqa: E402
from harness import home  # noqa: E402
from harness.tokenizer import Tokenizer  # noqa: E402

LOCAL = 16  # tokens of a pass by the cache; the n-gram tables look 7 back
CHECKED = 4  # tokens that are computed with and without the cache
TOLERANCE = {"cpu": 1e-3, "gpu": 0.05}  # nats between both; bfloat16, which a GPU computes in, rounds coarsely


@dataclass(frozen=True)
class Options:
    """temperature 0 takes the likeliest token. top_p: only the likeliest tokens whose probabilities sum to this are drawn."""

    tokens: int
    temperature: float
    top_p: float
    seed: int


def load(run_dir: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Import the run's own source. Returns its logits function: int32 [B, T] -> float32 [B, T, vocab]."""
    source = next(iter(sorted(run_dir.glob("train_*.py"))), None)
    if source is None or not (run_dir / "train.json").exists():
        raise click.ClickException(f"{run_dir}: expected the directory of a finished training, with train.json and its train file")
    spec = importlib.util.spec_from_file_location("candidate", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["candidate"] = module
    spec.loader.exec_module(module)
    return module.load_model(run_dir)


class Uncached:
    """Logits of the next token: int ids -> float64 [vocab], by a pass over the whole context for each token."""

    def __init__(self, logits_of: Callable, context: int):
        self.logits_of, self.context = logits_of, context

    def __call__(self, ids: list[int]) -> np.ndarray:
        window = ids[-self.context :]
        row = np.zeros((1, self.context), np.int32)  # one shape for every step; causal, so padding is free
        row[0, : len(window)] = window
        return self.logits_of(row)[0, len(window) - 1].astype(np.float64)


class Cached(Uncached):
    """The same with a cache of keys and values, for a model on MLX whatever an agent has made of it.

    A pass sees the last LOCAL tokens, so that n-grams, shifts and short convolutions find their neighbours. Meanwhile MLX's rotary
    embedding counts from the true position, and attention reads the keys and values of all tokens: those in the cache, and the new
    ones. A model that mixes tokens in another way gives other logits by the cache than without. So the first CHECKED tokens are
    computed both ways, and if they differ, or anything fails, the cache is not used.
    """

    def __init__(self, logits_of: Callable, context: int, module: object):
        import mlx.core as mx
        super().__init__(logits_of, context)
        self.mx, self.module = mx, module
        self.used, self.checks = True, CHECKED
        self.tolerance = TOLERANCE["cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"]
        self.layers: list[tuple] = []  # keys and values [1, H, T, D] of each call of attention in a pass
        self.known, self.start, self.call = 0, 0, 0  # tokens in the cache, first position of this pass, calls so far in it
        self.rope, self.attention = mx.fast.rope, mx.fast.scaled_dot_product_attention

    def __call__(self, ids: list[int]) -> np.ndarray:
        if not self.used or len(ids) > self.context:  # then the window moves, and every position with it
            return super().__call__(ids)
        try:
            logits = self._pass(ids)
        except Exception:
            self.used = False
            return super().__call__(ids)
        if self.start and self.checks:
            self.checks -= 1
            true = super().__call__(ids)
            self.used = bool(np.abs(logits - true).max() < self.tolerance)
            return true
        return logits

    def _pass(self, ids: list[int]) -> np.ndarray:
        self.start = max(0, min(self.known, len(ids) - 1) - LOCAL + 1) if self.known else 0
        self.call, new = 0, len(ids) - self.known
        fast, held = self.mx.fast, {}
        for name, value in vars(self.module).items():  # what the file has imported by name: harness.mlx_cpu's on a CPU
            if value is self.attention or getattr(value, "__name__", "") == "cpu_attention":
                held[name] = value
        try:
            fast.rope, fast.scaled_dot_product_attention = self._rope, partial(self._attention, new)
            for name in held:
                setattr(self.module, name, fast.scaled_dot_product_attention)
            logits = self.logits_of(np.array([ids[self.start :]], np.int32))[0, -1].astype(np.float64)
        finally:
            fast.rope, fast.scaled_dot_product_attention = self.rope, self.attention
            for name, value in held.items():
                setattr(self.module, name, value)
        if not self.layers:
            raise NotImplementedError("no attention was seen")
        self.known = len(ids)
        return logits

    def _rope(self, x, *args, offset=0, **more):
        return self.rope(x, *args, offset=offset + self.start, **more)

    def _attention(self, new: int, q, k, v, *, scale, mask=None, **more):
        if not isinstance(mask, str):
            raise NotImplementedError("a mask of its own")
        if self.start == 0 and self.known == 0:
            self.layers.append((k, v))
        else:
            old = self.layers[self.call]
            k, v = (self.mx.concatenate([a, b[:, :, -new:]], axis=2) for a, b in zip(old, (k, v), strict=True))
            self.layers[self.call] = k, v
        self.call += 1
        seen = self.mx.arange(k.shape[2]) <= self.start + self.mx.arange(q.shape[2])[:, None]   # [queries, keys]
        return self.attention(q, k, v, scale=scale, mask=seen, **more)


def generate(next_logits: Callable, ids: list[int], stop: int, options: Options) -> Iterator[int]:
    """Yield token ids that continue `ids`, until `stop` or options.tokens of them. next_logits: ids -> logits [vocab]."""
    rng, ids = np.random.default_rng(options.seed), list(ids)
    for _ in range(options.tokens):
        logits = next_logits(ids)
        order = np.argsort(-logits)
        weights = np.exp((logits[order] - logits[order[0]]) / max(options.temperature, 1e-6))
        weights /= weights.sum()
        enough = 1 if options.temperature == 0 else int(np.searchsorted(np.cumsum(weights), options.top_p)) + 1
        chosen = int(rng.choice(order[:enough], p=weights[:enough] / weights[:enough].sum()))
        if chosen == stop:
            return
        ids.append(chosen)
        yield chosen


def model(run_dir: Path, context: int) -> Uncached:
    """The next token's logits of a run's model, with a cache where it is on MLX."""
    logits_of = load(run_dir)
    module = sys.modules["candidate"]
    if not hasattr(module, "mx"):
        return Uncached(logits_of, context)
    module.mx.disable_compile()  # a compiled function would not see the cache
    return Cached(logits_of, context, module)


def data_of(run_dir: Path) -> Path:
    """The prepared data that a run was trained on. ClickException where it is gone."""
    if not (run_dir / "train.json").exists():
        raise click.ClickException(f"{run_dir}: expected the directory of a finished training, with train.json and its train file")
    told = os.environ.get("AUTORESEARCH_DATA")
    data = Path(told) if told else home() / "train" / json.loads((run_dir / "train.json").read_text())["data"]
    if not data.is_dir():
        raise click.ClickException(f"the data that {run_dir} was trained on is gone: expected {data}; prepare it again")
    return data


def write(run_dir: Path, prompt: str, options: Options) -> Iterator[str]:
    """Yield the prompt and the text that the model in run_dir adds to it, piece by piece; a character comes once it is whole."""
    data = data_of(run_dir)
    meta, tokenizer = json.loads((data / "meta.json").read_text()), Tokenizer((data / "tokenizer.model").read_bytes())
    next_logits = model(run_dir.resolve(), meta["seq_len"])
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield prompt
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for token in generate(next_logits, ids, tokenizer.bos_id, options):
        yield decoder.decode(tokenizer.decode_bytes(np.array([token])))
    yield decoder.decode(b"", final=True)


def run_of(experiment: Experiment, folder: Path) -> Path:
    """A run directory of an experiment that is still there."""
    found = [folder / "trials" / trial.folder for trial in experiment.trials if trial.status == "ok"]
    kept = [path for path in found if (path / "train.json").exists()]
    if not kept:
        raise click.ClickException(f"no run folder of {experiment.name} is left in {folder / 'trials'}")
    return kept[-1]


@click.command()
@click.argument("run_dir", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tag", help="Night whose best model writes. Default: the latest.")
@click.option("--compare", is_flag=True, help="Show the night's baseline and its best side by side.")
@click.option("--prompt", "prompts", multiple=True, default=[""], help="Text to go on from. Default: the start of a document.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of {prompt, text} of RUN_DIR.")
@click.option("--tokens", default=200, show_default=True, type=click.IntRange(1), help="Maximum length.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0: always the likeliest token.")
@click.option("--top-p", default=0.95, show_default=True, type=click.FloatRange(0, 1, min_open=True),
              help="Draw from the likeliest tokens that together have this probability.")
@click.option("--seed", default=1, show_default=True)
def main(run_dir: Path | None, tag: str | None, compare: bool, prompts: tuple[str, ...], as_json: bool, **options) -> None:
    """Let the model in RUN_DIR write, or the best one of a night."""
    options = Options(**options)
    if run_dir is not None and (compare or tag):
        raise click.UsageError("expected RUN_DIR alone, or --tag and --compare")
    if as_json and run_dir is None:
        raise click.UsageError("--json: expected a RUN_DIR with it")
    if as_json:
        click.echo(json.dumps([{"prompt": prompt, "text": "".join(write(run_dir, prompt, options))} for prompt in prompts]))
        return
    if run_dir is None:
        runs = Path.cwd() / "runs"
        try:
            folder = runs / (tag or latest(runs))
            night = fold(read_events(folder / "journal.jsonl")[0])
            best = night.leader
        except NightError as error:
            raise click.ClickException(str(error)) from None
        if compare:
            sides = [night.experiments[0], best] if best.n else [best]
            for prompt in prompts:
                table = Table(show_edge=False, padding=(0, 2, 0, 0))
                for experiment in sides:
                    table.add_column(Text(f"{experiment.name}, val_bpb {experiment.mean:.4f}"), ratio=1)
                table.add_row(*(Text("".join(write(run_of(experiment, folder), prompt, options))) for experiment in sides))
                Console().print(table)
            return
        run_dir = run_of(best, folder)
        click.echo(f"{best.name} of the night {night.tag}, val_bpb {best.mean:.4f}:", err=True)
    for prompt in prompts:
        for piece in write(run_dir, prompt, options):
            click.echo(piece, nl=False)
        click.echo()


if __name__ == "__main__":
    main()
