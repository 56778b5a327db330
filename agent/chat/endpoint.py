"""An OpenAI-compatible endpoint: one question, one whole answer, every failure named.

The wire is the `openai` package's: connections, TLS, proxies, compression, timeouts by phase, retries with Retry-After. What stands
here is what answers mean: a model that still loads is waited for, a limit inside a 200 is a limit, a context that is too small says
how large it is, and an answer that ends midway is asked for once more.
"""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agent.coders.coder import Failure
from agent.coders.error_text import LOGIN, LONGEST_WAIT, RATE, wait_seconds
from agent.text import one_line, redact

if TYPE_CHECKING:
    import openai

MAX_BYTES = 16 << 20  # no answer is longer than this; a stream without an end is
CONNECT_SECONDS = 10.0
LOADING_SECONDS = 20.0  # a model that takes longer to load is the driver's to wait for, where a person sees it
INSTALL = f"{sys.executable} -m pip install 'openai>=3.50,<4', or scripts/setup.sh chat"
LARGER_CONTEXT = (
    "load it with a larger one (Ollama: OLLAMA_CONTEXT_LENGTH, LM Studio: Context Length, llama.cpp: -c, vLLM: --max-model-len)"
)

_LOADING = re.compile(r"loading model|model is (?:still |currently )?loading|currently loading|still loading|warming up", re.I)
_MODERATED = re.compile(r"flagged|moderat|content.?(?:policy|filter)|safety", re.I)
_CONTEXT = re.compile(
    r"context|num_ctx|n_ctx|max(?:imum)?[ _-](?:model|sequence|input|prompt)[ _-]?len|too many (?:input )?tokens"
    r"|(?:prompt|input|request|payload)(?: entity)?(?: is)? too (?:long|large)|input length|exceed.{0,30}\btokens\b",
    re.I,
)
_NUMBER = r"(\d{1,3}(?:,\d{3})+|\d{3,8})\b"
_CONTEXT_SIZE = re.compile(
    r"(?:n_ctx|num_ctx|max_model_len|context (?:size|length|window)|maximum (?:context |model |input |prompt )?(?:length|tokens))"
    rf"\D{{0,30}}?{_NUMBER}|{_NUMBER} maximum|limit:? (?:is |of )?{_NUMBER}",
    re.I,
)
_NOT_FOR_CHAT = re.compile(r"embed|rerank|whisper|\btts\b|bge-|e5-|clip|moderation|dall-e|stable-diffusion", re.I)
_TOO_MUCH = re.compile(r"/(?:chat/completions|chat|completions|models|responses|embeddings|messages)/*\Z")
_UNKNOWN_PATH = re.compile(r"unexpected endpoint|not found|no route|cannot (?:post|get)|unknown (?:path|url)", re.I)


