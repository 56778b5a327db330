"""`agent/chat/endpoint.py`: what endpoints answer as people report it, told by name; over a real wire on loopback."""

from __future__ import annotations

import email.utils
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent.chat import edit as conversation
from agent.chat import endpoint as wire
from agent.chat.endpoint import Answer, ChatError, Endpoint, first_set, mended_url, read_answer, sound_key
from agent.proposal import briefing

ONE_ROLE: Callable[[Any], bool] = lambda body: [m["role"] for m in body["messages"]] == ["user"]  # noqa: E731
Scripted = Any  # a dict: JSON with 200; (status, dict or bytes, headers); or a function of the handler


class Scripts(ThreadingHTTPServer):
    """POSTs get the answers in order, the last one repeated."""

    daemon_threads = True

    def __init__(self, answers: tuple[Scripted, ...], models: list[str], host: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), Handler)
        self.answers, self.models = list(answers), models
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the script."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripts

    def log_message(self, *args: object) -> None:
        """Silent."""

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers), None))
        self.send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if callable(answer):
            answer(self)
        elif isinstance(answer, dict):
            self.send(200, answer)
        else:
            self.send(*answer)


@contextmanager
def serve(*answers: Scripted, models: tuple[str, ...] = ("m",), host: str = "127.0.0.1") -> Iterator[Scripts]:
    server = Scripts(answers, list(models), host)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def reply(content: Any = "hi", finish: str = "stop", usage: Any = None, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return {"choices": [choice], "usage": usage or {"prompt_tokens": 1000, "completion_tokens": 50}}


def ask(url: str, **options: Any) -> Answer:
    return Endpoint(url, **options).ask("m", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])


def refused(*answers: Scripted, **options: Any) -> ChatError:
    with serve(*answers) as server, pytest.raises(ChatError) as caught:
        ask(server.url, **options)
    return caught.value


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's first pause is half a second; a model that loads is waited for once."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(wire, "LOADING_SECONDS", 0.3)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


# --- answers -----------------------------------------------------------------------------------------------------------


def chunked(handler: Handler) -> None:
    data = json.dumps(reply()).encode()
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for at in range(0, len(data), 20):
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data[at : at + 20]), data[at : at + 20]))
    handler.wfile.write(b"0\r\n\r\n")


def events(*parts: str, end: str = "data: [DONE]\n\n") -> tuple[int, bytes, dict[str, str]]:
    lines = [f"data: {json.dumps({'choices': [{'delta': {'content': part}}]})}\n\n" for part in parts]
    return 200, (": PROCESSING\n\n" + "".join(lines) + end).encode(), {"Content-Type": "text/event-stream"}


def stream(*items: Any, head: str = "", ends: str = "\n\n") -> tuple[int, bytes, dict[str, str]]:
    """Events as they are: a dict is the JSON of a `data` field, a string a line."""
    lines = [(item if isinstance(item, str) else f"data: {json.dumps(item, ensure_ascii=False)}") + ends for item in items]
    return 200, (head + "".join(lines)).encode(), {"Content-Type": "text/event-stream"}


def delta(content: Any = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content, **more}, "finish_reason": finish}]}


def closed(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "99999")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


