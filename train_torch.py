"""
A small GPT, trained on one device for a fixed budget, on PyTorch. This is the file that the agent edits.

    python prepare_mlx.py && python train_torch.py

The same experiment as train_mlx.py for CUDA, MPS and plain CPUs: the same names in the same order, so that a diff of the
two files reads as a translation. Weights have the same names and shapes too.
"""

import json
import math
import os
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from prepare_mlx import (
    HarnessError,
    Progress,
    check_memory,
    check_weights,
    detect_preset,
    expected_epochs,
    find_tier,
    peak_flops,
    start_run,
)

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
GPU = DEVICE != "cpu"
TIER = find_tier(detect_preset() if DEVICE == "mps" else DEVICE)  # cpu, mac (8-24 GB), mac-max (36 GB and up), cuda


def compiled(function):
    """torch.compile on CUDA only: on the CPU it gains little and runs a C++ compiler for a minute, on MPS it is young."""
    return torch.compile(function, dynamic=False) if DEVICE == "cuda" else function


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
LOSS_TOKENS = 2**13  # tokens whose logits exist at once, at most: more are worked off in chunks, logits made twice
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

DTYPE = torch.bfloat16 if GPU else torch.float32  # of activations; master weights are fp32
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
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def dropout(x, share):
    """x with that share of its elements 0 and the others as much larger; None: x."""
    return x if share is None else x * ((torch.rand(x.shape, device=x.device) >= share) / (1 - share)).to(x.dtype)


def has_ve(layer, n_layer):
    """Value embeddings stand on every second layer, the last one included."""
    return layer % 2 == (n_layer - 1) % 2


def rope(x, base):
    """Rotary positions: channels c and c + D/2 of x [B, H, T, D] turn by -position, as upstream has it; in fp32."""
    T, half = x.shape[2], x.shape[3] // 2
    speed = base ** (torch.arange(half, device=x.device) / -half)               # [D/2]
    angle = torch.arange(T, device=x.device)[:, None] * speed                   # [T, D/2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)                                           # [B, H, T, D/2]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)


