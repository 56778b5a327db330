"""`train_torch.py` against the float64 reference and against `train_mlx.py`, and its runs as real processes.

On a machine without a GPU everything here is fp32 on the CPU, with bfloat16, fp16 and the tracing of torch.compile tried there
too, and stand-ins for a device with little memory, one without a compiler, and Windows. What is not covered then: the kernels of
CUDA and MPS, pinned copies, events, and the code that torch.compile generates.
"""

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import reference as ref  # noqa: E402
import test_parity as parity  # noqa: E402
from conftest import PINNED, ROOT, on_windows, program, summary_of  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from pinned import train_mlx, train_torch  # noqa: E402
from pinned.train_torch import GPT, NGRAMS, GPTConfig, init_optimizer, make_gradients, make_step, schedule  # noqa: E402

from scripts import compare_backends, peer_shim  # noqa: E402

CONFIG, TOLERANCE = parity.CONFIG, parity.TOLERANCE
# N-grams, and table sizes that are no powers of two; enough tokens for the hash to pass 2**32 at once
SMALL = {"vocab_size": 5000, "n_layer": 3, "n_head": 2, "n_embd": 64, "ngram_buckets": (997, 1013)}
# What PyTorch needs besides the names of train_mlx.py, which imports two of them
OWN = {"DEVICE", "GPU", "COMPILE", "CHECKPOINT", "compiled", "without_compiler", "gpu_dtype", "rope",
       "attention", "recomputed", "to_device", "synchronize", "marker", "reset_peak_memory", "peak_memory",
       "out_of_memory", "fitting_step"}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is remembered from outside."""
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in parity.UPSTREAM.items():
        assert hasattr(train_torch, name)
        monkeypatch.setattr(train_torch, name, value)
    monkeypatch.setattr(train_torch, "DTYPE", torch.float32)


@pytest.fixture
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_torch, "DTYPE", torch.float32)
    monkeypatch.setattr(train_mlx, "DTYPE", mx.float32)


def tensor(array) -> torch.Tensor:
    """On the device, floats as fp32 and whole numbers as int64."""
    t = torch.from_numpy(np.array(array))
    return t.to(train_torch.DEVICE, torch.float32 if t.is_floating_point() else torch.int64)


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().cpu().numpy()


def build_model(config: GPTConfig | None = None) -> GPT:
    """A model of this size; else upstream's, whose attention gates are 1 and not trained: their weights are 0, and no step is
    given them."""
    model = GPT(config or GPTConfig(CONFIG.vocab_size, CONFIG.n_layer, CONFIG.n_head, CONFIG.n_embd, (), CONFIG.softcap,
                                    CONFIG.rope_base)).to(train_torch.DEVICE)
    for block in () if config else model.blocks:
        torch.nn.init.zeros_(block.attn.out_gate.to(train_torch.DTYPE).weight)
    return model


def random_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of a SMALL model, fp32; n-gram tables, output projections and gates are not 0."""
    shapes = {name: p.shape for name, p in build_model(GPTConfig(**SMALL)).named_parameters()}
    return {name: (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32) for name, shape in shapes.items()}


def rates(lr: float, momentum: float, weight_decay: float, step: int) -> dict[str, torch.Tensor]:
    """As `schedule` returns them, for the first epoch."""
    values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "step": step, "dropout": 0, "first_epoch": 1}
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def to_ours(params: ref.Params) -> dict[str, torch.Tensor]:
    return {parity.our_name(name): tensor(p) for name, p in params.items()}


def assert_all_close(ours: dict[str, torch.Tensor], theirs: ref.Params, tolerance: float) -> None:
    parity.assert_all_close({name: array(p) for name, p in ours.items()}, theirs, tolerance)


def split(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return batch[:, :-1], batch[:, 1:]


def outline(name: str) -> list[str]:
    """Names of upper-case constants, functions, classes and their methods, in order."""
    names = []
    for node in ast.parse((PINNED / name).read_text()).body:
        if isinstance(node, ast.ClassDef):
            names += [node.name, *(f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef))]
        elif isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            names.append(node.targets[0].id)
    return [name.replace("__call__", "forward") for name in names]


def test_the_file_translates_train_mlx() -> None:
    """Whatever one train file has, the other has too, in the same order. Values may differ: a night edits one of the files."""
    ours = outline("train_torch.py")
    assert [name for name in ours if name not in OWN] == outline("train_mlx.py")
    assert set(ours) >= OWN


