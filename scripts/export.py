"""Export a model: write a folder that mlx-lm can run.

    python scripts/export.py OUT                    the best model of the latest night
    python scripts/export.py RUN_DIR OUT            the model of one training
    mlx_lm.generate --model OUT --trust-remote-code --prompt "Once upon a time"

The folder contains the code of the model: the train file as the agent left it, and the harness that the train file imports. So any
architecture works. A KV cache (scripts/decoding.py) is put around the model and checked against the model's own logits. If they
differ, the cache is not used, and each token costs a pass over the whole context.
"""

import json
import shutil
import sys
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from agent.journal.state import Night  # noqa: E402
from agent.judgement.decision import noise  # noqa: E402
from agent.views.report import plain  # noqa: E402
from harness import home  # noqa: E402
from harness.tokenizer import Tokenizer  # noqa: E402
from scripts.sample import find_night, run_of  # noqa: E402

CARD = """---
library_name: mlx
tags: [autoresearch, mlx]
---
# {title}

A small GPT, trained by `{train_file}` with a budget of {budget} in {what}.

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

The model continues a text; it was not trained to answer questions. A KV cache speeds up generation. The first tokens are computed
with and without the cache; if the logits differ, which an unusual architecture may cause, the cache is not used.
"""


def export(run_dir: Path, out: Path, night: Night | None, n: int) -> None:
    """Write the folder. ClickException if the run is incomplete or its data is gone."""
    facts = json.loads((run_dir / "train.json").read_text())
    data = home() / "train" / facts["data"]
    source = next(iter(sorted(run_dir.glob("train_*.py"))), None)
    if source is None or not data.is_dir():
        raise click.ClickException(f"expected {run_dir} to hold its train file, and {data} to exist; prepare the data again")
    if "import mlx" not in source.read_text():
        raise click.ClickException(f"{source.name} does not run on MLX, so mlx-lm cannot load the model")
    if not (data / "tokenizer.model").stat().st_size:
        raise click.ClickException("a vocabulary of plain bytes has no SentencePiece model, which mlx-lm needs")
    import mlx.core as mx

    (out / "run").mkdir(parents=True)
    for file in (*run_dir.glob("weights.*"), *run_dir.glob("*.json"), source):
        if file.name != "error.json":
            shutil.copy(file, out / "run")
    shutil.copytree(ROOT / "harness", out / "code" / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prepare_mlx.py", out / "code")
    meta, tokenizer = json.loads((data / "meta.json").read_text()), Tokenizer((data / "tokenizer.model").read_bytes())
    shutil.copy(ROOT / "scripts" / "exported_model.py", out / "model.py")
    shutil.copy(ROOT / "scripts" / "decoding.py", out / "code")
    mx.save_safetensors(str(out / "model.safetensors"), {"unused": mx.zeros(1)})  # mlx-lm wants one; the weights are in run/
    config = {"model_type": "autoresearch", "model_file": "model.py", "train_file": source.name, "vocab_size": tokenizer.vocab_size,
              "max_position_embeddings": meta["seq_len"], "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.bos_id}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(out, data / "tokenizer.model")
    scores = night.experiments[n].scores if night else []
    score = f"{np.mean(scores):.4f} bits per byte (mean of {len(scores)} trainings, sd {noise(night).sigma:.4f})" \
        if night and scores else "not measured here"
    title = f"{night.tag}, {night.experiments[n].name}" if night else run_dir.name
    what = f"the night {night.tag}" if night else "a training by hand"
    (out / "README.md").write_text(CARD.format(
        title=title, what=what, score=score, budget=facts["budget"], train_file=source.name, data=meta.get("source", facts["data"]),
        licence=meta.get("licence", "unknown"), params=facts["num_params"] / 1e6, context=meta["seq_len"],
        vocab=tokenizer.vocab_size, commit=night.experiments[n].commit if night else "unknown", steps=facts["num_steps"],
        tokens=facts["total_tokens"] / 1e6, device=facts["device"], test=held_out(night, n), recipe=recipe(night, n)))


def held_out(night: Night | None, n: int) -> str:
    """The table row of the held-out test; "" if there was no test."""
    test = night.tests.get(n) if night else None
    if test is None:
        return ""
    if test.get("test_bpb") is None:
        return f"| held-out test | refused: {plain((test.get('error') or {}).get('message') or '')} |\n"
    return f"| held-out test | {test['test_bpb']:.4f} bits per byte, scored once |\n"


def recipe(night: Night | None, n: int) -> str:
    """A list of the changes that led to this model, each with its gain; "" if nothing was kept."""
    if night is None or not night.kept:
        return ""
    lines, before = ["\nThe changes that the night kept, with the gain of each in bits per byte:\n"], night.experiments[0].mean
    for kept in (night.experiments[k] for k in night.kept if k <= n):
        lines.append(f"- {plain(kept.description)}: {before - kept.mean:.4f}")
        before = kept.mean
    return "\n".join(lines) + "\n"


def write_tokenizer(out: Path, model: Path) -> None:
    """Write the files from which transformers makes the same tokenizer: no space before the text, bytes for rare characters."""
    shutil.copy(model, out / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False, "add_bos_token": True,
                "add_eos_token": False, "clean_up_tokenization_spaces": False, "unk_token": "<unk>",
                "bos_token": "<s>", "eos_token": "<s>"}  # the mark of the next document ends a text
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="[RUN_DIR] OUT", type=click.Path(path_type=Path))
@click.option("--tag", help="The night whose best model is exported. Default: the latest night.")
def main(paths: tuple[Path, ...], tag: str | None) -> None:
    """Export the best model of a night, or the model in RUN_DIR, to the folder OUT, for mlx-lm."""
    if len(paths) > 2 or (len(paths) == 2 and tag):
        raise click.UsageError("expected OUT, or OUT and --tag, or RUN_DIR and OUT")
    run_dir, out = (None, paths[0]) if len(paths) == 1 else paths
    if out.exists():
        raise click.ClickException(f"{out} exists already; choose another folder, or remove it")
    night, n = None, 0
    if run_dir is None:
        night, folder = find_night(tag)
        n, run_dir = night.leader.n, run_of(night.leader, folder)
    if not (run_dir / "train.json").exists():
        raise click.ClickException(f"{run_dir}: expected the directory of a finished training, with train.json")
    export(run_dir, out, night, n)
    click.echo(f"written to {out}; run it: mlx_lm.generate --model {out} --trust-remote-code --prompt 'Once upon a time'")


if __name__ == "__main__":
    main()
