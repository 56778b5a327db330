"""`agent/local.py`: the server is started, asked and gone; a model that isn't there is an error, never a download."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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

# What `python -m mlx_lm.server` runs in these tests: a scripted server with a child of its own, that ignores TERM if told.
FAKE_SERVER = """
import argparse, json, os, signal, subprocess, sys, threading
from model_server import ModelServer, Script
parser = argparse.ArgumentParser()
for name in ("--model", "--host", "--port"):
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
with ModelServer(Script(replies=json.loads(os.environ["FAKE_REPLIES"])), port=int(args.port)) as server:
    threading.Event().wait()
"""


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


class Run:
    """`python -m agent.local` with the fake server, in a clean environment."""

    def __init__(self, folder: Path, replies: list[str], mode: str = "") -> None:
        self.folder = folder
        package = folder / "fake" / "mlx_lm"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "server.py").write_text(FAKE_SERVER)
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
    assert time.monotonic() - started < local.GRACE_SECONDS + 15


def test_a_server_that_dies_is_an_agent_error(tmp_path: Path) -> None:
    code, reply = Run(tmp_path, [], mode="dies")("--model", str(model_folder(tmp_path / "model")))
    assert (code, reply["failure"]) == (1, "agent_error")
    assert "ended with exit code 1 before it was ready" in reply["detail"]


def test_a_server_that_is_never_ready_is_stopped(tmp_path: Path) -> None:
    run = Run(tmp_path, [], mode="silent")
    code, reply = run("--model", str(model_folder(tmp_path / "model")), "--start-seconds", "2")
    assert (code, reply["failure"]) == (1, "agent_error")
    assert "not ready after 2 s" in reply["detail"]
    assert run.alive() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
    assert run.alive() == []


# --- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gigabytes", "name"), [(8, "3B"), (16, "7B"), (24, "14B"), (36, "30B-A3B"), (128, "30B-A3B")])
def test_the_default_fits_the_machine(gigabytes: int, name: str) -> None:
    known = local.default_model(gigabytes * local.GIB)
    assert f"-{name}-" in known.repo
    assert known.repo.endswith("-4bit")
    assert known.download_gb < gigabytes * 0.6


def test_a_machine_too_small_is_told_so() -> None:
    with pytest.raises(ChatError, match=r"this machine has 4 GB of memory, .* needs 8; use another agent"):
        local.default_model(4 * local.GIB)


def test_a_model_that_is_not_there_is_named_with_size_and_command(tmp_path: Path) -> None:
    name = local.KNOWN[0].repo
    with pytest.raises(ChatError, match=rf"{name} is not on this machine \(17.2 GB\); download it: hf download {name}") as caught:
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


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/such/folder"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ChatError, match="there is no such folder"):
        local.find_model(name, {})


def test_no_model_no_server(tmp_path: Path) -> None:
    run = Run(tmp_path, [])
    code, reply = run("--model", "mlx-community/Qwen2.5-Coder-7B-Instruct-4bit")
    assert (code, reply["failure"]) == (5, "missing")
    assert "4.3 GB" in reply["detail"]
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
    left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and "mlx_lm.server" in (p.info["cmdline"] or [])]
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
