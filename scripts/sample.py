"""Let a trained model write: python scripts/sample.py RUN_DIR --prompt "Once upon a time"."""

import importlib.util
import json
import sys
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness import home  # noqa: E402
from harness.tokenizer import Tokenizer  # noqa: E402


def load(run_dir: Path):
    """The run's own source, imported, and its logits function: int32 [B, T] -> float32 [B, T, vocab]."""
    source = next(iter(sorted(run_dir.glob("train_*.py"))), None)
    if source is None or not (run_dir / "train.json").exists():
        raise click.ClickException(f"{run_dir}: expected the directory of a finished training, with train.json and its train file")
    spec = importlib.util.spec_from_file_location("candidate", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["candidate"] = module
    spec.loader.exec_module(module)
    return module.load_model(run_dir)


@click.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompt", default="", help="Text to go on from. Default: the start of a document.")
@click.option("--tokens", default=200, show_default=True, help="How many to write.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the likeliest token every time.")
@click.option("--top-k", default=50, show_default=True, help="Choose among so many of the likeliest.")
@click.option("--seed", default=1, show_default=True)
def main(run_dir: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Sample text from the model in RUN_DIR."""
    logits_of = load(run_dir.resolve())
    data = home() / "train" / json.loads((run_dir / "train.json").read_text())["data"]
    meta, tokenizer = json.loads((data / "meta.json").read_text()), Tokenizer((data / "tokenizer.model").read_bytes())
    context, rng = meta["seq_len"], np.random.default_rng(seed)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for _ in range(tokens):
        window = ids[-context:]
        row = np.zeros((1, context), np.int32)  # one shape for every step; causal, so padding is free
        row[0, : len(window)] = window
        logits = logits_of(row)[0, len(window) - 1].astype(np.float64)          # [vocab]
        best = np.argsort(-logits)[: 1 if temperature == 0 else top_k]
        weights = np.exp((logits[best] - logits[best[0]]) / max(temperature, 1e-6))
        chosen = int(rng.choice(best, p=weights / weights.sum()))
        if chosen == tokenizer.bos_id:
            break
        ids.append(chosen)
    click.echo(tokenizer.decode(ids[1:]))


if __name__ == "__main__":
    main()
