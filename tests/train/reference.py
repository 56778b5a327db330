"""
Upstream's GPT and optimizer in NumPy float64, written to be read and to be compared with; far too slow to train.

Every operation returns its value and a function which takes the gradient of that value to the gradients of what went
in, so that the backward pass stands right under the forward pass it belongs to. `tests/train/test_reference.py` shows that
this file is right; the train files are then compared with it from the same weights.

What differs from upstream on purpose: upstream rounds to bfloat16 (activations, rotary tables, Muon's iterations),
which is a choice of precision and not of model. Not covered: targets of -1, which upstream ignores and never makes.

Shapes: B batch, T time, C n_embd, H query heads, K key/value heads, G = H / K, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Params = dict[str, Array]

# ----------------------------------------------------------------------------------------------------------------------
# Configuration
# ----------------------------------------------------------------------------------------------------------------------

GATE_CHANNELS = 32      # a value gate reads this many channels of its layer's input


@dataclass(frozen=True)
class Config:
    vocab_size: int = 32768
    seq_len: int = 2048
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"                    # repeated over the layers; the last layer is always L
    softcap: float = 15.0
    eps: float = float(np.finfo(np.float32).eps)    # of the norm; torch's own default is that of the input's dtype
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head or self.head_size % 2:
            raise ValueError(f"heads do not divide: {self}")
        if self.n_embd < GATE_CHANNELS:
            raise ValueError(f"n_embd {self.n_embd} is less than the {GATE_CHANNELS} channels a value gate reads")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


def window(config: Config, layer: int) -> int:
    """How far back a query sees: W means the W keys before its own and its own, W + 1 in all."""
    kind = config.window_pattern[layer % len(config.window_pattern)].upper()
    if kind == "L" or layer == config.n_layer - 1:
        return config.seq_len
    return config.seq_len // 2


def has_value_embedding(config: Config, layer: int) -> bool:
    """Every other layer, counted so that the last one has it."""
    return (config.n_layer - 1 - layer) % 2 == 0


# ----------------------------------------------------------------------------------------------------------------------
# Parameters
# ----------------------------------------------------------------------------------------------------------------------


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    V, C, kv = config.vocab_size, config.n_embd, config.n_kv_head * config.head_size
    table: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, C)}
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        table[f"{block}.attn.c_q.weight"] = (C, C)
        table[f"{block}.attn.c_k.weight"] = (kv, C)
        table[f"{block}.attn.c_v.weight"] = (kv, C)
        table[f"{block}.attn.c_proj.weight"] = (C, C)
        if has_value_embedding(config, i):
            table[f"{block}.attn.ve_gate.weight"] = (config.n_kv_head, GATE_CHANNELS)
        table[f"{block}.mlp.c_fc.weight"] = (4 * C, C)
        table[f"{block}.mlp.c_proj.weight"] = (C, 4 * C)
    table["lm_head.weight"] = (V, C)
    table["resid_lambdas"] = (config.n_layer,)
    table["x0_lambdas"] = (config.n_layer,)
    for i in range(config.n_layer):
        if has_value_embedding(config, i):
            table[f"value_embeds.{i}.weight"] = (V, kv)
    return table


def random_params(config: Config, seed: int) -> Params:
    """Weights with nothing special about them. Upstream starts many at zero, where gradients vanish and tests sleep."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes(config).items():
        draw = rng.standard_normal(shape)
        if name == "resid_lambdas":
            params[name] = 1.0 + 0.1 * draw
        elif name == "x0_lambdas":
            params[name] = 0.3 + 0.1 * draw
        elif name == "lm_head.weight":
            params[name] = draw * 5.0 * shape[1] ** -0.5    # logits of about 5: the softcap bends them
        elif name.startswith("transformer.h."):
            params[name] = draw * shape[1] ** -0.5          # keeps the size of what it multiplies
        else:
            params[name] = draw                             # the embeddings
    return params


# ----------------------------------------------------------------------------------------------------------------------
# Operations: value and backward function
# ----------------------------------------------------------------------------------------------------------------------


