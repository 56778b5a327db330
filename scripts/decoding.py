"""Compute the logits of the next token, with a KV cache or without.

scripts/sample.py uses this module, and scripts/export.py copies it into every exported folder, so it imports nothing of this
project.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

LOCAL = 16  # tokens per pass with the cache: the new one and those before it, because n-gram tables look 7 tokens back
CHECKED = 4  # this many tokens are computed with and without the cache
TOLERANCE = {"cpu": 1e-3, "gpu": 0.05}  # nats, largest difference between both; a GPU computes in bfloat16, which is coarse


class Uncached:
    """Logits of the next token: int ids -> float64 [vocab], by a pass over the whole context for each token."""

    def __init__(self, logits_of: Callable, context: int):
        self.logits_of, self.context = logits_of, context

    def __call__(self, ids: list[int]) -> np.ndarray:
        window = ids[-self.context :]
        row = np.zeros((1, self.context), np.int32)  # always the same shape; a causal model ignores the padding behind the text
        row[0, : len(window)] = window
        return self.logits_of(row)[0, len(window) - 1].astype(np.float64)


class Cached(Uncached):
    """The same with a KV cache, for any model on MLX, including architectures that an agent has changed.

    A pass computes the last LOCAL tokens, so that n-grams, shifts and short convolutions see the tokens before the new one.
    During the pass, MLX's rope and attention are replaced: rope counts from the true position, and attention reads the cached
    keys and values of all earlier tokens. A model that mixes tokens in yet another way gives other logits with the cache than
    without. So the first CHECKED tokens are computed both ways. If the logits differ, or anything fails, the cache is not used
    any more (`used` is False).
    """

    def __init__(self, logits_of: Callable, context: int, module: object):
        import mlx.core as mx
        super().__init__(logits_of, context)
        self.mx, self.module = mx, module
        self.used, self.checks = True, CHECKED
        self.tolerance = TOLERANCE["cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"]
        self.layers: list[tuple] = []  # keys and values [1, H, T, D] of each call of attention in a pass
        self.known, self.start, self.call = 0, 0, 0  # tokens in the cache; this pass's first position, and its calls of attention
        self.rope, self.attention = mx.fast.rope, mx.fast.scaled_dot_product_attention

    def __call__(self, ids: list[int]) -> np.ndarray:
        if not self.used or len(ids) > self.context:  # beyond the context the window moves, and all cached positions are wrong
            return super().__call__(ids)
        try:
            logits = self._pass(ids)
        except Exception:
            self.used = False
            return super().__call__(ids)
        if self.start and self.checks:
            self.checks -= 1
            true = super().__call__(ids)
            self.used = bool(np.abs(logits - true).max() < self.tolerance)
            return true
        return logits

    def forget(self) -> None:
        """Empty the cache, because the tokens before the next one have changed."""
        self.layers, self.known = [], 0

    def _pass(self, ids: list[int]) -> np.ndarray:
        self.start = max(0, min(self.known, len(ids) - 1) - LOCAL + 1) if self.known else 0
        self.call, new = 0, len(ids) - self.known
        fast, held = self.mx.fast, {}
        for name, value in vars(self.module).items():  # names for attention that the train file imported, on a CPU from mlx_cpu
            if value is self.attention or getattr(value, "__name__", "") == "cpu_attention":
                held[name] = value
        try:
            fast.rope, fast.scaled_dot_product_attention = self._rope, partial(self._attention, new)
            for name in held:
                setattr(self.module, name, fast.scaled_dot_product_attention)
            logits = self.logits_of(np.array([ids[self.start :]], np.int32))[0, -1].astype(np.float64)
        finally:
            fast.rope, fast.scaled_dot_product_attention = self.rope, self.attention
            for name, value in held.items():
                setattr(self.module, name, value)
        if not self.layers:
            raise NotImplementedError("no attention was seen")
        self.known = len(ids)
        return logits

    def _rope(self, x, *args, offset=0, **more):
        return self.rope(x, *args, offset=offset + self.start, **more)

    def _attention(self, new: int, q, k, v, *, scale, mask=None, **more):
        if not isinstance(mask, str):
            raise NotImplementedError("a mask of its own")
        if self.start == 0 and self.known == 0:
            self.layers.append((k, v))
        else:
            old = self.layers[self.call]
            k, v = (self.mx.concatenate([a, b[:, :, -new:]], axis=2) for a, b in zip(old, (k, v), strict=True))
            self.layers[self.call] = k, v
        self.call += 1
        seen = self.mx.arange(k.shape[2]) <= self.start + self.mx.arange(q.shape[2])[:, None]   # [queries, keys]
        return self.attention(q, k, v, scale=scale, mask=seen, **more)
