"""
Train a small GPT on one device for a fixed budget, with PyTorch. This is the file that the agent edits.

    python prepare_mlx.py && python train_torch.py

It translates train_mlx.py for CUDA, MPS and CPUs: the same names in the same order. Weights have the same names and shapes, too.
The model is the GPT of karpathy/autoresearch (nanochat) plus hashed n-gram embeddings and attention gates. Muon trains the matrices
of the blocks, row-wise Adagrad the n-gram tables, AdamW everything else. docs/recipe.md says why, with figures.
"""

import json
import math
import os
import platform
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from prepare_mlx import (
    HarnessError,
    Progress,
    check_weights,
    expected_epochs,
    extrapolate,
    find_dtype,
    find_tier,
    peak_flops,
    process_peak,
    recall,
    remember,
    start_run,
)

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
DEVICE = "cpu" if os.environ.get("AUTORESEARCH_DEVICE") == "cpu" else DEVICE
GPU = DEVICE != "cpu"
# Older versions compute wrong rows of n-grams on MPS, and do not tell the peak memory
if DEVICE == "mps" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    sys.exit(f"error: expected torch 2.13 or later on MPS, got {torch.__version__}: pip install --upgrade torch, or set "
             "AUTORESEARCH_DEVICE=cpu")
# cpu, mac (8-32 GB), mac-max (36 GB and up), cuda; or $AUTORESEARCH_TIER
TIER = find_tier(None if DEVICE == "mps" else DEVICE)


COMPILE = DEVICE == "cuda"  # on a CPU it saves little and runs a C++ compiler for a minute, on MPS it is a prototype
CHECKPOINT = False  # compute each block's activations a second time instead of keeping them; `fitting_step` may turn it on


def compiled(function):
    """Return torch.compile(function) if COMPILE is on, and this Python and system support it; else the function. Compilation
    happens at the first call: `fitting_step` finds out whether it works."""
    if COMPILE:
        try:
            return torch.compile(function, dynamic=False)
        except RuntimeError as error:
            without_compiler(error)
    return function


def without_compiler(error):
    """Switch torch.compile off for the rest of this training, and print why."""
    global COMPILE
    COMPILE = False
    print(f"note: torch.compile does not work here ({(str(error).strip().splitlines() or [type(error).__name__])[0]}): training "
          "without it, slower", flush=True)


def device_name():
    names = {"cuda": torch.cuda.get_device_name, "mps": getattr(torch.backends.mps, "get_name", platform.machine)}
    return f"{names.get(DEVICE, platform.machine)()} {DEVICE} torch".replace("/", " ")[:80]


def gpu_dtype():
    """The dtype in which the GPU computes: the one that was measured to be fastest, else bf16. GPUs before Ampere (RTX 20xx,
    T4) only emulate bf16, so they get fp16 with loss scaling."""
    emulated = DEVICE == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch, find_dtype(device_name(), "float16" if emulated else "bfloat16"))


# ---------------------------------------------------------------------------------------------------------------------
# Constants: edit these first
# ---------------------------------------------------------------------------------------------------------------------

# Model. DEPTH is the one dial: width, heads and batch follow it, and each can be set by itself, too.
DEPTH = {"cpu": 2, "mac": 3, "mac-max": 4, "cuda": 8}[TIER]  # transformer layers
HEAD_DIM = {"cpu": 64, "mac": 128, "mac-max": 128, "cuda": 128}[TIER]  # channels of an attention head; GPUs fuse 64 and 128
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

DTYPE = gpu_dtype() if GPU else torch.float32  # of activations; weights and moments are fp32. Most CPUs are slow in bf16
EPS = 1.1920929e-07  # of every norm: fp32's machine epsilon, as upstream
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
    return F.rms_norm(x, x.shape[-1:], eps=EPS)                                 # RMSNorm without weights


def dropout(x, rate):
    """Inverted dropout: zero each element with probability `rate`, scale the rest by 1 / (1 - rate). A rate of None returns x
    unchanged."""
    return x if rate is None else x * ((torch.rand(x.shape, device=x.device) >= rate) / (1 - rate)).to(x.dtype)


