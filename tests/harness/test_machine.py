"""The machine: peak FLOP/s, tiers, and refusals of what does not fit in memory; and the progress of a training."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import HarnessError, kind_of
from harness.clock import Budget
from harness.machine import (
    PEAK_TFLOPS,
    PRESETS,
    TIERS,
    check_memory,
    check_weights,
    find_dtype,
    find_tier,
    load_fast_blas,
    peak_flops,
)
from harness.run import Progress

ROOT = Path(__file__).resolve().parent.parent.parent
MB = 1 << 20


def work() -> None:
    sum(range(10_000))


def test_the_peak_of_a_process_grows_with_what_it_holds() -> None:
    code = """from harness.machine import process_peak
before = process_peak()
held = bytearray(300 << 20)
held[:: 4096] = b"x" * len(held[:: 4096])
print(before, process_peak())"""
    larger = bytearray(600 << 20)  # Linux counts it in the child's ru_maxrss
    larger[:: 4096] = b"x" * len(larger[:: 4096])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 2**20 < before < 300 << 20 < after < 600 << 20


@pytest.mark.parametrize("name", PEAK_TFLOPS)
def test_a_device_is_known_by_the_longest_name_in_it(name: str) -> None:
    apple = f"Apple {name} mlx"
    assert peak_flops(apple, work, 1e6)[0] == PEAK_TFLOPS[name] * 1e12
    assert peak_flops(f"NVIDIA {name}-SXM4-80GB cuda torch", work, 1e6)[0] == PEAK_TFLOPS[name] * 1e12


def test_every_apple_chip_with_a_fan_has_a_peak_and_faster_ones_have_more() -> None:
    for generation in range(1, 6):
        sizes = [PEAK_TFLOPS[f"M{generation}{size}"] for size in ("", " Pro", " Max")]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("device", ["Apple M55 mlx", "Apple M5 Ultra mlx", "AMD EPYC cpu", "Graviton M", "NVIDIA A1000 cuda"])
def test_an_unknown_device_has_the_peak_that_is_measured(device: str) -> None:
    peak, measured = peak_flops(device, work, 1e6)
    assert peak == measured
    assert 1e7 < measured < 1e12


def test_a_tier_is_the_machines_or_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTORESEARCH_TIER", raising=False)
    assert find_tier("mac") == "mac"
    monkeypatch.setenv("AUTORESEARCH_TIER", "mac-max")
    assert find_tier("cpu") == "mac-max"


def test_a_dtype_is_the_measured_one_of_the_device_as_it_was_when_the_night_began(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    monkeypatch.delenv("AUTORESEARCH_DTYPES", raising=False)
    assert find_dtype("Apple M1 mlx") == "bfloat16"
    (tmp_path / "dtypes.json").write_text('{"Apple M1 mlx": "float32", "Apple M9 mlx": "float8"}')
    assert find_dtype("Apple M1 mlx") == "float32"
    assert find_dtype("Apple M2 mlx", "float16") == "float16"
    assert find_dtype("Apple M9 mlx") == "bfloat16", "a dtype that no train file knows"
    monkeypatch.setenv("AUTORESEARCH_DTYPES", "{}")
    assert find_dtype("Apple M1 mlx") == "bfloat16", "measured while a night was running"
    for damaged in ("", "{", "[1]"):
        monkeypatch.setenv("AUTORESEARCH_DTYPES", damaged)
        assert find_dtype("Apple M1 mlx") == "bfloat16"


def by_depth(depth: int) -> int:
    return depth**3 * MB


def by_passes(passes: int) -> float:
    """A step of 64 rows: 8 MB whatever happens, 1 MB a row of a pass, and 4 MB for sums where there are several passes."""
    return (8 + 64 / passes + 4 * (passes > 1)) * MB


@pytest.mark.parametrize("limit", [None, 28 * MB, 100 * MB])
def test_what_fits_is_let_through(limit: float | None) -> None:
    check_memory(by_passes, 4, 16, 100, limit, by_depth, 2)
    check_weights(by_depth, 3, limit)
    check_memory(None, 4, 16, 100, 1, by_depth, 2)  # nothing is known


@pytest.mark.parametrize(("limit", "micro_tokens"), [(27.9, 800), (20, 800), (19.9, 400), (13, 100)])
def test_a_step_is_refused_with_the_largest_pass_that_fits(limit: float, micro_tokens: int) -> None:
    with pytest.raises(HarnessError, match=rf"passes of 1,600 tokens .* 0\.03 GiB, .* MICRO_TOKENS = {micro_tokens}$") as caught:
        check_memory(by_passes, 4, 16, 100, limit * MB, by_depth, 2)
    assert caught.value.kind == "oom"
    rows = micro_tokens // 100
    assert by_passes(64 // rows) <= limit * MB < by_passes(64 // rows // 2)


@pytest.mark.parametrize(("check", "words"), [
    (lambda: check_weights(by_depth, 12, 1000 * MB), r"depth 12 take 1\.69 GiB, .* has 0\.98; .* DEPTH = 6,"),  # 4 times 216 MB
    (lambda: check_weights(by_depth, 12, 2 * MB), "lower WIDTH or NGRAM_BUCKETS"),
    # passes of one row take 13 MB; depth 2 has weights and moments of 8 MB, depth 1 an eighth of that
    (lambda: check_memory(by_passes, 4, 16, 100, 12 * MB, by_depth, 2), "even passes of one row .* or DEPTH to 1$"),
    (lambda: check_memory(by_passes, 4, 16, 100, MB, by_depth, 2), "even passes of one row .* lower BATCH_TOKENS, WIDTH"),
])
def test_a_model_is_refused_with_the_largest_that_fits(check: Callable[[], None], words: str) -> None:
    with pytest.raises(HarnessError, match=words) as caught:
        check()
    assert caught.value.kind == "oom"


@pytest.mark.parametrize("message", [
    "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "[metal::malloc] Attempting to allocate 34359738368 bytes which is greater than the maximum allowed buffer size of 9 bytes.",
    "CUDA out of memory. Tried to allocate 2.00 GiB", "MPS backend out of memory (MPS allocated: 9.00 GB)",
    "Unable to allocate 8.00 PiB for an array with shape (1125899906842624,) and data type float64",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
])
def test_every_way_to_say_that_memory_ends_is_known(message: str) -> None:
    assert kind_of(RuntimeError(message)) == "oom"
    assert kind_of(RuntimeError("[matmul] Last dimension of first input must match")) == "crash"


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> Progress:
    budget = Budget("100steps")
    budget.start()
    lines: list[dict] = []
    run = SimpleNamespace(budget=budget, vocab_size=1000, log=lambda **line: lines.append(line), lines=lines)
    now = [0.0]
    monkeypatch.setattr(Budget, "seconds", property(lambda self: now[0]))
    progress = Progress(run, batch_tokens=1000, flops=2e6, peak=1e10, above=3.0)
    progress.now = now
    return progress


@pytest.mark.parametrize("columns", [200, 80, 60, 30])
@pytest.mark.parametrize("budget", ["8steps", "8ktokens", "2.4s"])
def test_progress_is_logged_each_second_and_at_the_end(
    progress: Progress, budget: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As train() uses it: a step's loss is known when the next one has begun, and 300 ms pass for each."""
    monkeypatch.setenv("COLUMNS", str(columns))
    progress.run.budget, asked = Budget(budget), []
    for step in range(1, 9):
        progress.now[0] = 0.3 * step
        if step > 1:
            progress.take(5.0)
        progress.tell(lambda: asked.append("lr") or 0.5, lambda: 3 * MB)
    progress.now[0] = 2.41
    progress.take(5.0)
    for _ in range(2):  # of the same step it tells once
        progress.tell(lambda: asked.append("lr") or 0.5, lambda: 3 * MB)
    assert [line["step"] for line in progress.run.lines][-1] == 8
    assert len(asked) == len(progress.run.lines) in (2, 3)
    first, last = progress.run.lines[0], progress.run.lines[-1]
    share = 1.2 / 2.4 if budget == "2.4s" else 3 / 8
    assert first == pytest.approx({"step": 3, "tokens": 3000, "seconds": 1.2, "progress": share, "loss": 5.0, "lr": 0.5,
                                   "memory_mb": 3.0, "tokens_per_second": 2500, "mfu_percent": 50})
    assert (last["tokens"], last["seconds"], last["progress"]) == (8000, 2.41, 1)
    assert max(line["tokens_per_second"] for line in progress.run.lines) < 5000, "no speed is told of a moment, such as 10 ms"
    said = capsys.readouterr().out.split("\r")[1:]
    assert all(len(line) < columns for line in said)
    assert all(line.startswith("step ") for line in said)
    if columns >= 60:
        assert f"( {100 * share:.0f} %)  loss 5.0000  {2 if share < 0.5 else 1} s left, ends " in said[0]
        assert "(100 %)" in said[-1]
        assert " 0 s left, ends " in said[-1]
    if columns == 200:
        assert "2,500 tok/s  3 MB  mfu 50.0 %  lr x0.50" in said[0]