def masked_attention(q, k, v, mask=None):
    """Attention where mask [Tq, Tk] says so, causal without one.

    MPS always gets a mask that is added: before torch 2.14 its is_causal let bf16 queries see up to three tokens ahead
    (pytorch#195910), and not all of its kernels were right with a Boolean mask.
    """
    if DEVICE == "mps":
        t = torch.arange(q.shape[2], device=q.device)
        mask = torch.where(t <= t[:, None] if mask is None else mask, 0.0, float("-inf")).to(q.dtype)  # [Tq, Tk]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def attend(q, k, v, window):
    """Causal attention: q, k, v [B, H, T, D]; token t sees the tokens t-window..t.

    No array mask on a full layer, so that flash attention applies. A windowed layer is a causal part, then bands:
    queries in chunks against the keys they can see, all chunks with one small mask.
    """
    T = q.shape[2]
    if window >= T - 1:
        return masked_attention(q, k, v)
    first = slice(0, window)
    parts = [masked_attention(q[:, :, first], k[:, :, first], v[:, :, first])]
    chunk = max(1, -(-(T - window) // 3))
    row, column = torch.arange(chunk, device=q.device)[:, None], torch.arange(window + chunk, device=q.device)[None, :]
    mask = (column >= row) & (column <= row + window)                           # [chunk, window + chunk]
    for start in range(window, T, chunk):
        stop = min(start + chunk, T)
        keys = slice(start - window, stop)
        parts.append(masked_attention(
            q[:, :, start:stop], k[:, :, keys], v[:, :, keys], mask[: stop - start, : stop - start + window]))
    return torch.cat(parts, dim=2)


def ngram_rows(tokens, buckets):
    """Rows of the 2-gram, 3-gram, ... tables, which lie one below the other, by a hash: int64 [B, T] -> int64 [2, n, B, T].

    Each n-gram has two rows: first the one that this place in the text trains, by what stood further back, then the other.
    """
    def mixed(code):
        code = (code & 0xFFFFFFFF) * 1_640_531_527 & 0xFFFFFFFF                 # uint32 in int64: wraps around at 2^32
        return code ^ (code >> 15)

    code = earlier = tokens
    codes, rows, offset = [], [], 0
    for _ in range(max(NGRAM_OWN - 1, len(buckets))):
        earlier = F.pad(earlier[:, :-1], (1, 0))                                # [B, T]: one token further back
        code = (code * 1_000_003 + earlier + 1) & 0xFFFFFFFF
        codes.append(code)
    own = mixed(code) & 1                                                       # [B, T]
    own = torch.stack([own, 1 - own])                                           # [2, B, T]
    for size, code in zip(buckets, codes, strict=False):
        rows.append(offset + mixed(2 * code + own) % size)
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
        if has_ve(layer, config.n_layer):
            self.ve_gate = nn.Linear(min(VE_GATE_CHANNELS, C), config.n_head, bias=False)
        self._rope_base = config.rope_base

    def forward(self, x, ve, window):                                           # x [B, T, C], ve [B, T, C] or None
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = (c(x).reshape(B, T, H, D) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:  # value residual (ResFormer), gated per head by the first channels
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))   # [B, T, H]
            v = v + gate[..., None] * ve.reshape(B, T, H, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                        # [B, H, T, D]
        q, k = (norm(rope(t, self._rope_base)) for t in (q, k))
        y = attend(q, k, v, window).transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


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

    def forward(self, x, ve, window):
        x = x + self.attn(norm(x), ve, window)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        self.wte = nn.Embedding(V, C)
        if config.ngram_buckets:
            self.ngrams = nn.Embedding(sum(config.ngram_buckets), C)  # the tables one below the other
        self.value_embeds = nn.ModuleList(nn.Embedding(V, C) for i in range(L) if has_ve(i, L))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(L))
        self.lm_head = nn.Linear(C, V, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(L))
        self.x0_lambdas = nn.Parameter(torch.zeros(L))
        half = config.seq_len // 2
        letters = [config.window_pattern[i % len(config.window_pattern)] for i in range(L - 1)] + ["L"]
        self._windows = [config.seq_len if letter == "L" else half for letter in letters]

    @torch.no_grad()
    def init_weights(self, seed):
        """Upstream's: matrices uniform with the spread of 1/sqrt(width), output projections and gates 0, n-grams 0."""
        generator = torch.Generator().manual_seed(seed)  # the CPU's, so that a seed means the same on every device
        s = 3**0.5 * self.config.n_embd**-0.5
        for name, p in self.named_parameters():
            if name == "wte.weight":
                p.copy_(torch.randn(p.shape, generator=generator))
            elif name == "lm_head.weight":
                p.copy_(0.001 * torch.randn(p.shape, generator=generator))
            elif name == "x0_lambdas":
                p.fill_(0.1)
            elif name == NGRAMS or name.endswith(("c_proj.weight", "ve_gate.weight")):
                p.zero_()
            elif name != "resid_lambdas":
                p.copy_(s * (2 * torch.rand(p.shape, generator=generator) - 1))

    def embed_ngrams(self, tokens, table, again=False):
        """Sum of the hashed n-gram embeddings, from table [R, C]: int64 [B, T] -> fp32 [B, T, C]; and the rows to train, [n, B, T].

        again: of text that was read before its own rows know what comes; so the sum is of the others, and None is trained.
        """
        rows = ngram_rows(tokens, self.config.ngram_buckets)                    # [2, n, B, T]
        seen = rows[1] if again else rows.reshape(-1, *tokens.shape)            # [n or 2n, B, T]
        return sum(F.embedding(one, table).float() for one in seen), None if again else rows[0]

    def features(self, tokens, ngrams=None, hidden=None):
        """What lm_head reads: int64 [B, T] -> [B, T, C] in DTYPE. A step hands in ngrams [B, T, C] and hidden, dropout's share."""
        if ngrams is None and self.config.ngram_buckets:
            ngrams, _ = self.embed_ngrams(tokens, self.ngrams.weight)           # [B, T, C]
        x = self.wte(tokens) if ngrams is None else self.wte(tokens) + ngrams   # [B, T, C]; tables are fp32
        x = x0 = dropout(norm(x.to(DTYPE)), hidden)
        resid, skip = self.resid_lambdas.to(x.dtype), self.x0_lambdas.to(x.dtype)
        value_embeds = iter(self.value_embeds)
        for i, block in enumerate(self.blocks):
            ve = next(value_embeds)(tokens).to(x.dtype) if has_ve(i, len(self.blocks)) else None
            x = block(resid[i] * x + skip[i] * x0, ve, self._windows[i])
        return dropout(norm(x), hidden)

    def forward(self, tokens, targets=None, ngrams=None, hidden=None):          # int64 [B, T] -> fp32 logits [B, T, V]
        x, cap = self.features(tokens, ngrams, hidden), self.config.softcap
        if targets is None:
            return head(x, self.lm_head.weight, cap)
        return head_loss(x, self.lm_head.weight, targets, cap)  # the loss: functional_call reaches nothing but forward

    def flops_per_token(self, seq_len):
        """Forward and backward: 6 a matrix weight, 12 a channel and visible token of attention (upstream's count)."""
        weights = sum(p.numel() for name, p in self.named_parameters() if is_matrix(name) or name == "lm_head.weight")
        return 6 * weights + sum(12 * self.config.n_embd * min(w, seq_len) for w in self._windows)


def head(x, weight, softcap):                                                   # x [..., C], weight [V, C] -> fp32 [..., V]
    logits = (x @ weight.T).float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def cross_entropy(logits, targets):
    """Nats of every token: logits fp32 [N, V], targets int64 [N] -> fp32 [N]."""
    return F.cross_entropy(logits, targets, reduction="none")


def head_loss(x, weight, targets, softcap):
    """Mean cross entropy in nats. x [B, T, C], lm_head's weight [V, C], targets int64 [B, T].

    Beyond LOSS_TOKENS it goes chunk by chunk, each with its logits made again for their gradient, so that none are kept.
    """
    def total(x, weight, targets):
        return cross_entropy(head(x, weight, softcap), targets).sum()

    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)                # [N, C], [N]
    if len(targets) <= LOSS_TOKENS:
        return total(x, weight, targets) / len(targets)
    loss = 0.0
    for chunk, goals in zip(x.split(LOSS_TOKENS), targets.split(LOSS_TOKENS), strict=True):
        loss = loss + checkpoint(total, chunk, weight, goals, use_reentrant=False, preserve_rng_state=False)
    return loss / len(targets)


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
    x = g.to(DTYPE)
    x = x / (torch.sqrt(torch.sum(torch.square(g), dim=(1, 2), keepdim=True)) * 1.02 + 1e-6).to(DTYPE)
    tall = g.shape[1] > g.shape[2]
    if tall:
        x = x.mT
    for a, b, c in POLAR_EXPRESS[:POLAR_STEPS]:
        A = x @ x.mT                                                            # [n, short, short]
        x = a * x + (b * A + c * (A @ A)) @ x
    return (x.mT if tall else x).float()