def has_ve(layer, n_layer):
    """Every second layer has value embeddings, the last one included."""
    return layer % 2 == (n_layer - 1) % 2


def rope(x, base):
    """Rotary position embedding in fp32: rotate channels c and c + D/2 of x [B, H, T, D] by -position, as upstream."""
    T, half = x.shape[2], x.shape[3] // 2
    speed = base ** (torch.arange(half, device=x.device) / -half)               # [D/2]
    angle = torch.arange(T, device=x.device)[:, None] * speed                   # [T, D/2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)                                           # [B, H, T, D/2]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)


def attention(q, k, v):
    """Causal attention for q, k, v [B, H, T, D]. MPS gets a mask that is added to the scores: before torch 2.14 its is_causal let
    bf16 queries see up to three tokens ahead (pytorch#195910), and a Boolean mask was wrong in some of its kernels."""
    if DEVICE != "mps":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    t = torch.arange(q.shape[2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(t <= t[:, None], 0.0, float("-inf")).to(q.dtype))


def ngram_rows(tokens, buckets):
    """Hash the 2-gram, 3-gram, ... that ends at each token to rows of its table: int64 [B, T] -> int64 [2, n, B, T].

    A table memorises a text that is read more than once, so each n-gram has two rows. In the first epoch a position reads both and
    trains one of them; in later epochs it reads only the other. A hash of the last NGRAM_CONTEXT tokens chooses the trained row,
    which comes first. The tables of all n are stacked in one array.
    """
    def mixed(code):
        code = (code & 0xFFFFFFFF) * 1_640_531_527 & 0xFFFFFFFF                 # uint32 in int64: wraps around at 2**32
        return code ^ (code >> 15)

    previous = tokens                                                           # [B, T]
    codes = [previous]
    for _ in range(max(NGRAM_CONTEXT - 1, len(buckets))):
        previous = F.pad(previous[:, :-1], (1, 0))                              # one token further back, 0 before the row
        codes.append((codes[-1] * 1_000_003 + previous + 1) & 0xFFFFFFFF)       # code of the n-gram that is one token longer
    own = mixed(codes[-1]) & 1                                                  # [B, T]: is the trained row the first or second?
    choice, rows, offset = torch.stack([own, 1 - own]), [], 0                   # [2, B, T]: the trained row, then the other
    for size, code in zip(buckets, codes[1:], strict=False):                    # 2-grams, 3-grams, ...
        rows.append(offset + mixed(2 * code + choice) % size)
        offset += size
    return torch.stack(rows, dim=1)


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

    def forward(self, x, ve):                                                   # x [B, T, C], ve [B, T, C] or None
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = (c(x).reshape(B, T, H, D) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:  # value residual (ResFormer), gated per head by the first channels
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))      # [B, T, H]
            v = v + gate[..., None] * ve.reshape(B, T, H, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                        # [B, H, T, D]
        q, k = (norm(rope(t, self._rope_base)) for t in (q, k))
        y = attention(q, k, v)
        gate = 2 * torch.sigmoid(self.out_gate(x[..., :GATE_CHANNELS]))         # [B, T, H]: a head can be silent
        return self.c_proj((y.transpose(1, 2) * gate[..., None]).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(torch.square(F.relu(self.c_fc(x))))                  # relu²


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, ve):
        x = x + self.attn(norm(x), ve)
        return x + self.mlp(norm(x))


def recomputed(block, x, ve):
    """block(x, ve), whose activations are computed again in the backward pass instead of kept. The weights are passed as arguments,
    because by then functional_call has restored the model's own weights."""
    names, weights = zip(*block.named_parameters(), strict=True)

    def run(x, ve, *weights):
        return functional_call(block, dict(zip(names, weights, strict=True)), (x, ve))
    return checkpoint(run, x, ve, *weights, use_reentrant=False)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        self.wte = nn.Embedding(V, C)
        if config.ngram_buckets:
            self.ngrams = nn.Embedding(sum(config.ngram_buckets), C)
        self.value_embeds = nn.ModuleList(nn.Embedding(V, C) for i in range(L) if has_ve(i, L))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(L))
        self.lm_head = nn.Linear(C, V, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(L))
        self.x0_lambdas = nn.Parameter(torch.zeros(L))

    @torch.no_grad()
    def init_weights(self, seed):
        """As upstream: matrices uniform with standard deviation 1/sqrt(width); output projections, gates and n-gram tables 0."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed means the same on every device
        s = 3**0.5 * self.config.n_embd**-0.5
        for name, p in self.named_parameters():
            if name == "wte.weight":
                p.copy_(torch.randn(p.shape, generator=generator))
            elif name == "lm_head.weight":
                p.copy_(0.001 * torch.randn(p.shape, generator=generator))
            elif name == "x0_lambdas":
                p.fill_(0.1)
            elif name == NGRAMS or name.endswith(("c_proj.weight", "_gate.weight")):
                p.zero_()
            elif name != "resid_lambdas":
                p.copy_(s * (2 * torch.rand(p.shape, generator=generator) - 1))

    def forward(self, tokens, ngrams=None, dropout_rate=None):
        """Logits: int64 [B, T] -> fp32 [B, T, V]. A training step passes a dropout rate and the summed n-gram embeddings
        [B, T, C], because it needs the gradient of that sum."""
        if ngrams is None and self.config.ngram_buckets:
            ngrams = self.ngrams(ngram_rows(tokens, self.config.ngram_buckets)).sum(dim=(0, 1))
        x = self.wte(tokens)                                                    # [B, T, C]; embedding tables are fp32
        x = x if ngrams is None else x + ngrams
        x = x0 = dropout(norm(x.to(DTYPE)), dropout_rate)
        resid, skip = self.resid_lambdas.to(x.dtype), self.x0_lambdas.to(x.dtype)
        value_embeds = iter(self.value_embeds)
        for i, block in enumerate(self.blocks):
            ve = next(value_embeds)(tokens).to(x.dtype) if has_ve(i, len(self.blocks)) else None
            x = resid[i] * x + skip[i] * x0
            x = recomputed(block, x, ve) if CHECKPOINT else block(x, ve)
        logits = self.lm_head(dropout(norm(x), dropout_rate)).float()           # [B, T, V]
        return self.config.softcap * torch.tanh(logits / self.config.softcap) if self.config.softcap else logits

    def flops_per_token(self, seq_len):
        """FLOPs per token of a forward and backward pass, as upstream counts: 6 per weight of a matrix product, and for attention
        12 per layer, channel and token of the row."""
        weights = sum(p.numel() for name, p in self.named_parameters() if is_matmul_weight(name))
        return 6 * weights + 12 * self.config.n_embd * seq_len * self.config.n_layer


def is_matrix(name):
    return name.startswith("blocks.")


def is_matmul_weight(name):
    """Whether a weight is multiplied in a matrix product: it is cast to DTYPE. Embedding tables are cast after the look-up."""
    return is_matrix(name) or name == "lm_head.weight"


def with_weights(model, params):
    """The model as a function with the weights {name: tensor}, those of matrix products cast to DTYPE."""
    cast = {n: p.to(DTYPE) if is_matmul_weight(n) else p for n, p in params.items()}
    return lambda *inputs: functional_call(model, cast, inputs)


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
    size = torch.sqrt(torch.sum(torch.square(g), dim=(1, 2), keepdim=True))     # [n, 1, 1], Frobenius norm
    x = (g / (size * 1.02 + 1e-6)).to(DTYPE)                                    # divided in fp32: fp16 would lose a small gradient
    tall = g.shape[1] > g.shape[2]
    if tall:
        x = x.mT
    for a, b, c in POLAR_EXPRESS[:NEWTON_SCHULZ_STEPS]:
        A = x @ x.mT                                            # [n, short, short]
        x = a * x + (b * A + c * (A @ A)) @ x
    return (x.mT if tall else x).float()


def muon(p, g, m, v, lr, momentum, weight_decay):
    """One Muon step on stacked matrices p, g, m [n, rows, cols]; v [n, rows, 1] or [n, 1, cols]. Returns p, m, v.

    Nesterov momentum, orthogonalization, NorMuon's variance reduction (arXiv 2510.05491), cautious weight decay.
    """
    m = m + (1 - momentum) * (g - m)
    u = orthogonalize(g + momentum * (m - g))
    axis = 2 if p.shape[1] >= p.shape[2] else 1
    size = p.shape[axis]
    mean_square = torch.mean(torch.square(u), dim=axis, keepdim=True)               # [n, rows, 1] or [n, 1, cols]
    norm_before = torch.sqrt(torch.sum(mean_square, dim=(1, 2), keepdim=True) * size)
    v = v + (1 - MUON_BETA2) * (mean_square - v)
    scale = torch.rsqrt(v.clamp(min=1e-10))
    norm_after = torch.sqrt(torch.sum(mean_square * size * torch.square(scale), dim=(1, 2), keepdim=True))
    u = u * scale * (norm_before / norm_after.clamp(min=1e-10))
    lr = lr * max(1.0, p.shape[1] / p.shape[2]) ** 0.5
    return p - lr * (u + weight_decay * p * (u * p >= 0)), m, v


def adamw(p, g, m, v, lr, betas, t):
    """One AdamW step without decay; t counts steps from 1. Returns p, m, v."""
    m = m + (1 - betas[0]) * (g - m)
    v = v + (1 - betas[1]) * (torch.square(g) - v)
    direction = (m / (1 - betas[0] ** t)) / (torch.sqrt(v / (1 - betas[1] ** t)) + 1e-10)
    return p - lr * direction, m, v


def adagrad_rows(table, v, rows, g, lr):
    """One Adagrad step, in place, of the rows that a batch looked up. Other rows are not touched and cost no time. Returns
    table, v.

    table [R, C]; v [R], per row the sum of mean squared gradients (Duchi et al., 2011; one number per row as in Gupta et al.,
    arXiv 1705.06066); rows [n, B, T]; g [B, T, C], the gradient of the sum of n rows and so of each of them.
    """
    rows, g = rows.flatten(1), g.flatten(0, -2)                                 # [n, B * T], [B * T, C]
    mean_square = torch.mean(torch.square(g), dim=-1)                           # [B * T]
    for one in rows:
        v.index_add_(0, one, mean_square)
    for one in rows:  # one after the other, so that one product with g is in memory
        table.index_add_(0, one, -lr * torch.rsqrt(v[one] + 1e-20)[:, None] * g)
    return table, v


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
    """Zero moments for {name: tensor}: a pair per group for Muon, a number per row for Adagrad, a pair per parameter for AdamW."""
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in params.items() if not is_matrix(n) and n != NGRAMS}
    if NGRAMS in params:
        moments[NGRAMS] = (params[NGRAMS].new_zeros(len(params[NGRAMS])),)
    for key, names in matrix_groups(params).items():
        n, (rows, cols), zeros = len(names), params[names[0]].shape, params[names[0]].new_zeros
        moments[key] = zeros(n, rows, cols), zeros(n, rows, 1) if rows >= cols else zeros(n, 1, cols)
    if torch.float16 == DTYPE:
        moments[LOSS_SCALE] = (torch.full((), 2.0**13, device=params["wte.weight"].device),)
    return moments


def update(params, grads, moments, rates, width, rows=None):
    """One optimizer step over {name: tensor}; returns new params and moments. rates: see `schedule`.

    grads[NGRAMS] [B, T, C] is the gradient of the summed n-gram embeddings; rows [n, B, T] are the table rows to train.
    Tables and their moments change in place.
    """
    params, moments, lr = dict(params), dict(moments), rates["lr"]
    for key, names in matrix_groups(grads).items():
        p, g = (torch.stack([tree[n] for n in names]) for tree in (params, grads))  # [n, rows, cols]
        p, *moments[key] = muon(p, g, *moments[key], lr * MATRIX_LR, rates["momentum"], rates["weight_decay"])
        params |= dict(zip(names, p, strict=True))
    for name, g in grads.items():
        if name == NGRAMS:
            params[name], *moments[name] = adagrad_rows(params[name], *moments[name], rows, g, lr * NGRAM_LR)
        elif not is_matrix(name):
            rate, betas = adam_group(name, width)
            params[name], *moments[name] = adamw(params[name], g, *moments[name], lr * rate, betas, rates["step"])
    return params, {key: tuple(m) for key, m in moments.items()}


def unless_overflow(grads, before, after):
    """Loss scaling for fp16. Returns (params, moments) `after` the step, or those `before` it if a gradient is not finite,
    because the loss was scaled too much. In that case the scale is halved; otherwise it doubles in 200 steps."""
    finite = torch.stack([g.isfinite().all() for g in grads.values()]).all()

    def chosen(new, old):  # an n-gram table is the same tensor in both, because it changes in place, later
        return new if new is old else torch.where(finite, new, old)
    params = {n: chosen(p, before[0][n]) for n, p in after[0].items()}
    moments = {key: tuple(map(chosen, m, before[1][key])) for key, m in after[1].items()}
    scale, = before[1][LOSS_SCALE]
    return params, moments | {LOSS_SCALE: (torch.where(finite, (scale * 2 ** (1 / 200)).clamp(max=2.0**24), scale / 2),)}


# ---------------------------------------------------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------------------------------------------------


def schedule(progress, step, epoch=0):
    """What changes from step to step, by name. progress: used share of the budget, 0 to 1. step, epoch: counted from 0.

    "lr" is a factor on every learning rate, "first_epoch" is 1 in the first epoch and 0 after it. The values are 0-d fp32 tensors,
    because torch.compile would trace again for each new Python number.
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
             "step": step + 1, "first_epoch": epoch == 0}
    if any(DROPOUT):
        rates["dropout"] = DROPOUT[min(epoch, len(DROPOUT) - 1)]
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in rates.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Step: gradients of each micro-batch, then one update; both compiled on CUDA
# ---------------------------------------------------------------------------------------------------------------------


