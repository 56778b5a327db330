"""
The score from log probabilities, and the probes that tell whether they can be believed: pure NumPy, no files, no processes.

`prepare_mlx.py score` hands in a way to ask; what is asked, and what is made of the answers, is decided here.

A model may look back within its row and nowhere else: not ahead, not at the other rows of its batch, not at what it was asked
before. Two processes of the model, one after the other, each score half of the rows and are each probed on the other half. The
first may leave nothing to the second: each has a TMPDIR of its own and a log without a name, and under the sandbox it can write
nowhere else. Not covered: notes left in files where there is no sandbox; on macOS Metal's cache of kernels; in a container whose
bubblewrap has no process ids of its own, a process that outlives the first.
"""

import math
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from prepare_mlx import HarnessError

# What a probe's answer may differ by is what bfloat16 rounds otherwise in another place of the batch, if anything at all.
PROBE_ROWS = 24                 # probes, and one more for every 8 rows
PROBE_TOLERANCE = 0.15          # nats by which one log probability may move: two grains of a bfloat16 logit near 15
PROBE_NOISE = 0.01              # nats, root mean square over all of them
PROBE_LEAK = 0.002              # nats a token that seeing the next one may seem to win (0.0007 bits a byte), and 4 standard errors


def log_probs(logits: np.ndarray, ids: np.ndarray, threads: Executor | None = None) -> np.ndarray:
    """Natural log of the softmax at `ids`: float32 [N, V], int [N, K] -> float64 [N, K]; any constant offset cancels.

    Each piece is first copied, to float64: the server can change its buffer at any time, but whatever it shows there, the
    probabilities that are read from one copy add up to 1. Errors: HarnessError("violation") for a logit that is not finite.
    """
    piece = max(1, (1 << 18) // logits.shape[-1])  # 2 MB: stays in the cache

    def one(a: int) -> np.ndarray:
        x = logits[a : a + piece].astype(np.float64)                            # [piece, V]
        with np.errstate(invalid="ignore"):
            if not np.isfinite(x.sum()):
                raise HarnessError("violation", "non_finite: a logit is NaN or infinite")
        x -= x.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(x, ids[a : a + piece], axis=-1)             # [piece, K]
        np.exp(x, out=x)
        return chosen - np.log(x.sum(axis=-1, keepdims=True))

    return np.concatenate(list((threads.map if threads else map)(one, range(0, len(logits), piece))))


@dataclass
class Question:
    """A row to be asked for: up to `cut` it is row `row` of the text, from there on another document's."""
    row: int
    cut: int
    tokens: np.ndarray                                                          # int32 [T]


def splice(inputs: np.ndarray, row: int, rng: np.random.Generator) -> Question:
    """A probe: the row's beginning, continued from a place where the same two tokens (or one, or none) stand before the joint:
    a model that looks ahead finds nothing odd there, but another next token."""
    flat, seq_len = inputs.reshape(-1), inputs.shape[1]
    cut = int(rng.integers(1, seq_len))
    at = row * seq_len + cut                                                    # the first token that changes
    for same in (2, 1, 0):
        fits = flat[2:] != flat[at]
        for back in range(1, same + 1):
            fits &= flat[2 - back : -back] == flat[at - back]
        if fits.any():
            place = int(rng.choice(np.flatnonzero(fits))) + 2
            rest = np.take(flat, range(place, place + seq_len - cut), mode="wrap")
            return Question(row, cut, np.concatenate([inputs[row, :cut], rest]))
    return Question(row, seq_len, inputs[row])


def bits_per_byte(ask: Callable, inputs: np.ndarray, targets: np.ndarray, scored: np.ndarray, total_bytes: int) -> float:
    """The score: -log2 p summed over every scored token, over the bytes of the text. inputs, targets, scored: [rows, T].

    `ask(questions, ids)` has a new process answer them: log probabilities [questions, T, K] at `ids` [rows, T, K]. Half of
    the rows are scored by one process and half by another, and each is probed by the one that does not score it, all in
    random order: no process sees a beginning twice, so that none can know a probe, or answer it from memory.
    """
    rows, seq_len = inputs.shape
    rng = np.random.default_rng()  # other probes every time
    half = rng.permutation(rows) % 2                                            # [rows]: who scores the row
    ids = np.stack([targets, *rng.integers(0, int(inputs.max()) + 1, (2, rows, seq_len))], axis=-1).astype(np.int32)
    probes = {int(row): splice(inputs, row, rng) for row in rng.permutation(rows)[: PROBE_ROWS + rows // 8]}
    for i, (row, probe) in enumerate(probes.items()):
        if i % 4 == 0 or probe.cut == seq_len:  # the very same row again, among other rows
            probe.cut, probe.tokens = seq_len, inputs[row]
        else:  # a model that looks ahead would raise the other next token, too
            ids[row, probe.cut - 1, 1] = probe.tokens[probe.cut]

    nats, answers = np.zeros(rows), ({}, {})                                    # answers: of the scorer, of the prober
    for which in (0, 1):
        questions = [Question(row, seq_len, inputs[row]) for row in np.flatnonzero(half == which)]
        questions += [probe for row, probe in probes.items() if half[row] != which]
        rng.shuffle(questions)
        for question, values in zip(questions, ask(questions, ids), strict=True):
            row = question.row
            if half[row] == which:
                nats[row] = -math.fsum(values[scored[row], 0])
            if row in probes:
                answers[int(half[row] != which)][row] = values

    moved = {row: answers[0][row][: p.cut] - answers[1][row][: p.cut] for row, p in probes.items()}  # [cut, K] each
    ahead = np.array([moved[row][-1, 0] for row, p in probes.items() if p.cut < seq_len] or [0.0])
    noise = math.sqrt(np.mean(np.concatenate([m[:-1] for m in moved.values()]) ** 2))
    worst = max(probes, key=lambda row: np.abs(moved[row]).max())
    if noise > PROBE_NOISE or np.abs(moved[worst]).max() > PROBE_TOLERANCE:
        raise HarnessError("violation", diagnose(ask, probes[worst], inputs, ids))
    if ahead.mean() > PROBE_LEAK + 4 * noise / math.sqrt(len(ahead)):
        raise HarnessError("violation", f"non_causal: a true next token gains {ahead.mean():.4f} nats where the model can see it, "
                           f"expected at most {PROBE_LEAK}")
    return math.fsum(nats) / math.log(2) / total_bytes


def diagnose(ask: Callable, probe: Question, inputs: np.ndarray, ids: np.ndarray) -> str:
    """Name what a failed probe showed, by asking again, each time a process that remembers nothing."""
    def once(*rows: np.ndarray) -> np.ndarray:
        return ask([Question(probe.row, probe.cut, tokens) for tokens in rows], ids)[-1]  # [T, K]: of the last one

    def differ(a: np.ndarray, b: np.ndarray) -> bool:
        return np.abs(a - b).max() > PROBE_TOLERANCE or math.sqrt(np.mean((a - b) ** 2)) > PROBE_NOISE
    row, cut = inputs[probe.row], probe.cut
    alone = once(row)
    if differ(alone, once(row)):
        return "stateful: the same tokens, asked of two new processes, got other probabilities"
    if differ(alone, once(*np.roll(inputs, -probe.row, axis=0)[1:16], row)):
        return "cross_row: probabilities of a row changed with the other rows of its batch"
    if differ(alone[:cut], once(probe.tokens)[:cut]):
        return f"non_causal: probabilities before position {cut} changed with the tokens from there on"
    return "stateful: probabilities changed with what was asked before"
