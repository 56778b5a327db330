"""
The logits server: a process that imports the candidate and answers the scorer's batches. And its client in the scorer.

Requests and replies are JSON lines through pipes. Tokens and logits are in files that both processes map into memory. These
files have no names; on Windows, where a child inherits no descriptors and there is no sandbox, they are two files in the
server's folder.
"""

import contextlib
import ctypes
import importlib.util
import json
import math
import mmap
import os
import platform
import queue
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np

from harness import PROGRAM, TRAIN_FILES, HarnessError, kind_of, open_plain
from harness.machine import measured_dtypes

ANSWER_LIMIT = 300              # seconds the server may take for one batch
LOAD_LIMIT = 120.0              # seconds from the server's start until its model is loaded, unless the caller sets a tighter limit
COPY_BYTES, COPY_FILES, COPY_DEPTH = 20 << 30, 10_000, 8  # largest run directory that is copied
HOLE = bytes(1 << 20)           # a part of a file that takes no space
# Linux system calls through which processes can pass messages by keyrings or the page cache. No model needs them. For each
# architecture: the kernel's number for it, then add_key, request_key, keyctl, mincore, cachestat, preadv2, io_uring_setup
DENIED_CALLS = {"x86_64": (0xC000003E, 248, 249, 250, 27, 451, 327, 425),
                "aarch64": (0xC00000B7, 217, 218, 219, 232, 451, 286, 425)}
SERVER_FILE_BYTES = 256 << 20   # size limit of every file that the server writes, including its log
DATA_VARIABLES = {f"AUTORESEARCH_{name}" for name in ("HOME", "DATA", "RUN_DIR", "JOURNAL")}  # lead to text or weights
SERVER_LOG_BYTES = 1 << 20      # how much of the end of the log is kept
REPLY_BYTES = 1 << 16           # longest line that a server may send
WINDOWS = sys.platform == "win32"
# What Metal says when it ends work in favour of other programs; then the process aborts. agent/trial/failures.py has it, too
WATCHDOG = re.compile(rb"Impacting Interactivity|GPU Timeout Error|Innocent ?Victim|SubmissionsIgnored", re.I)


def shared(descriptor: int, dtype: type, shape: list[int], access: int = mmap.ACCESS_WRITE) -> np.ndarray:
    """Map a file that two processes have open as an array. Except on Windows the file has no name, so that no third process
    finds it and nothing is left behind."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if os.fstat(descriptor).st_size != size:  # only the scorer resizes: a sandbox may refuse it to the server
        os.ftruncate(descriptor, size)
    return np.frombuffer(mmap.mmap(descriptor, 0, access=access), dtype).reshape(shape)


def exchange(name: str) -> BinaryIO:
    """A new file for `shared`: without a name where a child can inherit its descriptor, else with this name."""
    if WINDOWS:
        return open(name, "w+b")
    return os.fdopen(os.memfd_create("exchange"), "r+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def deny_calls() -> None:
    """Make the kernel refuse DENIED_CALLS to this process and its children from now on (seccomp). Does nothing on other systems
    than Linux, and if the kernel lacks such filters."""
    if sys.platform != "linux" or platform.machine() not in DENIED_CALLS:
        return
    architecture, *calls = DENIED_CALLS[platform.machine()]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06                         # opcodes of a filter: BPF_LD, _JEQ, _JGE, _RET
    allowed, refused = 0x7FFF0000, 0x00050000 | 38                              # SECCOMP_RET_ALLOW, _ERRNO with ENOSYS
    end_at = len(calls) + 5                                                     # a jump counts the instructions in between
    program = [(load, 0, 0, 4), (equal, 0, end_at - 2, architecture), (load, 0, 0, 0), (at_least, end_at - 4, 0, 0x40000000)]
    program += [(equal, end_at - 5 - i, 0, call) for i, call in enumerate(calls)]
    program += [(end, 0, 0, allowed), (end, 0, 0, refused)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    libc = ctypes.CDLL(None)
    libc.prctl(38, 1, 0, 0, 0)                                                  # PR_SET_NO_NEW_PRIVS
    libc.prctl(22, 2, ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code))))  # PR_SET_SECCOMP


def serve(run_dir: Path) -> None:
    """Run the logits server on standard input and output. Only this process imports the candidate.

    The first line in names `shape` [rows, seq_len, vocab] and two descriptors, or paths: `tokens`, int32 [2, rows, seq_len], and
    `logits`, float32 [2, rows, seq_len, vocab]. The reply {"done": null} follows once the model is loaded. After that each line
    {"buffer": 0 or 1} is answered by {"done": the same}. A failure is answered by {"kind", "message"} and ends the process.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the candidate's prints go to the log, whose size is limited
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (SERVER_FILE_BYTES, SERVER_FILE_BYTES))
    deny_calls()
    first = json.loads(sys.stdin.readline())
    for name in ("tokens", "logits"):
        if isinstance(first[name], str):
            first[name] = os.open(first[name], os.O_RDWR | getattr(os, "O_BINARY", 0))
    tokens = shared(first["tokens"], np.int32, [2, *first["shape"][:2]], mmap.ACCESS_READ)
    logits = shared(first["logits"], np.float32, [2, *first["shape"]])
    try:
        spec = importlib.util.spec_from_file_location("candidate", sorted(run_dir.glob(TRAIN_FILES))[0])
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
        try:  # the log first: the scorer kills this process once it has the reply
            sys.stdout.flush()
            sys.excepthook(*sys.exc_info())
        finally:
            print(json.dumps({"kind": kind_of(error), "message": f"{type(error).__name__}: {error}"[:2000]}), file=replies)
            os._exit(1)


