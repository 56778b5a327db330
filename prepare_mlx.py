"""
The harness: data -> tokenizer -> token shards -> batches -> clock -> score -> summary. Frozen during a night.

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
import hashlib
import importlib.util
import json
import math
import os
import platform
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Constants: presets by size of machine, exit codes, places
# ---------------------------------------------------------------------------------------------------------------------

STARTUP_LIMIT = 180             # seconds from process start to Budget.start(): compiling takes time, training must not
EVAL_BUFFER_BYTES = 96 << 20    # each of the two logits buffers; bounds the scorer's memory
ANSWER_LIMIT = 300              # seconds that the logits server may take for one batch
PROBE_ROWS = 24                 # rows asked a second time with another document's ending
PROBE_TOLERANCE = 0.05          # nats; bf16 logits of one row move by about 0.01 between batch layouts


@dataclass(frozen=True)
class Preset:
    """What is fixed for every experiment of a night, by size of machine."""
    vocab_size: int             # tokens; 256 is a plain byte tokenizer
    seq_len: int                # tokens of context at evaluation, the most a model is asked for
    eval_bytes: int             # bytes of validation text, the most that is scored
    budget: str                 # what one training may use: 300s, 200steps or 5Mtokens


PRESETS = {
    "tiny": Preset(vocab_size=320, seq_len=32, eval_bytes=16_000, budget="20steps"),        # the tests
    "demo": Preset(vocab_size=1024, seq_len=64, eval_bytes=100_000, budget="12s"),          # make demo, 2 CPU cores
    "cpu": Preset(vocab_size=1024, seq_len=128, eval_bytes=250_000, budget="300s"),         # no GPU: small softmax
    "mac": Preset(vocab_size=4096, seq_len=512, eval_bytes=2_000_000, budget="300s"),       # Apple Silicon, 8-24 GB
    "mac-max": Preset(vocab_size=8192, seq_len=1024, eval_bytes=4_000_000, budget="300s"),  # Apple Silicon, 36 GB and up
    "cuda": Preset(vocab_size=8192, seq_len=2048, eval_bytes=8_000_000, budget="300s"),     # upstream's shape
}

class HarnessError(Exception):
    """An error with a name that the driver reads, and an exit code of its own."""
    exit_codes: ClassVar = {"crash": 1, "usage": 2, "data": 2, "nan": 3, "oom": 4, "timeout": 5, "violation": 6}

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    @property
    def exit_code(self) -> int:
        return self.exit_codes.get(self.kind, 1)


def home() -> Path:
    """Where prepared data lies: $AUTORESEARCH_HOME or ~/.cache/autoresearch-mlx."""
    return Path(os.environ.get("AUTORESEARCH_HOME") or Path.home() / ".cache" / "autoresearch-mlx")


def detect_preset() -> str:
    """The preset for this machine, from what the operating system says; no framework is asked."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return "mac-max" if memory >= 34 << 30 else "mac"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") else "cpu"


def load_fast_blas() -> str | None:
    """Load an optimised BLAS before MLX's CPU backend binds its own, 50 times slower one. Linux only.

    Call before `import mlx.core`. Returns the library's name, or None; prints one hint when there is none.
    """
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
# Tokenizer: SentencePiece BPE with byte fallback, lossless; or plain bytes
# ---------------------------------------------------------------------------------------------------------------------

