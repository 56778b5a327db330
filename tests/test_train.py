"""train_mlx.py: the step that trains is the step that was written (compiled, windowed, accumulated or not)."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import train_mlx
from train_mlx import GPT, GPTConfig, adagrad_rows, attend, head_loss, init_optimizer, make_step, ngram_rows, schedule

ROOT, ON_A_GPU = Path(__file__).parent.parent, train_mlx.GPU
CONFIG = GPTConfig(vocab_size=61, seq_len=16, n_layer=3, n_head=2, n_embd=32, window_pattern="SL", ngram_buckets=(97, 101))


@pytest.fixture
def compiled() -> Iterator[None]:
    mx.enable_compile()
    yield
    if not ON_A_GPU:
        mx.disable_compile()


def fresh(seed: int = 3) -> tuple[GPT, dict[str, mx.array]]:
    model = GPT(CONFIG)
    model.init_weights(seed)
    params = dict(tree_flatten(model.parameters()))
    mx.eval(params)
    return model, params


def batches(rows: int, seed: int = 5) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    while True:
        block = rng.integers(0, CONFIG.vocab_size, (rows, CONFIG.seq_len + 1), dtype=np.int32)
        yield block[:, :-1], block[:, 1:]


def steps(n: int, rows: int = 4, accumulate: int = 1, again: bool = False) -> tuple[dict[str, mx.array], list[float]]:
    """Weights and losses after n steps; again: of the second, third, ... pass over a text, four steps each."""
    model, params = fresh()
    mx.random.seed(1)
    step, state, source, losses = make_step(model, CONFIG.n_embd, accumulate, again), init_optimizer(params), batches(rows), []
    for i in range(n):
        params, state, loss = step(params, state, schedule(i / n, i, again * (1 + i // 4)), source)
        losses.append(loss.item())
    return params, losses


def distance(a: dict[str, mx.array], b: dict[str, mx.array]) -> float:
    """The largest difference of two sets of weights, relative to each tensor's norm."""
    return max((mx.linalg.norm(a[n] - b[n]) / (mx.linalg.norm(b[n]) + 1e-6)).item() for n in a)


@pytest.mark.parametrize(("gpu", "again", "accumulate", "chunk"), [
    (False, False, 1, 64), (False, True, 4, 24), (True, True, 1, 24), (True, False, 4, 64)])
