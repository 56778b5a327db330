"""The clock: budgets, start-up, sleep, speed; and a warm-up that leaves no trace."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, program

from harness import HarnessError, clock
from harness.clock import Budget, expected_epochs, speed
from harness.run import batches, row_starts

IMPORTS = "import sys, time, json\nfrom prepare_mlx import start_run\n"


@pytest.mark.parametrize(("text", "steps", "tokens", "progress"), [
    ("200steps", 50, 0, 0.25), ("2ksteps", 50, 0, 0.025), ("5Mtokens", 1, 2_500_000, 0.5), ("1.5ktokens", 0, 1500, 1.0),
])
def test_budgets_count_what_they_name(text, steps, tokens, progress):
    assert Budget(text).progress(steps, tokens) == progress


@pytest.mark.parametrize("text", ["", "300", "s", "-3s", "0s", "0.0steps", "3 minutes", "1e3s", "1..2s", "nans", "300S",
                                  "1.2.3s", ".s", "1_0s", "infs", "9" * 400 + "s", "\u0663s", "3 s", "5Gtokens", "5kMs", "+3s"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(HarnessError, match="expected something like 300s, 200steps or 5Mtokens") as caught:
        Budget(text)
    assert caught.value.exit_code == 2


def test_seconds_run_from_the_start_on():
    budget = Budget("3s")
    time.sleep(0.05)
    assert budget.seconds == 0 == budget.progress(9, 9)
    budget.start()
    time.sleep(0.3)
    assert 0.3 <= budget.seconds < 2
    assert budget.progress(0, 0) == pytest.approx(budget.seconds / 3, rel=0.2)


def test_the_clock_starts_once():
    budget = Budget("10s")
    budget.start()
    with pytest.raises(HarnessError, match="started a second time") as caught:
        budget.start()
    assert caught.value.kind == "violation"


def test_a_long_start_is_no_training_time():
    with pytest.raises(HarnessError, match=r"181 s passed before training began, expected at most 180") as caught:
        Budget("10s", age=180.6).start()
    assert caught.value.kind == "timeout"
    Budget("10s", age=170).start()


def test_a_clock_that_never_ran_is_noticed_at_the_end():
    with pytest.raises(HarnessError, match="was never called") as caught:
        Budget("10s").close()
    assert caught.value.kind == "violation"


def test_sleep_is_the_wall_clock_without_the_monotonic_one(monkeypatch):
    """The one thing that cannot be done for real: to suspend the machine. The wall clock is moved on by an hour instead."""
    budget = Budget("10s")
    budget.start()
    assert budget.close()["suspended_seconds"] < 0.5
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    assert budget.close()["suspended_seconds"] == pytest.approx(3600, abs=1)
    assert budget.seconds < 5
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    assert budget.close()["suspended_seconds"] == 0, "a clock set back is no sleep"


def test_a_training_far_beyond_its_budget_is_a_timeout(monkeypatch):
    budget = Budget("0.1s")
    budget.start()
    monkeypatch.setattr(clock, "OVERRUN", (1.25, 0.2))
    time.sleep(0.1)
    budget.close()
    time.sleep(0.3)
    with pytest.raises(HarnessError, match=r"expected at most 0 for 0.1s; ask run.budget.progress\(\) more often") as caught:
        budget.close()
    assert caught.value.exit_code == 5


def test_the_speed_index_sees_a_machine_that_becomes_slower():
    pause = [0.02]

    def work():
        time.sleep(pause[0])
    budget = Budget("15s")
    budget.start(work)
    pause[0] = 0.06
    assert 0.2 < budget.close()["speed_index"] < 0.75  # a busy machine sleeps longer than it was told


@pytest.mark.parametrize(("text", "seconds"), [("300s", 1.0), ("30s", 1.0), ("15s", 0.5), ("1s", 0.2), ("200steps", 0.2)])
def test_the_probe_takes_a_second_where_the_budget_has_thirty(monkeypatch, text, seconds):
    asked = []
    monkeypatch.setattr(clock, "speed", lambda work, seconds: asked.append(seconds) or 4.0 * len(asked))
    budget = Budget(text)
    budget.start()
    facts = budget.close()
    assert asked == [seconds, seconds]
    assert (facts["speed_index"], facts["products_per_second"]) == (2.0, 6.0)


def test_the_rate_of_the_probe_is_what_it_is_called():
    assert 10 < speed(lambda: time.sleep(0.05), 0.4) < 20.1


def test_expected_epochs_follow_from_the_budget():
    assert expected_epochs(Budget("60s"), 0.1, 1000, 300_000) == pytest.approx(2)
    assert expected_epochs(Budget("30steps"), 0.1, 1000, 300_000) == pytest.approx(0.1)
    assert expected_epochs(Budget("3Mtokens"), 0.1, 1000, 300_000) == pytest.approx(10)


@pytest.mark.slow  # its outcome hangs on what else the machine does
def test_speed_sees_contention_by_default():
    """Other threads on all cores: NumPy's product gets slower, by as much as they take."""
    alone = max(speed(None, 0.2) for _ in range(3))
    stop = threading.Event()

    def burn():
        a = np.ones((300, 300))
        while not stop.is_set():
            a @ a
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(burn)
        time.sleep(0.2)
        crowded = min(speed(None, 0.2) for _ in range(3))
        stop.set()
    assert crowded < 0.9 * alone


