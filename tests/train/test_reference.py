"""The reference that the train files are compared with is itself right: against finite differences, against closed
forms, and against losses which upstream's own classes gave."""

import numpy as np
import pytest
import reference as ref

# Five layers of SSSL: the last would be S and has to be L. Two query heads share a key/value head, a gate reads 32
# of 48 channels, and tokens repeat, so that no rule of the model holds by accident.
CONFIG = ref.Config(vocab_size=23, seq_len=12, n_layer=5, n_head=4, n_kv_head=2, n_embd=48)


def batches(config: ref.Config, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (count, 2, config.seq_len + 1))


# ----------------------------------------------------------------------------------------------------------------------
# Whole
# ----------------------------------------------------------------------------------------------------------------------

# Printed by upstream's GPT, setup_optimizer and MuonAdamW on a CPU, with its bfloat16 casts made float64 and its
# attention kernel replaced by a dense mask of keys t-W..t. Weights, batches and schedules are those of the test.
UPSTREAM_LOSSES = [
    11.463977878517, 8.481356614135, 8.014705283860, 8.406382133879, 6.040041268041, 7.966003389480,
    8.594197993963, 5.783782969797, 6.772818825579, 7.431698347613, 7.210197068238,
]  # fmt: skip


def test_ten_steps_give_upstreams_losses():
    params, optimizer, losses = ref.random_params(CONFIG, seed=0), ref.MuonAdamW(CONFIG), []
    for step, batch in enumerate(batches(CONFIG, 11, seed=1)):
        loss, grads = ref.loss_and_grads(params, CONFIG, batch[:, :-1], batch[:, 1:])
        losses.append(loss)
        progress = step / 10
        optimizer.step(
            params, grads, ref.lr_multiplier(progress), ref.muon_momentum(60 * step), ref.muon_weight_decay(progress)
        )
    np.testing.assert_allclose(losses, UPSTREAM_LOSSES, rtol=1e-10)


@pytest.fixture(scope="module")
def point():
    """Where gradients are checked: weights, a batch, and the analytic gradients there."""
    params = ref.random_params(CONFIG, seed=2)
    tokens, targets = batches(CONFIG, 1, seed=3)[0, :, :-1], batches(CONFIG, 1, seed=3)[0, :, 1:]
    return params, tokens, targets, ref.loss_and_grads(params, CONFIG, tokens, targets)[1]


@pytest.mark.parametrize("name", ref.shapes(CONFIG))
def test_gradient_equals_finite_differences(point, name):
    params, tokens, targets, grads = point
    assert grads[name].shape == params[name].shape
    rng = np.random.default_rng(4)
    entries = rng.choice(grads[name].size, size=min(5, grads[name].size), replace=False)
    directions = [np.arange(grads[name].size).reshape(grads[name].shape) == entry for entry in entries]
    directions.append(rng.standard_normal(grads[name].shape))   # and all entries at once

    def loss_at(direction: np.ndarray, distance: float) -> float:
        moved = {**params, name: params[name] + distance * direction}
        return ref.loss_and_grads(moved, CONFIG, tokens, targets)[0]

    h = 1e-5
    measured = [(loss_at(direction, h) - loss_at(direction, -h)) / (2 * h) for direction in directions]
    expected = [np.sum(grads[name] * direction) for direction in directions]
    np.testing.assert_allclose(measured, expected, rtol=1e-5, atol=1e-8)
    assert np.abs(expected).max() > 1e-4    # well above the tolerance: a gradient that is always zero fails here


def test_only_embedding_rows_of_tokens_that_occur_have_a_gradient(point):
    params, tokens, _, grads = point
    absent = np.setdiff1d(np.arange(CONFIG.vocab_size), tokens)
    assert absent.size
    for name in params:
        if name == "transformer.wte.weight" or name.startswith("value_embeds."):
            assert not grads[name][absent].any()
            assert grads[name][np.unique(tokens)].any(axis=1).all()