def copy_run(run_dir: Path, target: Path) -> None:
    """Copy the plain files of a run directory. A candidate wrote it, so links, pipes and devices are left out.

    Errors: HarnessError("violation") for more than COPY_BYTES bytes, COPY_FILES files, or folders nested deeper than COPY_DEPTH.
    """
    left, names, stack = COPY_BYTES, COPY_FILES, [(run_dir, target, 0)]
    while stack:
        source, place, depth = stack.pop()
        place.mkdir(mode=0o700)
        with os.scandir(source) as entries:
            for entry in entries:
                names -= 1
                size = entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
                left -= size
                folder = entry.is_dir(follow_symlinks=False)
                if names < 0 or left < 0 or (folder and depth == COPY_DEPTH):
                    raise HarnessError("violation", f"the run directory is too large to be scored: expected at most {COPY_FILES:,} "
                                       f"files, {COPY_BYTES >> 30} GiB and folders nested {COPY_DEPTH} deep")
                if folder:
                    stack.append((Path(entry.path), place / entry.name, depth + 1))
                elif entry.is_file(follow_symlinks=False):
                    with os.fdopen(open_plain(Path(entry.path)), "rb") as read, open(place / entry.name, "wb") as write:
                        while chunk := read.read(len(HOLE)):
                            if chunk != HOLE:
                                write.write(chunk)
                            else:  # a hole stays one: a sparse file could fill the disk and take minutes
                                write.seek(len(chunk), os.SEEK_CUR)
                        write.truncate()


def end_group(process: subprocess.Popen) -> None:
    """Kill a child that leads its own process group, with the whole group, and reap the child. The child may have ended before.
    Windows has no such groups: there the child's descendants are killed one by one."""
    if not hasattr(os, "killpg"):
        import psutil
        with contextlib.suppress(psutil.Error):
            for member in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    member.kill()
        process.kill()
        process.wait()
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:  # macOS: EPERM also for a group that holds only zombies
        process.kill()  # does nothing to a zombie; a child that may not be killed raises PermissionError again
    process.wait()


