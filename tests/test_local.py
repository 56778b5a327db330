"""`agent/local.py`: the server is started, asked and gone; a model that isn't there is an error, never a download."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from model_server import BLOCK, CLOSING, TOKENS_IN, ModelServer, Script

from agent import local
from agent.chat.endpoint import ChatError

SOURCE = "LR = 0.1\n"
GOOD = BLOCK.format(path="train_mlx.py", old="LR = 0.1", new="LR = 0.2") + CLOSING

# What `python -m mlx_lm server` runs in these tests: a scripted server with a child of its own, that ignores TERM if told.
FAKE_SERVER = """
import argparse, json, os, signal, socket, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from model_server import ModelServer, Script
parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["server"])
for name in ("--model", "--host", "--port", "--chat-template-args"):
    parser.add_argument(name, required=True)
args = parser.parse_args()
mode = os.environ.get("FAKE_MODE", "")
if mode == "dies":
    sys.exit("no such model type")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
facts = {"pids": [os.getpid(), child.pid], "model": args.model, "offline": os.environ.get("HF_HUB_OFFLINE")}
with open(os.environ["FAKE_FACTS"], "w") as file:
    json.dump(facts, file)
if mode == "silent":
    threading.Event().wait()
if mode == "unloadable":  # as mlx-lm: its loading thread dies, and /health says 503 from then on
    class Dead(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503)
            self.end_headers()
        def log_message(self, *args):
            pass
    print("2026-11-26 - ERROR - mlx_lm.server generation thread died: Model type x not supported.", file=sys.stderr)
    print("ValueError: Model type x not supported.", file=sys.stderr)
    HTTPServer(("127.0.0.1", int(args.port)), Dead).serve_forever()
class Server(ModelServer):
    pages = {"/v1/models": {"data": []}}
    def finish_request(self, request, address):  # "mute": the first server takes every prompt and answers none
        first = request.recv(4, socket.MSG_PEEK)
        if first == b"POST" and mode == "mute" and len(open(os.environ["FAKE_FACTS"] + ".started").read()) == 1:
            threading.Event().wait()
        super().finish_request(request, address)
with open(os.environ["FAKE_FACTS"] + ".started", "a") as file:
    file.write("x")
with Server(Script(replies=json.loads(os.environ["FAKE_REPLIES"])), port=int(args.port)) as server:
    threading.Event().wait()
"""


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors())
    return folder


def safetensors(size: int = 64) -> bytes:
    """A file with one tensor of `size` bytes."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "mlx"}, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


class Run:
    """`python -m agent.local` with the fake server, in a clean environment."""

    def __init__(self, folder: Path, replies: list[str], mode: str = "") -> None:
        self.folder = folder
        package = folder / "fake" / "mlx_lm"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text(FAKE_SERVER)
        (folder / "train_mlx.py").write_text(SOURCE)
        self.facts_file = folder / "facts.json"
        path = os.pathsep.join(str(part) for part in (folder / "fake", ROOT / "tests", ROOT))
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": path, "FAKE_MODE": mode,
                    "FAKE_FACTS": str(self.facts_file), "FAKE_REPLIES": json.dumps(replies)}  # fmt: skip

    def start(self, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "agent.local", "train_mlx.py", *options], cwd=self.folder, env=self.env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *options: str) -> tuple[int, dict[str, Any]]:
        process = self.start(*options)
        stdout, _ = process.communicate("Improve it.", timeout=60)
        return process.returncode, json.loads(stdout.strip().rpartition("\n")[2])

    @property
    def facts(self) -> dict[str, Any]:
        return dict(json.loads(self.facts_file.read_text()))

    def alive(self) -> list[int]:
        if not self.facts_file.exists():
            return []  # it was ended before its first line
        return [pid for pid in self.facts["pids"] if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]

    @property
    def text(self) -> str:
        return (self.folder / "train_mlx.py").read_text()


def test_the_server_is_asked_and_gone_with_its_children(tmp_path: Path) -> None:
    run = Run(tmp_path, [GOOD])
    model = model_folder(tmp_path / "model")
    code, reply = run("--model", str(model))
    assert (code, reply["failure"], run.text) == (0, None, "LR = 0.2\n")
    assert (reply["tokens_in"], reply["description"]) == (TOKENS_IN, "double the learning rate")
    assert run.facts["model"] == str(model)
    assert run.facts["offline"] == "1"
    assert run.alive() == []


def test_a_server_that_ignores_term_is_killed(tmp_path: Path) -> None:
    run = Run(tmp_path, [GOOD], mode="stubborn")
    started = time.monotonic()
    assert run("--model", str(model_folder(tmp_path / "model")))[0] == 0
    assert run.alive() == []
    assert time.monotonic() - started < 20