@pytest.mark.parametrize(
    "answer",
    [
        chunked,
        events("h", "i"),
        (200, events("h", "i")[1], {}),  # events that say they are JSON
        (200, gzip.compress(json.dumps(reply()).encode()), {"Content-Encoding": "gzip"}),
        (200, b"\n \n" * 2000 + json.dumps(reply()).encode()),
        (200, b"\xef\xbb\xbf" + json.dumps(reply()).encode(), {"Content-Type": "text/plain"}),
        reply([{"type": "thinking", "thinking": "no"}, {"type": "text", "text": "h"}, "i"]),
        {"choices": [{"text": "hi"}]},
        {"error": None, **reply()},
        stream(delta("h"), delta("i", "stop"), {"choices": [], "usage": {"prompt_tokens": 7}}),  # no [DONE]
        stream(delta("h"), delta("i"), "data: [DONE]", ends="\r\n\r\n"),
        stream(delta("h"), delta("i"), "data: [DONE]", ends="\n"),
        stream(f"data:{json.dumps(delta('hi', 'stop'))}", head=": keepalive 0/90\n\n: keepalive 90/90\n\n"),  # mlx-lm
        stream("id: 1\nevent: message\nretry: 3\ndata: " + json.dumps(delta("hi", "stop"))),
        stream({"choices": [{"text": "h"}]}, {"choices": [{"text": "i", "finish_reason": "stop"}]}),
        stream(delta("", reasoning="a", reasoning_details=[{"type": "reasoning.text", "text": "a"}]), delta("hi", "stop")),
        stream(delta([{"type": "thinking", "thinking": [{"type": "text", "text": "no"}]}]), delta([{"type": "text", "text": "hi"}]),
               "data: [DONE]"),
    ],
)  # fmt: skip
def test_an_answer_is_read_however_it_comes(answer: Scripted) -> None:
    with serve(answer) as server:
        assert ask(server.url).text == "hi"
    assert "authorization" not in server.seen[0][1]


@pytest.mark.parametrize("first", [closed, events("h", end=""), (200, b'{"choices": [{"mess'), (500, b"oops"), (502, b"bad")])
def test_what_breaks_off_is_asked_for_once_more(first: Scripted) -> None:
    with serve(first, reply()) as server:
        assert ask(server.url).text == "hi"
    assert len(server.seen) == 2
    assert refused(first).failure == "agent_error"


@pytest.mark.parametrize("value", [None, 3, True, "x", [], {}, [None], {"a": 1}, "12", 3.0, -1, float("nan"), 10**400])
def test_odd_fields_never_raise_anything_else(value: Any) -> None:
    for made in (
        value, {"choices": value}, {"choices": [value]}, {"choices": [{"message": value}]}, reply(value), reply(usage=value),
        reply(usage={"prompt_tokens": value, "completion_tokens": value}), reply("x", reasoning_content=value, tool_calls=value),
        {"error": value}, {"choices": [{"error": value, "message": {"content": "x"}}]},
    ):  # fmt: skip
        try:
            answer = read_answer(made)
        except ChatError as error:
            assert len(str(error)) <= 1000  # noqa: PT017
        else:
            assert isinstance(answer.text, str)
            assert answer.tokens_in is None or answer.tokens_in >= 0


def test_separators_of_unicode_end_no_event() -> None:
    with serve(stream(delta("a\u2028b\u0085c", "stop"))) as server:
        assert ask(server.url).text == "a\u2028b\u0085c"


