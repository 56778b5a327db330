"""Generate text with a trained model.

    python scripts/sample.py                                    the best model of the latest night
    python scripts/sample.py --compare                          baseline and best of the latest night, side by side
    python scripts/sample.py runs/TAG/trials/0007-1 --prompt "Once upon a time"

The model is loaded by the `load_model` of its own train file, so that any architecture works. On MLX, a KV cache is put around the
model; where the cache does not give the model's own logits, it is not used.

Warning: this runs the run's train file, which an agent wrote, with your rights.
"""

import codecs
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from agent.journal.state import Experiment, Night  # noqa: E402
from agent.views.report import load as load_night  # noqa: E402
from harness import home  # noqa: E402
from harness.tokenizer import Tokenizer  # noqa: E402
from scripts.decoding import Cached, Uncached  # noqa: E402


@dataclass(frozen=True)
class Options:
    """tokens: maximum length. temperature: 0 always takes the likeliest token. top_p: only the likeliest tokens, whose
    probabilities sum to this, are drawn from."""

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
    """A function from token ids to the logits of the next token, with a KV cache if the model is on MLX."""
    logits_of = load(run_dir)
    module = sys.modules["candidate"]
    if not hasattr(module, "mx"):
        return Uncached(logits_of, context)
    module.mx.disable_compile()  # a compiled function would not see the cache
    return Cached(logits_of, context, module)


def data_of(run_dir: Path) -> Path:
    """The folder of the data that a run was trained on. ClickException if it is gone."""
    if not (run_dir / "train.json").exists():
        raise click.ClickException(f"{run_dir}: expected the directory of a finished training, with train.json and its train file")
    told = os.environ.get("AUTORESEARCH_DATA")
    data = Path(told) if told else home() / "train" / json.loads((run_dir / "train.json").read_text())["data"]
    if not data.is_dir():
        raise click.ClickException(f"the data that {run_dir} was trained on is gone: expected {data}; prepare it again")
    return data


def write(run_dir: Path, prompt: str, options: Options) -> Iterator[str]:
    """Yield the prompt, then the text that the model in run_dir adds to it, piece by piece and in complete characters."""
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
    """The newest run directory of an experiment that still exists. ClickException if there is none."""
    found = [folder / "trials" / trial.folder for trial in experiment.trials if trial.status == "ok"]
    kept = [path for path in found if (path / "train.json").exists()]
    if not kept:
        raise click.ClickException(f"no run folder of {experiment.name} is left in {folder / 'trials'}")
    return kept[-1]


def find_night(tag: str | None) -> tuple[Night, Path]:
    """A night, by default the latest, and its folder. ClickException if there is none, or it has no baseline."""
    runs = Path.cwd() / "runs"
    try:
        folder = runs / (tag or latest(runs))
        night = load_night(folder)
        night.leader  # noqa: B018  (JournalError without a baseline)
        return night, folder
    except NightError as error:
        raise click.ClickException(str(error)) from None


@click.command()
@click.argument("run_dir", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tag", help="The night whose best model is used. Default: the latest night.")
@click.option("--compare", is_flag=True, help="Show the night's baseline and its best side by side.")
@click.option("--prompt", "prompts", multiple=True, default=[""], help="Text to continue. Default: the start of a document.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of {prompt, text}; needs RUN_DIR.")
@click.option("--tokens", default=200, show_default=True, type=click.IntRange(1), help="Maximum tokens per text.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0 always takes the likeliest token.")
@click.option("--top-p", default=0.95, show_default=True, type=click.FloatRange(0, 1, min_open=True),
              help="Draw from the likeliest tokens that together have this probability.")
@click.option("--seed", default=1, show_default=True)
def main(run_dir: Path | None, tag: str | None, compare: bool, prompts: tuple[str, ...], as_json: bool, **options) -> None:
    """Generate text with the model in RUN_DIR, or with the best model of a night."""
    options = Options(**options)
    if run_dir is not None and (compare or tag):
        raise click.UsageError("expected RUN_DIR alone, or --tag and --compare")
    if as_json and run_dir is None:
        raise click.UsageError("--json: expected a RUN_DIR with it")
    if as_json:
        click.echo(json.dumps([{"prompt": prompt, "text": "".join(write(run_dir, prompt, options))} for prompt in prompts]))
        return
    if run_dir is None:
        night, folder = find_night(tag)
        best = night.leader
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
