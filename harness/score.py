"""The score of a finished training: validation bits per byte, from the logits that the candidate's logits server gives."""

import concurrent.futures
import contextlib
import ctypes
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

from harness import HarnessError, home, open_plain, sha256, write_atomically
from harness.machine import TIERS
from harness.probes import Question, bits_per_byte, log_probs
from harness.server import LOAD_LIMIT, LogitsServer
from harness.tokenizer import Tokenizer

DRIFT = 0.10                    # relative change of the machine's speed during a training that the summary warns about
EVAL_BUFFER_BYTES = 96 << 20    # size limit of each of the two logits buffers, which bounds the scorer's memory
FACTS_BYTES = 1 << 20           # size limit of a train.json


def score(run_dir: Path, held: Path | None, split: str, wrap: list[str], batch_rows=0, scratch: Path | None = None,
          load_limit: float = LOAD_LIMIT, verify: bool = False) -> dict:
    """Score a run's model on held-out text, every byte once. Returns the summary: {key: value}, in the order to print.

    held: folder of the held-out shards; default: those of the run's dataset. split: "val" or "test". wrap, scratch, load_limit: see
    LogitsServer. batch_rows: rows of a batch, at most; 0: 256, or fewer if EVAL_BUFFER_BYTES hold fewer. verify: probe every row.
    Errors: HarnessError("violation", "crash", "oom", "timeout") if the model or its train.json is at fault, ("data") if the
    held-out text is missing or changed.
    """
    began = time.monotonic()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: the user's other processes may not read or write our memory
    facts = read_facts(run_dir)
    meta, tokenizer, tokens, _ = read_held_out(held or home() / "held" / str(facts["data"]), split)
    seq_len, vocab = meta["seq_len"], tokenizer.vocab_size
    inputs, targets = as_rows(tokens, seq_len, tokenizer.bos_id)
    rows = len(inputs)
    scored = tokenizer.token_bytes[targets] > 0                                 # document marks and padding have no bytes
    batch_rows = max(1, min(batch_rows or 256, rows // 8, EVAL_BUFFER_BYTES // (4 * seq_len * vocab)))  # at least 8 batches
    threads, log = concurrent.futures.ThreadPoolExecutor(os.cpu_count()), bytearray()  # NumPy releases the interpreter lock
    load_seconds = [0.0]
    with contextlib.suppress(OSError):  # a candidate may have made a folder of it
        (run_dir / "serve.log").unlink()

    def ask(questions: list[Question], ids: np.ndarray) -> np.ndarray:
        groups = [questions[a : a + batch_rows] for a in range(0, len(questions), batch_rows)]
        values = [np.empty((0, seq_len, ids.shape[-1]))]
        shape = [batch_rows, seq_len, vocab]
        with contextlib.closing(LogitsServer(run_dir, shape, wrap, log, scratch, load_limit)) as server:
            for k in range(len(groups) + 1):
                if k < len(groups):  # the server computes the next batch while this process sums the last one
                    server.ask(np.stack([question.tokens for question in groups[k]]))
                if k:
                    rows = [question.row for question in groups[k - 1]]
                    wanted = ids[rows].reshape(-1, ids.shape[-1])
                    given = log_probs(server.answer()[: len(rows)].reshape(-1, vocab), wanted, threads)
                    values.append(given.reshape(-1, seq_len, ids.shape[-1]))
            load_seconds.append(server.load_seconds)
        return np.concatenate(values)

    try:
        bpb = bits_per_byte(ask, inputs, targets, scored, meta[f"{split}_bytes"], verify)
    finally:
        with contextlib.suppress(OSError):  # written last, because a later server could read an earlier one's log
            write_atomically(run_dir / "serve.log", bytes(log))
    summary = {f"{split}_bpb": f"{bpb:.6f}", "training_seconds": f"{facts['training_seconds']:.1f}",
               "total_seconds": f"{facts['total_seconds'] + time.monotonic() - began:.1f}",
               "peak_vram_mb": f"{facts['peak_vram_mb']:.1f}", "mfu_percent": f"{facts['mfu_percent']:.2f}",
               "total_tokens_M": f"{facts['total_tokens'] / 1e6:.3f}", "num_steps": facts["num_steps"],
               "num_params_M": f"{facts['num_params'] / 1e6:.3f}", "depth": facts["depth"],
               f"{split}_bytes": meta[f"{split}_bytes"], f"{split}_sha256": meta[f"{split}_sha256"][:16],
               "data_hash": meta["data_hash"], "tokenizer_hash": meta["tokenizer_hash"], "seq_len": seq_len,
               "budget": facts["budget"], "device": facts["device"], "seed": facts["seed"],
               "suspended_seconds": f"{facts['suspended_seconds']:.1f}", "speed_index": f"{facts['speed_index']:.3f}",
               "products_per_second": f"{facts['products_per_second']:.2f}", "load_seconds": f"{max(load_seconds):.2f}"}
    if (tier := facts.get("tier")) in TIERS:
        summary["tier"] = tier
    if abs(change := facts["speed_index"] - 1) > DRIFT:
        summary["speed_warning"] = (f"slowed down by {-change:.0%} during this training (heat or another program?)"
                                    if change < 0 else
                                    f"sped up by {change:.0%} during this training (another program ended?)")
    return summary


def read_held_out(held: Path, split: str) -> tuple[dict, Tokenizer, np.ndarray, bytes]:
    """Read one split of a prepared dataset and compare it with meta.json. Returns (meta, tokenizer, tokens, text).

    Errors: HarnessError("data"). Its message names no folder: it may reach a coding agent, who must not find the text by it.
    """
    try:
        meta = json.loads((held / "meta.json").read_text())
        tokenizer = Tokenizer((held / "tokenizer.model").read_bytes())
        tokens = np.fromfile(held / f"{split}.bin", dtype=meta["dtype"])
    except OSError as error:
        raise HarnessError("data", f"held-out data was expected for {held.name}, got {error.strerror} for "
                           f"{Path(str(error.filename)).name}; run prepare_mlx.py again") from error
    if sha256(text := tokenizer.decode_bytes(tokens)) != meta[f"{split}_sha256"] or len(text) != meta[f"{split}_bytes"]:
        raise HarnessError("data", f"{split}.bin of {held.name} is not the text that was prepared; run prepare_mlx.py again")
    return meta, tokenizer, tokens, text


def as_rows(tokens: np.ndarray, seq_len: int, bos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut tokens [n] into the rows that are scored: inputs and targets, int32 [rows, seq_len] each. The last row is padded with
    bos_id."""
    rows = math.ceil((len(tokens) - 1) / seq_len)
    padded = np.full(rows * seq_len + 1, bos_id, dtype=np.int32)
    padded[: len(tokens)] = tokens
    return padded[:-1].reshape(rows, seq_len), padded[1:].reshape(rows, seq_len)


def read_facts(run_dir: Path) -> dict:
    """Read train.json, which the trainer wrote and nobody trusts: numbers must be finite and not negative;
    names must be short and on one line.
    Errors: HarnessError("crash") if there is no readable train.json, ("violation") for any other value."""
    try:
        with os.fdopen(open_plain(run_dir / "train.json"), "rb") as file:
            facts = dict(json.loads(file.read(FACTS_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise HarnessError("crash", f"{run_dir}: expected a train.json from a finished training, got {error}") from error
    for key in ("training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens", "num_steps", "num_params",
                "depth", "seed", "suspended_seconds", "speed_index", "products_per_second"):
        value = facts.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e18:
            raise HarnessError("violation", f"train.json: expected a finite number for {key}, not below 0, got {str(value)[:80]}")
    for key in ("budget", "device", "data"):
        if not re.fullmatch(r"\w[\w.,@:()+ -]{0,95}", str(facts.get(key))):
            raise HarnessError("violation", f"train.json: expected a short name for {key}, got {str(facts.get(key))[:80]!r}")
    return facts