def trainer(tmp_path, tiny, body: str, **env):
    """Run a train file of a few lines on `tiny`, without the score."""
    (tmp_path / "train_x.py").write_text(IMPORTS + "with start_run(__file__) as run:\n    " + body.replace("\n", "\n    "))
    done = program(tmp_path / "train_x.py", home=tiny.home, cwd=tmp_path, AUTORESEARCH_DATA=str(tiny.train), AUTORESEARCH_SCORE="0",
                   AUTORESEARCH_RUN_DIR=str(tmp_path / "run"), **{"AUTORESEARCH_BUDGET": "1s", **env})
    return done, {p.stem: json.loads(p.read_text()) for p in (tmp_path / "run").glob("*.json")}


def test_what_the_harness_adds_to_train_json(tmp_path, tiny):
    done, files = trainer(tmp_path, tiny, "run.budget.start()\nnext(run.batches(2, 16))\nrun.finish(num_steps=1)")
    assert done.returncode == 0, done.stderr
    facts = files["train"]
    assert facts["budget"] == "1s"
    assert facts["num_steps"] == 1
    assert 0.2 < facts["speed_index"] < 5
    assert facts["products_per_second"] > 10
    assert 0 <= facts["suspended_seconds"] < 0.5


@pytest.mark.parametrize("body", ["next(run.batches(2, 16))", "run.tokens()"])
def test_training_data_is_handed_out_only_while_the_clock_runs(tmp_path, tiny, body):
    done, files = trainer(tmp_path, tiny, body + "\nrun.budget.start()")
    assert done.returncode == 6
    assert files["error"]["kind"] == "violation"
    assert "training data was asked for before run.budget.start(); warm up on dummy data" in files["error"]["message"]


@pytest.mark.parametrize("budget", ["1.2.3s", "soon", "9" * 400 + "steps"])
def test_a_run_with_a_budget_that_is_none_is_a_usage_error_in_one_line(tmp_path, tiny, budget):
    done, _ = trainer(tmp_path, tiny, "print('trained')", AUTORESEARCH_BUDGET=budget)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_negative_seed_is_a_usage_error_in_one_line(tmp_path, tiny):
    done, _ = trainer(tmp_path, tiny, "print('trained')", AUTORESEARCH_SEED="-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: expected a seed of 0 or more, got -1")


def test_an_epoch_is_as_long_as_its_rows_which_overlap(tmp_path, tiny):
    body = "run.budget.start()\nb = run.batches(2, 16)\nfirst = next(b)\nprint(run.train_tokens, run.epoch_tokens)"
    done, _ = trainer(tmp_path, tiny, body)
    text, epoch = map(int, done.stdout.split())
    meta = json.loads((tiny.train / "meta.json").read_text())
    starts = row_starts(np.fromfile(tiny.train / "train.bin", meta["dtype"]), meta["bos_id"], 16)
    assert epoch == 16 * len(starts) > text


