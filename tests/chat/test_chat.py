"""`agent/chat/`: blocks applied exactly or refused by name; a real program against a real server."""

from __future__ import annotations

import ast
import email.utils
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from model_server import BLOCK, CLOSING, TOKENS_IN, TOKENS_OUT, ModelServer, Script

from agent.chat.edit import EditError, apply_blocks

SOURCE = "import math\n\nLR = 0.1\nWD = 0.1\n\n\ndef step(x):\n    return x * LR\n"


def block(old: str, new: str) -> str:
    return f"<<<<<<< SEARCH\n{old}=======\n{new}>>>>>>> REPLACE\n"


# --- applying ----------------------------------------------------------------------------------------------------------


def test_blocks_are_applied_in_order() -> None:
    reply = "First.\n" + block("LR = 0.1\n", "LR = 0.2\n") + "and\n" + block("LR = 0.2\nWD = 0.1\n", "LR = 0.3\n")
    assert apply_blocks(SOURCE, reply) == SOURCE.replace("LR = 0.1\nWD = 0.1\n", "LR = 0.3\n")


@pytest.mark.parametrize("opening", ["<think>", ""])
def test_a_block_can_delete_and_a_thought_is_not_an_edit(opening: str) -> None:
    reply = opening + block("import math\n", "import os\n") + "</think>" + block("WD = 0.1\n", "")
    assert apply_blocks(SOURCE, reply) == SOURCE.replace("WD = 0.1\n", "")


def test_the_files_line_endings_stay() -> None:
    assert apply_blocks("A = 1\r\nB = 2\r\n", block("B = 2\n", "B = 3\n")) == "A = 1\r\nB = 3\r\n"
    assert apply_blocks("A = 1\nB = 2", block("B = 2\n", "B = 3\n")) == "A = 1\nB = 3\n"


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        ("I would raise LR.", "no_blocks"),
        ("<<<<<<< SEARCH\nLR = 0.1\n=======\nLR = 0.2\n", "unfinished_block"),
        (block("", "X = 1\n"), "empty_search"),
        (block("LR = 0.5\n", "LR = 0.2\n"), "not_found"),
        (block("R = 0.1\n", "R = 0.2\n"), "not_found"),  # not a whole line
        (block("    return x\n", "    return y\n"), "not_found"),
        (block("\n", "\n\n"), "empty_search"),
        (block("LR = 0.1\n", "LR = 0.1\n"), "no_change"),
        (block("LR = 0.1\n", "LR = (0.1\n"), "not_python"),
        (block("LR = 0.1\n", "LR = '\x00'\n"), "not_python"),
        (block("LR = 0.1\n", "LR = 0.2\n") + block("LR = 0.1\n", "LR = 0.3\n"), "not_found"),
    ],
)
def test_what_cannot_be_applied_has_a_name(reply: str, name: str) -> None:
    with pytest.raises(EditError) as caught:
        apply_blocks(SOURCE, reply)
    assert caught.value.name == name
    assert str(caught.value).startswith(f"{name}: ")


def test_a_search_that_occurs_twice_is_ambiguous() -> None:
    with pytest.raises(EditError, match=r"ambiguous: block 1 of 1: .*'A = 1', occur 2 times"):
        apply_blocks("A = 1\nB = 2\nA = 1\n", block("A = 1\n", "A = 2\n"))


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30, unique=True), st.data())
def test_any_run_of_lines_can_be_replaced_by_any_other(numbers: list[int], data: st.DataObject) -> None:
    lines = [f"X{number} = {number}\n" for number in numbers]
    start = data.draw(st.integers(0, len(lines) - 1))
    end = data.draw(st.integers(start + 1, len(lines)))
    new = "".join(f"Y{n} = r'\\g<0> {n}'\n" for n in data.draw(st.lists(st.integers(0, 9), max_size=5)))
    expected = "".join(lines[:start]) + new + "".join(lines[end:])
    assert apply_blocks("".join(lines), block("".join(lines[start:end]), new)) == expected
    ast.parse(expected)


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
    assert request["headers"]["Authorization"] == "Bearer sk-test"
    assert (request["body"]["model"], request["body"]["temperature"], request["body"]["stream"]) == ("m", 0.5, False)
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
        (Script(status=429, retry_after=20), 4, "rate_limit", 20.0, "Rate limit reached"),
        (Script(status=404), 1, "agent_error", None, "most end with /v1"),
        (Script(status=500), 1, "agent_error", None, "500 from http"),
        (Script(status=307, location="http://127.0.0.1:9/v1"), 1, "agent_error", None, "give that as --base-url"),
    ],
)  # fmt: skip
def test_refusals_have_names(tmp_path: Path, script: Script, code: int, failure: str, wait: float | None, detail: str) -> None:
    with ModelServer(script) as server:
        got, reply, text, stderr = run_chat(tmp_path, server, "--model", "m")
    assert (got, reply["failure"], reply["wait_seconds"], text) == (code, failure, wait, SOURCE)
    assert detail in reply["detail"]
    assert detail in stderr
    assert len(server.requests) == 1


def test_a_date_to_retry_after_is_a_wait(tmp_path: Path) -> None:
    with ModelServer(Script(status=429, retry_after=email.utils.formatdate(time.time() + 100, usegmt=True))) as server:
        reply = run_chat(tmp_path, server, "--model", "m")[1]
    assert 60 < reply["wait_seconds"] <= 100


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


def test_a_base_url_must_be_one(tmp_path: Path) -> None:
    code, reply, _, _ = run_chat(tmp_path, None, "--base-url", "localhost:1234", "--model", "m")
    assert (code, reply["failure"]) == (5, "missing")
    assert "got 'localhost:1234'" in reply["detail"]
