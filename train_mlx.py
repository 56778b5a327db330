"""
A small GPT, trained on one device for a fixed budget, on MLX. This is the file that the agent edits.

    python prepare_mlx.py && python train_mlx.py

The model is autoresearch's (nanochat's) GPT with hashed n-gram embeddings; the optimizer is Muon for matrices, AdamW for the
rest, and Adagrad by the row for n-grams. With NGRAM_BUCKETS = (),
WINDOW_PATTERN = "SSSL", SOFTCAP = 15, DROPOUT = (0.0,) and POLAR_STEPS = 5 it is upstream's published model and optimizer,
operation by operation. docs/recipe.md has what was measured for the constants.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, repeat
from pathlib import Path

from prepare_mlx import (
    HarnessError,
    Progress,
    check_memory,
    check_weights,
    detect_preset,
    expected_epochs,
    find_tier,
    load_fast_blas,
    peak_flops,
    start_run,
)

load_fast_blas(threads=1)  # has to come before MLX; the cores are for LANES

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

GPU = mx.default_device() == mx.Device(mx.gpu)
TIER = find_tier(detect_preset() if GPU else "cpu")  # cpu, mac (8-24 GB), mac-max (36 GB and up), cuda; see $AUTORESEARCH_TIER
# Streams that work at once. On the CPU one thread does all that is no matrix product, so up to four cores have a stream each, with
# passes of a step and a part of the update of its own; a GPU has one.
LANES = [mx.default_stream(mx.default_device())]
if not GPU:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    LANES = [mx.new_stream(mx.cpu) for _ in range(min(4, cores))]
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")  # or MLX would hand out one pass whole before the next
    mx.disable_compile()  # on the CPU it gains a tenth at best, and needs a C++ compiler for half a minute

# ---------------------------------------------------------------------------------------------------------------------
# Constants: edit these first
# ---------------------------------------------------------------------------------------------------------------------

# Model: DEPTH is the one dial, width, heads and batch follow; each of them can be set by itself, too
DEPTH = {"cpu": 2, "mac": 3, "mac-max": 4, "cuda": 8}[TIER]  # transformer layers
HEAD_DIM = {"cpu": 32, "mac": 128, "mac-max": 128, "cuda": 128}[TIER]  # channels of an attention head; 64 and 128 are fused
WIDTH = (64 * DEPTH + HEAD_DIM - 1) // HEAD_DIM * HEAD_DIM  # channels of the residual stream: 64 a layer, in whole heads
WINDOW_PATTERN = "L"  # a letter a layer, repeated: L sees all tokens, S half of them; the last layer is always L
SEQ_LEN = {"cpu": 128, "mac": 512, "mac-max": 1024, "cuda": 2048}[TIER]  # tokens in a training row, at most the data's
NGRAM_BUCKETS = {"cpu": (65536, 262144), "mac": (65536, 131072, 131072), "mac-max": (65536, 131072, 131072),
                 "cuda": (65536, 131072, 131072)}[TIER]  # rows of the hashed 2-, 3-, 4-gram tables: look-ups, no FLOPs
NGRAM_OWN = 7  # tokens, more than an n-gram's, whose hash says which of an n-gram's two rows a place in the text trains
SOFTCAP = {"cpu": 0, "mac": 15.0, "mac-max": 15.0, "cuda": 15.0}[TIER]  # logits within +-SOFTCAP; 0: off, it costs time on a CPU
ROPE_BASE = 10_000  # slowest rotation of the positions

# Optimization
BATCH_TOKENS = {"cpu": 512, "mac": 3072, "mac-max": 4096, "cuda": 2**15}[TIER] * DEPTH  # tokens an optimizer step
MICRO_TOKENS = 2**16  # tokens a forward and backward pass, at most: memory's limit, and what keeps a large GPU busy
LOSS_TOKENS = 2**13  # tokens whose logits exist at once, at most; more are worked off in chunks
EMBEDDING_LR = 0.4  # token and value embeddings (AdamW), at width 768; scaled by (width / 768) ** -0.5
NGRAM_LR = 1.5  # n-gram tables (Adagrad by the row): a row's first step, where a token embedding's channels are about 1
UNEMBEDDING_LR = 0.004  # lm_head (AdamW), scaled in the same way
MATRIX_LR = 0.02  # matrices of the blocks (Muon)
SCALAR_LR = 0.3  # x0_lambdas (AdamW); resid_lambdas get a hundredth
WEIGHT_DECAY = 0.15  # of the matrices where the update agrees (cautious), falls to 0 over the run
ADAM_BETAS = (0.8, 0.95)  # AdamW: decay of the mean, of the mean square
MUON_MOMENTUM = (0.85, 0.95, 200)  # from, to, over so many steps
POLAR_STEPS = {"cpu": 4, "mac": 5, "mac-max": 5, "cuda": 5}[TIER]  # iterations of its orthogonalization, 5 at most
MUON_BETA2 = 0.95  # decay of the rows' mean square (NorMuon)
WARMUP_RATIO = 0.0  # share of the budget in which the learning rate rises
WARMDOWN_RATIO = 0.7  # share of the budget in which it falls
FINAL_LR_FRAC = 0.05  # of the initial rate, at the end
DROPOUT = (0.1, 0.2, 0.3)  # share of channels hidden at both ends of the blocks at the text's second reading, its third, and later
ABORT_LOSS = 3.0  # nats of the mean loss above ln(vocabulary), what knowing nothing gives; beyond it a run ends

DTYPE = mx.bfloat16 if GPU else mx.float32  # of activations; master weights are fp32. The CPU backend is slow in bf16
EPS = 1.1920929e-07  # of every norm, fp32's epsilon, as upstream has it
VE_GATE_CHANNELS = 32  # channels that decide how much of a value embedding a head takes
NGRAMS = "ngrams.weight"  # name of the n-gram tables among the weights

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    vocab_size: int
    seq_len: int
    n_layer: int = DEPTH
    n_head: int = max(1, WIDTH // HEAD_DIM)
    n_embd: int = WIDTH
    window_pattern: str = WINDOW_PATTERN
    ngram_buckets: tuple = NGRAM_BUCKETS
    softcap: float = SOFTCAP
    rope_base: float = ROPE_BASE


def norm(x):
    return mx.fast.rms_norm(x, None, EPS)


def dropout(x, share):
    """x with that share of its elements 0 and the others as much larger; None: x."""
    return x if share is None else x * (mx.random.bernoulli(1 - share, x.shape) / (1 - share)).astype(x.dtype)


def has_ve(layer, n_layer):
    """Value embeddings stand on every second layer, the last one included."""
    return layer % 2 == (n_layer - 1) % 2


@mx.custom_function
def exp(x):
    """e**x for fp32 x, held within +-87, for the CPU, where mx.exp takes three times as long: 2**whole * 2**rest, the whole into
    the exponent's bits, the rest by Taylor's series."""
    x = mx.clip(x, -87, 87) * math.log2(math.e)                                 # of what 2 is raised to
    whole = (x + 127.5).astype(mx.int32)                                        # rounded, plus fp32's bias of 127
    rest, out = x - (whole - 127).astype(mx.float32), 0.0                       # rest: -0.5 to 0.5
    for n in range(6, -1, -1):
        out = out * rest + math.log(2) ** n / math.factorial(n)
    return out * (whole << 23).view(mx.float32)


@exp.vjp
def exp_vjp(x, cotangent, out):
    return cotangent * out


def attend(q, k, v, window):
    """Causal attention: q, k, v [B, H, T, D]; token t sees the tokens t-window..t.

    On a GPU a full layer is one call without an array mask, so that Metal's fused backward applies; a windowed layer is a causal
    part, then bands: queries in chunks against the keys they can see. On a CPU the softmax is by hand, band by band, and no
    maximum is taken off: queries and keys are normed, so that exp can't overflow.
    """
    T, scale, parts = q.shape[2], q.shape[3] ** -0.5, []
    starts = [0, *range(window, T, max(1, -(-(T - window) // 3)))] if GPU else range(0, T, 64)
    for start, stop in pairwise([*starts, T]):
        first = max(0, start - window)
        queries, keys, values = q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop]
        t, key = mx.arange(start, stop)[:, None], mx.arange(first, stop)
        seen = (key <= t) & (key >= t - window)                                 # [queries, keys]
        if GPU:
            mask = "causal" if stop <= window + 1 else seen
            parts.append(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask))
        else:
            weights = exp((queries * scale @ keys.swapaxes(2, 3)).astype(mx.float32)) * seen  # [B, H, queries, keys]
            parts.append((weights @ values / weights.sum(axis=-1, keepdims=True)).astype(q.dtype))
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def ngram_rows(tokens, buckets):
    """Rows of the 2-gram, 3-gram, ... tables, which lie one below the other, by a hash: int [B, T] -> uint32 [2, n, B, T].

    Each n-gram has two rows: first the one that this place in the text trains, by what stood further back, then the other.
    """
    def mixed(code):
        code = code * 1_640_531_527                                             # wraps around at 2^32, as a hash may
        return code ^ (code >> 15)

    code = earlier = tokens.astype(mx.uint32)
    codes, rows, offset = [], [], 0
    for _ in range(max(NGRAM_OWN - 1, len(buckets))):
        earlier = mx.pad(earlier[:, :-1], [(0, 0), (1, 0)])                     # [B, T]: one token further back
        code = code * 1_000_003 + earlier + 1
        codes.append(code)
    own = mixed(code) & 1                                                       # [B, T]
    own = mx.stack([own, 1 - own])                                              # [2, B, T]
    for size, code in zip(buckets, codes, strict=False):
        rows.append(offset + mixed(2 * code + own) % size)
        offset += size
    return mx.stack(rows, axis=1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.c_q = nn.Linear(C, C, bias=False)
        self.c_k = nn.Linear(C, C, bias=False)
        self.c_v = nn.Linear(C, C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        if has_ve(layer, config.n_layer):
            self.ve_gate = nn.Linear(min(VE_GATE_CHANNELS, C), config.n_head, bias=False)
        self._rope_base = config.rope_base

    def __call__(self, x, ve, window):                                          # x [B, T, C], ve [B, T, C] or None
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = (c(x).reshape(B, T, H, D) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:  # value residual (ResFormer), gated per head by the first channels
            gate = 2 * mx.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))      # [B, T, H]
            v = v + gate[..., None] * ve.reshape(B, T, H, D)
        q, k, v = (t.transpose(0, 2, 1, 3) for t in (q, k, v))                  # [B, H, T, D]
        # scale=-1: upstream rotates by -position
        q, k = (norm(mx.fast.rope(t, D, traditional=False, base=self._rope_base, scale=-1.0, offset=0)) for t in (q, k))
        y = attend(q, k, v, window).transpose(0, 2, 1, 3).reshape(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def __call__(self, x):
        return self.c_proj(mx.square(mx.maximum(self.c_fc(x), 0)))              # relu²


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def __call__(self, x, ve, window):
        x = x + self.attn(norm(x), ve, window)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        self.wte = nn.Embedding(V, C)
        if config.ngram_buckets:
            self.ngrams = nn.Embedding(sum(config.ngram_buckets), C)  # the tables one below the other: one look-up
        self.value_embeds = [nn.Embedding(V, C) for i in range(L) if has_ve(i, L)]
        self.blocks = [Block(config, i) for i in range(L)]
        self.lm_head = nn.Linear(C, V, bias=False)
        self.resid_lambdas = mx.ones(L)
        self.x0_lambdas = mx.zeros(L)
        half = config.seq_len // 2
        letters = [config.window_pattern[i % len(config.window_pattern)] for i in range(L - 1)] + ["L"]
        self._windows = [config.seq_len if letter == "L" else half for letter in letters]

    def init_weights(self, seed):
        """Upstream's: matrices uniform with the spread of 1/sqrt(width), output projections and gates 0, n-grams 0."""
        key = mx.random.key(seed)
        s = 3**0.5 * self.config.n_embd**-0.5
        params = []
        for name, p in tree_flatten(self.parameters()):
            key, sub = mx.random.split(key)
            if name == "wte.weight":
                p = mx.random.normal(p.shape, key=sub)
            elif name == "lm_head.weight":
                p = 0.001 * mx.random.normal(p.shape, key=sub)
            elif name == "x0_lambdas":
                p = mx.full(p.shape, 0.1)
            elif name == NGRAMS or name.endswith(("c_proj.weight", "ve_gate.weight")):
                p = mx.zeros(p.shape)
            elif name != "resid_lambdas":
                p = mx.random.uniform(-s, s, p.shape, key=sub)
            params.append((name, p))
        self.update(tree_unflatten(params))

    def embed_ngrams(self, tokens, table, again=False):
        """Sum of the hashed n-gram embeddings, from table [R, C]: int [B, T] -> fp32 [B, T, C]; and the rows to train, [n, B, T].

        again: of text that was read before its own rows know what comes; so the sum is of the others, and None is trained.
        """
        rows = ngram_rows(tokens, self.config.ngram_buckets)                    # [2, n, B, T]
        seen = rows[1] if again else rows.reshape(-1, *tokens.shape)            # [n or 2n, B, T]
        return table[seen].astype(mx.float32).sum(axis=0), None if again else rows[0]

    def features(self, tokens, ngrams=None, hidden=None):
        """What lm_head reads: int [B, T] -> [B, T, C] in DTYPE. A step hands in ngrams [B, T, C] and hidden, dropout's share."""
        if ngrams is None and self.config.ngram_buckets:
            ngrams, _ = self.embed_ngrams(tokens, self.ngrams.weight)           # [B, T, C]
        x = self.wte(tokens) if ngrams is None else self.wte(tokens) + ngrams   # [B, T, C]; tables are fp32
        x = x0 = dropout(norm(x.astype(DTYPE)), hidden)
        resid, skip = self.resid_lambdas.astype(x.dtype), self.x0_lambdas.astype(x.dtype)
        value_embeds = iter(self.value_embeds)
        for i, block in enumerate(self.blocks):
            ve = next(value_embeds)(tokens).astype(x.dtype) if has_ve(i, len(self.blocks)) else None
            x = block(resid[i] * x + skip[i] * x0, ve, self._windows[i])
        return dropout(norm(x), hidden)

    def __call__(self, tokens):                                                 # int [B, T] -> fp32 logits [B, T, V]
        return head(self.features(tokens), self.lm_head.weight, self.config.softcap)

    def flops_per_token(self, seq_len):
        """Forward and backward: 6 a matrix weight, 12 a channel and visible token of attention (upstream's count)."""
        weights = sum(p.size for name, p in tree_flatten(self.parameters()) if is_matrix(name) or name == "lm_head.weight")
        return 6 * weights + sum(12 * self.config.n_embd * min(w, seq_len) for w in self._windows)


