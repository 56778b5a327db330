"""A coding agent that thinks on this machine: starts `mlx_lm.server`, asks it through `agent/chat/edit.py`, and stops it.

    python -m agent.local TRAIN_FILE [--model M] < prompt

The server is gone before this program ends, so that all memory is the trainer's. Nothing is ever downloaded here: a model that
isn't on the machine is an error with its size and the command that fetches it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from agent.chat.edit import edit, finish
from agent.chat.endpoint import ChatError, Endpoint
from agent.coders.coder import Reply
from agent.files import GIB
from agent.process.supervise import signal_group

GRACE_SECONDS = 3.0  # between TERM and KILL
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class LocalModel:
    repo: str
    download_gb: float
    memory_gb: int  # of a machine that runs it with a 30,000-token prompt beside the system itself


KNOWN = (
    LocalModel("mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit", 17.2, 32),
    LocalModel("mlx-community/Qwen2.5-Coder-14B-Instruct-4bit", 8.3, 24),
    LocalModel("mlx-community/Qwen2.5-Coder-7B-Instruct-4bit", 4.3, 16),
    LocalModel("mlx-community/Qwen2.5-Coder-3B-Instruct-4bit", 1.7, 8),
)


def default_model(memory_bytes: int) -> LocalModel:
    """The largest 4-bit coder that fits a machine with so much memory. Raises ChatError where none does."""
    memory_gb = round(memory_bytes / GIB)
    for known in KNOWN:
        if memory_gb >= known.memory_gb:
            return known
    least = KNOWN[-1]
    raise ChatError(
        "missing", f"this machine has {memory_gb} GB of memory, {least.repo} needs {least.memory_gb}; use another agent"
    )


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
    except OSError:
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


def incomplete(folder: Path) -> str | None:
    """What a model's directory lacks, or None."""
    wanted = ["config.json", "tokenizer_config.json"]
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        wanted += sorted(set(index["weight_map"].values()))
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing:
        return f"no {missing[0]}" + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
    return None if any(folder.glob("*.safetensors")) else "no *.safetensors"


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


@contextlib.contextmanager
def serving(model: Path, start_seconds: float) -> Iterator[str]:
    """`mlx_lm.server` with the model, for as long as the block lasts: yields its base URL. Raises ChatError.

    It runs in a group of its own, which is dead when this returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "mlx_lm.server", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), start_new_session=True)
    try:
        wait_ready(server, port, start_seconds)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop(server)


def wait_ready(server: subprocess.Popen[bytes], port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if (code := server.poll()) is not None:
            raise ChatError("agent_error", f"mlx_lm.server ended with exit code {code} before it was ready; its output is above")
        with contextlib.suppress(OSError, http.client.HTTPException), opener.open(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.1)
    raise ChatError("agent_error", f"mlx_lm.server was not ready after {seconds:g} s; raise --start-seconds")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server's process group: TERM first, then KILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal_group(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_SECONDS)


def raise_exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("train_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="A folder or a Hugging Face name. Default: the largest 4-bit coder that fits this machine.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
              help="Timeout per reply, in seconds.")
@click.option("--start-seconds", type=click.FloatRange(min=0, min_open=True), default=300, show_default=True,
              help="Timeout for loading the model, in seconds.")
@click.option("--max-tokens", type=click.IntRange(1), default=8192, show_default=True, help="Maximum tokens per reply.")
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True,
              help="Sampling temperature; 0 always gives the same reply.")
def main(train_file: Path, model: str | None, timeout: float, start_seconds: float, max_tokens: int, temperature: float) -> None:
    """Edit TRAIN_FILE as the prompt on standard input asks, with a model on this machine.

    Exit codes: 0 edited, 1 no usable edit, 2 usage, 5 the model or mlx-lm is missing."""
    prompt = sys.stdin.read()
    if not prompt.strip():
        raise click.UsageError("no prompt; expected it on standard input")
    signal.signal(signal.SIGTERM, raise_exit)  # so that the server is stopped on the way out
    try:
        if importlib.util.find_spec("mlx_lm") is None:
            raise ChatError("missing", "mlx-lm is not installed; install it: python -m pip install mlx-lm")
        name = model or default_model(machine_memory()).repo
        folder = find_model(name, os.environ)
        print(f"local model: {name}", file=sys.stderr)
        with serving(folder, start_seconds) as url:
            endpoint = Endpoint(url, timeout=timeout, max_tokens=max_tokens, temperature=temperature)
            reply = edit(lambda messages: endpoint.ask("default_model", messages), prompt, train_file)
    except ChatError as error:
        reply = Reply(failure=error.failure, detail=str(error))
    finish(reply)


if __name__ == "__main__":
    main()