def test_schedules_are_equal() -> None:
    for progress in (0.0, 0.3, 0.6, 0.8, 1.0, 1.2):
        for step in (0, 1, 100, 199, 200, 5000):
            for epoch in (0, 1, 2, 9):
                ours, theirs = schedule(progress, step, epoch), train_mlx.schedule(progress, step, epoch)
                assert set(ours) >= set(theirs)
                for name, value in ours.items():
                    assert (value.shape, value.dtype) == ((), torch.float32)
                    expected = theirs[name].item() if name in theirs else 0  # MLX leaves out what is off
                    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_a_file_without_dropout_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `benchmark.py compare`, which turns it off in both files, would time random numbers in one of them."""
    monkeypatch.setattr(train_torch, "DROPOUT", (0.0,))
    assert "dropout" not in schedule(0.5, 9, 2)
    model, x = build_model(GPTConfig(**SMALL)), torch.zeros(1, 8, dtype=torch.int64)
    before = torch.get_rng_state()
    make_gradients(model)({n: p.detach() for n, p in model.named_parameters()}, schedule(0.5, 9, 2), x, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_peer_gets_its_tokens_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "device", torch.device("meta"), raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core")
    assert peer_shim.as_array(np.zeros((2, 3), np.int32)).device.type == "meta"


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize("tokens", [16, 9, 5, 1])
def test_logits_are_those_of_mlx(tokens: int) -> None:
    """From MLX's own weights, tables of n-grams included: their rows are found by the same hash."""
    theirs, rng = train_mlx.GPT(train_mlx.GPTConfig(**SMALL)), np.random.default_rng(2)
    weights = random_weights(rng)
    assert {name: p.shape for name, p in tree_flatten(theirs.parameters())} == {name: p.shape for name, p in weights.items()}
    theirs.update(tree_unflatten([(name, mx.array(p)) for name, p in weights.items()]))
    ours = build_model(GPTConfig(**SMALL))
    ours.load_state_dict({name: tensor(p) for name, p in weights.items()})
    x = rng.integers(0, SMALL["vocab_size"], (3, tokens)).astype(np.int32)
    expected = np.array(theirs(mx.array(x)))
    assert np.abs(expected).max() > 0.1
    assert np.abs(array(ours(tensor(x))) - expected).max() < 1e-4
    assert ours.flops_per_token(16) == theirs.flops_per_token(16)


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize("epoch", [0, 1])
def test_gradients_are_those_of_mlx(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Of all weights and of the summed n-gram embeddings. From the second epoch on those are 0 here, and MLX leaves them out."""
    for module in (train_mlx, train_torch):
        monkeypatch.setattr(module, "DROPOUT", (0.0,))
    rng = np.random.default_rng(8)
    weights, (x, y) = random_weights(rng), split(rng.integers(0, 40, (4, 17), dtype=np.int32))
    theirs = train_mlx.make_gradients(train_mlx.GPT(train_mlx.GPTConfig(**SMALL)))
    expected_loss, expected, expected_rows = theirs(
        {n: mx.array(p) for n, p in weights.items()}, train_mlx.schedule(0, 0, epoch), mx.array(x), mx.array(y))
    loss, grads, rows = make_gradients(build_model(GPTConfig(**SMALL)))(
        {n: tensor(p) for n, p in weights.items()}, schedule(0, 0, epoch), tensor(x), tensor(y))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    if epoch:
        assert expected_rows is None
        assert not grads.pop(NGRAMS).any()
    else:
        assert np.array_equal(array(rows), np.array(expected_rows))
    assert set(grads) == set(expected)
    for name, g in expected.items():
        assert parity.difference(array(grads[name]), np.array(g)) < 1e-4, name


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize(("accumulation_steps", "epoch"), [(1, 0), (2, 0), (1, 1), (2, 1)])
def test_tables_and_losses_are_those_of_mlx_after_several_steps(
        monkeypatch: pytest.MonkeyPatch, accumulation_steps: int, epoch: int) -> None:
    """From the same weights, on text in which n-grams return: rows are updated again, in one step and in several. In the second
    epoch the tables stay as they are, bit for bit.

    All else stays as it is: Adam's first steps go by a gradient's sign, which rounding decides near 0, and the two would part.
    """
    for module in (train_mlx, train_torch):
        for name in ("MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR", "SCALAR_LR"):
            monkeypatch.setattr(module, name, 0.0)
        monkeypatch.setattr(module, "DROPOUT", (0.0,))
    rng = np.random.default_rng(3)
    weights, text = random_weights(rng), rng.integers(0, 40, (6, 4, 17), dtype=np.int32)

    def losses(module: Any, params: dict, step: Any) -> tuple[list[float], np.ndarray, np.ndarray]:
        moments, found = module.init_optimizer(params), []
        for i, batch in enumerate(text):
            parts = zip(*(np.split(t, accumulation_steps) for t in split(batch)), strict=True)
            params, moments, loss = step(params, moments, module.schedule(i / 6, i, epoch), parts)
            found.append(loss.item())
        table, (sums,) = params[NGRAMS], moments[NGRAMS]
        return found, np.array(table.tolist()), np.array(sums.tolist())

    expected_losses, expected, expected_sums = losses(
        train_mlx, {n: mx.array(p) for n, p in weights.items()},
        train_mlx.make_step(train_mlx.GPT(train_mlx.GPTConfig(**SMALL)), accumulation_steps))
    found_losses, found, found_sums = losses(
        train_torch, {n: tensor(p) for n, p in weights.items()}, make_step(build_model(GPTConfig(**SMALL)), accumulation_steps))
    assert found_losses == pytest.approx(expected_losses, rel=1e-5)
    if epoch:
        assert not expected_sums.any()
        assert not found_sums.any()
        np.testing.assert_array_equal(found, weights[NGRAMS])
        np.testing.assert_array_equal(expected, weights[NGRAMS])
        return
    touched = np.abs(expected - weights[NGRAMS]).max(axis=1) > 0
    assert 0.2 < touched.mean() < 0.95
    assert np.array_equal(touched, np.abs(found - weights[NGRAMS]).max(axis=1) > 0)
    assert parity.difference(found, expected) < 1e-5
    assert parity.difference(found_sums, expected_sums) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dropout_rate_of_zero_changes_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(50, 400).to(train_torch.DEVICE, dtype)
    assert train_torch.dropout(x, None) is x
    assert torch.equal(train_torch.dropout(x, schedule(0, 0)["dropout"].to(x.device)), x)


def test_dropout_zeroes_a_share_and_scales_the_rest() -> None:
    x = torch.ones(500, 400, device=train_torch.DEVICE)
    kept = array(train_torch.dropout(x, torch.tensor(0.2, device=x.device)))
    assert sorted(set(kept.ravel())) == pytest.approx([0, 1.25])
    assert (kept == 0).mean() == pytest.approx(0.2, abs=0.01)


@pytest.mark.usefixtures("fp32")
def test_a_step_without_dropout_has_the_loss_of_the_model_that_is_scored() -> None:
    rng = np.random.default_rng(9)
    params, (x, y) = {n: tensor(p) for n, p in random_weights(rng).items()}, split(rng.integers(0, 5000, (4, 17), dtype=np.int32))
    model = build_model(GPTConfig(**SMALL))
    logits = train_torch.with_weights(model, params)(tensor(x))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tensor(y).flatten()).item()
    losses = []
    for epoch, rate in ((0, 0.0), (1, 0.0), (0, 0.3)):
        now = schedule(0, 0, epoch) | {"dropout": torch.tensor(rate)}
        loss, _, _ = make_gradients(model)(params, {n: t.to(train_torch.DEVICE) for n, t in now.items()}, tensor(x), tensor(y))
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    assert all(abs(loss - expected) > 1e-3 for loss in losses[1:])


@pytest.mark.usefixtures("fp32")
def test_adagrad_touches_the_rows_of_the_batch_and_adds_up_what_a_row_got_twice() -> None:
    table, v, g = torch.ones(5, 2), torch.zeros(5), torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    after, sums = train_torch.adagrad_rows(table, v, torch.tensor([[1, 1], [2, 3]]), g, 0.1)
    assert after is table, "in place: a copy would cost more than the step"
    assert sums is v
    assert np.allclose(array(v), [0, 10, 1, 9, 0])
    assert np.allclose(array(table)[:, 0], [1, 1 - 0.1 * 4 / 10**0.5, 0.9, 0.9, 1])


def test_warm_up_leaves_the_weights_as_they_were() -> None:
    model = build_model(GPTConfig(**SMALL))
    model.init_weights(1)
    params = {n: p.detach() for n, p in model.named_parameters()}
    moments, before, after = init_optimizer(params), {n: p.clone() for n, p in params.items()}, []

    def step(*args: Any) -> None:
        after.extend(make_step(model, 2)(*args))
    seconds, peak = train_torch.dummy_step(params, moments, step, 2, 16)
    assert min(seconds, peak) > 0
    assert all(torch.equal(before[n], p) for n, p in params.items())
    assert not any(t.any() for ts in moments.values() for t in ts)
    assert after[0][NGRAMS].any()


@pytest.mark.usefixtures("fp32")
def test_new_weights_are_distributed_as_those_of_mlx() -> None:
    theirs, ours = train_mlx.GPT(train_mlx.GPTConfig(**SMALL)), build_model(GPTConfig(**SMALL))
    theirs.init_weights(1)
    ours.init_weights(1)
    expected = {name: np.array(p) for name, p in tree_flatten(theirs.parameters())}
    for name, p in ours.named_parameters():
        spread = float(expected[name].std())
        assert array(p).mean() == pytest.approx(float(expected[name].mean()), abs=0.1 * spread + 1e-6), name
        assert array(p).std() == pytest.approx(spread, rel=0.05, abs=1e-6), name
        assert np.abs(array(p)).max() == pytest.approx(float(np.abs(expected[name]).max()), rel=0.3), name


# ----------------------------------------------------------------------------------------------------------------------
# Against the reference
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("upstream")
@pytest.mark.parametrize("tokens", [21, 12, 1])
def test_logits(tokens: int) -> None:
    params, x = parity.weights(seed=0), parity.batches(1, seed=1)[0, :, :tokens]
    model = build_model()
    model.load_state_dict(to_ours(params), strict=False)
    ours = model(tensor(x))
    assert ours.dtype == torch.float32
    assert parity.difference(array(ours), ref.forward(params, CONFIG, x)) < TOLERANCE


@pytest.mark.usefixtures("upstream")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", TOLERANCE), ("bfloat16", parity.BF16_LOGITS)])
def test_logits_of_a_saved_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, tolerance: float) -> None:
    monkeypatch.setattr(train_torch, "DTYPE", getattr(torch, dtype))
    params, x = parity.weights(seed=0), parity.batches(1, seed=1)[0, :, :-1]
    model = build_model()
    torch.save({name: p.cpu() for name, p in {**model.state_dict(), **to_ours(params)}.items()}, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps(asdict(model.config)))
    ours = train_torch.load_model(tmp_path)(x)
    assert ours.dtype == np.float32
    assert parity.difference(ours, ref.forward(params, CONFIG, x)) < tolerance


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"wte.weight": Malice()}, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps(asdict(GPTConfig(**SMALL))))
    with pytest.raises(Exception, match="Weights only load failed"):
        train_torch.load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def loss_and_grads(params: ref.Params, x: np.ndarray, y: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    """By the step that trains: after the first one, every momentum is its gradient times (1 - beta)."""
    ours = to_ours(params)
    _, state, loss = make_step(build_model(), 1)(ours, init_optimizer(ours), rates(1.0, 0.5, 0.0, 1), iter([(x, y)]))
    grads = {}
    for key, names in train_torch.matrix_groups(ours).items():
        grads |= dict(zip(names, state[key][0] / (1 - 0.5), strict=True))
    for name in set(ours) - set(grads):
        grads[name] = state[name][0] / (1 - train_torch.adam_group(name, CONFIG.n_embd)[1][0])
    return loss.item(), grads


@pytest.mark.usefixtures("upstream")
def test_loss_and_all_gradients() -> None:
    params, (x, y) = parity.weights(seed=2), split(parity.batches(1, seed=3)[0])
    loss, grads = loss_and_grads(params, x, y)
    expected_loss, expected = ref.loss_and_grads(params, CONFIG, x, y)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert_all_close(grads, expected, TOLERANCE)


@pytest.mark.usefixtures("upstream")
def test_loss_and_all_gradients_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_torch, "DTYPE", torch.bfloat16)
    params, (x, y) = parity.weights(seed=2), split(parity.batches(1, seed=3)[0])
    loss, grads = loss_and_grads(params, x, y)
    expected_loss, expected = ref.loss_and_grads(params, CONFIG, x, y)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert loss == pytest.approx(expected_loss, rel=parity.BF16_LOSS)
    scalars = {name: expected.pop(name) for name in ("resid_lambdas", "x0_lambdas")}
    assert_all_close({name: grads.pop(name) for name in scalars}, scalars, parity.BF16_SCALAR_GRADS)
    assert_all_close(grads, expected, parity.BF16_GRADS)


@pytest.mark.usefixtures("upstream")
def test_ten_training_steps() -> None:
    """Left to itself for ten steps, without decay, whose mask is a step function: see test_parity.py."""
    params, optimizer = parity.weights(seed=42), ref.MuonAdamW(CONFIG)
    ours = to_ours(params)
    state, step_fn = init_optimizer(ours), make_step(build_model(), 1)
    for step, batch in enumerate(parity.batches(10, seed=43)):
        x, y = split(batch)
        factor, momentum = ref.lr_multiplier(step / 10), ref.muon_momentum(60 * step)
        ours, state, loss = step_fn(ours, state, rates(factor, momentum, 0.0, step + 1), iter([(x, y)]))
        expected_loss, grads = ref.loss_and_grads(params, CONFIG, x, y)
        optimizer.step(params, grads, factor, momentum, 0.0)
        assert loss.item() == pytest.approx(expected_loss, rel=TOLERANCE)
        assert_all_close(ours, params, TOLERANCE)


@pytest.mark.usefixtures("upstream")
def test_ten_optimizer_steps_with_decay() -> None:
    """From the same weights and gradients at every step. An entry whose update is zero to within rounding may be decayed on
    one side only: such entries are off by that one decay, and are very few."""
    params, optimizer = parity.weights(seed=6), ref.MuonAdamW(CONFIG)
    state = init_optimizer(to_ours(params))
    entries = undecided = 0
    for step in range(10):
        grads = parity.weights(seed=100 + step)
        factor, momentum, decay = ref.lr_multiplier(step / 10), ref.muon_momentum(60 * step), 0.2 * (1 - step / 10)
        before = dict(params)
        ours, state = train_torch.update(
            to_ours(params), to_ours(grads), state, rates(factor, momentum, decay, step + 1), CONFIG.n_embd)
        optimizer.step(params, grads, factor, momentum, decay)
        for name, p in params.items():
            off = array(ours[parity.our_name(name)]) - p
            if name.startswith("transformer.h."):
                rows, columns = p.shape
                one_decay = 0.04 * factor * max(1.0, rows / columns) ** 0.5 * decay * np.abs(before[name])
                flipped = np.abs(off) > np.maximum(one_decay / 2, TOLERANCE * np.sqrt(np.mean(p * p)))
                off -= flipped * np.sign(off) * one_decay
                entries, undecided = entries + p.size, undecided + flipped.sum()
            assert np.linalg.norm(off) < TOLERANCE * np.linalg.norm(p), f"{name} at step {step}"
        params = {name: p.astype(np.float32).astype(float) for name, p in params.items()}
    assert undecided < 1e-5 * entries


# ----------------------------------------------------------------------------------------------------------------------
# Attention, steps
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["own", "mps"])      # the mask that MPS gets is tried on the machine's own device
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_attention_is_causal(monkeypatch: pytest.MonkeyPatch, device: str, tokens: int) -> None:
    q, k, v = (tensor(np.random.default_rng(i).standard_normal((2, 3, tokens, 8))) for i in range(3))
    if device == "mps":
        monkeypatch.setattr(train_torch, "DEVICE", "mps")
    scores = np.where(np.tri(tokens, dtype=bool), array(q @ k.mT) * 8**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ array(v)
    assert np.abs(array(train_torch.attention(q, k, v)) - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_token_sees_the_future(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(train_torch, "DTYPE", getattr(torch, dtype))
    model = build_model(GPTConfig(**SMALL))
    rng = np.random.default_rng(1)
    model.load_state_dict({n: tensor(0.1 * rng.standard_normal(p.shape)) for n, p in model.named_parameters()})
    for name, p in model.named_parameters():
        if train_torch.is_matrix(name) or name == "lm_head.weight":
            p.data = p.data.to(train_torch.DTYPE)
    a = rng.integers(0, SMALL["vocab_size"], (2, 16))
    for t in range(1, 16):
        b = a.copy()
        b[:, t:] = (b[:, t:] + 7) % SMALL["vocab_size"]
        with torch.inference_mode():
            left, right = array(model(tensor(a))), array(model(tensor(b)))
        assert np.array_equal(left[:, :t], right[:, :t])
        assert np.abs(left[:, t:] - right[:, t:]).max() > 1e-3


def steps(n: int, accumulation_steps: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Weights, first moments and losses of `n` steps over two epochs from random weights, on 4 rows a step."""
    rng, losses = np.random.default_rng(5), []
    params = {n: tensor(p) for n, p in random_weights(rng).items()}
    moments, step = init_optimizer(params), make_step(build_model(GPTConfig(**SMALL)), accumulation_steps)
    for i in range(n):
        x, y = split(rng.integers(0, SMALL["vocab_size"], (4, 17), dtype=np.int32))
        parts = zip(np.split(x, accumulation_steps), np.split(y, accumulation_steps), strict=True)
        params, moments, loss = step(params, moments, schedule(i / n, i, epoch=2 * i // n), parts)
        losses.append(loss.item())
    return params, {name: moment[0] for name, moment in moments.items()}, losses


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative to each tensor's norm."""
    return max((torch.linalg.norm(a[n] - b[n]) / torch.linalg.norm(b[n])).item() for n in a)


@pytest.mark.usefixtures("fp32")
def test_accumulated_gradients_are_those_of_one_batch() -> None:
    (_, parts, parts_losses), (_, whole, whole_losses) = steps(1, accumulation_steps=4), steps(1)
    assert parts_losses == pytest.approx(whole_losses, rel=TOLERANCE)
    assert largest_difference(parts, whole) < TOLERANCE


def test_a_weight_that_the_loss_does_not_use_stays() -> None:
    """As in MLX: an edit may leave a weight unused without ending the run."""
    model = build_model(GPTConfig(**SMALL))
    model.idle = torch.nn.Parameter(torch.ones(3, device=train_torch.DEVICE))
    params = {n: p.detach() for n, p in model.named_parameters()}
    x = np.zeros((2, 16), np.int32)
    after, _, _ = make_step(model, 1)(params, init_optimizer(params), schedule(0, 0), iter([(x, x)]))
    assert torch.equal(after["idle"], params["idle"])


def test_expected_memory_is_a_line_through_what_small_passes_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in tells a GPU's counters: 1000 bytes and 30 per row for gradients, 5000 for a step of one row. A step of several
    micro-batches also keeps the n-gram gradients of 1000 rows of 16 tokens, 4 bytes per token and channel."""
    held = []
    monkeypatch.setattr(train_torch, "reset_peak_memory", held.clear)
    monkeypatch.setattr(train_torch, "peak_memory", lambda: sum(held))
    monkeypatch.setattr(train_torch, "synchronize", lambda: None)
    monkeypatch.setattr(train_torch, "make_gradients", lambda model: lambda params, rates, x, y: held.append(1000 + 30 * len(x)))

    def expected(channels: int) -> list[int]:
        model = SimpleNamespace(config=SimpleNamespace(n_embd=channels))
        of_passes = train_torch.expected_memory(model, {}, {}, lambda *_: held.append(5000), 1000, 100, 16)
        return of_passes and [of_passes(passes) for passes in (1000, 10, 1)]
    if train_torch.DEVICE == "cpu":
        assert expected(0) is None
        monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, **__: t)
        monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, zeros=torch.zeros, **kw: zeros(*shape, **kw))
        monkeypatch.setattr(train_torch, "to_device", lambda t: t)
    monkeypatch.setattr(train_torch, "DEVICE", "mps")
    assert expected(0) == [5000, 5000, 31_000]
    assert expected(1) == [65_030, 68_000, 31_000]


def test_peak_memory_of_mps_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its driver holds is more: buffers that were freed, and heaps of 1 GiB."""
    monkeypatch.setattr(train_torch, "DEVICE", "mps")
    monkeypatch.setattr(train_torch, "GPU", True)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 12345)
    assert train_torch.peak_memory() == 12345
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 5 << 30)
    assert train_torch.memory_limit() == 4 << 30


def test_on_cuda_the_memory_of_other_programs_is_not_counted_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_torch, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1 << 30)
    assert train_torch.memory_limit() == 4 << 30