def test_a_server_that_dies_is_an_agent_error(tmp_path: Path) -> None:
    code, reply = Run(tmp_path, [], mode="dies")("--model", str(model_folder(tmp_path / "model")))
    assert (code, reply["failure"]) == (1, "agent_error")
    assert "ended with exit code 1 before it listened: no such model type" in reply["detail"]


def test_a_server_that_is_never_ready_is_stopped(tmp_path: Path) -> None:
    run = Run(tmp_path, [], mode="silent")
    code, reply = run("--model", str(model_folder(tmp_path / "model")), "--start-seconds", "2")
    assert (code, reply["failure"]) == (1, "agent_error")
    assert "did not listen after 2 s" in reply["detail"]
    assert run.alive() == []


def test_a_server_that_takes_the_prompt_and_answers_nothing_is_started_again_once(tmp_path: Path) -> None:
    run = Run(tmp_path, [GOOD], mode="mute")
    process = run.start("--model", str(model_folder(tmp_path / "model")), "--silence", "4")
    stdout, stderr = process.communicate("Improve it.", timeout=60)
    reply = json.loads(stdout.strip().rpartition("\n")[2])
    assert (process.returncode, reply["failure"], run.text) == (0, None, "LR = 0.2\n")
    assert "within 4 s, though it still lists its models" in stderr
    assert "mlx-lm's server is started again" in stderr
    assert (tmp_path / "facts.json.started").read_text() == "xx"
    assert run.alive() == []


def test_a_check_tells_of_a_mute_server_within_one_silence(tmp_path: Path) -> None:
    run = Run(tmp_path, [], mode="mute")
    code, reply = run("--model", str(model_folder(tmp_path / "model")), "--silence", "2", "--check")
    assert (code, reply["failure"], run.text) == (1, "agent_error", SOURCE)
    assert "nothing came from" in reply["detail"]
    assert "within 2 s, though it still lists its models: it may hang" in reply["detail"]
    assert (tmp_path / "facts.json.started").read_text() == "x"
    assert run.alive() == []


def test_a_model_that_cannot_be_loaded_is_told_with_its_cause_within_seconds(tmp_path: Path) -> None:
    run = Run(tmp_path, [], mode="unloadable")
    code, reply = run("--model", str(model_folder(tmp_path / "model")))
    assert (code, reply["failure"]) == (5, "missing")
    assert reply["detail"].endswith("model can't be loaded: ValueError: Model type x not supported.")
    assert run.alive() == []


def test_a_check_edits_nothing_and_tells_the_time_of_a_proposal(tmp_path: Path) -> None:
    run = Run(tmp_path, ["1 2 3 4 5 6", "ready"])
    code, reply = run("--model", str(model_folder(tmp_path / "model")), "--check")
    assert (code, reply["failure"], run.text) == (0, None, SOURCE)
    assert re.match(r"about \d+ s a proposal: \d+ s to start and read 1,000 tokens, then \d+ tokens/s", reply["message"])
    assert run.alive() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_takes_the_server_along(tmp_path: Path, number: int) -> None:
    run = Run(tmp_path, [], mode="silent")
    process = run.start("--model", str(model_folder(tmp_path / "model")))
    assert process.stdin
    process.stdin.write("Improve it.")
    process.stdin.close()
    deadline = time.monotonic() + 90
    while not run.facts_file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(90) != 0
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stderr.close()
    deadline = time.monotonic() + 20
    while run.alive() and time.monotonic() < deadline:  # after a KILL its supervisor has to notice first
        time.sleep(0.05)
    assert run.alive() == []


# --- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gigabytes", "name"), [(8, "4B"), (16, "9B"), (24, "9B"), (36, "30B-A3B"), (128, "35B-A3B")])
def test_the_default_fits_the_machine(gigabytes: int, name: str) -> None:
    known = local.default_model(gigabytes * local.GIB)
    assert f"-{name}-" in known.repo
    assert known.repo.endswith("-4bit")
    assert known.download_gb < gigabytes * 0.6


def test_the_models_are_listed_with_sizes_and_what_downloads_them(tmp_path: Path) -> None:
    small, second = local.KNOWN[-1].repo, local.KNOWN[-2].repo
    folder = tmp_path / "hub" / f"models--{small.replace('/', '--')}"
    model_folder(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    text = local.models_for(16 * local.GIB, {"HF_HOME": str(tmp_path)})
    assert "This machine has 16 GB of memory" in text
    assert "untried" in text
    assert f"{second}  <- the default" in text
    assert f"hf download {second}" in text
    assert f"is on this machine: {folder}" in text
    assert "the default" not in local.models_for(2 * local.GIB, {"HF_HOME": str(tmp_path)})
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "agent.local"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, small in done.stdout) == (0, True), done.stderr