def test_a_stream_tells_what_it_used_and_when_it_began() -> None:
    def slow(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for line in (": wait\n\n", *(f"data: {json.dumps(item)}\n\n" for item in (delta("h"), delta("i", "stop"), used))):
            time.sleep(0.1)
            handler.wfile.write(line.encode())
        handler.close_connection = True

    used = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    with serve(slow) as server:
        answer = ask(server.url)
    assert (answer.text, answer.tokens_in, answer.tokens_out) == ("hi", 7, 2)
    assert 0.2 < answer.first < answer.seconds - 0.1
    assert server.seen[0][2]["stream_options"] == {"include_usage": True}


def test_reasoning_is_kept_beside_the_text() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        with serve(stream(delta(None, **{name: "h"}), delta(None, **{name: "m"}), delta("x", "stop"))) as server:
            assert ask(server.url).reasoning == "hm"
    assert read_answer(reply("x", reasoning="why", reasoning_content="why")).reasoning == "why"
    assert read_answer(reply("x", "max_output_tokens")).cut_off
    answer = read_answer(reply("", "length", reasoning_content="hm"))
    assert (answer.text, answer.reasoning, answer.cut_off) == ("", "hm", True)
    assert read_answer(reply("x", reasoning="why")).reasoning == "why"


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "context", "sent"),
    [
        ((400, {"error": {"code": 400, "type": "exceed_context_size_error",
                          "message": "request (15321 tokens) exceeds the available context size (4096 tokens)"}}), 4096, 15321),
        ((400, {"error": {"message": "x exceeds the context", "n_ctx": 4096, "n_prompt_tokens": 15321}}), 4096, 15321),
        ((400, {"error": "the model was loaded with a context length of only 4096 tokens"}), 4096, None),
        ((400, {"error": {"message": "This model's maximum context length is 4,096 tokens. However, you requested 15,321 tokens"}}),
         4096, 15321),
        ((400, {"error": {"message": "prompt is too long: 215000 tokens > 200000 maximum"}}), 200000, 215000),
        ((500, {"detail": "input length 15321 exceeds num_ctx 4096"}), 4096, 15321),
        ((200, {"error": "Context size has been exceeded."}), None, None),
        ((413, b"Payload Too Large"), None, None),
        ((400, {"object": "error", "code": 400, "message": "This model's maximum context length is 6048 tokens. However, you "
                "requested 6616 tokens (568 in the messages, 6048 in the completion)."}), 6048, 6616),
        ((400, {"object": "error", "message": "max_tokens must be at least 1, got -186."}), None, None),
        ((400, {"error": {"message": "Please reduce the length of the messages.", "code": "context_length_exceeded"}}), None, None),
        ((400, [{"error": {"message": "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."}}]),
         1048576, 1200000),
        (stream("event: error\ndata: " + json.dumps({"error": {"message": "Context size has been exceeded."}})), None, None),
        (stream("error: " + json.dumps({"type": "exceed_context_size_error", "n_prompt_tokens": 5321, "n_ctx": 4096})), 4096, 5321),
        ((429, {"error": {"message": "Request too large on tokens per min (TPM): Limit 10000, Requested 15000"}}), 10000, 15000),
    ],
)  # fmt: skip
def test_a_context_that_is_too_small_is_told_with_its_number(answer: Scripted, context: int | None, sent: int | None) -> None:
    error = refused(answer)
    assert (error.failure, error.too_small, error.context, error.sent) == ("agent_error", True, context, sent)


