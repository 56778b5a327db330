"""A scripted model on loopback: Anthropic messages, OpenAI chat and responses, and Gemini, with streaming and tools.

It plays one `Script`: it reads the train file and edits it with whatever tools the request offers, then says goodbye;
or it refuses, stalls, or streams without end. Every request is kept in `server.requests`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS_IN, TOKENS_OUT = 1000, 50  # what every answer claims to have used
CLOSING = "Raised the rate.\n\nHYPOTHESIS: a larger step learns faster\nDESCRIPTION: double the learning rate"
CHECK = "Answer with the one word: ready"  # of the prompt before a night
BLOCK = "{path}\n```python\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n```\n\n"
Call = tuple[str, Any]  # tool name, arguments: a dict, or the text of a freeform tool


@dataclass
class Script:
    path: str = "train_mlx.py"
    old: str = "LR = 0.1"
    new: str = "LR = 0.2"
    creates: str = ""  # a further file to write
    edits: bool = True
    status: int = 200
    retry_after: int | str | None = None  # seconds (or a date), in the header and in the text
    lifted: Callable[[], bool] = lambda: False  # whether a refusal is over
    location: str = ""  # of a redirect
    endless: bool = False
    replies: list[str] = field(default_factory=list)  # plain texts, one a request, instead of all of the above


class ModelServer(ThreadingHTTPServer):
    daemon_threads = True

    pages: dict[str, Any] = {}  # noqa: RUF012  what GET answers besides the list of models

    def __init__(self, script: Script, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.closing = script, False
        self.requests: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []  # what was asked before a night, for one word
        self.fetched: list[str] = []  # paths of GET
        self.refused: list[str] = []  # hosts that somebody wanted to reach through this server as a proxy
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> ModelServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed in the middle of a stream is part of the script."""

    @property
    def prompts(self) -> str:
        return "\n".join(json.dumps(request["body"], ensure_ascii=False) for request in self.requests)


# --- the script: which tool to call next -----------------------------------------------------------------------------


def offered_tools(body: dict[str, Any]) -> dict[str, set[str]]:
    """Every tool a request offers, in any of the four protocols: name -> its parameters (none: a freeform tool)."""
    found: dict[str, set[str]] = {}
    for tool in body.get("tools") or []:
        for one in tool.get("functionDeclarations") or tool.get("tools") or [tool.get("function") or tool]:
            schema = one.get("input_schema") or one.get("parameters") or one.get("parametersJsonSchema") or {}
            if one.get("name"):
                found[one["name"]] = set(schema.get("properties") or {})
    return found


def pick(names: set[str], *candidates: str) -> str | None:
    return next((name for name in candidates if name in names), None)


def calls_for(script: Script, tools: dict[str, set[str]]) -> list[Call]:
    """The tool calls that carry out the script, one a turn: read, then edit."""
    calls: list[Call] = []
    for name, has in tools.items():
        path, old, new = (pick(has, *names) for names in (
            ("file_path", "filePath", "path", "absolute_path"),
            ("old_string", "oldString", "old_str"), ("new_string", "newString", "new_str"),
        ))  # fmt: skip
        if path and old and new:
            extra = {"instruction": "edit the file"} if "instruction" in has else {}
            calls.append((name, {path: script.path, old: script.old, new: script.new, **extra}))
            break
    else:
        patch = f"*** Begin Patch\n*** Update File: {script.path}\n@@\n-{script.old}\n+{script.new}\n*** End Patch\n"
        if "apply_patch" in tools:
            calls.append(("apply_patch", {"input": patch} if tools["apply_patch"] else patch))
        elif name := pick(set(tools), "exec_command", "shell_command", "shell"):
            command = f"apply_patch <<'EOF'\n{patch}EOF"
            key = pick(tools[name], "cmd", "command") or "cmd"
            calls.append((name, {key: ["bash", "-lc", command] if name == "shell" else command}))
    for name in ("Read", "read", "read_file", "view"):
        if calls and name in tools and (path := pick(tools[name], "file_path", "filePath", "path", "absolute_path")):
            calls.insert(0, (name, {path: script.path}))
            break
    return calls + ([created] if script.creates and (created := create_call(script.creates, tools)) else [])