def to_device(t):
    """Copy to the device. CUDA copies pinned memory without waiting for earlier work; MPS corrupts data if asked to do that."""
    return t.contiguous().pin_memory().to(DEVICE, non_blocking=True) if DEVICE == "cuda" else t.to(DEVICE)


def make_gradients(model):
    """Returns gradients(params, rates, x, y) -> loss, {name: gradient}, table rows to train, for int64 x and y [B, T].

    The gradient of a whole n-gram table would be as large as the table, so {NGRAMS: gradient} is that of the summed rows [B, T, C].
    """

    @compiled
    def loss_fn(dense, ngrams, rates, x, y):
        logits = with_weights(model, dense)(x, ngrams, rates.get("dropout"))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def gradients(params, rates, x, y):
        inputs, ngrams, rows = {n: p.detach().requires_grad_() for n, p in params.items() if n != NGRAMS}, None, None
        dense = dict(inputs)
        if NGRAMS in params:
            rows, other_rows = ngram_rows(x, model.config.ngram_buckets)        # [n, B, T] each
            own, other = (params[NGRAMS][r].sum(dim=0) for r in (rows, other_rows))  # [B, T, C] each
            # After the first epoch a position's own row has memorised the next token: read the other row only, and train neither
            inputs[NGRAMS] = ngrams = (rates["first_epoch"] * own + other).requires_grad_()
        loss, scale = loss_fn(dense, ngrams, rates, x, y), rates.get(LOSS_SCALE, 1)
        grads = torch.autograd.grad(scale * loss, list(inputs.values()), materialize_grads=True)
        grads = dict(zip(inputs, grads if LOSS_SCALE not in rates else [g / scale for g in grads], strict=True))
        if NGRAMS in grads:
            grads[NGRAMS] = rates["first_epoch"] * grads[NGRAMS]
        return loss.detach(), grads, rows

    return gradients