def muon(p, g, m, v, lr, momentum, weight_decay):
    """One Muon step on stacked matrices p, g, m [n, rows, cols]; v [n, rows, 1] or [n, 1, cols]. Returns p, m, v.

    Nesterov momentum, orthogonalisation, NorMuon's variance reduction (arXiv 2510.05491), cautious weight decay.
    """
    m = m + (1 - momentum) * (g - m)
    u = orthogonalize(g + momentum * (m - g))
    axis = 2 if p.shape[1] >= p.shape[2] else 1
    size = p.shape[axis]
    mean_square = torch.mean(torch.square(u), dim=axis, keepdim=True)
    norm_before = torch.sqrt(torch.sum(mean_square, dim=(1, 2), keepdim=True) * size)
    v = v + (1 - MUON_BETA2) * (mean_square - v)
    scale = torch.rsqrt(torch.clamp(v, min=1e-10))
    norm_after = torch.sqrt(torch.sum(mean_square * size * torch.square(scale), dim=(1, 2), keepdim=True))
    u = u * scale * (norm_before / torch.clamp(norm_after, min=1e-10))
    lr = lr * max(1.0, p.shape[1] / p.shape[2]) ** 0.5
    return p - lr * (u + weight_decay * p * (u * p >= 0)), m, v


def adamw(p, g, m, v, lr, betas, t):
    """One AdamW step without decay; t is the step's number, from 1. Returns p, m, v."""
    m = m + (1 - betas[0]) * (g - m)
    v = v + (1 - betas[1]) * (torch.square(g) - v)
    update = (m / (1 - betas[0] ** t)) / (torch.sqrt(v / (1 - betas[1] ** t)) + 1e-10)
    return p - lr * update, m, v


