"""Run one train file, ours or another project's, and measure it. Started by compare_peers.py and benchmark.py, not by hand.

    PEER_SETTINGS='{"data": DIR, "held": DIR, "seq_len": 128, "seconds": 60, "seed": 1, "report": FILE}' python peer_shim.py FILE

A file of the autoresearch family says `from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb`;
here this module is that `prepare`, over our data: our tokenizer, our rows, and the score over exactly the text that
`prepare_mlx.py score` scores, every byte once, with the softmax in float64. Our own file brings its own harness: of it only the
steps are timed. Nothing of a peer is trusted and nothing is sandboxed: its owner runs it by hand.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.clock import Budget
from harness.machine import load_fast_blas, process_peak
from harness.probes import log_probs
from harness.run import batches, row_starts
from harness.score import EVAL_BUFFER_BYTES, as_rows, read_held_out
from harness.tokenizer import Tokenizer as OurTokenizer

SETTINGS: dict[str, Any] = json.loads(os.environ.get("PEER_SETTINGS", "{}"))
MAX_SEQ_LEN: int = SETTINGS.get("seq_len", 0)                                   # tokens in a training row
TIME_BUDGET: float = SETTINGS.get("seconds", 0)
EVAL_TOKENS = VOCAB_SIZE = 0                                                    # some files import them; the score needs neither
WARMUP = 0.2                                                                    # share of the steps that are not timed

# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------

report: dict[str, Any] = {}
marks: list[tuple[float, int]] = []                                             # (time, tokens asked for before it)


def mark(tokens: int) -> None:
    """A step begins after so many tokens."""
    if not marks or tokens > marks[-1][1]:
        marks.append((time.perf_counter(), tokens))


def memory() -> dict[str, float]:
    """Peak MB of the framework's arrays (0: PyTorch doesn't count on a CPU) and of the process, compiling included."""
    mlx, torch = sys.modules.get("mlx.core"), sys.modules.get("torch")
    peak = mlx.get_peak_memory() if mlx else torch.cuda.max_memory_allocated() if torch else 0
    return {"framework_mb": peak / 2**20, "process_mb": process_peak() / 2**20}


def write_report() -> None:
    if len(marks) > 1:
        first = int(WARMUP * len(marks))
        seconds, tokens = np.diff(np.array(marks[first:]), axis=0).T            # [steps] each
        report.update(tokens=marks[-1][1], tokens_per_second=float(np.median(tokens / seconds)),
                      mean_tokens_per_second=float(tokens.sum() / seconds.sum()))
    Path(SETTINGS["report"]).write_text(json.dumps(memory() | report))


# ---------------------------------------------------------------------------------------------------------------------
# The harness that a peer imports
# ---------------------------------------------------------------------------------------------------------------------


def meta() -> dict[str, Any]:
    return json.loads(Path(SETTINGS["data"], "meta.json").read_text())


class Tokenizer:
    """Our tokenizer with the family's methods."""

    def __init__(self) -> None:
        self.ours = OurTokenizer(Path(SETTINGS["data"], "tokenizer.model").read_bytes())

    @classmethod
    def from_directory(cls, *_: object) -> Tokenizer:
        return cls()

    def get_vocab_size(self) -> int:
        return meta()["vocab_size"]

    def get_bos_token_id(self) -> int:
        return meta()["bos_id"]

    def encode(self, text: str) -> list[int]:
        return self.ours.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.ours.decode(ids)


def as_array(tokens: np.ndarray) -> Any:
    """int [B, T] for the framework that the file has imported."""
    if mlx := sys.modules.get("mlx.core"):
        return mlx.array(tokens)
    device = getattr(sys.modules["__main__"], "device", "cpu")                  # the family's files call it so
    return sys.modules["torch"].from_numpy(tokens.astype(np.int64)).to(device)


