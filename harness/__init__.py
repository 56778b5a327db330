"""
The harness: data, clock and score. A night freezes this folder together with prepare_mlx.py; no experiment may change either.

    machine                 presets, device, fast BLAS, tier, peak FLOP/s, what fits in memory
    clock                   Budget, the machine's speed, expected epochs
    run                     batches, a training run as its train file sees it, progress
    server, score, probes   the logits server, the score computed from its logits, and the checks that the model does not cheat
    screen                  held-out text in a train file
    tokenizer               text to token ids and back
    files                   the user's files to documents; overlap finds copies, whatever their line ends and wrapping
    corpus                  documents to token shards; files, stories and download supply the documents

Importing a module of this folder needs NumPy and no other package, so that a machine with PyTorch needs no MLX. The one exception
is mlx_cpu: it imports MLX, and only train_mlx.py imports it. This module has what all others share: errors, and reading and writing
files.
"""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import stat
import sys
import time
from pathlib import Path
from typing import ClassVar

if importlib.util.find_spec("numpy") is None:
    sys.exit(f"error: {sys.executable} has none of the project's packages; first: source .venv/bin/activate (make demo or uv sync "
             "makes .venv)")

TRAIN_FILES = "train_*.py"  # names of train files: the logits server finds the one in a run directory by this pattern
PROGRAM = Path(__file__).resolve().parent.parent / "prepare_mlx.py"  # the command line, started again to score and to serve


class HarnessError(Exception):
    """A failure with a name. `kind` is the name that the driver reads; `exit_code` is the exit code of a process that fails so."""
    exit_codes: ClassVar = {"crash": 1, "usage": 2, "data": 2, "nan": 3, "oom": 4, "timeout": 5, "violation": 6}

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)  # both arguments, so that a worker process can pickle the error
        self.kind, self.exit_code = kind, self.exit_codes.get(kind, 1)

    def __str__(self) -> str:
        return self.args[1]


def kind_of(error: BaseException) -> str:
    """Name a failure: a HarnessError's own kind, "oom" if the message of a framework says that memory ran out, or "crash".
    A file beyond the process's size limit is a "violation"."""
    if isinstance(error, HarnessError):
        return error.kind
    if getattr(error, "errno", None) == errno.EFBIG:  # beyond server.SERVER_FILE_BYTES
        return "violation"
    words = r"out of memory|OutOfMemory|[Uu]nable to allocate|can.t allocate memory|maximum allowed buffer" \
            r"|not enough memory|STATUS_ALLOC_FAILED|Invalid buffer size"  # PyTorch on a CPU, cuBLAS and cuDNN, Metal
    return "oom" if isinstance(error, MemoryError) or re.search(words, str(error)) else "crash"


def fail(kind: str, message: str, run_dir: Path | None = None, step: int | None = None) -> int:
    """Record a failure as a JSON line on standard error and, if there is a run directory, in its error.json. Returns the exit
    code."""
    record = json.dumps({"kind": kind, "message": message[:2000], "step": step})
    if run_dir:
        with contextlib.suppress(OSError):
            write_atomically(run_dir / "error.json", record.encode())
    print(record, file=sys.stderr)
    return HarnessError(kind, message).exit_code


def home() -> Path:
    """The folder of all prepared data: $AUTORESEARCH_HOME or ~/.cache/autoresearch-mlx."""
    return Path(os.environ.get("AUTORESEARCH_HOME") or Path.home() / ".cache" / "autoresearch-mlx")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file beside `path`, then rename it: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    for left in range(20, -1, -1):
        try:
            os.replace(temporary, path)
            break
        except PermissionError:  # Windows replaces no file that somebody reads at this moment
            if sys.platform != "win32" or not left:
                raise
            time.sleep(0.05)


def open_plain(path: Path) -> int:
    """Open a file for reading that a candidate may have made. Returns the descriptor. Links are not followed, pipes and devices not
    waited for. Errors: OSError if it is not a plain file."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "expected a plain file", str(path))
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))  # each is missing somewhere
    descriptor = os.open(path, sum(flags, os.O_RDONLY))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "expected a plain file", str(path))
    return descriptor


def sha256(data: bytes) -> str:
    """The SHA-256 digest of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