@pytest.mark.parametrize(
    ("answer", "failure", "said"),
    [
        ({"error": {"message": "Rate limit exceeded: free-models-per-day", "code": 429}}, "rate_limit", "free-models"),
        ({"choices": [{"finish_reason": "error", "error": {"code": 429, "message": "slow down"}, "message": {"content": ""}}]},
         "rate_limit", "slow down"),
        ((402, {"error": {"message": "Insufficient credits", "code": 402}}), "rate_limit", "Insufficient"),
        (stream(delta("h"), {"error": {"code": 429, "message": "slow down"}, **delta("", "error")}), "rate_limit", "slow down"),
        ({**reply("h", "error"), "error": {"code": 429, "message": "slow down"}}, "rate_limit", "slow down"),
        (stream(delta("h"), {"error": "model runner has unexpectedly stopped"}), "agent_error", "unexpectedly stopped"),
        (stream(delta(tool_calls=[{"index": 0, "function": {"name": "x"}}]), delta(None, "tool_calls")), "agent_error", "a tool"),
        (stream(delta(refusal="I "), delta(None, "stop", refusal="can't")), "agent_error", "refuses: I can't"),
        ((529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}), "rate_limit", "Overloaded"),
        ((400, {"success": False, "errors": [{"code": 7003, "message": "no such route"}]}), "agent_error", "no such route"),
        ((200, b"not gzip", {"Content-Encoding": "gzip"}), "agent_error", "ended midway"),
        ((200, b""), "agent_error", "expected JSON"),
        ({"error": {"code": "402", "message": "pay first"}}, "rate_limit", "pay first"),
        ((400, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}), "rate_limit", "quota"),
        ({"choices": [{"finish_reason": "error", "error": {"code": 502, "message": "Upstream idle"}, "message": {"content": ""}}]},
         "agent_error", "Upstream idle"),
        ((400, [{"error": {"code": 400, "message": "API key not valid."}}]), "login", "API key not valid"),
        ((401, {"error": {"message": "no"}}), "login", "OPENAI_API_KEY"),
        ((403, {"error": {"message": "Your input was flagged by moderation"}}), "agent_error", "flagged"),
        ((404, {"error": {"message": "model 'm' not found, try pulling it"}}), "agent_error", "try pulling it"),
        ((503, {"error": {"message": "Loading model"}}), "rate_limit", "Loading model"),
        ((307, b"", {"Location": "http://127.0.0.1:9/v1"}), "agent_error", "redirects to http://127.0.0.1:9/v1"),
        ((200, b"<html>Sign in to the captive portal</html>", {"Content-Type": "text/html"}), "agent_error", "captive portal"),
        ((200, b"[" * 100_000), "agent_error", "ends midway"),
        (reply(None, tool_calls=[{"function": {"name": "edit"}}]), "agent_error", "called a tool"),
        (reply(None, refusal="I can't."), "agent_error", "refuses"),
        ((200, b" " * (17 << 20)), "agent_error", "longer than 16 MiB"),
        ((200, gzip.compress(b" " * (300 << 20), 1), {"Content-Encoding": "gzip"}), "agent_error", "longer than 16 MiB"),
    ],
)  # fmt: skip
def test_a_refusal_has_the_name_of_its_meaning(answer: Scripted, failure: str, said: str) -> None:
    error = refused(answer)
    assert error.failure == failure
    assert said in str(error)


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [("0.5", 0.5, 0.5), ("-3", None, None), ("inf", None, None), ("nan", None, None), ("1e12", None, None), ("garbage", None, None),
     ("Wed, 21 Oct 2015 07:28:00 GMT", None, None), ("in 15 minutes", 600, 900), ("6m0s", 360, 360)],
)  # fmt: skip
def test_retry_after_is_a_wait_in_every_form(header: str, low: float | None, high: float | None) -> None:
    if header == "in 15 minutes":
        header = email.utils.formatdate(time.time() + 900, usegmt=True)
    error = refused((429, {"error": {"message": "slow down"}}, {"Retry-After": header}))
    assert error.failure == "rate_limit"
    assert error.wait_seconds is None if low is None or high is None else low <= (error.wait_seconds or 0.0) <= high


def test_a_wait_in_milliseconds_or_as_a_moment_is_read() -> None:
    assert refused((429, {"error": {"message": "slow down"}}, {"Retry-After-Ms": "250"})).wait_seconds == 0.25
    assert refused((429, {"error": {"message": "slow down"}}, {"X-RateLimit-Reset": "6m0s"})).wait_seconds == 360
    inner = {"headers": {"X-RateLimit-Reset": f"{int(time.time() + 900)}000"}}
    assert 600 < (refused({"error": {"message": "slow down", "code": 429, "metadata": inner}}).wait_seconds or 0) <= 900


def test_a_model_that_loads_is_waited_for() -> None:
    with serve(*[(503, {"error": {"message": "Loading model"}})] * 2, reply()) as server:
        assert ask(server.url).text == "hi"


