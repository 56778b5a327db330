"""The score: from logits, by another process, every byte once; and refused to a model that looks where it may not.

Most candidates here are bigram tables in NumPy: real train files, served by the real server, that start in no time.
"""

import filecmp
import json
import math
import mmap
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from conftest import ROOT, environment, on_windows, program, summary_of

from harness import HarnessError
from harness.probes import VERIFY_POSITIONS, VERIFY_SERVERS, Question, bits_per_byte, log_probs, splice
from harness.server import DENIED_CALLS, end_group, shared
from harness.tokenizer import Tokenizer

FACTS = {"training_seconds": 1.0, "total_seconds": 2.0, "peak_vram_mb": 3.0, "mfu_percent": 4.0, "total_tokens": 5, "num_steps": 6,
         "num_params": 7, "depth": 1, "seed": 1, "suspended_seconds": 0.0, "speed_index": 1.0,
         "products_per_second": 8.0, "budget": "20steps", "device": "cpu"}

BIGRAM = """
import os, sys
import numpy as np

def load_model(run_dir):
    table = np.load(run_dir / "bigram.npy")                 # float32 [vocab, vocab]
    vocab, calls, memory = len(table), [0], {}
    def next_tokens(tokens):                                # what a model may not know: [B, T, vocab]
        return np.eye(vocab, dtype=np.float32)[np.roll(tokens, -1, axis=1)]
    def model(tokens):                                      # int32 [B, T] -> float32 [B, T, vocab]
        calls[0] += 1
        logits = table[tokens]
        EDIT
        return logits
    return model
"""


@pytest.fixture(scope="session")
def validation(tiny):
    """Inputs, targets and which of them have bytes, [rows, T] each, worked out here from what lies on disk."""
    tokenizer = Tokenizer((tiny.held / "tokenizer.model").read_bytes())
    tokens = np.fromfile(tiny.held / "val.bin", np.uint16).astype(np.int32)
    assert tokenizer.token_bytes[tokens].sum() == json.loads((tiny.held / "meta.json").read_text())["val_bytes"]
    length = -(-(len(tokens) - 1) // 32) * 32 + 1
    tokens = np.concatenate([tokens, np.full(length - len(tokens), tokenizer.bos_id, np.int32)])
    inputs, targets = tokens[:-1].reshape(-1, 32), tokens[1:].reshape(-1, 32)
    return inputs, targets, tokenizer.token_bytes[targets] > 0


@pytest.fixture(scope="session")
def table(tiny):
    """Log counts of token pairs in the training shard: float32 [320, 320]."""
    tokens = np.fromfile(tiny.train / "train.bin", np.uint16).astype(int)
    counts = np.full((320, 320), 0.1)
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    return np.log(counts).astype(np.float32)


@pytest.fixture
def candidate(tiny, table, tmp_path):
    """Makes a run directory as a trainer would leave it: a bigram model with an edit."""
    def make(edit: str = "pass", source: str = BIGRAM, **facts):
        (run_dir := tmp_path / "run").mkdir(exist_ok=True)
        (run_dir / "train_x.py").write_text(source.replace("EDIT", edit.replace("\n", "\n        ")))
        np.save(run_dir / "bigram.npy", table)
        (run_dir / "train.json").write_text(json.dumps({**FACTS, "data": tiny.train.name, **facts}))
        return run_dir
    return make


def score(run_dir, tiny, *more):
    return program(ROOT / "prepare_mlx.py", "score", run_dir, *more, home=tiny.home)


def refusal(done) -> tuple[int, str, str]:
    """Exit code, kind and message of a scorer that refused; it printed no summary."""
    assert done.stdout == ""
    record = json.loads(done.stderr.splitlines()[-1])
    return done.returncode, record["kind"], record["message"]


def test_training_then_score_end_to_end(tiny, trained):
    done = score(trained, tiny)
    assert done.returncode == 0, done.stderr
    summary = summary_of(done.stdout)
    assert 0.5 < float(summary["val_bpb"]) < 2, "20 steps learn the words of the text"
    assert summary["data_hash"] == tiny.entry["data_hash"]
    assert summary["num_steps"] == "20"
    assert list(summary)[:9] == ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M",
                                 "num_steps", "num_params_M", "depth"]