def create_call(path: str, tools: dict[str, set[str]]) -> Call | None:
    for name, has in tools.items():
        where, what = pick(has, "file_path", "filePath", "path"), pick(has, "content", "file_text")
        if where and what:
            return name, {where: path, what: "X = 1\n"}
        if key := pick(has, "cmd"):
            return name, {key: f"printf 'X = 1' > {path}"}
    return None


def results_so_far(body: dict[str, Any]) -> int:
    """How many tool results the request carries back: where in the script we are."""
    text = json.dumps(body.get("messages") or body.get("input") or body.get("contents") or [])
    marks = ('"type": "tool_result"', '"role": "tool"', '_call_output"', '"functionResponse"')
    return sum(text.count(mark) for mark in marks)


def next_move(server: ModelServer, body: dict[str, Any]) -> tuple[str, Call | None]:
    """Text, or a tool call."""
    script = server.script
    if CHECK in json.dumps(body):
        return "ready", None
    if script.replies:
        return script.replies.pop(0), None
    calls = calls_for(script, offered_tools(body)) if script.edits else []
    step = results_so_far(body)
    if step < len(calls):
        return "", calls[step]
    if script.edits and not offered_tools(body) and "SEARCH" in json.dumps(body):
        return BLOCK.format(path=script.path, old=script.old, new=script.new) + CLOSING, None
    return CLOSING, None


# --- the protocols: one answer as a whole object, or as server-sent events ---------------------------------------------


def anthropic(text: str, call: Call | None, stream: bool) -> Iterator[tuple[str, Any]]:
    block: dict[str, Any] = {"type": "text", "text": text}
    if call:
        block = {"type": "tool_use", "id": f"toolu_{time.monotonic_ns()}", "name": call[0], "input": call[1]}
    usage = {"input_tokens": TOKENS_IN, "output_tokens": TOKENS_OUT}
    stop = "tool_use" if call else "end_turn"
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "scripted", "content": [block],
               "stop_reason": stop, "stop_sequence": None, "usage": usage}  # fmt: skip
    if not stream:
        yield "", message
        return
    start = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    yield "message_start", {"type": "message_start", "message": start}
    empty = {**block, "input": {}} if call else {**block, "text": ""}
    yield "content_block_start", {"type": "content_block_start", "index": 0, "content_block": empty}
    delta = {"type": "input_json_delta", "partial_json": json.dumps(call[1])} if call else \
        {"type": "text_delta", "text": text}  # fmt: skip
    yield "content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta}
    yield "content_block_stop", {"type": "content_block_stop", "index": 0}
    yield "message_delta", {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None},
                            "usage": {"output_tokens": TOKENS_OUT}}  # fmt: skip
    yield "message_stop", {"type": "message_stop"}