@pytest.mark.parametrize(
    ("options", "said", "check"),
    [
        ({"max_tokens": 9}, "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
         lambda body: body["max_completion_tokens"] == 9 and "max_tokens" not in body),
        ({"temperature": 0.5}, "Unsupported value: 'temperature' does not support 0.5", lambda body: "temperature" not in body),
        ({"temperature": 0.5}, "temperature is deprecated for this model", lambda body: "temperature" not in body),
        ({"max_tokens": 9}, "max_tokens is too large: 9. This model supports at most 5", lambda body: "max_tokens" not in body),
        ({}, "Unrecognized request argument: stream_options", lambda body: "stream_options" not in body and body["stream"]),
        ({}, "Your organization must be verified to stream this model", lambda body: not {"stream", "stream_options"} & set(body)),
        ({}, "System role not supported", ONE_ROLE),
        ({}, "Conversation roles must alternate user/assistant/user/assistant/...", ONE_ROLE),
        ({}, "Developer instruction is not enabled for models/gemma-3", ONE_ROLE),
        ({}, "Unsupported value: 'messages[0].role' does not support 'system' with this model.", ONE_ROLE),
    ],
)  # fmt: skip
def test_what_a_server_does_not_take_is_sent_otherwise(options: dict[str, Any], said: str, check: Callable[[Any], bool]) -> None:
    with serve((400, {"error": {"message": said}}), reply()) as server:
        assert ask(server.url, **options).text == "hi"
    assert check(server.seen[-1][2])
    assert refused((400, {"error": {"message": said}}), **options).failure == "agent_error"  # once


def test_what_a_server_does_not_take_is_left_out_one_by_one() -> None:
    said = ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "Unsupported value: 'temperature'",
            "Unknown parameter: stream_options")  # fmt: skip
    with serve(*((400, {"error": {"message": words}}) for words in said), reply()) as server:
        assert ask(server.url, max_tokens=9, temperature=0.5).text == "hi"
    assert set(server.seen[-1][2]) == {"model", "messages", "stream", "max_completion_tokens"}


# --- silence ------------------------------------------------------------------------------------------------------------