def test_iterators_may_be_made_before_the_clock_runs(tmp_path, tiny):
    done, _ = trainer(tmp_path, tiny, "b = run.batches(2, 16)\nrun.budget.start()\nnext(b)")
    assert done.returncode == 0, done.stderr


def test_process_age_counts_for_the_start(tmp_path, tiny):
    done, _ = trainer(tmp_path, tiny, "import time\nprint(time.monotonic() - run.budget._born)")
    assert float(done.stdout) > 0.05, "imports came before"


def test_drift_is_told_in_the_summary(tmp_path, tiny):
    body = """t = [0.01]
def work(): time.sleep(t[0])
run.budget.start(work)
t[0] = 0.02
run.finish(training_seconds=1, peak_vram_mb=1, mfu_percent=1, total_tokens=1, num_steps=1, num_params=1, depth=1, device="cpu")"""
    model = "\nimport numpy as np\ndef load_model(d): return lambda t: np.zeros((*t.shape, 320), np.float32)\n"
    done, _ = trainer(tmp_path, tiny, body)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run" / "train_x.py").write_text(model)
    done = program(ROOT / "prepare_mlx.py", "score", tmp_path / "run", home=tiny.home)
    assert done.returncode == 0, done.stderr
    assert 0.3 < float(done.stdout.split("speed_index:")[1].split()[0]) < 0.75
    assert "speed_warning: " in done.stdout


def test_rows_leave_no_token_out():
    rng = np.random.default_rng(0)
    for length in (17, 40, 500, 1111):
        tokens = rng.integers(1, 40, length)
        tokens[rng.random(length) < 0.05] = 0
        starts = row_starts(tokens, 0, 16)
        covered = np.zeros(length, bool)
        for start in starts:
            covered[start : start + 17] = True
        assert covered.all()
        assert starts[-1] + 17 == length
    assert len(row_starts(np.arange(16), 0, 16)) == 0


def test_batches_are_slices_of_the_text_in_an_order_of_the_seed():
    tokens = np.arange(1000, dtype=np.uint16)
    starts = row_starts(tokens, 0, 16)
    one, same, other = (batches(tokens, starts, 4, 16, seed) for seed in (1, 1, 2))
    x, y = next(one)
    assert x.dtype == np.int32
    assert x.shape == (4, 16)
    assert np.array_equal(y, x + 1)
    assert np.array_equal(x, next(same)[0])
    assert not np.array_equal(x, next(other)[0])
    epoch = [x[:, 0], *(next(one)[0][:, 0] for _ in range(len(starts) // 4 - 1))]
    assert len(set(np.concatenate(epoch).tolist())) == 4 * len(epoch), "every row once an epoch"
    with pytest.raises(HarnessError, match=r"a batch of 99 rows of 16 tokens was asked for, .* has only 63 such rows"):
        next(batches(tokens, starts, 99, 16, 1))


def test_a_loader_that_fails_ends_the_training_instead_of_keeping_it_waiting():
    tokens = np.arange(100, dtype=np.uint16)
    with pytest.raises(IndexError):
        next(batches(tokens, np.array([0, 90]), 2, 16, 1))


def test_warm_up_leaves_weights_and_moments_bit_identical():
    """What train_mlx.py does before the clock starts, and then what it hands on."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from pinned import train_mlx
    model = train_mlx.GPT(train_mlx.GPTConfig(vocab_size=320, n_layer=2, n_head=2, n_embd=64))
    model.init_weights(1)
    params = dict(tree_flatten(model.parameters()))
    state = train_mlx.init_optimizer(params)
    mx.eval(params, state)

    def bits():
        return {n: np.array(a).tobytes() for n, a in [*params.items(), *((f"{k}.{i}", a) for k, v in state.items()
                                                                         for i, a in enumerate(v))]}
    before = bits()
    dummy = np.zeros((4, 32), np.int32)
    step = train_mlx.make_step(model, 1)
    after, moments, _ = step(params, state, train_mlx.schedule(0, 0), iter([(dummy, dummy)]))
    mx.eval(after, moments)
    assert bits() == before
    assert any(np.array(after[n]).tobytes() != before[n] for n in params), "the step itself does change weights"