class ChatError(Exception):
    """An endpoint that gave no answer.

    `wait_seconds` belongs to `rate_limit`, where the endpoint says it. `too_small` is True for a prompt that the context can't
    hold; then `context` and `sent` are in tokens, None where the server told no number."""

    def __init__(
        self, failure: Failure, message: str, wait_seconds: float | None = None, *, status: int | None = None, said: str = "",
        too_small: bool = False, context: int | None = None, sent: int | None = None, loading: bool = False, midway: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(redact(one_line(message, 1000)))
        self.failure: Failure = failure
        self.wait_seconds = wait_seconds
        self.status, self.said = status, said
        self.too_small, self.context, self.sent = too_small, context, sent
        self.loading = loading
        self.midway = midway  # cut off on the way: worth asking again


@dataclass(frozen=True)
class Answer:
    text: str
    tokens_in: int | None
    tokens_out: int | None
    cut_off: bool  # by its length
    reasoning: str = ""  # what the server keeps beside the text
    seconds: float = 0.0  # from the question to the whole answer


@dataclass
class Endpoint:
    """`base_url` is mended where its meaning is plain: without a scheme, without `/v1`, with the path of a request."""

    base_url: str
    key: str | None = None
    timeout: float = 600.0  # seconds for a whole answer
    max_tokens: int | None = None
    temperature: float | None = None
    _mended: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base_url = mended_url(self.base_url)
        self.key = sound_key(self.key)
        self._until = math.inf
        self._new_client().close()  # what can't work is told before anything is asked

    def ask(self, model: str, messages: list[dict[str, str]]) -> Answer:
        """The answer to `messages`. Raises ChatError."""
        body: dict[str, Any] = {"model": model, "messages": messages, "stream": False}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        began, again = time.monotonic(), True
        while True:
            try:
                answer = read_answer(self._request("chat/completions", self._adapted(body)), self.shown)
                return Answer(**{**answer.__dict__, "seconds": time.monotonic() - began})
            except ChatError as error:
                if self._adapt(error, body):
                    continue
                if not (error.midway and again):
                    raise
                again = False

    def only_model(self) -> str:
        """The endpoint's model, if it has exactly one that chats. Raises ChatError, which lists what there is."""
        reply = self._request("models", None)
        listed = reply.get("data", reply.get("models")) if isinstance(reply, dict) else reply
        if not isinstance(listed, list):
            raise _refused(None, reply, {}, self.shown) if isinstance(reply, dict) and reply.get("error") else ChatError(
                "missing", f"{self.shown}/models lists no models, got {str(reply)[:200]}; say which with --model"
            )  # fmt: skip
        names = [str(item.get("id") or item.get("name")) for item in listed if isinstance(item, dict)]
        chatting = [name for name in names if not _NOT_FOR_CHAT.search(name)]
        if len(chatting) != 1:
            there = f": {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else "; is one loaded?"
            raise ChatError("missing", f"{self.shown} has {len(names)} models, say which with --model{there}")
        return chatting[0]

    @property
    def shown(self) -> str:
        """The base URL without a name and password in it."""
        return re.sub(r"//[^/@]*@", "//", self.base_url)

    # --- one request ----------------------------------------------------------------------------------------------------

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of an answer. A server whose model still loads is asked again for LOADING_SECONDS."""
        patience, pause = time.monotonic() + LOADING_SECONDS, 0.5
        while True:
            try:
                return self._versioned(path, body)
            except ChatError as error:
                pause = error.wait_seconds or min(2 * pause, 5.0)
                if not error.loading or time.monotonic() + pause > patience:
                    raise
                time.sleep(pause)

    def _versioned(self, path: str, body: dict[str, Any] | None) -> Any:
        """As `_once`; a server that knows no such path is asked below /v1 as well, if the base URL has no version."""
        try:
            return self._once(path, body)
        except ChatError as error:
            versioned = re.search(r"/v\d", urlsplit(self.base_url).path) or "model" in error.said.lower()
            if versioned or not (error.status in (404, 405) or _UNKNOWN_PATH.search(error.said)):
                raise
            first, base = error, self.base_url
        self.base_url = base + "/v1"
        try:
            return self._once(path, body)
        except ChatError as error:
            if error.status in (404, 405) or _UNKNOWN_PATH.search(error.said):
                self.base_url = base
                raise ChatError("missing", f"{first}; and no more below /v1 (most base URLs end with /v1)") from None
            raise

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        import httpx2
        import openai

        url = f"{self.shown}/{path}"
        self._until = time.monotonic() + self.timeout
        headers: dict[str, Any] = {} if self.key else {"Authorization": openai.Omit()}
        try:
            with self._new_client() as client:
                if body is None:
                    response = client.models.with_raw_response.list(extra_headers=headers).http_response
                else:
                    response = client.chat.completions.with_raw_response.create(**body, extra_headers=headers).http_response
        except openai.APITimeoutError as error:
            if "Connect" in type(error.__cause__).__name__:
                raise ChatError("agent_error", f"can't reach {url} within {CONNECT_SECONDS:g} s; is the server running?") from None
            raise self._late(url) from None
        except openai.APIConnectionError as error:
            raise _unreachable(error.__cause__ or error, url) from None
        except openai.APIStatusError as error:
            raise _refused(error.status_code, _words(error.response), error.response.headers, url) from None
        except (openai.OpenAIError, httpx2.HTTPError, httpx2.InvalidURL, UnicodeError, ValueError) as error:
            raise ChatError("agent_error", f"can't ask {url}: {type(error).__name__}: {error}") from None
        content = _json(response)
        if isinstance(content, (str, bytes)):
            text = content if isinstance(content, str) else ""
            if text.lstrip().startswith(("{", "[")):
                raise ChatError("agent_error", f"the answer from {url} ends midway: {text[-200:]!r}", midway=True)
            page = " ".join(re.sub(r"<[^>]{0,500}>", " ", text[:20_000]).split())
            raise ChatError("agent_error", f"expected JSON from {url}, got {page[:300]!r}", said=page[:300])
        refusal = content.get("error") if isinstance(content, dict) else None
        if refusal and not content.get("choices"):
            raise _refused(None, content, response.headers, url)
        return content

    def _late(self, url: str) -> ChatError:
        return ChatError(
            "agent_error", f"no whole answer from {url} within {self.timeout:g} s; a slow model needs --timeout (in a night: "
            f"--agent-args '--timeout {2 * self.timeout:g}')"
        )  # fmt: skip

    def _new_client(self) -> openai.OpenAI:
        try:
            import httpx2
            import openai
        except ImportError as error:
            raise ChatError("missing", f"the package openai is needed to ask a model ({error}); install it: {INSTALL}") from None
        endpoint = self

        class Bounded(httpx2.SyncByteStream):
            """A body that ends with ChatError past the deadline, or when it is too long."""

            def __init__(self, stream: Any, limit: int) -> None:
                self.stream, self.limit = stream, limit

            def __iter__(self) -> Iterator[bytes]:
                received = 0
                for chunk in self.stream:
                    received += len(chunk)
                    if received > self.limit:
                        raise ChatError("agent_error", f"the answer is longer than {MAX_BYTES >> 20} MiB: a stream without an end?")
                    endpoint._in_time()
                    yield chunk

            def close(self) -> None:
                self.stream.close()

        def bound(response: Any) -> None:
            packed = "content-encoding" in response.headers  # may grow a thousandfold
            response.stream = Bounded(response.stream, MAX_BYTES >> 6 if packed else MAX_BYTES)

        parts = urlsplit(self.base_url)
        direct: dict[str, Any] = {}
        if is_loopback(parts.hostname or ""):  # a proxy can't reach this machine's loopback
            direct = {f"all://{f'[{parts.hostname}]' if ':' in (parts.hostname or '') else parts.hostname}": None}
        timeout = openai.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout))
        try:
            wire = openai.DefaultHttpxClient(
                timeout=timeout, follow_redirects=False, mounts=direct,  # a redirect would carry the prompt to another host
                event_hooks={"request": [lambda request: endpoint._in_time()], "response": [bound]},
            )  # fmt: skip
            return openai.OpenAI(
                base_url=self.base_url, api_key=self.key or "none", timeout=timeout, max_retries=1, http_client=wire,
                default_headers={"User-Agent": "autoresearch"},
            )  # fmt: skip
        except (openai.OpenAIError, httpx2.InvalidURL, ValueError) as error:  # proxies of the environment count, too
            raise ChatError("missing", f"can't ask {self.shown}: {type(error).__name__}: {error}") from None

    def _in_time(self) -> None:
        if time.monotonic() > self._until:
            raise self._late(self.shown)

    # --- what some servers don't take -----------------------------------------------------------------------------------

    def _adapted(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request as this server has been found to take it."""
        made = {key: value for key, value in body.items() if self._mended.get(key) is not False}
        if self._mended.get("max_completion_tokens") and "max_tokens" in body:
            made["max_completion_tokens"] = body["max_tokens"]
        if self._mended.get("system") is False and body["messages"][0]["role"] == "system":
            system, first, *rest = body["messages"]
            made["messages"] = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        return made

    def _adapt(self, error: ChatError, body: dict[str, Any]) -> bool:
        """Whether the refusal names something that can be sent otherwise, and wasn't yet."""
        said = error.said.lower()
        if error.too_small or error.failure != "agent_error" or ("support" not in said and "not allowed" not in said):
            return False
        changes: dict[str, Any] = {}
        if "max_tokens" in said and "max_completion_tokens" in said and "max_tokens" in body:
            changes = {"max_tokens": False, "max_completion_tokens": True}
        elif "temperature" in said and "temperature" in body:
            changes = {"temperature": False}
        elif "system" in said and ("role" in said or "message" in said or "prompt" in said):
            changes = {"system": False}
        if not changes or changes.items() <= self._mended.items():
            return False
        self._mended |= changes
        return True


# --- addresses and keys --------------------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    if host.lower().rstrip(".") == "localhost":
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return False


def mended_url(given: str) -> str:
    """A base URL as it was meant. Raises ChatError where that can't be known."""
    url = given.strip().strip("'\"").strip()
    expected = f"expected a base URL such as http://127.0.0.1:1234/v1, got {re.sub(r'//[^/@]*@', '//', given)!r}"
    if "://" not in url:
        host = url.split("/")[0].rsplit(":", 1)[0].strip("[]")
        url = f"{'http' if _is_near(host) else 'https'}://{url}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ChatError("missing", f"{expected}: {error}") from None
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\\]", url) or not url.isprintable():
        raise ChatError("missing", expected)
    if not (is_loopback(host) or "." in host or ":" in host or port or "://" in given):
        raise ChatError("missing", expected)
    while url != (shorter := _TOO_MUCH.sub("", url.rstrip("/"))):
        url = shorter
    return url


