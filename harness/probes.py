"""
Bits per byte from log probabilities, and the probes that detect a cheating model: pure NumPy, no files, no processes.

`score` passes in a function that asks the model. This module decides which rows to ask for and judges the answers.

A model may use earlier tokens of the same row and nothing else: no later tokens, no other rows of the batch, no earlier requests.
Several processes of the model run one after the other, two in an ordinary score. Each scores a part of the rows and is probed on
others. A process must leave no message to the next: each has its own TMPDIR, its own copy of the run directory and a nameless log,
and the sandbox denies every other write.

A probe tests one position of one row, so a model that looks ahead at few positions passes most ordinary scores. Before a keep the
driver therefore asks for a score that probes every row, and VERIFY_POSITIONS positions if VERIFY_SERVERS processes reach so many.
A model that looks ahead at a share p of all positions then passes with a chance of about (1 - p) ** VERIFY_POSITIONS.

Not covered: files written where there is no sandbox; Metal's kernel cache on macOS; a process that outlives the first one, in a
container where bubblewrap has no process namespace; what the kernel tells about the use of shared files, memory and keyrings.
"""

import math
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from harness import HarnessError

# The answers to a row and to its probe may differ by rounding only: bfloat16 may round differently at another place of the batch.
PROBE_ROWS = 24                 # number of probes in an ordinary score, plus one for every 8 rows
VERIFY_POSITIONS = 1500         # positions to probe before a keep
VERIFY_SERVERS = 12             # most processes of one score
PROBE_TOLERANCE = 0.15          # nats, limit for the change of one log probability: two steps of a bfloat16 logit near 15
PROBE_NOISE = 0.01              # nats, limit for the root mean square of all changes
PROBE_LEAK = 0.002              # nats, limit for the mean gain from seeing the true next token, on top of 4 standard errors