def begins(*lines: str, then: float = 0.0) -> Callable[[Handler], None]:
    """A stream that sends these lines, with a tenth of a second before each, and then nothing for `then` seconds."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for line in lines:
            time.sleep(0.1)
            handler.wfile.write(line.encode())
        time.sleep(then)
        handler.close_connection = True

    return answer


@pytest.mark.parametrize("answer", [lambda handler: time.sleep(3), begins(f"data: {json.dumps(delta('h'))}\n\n", then=3)])
def test_a_server_that_is_alive_and_silent_is_told_from_a_slow_one(answer: Scripted) -> None:
    with serve(answer) as server, pytest.raises(ChatError) as caught:
        ask(server.url, silence=1.0)
    said = str(caught.value)
    assert caught.value.silent
    assert "within 1 s, though it still lists its models: it may hang, restart it" in said
    assert said.endswith("a slow model needs --silence (in a night: --agent-args '--silence 2')")
    assert [path for path, *_ in server.seen] == ["/v1/chat/completions", "/v1/models"], "asked once, and whether it lives"


def test_a_server_that_says_it_is_busy_is_not_silent() -> None:
    with serve(begins(*[": keepalive\n\n"] * 15, f"data: {json.dumps(delta('hi', 'stop'))}\n\n")) as server:
        assert ask(server.url, silence=1.2).text == "hi"


def test_a_long_prompt_may_take_longer_to_be_read() -> None:
    with serve(reply()) as server:
        for characters, seconds in ((0, 120), (90_000, 420), (900_000, 600)):
            endpoint = Endpoint(server.url)
            endpoint.ask("m", [{"role": "user", "content": "x" * characters}])
            assert endpoint._quiet == pytest.approx(seconds, abs=1)


# --- addresses, keys, proxies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "mended"),
    [
        (" http://127.0.0.1:1234/v1/ ", "http://127.0.0.1:1234/v1"),
        ("localhost:1234/v1", "http://localhost:1234/v1"),
        ("127.0.0.1:1234", "http://127.0.0.1:1234"),
        ("192.168.1.7:11434/v1", "http://192.168.1.7:11434/v1"),
        ("openrouter.ai/api/v1", "https://openrouter.ai/api/v1"),
        ("http://x.example/v1/chat/completions/", "http://x.example/v1"),
        ("http://x.example/v1/models", "http://x.example/v1"),
        ("'http://[::1]:8080/v1'", "http://[::1]:8080/v1"),
    ],
)
def test_a_base_url_is_mended_where_its_meaning_is_plain(given: str, mended: str) -> None:
    assert mended_url(given) == mended


@pytest.mark.parametrize("given", ["http://[::1/v1", "http://x.org:abc/v1", "http://x.org/v 1", "", "ftp://x.org", "http://"])
def test_a_base_url_that_means_nothing_is_named(given: str) -> None:
    with pytest.raises(ChatError, match="expected a base URL such as") as caught:
        mended_url(given)
    assert caught.value.failure == "missing"


def test_v1_is_tried_where_the_base_url_lacks_it() -> None:
    def only_v1(handler: Handler) -> None:
        known = handler.path == "/v1/chat/completions"
        handler.send(200, reply() if known else {"error": f"Unexpected endpoint or method. (POST {handler.path})"})

    with serve(only_v1) as server:
        assert ask(server.url.removesuffix("/v1")).text == "hi"
        assert ask(server.url.replace("/v1", "/api")).text == "hi"  # Ollama's own
    with serve((404, b"404 page not found")) as server, pytest.raises(ChatError, match="no more below /v1"):
        ask(server.url.removesuffix("/v1"))


@pytest.mark.parametrize(("models", "said"), [((), "has 0 models"), (("a", "b"), "has 2 models, say which with --model: a, b")])
def test_several_models_are_listed(models: tuple[str, ...], said: str) -> None:
    with serve(reply(), models=models) as server, pytest.raises(ChatError, match=said):
        Endpoint(server.url).only_model()


def test_a_model_beside_an_embedding_is_the_only_one() -> None:
    with serve(reply(), models=("qwen3-coder-30b", "text-embedding-nomic-embed-text-v1.5")) as server:
        assert Endpoint(server.url).only_model() == "qwen3-coder-30b"


@pytest.mark.parametrize(
    "listed",
    [
        [{"id": "m"}], {"data": ["m"]}, {"models": [{"name": "m"}]}, {"data": [{"id": "m"}, {"id": "m"}]},
        {"data": None, "models": [{"name": "m"}]}, [{"id": "m", "type": "chat"}, {"id": "x", "type": "embedding"}],
    ],
)  # fmt: skip
def test_a_list_of_models_is_read_in_every_form(listed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.send(200, listed))
    with serve() as server:
        assert Endpoint(server.url).only_model() == "m"


@pytest.mark.parametrize(
    ("answer", "failure", "said"),
    [
        ((404, {"error": "no"}), "missing", "say which with --model"),
        ((200, b"<html>hello</html>"), "missing", "say which with --model"),
        ((200, {"data": None}), "missing", "has 0 models"), ((401, {"error": "no key"}), "login", "OPENAI_API_KEY"),
    ],
)  # fmt: skip
def test_an_endpoint_that_lists_no_models_is_named(
    answer: Any, failure: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.send(*answer))
    with serve() as server, pytest.raises(ChatError, match=said) as caught:
        Endpoint(server.url).only_model()
    assert caught.value.failure == failure


def test_a_variable_that_is_blank_is_none() -> None:
    assert first_set({"A": " \n", "B": "b"}, "A", "B") == "b"
    assert first_set({"A": ""}, "A", "B") is None


@pytest.mark.parametrize("key", ["sk-secret-123\n", " sk-secret-123 ", "'sk-secret-123'", "Bearer sk-secret-123"])
def test_blanks_around_a_key_are_no_part_of_it(key: str) -> None:
    assert sound_key(key) == "sk-secret-123"


@pytest.mark.parametrize("key", ["sk-sec\nret", "sk-secret…", "sk secret", "sk-\x00secret"])
def test_a_key_that_no_header_can_carry_is_named_and_never_shown(key: str) -> None:
    with pytest.raises(ChatError, match=r"at position \d+ that no header can carry") as caught:
        sound_key(key)
    assert "secret" not in str(caught.value)
    assert caught.value.failure == "login"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "LOCALHOST", "::1"])
def test_no_proxy_stands_between_this_machine_and_itself(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bind = "127.0.0.1" if host.lower() == "localhost" else host
    with serve((502, b"I am the proxy")) as proxy, serve(reply(), host=bind) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        assert ask(server.url.replace(bind, host) if host.lower() == "localhost" else server.url).text == "hi"
        assert proxy.seen == []
        with pytest.raises(ChatError, match="I am the proxy"):  # elsewhere it is used
            ask("http://192.0.2.1/v1")


def test_a_slow_answer_ends_at_the_timeout_and_says_how_to_give_more() -> None:
    def trickle(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.02)

    for answer in (trickle, lambda handler: time.sleep(1.5)):
        began = time.monotonic()
        assert "--agent-args '--timeout 0.8'" in str(refused(answer, timeout=0.4))
        assert time.monotonic() - began < 4


# --- the conversation ---------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_shortened_once_and_the_file_is_not(tmp_path: Path) -> None:
    file = tmp_path / "train_mlx.py"
    file.write_text("LR = 0.1\n" + "X = 1\n" * 300)
    prompt = "# Program\n" + "words of the brief\n" * 1000 + "# What to do now\nMake one change.\n"
    small = (400, {"error": {"message": "request (7000 tokens) exceeds the available context size (4096 tokens)"}})
    block = "<<<<<<< SEARCH\nLR = 0.1\n=======\nLR = 0.2\n>>>>>>> REPLACE\n"
    with serve(small, reply(block)) as server:
        endpoint = Endpoint(server.url)
        done = conversation.edit(lambda messages: endpoint.ask("m", messages), prompt, file)
    assert done.failure is None
    sent = server.seen[-1][2]["messages"][1]["content"]
    assert "characters are left out here" in sent
    assert sent.count("X = 1\n") == 300 - 0
    assert "Make one change." in sent
    with serve(small) as server:
        endpoint = Endpoint(server.url)
        done = conversation.edit(lambda messages: endpoint.ask("m", messages), prompt, file)
    assert done.failure == "missing"
    assert "4,096 tokens" in (done.detail or "")
    assert len(server.seen) == 2


def test_an_empty_answer_is_not_sent_back_and_its_cause_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "train_mlx.py"
    file.write_text("LR = 0.1\n")
    with serve(reply("", "length", reasoning_content="hm"), (400, {"error": {"message": "must not be empty"}})) as server:
        endpoint = Endpoint(server.url)
        done = conversation.edit(lambda messages: endpoint.ask("m", messages), "Improve it.", file)
    assert [message["role"] for message in server.seen[-1][2]["messages"]] == ["system", "user"]
    assert "cut_off: the whole reply went into reasoning" in (done.detail or "")


def test_a_check_asks_with_the_length_of_a_nights_longest_prompt(tmp_path: Path) -> None:
    assert conversation.LARGEST_PROMPT == briefing.CHARACTERS
    file = tmp_path / "train_mlx.py"
    file.write_text("LR = 0.1\n" * 300)
    with serve(reply("1 2 3"), reply("ready")) as server:
        endpoint = Endpoint(server.url)
        done = conversation.check(lambda messages: endpoint.ask("m", messages), "Answer with one word.", file)
    assert len(server.seen[0][2]["messages"][0]["content"]) < 200, "a server that does not answer is found out by a short question"
    assert len(server.seen[1][2]["messages"][1]["content"]) > briefing.CHARACTERS + 2700
    assert (done.message or "").startswith("about ")
    assert file.read_text() == "LR = 0.1\n" * 300
    small = (400, {"error": {"message": "the context size is 4096 tokens"}})
    with serve(reply("1 2 3"), small) as server:
        endpoint = Endpoint(server.url)
        done = conversation.check(lambda messages: endpoint.ask("m", messages), "Answer with one word.", file)
    assert done.failure == "missing"
    assert "4,096 tokens" in (done.detail or "")