def _is_near(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_private
    return host.lower() == "localhost" or "." not in host or host.endswith(".local")


def sound_key(given: str | None) -> str | None:
    """A key as a header can carry it: blanks and line ends around it are left out. Raises ChatError, which never shows the key."""
    key = (given or "").strip().strip("'\"")
    if key.lower().startswith("bearer "):
        key = key[7:].strip()
    bad = next((at for at, char in enumerate(key) if not "!" <= char <= "~"), None)
    if bad is not None:
        raise ChatError(
            "login", f"the key has a character at position {bad + 1} that no header can carry (U+{ord(key[bad]):04X}); copy it "
            "again into AUTORESEARCH_API_KEY or OPENAI_API_KEY"
        )  # fmt: skip
    return key or None


def key_from(environ: Mapping[str, str]) -> str | None:
    return environ.get("AUTORESEARCH_API_KEY") or environ.get("OPENAI_API_KEY")


# --- what an answer means ------------------------------------------------------------------------------------------------


def read_answer(reply: Any, url: str = "the endpoint") -> Answer:
    """The text, the reasoning and the tokens of a whole answer, whatever is missing or odd in it. Raises ChatError."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    if choice is None:
        raise ChatError("agent_error", f"expected choices[0].message in the answer, got {str(reply)[:300]}")
    finish = choice.get("finish_reason")
    if choice.get("error") or finish == "error":
        raise _refused(None, choice if choice.get("error") else {"error": "the provider ended the answer"}, {}, url)
    message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
    if isinstance(message, str):
        message = {"content": message}
    if not isinstance(message, dict):
        raise ChatError("agent_error", f"expected choices[0].message in the answer, got {str(reply)[:300]}")
    text, thought = _text(message.get("content"))
    reasoning = [thought, *(_text(message.get(key))[0] for key in ("reasoning_content", "reasoning", "thinking"))]
    if not text.strip() and isinstance(message.get("refusal"), str) and message["refusal"].strip():
        raise ChatError("agent_error", f"the model refuses: {message['refusal'][:300]}")
    if not text.strip() and message.get("tool_calls"):
        raise ChatError("agent_error", f"the model called a tool instead of answering: {str(message['tool_calls'])[:200]}")
    if finish == "content_filter":
        raise ChatError("agent_error", "the provider's content filter ended the answer")
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    return Answer(
        text, _count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        _count(usage.get("completion_tokens", usage.get("output_tokens"))),
        cut_off=finish in ("length", "max_tokens", "MAX_TOKENS"), reasoning="\n".join(filter(None, reasoning)),
    )  # fmt: skip


def _text(content: Any) -> tuple[str, str]:
    """Text and thoughts of a message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content, ""
    text: list[str] = []
    thought: list[str] = []
    for part in content if isinstance(content, list) else []:
        if isinstance(part, str):
            text.append(part)
        elif isinstance(part, dict):
            thinks = "think" in str(part.get("type")) or "reason" in str(part.get("type"))
            inner = part.get("text") or part.get("thinking") or part.get("content")
            inner = inner if isinstance(inner, str) else _text(inner)[0]
            (thought if thinks else text).append(inner)
    return "".join(text), "".join(thought)


def _count(value: Any) -> int | None:
    """A number of tokens; None for what is none."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and 0 <= float(value) < 1e9:
            return int(float(value))
    return None


def _json(response: Any) -> Any:
    """A response's content: parsed JSON, events joined to one answer, or its text where it is neither."""
    text = response.content.decode("utf-8-sig", "replace").strip()
    if "event-stream" in response.headers.get("content-type", "") or re.match(r"(?:data|event|id|retry)?:", text):
        return _joined(text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _words(response: Any) -> Any:
    """The content of a refusal, which may be anything."""
    try:
        return _json(response)
    except ChatError:
        return response.text


def _joined(text: str) -> Any:
    """Server-sent events, which some servers send though nobody asked, as the one answer they make. Raises ChatError."""
    import httpx2

    raw = text.encode("utf-8", "replace") + b"\n\n"
    response = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=raw, request=httpx2.Request("POST", "/"))
    content, reasoning, finish, usage, ended, last = [], [], None, None, False, ""
    with contextlib.suppress(httpx2.SSEError):
        for event in httpx2.EventSource(response):
            last = event.data.strip()
            if last == "[DONE]":
                ended = True
                break
            try:
                item = json.loads(last)
            except (ValueError, RecursionError):
                continue
            if not isinstance(item, dict):
                continue
            if item.get("error"):
                return item
            usage = item.get("usage") or usage
            choices = item.get("choices")
            choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
            if choice.get("error"):
                return {"choices": [choice]}
            finish = choice.get("finish_reason") or finish
            delta = choice.get("delta") or choice.get("message")
            if isinstance(delta, dict):
                said, thought = _text(delta.get("content"))
                content.append(said)
                reasoning += [thought, *(_text(delta.get(key))[0] for key in ("reasoning_content", "reasoning"))]
    if not (ended or finish):
        raise ChatError("agent_error", f"the stream of the answer ends midway: {last[-200:]!r}", midway=True)
    message = {"content": "".join(content), "reasoning": "".join(reasoning)}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


# --- what a refusal means ------------------------------------------------------------------------------------------------


def _said(body: Any) -> tuple[str, dict[str, Any]]:
    """A refusal's own words, and the object they stand in; whatever shape a server gives it."""
    while isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, dict):
        return " ".join(re.sub(r"<[^>]{0,500}>", " ", str(body)[:20_000]).split()), {}
    inner = body.get("error", body.get("errors"))
    while isinstance(inner, list) and inner:
        inner = inner[0]
    if isinstance(inner, str):
        return inner, body
    found = inner if isinstance(inner, dict) else body
    words = next((found[key] for key in ("message", "detail", "error", "msg") if found.get(key)), json.dumps(found)[:500])
    metadata = found.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("raw"), str):  # a router's, with the provider's words
        words = f"{words}: {metadata['raw']}"
    return (words if isinstance(words, str) else json.dumps(words)[:500]), found