def make_step(model, accumulation_steps):
    """Returns step(params, moments, rates, batches) -> params, moments, loss. Weights go in and come out as {name: fp32 tensor}."""
    gradients = make_gradients(model)

    @compiled
    def apply(params, moments, rates, loss, grads):
        grads = {n: g / accumulation_steps for n, g in grads.items()}
        after = update(params, grads, moments, rates, model.config.n_embd)
        after = unless_overflow(grads, (params, moments), after) if LOSS_SCALE in moments else after
        return *after, loss / accumulation_steps

    def step(params, moments, rates, batches):
        total, ngram_grads = None, []
        rates = dict(zip(rates, to_device(torch.stack(list(rates.values()))), strict=True))  # one copy for all
        rates |= {LOSS_SCALE: moments[LOSS_SCALE][0]} if LOSS_SCALE in moments else {}
        for _ in range(accumulation_steps):
            x, y = to_device(torch.from_numpy(np.stack(next(batches)))).long()  # one copy for both
            loss, grads, rows = gradients(params, rates, x, y)
            if rows is not None:
                ngram_grads.append((rows, grads.pop(NGRAMS)))
            total = (loss, grads) if total is None else (total[0] + loss, {n: total[1][n] + g for n, g in grads.items()})
        params, moments, loss = apply(params, moments, rates, *total)
        if ngram_grads:  # put the micro-batches side by side, as one large batch has them; not compiled, as tables change in place
            rows = torch.cat([rows for rows, _ in ngram_grads], dim=1)          # [n, accumulation_steps * B, T]
            grads = {NGRAMS: torch.cat([g for _, g in ngram_grads]).nan_to_num(0, 0, 0) / accumulation_steps}  # 0 on overflow
            params, moments = update(params, grads, moments, rates, model.config.n_embd, rows)
        return params, moments, loss

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Loop
# ---------------------------------------------------------------------------------------------------------------------