class Tokenizer:
    """Text <-> token ids without loss: `decode(encode(s)) == s`, and the token_bytes of its ids add up to its UTF-8 length.

    `model` is a serialised SentencePiece model, or empty for plain bytes: ids 0..255, where 255, which UTF-8 never uses,
    is the document mark. A token's bytes come from its piece, never through decode (which would count U+FFFD as 3).
    """

    def __init__(self, model: bytes = b""):
        self.model = model
        if model:
            import sentencepiece
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size, self.bos_id = self._sp.vocab_size(), self._sp.bos_id()
            self.pieces = [self._piece(i) for i in range(self.vocab_size)]
        else:
            self.vocab_size, self.bos_id = 256, 255
            self.pieces = [bytes([i]) for i in range(255)] + [b""]
        self.token_bytes = np.array([len(p) for p in self.pieces], dtype=np.int64)  # [vocab]

    def _piece(self, i: int) -> bytes:
        if self._sp.is_control(i) or self._sp.is_unknown(i):
            return b""
        piece = self._sp.id_to_piece(i)
        return bytes([int(piece[3:-1], 16)]) if self._sp.is_byte(i) else piece.replace("\u2581", " ").encode()

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges. Errors: HarnessError("usage") for a vocabulary below the 256 bytes and the marks."""
        if vocab_size == 256:
            return cls()
        if vocab_size < 320:
            raise HarnessError("usage", f"vocab_size {vocab_size}: expected 256 (plain bytes) or at least 320 (bytes and letters)")
        import io

        import sentencepiece
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(text[i : i + 100_000] for text in texts for i in range(0, len(text), 100_000)),
                model_writer=model,
                model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, byte_fallback=True,
                character_coverage=0.9995 if vocab_size >= 1024 else 0.99,  # rarer letters are left to their bytes
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, max_sentence_length=1 << 20,
                unk_id=0, bos_id=1, eos_id=-1, pad_id=-1, num_threads=os.cpu_count() or 1, minloglevel=2)
        except RuntimeError as error:
            raise HarnessError("data", f"no tokenizer of {vocab_size} tokens could be made of this text: {error}") from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Errors: HarnessError("data") for lone surrogates, which no UTF-8 text has."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise HarnessError("data", f"expected text that UTF-8 can hold, got a lone surrogate at {error.start}") from error
        if not self.model:
            return list(data)
        ids: list[int] = []
        for i, part in enumerate(text.split("\u2581")):  # SentencePiece writes its spaces so; a real one goes as bytes
            ids += [self._sp.piece_to_id(f"<0x{b:02X}>") for b in "\u2581".encode()] if i else []
            ids += self._sp.encode(part)
        return ids

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """uint16 or uint32 [n]: the documents one after another, each begun by the document mark."""
        ids = [i for text in texts for i in (self.bos_id, *self.encode(text))]
        return np.array(ids, dtype=np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# Preparation: corpus.py makes what is missing
# ---------------------------------------------------------------------------------------------------------------------

def prepare(dataset: str, preset_name: str, *, vocab_size: int = 0, field: str = "text", shards: int = 1) -> dict:
    """Make a dataset ready and current; do nothing but that where it already is.

    Returns the entry described in CONTRIBUTING.md (directories, hashes, preset). Errors: HarnessError.
    """
    if preset_name not in PRESETS:
        raise HarnessError("usage", f"unknown preset {preset_name!r}; expected one of {', '.join(PRESETS)}")
    preset = PRESETS[preset_name]
    preset = Preset(**{**asdict(preset), "vocab_size": vocab_size or preset.vocab_size})
    import corpus
    slug = re.sub(r"\W+", "-", Path(dataset.removeprefix("text:")).stem).strip("-").lower() or "text"
    ident = f"{slug}-{preset.vocab_size}-{corpus.fingerprint(dataset, preset, field, shards)}"
    train, held = home() / "train" / ident, home() / "held" / ident
    if not (train / "meta.json").exists():
        corpus.build(dataset, preset, field, shards, ident)
    meta = json.loads((train / "meta.json").read_text())
    size = (train / "train.bin").stat().st_size
    if size != meta["train_bytes_on_disk"]:
        shutil.rmtree(train)
        raise HarnessError("data", f"{train}: expected a train.bin of {meta['train_bytes_on_disk']:,} bytes, it has {size:,}; "
                           "it was set aside, run the same command again")
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

    Rows follow one another, so that no token is left out but the last, incomplete row's. A row starts at a document start
    where that costs at most a quarter of a row read twice.
    """
    marks = np.flatnonzero(np.asarray(tokens) == bos_id)                       # [documents]
    starts, position, last = [], 0, len(tokens) - seq_len - 1
    while position <= last:
        starts.append(position)
        position += seq_len
        mark = marks[np.searchsorted(marks, position, side="right") - 1]
        if position - seq_len // 4 <= mark:
            position = int(mark)
    return np.array(starts, dtype=np.int64)


