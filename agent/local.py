"""A coding agent that thinks on this machine: starts mlx-lm's server, asks it through `agent/chat/edit.py`, and ends it.

    python -m agent.local TRAIN_FILE [--model M] < prompt
    python -m agent.local                                    which models this machine can run, and what downloads them

The server is gone before this program ends, so that all memory is the trainer's. Each proposal starts a server of its own: one that
dies costs one experiment, and one that is alive and silent is started again, once. Nothing is ever downloaded here: a model that
isn't on the machine is an error with its size and the command that fetches it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from agent.chat.edit import answer_prompt, check, edit
from agent.chat.endpoint import Answer, ChatError, Endpoint
from agent.coders.coder import Reply
from agent.files import GIB
from agent.process import child
from agent.text import one_line, redact

HUB = "https://huggingface.co"
HEALTH_SECONDS = 1.0  # between two looks at the server
SILENT_SECONDS = 180.0  # a server that sends nothing for so long hangs: it tells each 2,048 tokens of the prompt that it has read
# Small edits need little thought, and its tokens come out of the same reply. Templates without the switch ignore it.
TEMPLATE = json.dumps({"enable_thinking": False})


@dataclass(frozen=True)
class LocalModel:
    repo: str
    download_gb: float
    memory_gb: int  # of a machine that runs it with a 30,000-token prompt beside the system itself


# From the models' cards, November 2026. Not tried: that takes a Mac with the memory for them. `--check` tries the one you have.
KNOWN = (
    LocalModel("mlx-community/Qwen3.5-35B-A3B-OptiQ-4bit", 20.1, 48),
    LocalModel("mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit", 17.2, 32),
    LocalModel("mlx-community/Qwen3.5-9B-OptiQ-4bit", 5.6, 16),
    LocalModel("mlx-community/Qwen3.5-4B-OptiQ-4bit", 2.8, 8),
)


def default_model(memory_bytes: int) -> LocalModel:
    """The largest 4-bit model of the table that fits a machine with so much memory. Raises ChatError where none does."""
    if fits := _fitting(memory_bytes):
        return fits
    has, least = round(memory_bytes / GIB), KNOWN[-1]
    raise ChatError("missing", f"this machine has {has} GB of memory, {least.repo} needs {least.memory_gb}; use another agent")


def _fitting(memory_bytes: int) -> LocalModel | None:
    return next((known for known in KNOWN if round(memory_bytes / GIB) >= known.memory_gb), None)


def models_for(memory_bytes: int, environ: Mapping[str, str]) -> str:
    """The table as text: each model's size and need, the one for this machine, and which are here."""
    default = _fitting(memory_bytes)
    lines = [f"This machine has {round(memory_bytes / GIB)} GB of memory. Models for --agent local, from their cards, untried:"]
    for known in reversed(KNOWN):
        try:
            there = f"is on this machine: {find_model(known.repo, environ)}"
        except ChatError as error:
            there = str(error).removeprefix(f"{known.repo} ")
        lines += [f"{known.repo}{'  <- the default' if known == default else ''}",
                  f"    for {known.memory_gb} GB of memory or more; {there}"]
    return "\n".join(lines)


def machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def find_model(name: str, environ: Mapping[str, str]) -> Path:
    """The directory of a model that is on this machine: a path, or a repository in the Hugging Face cache.

    Raises ChatError with its size and the command that downloads it."""
    as_path = Path(name).expanduser()
    if as_path.is_dir():
        if problem := incomplete(as_path):
            raise ChatError("missing", f"{as_path} is not a complete model: {problem}")
        return as_path.resolve()
    if name.count("/") != 1 or name.startswith((".", "~")):
        raise ChatError("missing", f"expected a folder or a name such as {KNOWN[-1].repo}, got {name!r}: there is no such folder")
    folder = cache_folder(environ) / f"models--{name.replace('/', '--')}"
    fetch = f"hf download {name}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        raise ChatError("missing", f"{name} is not on this machine ({size_text(name, environ)}); download it: {fetch}") from None
    if problem := incomplete(snapshot):
        raise ChatError("missing", f"{name} is only partly on this machine ({problem}); finish the download: {fetch}")
    return snapshot


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where Hugging Face's tools keep models, by their own rules."""
    if "HF_HUB_CACHE" in environ:
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environ.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "tokenizer.py")