def test_the_summary_has_the_tier_that_was_trained_if_it_is_one(tiny, candidate):
    assert summary_of(score(candidate(tier="mac"), tiny).stdout)["tier"] == "mac"
    assert "tier" not in summary_of(score(candidate(tier="cpu\nval_bpb: 0.1"), tiny).stdout)


def test_other_processes_and_other_batch_sizes_print_the_same(tiny, trained):
    printed = {summary_of(score(trained, tiny, "--rows", rows).stdout)["val_bpb"] for rows in (7, 7, 36)}
    assert len(printed) == 1


def test_every_token_is_scored_once(tiny, candidate, validation):
    done = score(candidate("logits = 0 * logits"), tiny)
    bits = validation[2].sum() * math.log2(320)
    val_bytes = int(summary_of(done.stdout)["val_bytes"])
    assert summary_of(done.stdout)["val_bpb"] == f"{bits / val_bytes:.6f}"


def test_test_split_is_scored_under_its_own_name(tiny, candidate):
    summary = summary_of(score(candidate(), tiny, "--split", "test").stdout)
    assert 0.5 < float(summary["test_bpb"]) < 3
    assert "val_bpb" not in summary


def by_table(table):
    """Answers questions as a server would, from saved logits."""
    def ask(questions: list[Question], ids):
        shape = ids[0].shape
        return [log_probs(table[q.tokens], ids[q.row]).reshape(shape) for q in questions]
    return ask


def test_the_score_equals_an_independent_one_in_float64(table, validation, tiny, candidate):
    inputs, targets, scored = validation
    logits = table[inputs].astype(np.float64)                                   # saved: [rows, T, vocab]
    nats = 0.0
    for row in range(len(inputs)):
        for t in range(32):
            if scored[row, t]:
                nats += float(np.logaddexp.reduce(logits[row, t]) - logits[row, t, targets[row, t]])
    val_bytes = json.loads((tiny.held / "meta.json").read_text())["val_bytes"]
    expected = nats / math.log(2) / val_bytes
    assert bits_per_byte(by_table(table), inputs, targets, scored, val_bytes) == pytest.approx(expected, rel=1e-9, abs=0)
    assert summary_of(score(candidate(), tiny).stdout)["val_bpb"] == f"{expected:.6f}"


def test_softmax_equals_exact_sums_on_logits_of_any_size():
    rng = np.random.default_rng(0)
    for scale in (1e-3, 8, 300):
        logits = rng.normal(0, scale, (50, 300)).astype(np.float32)
        ids = rng.integers(0, 300, (50, 4))
        top = logits.max(axis=1).astype(float)
        expected = [[float(x[i]) - m - math.log(math.fsum(math.exp(float(v) - m) for v in x)) for i in row]
                    for x, m, row in zip(logits, top, ids, strict=True)]
        assert np.allclose(log_probs(logits, ids), expected, rtol=1e-12, atol=1e-12)


def test_pieces_and_threads_change_no_bit():
    from concurrent.futures import ThreadPoolExecutor
    logits = np.random.default_rng(0).normal(0, 8, (3000, 500)).astype(np.float32)  # six pieces
    ids = np.arange(6000).reshape(3000, 2) % 500
    whole = log_probs(logits, ids)
    with ThreadPoolExecutor(3) as threads:
        assert np.array_equal(log_probs(logits, ids, threads), whole)
    assert np.array_equal(np.concatenate([log_probs(logits[i : i + 1], ids[i : i + 1]) for i in range(3000)]), whole)


@pytest.mark.parametrize("offset", [-100.0, 64.0, 1000.0])
def test_logits_offset_by_a_constant_score_the_same(table, validation, offset):
    inputs, targets, scored = validation
    scores = [bits_per_byte(by_table(t), inputs, targets, scored, 1000) for t in (table, table + np.float32(offset))]
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)  # what is left is float32's rounding of the sum


@pytest.mark.parametrize("edit", ["logits[0, 3, 5] = np.nan", "logits[0, 0, 0] = np.inf", "logits[:, :, :4] = -np.inf"])
def test_non_finite(tiny, candidate, edit):
    assert refusal(score(candidate(edit), tiny)) == (6, "violation", "non_finite: a logit is NaN or infinite")


@pytest.mark.parametrize("edit", ["logits = logits[:, :-1]", "logits = logits[..., :99]", "logits = logits[0]",
                                  "logits = logits.astype(int)"])