def test_compiled_step_equals_eager_step(
    compiled: None, monkeypatch: pytest.MonkeyPatch, gpu: bool, again: bool, accumulate: int, chunk: int
) -> None:
    """In one pass and in several, with the loss in one piece and in chunks, by this file's own kernels and by MLX's."""
    monkeypatch.setattr(train_mlx, "GPU", gpu)
    monkeypatch.setattr(train_mlx, "LOSS_TOKENS", chunk)
    with_compile, losses = steps(5, again=again, accumulate=accumulate)
    mx.disable_compile()
    without, eager_losses = steps(5, again=again, accumulate=accumulate)
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    assert distance(with_compile, without) < 1e-4
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_nothing_is_traced_again_over_a_whole_run(compiled: None, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    """As train() goes through it: a warm-up of both steps, a schedule that moves, a text that is read three times."""
    traces = {"cross_entropy": 0, "update": 0}
    for name in traces:
        original = getattr(train_mlx, name)

        def traced(*a, name=name, original=original):
            traces[name] += 1
            return original(*a)
        monkeypatch.setattr(train_mlx, name, traced)
    monkeypatch.setattr(train_mlx, "LANES", train_mlx.LANES[:1])  # as on a GPU; each lane has its own trace
    model, params = fresh()
    state, source = init_optimizer(params), batches(4)
    both = [make_step(model, CONFIG.n_embd, accumulate, again) for again in (False, True)]
    for step in both:
        train_mlx.dummy_step(params, state, step, 4, CONFIG.seq_len)
    for i in range(12):
        params, state, loss = both[i >= 4](params, state, schedule(i / 12, i, i // 4), source)
        mx.eval(params, state, loss)
    assert traces == {"cross_entropy": 2, "update": 2}  # once for each of the two steps


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_large_batch(parts: int) -> None:
    """By the moments, which are the gradients times a number; weights after one step would hardly know their size."""
    model, params = fresh()
    for i, name in enumerate(params):  # what is 0 at first would leave next to nothing of some gradients
        if name.endswith(("c_proj.weight", "lm_head.weight")):
            params[name] = 0.2 * mx.random.normal(params[name].shape, key=mx.random.key(i))
    whole = next(batches(8))
    pieces = zip(np.split(whole[0], parts), np.split(whole[1], parts), strict=True)
    _, at_once, loss = make_step(model, CONFIG.n_embd, 1)(params, init_optimizer(params), schedule(0, 0), iter([whole]))
    _, in_parts, part_loss = make_step(model, CONFIG.n_embd, parts)(params, init_optimizer(params), schedule(0, 0), pieces)
    assert part_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    moments = [{key: moment[0] for key, moment in state.items()} for state in (in_parts, at_once)]
    assert distance(*moments) < 1e-5
    assert all(mx.linalg.norm(moment).item() > 1e-6 for moment in moments[1].values())


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("T", "window"), [
    (16, 1), (16, 5), (16, 8), (16, 15), (16, 40), (150, 7), (150, 75), (150, 148), (150, 149)])
def test_a_window_equals_a_dense_mask(monkeypatch: pytest.MonkeyPatch, gpu: bool, T: int, window: int) -> None:
    """By hand, as on a CPU, and by MLX's own, as on a GPU."""
    monkeypatch.setattr(train_mlx, "GPU", gpu)
    q, k, v = (mx.random.normal((2, 3, T, 8), key=mx.random.key(i)) for i in range(3))
    t, s = mx.arange(T)[:, None], mx.arange(T)[None, :]

    def dense(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        mask = (s <= t) & (s >= t - window)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5, mask=mask)
    assert mx.abs(attend(q, k, v, window) - dense(q, k, v)).max().item() < 1e-5
    weights = mx.random.normal(q.shape, key=mx.random.key(9))
    ours, theirs = (mx.grad(lambda *a, f=f: (f(*a) * weights).sum(), argnums=(0, 1, 2))(q, k, v)
                    for f in (lambda q, k, v: attend(q, k, v, window), dense))
    assert max(mx.abs(a - b).max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-5


def test_warm_up_leaves_the_weights_as_they_were() -> None:
    model, params = fresh()
    before = {n: np.array(p) for n, p in params.items()}
    mx.eval(make_step(model, CONFIG.n_embd, 1)(params, init_optimizer(params), schedule(0, 0), batches(4)))
    assert all(np.array_equal(before[n], np.array(p)) for n, p in params.items())


def test_a_table_is_not_held_twice_in_a_step() -> None:
    """Its buffer is donated: the new table takes the place of the old one, as train() holds both."""
    config = GPTConfig(vocab_size=61, seq_len=16, n_layer=1, n_head=1, n_embd=32, ngram_buckets=(1 << 16, 1 << 16))
    model = GPT(config)
    params = dict(tree_flatten(model.parameters()))
    state, step, source = init_optimizer(params), make_step(model, 32, 1), batches(4)
    mx.eval(params, state)
    model.ngrams.weight = mx.zeros((0,))
    table = params[train_mlx.NGRAMS].nbytes
    assert table == 16 << 20
    for i in range(3):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        params, state, loss = step(params, state, schedule(0, i), source)
        mx.eval(params, state, loss)
        assert mx.get_peak_memory() - before < table / 2


@pytest.mark.parametrize("again", [False, True])
def test_active_memory_is_constant_over_steps(again: bool) -> None:
    model, params = fresh()
    step, state, source = make_step(model, CONFIG.n_embd, 1, again), init_optimizer(params), batches(4)
    sizes = []
    for i in range(12):
        params, state, loss = step(params, state, schedule(0, i, again), source)
        mx.eval(params, state, loss)
        sizes.append(mx.get_active_memory())
    assert max(sizes[2:]) - min(sizes[2:]) < 100_000, sizes


def test_no_token_sees_the_future() -> None:
    model, _ = fresh()
    a = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, 16), dtype=np.int32)
    b = a.copy()
    b[0, 9:] = (b[0, 9:] + 7) % CONFIG.vocab_size
    left, right = np.array(model(mx.array(a))), np.array(model(mx.array(b)))
    assert np.abs(left[0, :9] - right[0, :9]).max() < 1e-6
    assert np.abs(left[0, 9:] - right[0, 9:]).max() > 1e-6


def test_n_grams_differ_and_the_first_position_has_no_past() -> None:
    """The bigram row of position t depends on t-1 and t; the trigram row on t-2, t-1 and t; each has a table of its own."""
    bigrams, trigrams = np.sort(np.array(ngram_rows(mx.array([[1, 2, 3, 2, 3, 1]]), (97, 101)))[:, :, 0], axis=0).transpose(1, 2, 0)
    assert (bigrams[2] == bigrams[4]).all()  # both rows
    assert (bigrams[2] != bigrams[1]).any()
    assert (trigrams[2] != trigrams[4]).any()
    assert (bigrams[0] != bigrams[5]).any()
    assert bigrams.max() < 97 <= trigrams.min()
    assert trigrams.max() < 97 + 101


def test_an_n_gram_has_two_rows_and_what_stood_before_tells_which_it_trains() -> None:
    """The same text trains the same row wherever its rows begin; of other texts about half train the one, half the other."""
    tokens = np.random.default_rng(0).integers(0, 9, 5000)
    own, other = np.array(ngram_rows(mx.array(tokens[None]), (1 << 16, 1 << 16)))[:, :, 0]
    later = np.array(ngram_rows(mx.array(tokens[None, 1000:]), (1 << 16, 1 << 16)))[0, :, 0]
    np.testing.assert_array_equal(later[:, train_mlx.NGRAM_OWN - 1 :], own[:, 1000 + train_mlx.NGRAM_OWN - 1 :])
    assert (own != other).all()
    pair = (tokens[1:] == 4) & (tokens[:-1] == 2)
    rows, times = np.unique(own[0, 1:][pair], return_counts=True)
    assert set(rows) == set(other[0, 1:][pair])
    assert len(rows) == 2
    assert times.min() > 0.3 * times.sum()


def test_adagrad_touches_the_rows_of_the_batch_and_adds_up_what_a_row_got_twice() -> None:
    table, g = mx.ones((5, 2)), mx.array([[1.0, 1.0], [3.0, 3.0]])
    after, v = adagrad_rows(table, mx.zeros(5), mx.array([[1, 1], [2, 3]]), g, 0.1)
    assert np.allclose(np.array(v), [0, 10, 1, 9, 0])
    assert np.allclose(np.array(after)[:, 0], [1, 1 - 0.1 * 4 / 10**0.5, 0.9, 0.9, 1])


# In bfloat16 the head's gradient is a sum over chunks, rounded after each, by at most 2^-9 of what it then is: of n chunks
# 2^-9 * n at the very worst, the square root of n in the mean. Here n is 7 at most; losses are fp32 and differ by less.
@pytest.mark.parametrize(("gpu", "dtype", "tolerance"), [
    (False, mx.float32, 1e-5), (True, mx.float32, 1e-5), (True, mx.bfloat16, 7 * 2**-9)], ids=str)
def test_the_loss_in_chunks_equals_the_loss_at_once(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, dtype: mx.Dtype, tolerance: float
) -> None:
    monkeypatch.setattr(train_mlx, "GPU", gpu)
    x, weight = (mx.random.normal(shape, key=mx.random.key(i)).astype(dtype) for i, shape in enumerate(((2, 16, 8), (61, 8))))
    targets = mx.random.randint(0, 61, (2, 16), key=mx.random.key(2))

    def found(tokens: int) -> dict[str, mx.array]:
        monkeypatch.setattr(train_mlx, "LOSS_TOKENS", tokens)
        loss, grads = mx.value_and_grad(lambda x, w: 3 * head_loss(x, w, targets, 15.0), (0, 1))(x, weight)
        assert [loss.dtype, *(g.dtype for g in grads)] == [mx.float32, dtype, dtype]
        return {name: a.astype(mx.float32) for name, a in zip(("loss", "x", "weight"), (loss, *grads), strict=True)}
    for tokens in (5, 16) if dtype == mx.bfloat16 else (1, 5, 16):
        assert distance(found(tokens), found(32)) < tolerance


def test_the_losses_of_both_kinds_of_device_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(((2, 16, 8), (61, 8))))
    targets = mx.random.randint(0, 61, (2, 16), key=mx.random.key(2))
    found = []
    for gpu in (False, True):
        monkeypatch.setattr(train_mlx, "GPU", gpu)
        loss, grads = mx.value_and_grad(lambda x, w: head_loss(x, w, targets, 15.0), (0, 1))(x, weight)
        found.append(dict(zip(("loss", "x", "weight"), (loss, *grads), strict=True)))
    assert distance(*found) < 1e-5


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_step_is_the_same_on_any_number_of_lanes(monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    found = []
    for n in (2, lanes):
        monkeypatch.setattr(train_mlx, "LANES", [mx.new_stream(mx.default_device()) for _ in range(n)])
        found.append(steps(3, accumulate=4))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert distance(found[0][0], found[1][0]) < 1e-6


def test_text_that_was_read_before_sees_what_n_grams_learnt_elsewhere_and_teaches_them_nothing() -> None:
    model, params = fresh()
    params["lm_head.weight"] = mx.random.normal(params["lm_head.weight"].shape, key=mx.random.key(1))
    x, y = map(mx.array, next(batches(8)))

    def loss(again: bool, table: mx.array) -> float:
        mx.random.seed(0)
        weights = params | {train_mlx.NGRAMS: table}
        value, grads, found = train_mlx.make_gradients(model, again)(weights, schedule(0, 0, again), x, y)
        assert (found is None) == (train_mlx.NGRAMS not in grads) == again
        return value.item()

    table = params[train_mlx.NGRAMS]
    own_row, other_row = (ngram_rows(x, CONFIG.ngram_buckets)[which, 0, 0, 9].item() for which in (0, 1))
    for which, row in (("own", own_row), ("other", other_row)):
        moved = mx.array(table)
        moved[row] = moved[row] + 5.0
        assert loss(False, moved) != loss(False, table), which
    # Rows that are some token's own and nobody's other one don't matter in a later pass, those of the others do
    mine, others = (set(np.array(ngram_rows(x, CONFIG.ngram_buckets)[which]).ravel().tolist()) for which in (0, 1))
    moved = mx.array(table)
    for row in mine - others:
        moved[row] = moved[row] + 5.0
    assert mine - others
    assert loss(True, moved) == loss(True, table)
    assert loss(False, moved) != loss(False, table)
    moved = mx.array(table)
    for row in others - mine:
        moved[row] = moved[row] + 5.0
    assert loss(True, moved) != loss(True, table)


def test_exp_is_exp_and_so_is_its_gradient() -> None:
    x = mx.concatenate([mx.linspace(-87, 87, 10001), mx.array([0.0, 1e-8, -1e-8])])
    assert np.allclose(np.array(train_mlx.exp(x)), np.exp(np.array(x, np.float64)), rtol=1e-5, atol=0)
    near = mx.linspace(-5, 5, 1001)
    assert np.allclose(np.array(train_mlx.exp(near)), np.exp(np.array(near, np.float64)), rtol=5e-7, atol=0)
    assert mx.array_equal(mx.grad(lambda x: train_mlx.exp(x).sum())(x), train_mlx.exp(x))
    assert 0 < train_mlx.exp(mx.array(-1e4)).item() < 1e-37
    assert 1e37 < train_mlx.exp(mx.array(1e4)).item() < mx.inf
    assert mx.isnan(train_mlx.exp(mx.array(mx.nan))).item()


def test_tanh_is_tanh_and_so_is_its_gradient() -> None:
    x = mx.concatenate([mx.linspace(-12, 12, 1001), mx.array([-1e4, -89.0, 89.0, 1e4])])
    assert mx.allclose(train_mlx.tanh(x), mx.tanh(x), rtol=1e-6, atol=2e-7)
    found, expected = (mx.grad(lambda x, f=f: f(x).sum())(x) for f in (train_mlx.tanh, mx.tanh))
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_dropout_hides_a_share_and_keeps_the_mean_and_the_dtype() -> None:
    mx.random.seed(0)
    x = mx.ones((1000, 64), mx.bfloat16)
    assert train_mlx.dropout(x, None) is x
    y = train_mlx.dropout(x, mx.array(0.25))
    assert y.dtype == mx.bfloat16
    assert set(np.array(y.astype(mx.float32)).ravel()) == {0.0, mx.array(1 / 0.75, mx.bfloat16).item()}
    assert y.astype(mx.float32).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_the_residual_stream_has_the_activations_dtype_all_the_way(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, again: bool
) -> None:
    """No fp32 scalar promotes it: every block's input and output, attention and MLP too; logits, loss and gradients are fp32."""
    monkeypatch.setattr(train_mlx, "GPU", gpu)
    monkeypatch.setattr(train_mlx, "DTYPE", mx.bfloat16)
    seen: dict[str, set] = {}
    for cls in (train_mlx.Block, train_mlx.CausalSelfAttention, train_mlx.MLP):
        def watched(self, x, *rest, name=cls.__name__, call=cls.__call__):
            y = call(self, x, *rest)
            seen.setdefault(name, set()).update((x.dtype, y.dtype))
            return y
        monkeypatch.setattr(cls, "__call__", watched)
    model, params = fresh()
    x, y = map(mx.array, next(batches(2)))
    loss, grads, _ = train_mlx.make_gradients(model, again)(params, schedule(0, 0, again), x, y)
    assert seen == {name: {mx.bfloat16} for name in ("Block", "CausalSelfAttention", "MLP")}
    assert {loss.dtype, *(g.dtype for g in grads.values())} == {mx.float32}
    assert model.features(x).dtype == mx.bfloat16
    assert model(x).dtype == mx.float32


@pytest.mark.parametrize(
    ("rows", "buckets", "accumulate"), [(16, (), 1), (16, (97, 101), 1), (64, (97, 101), 1), (32, (97, 101), 4)])
def test_peak_memory_is_what_was_expected(rows: int, buckets: tuple[int, ...], accumulate: int) -> None:
    config = GPTConfig(vocab_size=512, seq_len=64, n_layer=3, n_head=2, n_embd=128, ngram_buckets=buckets)
    model = GPT(config)
    model.init_weights(1)
    params = dict(tree_flatten(model.parameters()))
    step, state = make_step(model, config.n_embd, accumulate), init_optimizer(params)
    mx.eval(params, state)
    expected = train_mlx.expected_memory(model, params, state, step, rows * accumulate, 64, accumulate)(accumulate)
    x = np.zeros((rows, 64), np.int32)
    mx.reset_peak_memory()
    for i in range(4):
        params, state, loss = step(params, state, schedule(0, i), iter([(x, x)] * accumulate))
        mx.async_eval(params, state, loss)
    mx.eval(params, state)
    assert expected == pytest.approx(mx.get_peak_memory(), rel=0.15)


def test_expected_memory_falls_with_the_passes_a_step_is_cut_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a refusal recommends: the same step in more passes, told before it is built, takes what it is then found to take."""
    monkeypatch.setattr(train_mlx, "LANES", train_mlx.LANES[:2])
    config = GPTConfig(vocab_size=512, seq_len=64, n_layer=3, n_head=2, n_embd=128, ngram_buckets=(997, 1009))
    found = []
    for passes in (2, 16):
        model = GPT(config)
        params = dict(tree_flatten(model.parameters()))
        state = init_optimizer(params)
        mx.eval(params, state)
        expected = train_mlx.expected_memory(model, params, state, make_step(model, 128, passes), 64, 64, passes)
        found.append((expected(2), expected(16)))
    assert found[0][1] < 0.5 * found[0][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=0.15)


def test_bytes_held_are_told_of_every_depth_before_anything_is_made() -> None:
    mx.clear_cache()
    active = mx.get_active_memory()
    held = [train_mlx.held_bytes(depth, 320) for depth in (1, train_mlx.DEPTH, 12)]
    assert mx.get_active_memory() == active
    model = GPT(GPTConfig(vocab_size=320, seq_len=16))
    params = dict(tree_flatten(model.parameters()))
    assert held[1] == sum(a.nbytes for _, a in tree_flatten((params, init_optimizer(params))))
    assert held[0] < held[1] < held[2]


@pytest.mark.parametrize("metal", [False, True])
def test_metal_is_told_its_limits(monkeypatch: pytest.MonkeyPatch, metal: bool) -> None:
    """Its functions are stand-ins here, with the signature of MLX's: one whole number of bytes."""
    told = {}
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    for name in ("set_wired_limit", "set_cache_limit"):
        assert "(limit: int)" in getattr(mx, name).__doc__
        monkeypatch.setattr(mx, name, lambda limit, name=name: told.update({name: limit}))
    train_mlx.keep_within((16 << 30) + 1)
    assert told == ({"set_wired_limit": 8 << 30, "set_cache_limit": 4 << 30} if metal else {})


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 12])
def test_every_depth_learns(depth: int) -> None:
    """With the width, the heads and the batch that follow from it, in small; the rates are those of the file."""
    config = GPTConfig(vocab_size=61, seq_len=16, n_layer=depth, n_head=depth, n_embd=8 * depth, ngram_buckets=(97, 101))
    model = GPT(config)
    model.init_weights(1)
    params = dict(tree_flatten(model.parameters()))
    state, step = init_optimizer(params), make_step(model, config.n_embd, 1)
    in_a_group = {n for _, _, names in train_mlx.matrix_groups(params) for n in names}
    assert in_a_group == {n for n in params if train_mlx.is_matrix(n)}
    weights = sum(p.size for n, p in params.items() if n in in_a_group or n == "lm_head.weight")
    assert model.flops_per_token(16) == 6 * weights + depth * 12 * 8 * depth * 16
    text = np.tile(np.random.default_rng(0).integers(0, 61, 7, dtype=np.int32), 100)
    losses = []
    for i in range(30):
        x = np.stack([text[j : j + 17] for j in range(i, i + 2 * depth)])
        params, state, loss = step(params, state, schedule(i / 30, i), iter([(x[:, :-1], x[:, 1:])]))
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(61), rel=0.01)
    assert losses[-1] < 1.0