def _refused(status: int | None, body: Any, headers: Any, url: str) -> ChatError:
    """The failure that a refusal is, with a status or inside a 200."""
    said, found = _said(body)
    code = _count(found.get("code"))
    if code is None or not 400 <= code < 600:
        code = _count(found.get("status_code"))
    meant = code if status is None and code and 400 <= code < 600 else status
    kind = " ".join(str(found.get(key) or "") for key in ("code", "type", "status"))
    detail = f"{meant or 'an error'} from {url}: {said[:500] or 'no words'}"

    def failed(failure: Failure, more: str = "", **facts: Any) -> ChatError:
        return ChatError(failure, detail + more, facts.pop("wait_seconds", None), status=meant, said=said[:2000], **facts)

    if meant and 300 <= meant < 400:
        return failed("agent_error", f"; it redirects to {headers.get('Location')}: give that as --base-url if you trust it")
    limited = meant == 429 or RATE.search(f"{kind} {said}") is not None
    size, sent = _sizes(said, found)
    too_much = size is not None and sent is not None and sent > size  # a limit of tokens a minute that no wait will lift
    context = _CONTEXT.search(f"{kind.replace('_', ' ')} {said}") is not None
    if meant not in (401, 402, 403) and ((context and not limited) or meant == 413 or (limited and too_much)):
        return failed("agent_error", too_small=True, context=size, sent=sent)
    if meant == 503 or _LOADING.search(said):
        wait = _wait(found, headers, said)
        return failed("rate_limit", "; a server that loads a model, or has no room", wait_seconds=wait, loading=True)
    if meant in (402, 429, 529) or (limited and meant not in (401, 404)):
        return failed("rate_limit", wait_seconds=_wait(found, headers, said))
    if meant == 403 and _MODERATED.search(said):
        return failed("agent_error")
    if meant in (401, 403) or (meant in (None, 400) and LOGIN.search(f"{kind} {said}")):
        return failed("login", "; expected a valid key in AUTORESEARCH_API_KEY or OPENAI_API_KEY")
    if meant == 404 or meant == 405:
        return failed("agent_error", "; is the base URL complete (most end with /v1), and is the model there?")
    return failed("agent_error")