def test_the_mean_loss_is_debiased(progress: Progress) -> None:
    progress.take(6.0)
    assert progress.loss == pytest.approx(6.0)
    for _ in range(300):
        progress.take(4.0)
    assert progress.loss == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize(("losses", "step"), [
    ([6.9, math.nan], 2), ([math.inf], 1), ([6.9] * 30 + [1e6], 31), ([6.9] * 10 + [11.5] * 100, 21), ([40.0] * 100, 20)])
def test_a_training_that_diverges_is_ended(progress: Progress, losses: list[float], step: int) -> None:
    """At once by a loss that is no number or huge, after some steps by one that stays above what knowing nothing gives."""
    def take_all() -> None:
        for loss in losses:
            progress.take(loss)
    with pytest.raises(HarnessError, match="the loss became") as caught:
        take_all()
    assert caught.value.kind == "nan"
    assert progress.step == step


@pytest.mark.parametrize("losses", [[12.0, 9.0, *[7.0] * 30], [*[6.9] * 30, 40.0, *[6.5] * 20]])
def test_a_high_beginning_and_one_bad_step_are_no_divergence(progress: Progress, losses: list[float]) -> None:
    for loss in losses:
        progress.take(loss)


def test_the_tiers_are_those_of_the_presets() -> None:
    assert set(TIERS) < set(PRESETS)


BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.mark.skipif(sys.platform != "linux", reason="a BLAS is loaded on Linux only")
@pytest.mark.parametrize(("given", "threads", "expected"), [
    ({}, None, {}),
    ({}, 3, dict.fromkeys(BLAS_THREADS, "3")),
    ({}, 0.5, dict.fromkeys(BLAS_THREADS, "4")),  # half of eight cores
    ({"OMP_NUM_THREADS": "2"}, 0.5, {"OMP_NUM_THREADS": "2"}),
])
def test_a_limit_of_threads_is_set_unless_the_user_set_one(
        monkeypatch: pytest.MonkeyPatch, given: dict[str, str], threads: float | None, expected: dict[str, str]) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    load_fast_blas(threads)
    assert os.environ == expected