def tanh(x):
    return mx.tanh(x) if GPU else 1 - 2 / (exp(2 * x) + 1)


def head(x, weight, softcap):                                                   # x [..., C], weight [V, C] -> fp32 [..., V]
    logits = (x @ weight.T).astype(mx.float32)
    return softcap * tanh(logits / softcap) if softcap else logits


def cross_entropy(logits, targets):
    """Nats of every token: logits fp32 [N, V], targets int [N] -> fp32 [N]."""
    if GPU:
        return mx.fast.cross_entropy(logits, targets)
    # On the CPU exp over the logits is what costs: written out, the gradient takes it from the forward pass
    largest = mx.stop_gradient(logits.max(axis=-1, keepdims=True))              # [N, 1]
    total = exp(logits - largest).sum(axis=-1)                                  # [N]
    chosen = mx.take_along_axis(logits - largest, targets[:, None], axis=-1)    # [N, 1]
    return mx.log(total) - chosen[:, 0]


def head_loss(x, weight, targets, softcap):
    """Mean cross entropy in nats. x [B, T, C], lm_head's weight [V, C], targets int [B, T].

    Beyond LOSS_TOKENS it goes chunk by chunk, one after the other, each with its gradient at once, so that no logits are kept.
    """
    def total(x, weight, targets):
        return cross_entropy(head(x, weight, softcap), targets).sum()

    @mx.custom_function
    def in_turn(x, weight):
        loss, dx, dw = mx.array(0.0), [], mx.zeros(weight.shape, weight.dtype)
        for chunk, goals in zip(mx.split(x, cuts), mx.split(targets, cuts), strict=True):
            chunk, dw = mx.depends([chunk, dw], [loss])  # not before the chunk before is done
            one, (d_chunk, d_weight) = mx.value_and_grad(lambda x, w, goals=goals: total(x, w, goals), (0, 1))(chunk, weight)
            loss, dw = mx.depends([loss + one, dw + d_weight], [d_chunk])
            dx.append(d_chunk)
        return loss, mx.concatenate(dx), dw

    @in_turn.vjp
    def in_turn_vjp(primals, cotangents, outputs):
        return cotangents[0].astype(x.dtype) * outputs[1], cotangents[0].astype(weight.dtype) * outputs[2]

    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)                # [N, C], [N]
    cuts = list(range(LOSS_TOKENS, len(targets), LOSS_TOKENS))
    return (in_turn(x, weight)[0] if cuts else total(x, weight, targets)) / len(targets)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer: Muon for the matrices of the blocks, Adagrad for rows of n-grams, AdamW for the rest
