"""
The harness: token shards -> batches -> clock -> score -> summary. Frozen during a night.

    python prepare_mlx.py --dataset stories            prepare data (also: tinystories, climbmix, fineweb-edu, text:PATH)
    python prepare_mlx.py --list                       datasets and presets
    python prepare_mlx.py score RUN_DIR                val_bpb of a trained model, from its logits

A train file uses `start_run()`, `Run.batches()`, `Budget` and `Run.finish()`, and offers `load_model(run_dir)` in return.
The score is made by `score`: a process that never imports the train file, and asks another one (`serve`) for logits.
NumPy is the only dependency at module level, so that a machine with PyTorch needs no MLX.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import errno
import hashlib
import importlib.util
import json
import math
import mmap
import os
import platform
import queue
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Constants: presets by size of machine, exit codes, places
# ---------------------------------------------------------------------------------------------------------------------

STARTUP_LIMIT = 180             # seconds from process start to Budget.start(): compiling takes time, training must not
OVERRUN = 1.25, 10              # of the budget, and seconds: what a training may take beyond it for its last step and saving
DRIFT = 0.10                    # change of the machine's speed over a training from which the summary says so
EVAL_BUFFER_BYTES = 96 << 20    # each of the two logits buffers; bounds the scorer's memory
ANSWER_LIMIT = 300              # seconds that the logits server may take for one batch
SERVER_FILE_BYTES = 256 << 20   # the largest file, its log included, that the logits server may write
SERVER_LOG_BYTES = 1 << 20      # of its log that are kept


@dataclass(frozen=True)
class Preset:
    """What is fixed for every experiment of a night, by size of machine."""
    vocab_size: int             # tokens; 256 is a plain byte tokenizer
    seq_len: int                # tokens of context at evaluation, the most a model is asked for
    eval_bytes: int             # bytes of validation text, the most that is scored
    budget: str                 # what one training may use: 300s, 200steps or 5Mtokens


PRESETS = {
    "tiny": Preset(vocab_size=320, seq_len=32, eval_bytes=16_000, budget="20steps"),        # the tests
    "demo": Preset(vocab_size=1024, seq_len=64, eval_bytes=100_000, budget="8s"),           # make demo, 2 CPU cores
    "cpu": Preset(vocab_size=1024, seq_len=128, eval_bytes=250_000, budget="300s"),         # no GPU: small softmax
    "mac": Preset(vocab_size=4096, seq_len=512, eval_bytes=2_000_000, budget="300s"),       # Apple Silicon, 8-24 GB
    "mac-max": Preset(vocab_size=8192, seq_len=1024, eval_bytes=4_000_000, budget="300s"),  # Apple Silicon, 36 GB and up
    "cuda": Preset(vocab_size=8192, seq_len=2048, eval_bytes=8_000_000, budget="300s"),     # upstream's shape
}


class HarnessError(Exception):
    """An error with a name that the driver reads, and an exit code of its own."""
    exit_codes: ClassVar = {"crash": 1, "usage": 2, "data": 2, "nan": 3, "oom": 4, "timeout": 5, "violation": 6}

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)  # both, so that a worker process can hand it on
        self.kind, self.exit_code = kind, self.exit_codes.get(kind, 1)

    def __str__(self) -> str:
        return self.args[1]


def home() -> Path:
    """Where prepared data lies: $AUTORESEARCH_HOME or ~/.cache/autoresearch-mlx."""
    return Path(os.environ.get("AUTORESEARCH_HOME") or Path.home() / ".cache" / "autoresearch-mlx")


def detect_preset() -> str:
    """The preset for this machine, from what the operating system says; no framework is asked."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return "mac-max" if memory >= 34 << 30 else "mac"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") else "cpu"