def log_probs(logits: np.ndarray, ids: np.ndarray, threads: Executor | None = None) -> np.ndarray:
    """Log softmax at `ids`, in nats: float32 [N, V], int [N, K] -> float64 [N, K].

    The logits are copied piece by piece, as float64, before anything is computed. The server can change the shared buffer at any
    time, but the probabilities computed from one copy always sum to 1. `threads` computes pieces in parallel.
    Errors: HarnessError("violation") for a logit that is not finite.
    """
    piece = max(1, (1 << 18) // logits.shape[-1])  # 2 MB, which stays in the cache

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
    """A row to ask the model for: the first `cut` tokens are those of row `row`, the rest comes from elsewhere in the text."""
    row: int
    cut: int
    tokens: np.ndarray                                                          # int32 [T]


def splice(inputs: np.ndarray, row: int, rng: np.random.Generator) -> Question:
    """Make a probe: a row that continues, from a random position, with other text.

    The other text follows the same two tokens (else one, else none), so that the splice looks natural but the next token differs.
    A model that looks ahead then gives other probabilities before the splice. inputs: int32 [rows, T].
    """
    flat, seq_len = inputs.reshape(-1), inputs.shape[1]
    cut = int(rng.integers(1, seq_len))
    at = row * seq_len + cut                                                    # the first token that differs
    for same in (2, 1, 0):
        fits = flat[2:] != flat[at]
        for back in range(1, same + 1):
            fits &= flat[2 - back : -back] == flat[at - back]
        if fits.any():
            place = int(rng.choice(np.flatnonzero(fits))) + 2
            rest = np.take(flat, range(place, place + seq_len - cut), mode="wrap")
            return Question(row, cut, np.concatenate([inputs[row, :cut], rest]))
    return Question(row, seq_len, inputs[row])


def bits_per_byte(ask: Callable, inputs: np.ndarray, targets: np.ndarray, scored: np.ndarray, total_bytes: int,
                  verify: bool = False) -> float:
    """Probe the model and return its score: -log2 p summed over all scored tokens, divided by `total_bytes`.

    inputs, targets: int32 [rows, T]. scored: bool [rows, T], the targets that count.
    ask(questions, ids): starts a new process of the model and returns log probabilities, float64 [questions, T, K] in nats, at
    `ids`, int32 [rows, T, K].
    verify: probe every row, in as many processes as VERIFY_POSITIONS asks for; else some rows in two.
    Each row is scored in one process and probed in others, in random order. No process sees the beginning of a row twice, so that
    none can recognise a probe or answer it from memory.
    Errors: HarnessError("violation") if a probe fails; the message begins with non_causal, cross_row or stateful. And `ask`'s.
    """
    rows, seq_len = inputs.shape
    rng = np.random.default_rng()  # unseeded: different probes every time
    few = PROBE_ROWS + rows // 8
    asked = min(rows, (rows + few) / 2)                                         # of one process, always: none can tell `verify`
    servers = min(VERIFY_SERVERS, math.ceil((rows + max(rows, VERIFY_POSITIONS)) / asked)) if verify else 2
    scores = rng.permutation(rows) % servers                                    # [rows]: the process that scores the row
    ids = np.stack([targets, *rng.integers(0, int(inputs.max()) + 1, (2, rows, seq_len))], axis=-1).astype(np.int32)
    n_probes = max(rows, int(servers * asked) - rows) if verify else few
    order = np.concatenate([rng.permutation(rows) for _ in range(servers - 1)])[:n_probes]
    places = [(int(row), int(scores[row] + 1 + i // rows) % servers) for i, row in enumerate(order)]  # a row: each time another
    probes = [(which, splice(inputs, row, rng)) for row, which in places]
    for i, (_, probe) in enumerate(probes):
        if probe.cut == seq_len or (not verify and i % 4 == 0):  # the unchanged row, among other rows
            probe.cut, probe.tokens = seq_len, inputs[probe.row]
        else:  # a model that looks ahead would also raise the probe's next token
            ids[probe.row, probe.cut - 1, 1] = probe.tokens[probe.cut]

    nats, plain, changed = np.zeros(rows), {}, {}                               # plain: {row: answer}; changed: {probe: answer}
    for which in range(servers):
        questions = [(None, Question(int(row), seq_len, inputs[row])) for row in np.flatnonzero(scores == which)]
        questions += [(i, probe) for i, (where, probe) in enumerate(probes) if where == which]
        rng.shuffle(questions)
        for (i, question), values in zip(questions, ask([q for _, q in questions], ids), strict=True):
            if i is None:
                nats[question.row] = -math.fsum(values[scored[question.row], 0])
                plain[question.row] = values
            else:
                changed[i] = values

    moved = [plain[probe.row][: probe.cut] - changed[i][: probe.cut] for i, (_, probe) in enumerate(probes)]  # [cut, K] each
    ahead = np.array([m[-1, 0] for m, (_, probe) in zip(moved, probes, strict=True) if probe.cut < seq_len] or [0.0])
    noise = math.sqrt(np.mean(np.concatenate([m[:-1] for m in moved]) ** 2))
    worst = max(range(len(probes)), key=lambda i: np.abs(moved[i]).max())
    if noise > PROBE_NOISE or np.abs(moved[worst]).max() > PROBE_TOLERANCE:
        raise HarnessError("violation", diagnose(ask, probes[worst][1], inputs, ids))
    if ahead.mean() > PROBE_LEAK + 4 * noise / math.sqrt(len(ahead)):
        raise HarnessError("violation", f"non_causal: the true next token gains {ahead.mean():.4f} nats where the input contains "
                           f"it, expected at most {PROBE_LEAK}")
    return math.fsum(nats) / math.log(2) / total_bytes


def diagnose(ask: Callable, probe: Question, inputs: np.ndarray, ids: np.ndarray) -> str:
    """Name the cause of a failed probe. Each comparison asks a new process, which has no memory of earlier requests."""
    def once(*rows: np.ndarray) -> np.ndarray:
        return ask([Question(probe.row, probe.cut, tokens) for tokens in rows], ids)[-1]  # [T, K] of the last row

    def differ(a: np.ndarray, b: np.ndarray) -> bool:
        return np.abs(a - b).max() > PROBE_TOLERANCE or math.sqrt(np.mean((a - b) ** 2)) > PROBE_NOISE
    row, cut = inputs[probe.row], probe.cut
    alone = once(row)
    if differ(alone, once(row)):
        return "stateful: two new processes gave different probabilities for the same tokens"
    if differ(alone, once(*np.roll(inputs, -probe.row, axis=0)[1:16], row)):
        return "cross_row: the probabilities of a row depend on the other rows of its batch"
    if differ(alone[:cut], once(probe.tokens)[:cut]):
        return f"non_causal: probabilities before position {cut} depend on the tokens from there on"
    return "stateful: the probabilities depend on earlier requests"