class Device:
    """A stand-in for a device with little memory: a step runs out of it if a pass has more rows than fit, `more` with recomputed
    activations; a compiled step fails with `broken`, if that is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fits: int, more: int = 0, broken: Exception | None = None):
        self.tried: list[tuple[int, bool, bool]] = []  # without repetitions
        for name in ("COMPILE", "CHECKPOINT"):
            monkeypatch.setattr(train_torch, name, name == "COMPILE" and bool(broken))

        def dummy_step(params: Any, moments: Any, step: int, rows: int, seq_len: int) -> tuple[float, float]:
            assert step * rows == 16, "a step trains as many rows as the file says"
            now = (rows, train_torch.COMPILE, train_torch.CHECKPOINT)
            self.tried += [now] * (self.tried[-1:] != [now])
            if train_torch.COMPILE:
                raise broken
            if rows > (more if train_torch.CHECKPOINT else fits):
                raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
            return 1.5, 0
        monkeypatch.setattr(train_torch, "dummy_step", dummy_step)
        monkeypatch.setattr(train_torch, "make_step", lambda model, passes: passes)

    def fit(self, expected: Any = None, passes: int = 2, limit: int = 100) -> tuple[int, Any, float]:
        return train_torch.fitting_step(None, {}, {}, expected, passes, 16, 8, limit)


def test_the_largest_pass_that_fits_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What is expected not to fit isn't tried; what doesn't fit nevertheless is halved, and said."""
    assert Device(monkeypatch, fits=8).fit() == (2, 2, 1.5)
    device = Device(monkeypatch, fits=2)
    assert device.fit(lambda passes: 800 / passes) == (8, 8, 1.5)
    assert [rows for rows, *_ in device.tried] == [2]
    device = Device(monkeypatch, fits=2)
    assert device.fit() == (8, 8, 1.5)
    assert [rows for rows, *_ in device.tried] == [8, 4, 2]
    assert "note: 64 tokens in a pass do not fit: 32\n" in capsys.readouterr().out