def load_fast_blas(threads: int | None = None) -> str | None:
    """Load an optimised BLAS before `import mlx.core` binds MLX's own, 50 times slower one. Linux only. `threads`: how many a
    product may take, None leaves it to the library. Returns the library's name, or None; prints one hint when there is none."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS") if threads else ():
        os.environ.setdefault(name, str(threads))
    if sys.platform != "linux":
        return None
    in_environment = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))  # the `mkl` wheel puts it there
    for name in ["libopenblas.so.0", "libopenblas.so", *map(str, in_environment), "libmkl_rt.so.2", "libmkl_rt.so"]:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL).cblas_sgemm  # noqa: B018  (a library without it doesn't serve)
            return Path(name).name
    print("hint: no fast BLAS found, matrix products on the CPU run about 50 times slower than they could; mend it with "
          "`pip install mkl` (x86-64) or `apt-get install libopenblas0-pthread`", file=sys.stderr)
    return None


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Preparation: corpus.py makes what is missing
# ---------------------------------------------------------------------------------------------------------------------

def prepare(dataset: str, preset_name: str, *, vocab_size=0, field="text", shards=1, revision="") -> dict:
    """Make a dataset ready and current. Returns the entry described in CONTRIBUTING.md. Errors: HarnessError."""
    import corpus
    if preset_name not in PRESETS:
        raise HarnessError("usage", f"unknown preset {preset_name!r}; expected one of {', '.join(PRESETS)}")
    preset = replace(PRESETS[preset_name], vocab_size=vocab_size or PRESETS[preset_name].vocab_size)
    if dataset.startswith("text:") and dataset != "text:":  # from wherever it is asked for: what is hidden has to be found
        dataset = f"text:{Path(dataset[5:]).expanduser().absolute()}"
    slug = re.sub(r"[^a-z0-9]+", "-", Path(dataset.removeprefix("text:")).stem.lower()).strip("-")[:32] or "text"
    ident = f"{slug}-{preset.vocab_size}-{corpus.fingerprint(dataset, preset, field, shards, revision)}"
    train, held = home() / "train" / ident, home() / "held" / ident
    with corpus.alone(ident):
        if problem := corpus.damage(train, held):
            if train.exists():
                print(f"note: {problem}; preparing it again", file=sys.stderr)
            corpus.build(dataset, preset, field, shards, revision, ident)
    meta = json.loads((train / "meta.json").read_text())
    entry = {"id": ident, "train_dir": str(train), "held_dir": str(held), "dataset": dataset, "preset": preset_name,
             "vocab_size": meta["vocab_size"], "seq_len": preset.seq_len, "budget": preset.budget,
             "data_hash": meta["data_hash"], "tokenizer_hash": meta["tokenizer_hash"], "device": detect_preset()}
    write_atomically(home() / "current.json", json.dumps(entry, indent=1).encode())
    return entry


# ---------------------------------------------------------------------------------------------------------------------
# Batches: a batch is a slice of the token shard
# ---------------------------------------------------------------------------------------------------------------------

def row_starts(tokens: np.ndarray, bos_id: int, seq_len: int) -> np.ndarray:
    """Where the training rows of one epoch start: int64 [rows], each row is tokens[start : start + seq_len + 1].

    Rows follow one another and the last one ends with the text: no token is left out. A row starts at a document start where
    that costs at most a quarter of a row read twice.
    """
    piece = 1 << 24  # what is compared at once
    marks = [a + m for a in range(0, len(tokens), piece) for m in np.flatnonzero(tokens[a : a + piece] == bos_id).tolist()]
    starts, position, last, document = [], 0, len(tokens) - seq_len - 1, 0
    while position < last:
        starts.append(position)
        position += seq_len
        while document < len(marks) and marks[document] <= position:
            document += 1
        if document and position - seq_len // 4 <= marks[document - 1]:
            position = marks[document - 1]
    return np.array([*starts, last] if last >= 0 else [], dtype=np.int64)


def batches(tokens: np.ndarray, bos_id: int, batch_size: int, seq_len: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (inputs, targets), int32 [B, T] each, every row once an epoch in an order that `seed` decides; a thread makes them
    a few batches ahead. Errors: HarnessError("data") where the shard is too short."""
    starts = row_starts(tokens, bos_id, seq_len)
    if len(starts) < batch_size:
        raise HarnessError("data", f"a batch of {batch_size} rows of {seq_len} tokens was asked for, the training text has only "
                           f"{len(starts)} such rows; use a smaller batch or more text")
    ready: queue.Queue = queue.Queue(maxsize=4)
    offsets = np.arange(seq_len + 1)

    def produce() -> None:
        rng = np.random.default_rng(seed)
        order = np.empty(0, dtype=np.int64)
        while True:
            while len(order) < batch_size:
                order = np.concatenate([order, rng.permutation(starts)])
            rows, order = order[:batch_size], order[batch_size:]
            block = tokens[rows[:, None] + offsets].astype(np.int32)           # [B, T + 1]
            ready.put((block[:, :-1], block[:, 1:]))

    threading.Thread(target=produce, daemon=True).start()
    while True:
        yield ready.get()