def adagrad_rows(table, v, rows, g, lr):
    """One Adagrad step, in place, of the rows that a batch looked up; no other row is touched or costs time. Returns table, v.

    table [R, C]; v [R], the sum of a row's mean squared gradients (Duchi et al., 2011; one number a row as in Gupta et al.,
    arXiv 1705.06066); rows [n, ...]; g [..., C], the gradient of the sum of n rows, the same for each of them.
    """
    rows, g = rows.reshape(len(rows), -1), g.reshape(-1, g.shape[-1])           # [n, N], [N, C]
    mean_square = torch.mean(torch.square(g), dim=-1)                           # [N]
    for one in rows:
        v.index_add_(0, one, mean_square)
    for one in rows:
        scale = lr * torch.rsqrt(v[one] + 1e-20)                                # [N]
        table.index_add_(0, one, -scale[:, None] * g)
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
    """Of every batched Muon step: key of its moments, names of its matrices, which have one shape."""
    groups = {}
    for name, p in params.items():
        if is_matrix(name):
            groups.setdefault(f"muon.{p.shape[0]}x{p.shape[1]}", []).append(name)
    return groups.items()


def init_optimizer(params):
    """Moments for {name: tensor}: a pair a shape for Muon, a number a row for Adagrad, a pair a parameter for AdamW."""
    state = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in params.items() if not is_matrix(n) and n != NGRAMS}
    if NGRAMS in params:
        state[NGRAMS] = (params[NGRAMS].new_zeros(len(params[NGRAMS])),)
    for key, names in matrix_groups(params):
        n, (rows, cols), zeros = len(names), params[names[0]].shape, params[names[0]].new_zeros
        state[key] = zeros(n, rows, cols), zeros(n, rows, 1) if rows >= cols else zeros(n, 1, cols)
    return state


