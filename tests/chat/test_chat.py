"""`python -m agent.chat`: the real program against a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from model_server import BLOCK, CLOSING, TOKENS_IN, TOKENS_OUT, ModelServer, Script

SOURCE = "import math\n\nLR = 0.1\nWD = 0.1\n\n\ndef step(x):\n    return x * LR\n"


def block(old: str, new: str) -> str:
    return f"<<<<<<< SEARCH\n{old}=======\n{new}>>>>>>> REPLACE\n"


# --- the program -------------------------------------------------------------------------------------------------------


def run_chat(
    folder: Path, server: ModelServer | None, *options: str, prompt: str = "Improve it.", **env: str
) -> tuple[int, dict[str, Any], str, str]:
    """Exit code, reply, file afterwards, standard error."""
    path = folder / "train_mlx.py"
    path.write_text(SOURCE)
    url = ["--base-url", f"{server.url}/v1"] if server else []
    clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "sk-test", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "agent.chat", "train_mlx.py", *url, *options],
        cwd=folder, env=clean | env, input=prompt, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    last = done.stdout.strip().rpartition("\n")[2]
    return done.returncode, json.loads(last) if last else {}, path.read_text(), done.stderr


def status_is_retried(script: Script) -> bool:
    return script.status in (408, 409, 429) or script.status >= 500


GOOD = BLOCK.format(path="train_mlx.py", old="LR = 0.1", new="LR = 0.2") + CLOSING


def test_an_edit_is_asked_for_applied_and_reported(tmp_path: Path) -> None:
    with ModelServer(Script(replies=[GOOD])) as server:
        code, reply, text, _ = run_chat(tmp_path, server, "--model", "m", "--temperature", "0.5")
    assert (code, text) == (0, SOURCE.replace("LR = 0.1", "LR = 0.2"))
    assert (reply["tokens_in"], reply["tokens_out"]) == (TOKENS_IN, TOKENS_OUT)
    assert reply["hypothesis"] == "a larger step learns faster"
    assert reply["description"] == "double the learning rate"
    assert reply["failure"] is None
    (request,) = server.requests
    assert {name.lower(): value for name, value in request["headers"].items()}["authorization"] == "Bearer sk-test"
    assert (request["body"]["model"], request["body"]["temperature"], request["body"]["stream"]) == ("m", 0.5, True)
    assert "max_tokens" not in request["body"]
    assert "Improve it." in request["body"]["messages"][1]["content"]
    assert SOURCE in request["body"]["messages"][1]["content"]


def test_the_file_is_not_sent_twice(tmp_path: Path) -> None:
    with ModelServer(Script(replies=[GOOD])) as server:
        assert run_chat(tmp_path, server, "--model", "m", prompt=f"Improve this:\n{SOURCE}")[0] == 0
    assert server.prompts.count("import math") == 1


def test_a_bad_reply_is_sent_back_once_with_its_name(tmp_path: Path) -> None:
    with ModelServer(Script(replies=[block("LR = 7\n", "LR = 8\n"), GOOD])) as server:
        code, reply, text, _ = run_chat(tmp_path, server, "--model", "m")
    assert (code, "LR = 0.2" in text) == (0, True)
    assert (reply["tokens_in"], reply["tokens_out"]) == (2 * TOKENS_IN, 2 * TOKENS_OUT)
    assert "not_found: block 1 of 1" in server.requests[1]["body"]["messages"][-1]["content"]
    assert "LR = 7" in server.requests[1]["body"]["messages"][-2]["content"]


def test_two_bad_replies_are_an_agent_error_and_the_file_stays(tmp_path: Path) -> None:
    with ModelServer(Script(replies=["Nothing to do.", block("LR = 0.1\n", "LR = (\n"), GOOD])) as server:
        code, reply, text, _ = run_chat(tmp_path, server, "--model", "m")
    assert (code, reply["failure"], text, len(server.requests)) == (1, "agent_error", SOURCE, 2)
    assert reply["detail"].startswith("not_python: ")
    assert reply["tokens_out"] == 2 * TOKENS_OUT


@pytest.mark.parametrize(
    ("script", "code", "failure", "wait", "detail"),
    [
        (Script(status=401), 3, "login", None, "OPENAI_API_KEY"),
        (Script(status=429), 4, "rate_limit", None, "Rate limit reached"),
        (Script(status=429, retry_after=2), 4, "rate_limit", 2.0, "Rate limit reached"),
        (Script(status=404), 1, "agent_error", None, "most end with /v1"),
        (Script(status=307, location="http://127.0.0.1:9/v1"), 1, "agent_error", None, "give that as --base-url"),
    ],
)  # fmt: skip
def test_refusals_have_names(tmp_path: Path, script: Script, code: int, failure: str, wait: float | None, detail: str) -> None:
    with ModelServer(script) as server:
        got, reply, text, stderr = run_chat(tmp_path, server, "--model", "m")
    assert (got, reply["failure"], reply["wait_seconds"], text) == (code, failure, wait, SOURCE)
    assert detail in reply["detail"]
    assert detail in stderr
    assert len(server.requests) == (2 if status_is_retried(script) else 1)


def test_a_redirect_never_carries_the_key_away(tmp_path: Path) -> None:
    with ModelServer(Script(replies=[GOOD])) as other, ModelServer(Script(status=302, location=other.url)) as server:
        assert run_chat(tmp_path, server, "--model", "m")[0] == 1
    assert (other.requests, other.fetched) == ([], [])


def test_an_endless_stream_ends_at_the_timeout(tmp_path: Path) -> None:
    started = time.monotonic()
    with ModelServer(Script(endless=True)) as server:
        code, reply, text, _ = run_chat(tmp_path, server, "--model", "m", "--timeout", "1")
    assert (code, reply["failure"], text) == (1, "agent_error", SOURCE)
    assert "within 1 s" in reply["detail"]
    assert time.monotonic() - started < 20


def test_an_endpoint_with_one_model_needs_no_name_and_loopback_no_proxy(tmp_path: Path) -> None:
    with ModelServer(Script(replies=[GOOD])) as server:
        assert run_chat(tmp_path, server, http_proxy="http://127.0.0.1:9")[0] == 0
    assert server.requests[0]["body"]["model"] == "scripted"


def test_nobody_listens(tmp_path: Path) -> None:
    code, reply, _, _ = run_chat(tmp_path, None, "--model", "m", OPENAI_BASE_URL="http://127.0.0.1:9/v1")
    assert (code, reply["failure"]) == (1, "agent_error")
    assert "is the server running?" in reply["detail"]


@pytest.mark.parametrize(("options", "prompt", "said"), [
    ([], "Improve it.", "no endpoint; give --base-url"),
    (["--base-url", "http://127.0.0.1:9"], " \n", "no prompt"),
])  # fmt: skip
def test_usage(tmp_path: Path, options: list[str], prompt: str, said: str) -> None:
    code, _, _, stderr = run_chat(tmp_path, None, *options, prompt=prompt)
    assert code == 2
    assert said in stderr


def test_the_package_that_carries_it_is_named_with_its_command_where_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "lacks").mkdir()
    (tmp_path / "lacks" / "openai.py").write_text("raise ImportError('No module named openai')")
    path = os.pathsep.join((str(tmp_path / "lacks"), str(ROOT)))
    code, reply, _, _ = run_chat(tmp_path, None, "--base-url", "http://127.0.0.1:9/v1", "--model", "m", PYTHONPATH=path)
    assert (code, reply["failure"]) == (5, "missing")
    assert "pip install 'openai" in reply["detail"]


@pytest.mark.parametrize(("key", "code"), [("sk-planted-012345\r\n", 0), ("sk-planted-01…23", 3), ("sk-planted-01\n2345", 3)])
def test_a_key_that_was_pasted_badly_is_in_no_output(tmp_path: Path, key: str, code: int) -> None:
    words = f"{GOOD} {key.strip()} half an emoji \ud83d"  # as a server that repeats what it was told
    with ModelServer(Script(replies=[words])) as server:
        got, reply, _, stderr = run_chat(tmp_path, server, "--model", "m", OPENAI_API_KEY=key)
    assert got == code
    assert "Traceback" not in stderr
    assert "planted" not in stderr + str(reply["detail"])


def test_a_check_asks_and_edits_nothing(tmp_path: Path) -> None:
    with ModelServer(Script(replies=["1 2 3", "ready"])) as server:
        code, reply, text, _ = run_chat(tmp_path, server, "--model", "m", "--check")
    assert (code, reply["failure"], text) == (0, None, SOURCE)
    assert reply["message"].startswith("about ")
    assert len(server.requests[1]["body"]["messages"][1]["content"]) > 36_000