def test_activations_are_recomputed_only_where_not_even_a_row_fits(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    device = Device(monkeypatch, fits=0, more=4)
    assert device.fit() == (4, 4, 1.5)
    assert [(rows, recomputed) for rows, _, recomputed in device.tried] == [
        (8, False), (4, False), (2, False), (1, False), (8, True), (4, True)]
    assert "gradient checkpointing" in capsys.readouterr().out


def test_what_fits_is_remembered_by_device_and_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The next training does not run out of memory first; another card, another model or less free memory is tried anew."""
    for fits, more in ((2, 0), (2, 0), (0, 4)):
        device = Device(monkeypatch, fits=fits, more=more)
        device.fit()
    assert [rows for rows, *_ in device.tried[:2]] == [2, 1], "what no longer fits is found out as ever"
    assert capsys.readouterr().out.count("16 tokens in a pass, as found before for this device and model") == 2
    again = Device(monkeypatch, fits=0, more=4)
    assert again.fit() == (4, 4, 1.5)
    assert again.tried == [(4, False, True)]
    assert "with gradient checkpointing, as found before" in capsys.readouterr().out
    assert Device(monkeypatch, fits=8).fit(limit=5 << 30)[0] == 2
    monkeypatch.setattr(train_torch, "device_name", lambda: "another card")
    assert Device(monkeypatch, fits=8).fit()[0] == 2
    assert not capsys.readouterr().out


def test_where_nothing_can_be_remembered_a_training_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in the sandbox of a night."""
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "absent"))
    for _ in range(2):
        assert Device(monkeypatch, fits=2).fit() == (8, 8, 1.5)