def test_bad_shape(tiny, candidate, edit):
    code, kind, message = refusal(score(candidate(edit), tiny))
    assert (code, kind) == (6, "violation")
    assert re.search(r"bad_shape: expected floating-point logits \(\d+, 32, 320\), got \w+ \(", message)


CHEATS = {
    # looks ahead
    "sees the next token": ("logits = logits + 9 * next_tokens(tokens)", "non_causal"),
    "sees a bit of it": ("logits = logits + 0.06 * next_tokens(tokens)", "non_causal"),
    "sees it in some places": (
        "mask = tokens % 5 < 2\nlogits = logits + 5 * mask[..., None] * next_tokens(tokens)", "non_causal"),
    "sees it, but not where it would surprise": (
        "p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)\n"
        "logits = logits + 3 * next_tokens(tokens) * (p > 0.02)", "non_causal"),
    "sees the mean of what follows": (
        "logits = logits + 0.5 * np.cumsum(next_tokens(tokens)[:, ::-1], axis=1)[:, ::-1]", "non_causal"),
    # looks aside
    "mixes the rows of a batch": ("logits = logits + 0.5 * (logits - logits.mean(axis=0))", "cross_row"),
    "treats the first row of a batch better": ("logits[1:] = 0.9 * logits[1:]", "cross_row"),
    # looks back
    "learns from every call": (
        "logits = logits + 5 * memory.get('n', 0)\n"
        "memory['n'] = 0.9 * memory.get('n', 0) + 0.1 * next_tokens(tokens).mean((0, 1))",
        "stateful"),
    "gets better with the calls": ("logits = logits * (1 + 0.1 * np.log(calls[0]))", "stateful"),
    "rolls dice": ("logits = logits + np.random.default_rng().normal(0, 0.3, logits.shape)", "stateful"),
}


@pytest.mark.parametrize(("edit", "name"), CHEATS.values(), ids=CHEATS)
def test_a_model_that_looks_elsewhere_is_refused_by_name(tiny, candidate, edit, name):
    code, kind, message = refusal(score(candidate(edit), tiny, "--rows", 16))
    assert (code, kind) == (6, "violation")
    assert message.startswith(name + ":"), message


def test_a_model_that_remembers_its_answers_gains_nothing(tiny, candidate):
    """It looks ahead, and would repeat what it said where a beginning comes again. None does."""
    edit = """logits = logits + 9 * next_tokens(tokens)
for row, answer in zip(tokens, logits):
    for t in range(8, len(row)):
        answer[t] = memory.setdefault(row[: t + 1].tobytes(), answer[t].copy())"""
    assert refusal(score(candidate(edit), tiny))[2].startswith("non_causal")


@pytest.mark.parametrize("edit", [
    "logits = logits + np.random.default_rng().normal(0, 0.003, logits.shape)",  # kernels that add in another order
    "logits = (logits.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)",  # bfloat16
])
def test_honest_rounding_is_no_cheat(tiny, candidate, edit):
    done = score(candidate(edit), tiny)
    assert done.returncode == 0, done.stderr
    assert float(summary_of(done.stdout)["val_bpb"]) == pytest.approx(
        float(summary_of(score(candidate(), tiny).stdout)["val_bpb"]), abs=0.01)


def test_probes_are_spliced_where_the_joint_does_not_show(validation):
    inputs = validation[0]
    rng = np.random.default_rng(3)
    probes = [splice(inputs, row, rng) for row in range(1, len(inputs))]
    pairs = set(zip(inputs.reshape(-1), inputs.reshape(-1)[1:], strict=False))
    for probe in probes:
        assert np.array_equal(probe.tokens[: probe.cut], inputs[probe.row, : probe.cut])
        assert probe.tokens[probe.cut] != inputs[probe.row, probe.cut]
        seen = [b for a, b in pairs if a == probe.tokens[probe.cut - 1]]
        assert probe.tokens[probe.cut] in seen or len(seen) == 1, "where text goes on in several ways, it is one of them"
    assert np.mean([(p.tokens[p.cut - 1], p.tokens[p.cut]) in pairs for p in probes]) > 0.5