@torch.no_grad()
def update(params, grads, state, rates, width, rows=None):
    """One optimizer step over {name: tensor}. rates: a tensor that schedule() made.

    The gradient at NGRAMS is [B, T, C], that of the looked-up rows [n, B, T]; without one the tables stay, with one
    they and their moment change in place.
    """
    lr, momentum, weight_decay, t = (rates[i] for i in range(4))
    new, moments = dict(params), dict(state)
    for key, names in matrix_groups(params):
        p, g = (torch.stack([tree[n] for n in names]) for tree in (params, grads))  # [n, rows, cols]
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
    tensor, fp32 [5]: a number would be compiled anew."""
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
    return torch.tensor([lr, (1 - risen) * first + risen * last, WEIGHT_DECAY * (1 - progress), step + 1.0,
                         (0.0, *DROPOUT)[min(reading, len(DROPOUT))]])


# ---------------------------------------------------------------------------------------------------------------------
# Step: gradients and update; weights go in and come out, only the tables of n-grams change in place
# ---------------------------------------------------------------------------------------------------------------------


def to_device(t):
    """On CUDA without waiting for what the device does: pinned memory is copied behind it. On MPS that corrupts data."""
    return t.contiguous().pin_memory().to(DEVICE, non_blocking=True) if DEVICE == "cuda" else t.to(DEVICE)


def make_gradients(model, again=False):
    """Returns gradients(params, rates, x, y) -> loss, {name: gradient}, rows of n-grams, for int64 x and y [B, T].

    again: of text that was read before. There is dropout, and of an n-gram the row is seen that this place didn't train.
    """
    def loss_fn(params, x, y, hidden, ngrams):                                  # ngrams [B, T, C] or None
        cast = {n: p.to(DTYPE) if is_matrix(n) or n == "lm_head.weight" else p for n, p in params.items()}
        return functional_call(model, cast, (x, y, ngrams, hidden))

    forward = compiled(loss_fn)

    def gradients(params, rates, x, y):
        leaves = {n: p.detach().requires_grad_() for n, p in params.items() if n != NGRAMS}
        ngrams, rows = model.embed_ngrams(x, params[NGRAMS], again) if NGRAMS in params else (None, None)
        inputs = dict(leaves)
        if rows is not None:
            leaves[NGRAMS] = ngrams.requires_grad_()  # the gradient is their sum's: the table's would be as large as it
        loss = forward(inputs, x, y, rates[4] if again else None, ngrams)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        grads = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), found, strict=True)}
        return loss.detach(), grads, rows

    return gradients


def make_step(model, width, accumulate, again=False):
    """Returns step(params, state, rates, batches) -> params, state, loss for {name: tensor} dicts in fp32."""
    gradients, apply = make_gradients(model, again), compiled(update)

    def step(params, state, rates, batches):
        total, loss, found, rates = {}, 0.0, [], to_device(rates)
        for _ in range(accumulate):
            x, y = (to_device(torch.from_numpy(tokens)).long() for tokens in next(batches))  # [B, T]
            one, grads, rows = gradients(params, rates, x, y)
            loss = loss + one / accumulate
            if rows is not None:
                found.append((rows, grads.pop(NGRAMS) / accumulate))
            for n, g in grads.items():
                total[n] = g if accumulate == 1 else total.get(n, 0.0) + g / accumulate
        dense, dense_state = ({n: t for n, t in tree.items() if n != NGRAMS} for tree in (params, state))
        new, moments = apply(dense, total, dense_state, rates, width)
        if found:  # the passes' rows side by side, as one large batch has them; not compiled, for any size of tables
            rows, grads = torch.cat([rows for rows, _ in found], dim=1), torch.cat([g for _, g in found])
            table, sums = update({NGRAMS: params[NGRAMS]}, {NGRAMS: grads}, {NGRAMS: state[NGRAMS]}, rates, width, rows)
            new, moments = new | table, moments | sums
        return params | new, state | moments, loss

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Loop
# ---------------------------------------------------------------------------------------------------------------------


def synchronize():
    """Wait for the device."""
    if GPU:
        getattr(torch, DEVICE).synchronize()


def later(loss):
    """A function that waits for this loss only. `loss.item()` waits for every step begun since; MPS knows no better."""
    if DEVICE != "cuda":
        return loss.item
    host, done = torch.empty((), pin_memory=True), torch.cuda.Event()
    host.copy_(loss, non_blocking=True)
    done.record()
    return lambda: (done.synchronize(), host.item())[1]


def peak_memory():
    """The most bytes used so far: of the device; on MPS, what its driver holds now; on the CPU, of this process."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    if DEVICE == "mps":
        return torch.mps.driver_allocated_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def large_product():
    """A large matrix product on this device, as a callable that does it once, and its FLOPs: what MFU and drift are told by."""
    n = 4096 if GPU else 1024
    a = torch.randn(n, n, device=DEVICE).to(DTYPE)
    return lambda: (a @ a, synchronize()), 2 * n**3