def test_what_does_not_fit_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(train_torch.HarnessError, match=r"MPS backend out of memory.*lower DEPTH") as caught:
        Device(monkeypatch, fits=0).fit()
    assert caught.value.kind == "oom"


def test_without_a_compiler_a_step_is_not_compiled_and_says_so(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from torch._inductor.exc import TritonMissing
    device = Device(monkeypatch, fits=8, broken=TritonMissing(None))
    assert device.fit() == (2, 2, 1.5)
    assert [compiling for _, compiling, _ in device.tried] == [True, False]
    assert "note: torch.compile does not work here (Cannot find a working triton" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        Device(monkeypatch, fits=8, broken=ZeroDivisionError()).fit()


def test_a_python_that_cannot_compile_trains_all_the_same(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("torch.compile is not supported on Python 3.15+")
    monkeypatch.setattr(train_torch, "COMPILE", True)
    monkeypatch.setattr(torch, "compile", refuse)
    assert train_torch.compiled(len) is len
    assert train_torch.compiled(max) is max
    assert capsys.readouterr().out.count("torch.compile does not work here (torch.compile is not supported on Python 3.15+)") == 1


@pytest.mark.usefixtures("fp32")
def test_a_compiler_that_fails_in_fact_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """With a real torch.compile, whose backend fails as without Triton; memory is measured without it."""
    def backend(graph: Any, _: Any) -> None:
        raise RuntimeError("no compiler")
    monkeypatch.setattr(train_torch, "COMPILE", True)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, compile=torch.compile: compile(f, dynamic=dynamic, backend=backend))
    model = build_model(GPTConfig(**SMALL))
    params = {n: p.detach() for n, p in model.named_parameters()}
    passes, _, seconds = train_torch.fitting_step(model, params, init_optimizer(params), None, 1, 2, 16, 0)
    assert passes == 1
    assert seconds > 0
    assert not train_torch.COMPILE
    assert "torch.compile does not work here" in capsys.readouterr().out


@pytest.mark.usefixtures("fp32")
def test_recomputed_activations_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_torch, "DROPOUT", (0.0,))
    _, plain, losses = steps(2)
    monkeypatch.setattr(train_torch, "CHECKPOINT", True)
    calls = []
    monkeypatch.setattr(train_torch, "checkpoint", lambda *a, original=train_torch.checkpoint, **kw: (calls.append(1), original(
        *a, **kw))[1])
    _, recomputed, again = steps(2)
    assert len(calls) == 2 * SMALL["n_layer"]
    assert again == pytest.approx(losses, rel=1e-6)
    assert largest_difference(recomputed, plain) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# fp16, for cards before Ampere