def test_no_process_is_asked_the_same_beginning_twice(table, validation):
    asked = []

    def ask(questions, ids):
        asked.append([(q.row, q.cut) for q in questions])
        return by_table(table)(questions, ids)
    bits_per_byte(ask, *validation, 1000)
    rows = len(validation[0])
    for questions in asked:
        assert len({row for row, _ in questions}) == len(questions)
    assert sum(map(len, asked)) == rows + 24 + rows // 8
    assert not all(cut == 32 for _, cut in asked[0][: rows // 2]), "probes are mixed in, not asked at the end"


def test_probes_differ_from_run_to_run(validation):
    inputs = validation[0]
    runs = [[splice(inputs, row, np.random.default_rng()).cut for row in range(40)] for _ in range(2)]
    assert runs[0] != runs[1]


BREAKERS = {
    "import os; os._exit(0)": (1, "crash", "the logits server died"),
    # as Metal ends a process where memory ends
    "import os, sys; print('(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)', file=sys.stderr, flush=True); os.abort()":
        (4, "oom", "the logits server died"),
    "import sys; sys.exit(0)": (1, "crash", "SystemExit"),
    "raise MemoryError('no')": (4, "oom", "MemoryError"),
    "import os\n[os.write(fd, b'[1]\\n') for fd in range(3, 20) if open_for_writing(fd)]": (6, "violation", "expected"),
    "import os\n[os.write(fd, b'x' * 200000) for fd in range(3, 20) if open_for_writing(fd)]": (6, "violation", "expected"),
}
HELPER = """
import fcntl, os, stat
def open_for_writing(fd):
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY and stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False
"""


@pytest.mark.parametrize(("line", "expected"), BREAKERS.items(), ids=["exits", "aborts", "leaves", "no memory", "forges", "floods"])
def test_a_server_that_breaks_off_or_lies_is_an_error_by_name(tiny, candidate, line, expected):
    code, kind, message = refusal(score(candidate(source=HELPER + line + BIGRAM), tiny))
    assert (code, kind) == expected[:2]
    assert expected[2] in message


def test_a_shared_file_is_resized_by_its_first_holder_only(monkeypatch, tmp_path):
    """A sandbox may refuse to resize a file outside the server's folder: `ftruncate` refuses here as it would."""
    with open(tmp_path / "exchange", "w+b") as file:
        ours = shared(file.fileno(), np.float32, [2, 3])
        monkeypatch.setattr(os, "ftruncate", lambda *_: pytest.fail("the file has its size"))
        theirs = shared(file.fileno(), np.float32, [2, 3])
        reader = shared(file.fileno(), np.float32, [2, 3], mmap.ACCESS_READ)
        theirs[1, 2] = 7
        assert (ours[1, 2], reader[1, 2]) == (7, 7)
        assert not reader.flags.writeable


def test_the_log_of_a_failed_server_holds_its_prints_and_its_traceback(tiny, candidate):
    """However long a traceback takes, nobody ends the server before it is written."""
    slow = "import sys, time\nhook = sys.excepthook\nsys.excepthook = lambda *error: (time.sleep(1), hook(*error))\n"
    run_dir = candidate(source=slow + "print('printed')\nraise ValueError('the cause')" + BIGRAM)
    assert refusal(score(run_dir, tiny)) == (1, "crash", "ValueError: the cause")
    log = (run_dir / "serve.log").read_text()
    assert log.startswith("printed\nTraceback")
    assert log.endswith("ValueError: the cause\n")


def test_a_server_that_metals_watchdog_ended_is_told_apart(tiny, candidate):
    words = "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
    run_dir = candidate(source=f"import os, sys\nprint({words!r}, file=sys.stderr, flush=True)\nos.abort()\n")
    said = "the logits server died (exit code -6, GPU Timeout Error); see serve.log"
    assert refusal(score(run_dir, tiny)) == (1, "crash", said)


def test_a_failure_whose_traceback_cannot_be_written_keeps_its_name(tiny, candidate):
    hook = "import sys\nsys.excepthook = None\n"
    assert refusal(score(candidate(source=hook + "raise MemoryError('no')" + BIGRAM), tiny)) == (4, "oom", "MemoryError: no")


MACOS = """
import os, psutil, sys
real = os.killpg
def killpg(group, number):
    members = [p for p in psutil.process_iter(["pid", "status"]) if p.info["pid"] and os.getpgid(p.pid) == group]
    if members and all(p.info["status"] == psutil.STATUS_ZOMBIE for p in members):
        raise PermissionError(1, "Operation not permitted")
    real(group, number)
os.killpg = killpg
"""


def test_a_failure_keeps_its_name_where_a_zombie_may_not_be_killed(tiny, candidate):
    """On macOS `killpg` answers EPERM for a group that holds only a zombie, as of a server that has said why it ends."""
    run_dir = candidate(source="raise MemoryError('no')" + BIGRAM)
    late = "import time\nmacos = os.killpg\ndef killpg(*what):\n    time.sleep(1)\n    macos(*what)\nos.killpg = killpg\n"
    code = MACOS + late + "import prepare_mlx\nsys.exit(prepare_mlx.main())"
    code, kind, _ = refusal(program("-c", code, "score", run_dir, home=tiny.home))
    assert (code, kind) == (4, "oom")
    assert json.loads((run_dir / "error.json").read_text())["kind"] == "oom"


@pytest.mark.parametrize("macos", [False, True])
@pytest.mark.parametrize("script", ["exit 3", "sleep 60 & echo $!; exit 3", "sleep 60 & echo $!; wait"])
def test_a_group_is_ended_whoever_is_left_of_it(monkeypatch, macos, script):
    if macos:
        monkeypatch.setattr(os, "killpg", os.killpg)  # so that what MACOS does is undone
        exec(MACOS, {})
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True) as process:
        child = int(process.stdout.readline()) if "sleep" in script else None
        deadline = time.monotonic() + 10
        while "exit" in script and psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
        end_group(process)
        assert process.returncode == (3 if "exit" in script else -signal.SIGKILL)
        while child and psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        end_group(process)  # a second time there is nobody left


def test_on_windows_the_score_is_the_same_and_nothing_is_left_behind(tiny, candidate, tmp_path):
    """No descriptor is inherited there, no pipe can be waited for, no group be killed, and no file be removed that is mapped."""
    (tmp_path / "temporary").mkdir()
    windows = {**on_windows(), "TEMP": str(tmp_path / "temporary")}
    started = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', 'left-behind'])\n"
    run_dir = candidate(source=started + BIGRAM)
    expected = summary_of(score(run_dir, tiny).stdout)["val_bpb"]
    done = program(ROOT / "prepare_mlx.py", "score", run_dir, home=tiny.home, **windows)
    assert done.returncode == 0, done.stderr
    assert summary_of(done.stdout)["val_bpb"] == expected
    assert not [p for p in psutil.process_iter(["cmdline"]) if "left-behind" in (p.info["cmdline"] or [])]
    assert list((tmp_path / "temporary").iterdir()) == []
    failed = program(ROOT / "prepare_mlx.py", "score", candidate(source="raise MemoryError('no')"), home=tiny.home, **windows)
    assert refusal(failed) == (4, "oom", "MemoryError: no")


def test_the_server_is_told_nothing_of_the_data(tiny, candidate, tmp_path):
    told = f"pathlib.Path({str(tmp_path / 'seen')!r}).write_text(repr([dict(os.environ), sys.argv]))\n"
    source = "import os, pathlib, sys\n" + told + BIGRAM
    run_dir = candidate(source=source)
    done = program(ROOT / "prepare_mlx.py", "score", run_dir, home=tiny.home, AUTORESEARCH_DATA=str(tiny.train))
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen").read_text()
    assert "serve" in seen
    assert "'AUTORESEARCH_DTYPES': '{}'" in seen, "else a dtype that was measured for another data home would count"
    assert "AUTORESEARCH_HOME" not in seen
    assert str(tiny.held) not in seen
    assert str(tiny.train) not in seen


def test_the_server_is_started_under_the_given_command(tiny, candidate):
    run_dir = candidate(source="import os\nassert os.environ['WRAPPED'] == 'yes'\n" + BIGRAM)
    assert score(run_dir, tiny, "--wrap", json.dumps(["/usr/bin/env", "WRAPPED=yes"])).returncode == 0
    assert refusal(score(run_dir, tiny))[:2] == (1, "crash")


def test_each_server_gets_a_scratch_folder_and_a_copy_of_its_own_and_the_log_only_at_the_end(tiny, candidate, tmp_path):
    source = f"""import pathlib, sys, tempfile
scratch, here = pathlib.Path(tempfile.gettempdir()), pathlib.Path(__file__).parent
assert not list(scratch.iterdir()) and not (here / 'serve.log').exists() and not (here / 'left').exists()
(scratch / 'left').write_text('x')
(here / 'left').write_text('x')
print('printed', file=sys.stderr)
with open({str(tmp_path / "seen")!r}, 'a') as file:
    file.write(f'{{scratch.parent}}\\n')
""" + BIGRAM
    run_dir = candidate(source=source)
    for more in ((), ("--scratch", tmp_path / "scratch")):
        done = score(run_dir, tiny, *more)
        assert done.returncode == 0, done.stderr
        assert (run_dir / "serve.log").read_text().split() == ["printed"] * 2
    assert not (run_dir / "left").exists()
    seen = (tmp_path / "seen").read_text().split()
    assert seen[2:] == [str(tmp_path / "scratch")] * 2
    assert len(set(seen[:2])) == 2
    assert not any(os.path.exists(place) for place in seen)


@pytest.mark.parametrize(("facts", "said"), [
    ({"num_steps": float("nan")}, "expected a finite number for num_steps, not below 0, got nan"),
    ({"depth": "1\nval_bpb: 0.1"}, "expected a finite number for depth"),
    ({"training_seconds": -1.0}, "expected a finite number for training_seconds, not below 0, got -1.0"),
    ({"device": "x\n---\nval_bpb: 0.1"}, "expected a short name for device"),
    ({"data": ".."}, "expected a short name for data"), ({"seed": 10**400}, "expected a finite number for seed"),
    ({"budget": None, "device": ["a"] * 9999}, "expected a short name for"),
])
def test_what_the_trainer_wrote_is_not_believed(tiny, candidate, facts, said):
    code, kind, message = refusal(score(candidate(**facts), tiny))
    assert (code, kind) == (6, "violation")
    assert said in message
    assert len(message) < 300


@pytest.mark.parametrize("content", ["", "[" * 9999, "[1]", "3"])
def test_a_train_json_that_is_none(tiny, candidate, content):
    run_dir = candidate()
    (run_dir / "train.json").write_text(content)
    code, kind, message = refusal(score(run_dir, tiny))
    assert (code, kind) == (1, "crash")
    assert "expected a train.json from a finished training" in message


def test_held_out_text_that_is_absent_or_changed_is_refused(tiny, candidate, tmp_path):
    run_dir = candidate()
    code, kind, message = refusal(score(run_dir, tiny, "--held", tmp_path / "nowhere"))
    assert (code, kind) == (2, "data")
    assert "held-out data was expected for nowhere" in message
    assert str(tmp_path) not in message, "an agent may read it, and is to learn no path to the text"
    other = tmp_path / "held"
    other.mkdir()
    for file in tiny.held.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokens = np.fromfile(other / "val.bin", np.uint16)
    tokens[[7, 8]] = tokens[[8, 7]] if tokens[7] != tokens[8] else tokens[[7, 9]]
    tokens.tofile(other / "val.bin")
    code, kind, message = refusal(score(run_dir, tiny, "--held", other))
    assert (code, kind) == (2, "data")
    assert "is not the text that was prepared" in message
    assert str(tmp_path) not in message
    (other / "val.bin").write_bytes((tiny.held / "val.bin").read_bytes())
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"val_bytes": meta["val_bytes"] + 1}))
    assert "is not the text that was prepared" in refusal(score(run_dir, tiny, "--held", other))[2], "and its bytes add up"