def make_dataloader(tokenizer: object, rows: int, seq_len: int, split: str, *_: object, **__: object) -> Iterator[tuple]:
    """Endless (inputs, targets, epoch), the rows that our file trains on; after SETTINGS["steps"] batches the run ends."""
    if split != "train":
        raise ValueError(f"split {split!r}: expected train; held-out text is for evaluate_bpb alone")
    facts = meta()
    text = np.memmap(Path(SETTINGS["data"], "train.bin"), dtype=facts["dtype"], mode="r")
    starts = row_starts(text, facts["bos_id"], seq_len)
    for i, (x, y) in enumerate(batches(text, starts, rows, seq_len, SETTINGS["seed"])):
        mark(i * rows * seq_len)
        if i == SETTINGS.get("steps"):
            raise SystemExit(0)
        yield as_array(x), as_array(y), 1 + i * rows // len(starts)


def bits_per_byte(logits: Callable[[np.ndarray], np.ndarray], held: Path) -> float:
    """val_bpb of int32 [B, T] -> [B, T, vocab]: the scorer's rows and its sum, without its probes."""
    facts, tokenizer, tokens, text = read_held_out(held, "val")
    inputs, targets = as_rows(tokens, facts["seq_len"], tokenizer.bos_id)
    rows, seq_len = inputs.shape
    batch = max(1, EVAL_BUFFER_BYTES // (4 * seq_len * tokenizer.vocab_size))
    nats = 0.0
    for a in range(0, rows, batch):
        asked = np.resize(inputs[a : a + batch], (batch, seq_len))              # one shape: a compiler may take seconds for each
        ids = targets[a : a + batch].reshape(-1, 1)
        sizes = tokenizer.token_bytes[ids[:, 0]]                                # marks and padding have no bytes
        answer = logits(asked).reshape(batch * seq_len, -1)[: len(ids)]
        nats -= math.fsum(log_probs(answer, ids)[sizes > 0, 0])
    return nats / math.log(2) / len(text)


def evaluate_bpb(model: Callable, tokenizer: object, batch_size: int) -> float:
    """The family's score of a model, over our text; memory is read before: ours is measured without evaluation, too."""
    report.update(memory(), training_seconds=time.perf_counter() - marks[0][0])
    torch = sys.modules.get("torch")

    def logits(tokens: np.ndarray) -> np.ndarray:
        answer = model(as_array(tokens))
        return answer.float().cpu().numpy() if torch else np.array(answer)

    if torch:
        with torch.no_grad():
            report["val_bpb"] = bits_per_byte(logits, Path(SETTINGS["held"]))
    else:
        report["val_bpb"] = bits_per_byte(logits, Path(SETTINGS["held"]))
    return report["val_bpb"]


# ---------------------------------------------------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------------------------------------------------


def without_hopper() -> None:
    """What upstream's file asks of an H100, on any machine: the attention kernel by SDPA, same window (keys t-w..t)."""
    import torch

    def flash_attn_func(q, k, v, causal, window_size):                          # [B, T, H, D]
        t, (window, _) = q.shape[1], window_size
        mask = None if window >= t - 1 else torch.ones(t, t, dtype=torch.bool, device=q.device).tril().triu(-window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2)

    flash = SimpleNamespace(flash_attn_interface=SimpleNamespace(flash_attn_func=flash_attn_func))
    sys.modules["kernels"] = SimpleNamespace(get_kernel=lambda *_: flash)       # type: ignore[assignment]
    if not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda *_: (9, 0)
        torch.cuda.synchronize = lambda *_: None


def main() -> None:
    file, source = sys.argv[1], Path(sys.argv[1]).read_text()
    sys.argv = [file]  # as if it had been started by itself
    sys.modules["prepare"] = sys.modules["__main__"]
    if "from prepare_mlx import" in source:  # ours: its loop asks for its progress once a step
        progress = Budget.progress

        def timed(budget: Budget, steps: int, tokens: int) -> float:
            mark(tokens)
            return progress(budget, steps, tokens)

        Budget.progress = timed                                     # type: ignore[method-assign]
    elif "import mlx" in source:
        load_fast_blas()  # ours loads it, too
    elif "get_kernel" in source:
        without_hopper()
    try:
        runpy.run_path(file, run_name="__main__")
    finally:
        write_report()


if __name__ == "__main__":
    main()