# ----------------------------------------------------------------------------------------------------------------------


def test_cards_that_emulate_bf16_train_in_fp16_unless_another_dtype_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_torch, "DEVICE", "cuda")
    monkeypatch.setattr(train_torch, "device_name", lambda: "A card cuda torch")
    monkeypatch.setenv("AUTORESEARCH_DTYPES", "{}")
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, own=supported: own or including_emulation)
        assert train_torch.gpu_dtype() == dtype
    monkeypatch.setenv("AUTORESEARCH_DTYPES", '{"A card cuda torch": "float32"}')
    assert train_torch.gpu_dtype() == torch.float32


def test_fp16_trains_as_fp32_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_torch, "DROPOUT", (0.0,))
    losses = {}
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(train_torch, "DTYPE", dtype)
        _, moments, losses[dtype] = steps(4, accumulation_steps=2)
        assert (train_torch.LOSS_SCALE in moments) == (dtype == torch.float16)
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=5e-3)


def test_a_step_that_overflows_in_fp16_changes_nothing_but_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_torch, "DTYPE", torch.float16)
    params = {n: tensor(p) for n, p in random_weights(np.random.default_rng(1)).items()}
    moments, before = init_optimizer(params), {n: p.clone() for n, p in params.items()}
    x, y = split(np.random.default_rng(2).integers(0, 5000, (4, 17), dtype=np.int32))
    step, name = make_step(build_model(GPTConfig(**SMALL)), 1), train_torch.LOSS_SCALE
    moments[name] = (torch.full_like(moments[name][0], 2.0**30),)
    after, new, _ = step(params, moments, schedule(0, 0), iter([(x, y)]))
    assert new[name][0].item() == 2.0**29
    assert all(torch.equal(before[n], p) for n, p in after.items() if n != NGRAMS)
    assert after[NGRAMS].isfinite().all()
    assert not any(t.any() for key, ts in new.items() if key not in (name, NGRAMS) for t in ts)
    new[name] = (torch.full_like(new[name][0], 2.0**10),)
    later, newer, _ = step(after, new, schedule(0, 0), iter([(x, y)]))
    assert 2.0**10 < newer[name][0].item() < 2.0**11
    assert not torch.equal(later["lm_head.weight"], before["lm_head.weight"])