def _sizes(said: str, found: dict[str, Any]) -> tuple[int | None, int | None]:
    """The context's size and the prompt's, in tokens, where a refusal tells them."""
    size, sent = _count(found.get("n_ctx")), _count(found.get("n_prompt_tokens"))
    if size is None and (hit := _CONTEXT_SIZE.search(said[:2000])):
        size = int(next(group for group in hit.groups() if group).replace(",", ""))
    others = [int(number.replace(",", "")) for number in re.findall(rf"\b{_NUMBER}", said[:2000])]
    larger = [number for number in others if size is not None and size < number < 100 * size]
    return size, sent or (min(larger) if larger else None)


def _wait(found: dict[str, Any], headers: Any, said: str) -> float | None:
    """Seconds to wait, where the refusal says so in a header or in words; None for what can't be a wait."""
    metadata = found.get("metadata")
    inner = metadata.get("headers") if isinstance(metadata, dict) else None
    for source in (headers, {str(key).lower(): value for key, value in inner.items()} if isinstance(inner, dict) else {}):
        for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0), ("x-ratelimit-reset", 1.0)):
            with contextlib.suppress(TypeError, ValueError, AttributeError):
                if (wait := _seconds(str(source.get(name) or ""), unit)) is not None:
                    return wait
    return wait_seconds(f"{said} {json.dumps(found)[:5000]}")