def memory_limit():
    """Bytes that tensors may take on this device."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return torch.mps.recommended_max_memory() if GPU else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name():
    names = {"cuda": torch.cuda.get_device_name, "mps": getattr(torch.backends.mps, "get_name", platform.machine)}
    return f"{names.get(DEVICE, platform.machine)()} {DEVICE} torch".replace("/", " ")


def held_bytes(depth, vocab_size):
    """Bytes of the weights and moments of a model of another depth, as wide in proportion; of shapes alone, none is made."""
    width = WIDTH if depth == DEPTH else -(-WIDTH * depth // (DEPTH * HEAD_DIM)) * HEAD_DIM
    with torch.device("meta"):
        params = dict(GPT(GPTConfig(vocab_size, SEQ_LEN, depth, width // HEAD_DIM or 1, width)).named_parameters())
    return sum(t.nbytes for moments in (params.values(), *init_optimizer(params).values()) for t in moments)


def copied(params, state):
    """Both with n-gram tables of their own, for a step whose results are thrown away: it changes those in place."""
    if NGRAMS not in params:
        return params, state
    return params | {NGRAMS: params[NGRAMS].clone()}, state | {NGRAMS: tuple(t.clone() for t in state[NGRAMS])}


def dummy_step(params, state, step_fn, rows, seq_len):
    """Seconds of a step on dummy data, by passes of so many rows. It works on copies, as a step may overwrite what it gets."""
    copies = copied(params, state)
    x = torch.zeros(rows, seq_len, dtype=torch.int32).numpy()
    synchronize()
    start = time.perf_counter()
    step_fn(*copies, schedule(0, 0), repeat((x, x)))
    synchronize()
    return time.perf_counter() - start


def expected_memory(model, params, state, step_fn, rows, seq_len, passes):
    """Peak bytes of a step of so many rows, by the passes it is cut into, measured on the model as it stands; None: unknown.

    MPS: from gradients of an eighth and a quarter of a pass, and a step with one row in each; its driver keeps what was freed.
    CUDA: from a step as it will be, whatever passes are asked for, as any other number would be compiled for half a minute;
    what doesn't fit fails here. The CPU: None, for a process's peak can't be reset, and it holds more than tensors.
    """
    if DEVICE == "cpu":
        return None

    def peak(work):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            torch.mps.empty_cache()
        work()
        synchronize()
        return peak_memory()

    def one_step(n):
        copies = sum(t.nbytes for t in (params[NGRAMS], *state[NGRAMS])) if NGRAMS in params else 0
        return peak(lambda: dummy_step(params, state, step_fn, n, seq_len)) - copies

    def gradients(n):
        x = torch.zeros(n, seq_len, dtype=torch.int64, device=DEVICE)
        return peak(lambda: make_gradients(model)(params, None, x, x))

    if DEVICE == "cuda":
        try:
            whole = one_step(rows // passes)
        except torch.OutOfMemoryError as error:
            raise HarnessError("oom", f"{error}; try MICRO_TOKENS = {max(1, rows // passes // 2) * seq_len}") from error
        return lambda n: whole
    few, more = max(1, rows // passes // 8), max(2, rows // passes // 4)
    low, high, floor = gradients(few), gradients(more), one_step(1)
    a_row = (high - low) / (more - few)
    kept = sum(p.nbytes for name, p in params.items() if name != NGRAMS)        # sums of gradients, fp32
    kept += 4 * rows * seq_len * params[NGRAMS].shape[1] if NGRAMS in params else 0  # every pass's, of n-grams
    return lambda n: max(floor, high + a_row * (rows // n - more) + (kept if n > 1 else 0))


def build(run, accumulate):
    """A fresh model, its weights and moments as {name: tensor}, and its steps: of a first reading of the text, of later ones."""
    model = GPT(GPTConfig(vocab_size=run.vocab_size, seq_len=run.seq_len)).to(DEVICE)
    model.init_weights(run.seed)
    torch.manual_seed(run.seed)
    params = {n: p.detach() for n, p in model.named_parameters()}
    steps = [make_step(model, model.config.n_embd, accumulate, again) for again in (False, True)]
    return model, params, init_optimizer(params), steps


def train(run):
    """Train until the budget is used, then save. Returns what train.json records."""
    seq_len = min(SEQ_LEN, run.seq_len)
    rows = max(1, BATCH_TOKENS // seq_len)
    least = math.ceil(rows * seq_len / MICRO_TOKENS)
    passes = next((n for n in range(least, rows) if rows % n == 0), rows)  # forward and backward, of a step: of equal size
    a_pass, batch_tokens = rows // passes, rows * seq_len
    product, product_flops = large_product()
    peak_rate, gemm = peak_flops(device_name(), product, product_flops)
    limit = memory_limit()
    held = partial(held_bytes, vocab_size=run.vocab_size)
    check_weights(held, DEPTH, limit)

    model, params, state, step_fns = build(run, passes)
    expected = expected_memory(model, params, state, step_fns[0], rows, seq_len, passes)
    check_memory(expected, passes, a_pass, seq_len, limit, held, DEPTH)
    seconds = min(dummy_step(params, state, step_fns[0], a_pass, seq_len) for _ in range(4))  # the first may compile
    reads = expected_epochs(run.budget, seconds, batch_tokens, run.train_tokens)
    if reads > 0.8:
        dummy_step(params, state, step_fns[1], a_pass, seq_len)  # so that it compiles now
    config, num_params = model.config, sum(p.numel() for p in params.values())
    flops, expected_mb = model.flops_per_token(seq_len), expected and expected(passes) / 2**20
    print(f"{TIER}: {device_name()}, matrix products at {gemm / 1e12:.2f} TFLOP/s; {num_params / 1e6:.2f} M parameters, depth "
          f"{config.n_layer}, width {config.n_embd}, n-gram tables {config.ngram_buckets}; {batch_tokens:,} tokens a step in rows "
          f"of {seq_len}, {flops / 1e6:.2f} MFLOPs a token; expected: to read the text {reads:.2g} times, "
          f"{f'{expected_mb:,.0f} MB' if expected else 'unknown memory'} at the peak", flush=True)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()

    batches = run.batches(a_pass, seq_len)
    step, pending = 0, None
    run.budget.start(product)
    meter = Progress(run, batch_tokens, flops, peak_rate, ABORT_LOSS)
    while (progress := run.budget.progress(step, step * batch_tokens)) < 1:
        reading = step * batch_tokens // run.train_tokens
        rates = schedule(progress, step, reading)
        params, state, loss = step_fns[reading > 0](params, state, rates, batches)
        loss = later(loss)
        if pending is not None:  # the loss of the step before: reading this one's would idle the device
            meter.take(pending())
        pending, step = loss, step + 1
        meter.tell(rates[0].item, peak_memory)
    synchronize()
    training_seconds = run.budget.seconds
    if pending is None:
        raise HarnessError("timeout", "the budget was over before the first step; give it more")
    meter.take(pending())
    meter.tell(rates[0].item, peak_memory)
    print()
    saved = {n: p.cpu().bfloat16() if n == NGRAMS else p.cpu() for n, p in params.items()}  # half of what is most of the file
    torch.save(saved, run.dir / "weights.pt")
    (run.dir / "config.json").write_text(json.dumps(asdict(config)))
    tokens = step * batch_tokens
    return {"training_seconds": training_seconds, "num_steps": step, "total_tokens": tokens, "num_params": num_params,
            "depth": config.n_layer, "peak_vram_mb": peak_memory() / 2**20, "expected_vram_mb": expected_mb,
            "mfu_percent": 100 * tokens * flops / training_seconds / peak_rate, "gemm_tflops": gemm / 1e12, "device": device_name()}


def load_model(run_dir):
    """The trained model as logits(tokens): int32 [B, T] numpy -> float32 [B, T, vocab] numpy. The scorer calls this."""
    run_dir = Path(run_dir)
    model = GPT(GPTConfig(**json.loads((run_dir / "config.json").read_text())))
    weights = torch.load(run_dir / "weights.pt", map_location="cpu", weights_only=True)  # tensors only, no pickled code
    model.load_state_dict({n: p.to(DTYPE) if is_matrix(n) or n == "lm_head.weight" else p for n, p in weights.items()}, assign=True)
    model.to(DEVICE)

    @torch.inference_mode()
    def forward(tokens):  # not compiled: that takes longer than scoring does
        return model(torch.tensor(tokens, dtype=torch.int64, device=DEVICE)).cpu().numpy()

    return forward


if __name__ == "__main__":
    with start_run(__file__) as run:
        run.finish(**train(run))