def test_weight_bytes_are_those_of_the_weights_and_moments() -> None:
    params = {n: p.detach() for n, p in build_model(GPTConfig(320)).named_parameters()}
    held = sum(t.nbytes for group in (params.values(), *init_optimizer(params).values()) for t in group)
    assert train_torch.weight_bytes(train_torch.DEPTH, 320) == held == train_mlx.weight_bytes(train_torch.DEPTH, 320)
    assert train_torch.weight_bytes(1, 320) < held < train_torch.weight_bytes(12, 320)


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_step_is_traced_once(monkeypatch: pytest.MonkeyPatch, accumulation_steps: int) -> None:
    """As one graph for the loss and one for the update, in every step and epoch: nothing is compiled during training."""
    monkeypatch.setattr(train_torch, "DROPOUT", (0.0,))  # the two runs would draw different numbers
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    plain, _, _ = steps(6, accumulation_steps)
    monkeypatch.setattr(train_torch, "compiled", lambda f: torch.compile(f, dynamic=False, fullgraph=True, backend=backend))
    traced, _, _ = steps(6, accumulation_steps)
    assert largest_difference(traced, plain) < 1e-4
    assert len(graphs) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Runs, as processes
# ----------------------------------------------------------------------------------------------------------------------


def run(tmp_path: Path, dataset, replace: tuple[str, str] = ("", ""), **env: str) -> tuple[subprocess.CompletedProcess, Path]:
    """Train a copy of the file in which one text is replaced."""
    source = (PINNED / "train_torch.py").read_text()
    assert replace[0] in source
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "train_torch.py").write_text(source.replace(*replace) if replace[0] else source)
    out = tmp_path / "run"
    done = program("train_torch.py", home=dataset.home, cwd=tmp_path, **{
        "AUTORESEARCH_DATA": str(dataset.train), "AUTORESEARCH_RUN_DIR": str(out), "AUTORESEARCH_BUDGET": "30steps",
        "AUTORESEARCH_SCORE": "0", "OMP_NUM_THREADS": "1", **env})  # threads that spin slow down everything beside them
    return done, out


def test_a_run_trains_and_is_scored(tmp_path: Path, tiny) -> None:
    done, out = run(tmp_path, tiny, AUTORESEARCH_SCORE="1")
    assert done.returncode == 0, done.stderr
    summary = summary_of(done.stdout)
    assert 0 < float(summary["val_bpb"]) < 4
    assert summary["num_steps"] == "30"
    assert summary["device"].endswith("torch")
    facts = json.loads((out / "train.json").read_text())
    assert facts["total_tokens"] == 30 * train_torch.BATCH_TOKENS
    assert facts["num_params"] == sum(p.numel() for p in torch.load(out / "weights.pt", weights_only=True).values())
    assert facts["peak_vram_mb"] > 0
    assert 0 < facts["mfu_percent"] < 150
    assert facts["gemm_tflops"] > 0
    assert (facts["expected_vram_mb"] is None) == (train_torch.DEVICE == "cpu")
    logits = train_torch.load_model(out)(np.zeros((2, 8), np.int32))
    assert logits.shape == (2, 8, 320)
    assert logits.dtype == np.float32


def test_a_run_on_windows(tmp_path: Path, tiny) -> None:
    """It trains and is scored; the driver needs WSL 2."""
    done, out = run(tmp_path, tiny, AUTORESEARCH_BUDGET="2steps", AUTORESEARCH_SCORE="1", **on_windows("torch._dynamo"))
    assert done.returncode == 0, done.stderr
    assert 0 < float(summary_of(done.stdout)["val_bpb"]) < 9
    assert json.loads((out / "train.json").read_text())["peak_vram_mb"] > 0


def test_metrics_have_the_keys_of_mlx_and_the_loss_falls(tmp_path: Path, tiny) -> None:
    done, out = run(tmp_path, tiny, AUTORESEARCH_BUDGET="4s")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = ["step", "tokens", "seconds", "progress", "loss", "lr", "tokens_per_second", "mfu_percent", "memory_mb"]
    assert [list(line) for line in lines] == [keys] * len(lines)
    assert len(lines) >= 2
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_same_seed_trains_the_same_weights(tmp_path: Path, tiny) -> None:
    weights = []
    for name, seed in (("a", "4"), ("b", "4"), ("c", "5")):
        _, out = run(tmp_path / name, tiny, AUTORESEARCH_SEED=seed, AUTORESEARCH_BUDGET="3steps")
        weights.append(torch.load(out / "weights.pt", weights_only=True))
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not all(torch.equal(weights[0][n], weights[2][n]) for n in weights[0])