def incomplete(folder: Path) -> str | None:
    """What a model's directory lacks, or None: files, the ends of files, the targets of links."""
    wanted = {"config.json"}
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(index):
        try:
            wanted |= {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return f"{index.name} can't be read"
    weights = {path.name for path in folder.glob("*.safetensors")}
    if not weights and not wanted - {"config.json"}:
        other = "; a GGUF model runs in llama.cpp or LM Studio: use --agent chat" if any(folder.glob("*.gguf")) else ""
        return f"no *.safetensors{other}"
    tokenizer = [name for name in TOKENIZERS if os.path.lexists(folder / name)]
    problems = [] if tokenizer else ["no tokenizer.json"]
    for name in sorted(wanted | weights | set(tokenizer)):
        if problem := _broken(folder / name):
            problems.append(problem)
    if not problems:
        return None
    return problems[0] + (f" and {len(problems) - 1} more files" if len(problems) > 1 else "")


def _broken(path: Path) -> str | None:
    """Why a file of a model isn't whole, or None."""
    try:
        size = path.stat().st_size
    except OSError:
        return f"{path.name} is a link to nothing" if path.is_symlink() else f"no {path.name}"
    if size == 0:
        return f"{path.name} is empty"
    try:
        with path.open("rb") as file:
            if path.suffix == ".json":
                json.loads(file.read())
            elif path.suffix == ".safetensors":
                length = int.from_bytes(file.read(8), "little")
                if length > size:
                    return f"{path.name} has {size:,} bytes, and not even its header"
                tensors = json.loads(file.read(length))
                ends = [part["data_offsets"][1] for name, part in tensors.items() if name != "__metadata__"]
                if size < (whole := 8 + length + max(ends, default=0)):
                    return f"{path.name} has {size:,} of {whole:,} bytes"
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        return f"{path.name} can't be read: {one_line(str(error), 100)}"
    return None


def require_memory(folder: Path, memory_bytes: int) -> None:
    """ChatError for weights that this machine's memory can't hold: it would swap until the night is over."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size > 0.85 * memory_bytes:
        raise ChatError(
            "missing", f"the weights take {size / 1e9:.1f} GB, this machine has {memory_bytes / 1e9:.1f}; take a smaller model"
        )  # fmt: skip


def size_text(name: str, environ: Mapping[str, str]) -> str:
    """How large the download is: from the table, else as the hub says; nothing but that is asked of it."""
    if known := next((known for known in KNOWN if known.repo == name), None):
        return f"{known.download_gb:g} GB"
    hub = environ.get("HF_ENDPOINT", HUB).rstrip("/")
    try:
        with urllib.request.urlopen(f"{hub}/api/models/{name}?blobs=true", timeout=5) as response:
            size = sum(file.get("size") or 0 for file in json.load(response)["siblings"])
        return f"{size / 1e9:.1f} GB"
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return "size unknown: the hub could not be asked"


class Server:
    """mlx-lm's server with one model, for as long as the `with` block lasts.

    It is a child of `agent/process/child.py`, run in a thread: its family ends with the block, and with this process however that
    ends. One whose model can't be loaded, or that answers nothing any more, is ended; `failure` then says why."""

    def __init__(self, model: Path, silence: float, **options: Any) -> None:
        self.model, self.silence = model, silence
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.endpoint = Endpoint(f"http://127.0.0.1:{self.port}/v1", silence=silence, **options)
        self.answered = False
        self.outcome: child.Outcome | None = None
        self.said = ""
        self._ready, self._stop = threading.Event(), threading.Event()
        self._began = self._heard = time.monotonic()
        self._next, self._refused = 0.0, 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.outcome is not None:
            print(f"mlx-lm's server has ended; its memory, at most {self.outcome.peak_rss_mb:.0f} MB, is free", file=sys.stderr)
            if self.outcome.reason != "stopped":
                print(self.said, file=sys.stderr)

    def _run(self) -> None:
        words = ["--model", str(self.model), "--host", "127.0.0.1", "--port", str(self.port), "--chat-template-args", TEMPLATE]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        try:
            with tempfile.TemporaryDirectory(prefix="autoresearch-local-") as folder:
                self.outcome = child.run(
                    [sys.executable, "-m", "mlx_lm", "server", *words], cwd=Path(folder), env=env, log=Path(folder) / "server.log",
                    bounds=child.Bounds(wall_seconds=86400.0), stop=self._stop.is_set, watch=self._watch,
                )  # fmt: skip
                self.said = self.outcome.tail(4000)
        except OSError as error:
            self.said = f"{type(error).__name__}: {error}"

    def _watch(self) -> str | None:
        """Why the server is to be ended, None while all is well. Asked by its spawner, several times a second."""
        now = time.monotonic()
        if now < self._next:
            return None
        status = self._health()
        if status == 200:
            self._heard = now
            self._ready.set()
        self._refused = self._refused + 1 if status == 503 else 0
        self._next = now + (HEALTH_SECONDS if self._ready.is_set() or self._refused else 0.2)
        if self._refused >= 2:  # its loading thread is dead, and it will say so for ever
            return "unhealthy"
        return "silent" if self._ready.is_set() and now - self._heard > self.silence else None

    def _health(self) -> int | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def wait_ready(self, seconds: float) -> float:
        """Seconds until the server listens; its model may still load. Raises ChatError."""
        while not self._ready.wait(0.05):
            if not self._thread.is_alive():
                raise self.failure()
            if time.monotonic() - self._began > seconds:
                raise ChatError("agent_error", f"mlx-lm's server did not listen after {seconds:g} s; raise --start-seconds")
        return time.monotonic() - self._began

    def ask(self, messages: list[dict[str, str]]) -> Answer:
        """An answer of the model. Raises ChatError, with the server's own fate where that is the cause."""
        try:
            answer = self.endpoint.ask("default_model", messages)
        except ChatError as error:
            self._thread.join(2 * HEALTH_SECONDS + child.GRACE_SECONDS)
            if self._thread.is_alive():
                raise
            raise self.failure() from error
        self.answered = True
        return answer

    def failure(self) -> ChatError:
        """Why the server has ended by itself, or was ended."""
        outcome, cause = self.outcome, _cause(self.said)
        if outcome is None or outcome.reason == "missing":
            return ChatError("agent_error", f"mlx-lm's server could not be started: {cause}")
        if outcome.reason == "silent":
            return ChatError("agent_error", f"mlx-lm's server answered nothing for {self.silence:g} s and was ended: {cause}")
        ending = f"exit code {outcome.exit_code}" if outcome.signal is None else child.signal_name(outcome.signal)
        when = "while it answered" if self.answered or self._ready.is_set() else "before it listened"
        if outcome.reason == "unhealthy" and not self.answered:
            memory = re.search(r"memory|metal|allocate", cause, re.I)
            return ChatError("agent_error" if memory else "missing", f"{self.model} can't be loaded: {cause}")
        if outcome.signal == signal.SIGKILL:
            ending += " (out of memory, or ended by hand)"
        return ChatError("agent_error", f"mlx-lm's server ended with {ending} {when}: {cause}")


def _cause(said: str) -> str:
    """The line of a server's output that names its failure."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and " - INFO - " not in line and "deprecated" not in line]
    named = [line for line in lines if re.match(r"(?:[\w.]+(?:Error|Exception|Interrupt)\b|\[METAL\]|libc\+\+abi)", line)]
    died = [line.partition("thread died: ")[2] for line in lines if "thread died: " in line]
    return one_line(redact((named or died or lines or ["it printed no error"])[-1]), 300)


def raise_exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("train_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--model", help="A folder or a Hugging Face name. Default: the largest model of a short list that fits this machine.")
@click.option("--timeout", type=POSITIVE, default=600, show_default=True,
              help="Timeout per reply, in seconds, with the time to load the model.")
@click.option("--silence", type=POSITIVE, default=SILENT_SECONDS, show_default=True,
              help="Seconds without an answer after which the server is restarted, once. With --check, the check fails instead.")
@click.option("--start-seconds", type=POSITIVE, default=120, show_default=True,
              help="Timeout for the start of the server, in seconds, without the loading of the model.")
@click.option("--max-tokens", type=click.IntRange(1), default=8192, show_default=True, help="Maximum tokens per reply.")
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True,
              help="Sampling temperature; 0 always gives the same reply.")
@click.option("--check", "only_check", is_flag=True,
              help="Edit nothing: ask for one word with a prompt as long as a night's, and tell how long a proposal takes.")
def main(train_file: Path | None, model: str | None, start_seconds: float, only_check: bool, **options: float) -> None:
    """Edit TRAIN_FILE as the prompt on standard input asks, with a model on this machine. Without TRAIN_FILE: list models for it.

    Exit codes: 0 edited, 1 no usable edit, 2 usage, 5 the model, mlx-lm or the openai package is missing."""
    if train_file is None:
        print(models_for(machine_memory(), os.environ))
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, raise_exit)  # so that the server is ended on the way out
    answer_prompt(lambda prompt: propose(train_file, prompt, model, start_seconds, only_check, **options))


def propose(
    train_file: Path, prompt: str, model: str | None, start_seconds: float, only_check: bool, **options: Any
) -> Reply:  # fmt: skip
    """One edit, or one check. options: those of `Server`. Raises ChatError where the server can't be started."""
    if importlib.util.find_spec("mlx_lm") is None:
        raise ChatError("missing", "mlx-lm is not installed; install it: python -m pip install mlx-lm")
    name = model or default_model(machine_memory()).repo
    folder = find_model(name, os.environ)
    require_memory(folder, machine_memory())
    print(f"local model: {name}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(folder, **options))]
        started = servers[0].wait_ready(start_seconds)

        def ask(messages: list[dict[str, str]]) -> Answer:
            try:
                return servers[-1].ask(messages)
            except ChatError as error:
                if only_check or not error.silent or len(servers) > 1:
                    raise
                print(f"{error}\nmlx-lm's server is started again", file=sys.stderr)
            stack.close()
            servers.append(stack.enter_context(Server(folder, **options)))
            servers[-1].wait_ready(start_seconds)
            return servers[-1].ask(messages)

        return check(ask, prompt, train_file, started) if only_check else edit(ask, prompt, train_file)


if __name__ == "__main__":
    main()