def synchronize():
    """Wait for the device."""
    if GPU:
        getattr(torch, DEVICE).synchronize()


def marker():
    """Returns a function that waits for the work that was queued on the device before this call, and for no later work."""
    if not GPU:
        return lambda: None
    event = getattr(torch, DEVICE).Event()
    event.record()
    return event.synchronize


def reset_peak_memory():
    """Reset the peak that `peak_memory` reports, where possible, and return freed buffers to the device."""
    if GPU:
        memory = torch.cuda if DEVICE == "cuda" else torch.accelerator
        memory.empty_cache()
        memory.reset_peak_memory_stats()


def peak_memory():
    """Peak bytes: of tensors on a GPU, of this process on the CPU."""
    if GPU:
        return (torch.cuda if DEVICE == "cuda" else torch.accelerator).max_memory_allocated()
    return process_peak()


def matmul_probe():
    """A function that runs one large matrix product, and the FLOPs of that product. Its speed shows whether the machine slows down,
    and is the reference for MFU on a device of unknown peak."""
    n = 4096 if GPU else 1024
    a = torch.randn(n, n, device=DEVICE).to(DTYPE)
    return lambda: (a @ a, synchronize()), 2 * n**3


def memory_limit():
    """Bytes that tensors may take on this device. CUDA: what other programs have left free. MPS: 1 GiB less than recommended,
    because it allocates heaps of 1 GiB, and the last one may stay half empty."""
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    if DEVICE == "mps":
        return torch.mps.recommended_max_memory() - 2**30
    import psutil
    return psutil.virtual_memory().total


