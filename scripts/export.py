"""Take a model away: write a folder that mlx-lm runs.

    python scripts/export.py OUT                    the best model of the latest night
    python scripts/export.py RUN_DIR OUT            the model of one training
    mlx_lm.generate --model OUT --trust-remote-code --prompt "Once upon a time"

The folder carries the code that made the model: the train file as the agent left it, and the harness that it imports. So it runs
whatever became of the architecture. It has no cache of keys and values: each token costs a pass over the context.
"""

import json
import shutil
import sys
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from agent.errors import NightError  # noqa: E402
from agent.journal.folder import latest  # noqa: E402
from agent.journal.journal import read_events  # noqa: E402
from agent.journal.state import Night, fold  # noqa: E402
from agent.judgement.decision import noise  # noqa: E402
from agent.text import one_line  # noqa: E402
from harness import home  # noqa: E402
from harness.tokenizer import Tokenizer  # noqa: E402
from scripts.sample import run_of  # noqa: E402

MODEL = '''"""What mlx-lm loads: the trained model behind the interface that mlx-lm expects. Written by scripts/export.py."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

HERE = Path(__file__).resolve().parent


@dataclass
class ModelArgs:
    model_type: str
    context: int
    train_file: str

    @classmethod
    def from_dict(cls, config):
        return cls(config["model_type"], config["max_position_embeddings"], config["train_file"])


class Tokens:
    """The tokens so far, in place of a cache of keys and values: the model is asked for all of them again."""

    def __init__(self):
        self.tokens = []

    @property
    def state(self):
        return mx.array(self.tokens, mx.int32) if self.tokens else mx.zeros((0,), mx.int32)

    @state.setter
    def state(self, value):
        self.tokens = value.tolist()

    meta_state = ""
    offset = property(lambda self: len(self.tokens))
    nbytes = property(lambda self: 4 * len(self.tokens))

    def empty(self):
        return not self.tokens

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, len(self.tokens))
        self.tokens = self.tokens[: len(self.tokens) - n]
        return n


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        sys.path.insert(0, str(HERE / "code"))
        spec = importlib.util.spec_from_file_location("trained", HERE / "run" / args.train_file)
        trained = importlib.util.module_from_spec(spec)
        sys.modules["trained"] = trained
        spec.loader.exec_module(trained)
        self._logits = trained.load_model(HERE / "run")

    def __call__(self, inputs, cache=None, **_):
        """int [1, n] -> logits [1, n, vocab] at these positions."""
        new = inputs[0].tolist()
        before = cache[0].tokens if cache else []
        tokens = [*before, *new]
        if cache:
            cache[0].tokens = tokens
        rows, context = [], self.args.context
        for end in range(len(tokens), len(tokens) - len(new), -context):
            start = max(0, end - context)
            row = np.zeros((1, context), np.int32)  # one shape for every question
            row[0, : end - start] = tokens[start:end]
            wanted = min(context, end - (len(tokens) - len(new)))
            rows.insert(0, self._logits(row)[:, end - start - wanted : end - start])
        return mx.array(np.concatenate(rows, axis=1))

    def sanitize(self, weights):
        return {}  # load_model of the train file has read its own

    @property
    def layers(self):
        return [None]

    def make_cache(self):
        return [Tokens()]
'''
CARD = """---
library_name: mlx
tags: [autoresearch, mlx]
---
# {title}

A small GPT, trained for {budget} by `{train_file}` in {what}.

| | |
| --- | --- |
| validation | {score} |
{test}| data | {data}, licence: {licence} |
| parameters | {params:.2f} M |
| context | {context} tokens |
| vocabulary | {vocab} tokens, SentencePiece BPE with byte fallback |
| trained | {steps:,} steps, {tokens:.1f} M tokens, {budget} |
| device | {device} |
| commit | {commit} |
{recipe}
Run it, from code in this folder:

    mlx_lm.generate --model . --trust-remote-code --prompt "Once upon a time"

It has no cache of keys and values: each token costs a pass over the context. It goes on from a text; it was not taught to answer.
"""