# ---------------------------------------------------------------------------------------------------------------------
# Clock
# ---------------------------------------------------------------------------------------------------------------------

class Budget:
    """What one training may use: "300s", "200steps" or "5Mtokens". Seconds are monotonic and begin with `start()`.

    A machine that slept is noticed: its wall clock ran and the monotonic one did not. `age`: seconds this process is old.
    """

    def __init__(self, text: str, age: float = 0.0):
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kM]?)(s|steps|tokens)", text.strip())
        if not match or not float(match[1]) > 0:
            raise HarnessError("usage", f"budget {text!r}: expected something like 300s, 200steps or 5Mtokens")
        self.text, self.unit = text.strip(), match[3]
        self.amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]]
        self.started, self._born = False, time.monotonic() - age

    def start(self, work: Callable[[], object] | None = None) -> None:
        """Begin to count, once, after warm-up. `work`: what to measure the machine's speed by, see `speed`. Errors:
        HarnessError("timeout") where starting took longer than STARTUP_LIMIT, ("violation") for a second start."""
        waited = time.monotonic() - self._born
        if self.started:
            raise HarnessError("violation", "the budget was started a second time")
        if waited > STARTUP_LIMIT:
            raise HarnessError("timeout", f"{waited:.0f} s passed before training began, expected at most {STARTUP_LIMIT}: warm-up "
                               "compiles, it doesn't train")
        self._work, self._probe_seconds = work, min(1.0, max(0.2, self.amount / 30)) if self.unit == "s" else 0.2
        self._speed = speed(work, self._probe_seconds)
        self.started, self._start, self._wall = True, time.monotonic(), time.time()

    @property
    def seconds(self) -> float:
        """Seconds since `start()`, 0 before; not those that the machine slept."""
        return time.monotonic() - self._start if self.started else 0.0

    def progress(self, steps: int, tokens: int) -> float:
        """How much of the budget is used, 0 to 1 and beyond."""
        return {"s": self.seconds, "steps": steps, "tokens": tokens}[self.unit] / self.amount

    def close(self) -> dict[str, float]:
        """How long the machine slept, how fast it is now against before, and how fast at all. Errors: HarnessError("violation")
        for a clock that never ran, ("timeout") for a training far beyond its budget: one step and saving take less."""
        if not self.started:
            raise HarnessError("violation", "the training ended, but run.budget.start() was never called")
        used, limit = self.seconds, max(OVERRUN[0] * self.amount, self.amount + OVERRUN[1])
        if self.unit == "s" and used > limit:
            raise HarnessError("timeout", f"the training took {used:.0f} s, expected at most {limit:.0f} for {self.text}; "
                               "ask run.budget.progress() more often, or make a step shorter")
        slept = max(0.0, time.time() - self._wall - used)
        now = speed(self._work, self._probe_seconds)
        return {"suspended_seconds": slept, "speed_index": now / self._speed, "products_per_second": (now + self._speed) / 2}


