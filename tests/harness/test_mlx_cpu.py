"""The functions of harness/mlx_cpu.py compute what MLX's own compute."""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from harness import mlx_cpu
from harness.mlx_cpu import BAND, GPU, cpu_async_eval, cpu_attention, cpu_cross_entropy, exp


def close(a: list[mx.array], b: list[mx.array], tolerance: float = 1e-5) -> bool:
    size = max(mx.linalg.norm(y).item() for y in b)
    return all(mx.linalg.norm(x - y).item() <= tolerance * size for x, y in zip(a, b, strict=True))


def test_exp_is_exp_and_so_is_its_gradient() -> None:
    x = mx.concatenate([mx.linspace(-87, 87, 10001), mx.array([0.0, 1e-8, -1e-8])])
    assert np.allclose(np.array(exp(x)), np.exp(np.array(x, np.float64)), rtol=1e-5, atol=0)
    near = mx.linspace(-5, 5, 1001)
    assert np.allclose(np.array(exp(near)), np.exp(np.array(near, np.float64)), rtol=5e-7, atol=0)
    assert mx.array_equal(mx.grad(lambda x: exp(x).sum())(x), exp(x))
    assert 0 < exp(mx.array(-1e4)).item() < 1e-37
    assert 1e37 < exp(mx.array(1e4)).item() < mx.inf
    assert mx.isnan(exp(mx.array(mx.nan))).item()


@pytest.mark.parametrize("size", [0.1, 30.0])  # 30: scores in the thousands, where exp overflows without the maximum taken off
@pytest.mark.parametrize("tokens", [1, 64, BAND - 1, BAND, BAND + 1, 2 * BAND + 22])
def test_attention_equals_mlx(tokens: int, size: float) -> None:
    q, k, v, w = (size * mx.random.normal((2, 3, tokens, 8), key=mx.random.key(i)) for i in range(4))
    ours, theirs = (mx.value_and_grad(lambda *qkv, f=f: (f(*qkv, scale=8**-0.5, mask="causal") * w).sum(), (0, 1, 2))(q, k, v)
                    for f in (cpu_attention, mx.fast.scaled_dot_product_attention))
    assert close([ours[0], *ours[1]], [theirs[0], *theirs[1]], 1e-4)


def test_attention_hands_other_masks_and_fewer_key_heads_to_mlx() -> None:
    q, k = mx.random.normal((1, 4, 9, 8)), mx.random.normal((1, 2, 9, 8))
    mask = mx.arange(9) <= mx.arange(9)[:, None]
    expected = mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask="causal")
    assert close([cpu_attention(q, k, k, scale=1.0, mask=mask)], [expected])
    assert close([cpu_attention(q, k, k, scale=1.0, mask="causal")], [expected])


@pytest.mark.parametrize("block", [1, 200, 2**20])  # logits: less than a row, three rows and a rest, all rows
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_cross_entropy_equals_mlx(monkeypatch: pytest.MonkeyPatch, size: float, block: int) -> None:
    monkeypatch.setattr(mlx_cpu, "BLOCK", block)
    logits, targets = size * mx.random.normal((2, 5, 61), key=mx.random.key(1)), mx.random.randint(0, 61, (2, 5))
    weights = mx.random.normal((2, 5), key=mx.random.key(2))                    # a gradient of its own for each token
    ours, theirs = (mx.value_and_grad(lambda x, f=f: (f(x, targets) * weights).sum())(logits)
                    for f in (cpu_cross_entropy, mx.fast.cross_entropy))
    assert close([ours[0]], [theirs[0]])
    assert close([ours[1]], [theirs[1]])
    assert cpu_cross_entropy(logits, targets).shape == (2, 5)


def test_cross_entropy_by_block_knows_impossible_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_cpu, "BLOCK", 8)
    logits, targets = mx.array([[1.0, 2.0, -mx.inf, 3.0]] * 3), mx.array([0, 2, 3])
    nats, gradient = cpu_cross_entropy(logits, targets), mx.grad(lambda x: cpu_cross_entropy(x, targets).sum())(logits)
    assert nats[1].item() == mx.inf
    assert mx.isfinite(gradient).all().item()


def test_cross_entropy_of_large_logits_takes_less_than_half_the_memory() -> None:
    logits, targets = mx.zeros((8192, 1024)), mx.zeros(8192, mx.int32)
    mx.eval(logits, targets)

    def peak(function: Callable) -> int:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda x: function(x, targets).sum())(logits))
        return mx.get_peak_memory() - before

    assert min(peak(cpu_cross_entropy) for _ in range(3)) < min(peak(mlx_cpu.plain_cross_entropy) for _ in range(3)) / 2


@pytest.mark.skipif(GPU, reason="one stream on a GPU")
def test_async_eval_starts_two_passes_at_once_on_two_streams_and_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started, used, total = [], [], mx.zeros(3)
    monkeypatch.setattr(mx, "async_eval", started.append)
    mx.set_default_stream(mlx_cpu.FIRST)  # an odd number of passes in another test leaves the second
    try:
        for i in range(5):  # the last one has no partner
            used.append(mx.default_stream(mx.cpu))
            total = total + mx.full(3, 10**i)
            cpu_async_eval(total)
            assert len(started) == (i + 1) // 2
        assert [stream == mlx_cpu.FIRST for stream in used] == [True, False, True, False, True]
        assert total.tolist() == [11111] * 3
    finally:
        mx.set_default_stream(mlx_cpu.FIRST)


@pytest.mark.skipif(GPU, reason="one stream on a GPU")
def test_async_eval_is_that_of_mlx_in_another_thread() -> None:
    def double() -> list[int]:
        total = mx.ones(2, mx.int32) * 2
        cpu_async_eval(total)
        return total.tolist()

    with ThreadPoolExecutor(1) as pool:
        assert [pool.submit(double).result() for _ in range(2)] == [[2, 2]] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc's malloc")
def test_a_freed_array_gives_its_memory_to_the_next() -> None:
    def page_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        mx.eval(mx.zeros(2**24) + 1)                                            # 64 MiB: 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    page_faults()
    assert min(page_faults() for _ in range(3)) < 1000