def test_schedule_rises_falls_and_ends_where_it_should() -> None:
    lr, momentum, decay, t, hidden = np.array(schedule(0.0, 0))
    assert (lr, decay, t, hidden) == pytest.approx((1.0, train_mlx.WEIGHT_DECAY, 1.0, 0.0))
    assert momentum == pytest.approx(train_mlx.MUON_MOMENTUM[0])
    lr, momentum, decay, t, hidden = np.array(schedule(1.0, 999, 99))
    assert (lr, decay, t, hidden) == pytest.approx((train_mlx.FINAL_LR_FRAC, 0.0, 1000.0, train_mlx.DROPOUT[-1]))
    assert momentum == pytest.approx(train_mlx.MUON_MOMENTUM[1])


def run(tmp_path: Path, home: Path, source: str, **env: str) -> tuple[subprocess.CompletedProcess, Path]:
    """Train a changed copy of the file as a real process on the tiny dataset."""
    (tmp_path / "train_mlx.py").write_text(source)
    out = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, "train_mlx.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "AUTORESEARCH_HOME": str(home), "AUTORESEARCH_RUN_DIR": str(out),
             "AUTORESEARCH_SCORE": "0", "AUTORESEARCH_BUDGET": "30steps", **env})
    return process, out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    subprocess.run([sys.executable, ROOT / "prepare_mlx.py", "--preset", "tiny", "--dataset", "stories"], check=True,
                   capture_output=True, env={**os.environ, "AUTORESEARCH_HOME": str(place)})
    return place


