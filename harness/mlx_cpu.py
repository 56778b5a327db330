"""
`attention`, `cross_entropy` and `async_eval` for train_mlx.py: MLX's own functions on a GPU, faster replacements on a CPU.

MLX's CPU backend computes `exp` slowly (12 to 13 ms for a million elements on one x86-64 core, the version below 3 to 8 ms), and
attention and cross entropy spend most of their time in it. A stream of MLX computes everything but matrix products on one core, so
`async_eval` runs two gradient accumulation steps at once, each on its own stream. On a CPU, importing this module also switches
mx.compile off. On Linux it loads a fast BLAS as well, and lets malloc keep freed memory. MLX takes the BLAS only if it is loaded
first, so import this module before `mlx.core`.
"""

import ctypes
import math
import os
import sys

from harness.machine import load_fast_blas


def keep_freed_memory():
    """Let glibc's malloc reuse freed memory instead of returning it to the system, on Linux only.

    MLX's CPU backend frees every array at once, and the system clears new pages for the next large one. With a vocabulary of 8,192,
    this saves 28 to 39 % of a training step's time, and the process takes up to a quarter more memory.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never shrink the heap
        libc.mallopt(mmap_max, 0)  # large arrays too come from the heap: a mapping of their own would be returned when freed


load_fast_blas(threads=0.5)  # half of the cores, because each of two streams computes its own matrix products

import mlx.core as mx  # noqa: E402

if os.environ.get("AUTORESEARCH_DEVICE") == "cpu":  # a Mac or a GPU machine trains on its CPU, as a hosted runner has to
    mx.set_default_device(mx.cpu)
GPU = mx.default_device() == mx.Device(mx.gpu)
BAND = 128  # queries; smaller bands compute fewer scores, and need more and smaller matrix products
BLOCK = 2**19  # logits of a block of cross entropy; smaller blocks take less memory and more time
if not GPU:
    keep_freed_memory()
    # A graph wider than this is computed depth first: all of one stream's work would come before the other's
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")
    FIRST, SECOND = mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)
    mx.disable_compile()  # on the CPU it needs a C++ compiler for half a minute and saves a tenth of a step at best


@mx.custom_function
def exp(x):
    """e**x for fp32 x, clipped to +-87. Splits x * log2(e) into a whole part, which becomes the exponent bits, and a rest in
    [-0.5, 0.5], whose power of two is a Taylor polynomial of degree 6. Relative error below 2e-7."""
    x = mx.clip(x, -87, 87) * math.log2(math.e)
    biased = (x + 127.5).astype(mx.int32)                                       # whole part, rounded, plus fp32's bias of 127
    rest, power = x - (biased - 127).astype(mx.float32), 0.0
    for n in range(6, -1, -1):
        power = power * rest + math.log(2) ** n / math.factorial(n)
    return power * (biased << 23).view(mx.float32)


@exp.vjp
def exp_vjp(x, cotangent, out):
    return cotangent * out


def cpu_attention(q, k, v, *, scale, mask):
    """Causal attention for q, k, v [B, H, T, D]; same arguments as mx.fast.scaled_dot_product_attention, which gets other masks.

    Works in bands of BAND queries, so that most scores behind the causal mask are never computed.
    """
    if mask != "causal" or q.shape != k.shape:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    T, bands = q.shape[2], []
    for start in range(0, T, BAND):
        stop = min(start + BAND, T)
        seen = mx.arange(stop) <= mx.arange(start, stop)[:, None]               # [queries, keys]
        scores = ((q[:, :, start:stop] * scale) @ k[:, :, :stop].swapaxes(2, 3)).astype(mx.float32)  # [B, H, queries, keys]
        scores = scores + mx.where(seen, 0, -mx.inf)  # a sum, because `where` on all heads takes three times as long
        weights = exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True))) * seen  # exp clips, so it never gives 0
        bands.append((weights @ v[:, :, :stop] / weights.sum(axis=-1, keepdims=True)).astype(q.dtype))
    return mx.concatenate(bands, axis=2)


def cpu_cross_entropy(logits, targets):
    """Nats of every token: logits fp32 [..., V], targets int [...] -> fp32 [...]; same arguments as mx.fast.cross_entropy.

    Large logits are computed in blocks of rows, because the temporary arrays of `exp` would take several times their memory.
    """
    return plain_cross_entropy(logits, targets) if logits.size <= 2 * BLOCK else cross_entropy_by_block(logits, targets)


def plain_cross_entropy(logits, targets):
    """As cpu_cross_entropy, in one piece. The gradient reuses the forward pass's exponentials."""
    shifted = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))     # [..., V]
    chosen = mx.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]   # [...]
    return mx.log(exp(shifted).sum(axis=-1)) - chosen


@mx.custom_function
def cross_entropy_by_block(logits, targets):
    return by_block(plain_cross_entropy, mx.zeros(targets.shape), logits, targets)


@cross_entropy_by_block.vjp
def cross_entropy_by_block_vjp(primals, cotangent, _):
    """The gradient is the softmax of the logits, less 1 at the target. It computes the exponentials again."""
    def gradient(x, t, c):                                                      # [n, V], [n], [n] -> [n, V]
        e = exp(x - x.max(axis=-1, keepdims=True))
        return (e * (c[:, None] / e.sum(axis=-1, keepdims=True))).at[mx.arange(len(t)), t].add(-c)

    logits, targets = primals
    return by_block(gradient, mx.zeros_like(logits), logits, targets, cotangent), mx.zeros_like(targets)


def by_block(function, result, logits, *others):
    """Fill `result` with function(logits [n, V], *others [n]), n rows at a time. Each block waits for the one before it."""
    V, shape = logits.shape[-1], result.shape
    arrays = [logits.reshape(-1, V), *(a.reshape(-1) for a in others)]
    result, n = result.reshape(len(arrays[0]), *shape[others[0].ndim:]), max(1, BLOCK // V)
    for start in range(0, len(result), n):
        result[start:start + n] = function(*mx.depends([a[start:start + n] for a in arrays], [result]))
    return result.reshape(shape)


def cpu_async_eval(*trees):
    """Call this after each gradient accumulation step. Every second call starts two of them, each on its own stream.

    The first call of a pair starts nothing. It makes SECOND the default stream, where the next accumulation step is built. So the
    second call must be given the results of both, for example their sum. After an odd number of calls the next one ends a pair.
    """
    stream = mx.default_stream(mx.cpu)
    if stream == FIRST:
        mx.set_default_stream(SECOND)
    else:
        if stream == SECOND:  # another thread has a stream of its own, and there this is mx.async_eval
            mx.set_default_stream(FIRST)
        mx.async_eval(*trees)


attention = mx.fast.scaled_dot_product_attention if GPU else cpu_attention
cross_entropy = mx.fast.cross_entropy if GPU else cpu_cross_entropy
async_eval = mx.async_eval if GPU else cpu_async_eval