def test_a_machine_too_small_is_told_so() -> None:
    with pytest.raises(ChatError, match=r"this machine has 4 GB of memory, .* needs 8; use another agent"):
        local.default_model(4 * local.GIB)


def test_a_model_that_is_not_there_is_named_with_size_and_command(tmp_path: Path) -> None:
    name = local.KNOWN[0].repo
    with pytest.raises(ChatError, match=rf"{name} is not on this machine \(20.1 GB\); download it: hf download {name}") as caught:
        local.find_model(name, {"HF_HOME": str(tmp_path)})
    assert caught.value.failure == "missing"


def test_the_size_of_any_other_model_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub(ModelServer):
        pages = {"/api/models/some/model": {"siblings": [{"size": 2_000_000_000}, {"size": 500_000_000}, {}]}}  # noqa: RUF012

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Hub(Script()) as hub, pytest.raises(ChatError, match=r"some/model is not on this machine \(2.5 GB\)"):
        local.find_model("some/model", {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url})
    with pytest.raises(ChatError, match=r"size unknown: the hub could not be asked"):
        local.find_model("some/model", {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"})


def test_a_downloaded_model_is_found_and_a_partial_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--some--model"
    snapshot = model_folder(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    environ = {"HF_HOME": str(tmp_path)}
    assert local.find_model("some/model", environ) == snapshot
    assert local.find_model("some/model", {"HF_HUB_CACHE": str(tmp_path / "hub")}) == snapshot
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ChatError, match=r"only partly on this machine \(no model-2.safetensors and 1 more files\)"):
        local.find_model("some/model", environ)


def damaged(name: str, folder: Path) -> None:
    """One way in which a download stops."""
    weights = folder / "model.safetensors"
    if name == "a link to nothing":
        weights.unlink()
        weights.symlink_to(folder / "blobs" / "gone.incomplete")
    elif name == "empty":
        weights.write_bytes(b"")
    elif name == "cut":
        weights.write_bytes(safetensors()[:-10])
    elif name == "no header":
        weights.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    elif name == "empty tokenizer":
        (folder / "tokenizer.json").write_text("")
    elif name == "cut config":
        (folder / "config.json").write_text('{"model_type": ')
    elif name == "cut index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    elif name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif name == "gguf":
        weights.rename(folder / "model.gguf")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a link to nothing", "model.safetensors is a link to nothing"),
        ("empty", "model.safetensors is empty"),
        ("cut", r"model.safetensors has \d+ of \d+ bytes"),
        ("no header", "model.safetensors has 10 bytes, and not even its header"),
        ("empty tokenizer", "tokenizer.json is empty"),
        ("cut config", "config.json can't be read"),
        ("cut index", "model.safetensors.index.json can't be read"),
        ("no tokenizer", "no tokenizer.json"),
        ("gguf", "no .*safetensors; a GGUF model runs in llama.cpp or LM Studio: use --agent chat"),
    ],
)
def test_a_model_that_is_only_partly_there_is_told_from_a_whole_one(tmp_path: Path, name: str, said: str) -> None:
    folder = model_folder(tmp_path / "model")
    assert local.find_model(str(folder), {}) == folder.resolve()
    damaged(name, folder)
    with pytest.raises(ChatError, match=f"is not a complete model: {said}"):
        local.find_model(str(folder), {})