def test_a_run_leaves_what_the_scorer_needs(tmp_path: Path, home: Path) -> None:
    process, out = run(tmp_path, home, (ROOT / "train_mlx.py").read_text())
    assert process.returncode == 0, process.stderr
    facts = json.loads((out / "train.json").read_text())
    assert facts["num_steps"] == 30
    assert facts["total_tokens"] == 30 * 1024
    assert facts["expected_vram_mb"] == pytest.approx(facts["peak_vram_mb"], rel=0.15)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line) == {"step", "tokens", "seconds", "loss", "lr", "tokens_per_second", "mfu_percent", "memory_mb"}
               for line in lines)
    assert (lines[-1]["step"], lines[-1]["tokens"]) == (30, 30 * 1024)
    assert lines[-1]["loss"] < np.log(320) - 0.5
    start, progress = process.stdout.split("\nstep", 1)
    for word in (f"{train_mlx.TIER}: ", "TFLOP/s", "M parameters, depth 2, width 128", "1,024 tokens a step in rows of 32",
                 "MFLOPs a token", "to read the text", "MB at the peak"):
        assert word in start
    line = r" +30 \(100 %\)  loss [\d.]+  lr x0.\d\d  [\d,]+ tok/s  mfu [\d.]+ %  [\d,]+ MB  0 s left, ends \d\d:\d\d:\d\d"
    assert re.search(line, progress)
    model = train_mlx.load_model(out)
    logits = model(np.zeros((2, 8), np.int32))
    assert logits.shape == (2, 8, 320)
    assert logits.dtype == np.float32