def batches(tokens: np.ndarray, bos_id: int, batch_size: int, seq_len: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (inputs, targets), int32 [B, T] each, every row once an epoch in an order that `seed` decides.

    Made on a thread of its own, a few batches ahead. Errors: HarnessError("data") where the shard is too short.
    """
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

    A machine that slept is noticed: its wall clock ran and the monotonic one did not (`suspended_seconds`).
    """

    def __init__(self, text: str):
        match = re.fullmatch(r"([0-9.]+)([kM]?)(s|steps|tokens)", text.strip())
        if not match or not float(match[1]) > 0:
            raise HarnessError("usage", f"budget {text!r}: expected something like 300s, 200steps or 5Mtokens")
        self.text, self.unit = text.strip(), match[3]
        self.amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]]
        self._born, self._started = time.monotonic(), 0.0

    def start(self) -> None:
        """Begin to count, after warm-up. Errors: HarnessError("timeout") where starting took longer than STARTUP_LIMIT."""
        if time.monotonic() - self._born > STARTUP_LIMIT:
            raise HarnessError("timeout", f"{time.monotonic() - self._born:.0f} s passed before training began, the limit is "
                               f"{STARTUP_LIMIT} s; make warm-up shorter")
        self._started, self._wall = time.monotonic(), time.time()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started if self._started else 0.0

    @property
    def suspended_seconds(self) -> float:
        return max(0.0, time.time() - self._wall - self.seconds) if self._started else 0.0

    def progress(self, steps: int, tokens: int) -> float:
        """How much of the budget is used, 0 to 1 and beyond."""
        return {"s": self.seconds, "steps": steps, "tokens": tokens}[self.unit] / self.amount


# ---------------------------------------------------------------------------------------------------------------------
# A run, as its trainer sees it
# ---------------------------------------------------------------------------------------------------------------------