def test_weights_that_memory_cannot_hold_are_told(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    local.require_memory(folder, 1 << 20)
    with pytest.raises(ChatError, match="take a smaller model"):
        local.require_memory(folder, 100)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/such/folder"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ChatError, match="there is no such folder"):
        local.find_model(name, {})


def test_no_model_no_server(tmp_path: Path) -> None:
    run = Run(tmp_path, [])
    code, reply = run("--model", local.KNOWN[-1].repo)
    assert (code, reply["failure"]) == (5, "missing")
    assert "2.8 GB" in reply["detail"]
    assert not run.facts_file.exists()


@pytest.mark.slow
def test_a_real_server_with_a_tiny_random_model(tmp_path: Path) -> None:
    """Its words are noise, so no edit comes of it; that it was loaded, asked twice and stopped is what shows."""
    model = tiny_model(tmp_path / "model")
    (tmp_path / "train_mlx.py").write_text(SOURCE)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run(
        [sys.executable, "-m", "agent.local", "train_mlx.py", "--model", str(model), "--max-tokens", "12"],
        cwd=tmp_path, env=env, input="Improve it.", capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    reply = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert (done.returncode, reply["failure"]) == (1, "agent_error"), done.stderr
    assert reply["detail"].startswith(("no_blocks: ", "cut_off: "))
    assert reply["tokens_in"] > 20
    assert 0 < reply["tokens_out"] <= 24
    left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and "mlx_lm" in (p.info["cmdline"] or [])]
    assert left == []


def tiny_model(folder: Path) -> Path:
    """A Llama of 20,000 random weights with a byte-level tokenizer, in mlx-lm's format."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template})
    )
    config = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": len(vocabulary), "tie_word_embeddings": True,
        "eos_token_id": vocabulary["<eos>"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


EDIT = """\
<<<<<<< SEARCH
MODE = "ok"
=======
MODE = "ok"
GAIN += 0.05
>>>>>>> REPLACE
HYPOTHESIS: it helps
DESCRIPTION: more gain
"""


def knowing_model(folder: Path, answer: str) -> Path:
    """A Llama in mlx-lm's format that gives `answer` to everything: each token leads to the next one of the answer.

    A token's embedding is a unit vector, attention and feed-forward add nothing, and the head turns it into the next token."""
    import mlx.core as mx

    tiny_model(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    pieces = [f"{line}Ċ".replace(" ", "Ġ") for line in answer.splitlines()]
    pieces = [piece if piece not in pieces[:at] else f"{piece[0]}|{piece[1:]}" for at, piece in enumerate(pieces)]
    chain = [vocabulary["~"]]  # what the template ends with
    for piece in pieces:
        parts = piece.split("|") if "|" in piece else [piece]  # a line that comes twice is two tokens the second time
        for part in parts:
            chain.append(vocabulary.setdefault(part, len(vocabulary)))
    chain.append(vocabulary["<eos>"])
    assert len(set(chain)) == len(chain)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] += "~"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    size = 4 * -(-len(vocabulary) // 4)
    config |= {"hidden_size": size, "vocab_size": len(vocabulary), "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    weights = {name: mx.ones_like(value) if "norm" in name else mx.zeros_like(value) for name, value in weights.items()}
    weights["model.embed_tokens.weight"] = mx.eye(len(vocabulary), size)
    head = mx.zeros((len(vocabulary), size))
    for token, following in pairwise(chain):
        head[following, token] = 10.0
    weights["lm_head.weight"] = head
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def wait_for_port(port: int) -> None:
    """Return once somebody listens there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)


def ours(process: psutil.Process, folder: Path) -> bool:
    with suppress(psutil.Error):
        return process.cwd().startswith(str(folder))
    return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_night_of_ten_by_a_local_model_whose_server_is_killed_three_times(tmp_path: Path) -> None:
    """A real server with a real model; a killed one costs one experiment, and no server lives while a trainer does."""
    from night_kit import Bed

    model = knowing_model(tmp_path / "model", EDIT)
    bed = Bed(tmp_path / "bed")
    fast = ("--no-sandbox", "--baseline-seeds", "3", "--backoff", "0.1", "--disk-gb", "0", "--startup", "30", "--no-picture")
    with open(tmp_path / "night.txt", "w") as said:
        night = subprocess.Popen(
            [sys.executable, "-m", "agent.loop", "--agent", "local", "--model", str(model), "--tag=n", "--experiments=10", *fast],
            cwd=bed.repo, env=bed.environment(), stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    servers: list[int] = []
    trainings = together = 0
    while night.poll() is None:
        words = {process: process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"])}
        words = {process: line for process, line in words.items() if "supervise.py" not in " ".join(line[:3])}
        serving = [process for process, line in words.items() if "mlx_lm" in line and str(model) in line]
        training = [process for process, line in words.items() if line[-1].endswith("train_mlx.py") and ours(process, bed.repo)]
        trainings, together = trainings + bool(training), together + bool(serving and training)
        for process in serving:
            if process.pid not in servers:
                servers.append(process.pid)
                if len(servers) in (3, 6, 9):  # the first one answers before the night
                    if len(servers) == 9:
                        wait_for_port(int(words[process][words[process].index("--port") + 1]))
                    process.kill()
        time.sleep(0.05)
    output = (tmp_path / "night.txt").read_text()
    print(output)
    events = [json.loads(line) for line in (bed.folder("n") / "journal.jsonl").read_text().splitlines()]
    verdicts = {event["n"]: event["status"] for event in events if event["event"] == "verdict" and event["n"]}
    failed = [n for n, status in verdicts.items() if status == "agent_error"]
    assert night.returncode == 0, output
    assert len(verdicts) == 10
    assert len(servers) == 11
    assert failed == [2, 5, 8]
    assert sum(status == "keep" for status in verdicts.values()) >= 5
    assert trainings
    assert together == 0
    assert not [pid for pid in servers if psutil.pid_exists(pid)]