class LogitsServer:
    """The client of a logits server: `ask` sends a batch, `answer` waits for the logits. Answers come in the order of the requests.

    run_dir: holds the candidate. shape: [rows, seq_len, vocab] of a batch. wrap: command to start the server under, a sandbox.
    log: receives the end of the server's log on `close`. scratch: the server's only folder, emptied first; default: a new one.
    load_limit: seconds from the start until the model is loaded. `load_seconds` is how long that took, by this process's clock.

    The server gets a copy of the run directory (scratch/run) and a TMPDIR (scratch/tmp). Both and the log's nameless file are new
    for each server: under `wrap`, no server finds what another left, and none can tell by the kernel's cache of files which pages
    of the copy another one has read.
    """

    def __init__(self, run_dir: Path, shape: list[int], wrap: list[str], log: bytearray, scratch: Path | None = None,
                 load_limit: float = LOAD_LIMIT):
        self.asked, self.answered, self._kept = 0, 0, log
        self._limit, self.load_seconds = load_limit, 0.0
        self._log, self._scratch = tempfile.TemporaryFile(), scratch or Path(tempfile.mkdtemp())  # noqa: SIM115
        shutil.rmtree(self._scratch, ignore_errors=True)
        (temporary := self._scratch / "tmp").mkdir(mode=0o700, parents=True)
        copy_run(run_dir, self._scratch / "run")
        with contextlib.ExitStack() as stack:
            names = [str(self._scratch / name) for name in ("tokens", "logits")]
            token_file, logit_file = (stack.enter_context(exchange(name)).fileno() for name in names)
            self.tokens = shared(token_file, np.int32, [2, *shape[:2]])
            self.logits = shared(logit_file, np.float32, [2, *shape])
            env = {k: v for k, v in os.environ.items() if k not in DATA_VARIABLES}
            self.process = subprocess.Popen(
                [*wrap, sys.executable, "-B", str(PROGRAM), "serve", str(self._scratch / "run")], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=self._log, bufsize=0, start_new_session=True,
                pass_fds=() if WINDOWS else (token_file, logit_file),
                env={**env, "AUTORESEARCH_DTYPES": measured_dtypes(), **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))})
        self._started, self._closed = time.monotonic(), False
        self._replies: queue.Queue[bytes] = queue.Queue(maxsize=2)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._send({"shape": shape, "tokens": names[0] if WINDOWS else token_file, "logits": names[1] if WINDOWS else logit_file})

    def _send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # a dead server has left its reason in its last reply
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        """Put the server's lines into the queue, and b"" at its end. In a thread: Windows can't wait for a pipe."""
        descriptor, unread = self.process.stdout.fileno(), b""
        with contextlib.suppress(OSError):  # closed meanwhile
            while not self._closed and (chunk := os.read(descriptor, REPLY_BYTES)):
                *lines, unread = (unread + chunk).split(b"\n")
                if len(unread) > REPLY_BYTES:
                    lines, unread = [*lines, unread], b""
                for line in lines:
                    self._replies.put(line + b"\n")
        self._replies.put(b"")

    def _receive(self, expected: int | None) -> None:
        loading = expected is None
        deadline = self._started + self._limit if loading else time.monotonic() + ANSWER_LIMIT
        try:
            line = self._replies.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise HarnessError("timeout", f"importing the train file and load_model took more than {self._limit:.1f} s; train "
                               "in the budget, and only read weights in load_model" if loading else
                               f"the model gave no logits within {ANSWER_LIMIT} s") from None
        if not line:
            self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
            words = self._log.read()  # Metal aborts the process, its message is the only sign
            kind, found = "oom" if b"OutOfMemory" in words else "crash", WATCHDOG.search(words)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that closed its output may live on
                self.process.wait(5)
            cause = f"exit code {self.process.poll()}{f', {found[0].decode()}' if found else ''}"
            raise HarnessError(kind, f"the logits server died ({cause}); see serve.log")
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
        """Send a batch, int32 [at most rows, seq_len]. A smaller batch is filled up with copies of its first row, so that the
        model always sees the same shape. Errors: those of `answer`, if the model could not be loaded."""
        if not self.asked:
            self._receive(None)  # the reply that the model is loaded
            self.load_seconds = time.monotonic() - self._started
        i = self.asked % 2
        self.tokens[i][: len(batch)] = batch
        self.tokens[i][len(batch):] = batch[0]
        self._send({"buffer": i})
        self.asked += 1

    def answer(self) -> np.ndarray:
        """Wait for the logits of the oldest batch without an answer: float32 [rows, seq_len, vocab], a shared buffer that the
        next `ask` but one overwrites.

        Errors: HarnessError("crash", "oom", "violation") as the server failed, ("timeout") after ANSWER_LIMIT seconds.
        """
        i = self.answered % 2
        self._receive(i)
        self.answered += 1
        return self.logits[i]

    def close(self) -> None:
        """Kill the server with all its children and keep the end of its log."""
        end_group(self.process)
        self._closed = True
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - SERVER_LOG_BYTES))
        self._kept += self._log.read()
        self._log.close()
        del self.tokens, self.logits  # Windows removes no file that is mapped
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._reader.join(1)  # it reads to the end, unless somebody who left the group holds the pipe
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
