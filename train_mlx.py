"""
Train a small GPT on one device for a fixed budget, with MLX. This is the file that the agent edits.

    python prepare_mlx.py && python train_mlx.py

The model is the GPT of karpathy/autoresearch (nanochat) plus hashed n-gram embeddings and attention gates. Muon trains the matrices
of the blocks, row-wise Adagrad the n-gram tables, AdamW everything else. docs/recipe.md says why, with figures.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

# On a GPU `async_eval`, `attention` and `cross_entropy` are MLX's own: mx.async_eval, mx.fast.scaled_dot_product_attention,
# mx.fast.cross_entropy. On a CPU they are faster replacements, and mx.compile is off. Import this module before MLX: on Linux it
# loads a fast BLAS.
from harness.mlx_cpu import GPU, async_eval, attention, cross_entropy
from prepare_mlx import (
    Progress,
    check_memory,
    check_weights,
    expected_epochs,
    extrapolate,
    find_dtype,
    find_tier,
    peak_flops,
    start_run,
)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

TIER = find_tier(None if GPU else "cpu")  # cpu, mac (8-32 GB), mac-max (36 GB and up), cuda; or $AUTORESEARCH_TIER


def device_name():
    return f"{mx.device_info().get('device_name', 'cpu')} mlx".replace("/", " ")[:80]


# ---------------------------------------------------------------------------------------------------------------------
# Constants: edit these first
# ---------------------------------------------------------------------------------------------------------------------

# Model. DEPTH is the one dial: width, heads and batch follow it, and each can be set by itself, too.
DEPTH = {"cpu": 2, "mac": 3, "mac-max": 4, "cuda": 8}[TIER]  # transformer layers
HEAD_DIM = {"cpu": 64, "mac": 128, "mac-max": 128, "cuda": 128}[TIER]  # channels of an attention head; Metal fuses 64 and 128
WIDTH = (64 * DEPTH + HEAD_DIM - 1) // HEAD_DIM * HEAD_DIM  # channels of the residual stream: 64 per layer, in whole heads
SEQ_LEN = {"cpu": 128, "mac": 512, "mac-max": 1024, "cuda": 2048}[TIER]  # tokens in a training row, at most the data's
NGRAM_BUCKETS = {"cpu": (131072, 524288), "mac": (65536, 262144), "mac-max": (65536, 262144),
                 "cuda": (65536, 262144)}[TIER]  # rows in the hash tables of 2-grams and 3-grams; look-ups cost no FLOPs
NGRAM_CONTEXT = 7  # tokens of context, hashed to choose which of an n-gram's two rows is trained; more than the longest n-gram
SOFTCAP = {"cpu": 0, "mac": 15.0, "mac-max": 15.0, "cuda": 15.0}[TIER]  # logits stay within +-SOFTCAP; 0: off
ROPE_BASE = 10_000  # base of the rotary position embedding

# Optimization
BATCH_TOKENS = {"cpu": 1024, "mac": 3072, "mac-max": 4096, "cuda": 2**15}[TIER] * DEPTH  # tokens per optimizer step
MICRO_TOKENS = {"cpu": 2**10, "mac": 2**14, "mac-max": 2**14, "cuda": 2**15}[TIER]  # tokens per pass; larger batches accumulate
EMBEDDING_LR = 0.4  # AdamW, token and value embeddings, at width 768; scaled by (width / 768) ** -0.5
UNEMBEDDING_LR = 0.004  # AdamW, lm_head, scaled in the same way
NGRAM_LR = 1.5  # Adagrad, n-gram tables: the size of a row's first step
MATRIX_LR = 0.02  # Muon, matrices of the blocks
SCALAR_LR = 0.3  # AdamW, x0_lambdas; resid_lambdas use a hundredth of it
WEIGHT_DECAY = 0.15  # Muon, cautious: only where it agrees with the update; falls to 0 over the run
ADAM_BETAS = (0.8, 0.95)  # AdamW: decay rates of the mean and of the mean square
MUON_MOMENTUM = (0.85, 0.95, 200)  # rises from the first value to the second over the first 200 steps
MUON_BETA2 = 0.95  # NorMuon: decay rate of the mean square of each row, or of each column of a wide matrix
NEWTON_SCHULZ_STEPS = 4  # iterations that orthogonalize Muon's update: 5 at most, and 4 score like 5
WARMUP_RATIO = 0.0  # share of the budget over which the learning rate rises from 0
WARMDOWN_RATIO = 0.7  # share of the budget over which it falls
FINAL_LR_FRAC = 0.05  # learning rate at the end, relative to the full one
DROPOUT = (0.0, 0.1, 0.2, 0.3)  # dropout rates in epochs 1, 2, 3 and later, at the input of the first block and of lm_head
ABORT_LOSS = 3.0  # stop when the mean loss is this many nats above ln(vocab_size), the loss of a uniform guess

DTYPE = getattr(mx, find_dtype(device_name())) if GPU else mx.float32  # of activations: bf16, unless another proved faster here
EPS = 1.1920929e-07  # of every norm: fp32's machine epsilon, as in PyTorch
GATE_CHANNELS = 32  # the gates of attention heads and value embeddings read this many channels
NGRAMS = "ngrams.weight"  # name of the n-gram tables among the weights
LOSS_SCALE = "loss_scale"  # name among the moments: in fp16 the loss is multiplied by it, or small gradients would be 0

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    vocab_size: int
    n_layer: int = DEPTH
    n_head: int = max(1, WIDTH // HEAD_DIM)
    n_embd: int = WIDTH
    ngram_buckets: tuple = NGRAM_BUCKETS
    softcap: float = SOFTCAP
    rope_base: float = ROPE_BASE


def norm(x):
    return mx.fast.rms_norm(x, None, EPS)                                       # RMSNorm without weights


def dropout(x, rate):
    """Inverted dropout: zero each element with probability `rate`, scale the rest by 1 / (1 - rate). A rate of None returns x
    unchanged."""
    return x if rate is None else x * (mx.random.bernoulli(1 - rate, x.shape) / (1 - rate)).astype(x.dtype)


def has_ve(layer, n_layer):
    """Every second layer has value embeddings, the last one included."""
    return layer % 2 == (n_layer - 1) % 2


def ngram_rows(tokens, buckets):
    """Hash the 2-gram, 3-gram, ... that ends at each token to rows of its table: int [B, T] -> uint32 [2, n, B, T].

    A table memorises a text that is read more than once, so each n-gram has two rows. In the first epoch a position reads both and
    trains one of them; in later epochs it reads only the other. A hash of the last NGRAM_CONTEXT tokens chooses the trained row,
    which comes first. The tables of all n are stacked in one array.
    """
    def mixed(code):
        code = code * 1_640_531_527                                             # wraps around at 2**32
        return code ^ (code >> 15)

    previous = tokens.astype(mx.uint32)                                         # [B, T]
    codes = [previous]
    for _ in range(max(NGRAM_CONTEXT - 1, len(buckets))):
        previous = mx.pad(previous[:, :-1], [(0, 0), (1, 0)])                   # one token further back, 0 before the row
        codes.append(codes[-1] * 1_000_003 + previous + 1)                      # code of the n-gram that is one token longer
    own = mixed(codes[-1]) & 1                                                  # [B, T]: is the trained row the first or second?
    choice, rows, offset = mx.stack([own, 1 - own]), [], 0                      # [2, B, T]: the trained row, then the other
    for size, code in zip(buckets, codes[1:], strict=False):                    # 2-grams, 3-grams, ...
        rows.append(offset + mixed(2 * code + choice) % size)
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
        self.out_gate = nn.Linear(min(GATE_CHANNELS, C), config.n_head, bias=False)
        if has_ve(layer, config.n_layer):
            self.ve_gate = nn.Linear(min(GATE_CHANNELS, C), config.n_head, bias=False)
        self._rope_base = config.rope_base

    def __call__(self, x, ve):                                                  # x [B, T, C], ve [B, T, C] or None
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = (c(x).reshape(B, T, H, D) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:  # value residual (ResFormer), gated per head by the first channels
            gate = 2 * mx.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))         # [B, T, H]
            v = v + gate[..., None] * ve.reshape(B, T, H, D)
        q, k, v = (t.transpose(0, 2, 1, 3) for t in (q, k, v))                  # [B, H, T, D]
        # scale=-1 rotates by -position, as upstream does, so that weights can be exchanged
        q, k = (norm(mx.fast.rope(t, D, traditional=False, base=self._rope_base, scale=-1.0, offset=0)) for t in (q, k))
        y = attention(q, k, v, scale=D**-0.5, mask="causal")  # a mask array would turn off Metal's fused backward pass
        gate = 2 * mx.sigmoid(self.out_gate(x[..., :GATE_CHANNELS]))            # [B, T, H]: a head can be silent
        return self.c_proj((y.transpose(0, 2, 1, 3) * gate[..., None]).reshape(B, T, C))


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

    def __call__(self, x, ve):
        x = x + self.attn(norm(x), ve)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        self.wte = nn.Embedding(V, C)
        if config.ngram_buckets:
            self.ngrams = nn.Embedding(sum(config.ngram_buckets), C)
        self.value_embeds = [nn.Embedding(V, C) for i in range(L) if has_ve(i, L)]
        self.blocks = [Block(config, i) for i in range(L)]
        self.lm_head = nn.Linear(C, V, bias=False)
        self.resid_lambdas = mx.ones(L)
        self.x0_lambdas = mx.zeros(L)

    def init_weights(self, seed):
        """As upstream: matrices uniform with standard deviation 1/sqrt(width); output projections, gates and n-gram tables 0."""
        key = mx.random.key(seed)
        s = 3**0.5 * self.config.n_embd**-0.5  # uniform(-s, s) has standard deviation 1 / sqrt(width)
        params = []
        for name, p in tree_flatten(self.parameters()):
            key, sub = mx.random.split(key)
            if name == "wte.weight":
                p = mx.random.normal(p.shape, key=sub)
            elif name == "lm_head.weight":
                p = 0.001 * mx.random.normal(p.shape, key=sub)
            elif name == "x0_lambdas":
                p = mx.full(p.shape, 0.1)
            elif name == NGRAMS or name.endswith(("c_proj.weight", "_gate.weight")):
                p = mx.zeros(p.shape)
            elif name != "resid_lambdas":
                p = mx.random.uniform(-s, s, p.shape, key=sub)
            params.append((name, p))
        self.update(tree_unflatten(params))

    def __call__(self, tokens, ngrams=None, dropout_rate=None):
        """Logits: int [B, T] -> fp32 [B, T, V]. A training step passes a dropout rate and the summed n-gram embeddings
        [B, T, C], because it needs the gradient of that sum."""
        if ngrams is None and self.config.ngram_buckets:
            rows = ngram_rows(tokens, self.config.ngram_buckets)                # [2, n, B, T]
            ngrams = self.ngrams(rows).astype(mx.float32).sum(axis=(0, 1))      # [B, T, C]; a saved table is bfloat16
        x = self.wte(tokens)                                                    # [B, T, C]; embedding tables are fp32
        x = x if ngrams is None else x + ngrams
        x = x0 = dropout(norm(x.astype(DTYPE)), dropout_rate)
        resid, skip = self.resid_lambdas.astype(x.dtype), self.x0_lambdas.astype(x.dtype)
        value_embeds = iter(self.value_embeds)
        for i, block in enumerate(self.blocks):
            ve = next(value_embeds)(tokens).astype(x.dtype) if has_ve(i, len(self.blocks)) else None
            x = block(resid[i] * x + skip[i] * x0, ve)
        logits = self.lm_head(dropout(norm(x), dropout_rate)).astype(mx.float32)  # [B, T, V]
        return self.config.softcap * mx.tanh(logits / self.config.softcap) if self.config.softcap else logits

    def flops_per_token(self, seq_len):
        """FLOPs per token of a forward and backward pass, as upstream counts: 6 per weight of a matrix product, and for attention
        12 per layer, channel and token of the row."""
        weights = sum(p.size for name, p in tree_flatten(self.parameters()) if is_matmul_weight(name))
        return 6 * weights + 12 * self.config.n_embd * seq_len * self.config.n_layer


def is_matrix(name):
    return name.startswith("blocks.")


def is_matmul_weight(name):
    """Whether a weight is multiplied in a matrix product: it is cast to DTYPE. Embedding tables are cast after the look-up."""
    return is_matrix(name) or name == "lm_head.weight"


def with_weights(model, params):
    """Put the weights {name: array} into the model, those of matrix products cast to DTYPE. Returns the model."""
    model.update(tree_unflatten([(n, p.astype(DTYPE) if is_matmul_weight(n) else p) for n, p in params.items()]))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer: Muon for the matrices of the blocks, row-wise Adagrad for the n-gram tables, AdamW for the rest
# ---------------------------------------------------------------------------------------------------------------------

POLAR_EXPRESS = (  # (a, b, c) of five Newton-Schulz steps X <- aX + (bA + cA²)X, A = XXᵀ; Amsel et al., arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g):
    """The nearest semi-orthogonal matrices, by Polar Express: [n, rows, cols] -> fp32 [n, rows, cols]."""
    size = mx.sqrt(mx.sum(mx.square(g), axis=(1, 2), keepdims=True))            # [n, 1, 1], Frobenius norm in fp32
    x = (g / (size * 1.02 + 1e-6)).astype(DTYPE)                                # 2 % smaller: a margin for rounding in bf16
    tall = g.shape[1] > g.shape[2]
    if tall:
        x = x.transpose(0, 2, 1)
    for a, b, c in POLAR_EXPRESS[:NEWTON_SCHULZ_STEPS]:
        A = x @ x.transpose(0, 2, 1)                                            # [n, short, short]
        x = a * x + (b * A + c * (A @ A)) @ x
    return (x.transpose(0, 2, 1) if tall else x).astype(mx.float32)


def muon(p, g, m, v, lr, momentum, weight_decay):
    """One Muon step on stacked matrices p, g, m [n, rows, cols]; v [n, rows, 1] or [n, 1, cols]. Returns p, m, v.

    Nesterov momentum, orthogonalization, NorMuon's variance reduction (arXiv 2510.05491), cautious weight decay.
    """
    m = m + (1 - momentum) * (g - m)
    u = orthogonalize(g + momentum * (m - g))
    axis = 2 if p.shape[1] >= p.shape[2] else 1
    size = p.shape[axis]
    mean_square = mx.mean(mx.square(u), axis=axis, keepdims=True)               # [n, rows, 1] or [n, 1, cols]
    norm_before = mx.sqrt(mx.sum(mean_square, axis=(1, 2), keepdims=True) * size)
    v = v + (1 - MUON_BETA2) * (mean_square - v)
    scale = mx.rsqrt(mx.maximum(v, 1e-10))
    norm_after = mx.sqrt(mx.sum(mean_square * size * mx.square(scale), axis=(1, 2), keepdims=True))
    u = u * scale * (norm_before / mx.maximum(norm_after, 1e-10))
    lr = lr * max(1.0, p.shape[1] / p.shape[2]) ** 0.5  # tall matrices take a larger step, as upstream
    return p - lr * (u + weight_decay * p * (u * p >= 0)), m, v


def adamw(p, g, m, v, lr, betas, t):
    """One AdamW step without decay; t counts steps from 1. Returns p, m, v."""
    m = m + (1 - betas[0]) * (g - m)
    v = v + (1 - betas[1]) * (mx.square(g) - v)
    direction = (m / (1 - betas[0] ** t)) / (mx.sqrt(v / (1 - betas[1] ** t)) + 1e-10)
    return p - lr * direction, m, v


def adagrad_rows(table, v, rows, g, lr):
    """One Adagrad step of the rows that a batch looked up; other rows are not touched and cost no time. Returns table, v.

    table [R, C]; v [R], per row the sum of mean squared gradients (Duchi et al., 2011; one number per row as in Gupta et al.,
    arXiv 1705.06066); rows [n, B, T]; g [B, T, C], the gradient of the sum of n rows and so of each of them.
    """
    v = v.at[rows].add(mx.mean(mx.square(g), axis=-1))
    scale = lr * mx.rsqrt(v[rows] + 1e-20)                                      # [n, B, T]
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
    """Group the matrices of the blocks by shape, {"muon.ROWSxCOLS": names}: each group is one batched Muon step."""
    groups = {}
    for name, p in params.items():
        if is_matrix(name):
            groups.setdefault(f"muon.{p.shape[0]}x{p.shape[1]}", []).append(name)
    return groups


def init_optimizer(params):
    """Zero moments for {name: array}: a pair per group for Muon, a number per row for Adagrad, a pair per parameter for AdamW."""
    moments = {n: (mx.zeros(p.shape), mx.zeros(p.shape)) for n, p in params.items() if not is_matrix(n) and n != NGRAMS}
    if NGRAMS in params:
        moments[NGRAMS] = (mx.zeros(len(params[NGRAMS])),)
    for key, names in matrix_groups(params).items():
        n, (rows, cols) = len(names), params[names[0]].shape
        moments[key] = mx.zeros((n, rows, cols)), mx.zeros((n, rows, 1) if rows >= cols else (n, 1, cols))
    if mx.float16 == DTYPE:
        moments[LOSS_SCALE] = (mx.array(2.0**13),)
    return moments


def update(params, grads, moments, rates, width, rows=None):
    """One optimizer step over {name: array}; returns new params and moments. rates: see `schedule`.

    grads[NGRAMS] [B, T, C] is the gradient of the summed n-gram embeddings; rows [n, B, T] are the table rows to train.
    """
    params, moments, lr = dict(params), dict(moments), rates["lr"]
    for key, names in matrix_groups(params).items():
        p, g = (mx.stack([tree[n] for n in names]) for tree in (params, grads))  # [n, rows, cols]
        p, *moments[key] = muon(p, g, *moments[key], lr * MATRIX_LR, rates["momentum"], rates["weight_decay"])
        params |= dict(zip(names, p, strict=True))
    for name, g in grads.items():
        if name == NGRAMS:
            params[name], *moments[name] = adagrad_rows(params[name], *moments[name], rows, g, lr * NGRAM_LR)
        elif not is_matrix(name):
            rate, betas = adam_group(name, width)
            params[name], *moments[name] = adamw(params[name], g, *moments[name], lr * rate, betas, rates["step"])
    return params, {key: tuple(m) for key, m in moments.items()}


def unless_overflow(grads, scale):
    """Loss scaling for fp16. Returns the gradients and the next loss scale. If a gradient is not finite, because the loss was
    scaled too much, all gradients are 0 and the scale is halved; otherwise it doubles in 200 steps."""
    finite = mx.all(mx.stack([mx.all(mx.isfinite(g)) for g in grads.values()]))
    grown = mx.minimum(scale * 2 ** (1 / 200), 2.0**24)
    return {n: mx.where(finite, g, 0) for n, g in grads.items()}, mx.where(finite, grown, scale / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------------------------------------------------


def schedule(progress, step, epoch=0):
    """What changes from step to step, by name. progress: used share of the budget, 0 to 1. step, epoch: counted from 0.

    "lr" is a factor on every learning rate. "first_epoch" exists only in the first epoch, "dropout" only while its rate is not 0:
    a missing name costs nothing, and mx.compile traces the step again when a name comes or goes. The values are 0-d fp32 arrays,
    because mx.compile would trace again for each new Python number.
    """
    progress = min(progress, 1.0)
    if progress < WARMUP_RATIO:
        lr = progress / WARMUP_RATIO
    elif progress < 1 - WARMDOWN_RATIO:
        lr = 1.0
    else:
        left = (1 - progress) / WARMDOWN_RATIO
        lr = left + (1 - left) * FINAL_LR_FRAC
    first, last, steps = MUON_MOMENTUM
    ramp = min(step / steps, 1)
    rates = {"lr": lr, "momentum": (1 - ramp) * first + ramp * last, "weight_decay": WEIGHT_DECAY * (1 - progress),
             "step": step + 1}
    if rate := DROPOUT[min(epoch, len(DROPOUT) - 1)]:
        rates["dropout"] = rate
    if epoch == 0:
        rates["first_epoch"] = 1
    return {name: mx.array(value, mx.float32) for name, value in rates.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Step: gradients of each micro-batch, then one update; mx.compile fuses both on a GPU
# ---------------------------------------------------------------------------------------------------------------------


def make_gradients(model):
    """Returns gradients(params, rates, x, y) -> loss, {name: gradient}, table rows to train or None, for int x and y [B, T].

    The gradient of a whole n-gram table would be as large as the table, so {NGRAMS: gradient} is that of the summed rows [B, T, C].
    """

    def loss_fn(dense, ngrams, rates, x, y):
        loss = mx.mean(cross_entropy(with_weights(model, dense)(x, ngrams, rates.get("dropout")), y))
        return loss * rates.get(LOSS_SCALE, 1)

    @partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)  # else each call would drop out the same elements
    def gradients(params, rates, x, y):
        dense, ngrams = {n: p for n, p in params.items() if n != NGRAMS}, None
        if NGRAMS in params:
            rows = ngram_rows(x, model.config.ngram_buckets)                    # [2, n, B, T]
            if "first_epoch" in rates:
                ngrams = params[NGRAMS][rows].sum(axis=(0, 1))                  # [B, T, C]
                loss, (grads, ngram_grad) = mx.value_and_grad(loss_fn, (0, 1))(dense, ngrams, rates, x, y)
                return loss, grads | {NGRAMS: ngram_grad}, rows[0]
            # A position's own row has memorised the next token by now: read the other row only, and train neither
            ngrams = params[NGRAMS][rows[1]].sum(axis=0)                        # [B, T, C]
        return *mx.value_and_grad(loss_fn)(dense, ngrams, rates, x, y), None

    return gradients


def make_step(model, accumulation_steps):
    """Returns step(params, moments, rates, batches) -> params, moments, loss. Weights go in and come out as {name: fp32 array}."""
    gradients = make_gradients(model)

    @mx.compile
    def apply(params, moments, rates, loss, grads, ngram_grads):
        divisor, rows = accumulation_steps * rates.get(LOSS_SCALE, 1), None
        grads = {n: g / divisor for n, g in grads.items()}
        if ngram_grads:  # put the micro-batches side by side, as one large batch has them
            rows = mx.concatenate([rows for rows, _ in ngram_grads], axis=1)    # [n, accumulation_steps * B, T]
            grads[NGRAMS] = mx.concatenate([g for _, g in ngram_grads]) / divisor
        if LOSS_SCALE in rates:
            grads, next_scale = unless_overflow(grads, rates[LOSS_SCALE])
            moments = moments | {LOSS_SCALE: (next_scale,)}
        return *update(params, grads, moments, rates, model.config.n_embd, rows), loss / divisor

    def step(params, moments, rates, batches):
        total, ngram_grads = None, []
        if LOSS_SCALE in moments:
            rates = rates | {LOSS_SCALE: moments[LOSS_SCALE][0]}
        for _ in range(accumulation_steps):
            loss, grads, rows = gradients(params, rates, *map(mx.array, next(batches)))
            if rows is not None:
                ngram_grads.append((rows, grads.pop(NGRAMS)))
            total = (loss, grads) if total is None else tree_map(mx.add, total, (loss, grads))
            async_eval(total, ngram_grads)  # start now, so that only one micro-batch (on a CPU two) has activations in memory
        return apply(params, moments, rates, *total, ngram_grads)

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Loop
# ---------------------------------------------------------------------------------------------------------------------


def matmul_probe():
    """A function that runs two large matrix products, and their FLOPs. Its speed shows whether the machine slows down, and is the
    reference for MFU on a device of unknown peak."""
    n = 4096 if GPU else 1024
    a = mx.random.normal((n, n)).astype(DTYPE)

    def products():
        first = a @ a
        async_eval(first)  # a CPU computes two at the same time, as it does micro-batches
        both = first, a @ a
        async_eval(both)
        mx.eval(both)

    return products, 4 * n**3


def memory_limit():
    """Bytes that arrays may take on this device, None if unknown.

    On a Mac this also sets two limits of MLX. Half of these bytes may be wired: all of them would starve other programs. A quarter
    may be freed buffers that are kept for reuse: more would cause swapping.
    """
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or info.get("total_memory") or (
        None if GPU else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if mx.metal.is_available():
        mx.set_wired_limit(limit // 2)
        mx.set_cache_limit(limit // 4)
    return limit


def build(run, accumulation_steps):
    """A fresh model, its weights and moments as {name: array}, and its training step."""
    model = GPT(GPTConfig(vocab_size=run.vocab_size))
    model.init_weights(run.seed)
    mx.random.seed(run.seed)
    params = dict(tree_flatten(model.parameters()))
    moments = init_optimizer(params)
    mx.eval(params, moments)
    if NGRAMS in params:
        model.ngrams.weight = mx.zeros((0,))  # or the model would keep the first version of the table in memory
    return model, params, moments, make_step(model, accumulation_steps)


def weight_bytes(depth, vocab_size):
    """Bytes of weights and moments at another depth, with the width in proportion. Arrays are lazy: none is allocated."""
    width = WIDTH if depth == DEPTH else math.ceil(WIDTH * depth / (DEPTH * HEAD_DIM)) * HEAD_DIM
    config = GPTConfig(vocab_size, n_layer=depth, n_head=max(1, width // HEAD_DIM), n_embd=width)
    params = dict(tree_flatten(GPT(config).parameters()))
    return sum(a.nbytes for _, a in tree_flatten((params, init_optimizer(params))))


def dummy_step(params, moments, step, rows, seq_len):
    """Run a step on dummy data, in micro-batches of `rows` rows. Returns its seconds and peak bytes.

    The step gets copies of params and moments, because it may overwrite its inputs. The bytes of the copies are not counted.
    """
    copies = tree_map(lambda a: a + 0, (params, moments))
    mx.eval(copies)
    x, copied = np.zeros((rows, seq_len), np.int32), sum(a.nbytes for _, a in tree_flatten(copies))
    mx.reset_peak_memory()
    start = time.perf_counter()
    result = step(*copies, schedule(0, 0), repeat((x, x)))
    del copies  # so that the step may overwrite them, as in training
    mx.eval(result)
    return time.perf_counter() - start, mx.get_peak_memory() - copied


def expected_memory(model, params, moments, step, rows, micro_rows, seq_len):
    """Returns peak(passes): the expected peak bytes of a step of `rows` rows in that many micro-batches. It is extrapolated from
    small ones that are run here, so that it holds whatever was edited. On a CPU it is too high if only large passes compute
    cross entropy by block."""
    gradients, rates = make_gradients(model), schedule(0, 0, len(DROPOUT)) | schedule(0, 0)  # tables and dropout: the most memory

    def peak_of_pass(n):
        x = mx.zeros((n, seq_len), mx.int32)
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(gradients(params, rates, x, x))
        return mx.get_peak_memory()

    _, update_peak = dummy_step(params, moments, step, 1, seq_len)              # with one row, the update takes the most
    table = params[NGRAMS].nbytes if NGRAMS in params else 0
    saving_peak = sum(a.nbytes for _, a in tree_flatten((params, moments))) + table // 2  # it makes a bfloat16 copy of the tables
    # What accumulation keeps from pass to pass: the sum of the gradients, and the n-gram gradients of all passes
    kept = sum(p.nbytes for p in params.values()) - table + 4 * rows * seq_len * model.config.n_embd * (table > 0)
    peak_of_rows = extrapolate(peak_of_pass, micro_rows)

    def peak(passes):
        at_once = min(passes, 1 if GPU else 2)  # a CPU runs two passes at the same time
        return max(update_peak, saving_peak, peak_of_rows(rows // passes * at_once) + kept * (passes > 1))

    return peak


def train(run):
    """Train until the budget is used, then save. Returns what train.json records."""
    seq_len = min(SEQ_LEN, run.seq_len)
    batch_rows = max(1, BATCH_TOKENS // seq_len)
    batch_tokens = batch_rows * seq_len
    fewest = math.ceil(batch_tokens / MICRO_TOKENS)  # passes; more where that many do not divide the batch into equal ones
    accumulation_steps = next((n for n in range(fewest, batch_rows) if batch_rows % n == 0), batch_rows)
    micro_rows = batch_rows // accumulation_steps
    probe, probe_flops = matmul_probe()
    peak_rate, matmul_rate = peak_flops(device_name(), probe, probe_flops)
    limit, held = memory_limit(), partial(weight_bytes, vocab_size=run.vocab_size)
    check_weights(held, DEPTH, limit)

    # Warm up on dummy data, which also measures the memory and the seconds of a step
    model, params, moments, step_fn = build(run, accumulation_steps)
    expected = expected_memory(model, params, moments, step_fn, batch_rows, micro_rows, seq_len)
    check_memory(expected, accumulation_steps, micro_rows, seq_len, limit, held, DEPTH)
    seconds = min(dummy_step(params, moments, step_fn, micro_rows, seq_len)[0] for _ in range(2))  # the first may compile
    epochs = expected_epochs(run.budget, seconds, batch_tokens, run.train_tokens)
    config, num_params = model.config, sum(p.size for p in params.values())
    flops, expected_mb = model.flops_per_token(seq_len), expected(accumulation_steps) / 2**20
    print(f"{TIER}: {device_name()}, matrix products at {matmul_rate / 1e12:.2f} TFLOP/s\n"
          f"model: depth {config.n_layer}, width {config.n_embd}, {num_params / 1e6:.2f} M parameters, of which n-gram tables "
          f"{sum(config.ngram_buckets) * config.n_embd / 1e6:.2f} M; {flops / 1e6:.2f} MFLOPs per token\n"
          f"step: {batch_tokens:,} tokens in rows of {seq_len}, {accumulation_steps} gradient accumulation steps\n"
          f"expected: {epochs:.2g} epochs, peak memory {expected_mb:,.0f} MB", flush=True)
    mx.reset_peak_memory()

    run.budget.start(probe)  # the probe is timed again at the end: did the machine slow down?
    batches = run.batches(micro_rows, seq_len)
    step, pending = 0, None
    progress = Progress(run, batch_tokens, flops, peak_rate, ABORT_LOSS)
    while (used := run.budget.progress(step, step * batch_tokens)) < 1 or step == 0:
        rates = schedule(used, step, epoch=step * batch_tokens // run.epoch_tokens)
        params, moments, loss = step_fn(params, moments, rates, batches)
        mx.async_eval(params, moments, loss)
        if pending is not None:  # read the loss of the step before: waiting for this step's would idle the device
            progress.take(pending.item())
        pending, step = loss, step + 1
        progress.tell(rates["lr"].item, mx.get_peak_memory)  # functions: reading the values would wait for the device
    mx.eval(params, moments)
    training_seconds = run.budget.seconds
    progress.take(pending.item())
    progress.tell(rates["lr"].item, mx.get_peak_memory)
    print()  # ends the progress line
    saved = {n: p.astype(mx.bfloat16) if n == NGRAMS else p for n, p in params.items()}  # the tables are most of the file
    mx.save_safetensors(str(run.dir / "weights.safetensors"), saved)
    (run.dir / "config.json").write_text(json.dumps(asdict(config)))
    tokens = step * batch_tokens
    return {"training_seconds": training_seconds, "num_steps": step, "total_tokens": tokens, "num_params": num_params,
            "depth": config.n_layer, "peak_vram_mb": mx.get_peak_memory() / 2**20, "expected_vram_mb": expected_mb,
            "mfu_percent": 100 * tokens * flops / training_seconds / peak_rate, "gemm_tflops": matmul_rate / 1e12,
            "device": device_name(), "tier": TIER}


def load_model(run_dir):
    """The trained model as logits(tokens): int32 [B, T] numpy -> float32 [B, T, vocab] numpy. The scorer calls this."""
    run_dir = Path(run_dir)
    model = GPT(GPTConfig(**json.loads((run_dir / "config.json").read_text())))
    forward = mx.compile(with_weights(model, mx.load(str(run_dir / "weights.safetensors"))).__call__)
    return lambda tokens: np.array(forward(mx.array(tokens)))


if __name__ == "__main__":
    with start_run(__file__) as run:
        run.finish(**train(run))