def _seconds(value: str, unit: float) -> float | None:
    """Seconds of a header: a number, a date, or a moment as a Unix time in seconds or milliseconds."""
    now = time.time()
    try:
        number = float(value) * unit
        if number > 1e11:
            number /= 1000
        wait = number - now if number > 1e8 else number
    except ValueError:
        if not value:
            return None
        wait = email.utils.parsedate_to_datetime(value).timestamp() - now
        wait = 1.0 if -3600 < wait <= 0 else wait  # a moment that has just passed: soon
    return wait if math.isfinite(wait) and 0 < wait <= LONGEST_WAIT else None


def _unreachable(error: BaseException, url: str) -> ChatError:
    reason = f"{error}" or type(error).__name__
    if "CERTIFICATE" in reason.upper():
        advice = "name the file of the certificate's authority in SSL_CERT_FILE"
    elif "SSL" in reason:
        advice = "the server may speak http, not https"
    elif type(error).__name__ in ("RemoteProtocolError", "ReadError", "WriteError", "CloseError", "DecodingError"):
        return ChatError("agent_error", f"the connection to {url} ended midway, twice: {reason}")
    elif "Proxy" in type(error).__name__ or "proxy" in reason.lower():
        advice = "see the variables HTTPS_PROXY, ALL_PROXY and NO_PROXY"
    else:
        advice = "is the server running?"
    return ChatError("agent_error", f"can't reach {url}: {reason}; {advice}")