def embed(table: Array, tokens: Array) -> tuple[Array, Callable]:
    def back(dy: Array) -> Array:
        d_table = np.zeros_like(table)
        np.add.at(d_table, tokens, dy)      # a token that occurs twice collects twice
        return d_table

    return table[tokens], back


def linear(x: Array, weight: Array) -> tuple[Array, Callable]:
    def back(dy: Array) -> tuple[Array, Array]:
        rows_in, rows_out = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return dy @ weight, rows_out.T @ rows_in    # [..., in], [out, in]

    return x @ weight.T, back                       # [..., out]


def rms_norm(x: Array, eps: float) -> tuple[Array, Callable]:
    inverse = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)  # [..., 1]
    y = x * inverse

    def back(dy: Array) -> Array:
        return inverse * (dy - y * np.mean(dy * y, axis=-1, keepdims=True))

    return y, back


def rotate(x: Array, base: float) -> tuple[Array, Callable]:
    """Turns channel pair (c, c + D/2) of position t by -t * base ** (-2c/D). x is [B, T, heads, D]."""
    T, half = x.shape[1], x.shape[3] // 2
    angle = np.outer(np.arange(T), base ** (-np.arange(half) / half))       # [T, D/2]
    turn = np.exp(-1j * angle)[:, None, :]                                  # [T, 1, D/2]

    def turned(z: Array, by: Array) -> Array:
        pairs = (z[..., :half] + 1j * z[..., half:]) * by
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def back(dy: Array) -> Array:
        return turned(dy, turn.conj())

    return turned(x, turn), back