# ---------------------------------------------------------------------------------------------------------------------

POLAR_EXPRESS = (  # (a, b, c) of five iterations X <- aX + (bA + cA²)X, A = XXᵀ; Amsel et al., arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def is_matrix(name):
    return name.startswith("blocks.")


def orthogonalize(g):
    """Nearest semi-orthogonal matrices, [n, rows, cols], by Polar Express; the norm is taken in fp32."""
    x = g.astype(DTYPE)
    x = x / (mx.sqrt(mx.sum(mx.square(g), axis=(1, 2), keepdims=True)) * 1.02 + 1e-6).astype(DTYPE)
    tall = g.shape[1] > g.shape[2]
    if tall:
        x = x.transpose(0, 2, 1)
    for a, b, c in POLAR_EXPRESS[:POLAR_STEPS]:
        A = x @ x.transpose(0, 2, 1)                                            # [n, short, short]
        x = a * x + (b * A + c * (A @ A)) @ x
    return (x.transpose(0, 2, 1) if tall else x).astype(mx.float32)


def muon(p, g, m, v, lr, momentum, weight_decay):
    """One Muon step on stacked matrices p, g, m [n, rows, cols]; v [n, rows, 1] or [n, 1, cols]. Returns p, m, v.

    Nesterov momentum, orthogonalisation, NorMuon's variance reduction (arXiv 2510.05491), cautious weight decay.
    """
    m = m + (1 - momentum) * (g - m)
    u = orthogonalize(g + momentum * (m - g))
    axis = 2 if p.shape[1] >= p.shape[2] else 1
    size = p.shape[axis]
    mean_square = mx.mean(mx.square(u), axis=axis, keepdims=True)
    norm_before = mx.sqrt(mx.sum(mean_square, axis=(1, 2), keepdims=True) * size)
    v = v + (1 - MUON_BETA2) * (mean_square - v)
    scale = mx.rsqrt(mx.maximum(v, 1e-10))
    norm_after = mx.sqrt(mx.sum(mean_square * size * mx.square(scale), axis=(1, 2), keepdims=True))
    u = u * scale * (norm_before / mx.maximum(norm_after, 1e-10))
    lr = lr * max(1.0, p.shape[1] / p.shape[2]) ** 0.5
    return p - lr * (u + weight_decay * p * (u * p >= 0)), m, v


def adamw(p, g, m, v, lr, betas, t):
    """One AdamW step without decay; t is the step's number, from 1. Returns p, m, v."""
    m = m + (1 - betas[0]) * (g - m)
    v = v + (1 - betas[1]) * (mx.square(g) - v)
    update = (m / (1 - betas[0] ** t)) / (mx.sqrt(v / (1 - betas[1] ** t)) + 1e-10)
    return p - lr * update, m, v


def adagrad_rows(table, v, rows, g, lr):
    """One Adagrad step of the rows that a batch looked up; no other row is touched or costs time. Returns table, v.

    table [R, C]; v [R], the sum of a row's mean squared gradients (Duchi et al., 2011; one number a row as in Gupta et al.,
    arXiv 1705.06066); rows [n, ...]; g [..., C], the gradient of the sum of n rows, the same for each of them.
    """
    v = v.at[rows].add(mx.mean(mx.square(g), axis=-1))
    scale = lr * mx.rsqrt(v[rows] + 1e-20)                                      # [n, ...]
    return table.at[rows].add(-scale[..., None] * g), v


def adam_group(name, width):
    """Learning rate and betas of a parameter that AdamW trains."""
    scale = (width / 768) ** -0.5  # tuned at width 768
    if name == "lm_head.weight":
        return UNEMBEDDING_LR * scale, ADAM_BETAS
    if name == "resid_lambdas":
        return SCALAR_LR * 0.01, ADAM_BETAS
    if name == "x0_lambdas":
        return SCALAR_LR, (0.96, 0.95)
    return EMBEDDING_LR * scale, ADAM_BETAS


def matrix_groups(params):
    """Of every batched Muon step: key of its moments, lane, names of its matrices, which have one shape; dealt to the lanes."""
    shapes = {}
    for name, p in params.items():
        if is_matrix(name):
            shapes.setdefault(p.shape, []).append(name)
    for (rows, cols), names in shapes.items():
        for lane in range(min(len(LANES), len(names))):
            yield f"muon.{rows}x{cols}.{lane}", lane, names[lane :: len(LANES)]


def init_optimizer(params):
    """Moments for {name: array}: a pair a shape for Muon, a number a row for Adagrad, a pair a parameter for AdamW."""
    state = {n: (mx.zeros(p.shape), mx.zeros(p.shape)) for n, p in params.items() if not is_matrix(n) and n != NGRAMS}
    if NGRAMS in params:
        state[NGRAMS] = (mx.zeros(len(params[NGRAMS])),)
    for key, _, names in matrix_groups(params):
        n, (rows, cols) = len(names), params[names[0]].shape
        state[key] = mx.zeros((n, rows, cols)), mx.zeros((n, rows, 1) if rows >= cols else (n, 1, cols))
    return state


def update(params, grads, state, rates, width, rows=None):
    """One optimizer step over {name: array}. rates: an array that schedule() made.

    The gradient at NGRAMS is [B, T, C], that of the looked-up rows [n, B, T]; without one the tables stay.
    """
    lr, momentum, weight_decay, t = (rates[i] for i in range(4))
    new, moments = dict(params), dict(state)
    for key, lane, names in matrix_groups(params):
        with mx.stream(LANES[lane]):
            p, g = (mx.stack([tree[n] for n in names]) for tree in (params, grads))  # [n, rows, cols]
            p, *moments[key] = muon(p, g, *state[key], lr * MATRIX_LR, momentum, weight_decay)
            new |= dict(zip(names, p, strict=True))
    if NGRAMS in grads:
        new[NGRAMS], *moments[NGRAMS] = adagrad_rows(params[NGRAMS], *state[NGRAMS], rows, grads[NGRAMS], lr * NGRAM_LR)
    for name, p in params.items():
        if not is_matrix(name) and name != NGRAMS:
            rate, betas = adam_group(name, width)
            new[name], *moments[name] = adamw(p, grads[name], *state[name], lr * rate, betas, t)
    return new, {key: tuple(m) for key, m in moments.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------------------------------------------------


def schedule(progress, step, reading=0):
    """Learning-rate factor, Muon momentum, weight decay, step from 1, and dropout where the text was read so often before; as one
    array, fp32 [5]: a number would be traced anew."""
    progress = min(progress, 1.0)
    if progress < WARMUP_RATIO:
        lr = progress / WARMUP_RATIO
    elif progress < 1 - WARMDOWN_RATIO:
        lr = 1.0
    else:
        left = (1 - progress) / WARMDOWN_RATIO
        lr = left + (1 - left) * FINAL_LR_FRAC
    first, last, steps = MUON_MOMENTUM
    risen = min(step / steps, 1)
    return mx.array([lr, (1 - risen) * first + risen * last, WEIGHT_DECAY * (1 - progress), step + 1.0,
                     (0.0, *DROPOUT)[min(reading, len(DROPOUT))]])


# ---------------------------------------------------------------------------------------------------------------------
# Step: gradients and update, compiled on a GPU; weights go in and come out
# ---------------------------------------------------------------------------------------------------------------------


def make_gradients(model, again=False):
    """Returns gradients(params, rates, x, y) -> loss, {name: gradient}, rows of n-grams, for int x and y [B, T].

    again: of text that was read before. There is dropout, and of an n-gram the row is seen that this place didn't train.
    """
    def loss_fn(params, x, y, hidden, ngrams):                                  # ngrams [B, T, C] or None
        cast = {n: p.astype(DTYPE) if is_matrix(n) or n == "lm_head.weight" else p for n, p in params.items()}
        model.update(tree_unflatten(list(cast.items())))
        return head_loss(model.features(x, ngrams, hidden), cast["lm_head.weight"], y, model.config.softcap)

    def gradients(params, rates, x, y):
        dense, hidden = {n: p for n, p in params.items() if n != NGRAMS}, rates[4] if again else None
        ngrams, rows = model.embed_ngrams(x, params[NGRAMS], again) if NGRAMS in params else (None, None)
        if rows is None:
            return *mx.value_and_grad(loss_fn)(dense, x, y, hidden, ngrams), None
        loss, (grads, of_sum) = mx.value_and_grad(loss_fn, (0, 4))(dense, x, y, hidden, ngrams)  # a table's would be as large as it
        return loss, grads | {NGRAMS: of_sum}, rows

    return gradients


def make_step(model, width, accumulate, again=False):
    """Returns step(params, state, rates, batches) -> params, state, loss for {name: array} trees in fp32."""
    gradients = make_gradients(model, again)
    with_random = partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)

    @with_random
    def whole(params, state, rates, x, y):
        loss, grads, rows = gradients(params, rates, x, y)
        return *update(params, grads, state, rates, width, rows), loss

    @with_random
    def micro(params, rates, total, total_loss, x, y):
        loss, grads, rows = gradients(params, rates, x, y)
        grads = {n: g / accumulate for n, g in grads.items()}
        found = [rows, grads.pop(NGRAMS)] if rows is not None else []
        return tree_map(lambda a, b: a + b, total, grads), total_loss + loss / accumulate, found

    @mx.compile
    def apply(params, total, found, state, rates):
        rows, grads = None, total
        if found[0]:  # the passes' rows side by side, as one large batch has them
            rows = mx.concatenate([one[0] for one in found], axis=1)            # [n, accumulate * B, T]
            grads = total | {NGRAMS: mx.concatenate([one[1] for one in found])}
        return update(params, grads, state, rates, width, rows)

    def step(params, state, rates, batches):
        if accumulate == 1:
            return whole(params, state, rates, *map(mx.array, next(batches)))
        total, loss, found = {n: mx.zeros(p.shape) for n, p in params.items() if n != NGRAMS}, mx.array(0.0), []
        for i in range(accumulate):
            with mx.stream(LANES[i % len(LANES)]):
                total, loss, rows_and_grads = micro(params, rates, total, loss, *map(mx.array, next(batches)))
            found.append(rows_and_grads)
            if i % len(LANES) == len(LANES) - 1:  # a pass on every lane
                mx.async_eval(total, loss, found)
        return *apply(params, total, found, state, rates), loss

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Loop
# ---------------------------------------------------------------------------------------------------------------------


def large_product():
    """A large matrix product on every lane, as a callable that does it once, and its FLOPs: what MFU and drift are told by."""
    n = 4096 if GPU else 1024
    a = mx.random.normal((n, n)).astype(DTYPE)
    return lambda: mx.eval([mx.matmul(a, a, stream=lane) for lane in LANES]), 2 * n**3 * len(LANES)


def memory_limit():
    """Bytes that arrays may take on this device, None where it doesn't say."""
    info = mx.device_info()
    return info.get("max_recommended_working_set_size") or info.get("total_memory") or (
        None if GPU else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def device_name():
    info = mx.device_info()
    return f"{info.get('device_name', 'cpu')} mlx".replace("/", " ")[:80]


def keep_within(limit):
    """Metal's limits: what stays resident, all of it would starve the rest of a 16 GB Mac; and what MLX keeps of freed buffers,
    which would push it into swap."""
    if mx.metal.is_available():
        mx.set_wired_limit(limit // 2)
        mx.set_cache_limit(limit // 4)


def held_bytes(depth, vocab_size):
    """Bytes of the weights and moments of a model of another depth, as wide in proportion; arrays are lazy, none is made."""
    width = WIDTH if depth == DEPTH else -(-WIDTH * depth // (DEPTH * HEAD_DIM)) * HEAD_DIM
    params = dict(tree_flatten(GPT(GPTConfig(vocab_size, SEQ_LEN, depth, width // HEAD_DIM or 1, width)).parameters()))
    return sum(a.nbytes for _, a in tree_flatten((params, init_optimizer(params))))


def dummy_step(params, state, step_fn, rows, seq_len):
    """Seconds of a step on dummy data, by passes of so many rows. It works on copies, as a step may overwrite what it gets."""
    copies = tree_map(lambda a: a + 0, (params, state))
    mx.eval(copies)
    x = np.zeros((rows, seq_len), np.int32)
    start = time.perf_counter()
    result = step_fn(*copies, schedule(0, 0), repeat((x, x)))
    del copies
    mx.eval(result)
    return time.perf_counter() - start


def expected_memory(model, params, state, step_fn, rows, seq_len, passes):
    """Peak bytes of a step of so many rows, by the passes it is cut into: from gradients of an eighth and a quarter of a pass,
    on every lane at once, and a whole step with one row in each.

    Measured on the model as it stands, so that it holds for whatever was edited; gradients grow by the row, the update doesn't.
    """
    gradients = mx.compile(lambda params, x: make_gradients(model)(params, None, x, x)[:2])

    def gradients_at_once(n):
        found = []
        for lane in LANES[:passes]:
            with mx.stream(lane):
                found.append(gradients(params, mx.zeros((n, seq_len), mx.int32)))
        return found

    def peak(work, n):
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(work(n))
        return mx.get_peak_memory()

    few, more = max(1, rows // passes // 8), max(2, rows // passes // 4)
    low, high = (peak(gradients_at_once, n) for n in (few, more))
    held, of_table = sum(a.nbytes for _, a in tree_flatten((params, state))), params[NGRAMS].nbytes if NGRAMS in params else 0
    floor = peak(lambda n: dummy_step(params, state, step_fn, n, seq_len), 1) - held  # a dummy step's copies
    floor = max(floor, held + of_table // 2)                                    # saving makes a bfloat16 table
    a_row = (high - low) / (more - few)
    kept = len(LANES[:passes]) * sum(p.nbytes for name, p in params.items() if name != NGRAMS)  # sums of gradients, fp32
    kept += 4 * rows * seq_len * model.config.n_embd * (NGRAMS in params)                       # every pass's, of n-grams
    return lambda n: max(floor, high + a_row * (rows // n - more) + (kept if n > 1 else 0))


def build(run, accumulate):
    """A fresh model, its weights and moments as {name: array}, and its steps: of a first reading of the text, of later ones."""
    model = GPT(GPTConfig(vocab_size=run.vocab_size, seq_len=run.seq_len))
    model.init_weights(run.seed)
    mx.random.seed(run.seed)
    params = dict(tree_flatten(model.parameters()))
    state = init_optimizer(params)
    mx.eval(params, state)
    if NGRAMS in params:
        model.ngrams.weight = mx.zeros((0,))  # the table is in params; held here, too, its first version would stay in memory
    return model, params, state, [make_step(model, model.config.n_embd, accumulate, again) for again in (False, True)]


def train(run):
    """Train until the budget is used, then save. Returns what train.json records."""
    seq_len = min(SEQ_LEN, run.seq_len)
    rows = max(1, BATCH_TOKENS // seq_len)
    least = max(len(LANES), math.ceil(rows * seq_len / MICRO_TOKENS))
    passes = next((n for n in range(least, rows) if rows % n == 0), rows)  # forward and backward, of a step: of equal size
    a_pass, batch_tokens = rows // passes, rows * seq_len
    product, product_flops = large_product()
    peak_rate, gemm = peak_flops(device_name(), product, product_flops)
    limit = memory_limit()
    held = partial(held_bytes, vocab_size=run.vocab_size)
    check_weights(held, DEPTH, limit)
    keep_within(limit)

    model, params, state, step_fns = build(run, passes)
    expected = expected_memory(model, params, state, step_fns[0], rows, seq_len, passes)
    check_memory(expected, passes, a_pass, seq_len, limit, held, DEPTH)
    seconds = min(dummy_step(params, state, step_fns[0], a_pass, seq_len) for _ in range(4))  # the first may compile
    reads = expected_epochs(run.budget, seconds, batch_tokens, run.train_tokens)
    if reads > 0.8:
        dummy_step(params, state, step_fns[1], a_pass, seq_len)  # so that it compiles now
    config, num_params = model.config, sum(p.size for p in params.values())
    flops, expected_mb = model.flops_per_token(seq_len), expected(passes) / 2**20
    print(f"{TIER}: {device_name()}, matrix products at {gemm / 1e12:.2f} TFLOP/s; {num_params / 1e6:.2f} M parameters, depth "
          f"{config.n_layer}, width {config.n_embd}, n-gram tables {config.ngram_buckets}; {batch_tokens:,} tokens a step in rows "
          f"of {seq_len}, {flops / 1e6:.2f} MFLOPs a token; expected: to read the text {reads:.2g} times, {expected_mb:,.0f} MB at "
          "the peak", flush=True)
    mx.reset_peak_memory()

    batches = run.batches(a_pass, seq_len)
    step, pending = 0, None
    run.budget.start(product)
    meter = Progress(run, batch_tokens, flops, peak_rate, ABORT_LOSS)
    while (progress := run.budget.progress(step, step * batch_tokens)) < 1:
        reading = step * batch_tokens // run.train_tokens
        rates = schedule(progress, step, reading)
        params, state, loss = step_fns[reading > 0](params, state, rates, batches)
        mx.async_eval(params, state, loss)
        if pending is not None:  # the loss of the step before: reading this one's would idle the device
            meter.take(pending.item())
        pending, step = loss, step + 1
        meter.tell(rates[0].item, mx.get_peak_memory)
    mx.eval(params, state)
    training_seconds = run.budget.seconds
    if pending is None:
        raise HarnessError("timeout", "the budget was over before the first step; give it more")
    meter.take(pending.item())
    meter.tell(rates[0].item, mx.get_peak_memory)
    print()
    saved = {n: p.astype(mx.bfloat16) if n == NGRAMS else p for n, p in params.items()}  # half of what is most of the file
    mx.save_safetensors(str(run.dir / "weights.safetensors"), saved)
    (run.dir / "config.json").write_text(json.dumps(asdict(config)))
    tokens = step * batch_tokens
    return {"training_seconds": training_seconds, "num_steps": step, "total_tokens": tokens, "num_params": num_params,
            "depth": config.n_layer, "peak_vram_mb": mx.get_peak_memory() / 2**20, "expected_vram_mb": expected_mb,
            "mfu_percent": 100 * tokens * flops / training_seconds / peak_rate, "gemm_tflops": gemm / 1e12, "device": device_name()}


def load_model(run_dir):
    """The trained model as logits(tokens): int32 [B, T] numpy -> float32 [B, T, vocab] numpy. The scorer calls this."""
    run_dir = Path(run_dir)
    model = GPT(GPTConfig(**json.loads((run_dir / "config.json").read_text())))
    weights = mx.load(str(run_dir / "weights.safetensors"))
    model.update(tree_unflatten([(n, p.astype(DTYPE) if is_matrix(n) or n == "lm_head.weight" else p) for n, p in weights.items()]))
    forward = mx.compile(model.__call__)
    return lambda tokens: np.array(forward(mx.array(tokens)))


if __name__ == "__main__":
    with start_run(__file__) as run:
        run.finish(**train(run))
