"""The training step of train_mlx.py is the step that was written: compiled or not, accumulated or not, in any epoch.

These tests look into the file, so they run on the copy in tests/pinned, whatever a night has made of the file itself.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from pinned import train_mlx
from pinned.train_mlx import GPT, GPTConfig, adagrad_rows, init_optimizer, make_step, ngram_rows, schedule

CONFIG, SEQ_LEN = GPTConfig(vocab_size=61, n_layer=3, n_head=2, n_embd=32, ngram_buckets=(97, 101)), 16


@pytest.fixture
def compiled() -> Iterator[None]:
    mx.enable_compile()
    yield
    if not train_mlx.GPU:
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
        block = rng.integers(0, CONFIG.vocab_size, (rows, SEQ_LEN + 1), dtype=np.int32)
        yield block[:, :-1], block[:, 1:]


def steps(n: int, rows: int = 4, accumulate: int = 1, epoch: int = 0) -> tuple[dict[str, mx.array], list[float]]:
    """Weights and losses after n steps, which begin in `epoch` and go on to the next one after four steps."""
    model, params = fresh()
    mx.random.seed(1)
    step, moments, source, losses = make_step(model, accumulate), init_optimizer(params), batches(rows), []
    for i in range(n):
        params, moments, loss = step(params, moments, schedule(i / n, i, epoch + i // 4), source)
        losses.append(loss.item())
    return params, losses


def distance(a: dict[str, mx.array], b: dict[str, mx.array]) -> float:
    """The largest difference of two sets of weights, relative to each tensor's norm."""
    return max((mx.linalg.norm(a[n] - b[n]) / (mx.linalg.norm(b[n]) + 1e-6)).item() for n in a)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_compiled_step_equals_the_eager_step(compiled: None, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    """Through the end of the first epoch, by MLX's own kernels, as on a GPU."""
    monkeypatch.setattr(train_mlx, "attention", mx.fast.scaled_dot_product_attention)
    monkeypatch.setattr(train_mlx, "cross_entropy", mx.fast.cross_entropy)
    monkeypatch.setattr(train_mlx, "async_eval", mx.async_eval)
    with_compile, losses = steps(6, accumulate=accumulate)
    mx.disable_compile()
    without, eager_losses = steps(6, accumulate=accumulate)
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    assert distance(with_compile, without) < 1e-4
    assert losses[-1] != losses[0]


def test_nothing_is_traced_again_over_a_whole_run(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As train() goes through it: a warm-up, a schedule that moves, three epochs. Values differ, so they must be arrays.

    A function is traced when it is called. Nothing is evaluated, because a CPU would compile C++ for most of a minute first.
    """
    for module, name in ((mx, "eval"), (mx, "async_eval"), (train_mlx, "async_eval")):
        monkeypatch.setattr(module, name, lambda *arrays: None)
    traces = {"cross_entropy": 0, "update": 0}
    for name in traces:
        original = getattr(train_mlx, name)

        def traced(*a, name=name, original=original):
            traces[name] += 1
            return original(*a)
        monkeypatch.setattr(train_mlx, name, traced)
    model, params = fresh()
    moments, source, step = init_optimizer(params), batches(4), make_step(model, 1)
    train_mlx.dummy_step(params, moments, step, 4, SEQ_LEN)
    for i in range(12):
        params, moments, _ = step(params, moments, schedule(i / 12, i, i // 4), source)
    assert traces == {"cross_entropy": 2, "update": 2}, "one for the first epoch, one for all others"


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulation_equals_the_large_batch(parts: int) -> None:
    """By the moments, which are the gradients times a number; weights after one step would hardly know their size."""
    model, params = fresh()
    for i, name in enumerate(params):  # what is 0 at first would leave next to nothing of some gradients
        if name.endswith(("c_proj.weight", "lm_head.weight")):
            params[name] = 0.2 * mx.random.normal(params[name].shape, key=mx.random.key(i))
    whole = next(batches(12))
    pieces = zip(np.split(whole[0], parts), np.split(whole[1], parts), strict=True)
    _, at_once, loss = make_step(model, 1)(params, init_optimizer(params), schedule(0, 0), iter([whole]))
    _, in_parts, part_loss = make_step(model, parts)(params, init_optimizer(params), schedule(0, 0), pieces)
    assert part_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    moments = [{key: moment[0] for key, moment in state.items()} for state in (in_parts, at_once)]
    assert distance(*moments) < 1e-5
    assert all(mx.linalg.norm(moment).item() > 1e-6 for moment in moments[1].values())


def test_warm_up_leaves_the_weights_as_they_were() -> None:
    model, params = fresh()
    before = {n: np.array(p) for n, p in params.items()}
    mx.eval(make_step(model, 1)(params, init_optimizer(params), schedule(0, 0), batches(4)))
    assert all(np.array_equal(before[n], np.array(p)) for n, p in params.items())


def test_a_table_is_not_held_twice_in_a_step() -> None:
    """Its buffer is donated: the new table takes the place of the old one, as train() holds both."""
    config = GPTConfig(vocab_size=61, n_layer=1, n_head=1, n_embd=32, ngram_buckets=(1 << 16, 1 << 16))
    model = GPT(config)
    params = dict(tree_flatten(model.parameters()))
    state, step, source = init_optimizer(params), make_step(model, 1), batches(4)
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


def test_active_memory_is_constant_over_steps() -> None:
    model, params = fresh()
    step, moments, source = make_step(model, 1), init_optimizer(params), batches(4)
    sizes = []
    for i in range(12):
        params, moments, loss = step(params, moments, schedule(0, i, i // 6), source)
        mx.eval(params, moments, loss)
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
    np.testing.assert_array_equal(later[:, train_mlx.NGRAM_CONTEXT - 1 :], own[:, 1000 + train_mlx.NGRAM_CONTEXT - 1 :])
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


def test_from_the_second_epoch_on_a_token_sees_what_n_grams_learnt_elsewhere_and_teaches_them_nothing() -> None:
    model, params = fresh()
    params["lm_head.weight"] = mx.random.normal(params["lm_head.weight"].shape, key=mx.random.key(1))
    x, y = map(mx.array, next(batches(8)))
    gradients, table = train_mlx.make_gradients(model), params[train_mlx.NGRAMS]

    def loss(epoch: int, moved: set[int]) -> float:
        """With other weights in the rows `moved`."""
        mx.random.seed(0)
        changed = mx.array(table)
        for row in moved:
            changed[row] = changed[row] + 5.0
        return gradients(params | {train_mlx.NGRAMS: changed}, schedule(0, 0, epoch), x, y)[0].item()

    own, other = (set(np.array(rows).ravel().tolist()) for rows in ngram_rows(x, CONFIG.ngram_buckets))
    assert own - other
    assert other - own
    for epoch, moved, seen in ((0, own - other, True), (0, other - own, True), (1, own - other, False), (1, other - own, True)):
        assert (loss(epoch, moved) != loss(epoch, set())) == seen, (epoch, seen)

    for epoch in (0, 1):
        after, moments, _ = make_step(model, 1)(params, init_optimizer(params), schedule(0, 0, epoch), iter([(x, y)]))
        changed = np.flatnonzero(np.array((after[train_mlx.NGRAMS] != table).any(axis=1)))
        assert set(changed.tolist()) == (own if epoch == 0 else set())
        assert (moments[train_mlx.NGRAMS][0].sum().item() > 0) == (epoch == 0)


def test_dropout_zeroes_a_share_and_keeps_the_mean_and_the_dtype() -> None:
    mx.random.seed(0)
    x = mx.ones((1000, 64), mx.bfloat16)
    assert train_mlx.dropout(x, None) is x
    assert mx.array_equal(train_mlx.dropout(x, mx.array(0.0)), x)
    y = train_mlx.dropout(x, mx.array(0.25))
    assert y.dtype == mx.bfloat16
    assert set(np.array(y.astype(mx.float32)).ravel()) == {0.0, mx.array(1 / 0.75, mx.bfloat16).item()}
    assert y.astype(mx.float32).mean().item() == pytest.approx(1, abs=0.02)


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations in fp16, by MLX's own kernels, as on a GPU where `benchmark.py dtype` found it fastest."""
    monkeypatch.setattr(train_mlx, "DTYPE", mx.float16)
    monkeypatch.setattr(train_mlx, "attention", mx.fast.scaled_dot_product_attention)
    monkeypatch.setattr(train_mlx, "cross_entropy", mx.fast.cross_entropy)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_trains_as_fp32_does(fp16: None, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    monkeypatch.setattr(train_mlx, "DROPOUT", (0.0,))
    _, losses = steps(8, accumulate=accumulate)
    monkeypatch.setattr(train_mlx, "DTYPE", mx.float32)
    _, exact = steps(8, accumulate=accumulate)
    assert losses == pytest.approx(exact, rel=5e-3)


def test_loss_scaling_keeps_the_gradients_that_fp16_alone_would_round_away(fp16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = fresh()
    for i, name in enumerate(params):  # small weights: small gradients
        if name.endswith(("c_proj.weight", "lm_head.weight")):
            params[name] = 0.02 * mx.random.normal(params[name].shape, key=mx.random.key(i))
    x, y = map(mx.array, next(batches(256)))

    def gradients(scale: float) -> dict[str, mx.array]:
        rates = schedule(0, 0) | {train_mlx.LOSS_SCALE: mx.array(scale)}
        return {n: g / scale for n, g in train_mlx.make_gradients(model)(params, rates, x, y)[1].items()}
    plain, scaled = gradients(1.0), gradients(init_optimizer(params)[train_mlx.LOSS_SCALE][0].item())
    monkeypatch.setattr(train_mlx, "DTYPE", mx.float32)
    exact = gradients(1.0)
    assert distance(scaled, exact) < 0.01
    assert distance(scaled, exact) < distance(plain, exact) / 3


def test_a_step_that_overflows_in_fp16_learns_nothing_and_halves_the_scale(fp16: None) -> None:
    model, params = fresh()
    step, moments, source, name = make_step(model, 1), init_optimizer(params), batches(4), train_mlx.LOSS_SCALE
    moments[name] = (mx.array(2.0**40),)
    after, new, loss = step(params, moments, schedule(0, 0), source)
    assert new[name][0].item() == 2.0**39
    assert 0 < loss.item() < 10
    assert distance(after, params) < 0.01, "weight decay at most"
    assert not any(mx.any(m).item() for key, ms in new.items() if key != name for m in ms)
    new[name] = (mx.array(2.0**10),)
    later, newer, _ = step(after, new, schedule(0, 0), source)
    assert 2.0**10 < newer[name][0].item() < 2.0**11
    assert distance(later, after) > 0.01


def test_the_residual_stream_has_the_activations_dtype_all_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fp32 scalar promotes it: every block's input and output, attention and MLP too; logits, loss and gradients are fp32."""
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
    loss, grads, _ = train_mlx.make_gradients(model)(params, schedule(0, 0, 1), x, y)
    assert seen == {name: {mx.bfloat16} for name in ("Block", "CausalSelfAttention", "MLP")}
    assert {loss.dtype, *(g.dtype for g in grads.values())} == {mx.float32}
    assert model(x).dtype == mx.float32


def small_model(buckets: tuple[int, ...]) -> tuple[GPT, dict[str, mx.array], dict]:
    gc.collect()  # arrays of earlier tests that go meanwhile would count as this model's
    model = GPT(GPTConfig(vocab_size=512, n_layer=3, n_head=2, n_embd=128, ngram_buckets=buckets))
    model.init_weights(1)
    params = dict(tree_flatten(model.parameters()))
    moments = init_optimizer(params)
    mx.eval(params, moments)
    return model, params, moments


def forecast(*arguments: Any) -> Callable[[int], float]:
    """As expected_memory, but the highest of three: how soon MLX frees an array on a CPU depends on what else the machine does."""
    found = [train_mlx.expected_memory(*arguments) for _ in range(3)]
    return lambda passes: max(expected(passes) for expected in found)


@pytest.mark.parametrize(
    ("rows", "buckets", "accumulate"), [(16, (), 1), (16, (97, 101), 1), (64, (97, 101), 1), (16, (97, 101), 4)])
def test_peak_memory_is_what_was_expected(rows: int, buckets: tuple[int, ...], accumulate: int) -> None:
    model, params, moments = small_model(buckets)
    step = make_step(model, accumulate)
    expected = forecast(model, params, moments, step, rows * accumulate, rows, 64)(accumulate)
    x = np.zeros((rows, 64), np.int32)
    mx.reset_peak_memory()
    for i in range(4):
        params, moments, loss = step(params, moments, schedule(0, i), iter([(x, x)] * accumulate))
        mx.async_eval(params, moments, loss)
    mx.eval(params, moments)
    peak = mx.get_peak_memory()
    assert 0.85 * peak < expected < (1.15 if train_mlx.GPU or accumulate == 1 else 1.25) * peak  # a CPU's two passes peak apart


def test_expected_memory_falls_with_the_passes_a_step_is_cut_into() -> None:
    """What a refusal recommends: the same step in more micro-batches, as told before it is built and as found then."""
    found = []
    for passes in (2, 16):
        model, params, moments = small_model((997, 1009))
        expected = forecast(model, params, moments, make_step(model, passes), 64, 64 // passes, 64)
        found.append((expected(2), expected(16)))
    assert found[0][1] < 0.5 * found[0][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=0.15)


def test_weight_bytes_are_told_of_every_depth_before_anything_is_made() -> None:
    mx.clear_cache()
    active = mx.get_active_memory()
    told = [train_mlx.weight_bytes(depth, 320) for depth in (1, train_mlx.DEPTH, 12)]
    assert mx.get_active_memory() == active
    params = dict(tree_flatten(GPT(GPTConfig(vocab_size=320)).parameters()))
    assert told[1] == sum(a.nbytes for _, a in tree_flatten((params, init_optimizer(params))))
    assert told[0] < told[1] < told[2]


@pytest.mark.parametrize("metal", [False, True])
def test_metal_is_told_its_limits(monkeypatch: pytest.MonkeyPatch, metal: bool) -> None:
    """Its functions are stand-ins here, with the signature of MLX's: one whole number of bytes."""
    told = {}
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    for name in ("set_wired_limit", "set_cache_limit"):
        assert "(limit: int)" in getattr(mx, name).__doc__
        monkeypatch.setattr(mx, name, lambda limit, name=name: told.update({name: limit}))
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": (16 << 30) + 1})
    assert train_mlx.memory_limit() == (16 << 30) + 1
    assert told == ({"set_wired_limit": 8 << 30, "set_cache_limit": 4 << 30} if metal else {})


@pytest.mark.parametrize("depth", [1, 2, 3, 6, pytest.param(12, marks=pytest.mark.slow)])
def test_every_depth_learns(depth: int) -> None:
    """With the width, the heads and the batch that follow from it, in small; the rates are those of the file."""
    config = GPTConfig(vocab_size=61, n_layer=depth, n_head=depth, n_embd=8 * depth, ngram_buckets=(97, 101))
    model = GPT(config)
    model.init_weights(1)
    params = dict(tree_flatten(model.parameters()))
    state, step = init_optimizer(params), make_step(model, 1)
    in_a_group = {n for names in train_mlx.matrix_groups(params).values() for n in names}
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


def test_schedule_begins_and_ends_where_it_should() -> None:
    first, last = ({name: value.item() for name, value in rates.items()} for rates in (schedule(0.0, 0), schedule(1.0, 999, 99)))
    assert first == pytest.approx({
        "lr": 1.0, "momentum": train_mlx.MUON_MOMENTUM[0], "weight_decay": train_mlx.WEIGHT_DECAY, "step": 1.0,
        "first_epoch": 1.0})
    assert last == pytest.approx({
        "lr": train_mlx.FINAL_LR_FRAC, "momentum": train_mlx.MUON_MOMENTUM[1], "weight_decay": 0.0, "step": 1000.0,
        "dropout": train_mlx.DROPOUT[-1]})


def test_the_matrix_probe_leaves_the_default_stream_as_it_was() -> None:
    """On a CPU the stream decides which two passes run at once: the probe must not tear pairs apart."""
    before = mx.default_stream(mx.default_device())
    product, flops = train_mlx.matmul_probe()
    for _ in range(3):
        product()
        assert mx.default_stream(mx.default_device()) == before
    assert flops > 0