def attention(q: Array, k: Array, v: Array, window: int) -> tuple[Array, Callable]:
    """Causal, over keys t - window .. t. q is [B, T, H, D]; k and v are [B, T, K, D], each shared by G query heads."""
    B, T, H, D = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, D)                                       # [B, T, K, G, D]
    age = np.arange(T)[:, None] - np.arange(T)[None, :]                     # [query, key]
    seen = (age >= 0) & (age <= window)
    scores = np.where(seen, np.einsum("btkgd,bskd->bkgts", q, k) * D**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)                          # [B, K, G, T, T]
    y = np.einsum("bkgts,bskd->btkgd", weights, v)

    def back(dy: Array) -> tuple[Array, Array, Array]:
        dy = dy.reshape(B, T, K, H // K, D)
        d_weights = np.einsum("btkgd,bskd->bkgts", dy, v)
        d_scores = weights * (d_weights - np.sum(weights * d_weights, axis=-1, keepdims=True)) * D**-0.5
        dq = np.einsum("bkgts,bskd->btkgd", d_scores, k).reshape(B, T, H, D)
        dk = np.einsum("bkgts,btkgd->bskd", d_scores, q)
        dv = np.einsum("bkgts,btkgd->bskd", weights, dy)
        return dq, dk, dv

    return y.reshape(B, T, H, D), back


def gated(v: Array, table_row: Array, gate: Array) -> tuple[Array, Callable]:
    """v + 2 sigmoid(gate) * value embedding, one gate a head. v and table_row are [B, T, K, D], gate is [B, T, K]."""
    open_ = 1.0 / (1.0 + np.exp(-gate))

    def back(dy: Array) -> tuple[Array, Array, Array]:
        d_gate = 2.0 * open_ * (1.0 - open_) * np.sum(dy * table_row, axis=-1)
        return dy, 2.0 * open_[..., None] * dy, d_gate

    return v + 2.0 * open_[..., None] * table_row, back


def relu_squared(x: Array) -> tuple[Array, Callable]:
    positive = np.maximum(x, 0.0)

    def back(dy: Array) -> Array:
        return 2.0 * positive * dy

    return positive**2, back


def soft_capped(x: Array, cap: float) -> tuple[Array, Callable]:
    squashed = np.tanh(x / cap)

    def back(dy: Array) -> Array:
        return dy * (1.0 - squashed**2)

    return cap * squashed, back


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Callable]:
    """Mean over all positions, in nats. logits are [B, T, V], targets [B, T]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    at_target = np.take_along_axis(log_probs, targets[..., None], axis=-1)  # [B, T, 1]

    def back() -> Array:
        one_hot = np.arange(logits.shape[-1]) == targets[..., None]
        return (np.exp(log_probs) - one_hot) / targets.size

    return float(-at_target.mean()), back


# ----------------------------------------------------------------------------------------------------------------------
# Layers: made of operations; their backward functions write weight gradients into `grads`
# ----------------------------------------------------------------------------------------------------------------------


def attention_layer(params: Params, config: Config, layer: int, x: Array, tokens: Array) -> tuple[Array, Callable]:
    B, T, C = x.shape
    D = config.head_size
    name = f"transformer.h.{layer}.attn"
    q, q_back = linear(x, params[f"{name}.c_q.weight"])                     # [B, T, H*D]
    k, k_back = linear(x, params[f"{name}.c_k.weight"])                     # [B, T, K*D]
    v, v_back = linear(x, params[f"{name}.c_v.weight"])                     # [B, T, K*D]
    q, k, v = (z.reshape(B, T, -1, D) for z in (q, k, v))
    with_value_embedding = has_value_embedding(config, layer)
    if with_value_embedding:
        row, row_back = embed(params[f"value_embeds.{layer}.weight"], tokens)                       # [B, T, K*D]
        gate, gate_back = linear(x[..., :GATE_CHANNELS], params[f"{name}.ve_gate.weight"])          # [B, T, K]
        v, gated_back = gated(v, row.reshape(v.shape), gate)
    q, q_turn_back = rotate(q, config.rope_base)
    k, k_turn_back = rotate(k, config.rope_base)
    q, q_norm_back = rms_norm(q, config.eps)
    k, k_norm_back = rms_norm(k, config.eps)
    y, attention_back = attention(q, k, v, window(config, layer))           # [B, T, H, D]
    out, proj_back = linear(y.reshape(B, T, C), params[f"{name}.c_proj.weight"])

    def back(d_out: Array, grads: Params) -> Array:
        dy, grads[f"{name}.c_proj.weight"] = proj_back(d_out)
        dq, dk, dv = attention_back(dy)
        dq = q_turn_back(q_norm_back(dq))
        dk = k_turn_back(k_norm_back(dk))
        dx = np.zeros_like(x)
        if with_value_embedding:
            dv, d_row, d_gate = gated_back(dv)
            grads[f"value_embeds.{layer}.weight"] = row_back(d_row.reshape(B, T, -1))
            dx[..., :GATE_CHANNELS], grads[f"{name}.ve_gate.weight"] = gate_back(d_gate)
        for part, part_back, dz in (("c_q", q_back, dq), ("c_k", k_back, dk), ("c_v", v_back, dv)):
            dx_part, grads[f"{name}.{part}.weight"] = part_back(dz.reshape(B, T, -1))
            dx += dx_part
        return dx

    return out, back


def mlp_layer(params: Params, layer: int, x: Array) -> tuple[Array, Callable]:
    name = f"transformer.h.{layer}.mlp"
    hidden, fc_back = linear(x, params[f"{name}.c_fc.weight"])              # [B, T, 4C]
    hidden, relu_back = relu_squared(hidden)
    out, proj_back = linear(hidden, params[f"{name}.c_proj.weight"])        # [B, T, C]

    def back(d_out: Array, grads: Params) -> Array:
        d_hidden, grads[f"{name}.c_proj.weight"] = proj_back(d_out)
        dx, grads[f"{name}.c_fc.weight"] = fc_back(relu_back(d_hidden))
        return dx

    return out, back


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def gpt(params: Params, config: Config, tokens: Array) -> tuple[Array, Callable]:
    """Logits [B, T, V] of tokens [B, T], and the function from the logits' gradient to that of every parameter."""
    resid, skip = params["resid_lambdas"], params["x0_lambdas"]
    embedded, embed_back = embed(params["transformer.wte.weight"], tokens)  # [B, T, C]
    x0, x0_back = rms_norm(embedded, config.eps)
    x, blocks = x0, []
    for i in range(config.n_layer):
        entered = x
        x = resid[i] * entered + skip[i] * x0
        normed, norm1_back = rms_norm(x, config.eps)
        out, attention_back = attention_layer(params, config, i, normed, tokens)
        x = x + out
        normed, norm2_back = rms_norm(x, config.eps)
        out, mlp_back = mlp_layer(params, i, normed)
        x = x + out
        blocks.append((entered, norm1_back, attention_back, norm2_back, mlp_back))
    x, final_back = rms_norm(x, config.eps)
    raw, head_back = linear(x, params["lm_head.weight"])                    # [B, T, V]
    logits, cap_back = soft_capped(raw, config.softcap)

    def back(d_logits: Array) -> Params:
        grads = {"resid_lambdas": np.zeros_like(resid), "x0_lambdas": np.zeros_like(skip)}
        dx, grads["lm_head.weight"] = head_back(cap_back(d_logits))
        dx, d_x0 = final_back(dx), np.zeros_like(x0)
        for i in reversed(range(config.n_layer)):
            entered, norm1_back, attention_back, norm2_back, mlp_back = blocks[i]
            dx = dx + norm2_back(mlp_back(dx, grads))
            dx = dx + norm1_back(attention_back(dx, grads))
            grads["resid_lambdas"][i] = np.sum(dx * entered)
            grads["x0_lambdas"][i] = np.sum(dx * x0)
            d_x0 += skip[i] * dx
            dx = resid[i] * dx
        grads["transformer.wte.weight"] = embed_back(x0_back(d_x0 + dx))
        return {name: grads[name] for name in params}

    return logits, back