def test_nothing_is_left_behind(tiny, candidate):
    run_dir = candidate()
    before = {p.name for p in run_dir.iterdir()}
    assert score(run_dir, tiny).returncode == 0
    assert {p.name for p in run_dir.iterdir()} - before <= {"serve.log", "__pycache__"}
    assert not [p for p in psutil.process_iter(["cmdline"]) if {"serve", str(run_dir)} <= set(p.info["cmdline"] or [])]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says it by prctl")
def test_other_processes_may_not_look_into_the_scorer(tiny, candidate, tmp_path):
    """The server asks whether its parent may be dumped: if not, its memory is root's to see, not the user's."""
    source = "import os, pathlib\nstat = os.stat(f'/proc/{os.getppid()}/maps')\n" \
             f"pathlib.Path({str(tmp_path / 'owner')!r}).write_text(str(stat.st_uid))\n" + BIGRAM
    if os.getuid() == 0:
        code = "import ctypes, harness, pathlib\nfrom harness.score import score\n" \
               "try: score(pathlib.Path('/nowhere'), None, 'val', [])\n" \
               "except harness.HarnessError: print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
        assert program("-c", code, home=tiny.home).stdout.strip() == "0"
    else:
        run_dir = candidate(source=source)
        assert score(run_dir, tiny).returncode == 0
        assert (tmp_path / "owner").read_text() == "0"