def chat(text: str, call: Call | None, stream: bool) -> Iterator[tuple[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if call:
        function = {"name": call[0], "arguments": json.dumps(call[1])}
        entry = {"index": 0, "id": f"call_{time.monotonic_ns()}", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [entry]}
    usage = {"prompt_tokens": TOKENS_IN, "completion_tokens": TOKENS_OUT, "total_tokens": TOKENS_IN + TOKENS_OUT}
    head = {"id": "chatcmpl-1", "created": 1, "model": "scripted"}
    finish = "tool_calls" if call else "stop"
    if not stream:
        choice = {"index": 0, "message": message, "finish_reason": finish}
        yield "", {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        return
    head["object"] = "chat.completion.chunk"
    yield "", {**head, "choices": [{"index": 0, "delta": message, "finish_reason": None}]}
    yield "", {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    yield "", {**head, "choices": [], "usage": usage}


def responses(text: str, call: Call | None, stream: bool) -> Iterator[tuple[str, Any]]:
    item: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
                            "content": [{"type": "output_text", "text": text, "annotations": []}]}  # fmt: skip
    if call:
        ident = f"call_{time.monotonic_ns()}"
        freeform = isinstance(call[1], str)
        item = {"id": "fc_1", "call_id": ident, "name": call[0], "status": "completed",
                "type": "custom_tool_call" if freeform else "function_call",
                **({"input": call[1]} if freeform else {"arguments": json.dumps(call[1])})}  # fmt: skip
    usage = {"input_tokens": TOKENS_IN, "output_tokens": TOKENS_OUT, "total_tokens": TOKENS_IN + TOKENS_OUT,
             "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}  # fmt: skip
    done = {"id": "resp_1", "object": "response", "status": "completed", "model": "scripted", "output": [item],
            "usage": usage}  # fmt: skip
    if not stream:
        yield "", done
        return
    yield "response.created", {"type": "response.created", "response": {**done, "status": "in_progress", "output": []}}
    yield "response.output_item.added", {"type": "response.output_item.added", "output_index": 0, "item": item}
    if not call:
        yield "response.output_text.delta", {"type": "response.output_text.delta", "item_id": "msg_1",
                                             "output_index": 0, "content_index": 0, "delta": text}  # fmt: skip
    yield "response.output_item.done", {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield "response.completed", {"type": "response.completed", "response": done}


def gemini(text: str, call: Call | None, stream: bool) -> Iterator[tuple[str, Any]]:
    part = {"functionCall": {"name": call[0], "args": call[1]}} if call else {"text": text}
    yield "", {"candidates": [{"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}],
               "usageMetadata": {"promptTokenCount": TOKENS_IN, "candidatesTokenCount": TOKENS_OUT,
                                 "totalTokenCount": TOKENS_IN + TOKENS_OUT},
               "modelVersion": "scripted"}  # fmt: skip


PROTOCOLS = ((re.compile(r"/messages$"), anthropic), (re.compile(r"/chat/completions$"), chat),
             (re.compile(r"/responses$"), responses), (re.compile(r":(stream)?[gG]enerateContent$"), gemini))  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelServer

    def log_message(self, *args: object) -> None:
        """Silent: the requests are kept instead."""

    def do_CONNECT(self) -> None:
        """As a proxy: this server and nothing else. Some clients ask a proxy even for loopback."""
        if self.path == f"127.0.0.1:{self.server.server_address[1]}":
            self.send_response(200)
            self.close_connection = False
            self.end_headers()  # the tunnel's requests follow on this connection, and are answered here
        else:
            self.server.refused.append(self.path)
            self.whole(502, {"error": "nothing but loopback"})

    def do_GET(self) -> None:
        self.server.fetched.append(self.path)
        models = {"object": "list", "data": [{"id": "scripted", "object": "model"}]}
        pages = {"/v1/models": models, "/models": models, "/health": {"status": "ok"}, **self.server.pages}
        page = pages.get(self.path.split("?")[0])
        self.whole(404 if page is None else 200, page or {"error": {"message": "not here"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        path = self.path.split("?")[0]
        kept = self.server.checks if CHECK in json.dumps(body) else self.server.requests
        kept.append({"path": path, "headers": dict(self.headers), "body": body})
        speak = next((speak for pattern, speak in PROTOCOLS if pattern.search(path)), None)
        script = self.server.script
        if path.endswith("count_tokens") or path.endswith(":countTokens"):
            self.whole(200, {"input_tokens": TOKENS_IN, "totalTokens": TOKENS_IN})
        elif speak is None:
            self.whole(404, {"error": {"message": f"the scripted server has no {path}"}})
        elif script.status != 200 and not script.lifted():
            self.refuse(script)
        else:
            stream = bool(body.get("stream")) or "stream" in path
            text, call = next_move(self.server, body) if not script.endless else ("", None)
            events = list(speak("more " if script.endless else text, call, stream))
            if stream or script.endless:
                self.events(events, script.endless)
            else:
                self.whole(200, events[0][1])

    def refuse(self, script: Script) -> None:
        limited = script.status == 429
        message = "Rate limit reached for requests." if limited else "Invalid API key: authentication failed."
        headers = {"Location": script.location} if script.location else {}
        if script.retry_after is not None:
            message += f" Please try again in {script.retry_after}s."
            headers["Retry-After"] = str(script.retry_after)
        kind = "rate_limit_error" if limited else "authentication_error"
        error = {"type": kind, "message": message, "code": script.status,
                 "status": "RESOURCE_EXHAUSTED" if limited else "UNAUTHENTICATED"}  # fmt: skip
        self.whole(script.status, {"type": "error", "error": error}, headers)

    def whole(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def events(self, events: list[tuple[str, Any]], endless: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        deltas = [event for event in events if "delta" in event[0]] or events[:1]
        for name, content in events[: 2 if endless else None]:
            self.event(name, content)
        while endless and not self.server.closing:
            self.event(*deltas[0])
            time.sleep(0.05)
        if "/chat/" in self.path:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def event(self, name: str, content: Any) -> None:
        self.wfile.write((f"event: {name}\n" if name else "").encode() + f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()
