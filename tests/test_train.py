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
from counts import Counts
from train_mlx import GPT, GPTConfig, adagrad_rows, attend, head_loss, init_optimizer, make_step, ngram_rows, schedule

ROOT = Path(__file__).parent.parent
CONFIG = GPTConfig(vocab_size=61, seq_len=16, n_layer=3, n_head=2, n_embd=32, window_pattern="SL", ngram_buckets=(97, 101))


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


@pytest.mark.parametrize("again", [False, True])
def test_compiled_step_equals_eager_step(compiled: None, again: bool) -> None:
    with_compile, losses = steps(5, again=again)
    mx.disable_compile()
    without, eager_losses = steps(5, again=again)
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    assert distance(with_compile, without) < 1e-4
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("again", [False, True])
def test_a_moving_schedule_is_not_traced_again(compiled: None, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    traces = []
    original = train_mlx.cross_entropy
    monkeypatch.setattr(train_mlx, "cross_entropy", lambda *a: (traces.append(1), original(*a))[1])
    steps(12, again=again)
    assert len(traces) == 1


def test_accumulation_equals_the_large_batch() -> None:
    model, params = fresh()
    whole = next(batches(8))
    halves = iter([(x, y) for x, y in zip(np.split(whole[0], 2), np.split(whole[1], 2), strict=True)])
    at_once, _, loss = make_step(model, CONFIG.n_embd, 1)(params, init_optimizer(params), schedule(0, 0), iter([whole]))
    in_parts, _, part_loss = make_step(model, CONFIG.n_embd, 2)(params, init_optimizer(params), schedule(0, 0), halves)
    assert part_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    # Adam's first step is the sign of the gradient, so that an entry near zero may flip: compare the matrices
    matrices = [n for n in params if train_mlx.is_matrix(n) or n == train_mlx.NGRAMS]
    assert distance({n: in_parts[n] for n in matrices}, {n: at_once[n] for n in matrices}) < 1e-4


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


def test_the_loss_in_chunks_equals_the_loss_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(((2, 16, 8), (61, 8))))
    targets = mx.random.randint(0, 61, (2, 16), key=mx.random.key(2))

    def found(tokens: int) -> list[mx.array]:
        monkeypatch.setattr(train_mlx, "LOSS_TOKENS", tokens)
        loss, grads = mx.value_and_grad(lambda x, w: 3 * head_loss(x, w, targets, 15.0), (0, 1))(x, weight)
        return [loss, *grads]
    for tokens in (1, 5, 16):
        assert all(mx.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(found(tokens), found(32), strict=True))


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


@pytest.mark.parametrize("again", [False, True])
def test_the_residual_stream_has_the_activations_dtype_all_the_way(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
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
    expected = train_mlx.expected_memory(model, params, state, step, rows, 64, accumulate)(rows)
    x = np.zeros((rows, 64), np.int32)
    mx.reset_peak_memory()
    for i in range(4):
        params, state, loss = step(params, state, schedule(0, i), iter([(x, x)] * accumulate))
        mx.async_eval(params, state, loss)
    mx.eval(params, state)
    assert expected == pytest.approx(mx.get_peak_memory(), rel=0.15)


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
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] or len(lines) == 1
    assert {"step", "tokens", "seconds", "loss", "lr", "tokens_per_second", "mfu_percent", "memory_mb"} <= set(lines[0])
    model = train_mlx.load_model(out)
    logits = model(np.zeros((2, 8), np.int32))
    assert logits.shape == (2, 8, 320)
    assert logits.dtype == np.float32


def test_counts_are_a_share_of_what_the_scorer_is_told(tmp_path: Path, home: Path) -> None:
    process, out = run(tmp_path, home, (ROOT / "train_mlx.py").read_text(), AUTORESEARCH_BUDGET="3steps")
    assert process.returncode == 0, process.stderr
    rows = np.random.default_rng(0).integers(0, 320, (2, 16)).astype(np.int32)
    both = train_mlx.load_model(out)(rows)
    counts = Counts.load(out / "counts.npz")
    (out / "counts.npz").unlink()
    network = train_mlx.load_model(out)(rows)
    np.testing.assert_allclose(both, counts.mixed(network, rows, train_mlx.COUNT_SHARE, train_mlx.COPY_SHARES), rtol=1e-5)
    assert np.abs(both - network).max() > 0.5


def test_a_run_without_counts_leaves_none_and_takes_none_over(tmp_path: Path, home: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "counts.npz").write_bytes(b"of an earlier run")
    source = re.sub(r"^COUNT_ORDER = .*", "COUNT_ORDER = 0", (ROOT / "train_mlx.py").read_text(), flags=re.M)
    process, out = run(tmp_path, home, source, AUTORESEARCH_BUDGET="1steps")
    assert process.returncode == 0, process.stderr
    assert not (out / "counts.npz").exists()
    assert train_mlx.load_model(out)(np.zeros((1, 4), np.int32)).shape == (1, 4, 320)


def test_a_budget_that_counting_used_up_is_told_by_name(tmp_path: Path, home: Path) -> None:
    process, out = run(tmp_path, home, changed("    counted, window =", "    time.sleep(0.3)\n    counted, window ="),
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
    source = changed("    def step(params, state, schedule, batches):\n",
                     "    def step(params, state, schedule, batches):\n        print(f'AGAIN {again} {schedule[4].item():.1f}')\n")
    assert source.count("// run.train_tokens") == 1
    source = source.replace("// run.train_tokens", "// (3 * 1024)")
    process, _ = run(tmp_path, home, source, AUTORESEARCH_BUDGET="8steps")
    assert process.returncode == 0, process.stderr
    said = [line.split("AGAIN ")[1] for line in process.stdout.splitlines() if "AGAIN" in line]
    assert said[-8:] == ["False 0.0"] * 3 + ["True 0.1"] * 3 + ["True 0.2"] * 2


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
    assert "the loss became" in error["message"]
    assert not (out / "train.json").exists()


@pytest.mark.parametrize(("line", "kind", "exit_code"), [("np.zeros(1 << 50)", "oom", 4), ("1 / 0", "crash", 1)])
def test_out_of_memory_is_told_apart_from_a_crash(tmp_path: Path, home: Path, line: str, kind: str, exit_code: int) -> None:
    process, out = run(tmp_path, home, changed("    limit = memory_limit()\n", f"    {line}\n    limit = memory_limit()\n"))
    assert process.returncode == exit_code, process.stderr
    assert json.loads((out / "error.json").read_text())["kind"] == kind
    assert "Traceback" in process.stderr