@pytest.mark.slow
def test_memory_at_a_large_vocabulary(tmp_path):
    """The scorer itself, with 8192 tokens and rows of 2048: below 600 MB at its peak."""
    code = f"""
import json, numpy as np, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from harness.probes import log_probs
from harness.server import LogitsServer
run = pathlib.Path({str(tmp_path)!r})
source = "import numpy as np\\ndef load_model(d):\\n    return lambda t: np.zeros((*t.shape, 8192), np.float32)"
(run / "train_x.py").write_text(source)
server = LogitsServer(run, [1, 2048, 8192], [], bytearray())
for i in range(6):
    server.ask(np.zeros((1, 2048), np.int32))
    log_probs(server.answer()[0], np.zeros((2048, 3), int))
server.close()
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert peak < 600e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_log_probs_name_what_is_not_finite():
    logits = np.zeros((4, 9), np.float32)
    logits[2, 3], logits[2, 4] = np.inf, -np.inf
    with pytest.raises(HarnessError, match="non_finite"):
        log_probs(logits, np.zeros((4, 1), int))


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in DENIED_CALLS, reason="a filter of Linux")
def test_a_server_and_its_children_may_not_ask_the_kernel_about_others():
    code = "import ctypes, os, platform\nfrom harness.server import DENIED_CALLS, deny_calls\ndeny_calls()\n" \
           "libc = ctypes.CDLL(None, use_errno=True)\n" \
           "for call in DENIED_CALLS[platform.machine()][1:]:\n" \
           "    assert libc.syscall(call, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 38, call\n" \
           "assert os.fork() or os._exit(libc.syscall(DENIED_CALLS[platform.machine()][1], 0, 0, 0, 0, 0) != -1)\n" \
           "assert os.wait()[1] == 0\n" \
           "print(open('/dev/null').read() == '' and os.listdir('/') != [])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def looks_ahead_at(share: float, rows: int, rng: np.random.Generator) -> Callable[[bool], bool]:
    """A toy model that sees the next token at a share of positions, which it picks by the two tokens before; whether it passes."""
    vocab, length = 64, 32
    text = rng.integers(0, vocab, rows * length + 1).astype(np.int32)
    inputs, targets = text[:-1].reshape(rows, length), text[1:].reshape(rows, length)
    table, chosen = rng.normal(0, 1, (vocab, vocab)).astype(np.float32), rng.random((vocab, vocab)) < share

    def ask(questions, ids):
        answers = []
        for question in questions:
            tokens, logits = question.tokens, table[question.tokens].copy()
            places = 1 + np.flatnonzero(chosen[tokens[:-2], tokens[1:-1]])
            logits[places, tokens[places + 1]] += 9
            answers.append(log_probs(logits, ids[question.row]))
        return answers

    def passes(verify: bool) -> bool:
        try:
            bits_per_byte(ask, inputs, targets, np.ones((rows, length), bool), rows * length, verify)
        except HarnessError:
            return False
        return True
    return passes


def test_every_row_is_probed_before_a_keep(validation, table):
    """No row without a probe, and no beginning twice in one process, which is asked as many questions as in an ordinary score:
    it cannot tell when to behave."""
    asked = []

    def ask(questions, ids):
        asked.append([(q.row, q.cut) for q in questions])
        return by_table(table)(questions, ids)
    score = bits_per_byte(ask, *validation, 1000)
    ordinary = [len(questions) for questions in asked]
    asked.clear()
    assert bits_per_byte(ask, *validation, 1000, verify=True) == pytest.approx(score)
    rows = len(validation[0])
    probed = [row for questions in asked for row, cut in questions if cut < 32]
    assert set(probed) == set(range(rows))
    assert sorted(row for questions in asked for row, cut in questions if cut == 32) == list(range(rows)), "and scored once"
    assert len(asked) <= VERIFY_SERVERS
    assert len(probed) >= min(VERIFY_POSITIONS, 0.5 * rows * VERIFY_SERVERS - rows)
    for questions in asked:
        assert len({row for row, _ in questions}) == len(questions)
        assert 0.85 * min(ordinary) < len(questions) < 1.15 * max(ordinary)


def test_what_is_told_in_private_reaches_the_probes(tiny, candidate):
    """More than the two processes of an ordinary score load the model."""
    run_dir = candidate(source="print('loaded', flush=True)\n" + BIGRAM)
    private = json.dumps({"held": str(tiny.held), "wrap": [], "verify": True})
    done = subprocess.run([sys.executable, ROOT / "prepare_mlx.py", "score", run_dir, "--private"], input=private,
                          env=environment(tiny.home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "serve.log").read_text().count("loaded") > 2


def test_a_model_that_looks_ahead_rarely_passes_a_score_and_is_refused_before_a_keep():
    """At 1 % of positions, where a model passes every other ordinary score; and an honest one always passes."""
    rng = np.random.default_rng(1)
    assert not any(looks_ahead_at(0.01, 380, rng)(True) for _ in range(3))
    assert all(looks_ahead_at(0.0, 380, rng)(verify) for verify in (True, False))


@pytest.mark.slow
def test_the_chance_to_look_ahead_unseen():
    """What the README states, for 380 rows: a share of 0.2, 0.5 and 1 % of positions passes before a keep in about 5, 0 and 0 %."""
    rng = np.random.default_rng(2)
    seen = {share: np.mean([looks_ahead_at(share, 380, rng)(True) for _ in range(60)]) for share in (0.002, 0.005, 0.01)}
    assert seen[0.002] < 0.2
    assert seen[0.005] == seen[0.01] == 0


def test_a_model_that_loads_too_long_is_a_timeout(tiny, candidate):
    done = score(candidate(source="import time\ntime.sleep(60)\n" + BIGRAM), tiny, "--load-limit", "2")
    code, kind, message = refusal(done)
    assert (code, kind) == (5, "timeout")
    assert "importing the train file and load_model took more than 2.0 s" in message
    assert float(summary_of(score(candidate(), tiny, "--load-limit", "30").stdout)["load_seconds"]) > 0


def test_a_run_directory_without_end_is_not_copied(tiny, candidate, monkeypatch):
    from harness import server
    run_dir = candidate()
    monkeypatch.setattr(server, "COPY_FILES", 5)
    for n in range(6):
        (run_dir / f"{n}").write_text("")
    with pytest.raises(HarnessError, match="expected at most 5 files"):
        server.copy_run(run_dir, run_dir.parent / "copy")
    with open(run_dir / "huge", "wb") as file:
        file.truncate(1 << 40)  # takes no space, until it is copied
    monkeypatch.setattr(server, "COPY_FILES", 100)
    with pytest.raises(HarnessError, match="20 GiB"):
        server.copy_run(run_dir, run_dir.parent / "again")


def test_a_hole_in_a_file_takes_no_space_in_its_copy(candidate):
    """Nor the time to write it: a candidate can make 19 GiB of zeros in no time."""
    from harness import server
    run_dir = candidate()
    with open(run_dir / "holes", "wb") as file:
        file.write(b"begin")
        file.seek(200 << 20)
        file.write(b"middle")
        file.truncate((300 << 20) + 5)
    server.copy_run(run_dir, copy := run_dir.parent / "copy")
    assert (copy / "holes").stat().st_blocks * 512 < 4 << 20
    assert filecmp.cmp(run_dir / "holes", copy / "holes", shallow=False)


def test_a_folder_where_the_log_is_written_stops_no_score(tiny, candidate):
    run_dir = candidate()
    (run_dir / "serve.log").mkdir()
    assert float(summary_of(score(run_dir, tiny).stdout)["val_bpb"]) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_cannot_tell_from_its_parents_command_line_that_it_is_verified(tiny, candidate, tmp_path):
    note = f"with open({str(tmp_path / 'seen')!r}, 'a') as file: file.write(open(f'/proc/{{os.getppid()}}/cmdline').read() + '|')\n"
    run_dir, commands = candidate(source="import os\n" + note + BIGRAM), []
    for verify in (False, True):
        told = json.dumps({"held": str(tiny.held), "wrap": [], "verify": verify})
        argv = [sys.executable, str(ROOT / "prepare_mlx.py"), "score", str(run_dir), "--private"]
        done = subprocess.run(argv, input=told, env=environment(tiny.home), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        commands.append((tmp_path / "seen").read_text().strip("|").split("|"))
        (tmp_path / "seen").unlink()
    assert len(commands[0]) == 2 < len(commands[1])
    assert len(set(commands[0] + commands[1])) == 1
    assert str(tiny.held) not in commands[0][0]