def export(run_dir: Path, out: Path, night: Night | None, n: int) -> None:
    """Write the folder. ClickException where the run is not whole, or its data is gone."""
    facts = json.loads((run_dir / "train.json").read_text())
    data = home() / "train" / facts["data"]
    source = next(iter(sorted(run_dir.glob("train_*.py"))), None)
    if source is None or not data.is_dir():
        raise click.ClickException(f"expected {run_dir} to hold its train file, and {data} to exist; prepare the data again")
    if source.name != "train_mlx.py":
        raise click.ClickException(f"{source.name} does not run on MLX, so that mlx-lm cannot load it")
    if not (data / "tokenizer.model").stat().st_size:
        raise click.ClickException("a vocabulary of plain bytes has no SentencePiece model, which mlx-lm needs")
    import mlx.core as mx

    (out / "run").mkdir(parents=True)
    for file in (*run_dir.glob("weights.*"), *run_dir.glob("*.json"), source):
        if file.name not in ("error.json",):
            shutil.copy(file, out / "run")
    shutil.copytree(ROOT / "harness", out / "code" / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prepare_mlx.py", out / "code")
    meta, tokenizer = json.loads((data / "meta.json").read_text()), Tokenizer((data / "tokenizer.model").read_bytes())
    (out / "model.py").write_text(MODEL)
    mx.save_safetensors(str(out / "model.safetensors"), {"unused": mx.zeros(1)})  # mlx-lm wants one; the weights are in run/
    config = {"model_type": "autoresearch", "model_file": "model.py", "train_file": source.name, "vocab_size": tokenizer.vocab_size,
              "max_position_embeddings": meta["seq_len"], "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.bos_id}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(out, data / "tokenizer.model")
    scores = night.experiments[n].scores if night else []
    score = f"{np.mean(scores):.4f} bits per byte (mean of {len(scores)}, one training spreads by {noise(night).sigma:.4f})" \
        if night and scores else "not measured here"
    title = f"{night.tag}, {night.experiments[n].name}" if night else run_dir.name
    what = f"the night {night.tag}" if night else "a training by hand"
    (out / "README.md").write_text(CARD.format(
        title=title, what=what, score=score, budget=facts["budget"], train_file=source.name, data=meta.get("source", facts["data"]),
        licence=meta.get("licence", "unknown"), params=facts["num_params"] / 1e6, context=meta["seq_len"],
        vocab=tokenizer.vocab_size, commit=night.experiments[n].commit if night else "unknown", steps=facts["num_steps"],
        tokens=facts["total_tokens"] / 1e6, device=facts["device"], test=held_out(night, n), recipe=recipe(night, n)))


def held_out(night: Night | None, n: int) -> str:
    """The row of the held-out test, "" without one."""
    tested = (night.tests.get(n) or {}).get("test_bpb") if night else None
    return f"| held-out test | {tested:.4f} bits per byte, scored once |\n" if tested else ""


def recipe(night: Night | None, n: int) -> str:
    """What the night kept on the way to this model, a line each with its gain."""
    if night is None or not night.kept:
        return ""
    lines, before = ["\nWhat the night kept, and bits per byte won by each:\n"], night.experiments[0].mean
    for kept in (night.experiments[k] for k in night.kept if k <= n):
        words = "".join(f"\\{c}" if c in "\\`*_{}[]<>|#" else c for c in one_line(kept.description, 200))  # an agent's: no markup
        lines.append(f"- {words}: {before - kept.mean:.4f}")
        before = kept.mean
    return "\n".join(lines) + "\n"


def write_tokenizer(out: Path, model: Path) -> None:
    """The files from which transformers makes the same tokenizer: no space before the text, bytes for rare letters."""
    shutil.copy(model, out / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False, "add_bos_token": True,
                "add_eos_token": False, "clean_up_tokenization_spaces": False, "unk_token": "<unk>",
                "bos_token": "<s>", "eos_token": "<s>"}  # a text ends where the next one's mark stands
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="[RUN_DIR] OUT", type=click.Path(path_type=Path))
@click.option("--tag", help="Night whose best model is taken. Default: the latest.")
def main(paths: tuple[Path, ...], tag: str | None) -> None:
    """Write the best model of a night, or the one of a training in RUN_DIR, to the folder OUT, for mlx-lm."""
    if len(paths) > 2 or (len(paths) == 2 and tag):
        raise click.UsageError("expected OUT, or OUT and --tag, or RUN_DIR and OUT")
    run_dir, out = (None, paths[0]) if len(paths) == 1 else paths
    if out.exists():
        raise click.ClickException(f"{out} exists already; choose another folder, or remove it")
    night, n = None, 0
    if run_dir is None:
        runs = Path.cwd() / "runs"
        try:
            folder = runs / (tag or latest(runs))
            night = fold(read_events(folder / "journal.jsonl")[0])
            n, run_dir = night.leader.n, run_of(night.leader, folder)
        except NightError as error:
            raise click.ClickException(str(error)) from None
    if not (run_dir / "train.json").exists():
        raise click.ClickException(f"{run_dir}: expected the directory of a finished training, with train.json")
    export(run_dir, out, night, n)
    click.echo(f"written to {out}; run it: mlx_lm.generate --model {out} --trust-remote-code --prompt 'Once upon a time'")


if __name__ == "__main__":
    main()