def test_a_budget_that_is_over_before_the_first_step_is_told_by_name(tmp_path: Path, home: Path) -> None:
    process, out = run(tmp_path, home, changed("    meter = Progress(", "    time.sleep(0.3)\n    meter = Progress("),
                       AUTORESEARCH_BUDGET="0.2s")
    assert process.returncode == 5, process.stderr
    assert "before the first step" in json.loads((out / "error.json").read_text())["message"]


def test_the_same_seed_trains_the_same_weights(tmp_path: Path, home: Path) -> None:
    source = (ROOT / "train_mlx.py").read_text()
    weights = []
    for name, seed in (("a", "4"), ("b", "4"), ("c", "5")):
        (tmp_path / name).mkdir()
        _, out = run(tmp_path / name, home, source, AUTORESEARCH_SEED=seed, AUTORESEARCH_BUDGET="3steps")
        weights.append((out / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_text_that_was_read_before_is_trained_on_with_dropout(tmp_path: Path, home: Path) -> None:
    source = changed("    def step(params, state, rates, batches):\n",
                     "    def step(params, state, rates, batches):\n        print(f'AGAIN {again} {rates[4].item():.1f}')\n")
    assert source.count("// run.train_tokens") == 1
    source = source.replace("// run.train_tokens", "// (3 * 1024)")
    process, _ = run(tmp_path, home, source, AUTORESEARCH_BUDGET="8steps")
    assert process.returncode == 0, process.stderr
    said = [line.split("AGAIN ")[1] for line in process.stdout.splitlines() if "AGAIN" in line]
    assert said[-8:] == ["False 0.0"] * 3 + ["True 0.1"] * 3 + ["True 0.2"] * 2


@pytest.mark.parametrize("tier", ["mac", "mac-max", "cuda"])
def test_another_tiers_file_can_be_asked_for(tmp_path: Path, home: Path, tier: str) -> None:
    """Its model and optimizer on this machine, tables and batch made small."""
    source = (ROOT / "train_mlx.py").read_text()
    for name, value in (("NGRAM_BUCKETS", "(997, 1009, 1013)"), ("BATCH_TOKENS", "128")):
        source, found = re.subn(rf"^{name} = {{[^}}]*}}\[TIER\][^#\n]*", f"{name} = {value}  ", source, flags=re.M)
        assert found == 1
    four = "for _ in range(4))  # the first may compile"
    assert four in source
    source = source.replace(four, "for _ in range(1))")
    process, out = run(tmp_path, home, source, AUTORESEARCH_BUDGET="2steps", AUTORESEARCH_TIER=tier)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"{tier}: ")
    assert json.loads((out / "config.json").read_text())["n_layer"] == {"mac": 3, "mac-max": 4, "cuda": 8}[tier]


def test_an_unknown_tier_is_told_with_those_there_are(tmp_path: Path, home: Path) -> None:
    process, _ = run(tmp_path, home, (ROOT / "train_mlx.py").read_text(), AUTORESEARCH_TIER="laptop")
    assert process.returncode != 0
    assert process.stderr.endswith("error: AUTORESEARCH_TIER=laptop: expected one of cpu, mac, mac-max, cuda\n")


def changed(before: str, after: str) -> str:
    """The train file's source with one text replaced, which must be there."""
    source = (ROOT / "train_mlx.py").read_text()
    assert before in source
    return source.replace(before, after)


def test_a_diverging_run_ends_at_once_with_its_name(tmp_path: Path, home: Path) -> None:
    process, out = run(tmp_path, home, changed("    return p - lr * update, m, v", "    return p * mx.inf, m, v"),
                       AUTORESEARCH_BUDGET="100000steps")
    assert process.returncode == 3, process.stderr
    error = json.loads((out / "error.json").read_text())
    assert error["kind"] == "nan"
    assert re.match(r"the loss became nan at step \d,", error["message"])
    assert not (out / "train.json").exists()


def test_a_run_that_diverges_without_nan_ends_as_well(tmp_path: Path, home: Path) -> None:
    process, out = run(tmp_path, home, changed("    return p - lr * update, m, v", "    return 1.1 * p - lr * update, m, v"),
                       AUTORESEARCH_BUDGET="100000steps")
    assert process.returncode == 3, process.stderr
    message = json.loads((out / "error.json").read_text())["message"]
    loss, mean = re.match(r"the loss became ([\d.e+]+) at step \d+, ([\d.e+]+) in the mean", message).groups()
    assert np.log(320) + train_mlx.ABORT_LOSS < float(mean) < float(loss) < 1e4


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(tmp_path: Path, home: Path) -> None:
    """And what the refusal says is taken at its word."""
    source = changed("    limit = memory_limit()\n", "    limit = 100 << 20\n")
    source = re.sub(r"^NGRAM_BUCKETS = {[^}]*}\[TIER\]", "NGRAM_BUCKETS = ()", source, flags=re.M)
    source = re.sub(r"^BATCH_TOKENS = {[^}]*}\[TIER\] \* DEPTH", "BATCH_TOKENS = 2**14", source, flags=re.M)
    process, out = run(tmp_path, home, source, AUTORESEARCH_BUDGET="2steps")
    assert process.returncode == 4, process.stdout + process.stderr
    error = json.loads((out / "error.json").read_text())
    assert error["kind"] == "oom"
    assert "this device has 0.10; the largest that fits: MICRO_TOKENS = " in error["message"]
    fits = error["message"].split(" = ")[1]
    source = re.sub(r"^MICRO_TOKENS = 2\*\*16", f"MICRO_TOKENS = {fits}", source, flags=re.M)
    process, out = run(tmp_path, home, source, AUTORESEARCH_BUDGET="2steps")
    assert process.returncode == 0, process.stderr
    assert json.loads((out / "train.json").read_text())["peak_vram_mb"] < 1.15 * 100


def test_a_model_that_does_not_fit_is_refused_with_the_largest_that_does(tmp_path: Path, home: Path) -> None:
    """Before it is made, as these weights would not fit into any machine; and what it says is taken at its word."""
    source = changed("    limit = memory_limit()\n", "    limit = 200 << 20\n")
    source = re.sub(r"^NGRAM_BUCKETS = {[^}]*}\[TIER\]", "NGRAM_BUCKETS = ()", source, flags=re.M)
    process, out = run(tmp_path, home, re.sub(r"^DEPTH = {[^}]*}\[TIER\]", "DEPTH = 100", source, flags=re.M))
    assert process.returncode == 4, process.stdout + process.stderr
    message = json.loads((out / "error.json").read_text())["message"]
    fits = int(re.search(r"the largest that fits: DEPTH = (\d+),", message)[1])
    assert 2 <= fits < 12
    source = re.sub(r"^DEPTH = {[^}]*}\[TIER\]", f"DEPTH = {fits}", source, flags=re.M)
    process, out = run(tmp_path, home, source, AUTORESEARCH_BUDGET="1steps")
    assert process.returncode == 4  # the model fits; the batch that goes with its depth does not, and is told apart
    tokens = json.loads((out / "error.json").read_text())["message"].split("the largest that fits: MICRO_TOKENS = ")[1]
    source = re.sub(r"^MICRO_TOKENS = 2\*\*16", f"MICRO_TOKENS = {tokens}", source, flags=re.M)
    process, _ = run(tmp_path, home, source, AUTORESEARCH_BUDGET="1steps")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(("line", "kind", "exit_code"), [("np.zeros(1 << 50)", "oom", 4), ("1 / 0", "crash", 1)])
def test_out_of_memory_is_told_apart_from_a_crash(tmp_path: Path, home: Path, line: str, kind: str, exit_code: int) -> None:
    anchor = "    product, product_flops = large_product()\n"
    process, out = run(tmp_path, home, changed(anchor, f"    {line}\n{anchor}"))
    assert process.returncode == exit_code, process.stderr
    assert json.loads((out / "error.json").read_text())["kind"] == kind
    assert "Traceback" in process.stderr