def build(run, accumulation_steps):
    """A fresh model, its weights and moments as {name: tensor}, and its training step."""
    model = GPT(GPTConfig(vocab_size=run.vocab_size)).to(DEVICE)
    model.init_weights(run.seed)
    torch.manual_seed(run.seed)
    params = {n: p.detach() for n, p in model.named_parameters()}
    return model, params, init_optimizer(params), make_step(model, accumulation_steps)


def weight_bytes(depth, vocab_size):
    """Bytes of weights and moments at another depth, with the width in proportion. Meta tensors allocate no memory."""
    width = WIDTH if depth == DEPTH else math.ceil(WIDTH * depth / (DEPTH * HEAD_DIM)) * HEAD_DIM
    config = GPTConfig(vocab_size, n_layer=depth, n_head=max(1, width // HEAD_DIM), n_embd=width)
    with torch.device("meta"):
        params = dict(GPT(config).named_parameters())
    return sum(t.nbytes for tensors in (params.values(), *init_optimizer(params).values()) for t in tensors)


def dummy_step(params, moments, step, rows, seq_len):
    """Run a step on dummy data, in micro-batches of `rows` rows. Returns its seconds and peak bytes.

    The step gets copies of params and moments, because it may overwrite its inputs. The bytes of the copies are not counted.
    """
    copies = deepcopy((params, moments))
    x, held = np.zeros((rows, seq_len), np.int32), sum(t.nbytes for ts in (copies[0].values(), *copies[1].values()) for t in ts)
    synchronize()
    reset_peak_memory()
    start = time.perf_counter()
    step(*copies, schedule(0, 0), repeat((x, x)))
    synchronize()
    return time.perf_counter() - start, peak_memory() - held


def expected_memory(model, params, moments, step, rows, micro_rows, seq_len):
    """Returns peak(passes): the expected peak bytes of a step of `rows` rows in that many micro-batches. It is extrapolated
    from small ones that are run here without compiling, so that it holds whatever was edited. None if that is impossible: on a
    CPU, whose peak cannot be reset, or if even the small ones do not fit."""
    if DEVICE == "cpu":
        return None
    gradients, rates = make_gradients(model), {n: t.to(DEVICE) for n, t in schedule(0, 0).items()}

    def peak_of_pass(n):
        x = torch.zeros(n, seq_len, dtype=torch.int64, device=DEVICE)
        reset_peak_memory()
        gradients(params, rates, x, x)
        synchronize()
        return peak_memory()

    kept = sum(p.nbytes for n, p in params.items() if n != NGRAMS)              # sums of gradients
    kept += 4 * rows * seq_len * model.config.n_embd                            # n-gram gradients of all passes
    try:
        with torch.compiler.set_stance("force_eager") if COMPILE else nullcontext():
            _, update = dummy_step(params, moments, step, 1, seq_len)
            one_pass = extrapolate(peak_of_pass, micro_rows)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    return lambda passes: max(update, one_pass(rows // passes) + kept * (passes > 1))


def out_of_memory(error):
    """Whether an error of PyTorch, cuBLAS, cuDNN or Metal means that the device ran out of memory."""
    words = "out of memory", "not enough memory", "STATUS_ALLOC_FAILED", "Invalid buffer size"
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def fitting_step(model, params, moments, expected, passes, rows, seq_len, limit):
    """Find a training step that works on this device by trying it on dummy data. Returns its gradient accumulation steps, the step,
    and its seconds.

    The step trains `rows` rows in at least `passes` passes: in the fewest that are expected to take at most `limit` bytes. If the
    step still runs out of memory, more and smaller passes are tried; if even passes of one row do not fit, activations are
    recomputed. What fitted is remembered for this device, its free memory and this model. If torch.compile fails, the step is not
    compiled. Each of these changes is printed. Errors: HarnessError("oom").
    """
    global CHECKPOINT
    key = [device_name(), (limit or 0) >> 30, str(DTYPE), rows, seq_len, {n: list(p.shape) for n, p in params.items()}]
    known, full = recall(key), False
    CHECKPOINT = CHECKPOINT or known.get("checkpoint", False)
    allowed = [n for n in range(passes, rows + 1) if rows % n == 0]
    fitting = [n for n in allowed if not expected or CHECKPOINT or expected(n) <= limit] or allowed[-1:]
    left = [n for n in fitting if n >= known.get("passes", 0)] or fitting
    if known:
        twice = ", with gradient checkpointing" if CHECKPOINT else ""
        print(f"note: {rows // left[0] * seq_len:,} tokens in a pass{twice}, as found before for this device and model", flush=True)
    while True:
        step = make_step(model, left[0])
        try:
            seconds = min(dummy_step(params, moments, step, rows // left[0], seq_len)[0] for _ in range(2))  # the first may compile
            if full:
                remember(key, {"passes": left[0], "checkpoint": CHECKPOINT})
            return left[0], step, seconds
        except RuntimeError as error:
            if COMPILE and not isinstance(error, torch.OutOfMemoryError) and "torch._" in type(error).__module__:
                without_compiler(error)
                continue
            if not out_of_memory(error):
                raise
            full = True
            if len(left) > 1:
                left, note = left[1:], f"{rows // left[0] * seq_len:,} tokens in a pass do not fit: {rows // left[1] * seq_len:,}"
            elif not CHECKPOINT:
                CHECKPOINT, left, note = True, allowed, "not even one row fits: gradient checkpointing, a third more time"
            else:
                raise HarnessError("oom", f"{error}; even passes of one row with recomputed activations do not fit: lower DEPTH, "
                                   "WIDTH or NGRAM_BUCKETS, or free the device's memory") from error
        print(f"note: {note}", flush=True)


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
    accumulation_steps, step_fn, seconds = fitting_step(
        model, params, moments, expected, accumulation_steps, batch_rows, seq_len, limit)
    micro_rows = batch_rows // accumulation_steps
    epochs = expected_epochs(run.budget, seconds, batch_tokens, run.train_tokens)
    config, num_params = model.config, sum(p.numel() for p in params.values())
    flops, expected_mb = model.flops_per_token(seq_len), expected and expected(accumulation_steps) / 2**20
    print(f"{TIER}: {device_name()}, matrix products at {matmul_rate / 1e12:.2f} TFLOP/s\n"
          f"model: depth {config.n_layer}, width {config.n_embd}, {num_params / 1e6:.2f} M parameters, of which n-gram tables "
          f"{sum(config.ngram_buckets) * config.n_embd / 1e6:.2f} M; {flops / 1e6:.2f} MFLOPs per token\n"
          f"step: {batch_tokens:,} tokens in rows of {seq_len}, {accumulation_steps} gradient accumulation steps\n"
          f"expected: {epochs:.2g} epochs, peak memory {f'{expected_mb:,.0f} MB' if expected else 'unknown'}", flush=True)
    reset_peak_memory()

    run.budget.start(probe)  # the probe is timed again at the end: did the machine slow down?
    batches = run.batches(micro_rows, seq_len)
    step, losses, previous, read = 0, [], None, 0.0
    progress = Progress(run, batch_tokens, flops, peak_rate, ABORT_LOSS)

    def take():
        for loss in torch.stack(losses).tolist():                               # one copy for all, which waits for the device
            progress.take(loss)
        losses.clear()
        progress.tell(rates["lr"].item, peak_memory)

    while (used := run.budget.progress(step, step * batch_tokens)) < 1 or step == 0:
        rates = schedule(used, step, epoch=step * batch_tokens // run.epoch_tokens)
        params, moments, loss = step_fn(params, moments, rates, batches)
        losses.append(loss)
        done, step = marker(), step + 1
        if previous:  # wait for the step before: waiting for this one would idle the device
            previous()
        previous = done
        if run.budget.seconds - read >= 1:
            read = run.budget.seconds
            take()
    synchronize()
    training_seconds = run.budget.seconds
    if losses:
        take()
    print()
    saved = {n: p.cpu().bfloat16() if n == NGRAMS else p.cpu() for n, p in params.items()}  # the tables are most of the file
    torch.save(saved, run.dir / "weights.pt")
    (run.dir / "config.json").write_text(json.dumps(asdict(config)))
    tokens = step * batch_tokens
    return {"training_seconds": training_seconds, "num_steps": step, "total_tokens": tokens, "num_params": num_params,
            "depth": config.n_layer, "peak_vram_mb": peak_memory() / 2**20, "expected_vram_mb": expected_mb,
            "mfu_percent": 100 * tokens * flops / training_seconds / peak_rate, "gemm_tflops": matmul_rate / 1e12,
            "device": device_name(), "tier": TIER}


def load_model(run_dir):
    """The trained model as logits(tokens): int32 [B, T] numpy -> float32 [B, T, vocab] numpy. The scorer calls this."""
    run_dir = Path(run_dir)
    model = GPT(GPTConfig(**json.loads((run_dir / "config.json").read_text()))).to(DEVICE)
    weights = torch.load(run_dir / "weights.pt", map_location=DEVICE, weights_only=True)  # tensors only, no pickled code
    forward = torch.inference_mode()(with_weights(model, weights))  # not compiled: that takes longer than scoring does
    return lambda tokens: forward(torch.tensor(tokens, dtype=torch.int64, device=DEVICE)).cpu().numpy()


if __name__ == "__main__":
    with start_run(__file__) as run:
        run.finish(**train(run))