def test_loss_is_that_of_the_logits(point):
    params, tokens, targets, _ = point
    logits = ref.forward(params, CONFIG, tokens)
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    picked = [np.log(probs[b, t, targets[b, t]]) for b, t in np.ndindex(targets.shape)]
    assert ref.loss_and_grads(params, CONFIG, tokens, targets)[0] == pytest.approx(-np.mean(picked), rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Model, part by part
# ----------------------------------------------------------------------------------------------------------------------


def test_layers_get_their_windows_and_value_embeddings():
    assert [ref.window(CONFIG, i) for i in range(5)] == [6, 6, 6, 12, 12]
    assert [ref.has_value_embedding(CONFIG, i) for i in range(5)] == [True, False, True, False, True]
    assert [ref.has_value_embedding(ref.Config(n_layer=4), i) for i in range(4)] == [False, True, False, True]


@pytest.mark.parametrize("window", [0, 2, 9])
def test_attention_equals_a_loop_over_the_keys_from_t_minus_window_to_t(window):
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((2, 9, heads, 6)) for heads in (4, 2, 2))
    y, _ = ref.attention(q, k, v, window)
    for b, t, h in np.ndindex(2, 9, 4):
        keys = range(max(0, t - window), t + 1)
        weights = np.exp([q[b, t, h] @ k[b, s, h // 2] / 6**0.5 for s in keys])
        expected = sum(w * v[b, s, h // 2] for w, s in zip(weights, keys, strict=True)) / weights.sum()
        np.testing.assert_allclose(y[b, t, h], expected, rtol=1e-12)


def test_rotation_turns_half_split_pairs_backwards_with_time():
    x = np.zeros((1, 3, 2, 4))
    x[..., 0], x[..., 1] = 1.0, 1.0                     # pairs are (0, 2), which is fast, and (1, 3), which is slow
    y, _ = ref.rotate(x, base=100.0)
    expected = [np.cos(2.0), np.cos(0.2), -np.sin(2.0), -np.sin(0.2)]
    np.testing.assert_allclose(y[0, 2], [expected, expected], rtol=1e-12)


def test_softcap_bounds_logits_and_keeps_small_ones():
    capped, _ = ref.soft_capped(np.array([-1e6, 1e-4, 1e6]), 15.0)
    np.testing.assert_allclose(capped, [-15.0, 1e-4, 15.0], rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer, part by part
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96), (2, 32)])
def test_orthogonalization_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    rng = np.random.default_rng(6)
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    g = (u * np.geomspace(1.0, 0.01, u.shape[1])) @ vt  # condition number 100
    x = ref.orthogonalize(g)
    inner = u.T @ x @ vt.T
    assert np.abs(np.diag(inner) - 1.0).max() < 0.15
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-12
    np.testing.assert_allclose(ref.orthogonalize(1e3 * g), x, atol=1e-4)    # the size of a gradient says nothing


@pytest.mark.parametrize("shape", [(96, 24), (24, 24), (24, 96), (2, 32)])
def test_variance_reduction_evens_out_the_long_axis_and_preserves_the_norm(shape):
    rng = np.random.default_rng(7)
    rows, columns = shape
    long_first = rows >= columns
    g = rng.standard_normal(shape) * np.geomspace(1.0, 9.0, rows)[:, None] * np.geomspace(1.0, 9.0, columns)
    first, memory = ref.reduce_variance(g, np.zeros((rows, 1) if long_first else (1, columns)))
    sizes = np.linalg.norm(first, axis=1 if long_first else 0)
    assert np.linalg.norm(first) == pytest.approx(np.linalg.norm(g), rel=1e-12)
    np.testing.assert_allclose(sizes, sizes[0])

    later, remembered = ref.reduce_variance(rng.standard_normal(shape) + g, memory)
    assert np.linalg.norm(later) != pytest.approx(np.linalg.norm(first))    # of what comes in, not of the past
    np.testing.assert_allclose(memory, 0.05 * (g**2).mean(axis=1 if long_first else 0, keepdims=True))
    assert remembered.shape == memory.shape
    assert (remembered > 0.95 * memory).all()


def test_decay_spares_entries_that_the_step_moves_away_from_zero():
    p = np.array([2.0, 2.0, -2.0, -2.0, 2.0, 0.0])
    g = np.array([1.0, -1.0, 1.0, -1.0, 0.0, 1.0])
    moved = ref.cautious_update(p, g, lr=0.1, weight_decay=0.5)
    np.testing.assert_allclose(moved, [2.0 - 0.1 - 0.1, 2.1, -2.1, -2.0 + 0.1 + 0.1, 2.0 - 0.1, -0.1])


def zeros_but(**given: np.ndarray) -> ref.Params:
    return {name: given.get(name, np.zeros(shape)) for name, shape in ref.shapes(CONFIG).items()}


def test_muon_looks_ahead_by_the_interpolated_momentum():
    name = "transformer.h.1.attn.c_q.weight"
    rng = np.random.default_rng(8)
    g1, g2 = rng.standard_normal((2, 48, 48))
    params, optimizer = zeros_but(), ref.MuonAdamW(CONFIG)
    optimizer.step(params, zeros_but(**{name: g1}), 1.0, momentum=0.85, weight_decay=0.0)
    before = params[name]
    optimizer.step(params, zeros_but(**{name: g2}), 1.0, momentum=0.90, weight_decay=0.0)

    _, memory = ref.reduce_variance(ref.orthogonalize(g1), np.zeros((48, 1)))   # the first input is a multiple of g1
    buffer = 0.90 * 0.15 * g1 + 0.10 * g2
    expected, _ = ref.reduce_variance(ref.orthogonalize(0.10 * g2 + 0.90 * buffer), memory)
    np.testing.assert_allclose(before - params[name], 0.04 * expected, rtol=0, atol=1e-7)


def test_muon_steps_further_by_the_root_of_rows_over_columns():
    fc, proj = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight"
    g = np.random.default_rng(9).standard_normal((4 * 48, 48))
    params = zeros_but()
    ref.MuonAdamW(CONFIG).step(params, zeros_but(**{fc: g, proj: g.T}), 1.0, 0.95, 0.0)
    np.testing.assert_allclose(params[fc], 2.0 * params[proj].T, rtol=1e-10)


def test_adamw_moves_by_its_rate_whatever_the_size_of_a_steady_gradient():
    names = ["lm_head.weight", "transformer.wte.weight", "value_embeds.4.weight", "resid_lambdas", "x0_lambdas"]
    by_width = (48 / 768) ** -0.5                       # 4
    rates = [0.004 * by_width, 0.6 * by_width, 0.6 * by_width, 0.5 * 0.01, 0.5]
    rng = np.random.default_rng(10)
    grads = zeros_but(**{name: rng.standard_normal(ref.shapes(CONFIG)[name]) for name in names})
    grads["lm_head.weight"][0] = 0.0                    # a token that never occurs does not move
    params, optimizer = zeros_but(), ref.MuonAdamW(CONFIG)
    for _ in range(3):
        optimizer.step(params, grads, 0.5, momentum=0.95, weight_decay=0.2)
    for name, rate in zip(names, rates, strict=True):
        np.testing.assert_allclose(params[name], -3 * 0.5 * rate * np.sign(grads[name]), rtol=1e-5)


def test_adamw_remembers_by_its_betas():
    grads = [3.0, -1.0]
    for name, beta1 in (("resid_lambdas", 0.8), ("x0_lambdas", 0.96)):
        params, optimizer = zeros_but(), ref.MuonAdamW(CONFIG, ref.LearningRates(scalar=1.0))
        for g in grads:
            before = params[name]
            optimizer.step(params, zeros_but(**{name: np.full(5, g)}), 1.0, 0.95, 0.2)
        mean = (beta1 * 3.0 - 1.0) / (1 + beta1)        # the weights of a bias-corrected average add up to one
        square = (0.95 * 9.0 + 1.0) / (1 + 0.95)
        rate = 0.01 if name == "resid_lambdas" else 1.0
        np.testing.assert_allclose(before - params[name], rate * mean / square**0.5, rtol=1e-8)


def test_step_leaves_the_arrays_it_was_given_alone():
    params = ref.random_params(CONFIG, seed=11)
    given, copies = dict(params), {name: p.copy() for name, p in params.items()}
    ref.MuonAdamW(CONFIG).step(params, ref.random_params(CONFIG, seed=12), 1.0, 0.95, 0.2)
    for name in copies:
        assert np.array_equal(given[name], copies[name])
        assert not np.array_equal(params[name], copies[name])


def test_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match="no AdamW group for 'bias'"):
        ref.adamw_group("bias", 768, ref.LearningRates())


# ----------------------------------------------------------------------------------------------------------------------
# Schedules
# ----------------------------------------------------------------------------------------------------------------------


def test_schedules():
    assert [ref.lr_multiplier(p) for p in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    shaped = [ref.lr_multiplier(p, warmup_ratio=0.2, warmdown_ratio=0.4, final_lr_frac=0.1) for p in (0.0, 0.1, 0.5)]
    assert shaped == [0.0, 0.5, 1.0]
    assert ref.lr_multiplier(0.8, warmdown_ratio=0.4, final_lr_frac=0.1) == pytest.approx(0.55)
    assert [ref.muon_momentum(s) for s in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert [ref.muon_weight_decay(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.2, 0.15, 0.0])