def speed(work: Callable[[], object] | None, seconds: float) -> float:
    """How often a second this machine does `work` now, by the median: a callable that does one fixed piece of work, say a matrix
    product, on the device that trains and waits for its end. By default NumPy's product: it sees the CPU only."""
    square = np.ones((384, 384), np.float32)
    work = work or (lambda: square @ square)
    work()  # the first time it may compile
    times, began = [], time.perf_counter()
    while not times or times[-1] - began < seconds:
        work()
        times.append(time.perf_counter())
    return 1 / float(np.median(np.diff([began, *times])))


# ---------------------------------------------------------------------------------------------------------------------
# A run, as its trainer sees it
# ---------------------------------------------------------------------------------------------------------------------

class Run:
    """One training: where its data lies, what it may use, where its results go. Use as `with start_run(__file__) as run:`; an
    exception inside becomes error.json, a traceback and an exit code that names the kind of failure."""

    def __init__(self, train_file: str):
        import psutil
        self.born = time.monotonic()
        place = os.environ.get("AUTORESEARCH_DATA")
        if not place:
            try:
                place = json.loads((home() / "current.json").read_text())["train_dir"]
            except FileNotFoundError:
                raise HarnessError("data", "no data is prepared: run `python prepare_mlx.py --dataset stories` first") from None
        self.data = Path(place)
        self.meta = json.loads((self.data / "meta.json").read_text())
        text, age = os.environ.get("AUTORESEARCH_BUDGET") or self.meta["budget"], time.time() - psutil.Process().create_time()
        self.budget = Budget(text, age)
        self.seed = int(os.environ.get("AUTORESEARCH_SEED") or 1)
        self.vocab_size, self.seq_len = self.meta["vocab_size"], self.meta["seq_len"]
        self.train_tokens = (self.data / "train.bin").stat().st_size // np.dtype(self.meta["dtype"]).itemsize
        self.step = 0
        self.dir = Path(os.environ.get("AUTORESEARCH_RUN_DIR") or Path("runs", "manual", time.strftime("%Y%m%d-%H%M%S"))).resolve()
        self.dir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(train_file, self.dir / Path(train_file).name)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        if not isinstance(error, HarnessError):
            sys.excepthook(kind, error, trace)
        sys.exit(fail(kind_of(error), str(error) or kind.__name__, self.dir, self.step))

    def tokens(self) -> np.ndarray:
        """The training shard, uint16 or uint32 [n], memory-mapped. Not before the clock runs: warm-up is on dummy data."""
        if not self.budget.started:
            raise HarnessError("violation", "training data was asked for before run.budget.start(); warm up on dummy data")
        return np.memmap(self.data / "train.bin", dtype=self.meta["dtype"], mode="r")

    def batches(self, batch_size: int, seq_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless (inputs, targets), int32 [batch_size, seq_len] each; see `batches`. The first after run.budget.start()."""
        yield from batches(self.tokens(), self.meta["bos_id"], batch_size, seq_len, self.seed)

    def log(self, **window) -> None:
        """Append a line to metrics.jsonl: step, tokens, seconds, loss (nats), lr, tokens_per_second, mfu_percent, memory_mb."""
        self.step = window.get("step", self.step)
        with open(self.dir / "metrics.jsonl", "a") as f:
            f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in window.items()}) + "\n")
        if not math.isfinite(window.get("loss", 0.0)):
            raise HarnessError("nan", f"the loss became {window['loss']} at step {self.step}")

    def finish(self, **facts) -> None:
        """Write train.json; unless somebody else scores (AUTORESEARCH_SCORE=0), become the scorer and print the summary."""
        facts |= self.budget.close()
        facts |= {"total_seconds": time.monotonic() - self.born, "budget": self.budget.text, "seed": self.seed,
                  "data": self.data.name}
        write_atomically(self.dir / "train.json", json.dumps(facts, indent=1).encode())
        if os.environ.get("AUTORESEARCH_SCORE") != "0":
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, __file__, "score", str(self.dir)])  # and the trainer's memory is free


def start_run(train_file: str) -> Run:
    """Begin a run from the AUTORESEARCH_* variables (CONTRIBUTING.md lists them), or from what was prepared last."""
    try:
        return Run(train_file)
    except (HarnessError, OSError, ValueError) as error:
        print(f"error: {error}; AUTORESEARCH_DATA, _BUDGET, _SEED and _RUN_DIR decide how a run begins", file=sys.stderr)
        sys.exit(HarnessError.exit_codes["usage"])


def kind_of(error: BaseException) -> str:
    """The name of a failure: a HarnessError's own, "oom" for what the frameworks say when memory ends, or "crash"."""
    if isinstance(error, HarnessError):
        return error.kind
    if getattr(error, "errno", None) == errno.EFBIG:  # a file beyond SERVER_FILE_BYTES
        return "violation"
    words = r"out of memory|OutOfMemory|[Uu]nable to allocate|can.t allocate memory|maximum allowed buffer"
    return "oom" if isinstance(error, MemoryError) or re.search(words, str(error)) else "crash"


def fail(kind: str, message: str, run_dir: Path, step: int | None = None) -> int:
    """Record a failure in error.json and as a JSON line on standard error; returns the exit code."""
    record = json.dumps({"kind": kind, "message": message[:2000], "step": step})
    with contextlib.suppress(OSError):
        write_atomically(run_dir / "error.json", record.encode())
    print(record, file=sys.stderr)
    return HarnessError(kind, message).exit_code


# ---------------------------------------------------------------------------------------------------------------------
# Score: logits come from a server process that imports the candidate, the number is made here
# ---------------------------------------------------------------------------------------------------------------------

def shared(descriptor: int, dtype: type, shape: list[int], access: int = mmap.ACCESS_WRITE) -> np.ndarray:
    """Memory behind a file that two processes hold: it has no name that a third could find, and nothing is left behind."""
    if access == mmap.ACCESS_WRITE:
        os.ftruncate(descriptor, math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(mmap.mmap(descriptor, 0, access=access), dtype).reshape(shape)


def serve(run_dir: Path) -> None:
    """The logits server: the only process that imports the candidate. JSON lines in and out, the numbers in shared memory.

    First line in: `shape` [rows, seq_len, vocab] and descriptors of tokens, int32 [2, rows, seq_len], and of logits, float32
    [2, rows, seq_len, vocab]. Then {"buffer": 0 or 1} in, {"done": the same} out, or {"kind", "message"} and the end.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the candidate prints goes to the log, and the log has a limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (SERVER_FILE_BYTES, SERVER_FILE_BYTES))
    first = json.loads(sys.stdin.readline())
    tokens = shared(first["tokens"], np.int32, [2, *first["shape"][:2]], mmap.ACCESS_READ)
    logits = shared(first["logits"], np.float32, [2, *first["shape"]])
    try:
        spec = importlib.util.spec_from_file_location("candidate", sorted(run_dir.glob("train_*.py"))[0])
        module = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.load_model(run_dir)
        print(json.dumps({"done": None}), file=replies)
        for line in sys.stdin:
            i = json.loads(line)["buffer"]
            answer = np.asarray(model(np.array(tokens[i])))                     # [rows, seq_len, vocab]
            if answer.shape != logits[i].shape or answer.dtype.kind != "f":
                raise HarnessError("violation", f"bad_shape: expected floating-point logits {logits[i].shape}, got {answer.dtype} "
                                   f"{answer.shape} from load_model(run_dir)(tokens)")
            logits[i] = answer
            print(json.dumps({"done": i}), file=replies)
    except BaseException as error:
        print(json.dumps({"kind": kind_of(error), "message": f"{type(error).__name__}: {error}"[:2000]}), file=replies)
        sys.excepthook(*sys.exc_info())
        os._exit(1)


class LogitsServer:
    """The scorer's end of the server: `ask` sends a batch, `answer` waits for one, first asked, first answered.

    `scratch` is its TMPDIR, new for each, and its log has no name: under `wrap`, no server finds what another one left.
    """

    def __init__(self, run_dir: Path, shape: list[int], wrap: list[str], log: bytearray, scratch: Path | None = None):
        self.asked, self.answered, self._unread, self._kept = 0, 0, b"", log
        self._log, self._scratch = tempfile.TemporaryFile(), scratch or Path(tempfile.mkdtemp())  # noqa: SIM115
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(mode=0o700)
        with contextlib.ExitStack() as stack:
            files = [os.fdopen(os.memfd_create("exchange"), "r+b") if hasattr(os, "memfd_create")
                     else tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
            token_file, logit_file = (stack.enter_context(file).fileno() for file in files)
            self.tokens = shared(token_file, np.int32, [2, *shape[:2]])
            self.logits = shared(logit_file, np.float32, [2, *shape])
            self.process = subprocess.Popen(
                [*wrap, sys.executable, "-B", __file__, "serve", str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._log, pass_fds=(token_file, logit_file), start_new_session=True, env={
                    **{k: v for k, v in os.environ.items() if k != "AUTORESEARCH_HOME"},  # nothing leads to held-out data
                    "TMPDIR": str(self._scratch)})
        self._send({"shape": shape, "tokens": token_file, "logits": logit_file})

    def _send(self, message: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead server says why in its last reply
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _receive(self, expected: int | None) -> None:
        deadline, descriptor = time.monotonic() + ANSWER_LIMIT, self.process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise HarnessError("timeout", f"the model gave no logits within {ANSWER_LIMIT} s")
            chunk = os.read(descriptor, 65536)
            if not chunk:
                words = os.pread(self._log.fileno(), 4096, max(0, os.fstat(self._log.fileno()).st_size - 4096))
                kind = "oom" if b"OutOfMemory" in words else "crash"  # Metal aborts the process, and leaves no more than this word
                raise HarnessError(kind, f"the logits server died (exit code {self.process.wait()}); see serve.log")
            self._unread += chunk
            if len(self._unread) > 1 << 16:
                break
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            reply = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            raise HarnessError("violation", f"expected a reply of the logits server, got {line[:80]!r}") from None
        if "kind" in reply:
            kind = reply["kind"] if reply["kind"] in ("violation", "oom") else "crash"
            raise HarnessError(kind, str(reply.get("message")))
        if reply != {"done": expected}:
            raise HarnessError("violation", f"expected the logits server's reply to batch {expected}, got {line[:80]!r}")

    def ask(self, batch: np.ndarray) -> None:
        """Send int32 [<= rows, seq_len]; the rest of the buffer repeats its first row, so that the shape never changes."""
        if not self.asked:
            self._receive(None)  # the candidate is imported
        i = self.asked % 2
        self.tokens[i][: len(batch)] = batch
        self.tokens[i][len(batch):] = batch[0]
        self._send({"buffer": i})
        self.asked += 1

    def answer(self) -> np.ndarray:
        """float32 [rows, seq_len, vocab], a shared buffer: valid until the next but one `ask`."""
        i = self.answered % 2
        self._receive(i)
        self.answered += 1
        return self.logits[i]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - SERVER_LOG_BYTES))
        self._kept += self._log.read()
        self._log.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def score(run_dir: Path, held: Path | None, split: str, wrap: list[str], batch_rows=0, scratch: Path | None = None) -> dict:
    """Score a run's model on held-out text: every byte once. Returns the summary. Errors: HarnessError."""
    from probes import Question, bits_per_byte, log_probs
    from tokenizer import Tokenizer
    began = time.monotonic()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # not dumpable: no process of the same user may read or write our memory
    facts = read_facts(run_dir)
    held = held or home() / "held" / str(facts["data"])
    try:
        meta = json.loads((held / "meta.json").read_text())
        tokenizer = Tokenizer((held / "tokenizer.model").read_bytes())
        tokens = np.fromfile(held / f"{split}.bin", dtype=meta["dtype"])
    except OSError as error:
        raise HarnessError("data", f"held-out data was expected in {held}, got {error}; run prepare_mlx.py again") from error
    if sha256(text := tokenizer.decode_bytes(tokens)) != meta[f"{split}_sha256"] or len(text) != meta[f"{split}_bytes"]:
        raise HarnessError("data", f"{held / f'{split}.bin'} is not the text that was prepared; run prepare_mlx.py again")
    seq_len, vocab = meta["seq_len"], tokenizer.vocab_size
    rows = math.ceil((len(tokens) - 1) / seq_len)
    padded = np.full(rows * seq_len + 1, tokenizer.bos_id, dtype=np.int32)
    padded[: len(tokens)] = tokens
    inputs, targets = padded[:-1].reshape(rows, seq_len), padded[1:].reshape(rows, seq_len)
    scored = tokenizer.token_bytes[targets] > 0                                 # marks and padding have no bytes
    batch_rows = max(1, min(batch_rows or 256, rows // 8, EVAL_BUFFER_BYTES // (4 * seq_len * vocab)))  # rows // 8: many calls
    threads, log = concurrent.futures.ThreadPoolExecutor(os.cpu_count()), bytearray()  # NumPy lets go of the interpreter lock
    (run_dir / "serve.log").unlink(missing_ok=True)

    def ask(questions: list[Question], ids: np.ndarray) -> np.ndarray:
        groups = [questions[a : a + batch_rows] for a in range(0, len(questions), batch_rows)]
        values = [np.empty((0, seq_len, ids.shape[-1]))]
        with contextlib.closing(LogitsServer(run_dir, [batch_rows, seq_len, vocab], wrap, log, scratch)) as server:
            for k in range(len(groups) + 1):
                if k < len(groups):  # the next batch is computed while this one is summed
                    server.ask(np.stack([question.tokens for question in groups[k]]))
                if k:
                    logits = server.answer()[: len(groups[k - 1])].reshape(-1, vocab)
                    wanted = ids[[question.row for question in groups[k - 1]]].reshape(len(logits), -1)
                    values.append(log_probs(logits, wanted, threads).reshape(-1, seq_len, ids.shape[-1]))
        return np.concatenate(values)

    try:
        bpb = bits_per_byte(ask, inputs, targets, scored, meta[f"{split}_bytes"])
    finally:
        with contextlib.suppress(OSError):  # not earlier: the next server could read it
            write_atomically(run_dir / "serve.log", bytes(log))
    summary = {f"{split}_bpb": f"{bpb:.6f}", "training_seconds": f"{facts['training_seconds']:.1f}",
               "total_seconds": f"{facts['total_seconds'] + time.monotonic() - began:.1f}",
               "peak_vram_mb": f"{facts['peak_vram_mb']:.1f}", "mfu_percent": f"{facts['mfu_percent']:.2f}",
               "total_tokens_M": f"{facts['total_tokens'] / 1e6:.3f}", "num_steps": facts["num_steps"],
               "num_params_M": f"{facts['num_params'] / 1e6:.3f}", "depth": facts["depth"],
               f"{split}_bytes": meta[f"{split}_bytes"], f"{split}_sha256": meta[f"{split}_sha256"][:16],
               "data_hash": meta["data_hash"], "tokenizer_hash": meta["tokenizer_hash"], "seq_len": seq_len,
               "budget": facts["budget"], "device": facts["device"], "seed": facts["seed"],
               "suspended_seconds": f"{facts['suspended_seconds']:.1f}", "speed_index": f"{facts['speed_index']:.3f}",
               "products_per_second": f"{facts['products_per_second']:.2f}"}
    if abs(facts["speed_index"] - 1) > DRIFT:
        summary["speed_warning"] = f"{facts['speed_index'] - 1:+.0%} over the training: heat, or another program"
    return summary


def read_facts(run_dir: Path) -> dict:
    """train.json, checked: the trainer wrote it, so a number must be a finite number and a word one short word."""
    try:
        facts = dict(json.loads((run_dir / "train.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise HarnessError("crash", f"{run_dir}: expected a train.json from a finished training, got {error}") from error
    for key in ("training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens", "num_steps", "num_params",
                "depth", "seed", "suspended_seconds", "speed_index", "products_per_second"):
        value = facts.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e18:
            raise HarnessError("violation", f"train.json: expected a finite number for {key}, got {str(value)[:80]}")
    for key in ("budget", "device", "data"):
        if not re.fullmatch(r"\w[\w.,@:()+ -]{0,95}", str(facts.get(key))):
            raise HarnessError("violation", f"train.json: expected a short name for {key}, got {str(facts.get(key))[:80]!r}")
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

def main() -> int:
    sys.modules["prepare_mlx"] = sys.modules["__main__"]  # one module, not two, for corpus.py and the candidate
    parser = argparse.ArgumentParser(description="Prepare data for autoresearch, or score a trained model.")
    parser.add_argument("--dataset", default=None,
                        help="a name that --list shows, or text:PATH (default: stories on a CPU, else tinystories)")
    parser.add_argument("--preset", default=None, help=f"size of machine: {', '.join(PRESETS)} (default: this machine's)")
    parser.add_argument("--vocab-size", type=int, default=0, help="tokens, instead of the preset's; 256 is plain bytes")
    parser.add_argument("--field", default="text", help="field of .jsonl or column of .parquet that holds the text")
    parser.add_argument("--shards", type=int, default=1, help="how many files of a hub dataset to fetch")
    parser.add_argument("--revision", default="", help="commit, branch or tag of a hub dataset (default: the commit --list shows)")
    parser.add_argument("--json", type=Path, help="write what was prepared to this file")
    parser.add_argument("--list", action="store_true", help="list datasets with source and licence, and presets")
    commands = parser.add_subparsers(dest="command", metavar="score | serve")
    for name, text in (("score", "val_bpb of a trained model"), ("serve", "the logits server; `score` starts it")):
        command = commands.add_parser(name, help=text)
        command.add_argument("run_dir", type=Path)
        if name == "score":
            command.add_argument("--split", choices=("val", "test"), default="val")
            command.add_argument("--held", type=Path, help="directory of the held-out shards (default: the run's own dataset)")
            command.add_argument("--wrap", type=json.loads, default=[],
                                 help="JSON list: a command to start the logits server under, a sandbox")
            command.add_argument("--scratch", type=Path, help="TMPDIR of the logits server, anew for each (default: any)")
            command.add_argument("--rows", type=int, default=0, help="rows in a batch, at most (default: 256, or what 96 MB hold)")
    args = parser.parse_args()
    try:
        if args.command == "serve":
            serve(args.run_dir.resolve())
        elif args.command == "score":
            summary = score(args.run_dir.resolve(), args.held, args.split, args.wrap, args.rows, args.scratch)
            print("---", *(f"{key + ': ':<18}{value}" for key, value in summary.items()), sep="\n")
        elif args.list:
            import corpus
            print(*(f"{name:<12} {source:<32} {revision:<41}{licence}"
                    for name, (licence, source, _, revision) in corpus.DATASETS.items()), sep="\n")
            for name, preset in PRESETS.items():
                print(f"preset {name:<8} {preset}{'   <- this machine' if name == detect_preset() else ''}")
        else:
            preset = args.preset or detect_preset()
            dataset = args.dataset or ("stories" if preset in ("tiny", "demo", "cpu") else "tinystories")
            entry = prepare(dataset, preset, vocab_size=args.vocab_size, field=args.field, shards=args.shards,
                            revision=args.revision)
            if args.json:
                write_atomically(args.json, json.dumps(entry, indent=1).encode())
            print(f"ready: {entry['id']}  vocabulary {entry['vocab_size']:,}, {entry['seq_len']} tokens of context, "
                  f"budget {entry['budget']}, data {entry['data_hash']}")
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, run the same command again to go on", file=sys.stderr)
        os._exit(130)  # not waiting for downloads
    except HarnessError as error:
        if args.command:
            return fail(error.kind, str(error), args.run_dir)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