def forward(params: Params, config: Config, tokens: Array) -> Array:
    return gpt(params, config, tokens)[0]


def loss_and_grads(params: Params, config: Config, tokens: Array, targets: Array) -> tuple[float, Params]:
    logits, model_back = gpt(params, config, tokens)
    loss, loss_back = cross_entropy(logits, targets)
    return loss, model_back(loss_back())


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer: Muon for the matrices of the blocks, AdamW for the rest
# ----------------------------------------------------------------------------------------------------------------------

POLAR_EXPRESS = (       # (a, b, c) of each iteration's a X + b (X X') X + c (X X')² X
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
REFERENCE_WIDTH = 768   # the width at which upstream tuned AdamW's learning rates
ADAM_BETA2 = 0.95
ADAM_EPS = 1e-10
NORMUON_BETA2 = 0.95


@dataclass(frozen=True)
class LearningRates:
    """As upstream sets them, before the scaling by width."""

    embedding: float = 0.6
    unembedding: float = 0.004
    matrix: float = 0.04
    scalar: float = 0.5


def adamw_group(name: str, n_embd: int, rates: LearningRates) -> tuple[float, float]:
    """Learning rate and beta1 of a parameter that Muon does not train. The two kinds of scalars ignore the width."""
    by_width = (n_embd / REFERENCE_WIDTH) ** -0.5
    if name == "lm_head.weight":
        return rates.unembedding * by_width, 0.8
    if name == "transformer.wte.weight" or name.startswith("value_embeds."):
        return rates.embedding * by_width, 0.8
    if name == "resid_lambdas":
        return rates.scalar * 0.01, 0.8
    if name == "x0_lambdas":
        return rates.scalar, 0.96
    raise ValueError(f"no AdamW group for {name!r}")


def lerp(old: Array, new: Array, weight: float) -> Array:
    return old + weight * (new - old)


def orthogonalize(g: Array) -> Array:
    """Polar Express: the nearest semi-orthogonal matrix, to within the last iteration's coefficients."""
    wide = g.T if g.shape[0] > g.shape[1] else g                            # [rows <= columns]: the small Gram matrix
    x = wide / (np.linalg.norm(wide) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def reduce_variance(g: Array, second_momentum: Array) -> tuple[Array, Array]:
    """NorMuon: even out the rows of a tall matrix or the columns of a wide one, then restore the Frobenius norm.

    second_momentum is [rows, 1] or [1, columns]; it starts at zero and is not corrected for that, since the norm that
    is restored takes any common factor out.
    """
    axis = 1 if g.shape[0] >= g.shape[1] else 0
    second_momentum = lerp(second_momentum, np.mean(g * g, axis=axis, keepdims=True), 1.0 - NORMUON_BETA2)
    scaled = g / np.sqrt(np.maximum(second_momentum, 1e-10))
    return scaled * (np.linalg.norm(g) / max(np.linalg.norm(scaled), 1e-10)), second_momentum


def cautious_update(p: Array, g: Array, lr: float, weight_decay: float) -> Array:
    """Decay only the entries which the gradient step already moves towards zero."""
    agrees = g * p >= 0
    return p - lr * g - lr * weight_decay * p * agrees


class MuonAdamW:
    def __init__(self, config: Config, rates: LearningRates | None = None) -> None:
        self.config = config
        self.rates = rates or LearningRates()
        self.steps = 0
        self.state: dict[str, tuple[Array, Array]] = {}

    def step(
        self, params: Params, grads: Params, lr_multiplier: float, momentum: float, weight_decay: float
    ) -> None:
        """Puts new arrays into `params`; momentum and weight decay are Muon's, since AdamW's are constant and zero."""
        self.steps += 1
        for name in params:
            update = self._muon if name.startswith("transformer.h.") else self._adamw
            params[name] = update(name, params[name], grads[name], lr_multiplier, momentum, weight_decay)

    def _adamw(self, name: str, p: Array, g: Array, lr_multiplier: float, *_: float) -> Array:
        rate, beta1 = adamw_group(name, self.config.n_embd, self.rates)
        mean, square = self.state.get(name, (np.zeros_like(p), np.zeros_like(p)))
        mean, square = lerp(mean, g, 1.0 - beta1), lerp(square, g * g, 1.0 - ADAM_BETA2)
        self.state[name] = mean, square
        mean, square = mean / (1.0 - beta1**self.steps), square / (1.0 - ADAM_BETA2**self.steps)
        return p - rate * lr_multiplier * mean / (np.sqrt(square) + ADAM_EPS)

    def _muon(
        self, name: str, p: Array, g: Array, lr_multiplier: float, momentum: float, weight_decay: float
    ) -> Array:
        rows, columns = p.shape
        if name not in self.state:
            self.state[name] = np.zeros_like(p), np.zeros((rows, 1) if rows >= columns else (1, columns))
        buffer, second_momentum = self.state[name]
        buffer = lerp(buffer, g, 1.0 - momentum)
        g = lerp(g, buffer, momentum)                                       # Nesterov: look ahead by the new buffer
        g, second_momentum = reduce_variance(orthogonalize(g), second_momentum)
        self.state[name] = buffer, second_momentum
        lr = self.rates.matrix * lr_multiplier * max(1.0, rows / columns) ** 0.5
        return cautious_update(p, g, lr, weight_decay)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: progress is the fraction of the budget that is spent, 0 to 1; the first step is step 0
# ----------------------------------------------------------------------------------------------------------------------


def lr_multiplier(
    progress: float, warmup_ratio: float = 0.0, warmdown_ratio: float = 0.5, final_lr_frac: float = 0.0
) -> float:
    """Up from 0, flat at 1, down to `final_lr_frac`: three straight lines."""
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if progress < 1.0 - warmdown_ratio:
        return 1.0
    left = (1.0 - progress) / warmdown_ratio
    return left + (1.0 - left) * final_lr_frac


def muon_momentum(step: int) -> float:
    return 0.85 + 0.10 * min(step / 300, 1.0)


def muon_weight_decay(progress: float, initial: float = 0.2) -> float:
    return initial * (1.0 - progress)