PROBE = "    probe, probe_flops = matmul_probe()\n"


@pytest.mark.parametrize(("before", "after", "kind", "exit_code"), [
    ("    return p - lr * direction, m, v", "    return p * torch.inf, m, v", "nan", 3),
    (PROBE, "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 TiB')", "oom", 4),
    (PROBE, "    raise RuntimeError('MPS backend out of memory (MPS allocated: 9 GB)')", "oom", 4),
    (PROBE, "    raise RuntimeError('Invalid buffer size: 12.00 GiB')", "oom", 4),
    (PROBE, "    raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)')", "oom", 4),
    (PROBE, "    raise RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes')", "oom", 4),
    (PROBE, "    1 / 0", "crash", 1),
], ids=["nan", "oom-cuda", "oom-mps", "oom-metal", "oom-cublas", "oom-cpu", "crash"])
def test_a_failed_run_ends_at_once_with_its_name(
        tmp_path: Path, tiny, before: str, after: str, kind: str, exit_code: int) -> None:
    done, out = run(tmp_path, tiny, (before, f"{after}\n{before}"), AUTORESEARCH_BUDGET="100000steps")
    assert done.returncode == exit_code, done.stderr
    error = json.loads((out / "error.json").read_text())
    assert error["kind"] == kind
    assert not (out / "train.json").exists()


def test_it_imports_its_framework_and_not_the_other_one() -> None:
    code = "import sys, train_torch; print('mlx' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PINNED, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark that compares both files
# ----------------------------------------------------------------------------------------------------------------------


def compared(tiny: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, **constants: str) -> compare_backends.Comparison:
    """A small comparison of the pinned files in fp32 on the CPU, with its initial weights drawn."""
    monkeypatch.setattr(compare_backends, "TRAIN_FILE", PINNED / "train_mlx.py")
    monkeypatch.setattr(compare_backends, "TORCH_FILE", PINNED / "train_torch.py")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tiny.home))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = {"DROPOUT": "(0.0,)", "DEPTH": "2", "WIDTH": "64", "SEQ_LEN": "32", "BATCH_TOKENS": "256", "MICRO_TOKENS": "128",
             "NGRAM_BUCKETS": "(97, 101)"}
    shared = compare_backends.Comparison(folder, tiny.train, "cpu", "fp32", small | constants, compare_backends.CPU_PACE, print)
    shared.new_weights("mlx-cpu")
    return shared


def test_the_backends_lose_alike_over_ten_steps(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same weights and batches, with every learning rate as it is and two passes a step."""
    shared = compared(tiny, tmp_path, monkeypatch)
    checked = shared.check(["mlx-cpu", "cpu"], {"seq_len": 32, "batch_tokens": 256})
    losses = {name: p["fp32"]["losses"] for name, p in checked.items()}
    assert losses["cpu"] == pytest.approx(losses["mlx-cpu"], rel=1e-4)
    assert losses["cpu"][-1] < losses["cpu"][0] - 0.5
    assert 0 < checked["cpu"]["fp32"]["gradient_difference"] < 1e-4
    assert checked["cpu"]["passed"]


@pytest.mark.parametrize(("what", "constants"), [("optimizer", {"MATRIX_LR": "0.022"}), ("model", {"EPS": "1e-3"})])
def test_another_optimizer_or_model_on_one_side_is_noticed(
        tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, constants: dict[str, str]) -> None:
    """A tenth more of one learning rate shows in the losses, another epsilon in the gradients of the first batch."""
    shared = compared(tiny, tmp_path, monkeypatch)
    reports = {name: shared.start(name, "parity", own, steps=10, fill_zeros=True, gradients=str(tmp_path / "gradients.npz"))
               for name, own in (("mlx-cpu", {}), ("cpu", constants))}
    found = compare_backends.parity(reports, "fp32")["cpu"]
    assert not found["passed"]
    assert found["difference" if what == "optimizer" else "gradient_difference"] > found["tolerance"]
    assert (found["gradient_difference"] > found["tolerance"]) == (what == "model")


def test_the_backends_reach_the_same_score_after_equal_steps(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = compared(tiny, tmp_path, monkeypatch)
    runs = {name: shared.trained(name, "10steps") for name in ("mlx-cpu", "cpu")}
    assert runs["cpu"]["total_tokens"] == runs["mlx-cpu"]["total_tokens"] == 10 * 256
    assert runs["cpu"]["val_bpb"] == pytest.approx(runs["mlx-cpu"]["val_bpb"], rel=compare_backends.BPB_TOLERANCE)


def test_the_time_of_a_step_is_taken_on_pytorch(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = compared(tiny, tmp_path, monkeypatch)
    report = shared.start("cpu", "times", steps=2, repeats=2, warmup=1, windows=["forward", "gradients", "step", "training"])
    assert report["tokens_per_second"] == pytest.approx(256 / report["seconds"]["training"])
    assert all(len(windows) == 2 and min(windows) > 0 for windows in report["windows"].values())
    assert report["framework_mb"] is None
    assert report["process_mb"] > 50
    config = GPTConfig(vocab_size=320, n_layer=2, n_head=max(1, 64 // train_torch.HEAD_DIM), n_embd=64, ngram_buckets=(97, 101))
    assert report["flops_per_token"] == GPT(config).flops_per_token(32)
    assert report["parameters"] == sum(p.numel() for p in GPT(config).parameters())