class Run:
    """One training: where its data lies, what it may use, where its results go. Use as `with start_run(__file__) as run:`.

    An exception inside the block becomes error.json, a traceback and an exit code that names the kind of failure.
    """

    def __init__(self, train_file: str):
        self.born = time.monotonic()
        place = os.environ.get("AUTORESEARCH_DATA")
        if not place:
            try:
                place = json.loads((home() / "current.json").read_text())["train_dir"]
            except FileNotFoundError:
                raise SystemExit("no data is prepared: run `python prepare_mlx.py --dataset stories` first") from None
        self.data = Path(place)
        self.meta = json.loads((self.data / "meta.json").read_text())
        self.dir = Path(os.environ.get("AUTORESEARCH_RUN_DIR") or Path("runs", "manual", time.strftime("%Y%m%d-%H%M%S"))).resolve()
        self.dir.mkdir(parents=True, exist_ok=True)
        self.budget = Budget(os.environ.get("AUTORESEARCH_BUDGET") or self.meta["budget"])
        self.seed = int(os.environ.get("AUTORESEARCH_SEED") or 1)
        self.vocab_size, self.seq_len = self.meta["vocab_size"], self.meta["seq_len"]
        self.step = 0
        shutil.copyfile(train_file, self.dir / Path(train_file).name)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        name = error.kind if isinstance(error, HarnessError) else "crash"
        if isinstance(error, MemoryError) or re.search(r"out of memory|[Uu]nable to allocate|maximum allowed buffer", str(error)):
            name = "oom"
        if not isinstance(error, HarnessError):
            import traceback
            traceback.print_exception(error)
        sys.exit(fail(name, str(error) or kind.__name__, self.dir, self.step))

    def tokens(self) -> np.ndarray:
        """The training shard, uint16 or uint32 [n], memory-mapped."""
        return np.memmap(self.data / "train.bin", dtype=self.meta["dtype"], mode="r")

    def batches(self, batch_size: int, seq_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless (inputs, targets), int32 [batch_size, seq_len] each; see `batches`."""
        return batches(self.tokens(), self.meta["bos_id"], batch_size, seq_len, self.seed)

    def log(self, **window) -> None:
        """Append a line to metrics.jsonl: step, tokens, seconds, loss (nats), lr, tokens_per_second, mfu_percent, memory_mb."""
        self.step = window.get("step", self.step)
        with open(self.dir / "metrics.jsonl", "a") as f:
            f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in window.items()}) + "\n")
        if not math.isfinite(window.get("loss", 0.0)):
            raise HarnessError("nan", f"the loss became {window['loss']} at step {self.step}")

    def finish(self, **facts) -> None:
        """Write train.json; unless somebody else scores (AUTORESEARCH_SCORE=0), become the scorer and print the summary."""
        facts |= {"total_seconds": time.monotonic() - self.born, "suspended_seconds": self.budget.suspended_seconds,
                  "budget": self.budget.text, "seed": self.seed, "data": self.data.name}
        write_atomically(self.dir / "train.json", json.dumps(facts, indent=1).encode())
        if os.environ.get("AUTORESEARCH_SCORE") != "0":
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, __file__, "score", str(self.dir)])  # and the trainer's memory is free


def start_run(train_file: str) -> Run:
    """Begin a run from the AUTORESEARCH_* variables (CONTRIBUTING.md lists them), or from what was prepared last."""
    return Run(train_file)


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

def serve(run_dir: Path) -> None:
    """The logits server. One JSON line a request on standard input: {"buffer", "rows"}; one a reply on standard output.

    The first request describes the two buffers, files that both processes map: tokens int32 [rows, seq_len] in,
    logits float32 [rows, seq_len, vocab] out.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the candidate prints goes to the log
    shape = json.loads(sys.stdin.readline())
    rows, seq_len, vocab = shape["rows"], shape["seq_len"], shape["vocab_size"]
    tokens = [np.memmap(p, np.int32, "r", shape=(rows, seq_len)) for p in shape["tokens"]]
    logits = [np.memmap(p, np.float32, "r+", shape=(rows, seq_len, vocab)) for p in shape["logits"]]
    try:
        source = sorted(run_dir.glob("train_*.py"))[0]
        spec = importlib.util.spec_from_file_location("candidate", source)
        module = importlib.util.module_from_spec(spec)
        sys.modules["candidate"] = module
        spec.loader.exec_module(module)
        model = module.load_model(run_dir)
        print(json.dumps({"ready": True}), file=replies)
        for line in sys.stdin:
            i = json.loads(line)["buffer"]
            answer = np.asarray(model(np.array(tokens[i])))                     # [rows, seq_len, vocab]
            if answer.shape != (rows, seq_len, vocab) or answer.dtype.kind != "f":
                raise HarnessError("violation", f"bad_shape: expected floating-point logits {(rows, seq_len, vocab)}, "
                                   f"got {answer.dtype} {answer.shape}")
            logits[i][:] = answer
            print(json.dumps({"done": i}), file=replies)
    except BaseException as error:
        import traceback
        traceback.print_exc()
        kind = error.kind if isinstance(error, HarnessError) else "crash"
        print(json.dumps({"kind": kind, "message": f"{type(error).__name__}: {error}"[:2000]}), file=replies)
        raise SystemExit(1) from None


class LogitsServer:
    """The scorer's end of the server: `ask` sends a batch, `answer` waits for one, first asked, first answered."""

    def __init__(self, run_dir: Path, rows: int, seq_len: int, vocab_size: int, wrap: list[str]):
        self.rows, self.asked, self.answered = rows, 0, 0
        self.exchange = Path(tempfile.mkdtemp(prefix="exchange-", dir=run_dir))
        paths = {k: [str(self.exchange / f"{k}{i}") for i in (0, 1)] for k in ("tokens", "logits")}
        self.tokens = [np.memmap(p, np.int32, "w+", shape=(rows, seq_len)) for p in paths["tokens"]]
        self.logits = [np.memmap(p, np.float32, "w+", shape=(rows, seq_len, vocab_size)) for p in paths["logits"]]
        with open(run_dir / "serve.log", "wb") as log:
            self.process = subprocess.Popen([*wrap, sys.executable, __file__, "serve", str(run_dir)], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        self._send({"rows": rows, "seq_len": seq_len, "vocab_size": vocab_size, **paths})
        self._receive()

    def _send(self, message: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead server says why in its last reply
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _receive(self) -> dict:
        line, deadline, fd = b"", time.monotonic() + ANSWER_LIMIT, self.process.stdout.fileno()
        while not line.endswith(b"\n"):
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise HarnessError("timeout", f"the model gave no logits within {ANSWER_LIMIT} s")
            chunk = os.read(fd, 65536)
            if not chunk:
                raise HarnessError("crash", f"the logits server died (exit code {self.process.wait()}); see serve.log")
            line += chunk
        reply = json.loads(line)
        if "kind" in reply:
            raise HarnessError(reply["kind"] if reply["kind"] == "violation" else "crash", str(reply.get("message")))
        return reply

    def ask(self, batch: np.ndarray) -> None:
        """Send int32 [<= rows, seq_len]; the rest of the buffer repeats its first row, so that the shape never changes."""
        i = self.asked % 2
        self.tokens[i][: len(batch)] = batch
        self.tokens[i][len(batch):] = batch[0]
        self._send({"buffer": i})
        self.asked += 1

    def answer(self) -> np.ndarray:
        """float32 [rows, seq_len, vocab], a shared buffer: valid until the next but one `ask`."""
        self._receive()
        self.answered += 1
        return self.logits[(self.answered - 1) % 2]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.exchange, ignore_errors=True)


def log_probs(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Natural log of the softmax at `ids`: float32 [T, V], int [T, K] -> float64 [T, K].

    Works on a private float64 copy of the logits, a piece at a time: the server can change its buffer, but not a number
    that was taken from one piece. Errors: HarnessError("violation") for a logit that is not finite.
    """
    out = np.empty(ids.shape)
    piece = max(1, (1 << 18) // logits.shape[-1])
    for a in range(0, len(logits), piece):
        x = logits[a : a + piece].astype(np.float64)                            # [piece, V]
        if not np.isfinite(x.sum()):
            raise HarnessError("violation", "non_finite: a logit is NaN or infinite")
        x -= x.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(x, ids[a : a + piece], axis=-1)             # [piece, K]
        np.exp(x, out=x)
        out[a : a + piece] = chosen - np.log(x.sum(axis=-1, keepdims=True))
    return out


def bits_per_byte(ask_rows: Callable, inputs: np.ndarray, targets: np.ndarray, scored: np.ndarray, total_bytes: int) -> float:
    """The score: -log2 p summed over every scored token, over the bytes of the text.

    `ask_rows(items, ids)` yields (item, log_probs [T, K]) for items (row, cut, donor): row `row` of inputs up to `cut`, then
    row `donor`. Rows with a donor are probes, made of the same text and mixed in, so that a model can't tell them apart:
    where the tokens are the same, the probabilities must be.
    """
    rows, seq_len = inputs.shape
    rng = np.random.default_rng()  # other probes every time
    vocab_ids = rng.integers(0, int(inputs.max()) + 1, (rows, seq_len, 3))
    ids = np.concatenate([targets[..., None], vocab_ids], axis=-1)              # [rows, T, 4]: what is compared
    items = [(row, seq_len, row) for row in range(rows)]
    probes = [(int(row), int(rng.integers(1, seq_len + 1)), int(rng.integers(rows))) for row in rng.permutation(rows)[:PROBE_ROWS]]
    probes[: len(probes) // 4] = [(row, seq_len, row) for row, _, _ in probes[: len(probes) // 4]]  # the very same again
    for probe in probes:
        items.insert(int(rng.integers(len(items) + 1)), probe)

    nats = np.full(rows, np.nan)
    first: dict[int, np.ndarray] = {}
    probed = {row for row, _, _ in probes}
    for (row, cut, donor), values in ask_rows(items, ids):
        if math.isnan(nats[row]) and cut == seq_len and donor == row:
            nats[row] = -math.fsum(values[scored[row], 0])
        if row in probed:
            if row in first:
                shared = min(cut, len(first[row]))
                if np.abs(values[:shared] - first[row][:shared]).max() > PROBE_TOLERANCE:
                    raise HarnessError("violation", diagnose(ask_rows, ids, row, min(cut, len(first[row]) ), rows, seq_len))
            else:
                first[row] = values[:cut]
    return math.fsum(nats) / math.log(2) / total_bytes


def diagnose(ask_rows: Callable, ids: np.ndarray, row: int, cut: int, rows: int, seq_len: int) -> str:
    """Name what a failed probe showed, by asking again under control."""
    def once(items: list) -> np.ndarray:
        return next(iter(list(ask_rows(items, ids))))[1]

    def differs(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(np.abs(a - b).max() > PROBE_TOLERANCE)
    donor = (row + rows // 2) % rows if rows > 1 else row
    alone = once([(row, seq_len, row)])
    if differs(alone, once([(row, seq_len, row)])):
        return "stateful: the same tokens, asked twice, got other probabilities"
    cut = min(cut, seq_len - 1)
    if any(differs(alone[:c], once([(row, c, donor)])[:c]) for c in {max(1, cut), seq_len // 2, seq_len - 1}):
        return f"non_causal: probabilities before position {cut} changed with the tokens after it"
    if differs(alone, once([(row, seq_len, row), (donor, seq_len, donor)])):
        return "cross_row: probabilities of a row changed with the other rows of its batch"
    return "stateful: probabilities changed with what was asked before"


def score(run_dir: Path, held: Path | None, split: str, wrap: list[str]) -> dict:
    """Score a run's model on held-out text: every byte once, in document order. Returns the summary. Errors: HarnessError."""
    began = time.monotonic()
    facts = read_facts(run_dir)
    held = held or home() / "held" / str(facts["data"])
    meta = json.loads((held / "meta.json").read_text())
    tokenizer = Tokenizer((held / "tokenizer.model").read_bytes())
    tokens = np.fromfile(held / f"{split}.bin", dtype=meta["dtype"])
    if sha256(tokenizer.decode_bytes(tokens)) != meta[f"{split}_sha256"]:
        raise HarnessError("data", f"{held / f'{split}.bin'} is not the text that was prepared; run prepare_mlx.py again")
    seq_len = meta["seq_len"]
    rows = math.ceil((len(tokens) - 1) / seq_len)
    padded = np.full(rows * seq_len + 1, tokenizer.bos_id, dtype=np.int32)
    padded[: len(tokens)] = tokens
    inputs, targets = padded[:-1].reshape(rows, seq_len), padded[1:].reshape(rows, seq_len)
    scored = tokenizer.token_bytes[targets] > 0                                 # marks and padding have no bytes
    if tokenizer.token_bytes[targets].sum() != meta[f"{split}_bytes"]:
        raise HarnessError("data", f"the bytes of {split}'s tokens do not add up to {meta[f'{split}_bytes']:,}")
    in_batch = max(1, min(rows, 256, EVAL_BUFFER_BYTES // (4 * seq_len * tokenizer.vocab_size)))
    server = LogitsServer(run_dir, in_batch, seq_len, tokenizer.vocab_size, wrap)
    threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count())             # NumPy lets go of the interpreter lock

    def ask_rows(items: list, ids: np.ndarray) -> Iterator:
        groups = [items[a : a + in_batch] for a in range(0, len(items), in_batch)]
        for k in range(len(groups) + 1):
            if k < len(groups):  # the next batch is computed while this one is summed
                server.ask(np.stack([np.concatenate([inputs[r, :cut], inputs[d, cut:]]) for r, cut, d in groups[k]]))
            if k:
                logits = server.answer()
                sums = threads.map(log_probs, logits[: len(groups[k - 1])], [ids[r] for r, _, _ in groups[k - 1]])
                yield from zip(groups[k - 1], sums, strict=True)

    try:
        bpb = bits_per_byte(ask_rows, inputs, targets, scored, meta[f"{split}_bytes"])
    finally:
        server.close()
        threads.shutdown()
    if not math.isfinite(bpb):
        raise HarnessError("violation", f"non_finite: the score is {bpb}")
    return {f"{split}_bpb": f"{bpb:.6f}", "training_seconds": f"{facts['training_seconds']:.1f}",
            "total_seconds": f"{facts['total_seconds'] + time.monotonic() - began:.1f}",
            "peak_vram_mb": f"{facts['peak_vram_mb']:.1f}", "mfu_percent": f"{facts['mfu_percent']:.2f}",
            "total_tokens_M": f"{facts['total_tokens'] / 1e6:.3f}", "num_steps": facts["num_steps"],
            "num_params_M": f"{facts['num_params'] / 1e6:.3f}", "depth": facts["depth"],
            f"{split}_bytes": meta[f"{split}_bytes"], f"{split}_sha256": meta[f"{split}_sha256"][:16],
            "data_hash": meta["data_hash"], "tokenizer_hash": meta["tokenizer_hash"], "seq_len": seq_len,
            "budget": facts["budget"], "device": facts["device"], "seed": facts["seed"],
            "suspended_seconds": f"{facts['suspended_seconds']:.1f}"}


def read_facts(run_dir: Path) -> dict:
    """train.json, checked: the trainer wrote it, so a number must be a finite number and a word one short word."""
    try:
        facts = json.loads((run_dir / "train.json").read_text())
    except (OSError, ValueError) as error:
        raise HarnessError("crash", f"{run_dir}: expected a train.json from a finished training, got {error}") from error
    for key in ("training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens", "num_steps", "num_params",
                "depth", "seed", "suspended_seconds"):
        value = facts.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise HarnessError("violation", f"train.json: expected a finite number for {key}, got {value!r}")
    for key in ("budget", "device", "data"):
        if not re.fullmatch(r"[\w.()+ -]{1,64}", str(facts.get(key))):
            raise HarnessError("violation", f"train.json: expected a short name for {key}, got {facts.get(key)!r}")
    return facts


def print_summary(summary: dict) -> None:
    print("---")
    for key, value in summary.items():
        print(f"{key + ':':<21} {value}" if len(key) > 17 else f"{key + ':':<18}{value}")


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
    parser.add_argument("--json", type=Path, help="write what was prepared to this file")
    parser.add_argument("--list", action="store_true", help="list datasets with source and licence, and presets")
    commands = parser.add_subparsers(dest="command", metavar="score | serve")
    for name, text in (("score", "val_bpb of a trained model"), ("serve", "the logits server; `score` starts it")):
        command = commands.add_parser(name, help=text)
        command.add_argument("run_dir", type=Path)
        if name == "score":
            command.add_argument("--split", choices=("val", "test"), default="val")
            command.add_argument("--held", type=Path, help="directory of the held-out shards (default: the run's own dataset)")
            command.add_argument("--wrap", default="[]", help="JSON list: a command to start the logits server under, a sandbox")
    args = parser.parse_args()
    try:
        if args.command == "serve":
            serve(args.run_dir.resolve())
        elif args.command == "score":
            print_summary(score(args.run_dir.resolve(), args.held, args.split, json.loads(args.wrap)))
        elif args.list:
            from corpus import DATASETS
            for name, (licence, source, _) in DATASETS.items():
                print(f"{name:<12} {source:<34} {licence}")
            for name, preset in PRESETS.items():
                print(f"preset {name:<8} {preset}{'   <- this machine' if name == detect_preset() else ''}")
        else:
            preset = args.preset or detect_preset()
            dataset = args.dataset or ("stories" if preset in ("tiny", "demo", "cpu") else "tinystories")
            entry = prepare(dataset, preset, vocab_size=args.vocab_size, field=args.field, shards=args.shards)
            if args.json:
                write_atomically(args.json, json.dumps(entry, indent=1).encode())
            print(f"ready: {entry['id']}  vocabulary {entry['vocab_size']:,}, {entry['seq_len']} tokens of context, "
                  f"budget {entry['budget']}, data {entry['data_hash']}")
    except HarnessError as error:
        if args.command:
            return fail(error.kind, str(error), args.run_dir)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
