"""An OpenAI-compatible endpoint: one question, one whole answer, every failure named.

The wire is the `openai` package's: connections, TLS, proxies, compression, timeouts by phase, retries with Retry-After. What stands
here is what answers mean: a model that still loads is waited for, a limit inside a 200 is a limit, a context that is too small says
how large it is, and an answer that ends midway is asked for once more. Answers are streamed, so that a server that has stopped is
told from one that is slow; a server that sends a whole answer instead is read as well.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agent.coders.coder import Failure
from agent.coders.error_text import LOGIN, RATE, wait_seconds
from agent.text import one_line, redact

if TYPE_CHECKING:
    import openai

MAX_BYTES = 16 << 20  # no answer is longer than this; a stream without an end is
CONNECT_SECONDS = 10.0
ALIVE_SECONDS = 5.0  # for the list of models, asked of a server that has stopped answering
SILENT_SECONDS = 120.0  # without a byte of an answer, and a second more for each READ_CHARACTERS of the prompt
READ_CHARACTERS = 300  # about 100 tokens: the slowest reading that is waited for
LOADING_SECONDS = 20.0  # a model that takes longer to load is the driver's to wait for, where a person sees it
INSTALL = f"{sys.executable} -m pip install 'openai>=3.50,<4', or scripts/setup.sh chat"
LARGER_CONTEXT = (
    "load it with a larger one (Ollama: OLLAMA_CONTEXT_LENGTH, LM Studio: Context Length, llama.cpp: -c, vLLM: --max-model-len)"
)

_LOADING = re.compile(r"loading model|model is (?:still |currently )?loading|currently loading|still loading|warming up", re.I)
_MODERATED = re.compile(r"flagged|moderat|content.?(?:policy|filter)|safety", re.I)
_CONTEXT = re.compile(
    r"context|num_ctx|n_ctx|max(?:imum)?[ _-](?:model|sequence|input|prompt)[ _-]?len|too many (?:input )?tokens"
    r"|(?:prompt|input|request|payload)(?: entity)?(?: is)? too (?:long|large)|input length|exceed.{0,30}\btokens\b"
    r"|max_tokens must be at least",  # what a prompt leaves of vLLM's context
    re.I,
)
_NUMBER = r"(\d{1,3}(?:,\d{3})+|\d{3,8})\b"
_CONTEXT_SIZE = re.compile(
    r"(?:n_ctx|num_ctx|max_model_len|context (?:size|length|window)|maximum (?:context |model |input |prompt )?(?:length|tokens))"
    rf"\D{{0,30}}?{_NUMBER}|{_NUMBER} maximum|limit:? (?:is |of )?{_NUMBER}|tokens allowed \(?{_NUMBER}",
    re.I,
)
_NOT_FOR_CHAT = re.compile(r"embed|rerank|whisper|\btts\b|bge-|e5-|clip|moderation|dall-e|stable-diffusion", re.I)
_TOO_MUCH = re.compile(r"/(?:chat/completions|chat|completions|models|responses|embeddings|messages)/*\Z")
_UNKNOWN_PATH = re.compile(r"unexpected endpoint|not found|no route|cannot (?:post|get)|unknown (?:path|url)", re.I)
_EVENTS = re.compile(r"(?:data|event|id|retry|error)?:")  # how a stream of events begins
# What some servers refuse, by the words of their refusals; the request goes without it then.
_REFUSED = {
    "stream_options": re.compile(r"stream_options"),
    "stream": re.compile(r"\bstream(?:ing)?\b(?!_)"),
    "temperature": re.compile(r"temperature"),
    "max_completion_tokens": re.compile(r"max_(?:completion_)?tokens"),
    "max_tokens": re.compile(r"max_tokens"),
    "system": re.compile(r"system (?:role|message|prompt)|'system'|developer instruction|roles must alternate"),
}


@dataclass(eq=False)
class ChatError(Exception):
    """An endpoint that gave no answer."""

    failure: Failure
    message: str
    wait_seconds: float | None = None  # with `rate_limit`, where the endpoint says it
    status: int | None = None
    said: str = ""  # by the server
    too_small: bool = False  # the context can't hold the prompt
    context: int | None = None  # tokens, where the server tells both
    sent: int | None = None
    loading: bool = False
    midway: bool = False  # cut off on the way: worth asking again
    silent: bool = False  # the server took the prompt and sent nothing, or nothing more

    def __post_init__(self) -> None:
        self.message = redact(one_line(self.message, 1000))

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Answer:
    text: str
    tokens_in: int | None
    tokens_out: int | None
    cut_off: bool  # by its length
    reasoning: str = ""  # what the server keeps beside the text
    seconds: float = 0.0  # from the question to the whole answer
    first: float = 0.0  # from the question to its first event; `seconds` of an answer that came as a whole


@dataclass
class Endpoint:
    """`base_url` is mended where its meaning is plain: without a scheme, without `/v1`, with the path of a request."""

    base_url: str
    key: str | None = None
    timeout: float = 600.0  # seconds for a whole answer
    max_tokens: int | None = None
    temperature: float | None = None
    silence: float | None = None  # seconds without a byte of an answer; None: SILENT_SECONDS, and more for a long prompt
    _refused: set[str] = field(default_factory=set)  # what this server was found not to take
    _probes: bool = True  # whether a server that is late is asked for its models, to see whether it lives

    def __post_init__(self) -> None:
        self.base_url = mended_url(self.base_url)
        self.key = sound_key(self.key)
        self._began, self._first, self._quiet = 0.0, 0.0, min(self.timeout, self.silence or SILENT_SECONDS)
        self._new_client().close()  # what can't work is told before anything is asked

    def ask(self, model: str, messages: list[dict[str, str]]) -> Answer:
        """The answer to `messages`. Raises ChatError."""
        size = sum(len(message["content"]) for message in messages)
        self._quiet = min(self.timeout, self.silence or SILENT_SECONDS + size / READ_CHARACTERS)
        again = True
        while True:
            body = self._body(model, messages)
            began = time.monotonic()
            try:
                answer = read_answer(self._request("chat/completions", body), self.shown)
                now = time.monotonic()
                return replace(answer, seconds=now - began, first=(self._first or now) - began)
            except ChatError as error:
                if self._can_do_without(error, body):
                    continue
                if not (error.midway and again):
                    raise
                again = False

    def only_model(self) -> str:
        """The endpoint's model, if it has exactly one that chats. Raises ChatError, which lists what there is."""
        try:
            reply = self._request("models", None)
        except ChatError as error:
            if error.status in (404, 405, 501) or (error.status is None and error.said):
                raise ChatError("missing", f"{error}; it lists no models: say which with --model") from None
            raise
        listed = (reply.get("data") or reply.get("models") or []) if isinstance(reply, dict) else reply
        names: dict[str, str] = {}  # and what the server says of their kind
        for item in listed if isinstance(listed, list) else []:
            known = item if isinstance(item, dict) else {"id": item}
            names[str(known.get("id") or known.get("name"))] = str(known.get("type"))
        chatting = [name for name, kind in names.items() if not _NOT_FOR_CHAT.search(f"{name} {kind}")]
        if len(chatting) != 1:
            there = f": {', '.join([*names][:20])}{', ...' if len(names) > 20 else ''}" if names else "; is one loaded?"
            raise ChatError("missing", f"{self.shown} has {len(names)} models, say which with --model{there}")
        return chatting[0]

    @property
    def shown(self) -> str:
        """The base URL without a name and password in it."""
        return re.sub(r"//[^/@]*@", "//", self.base_url)

    # --- one request ----------------------------------------------------------------------------------------------------

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of an answer. A server whose model still loads is asked again for LOADING_SECONDS."""
        patience, pause = 0.0, 0.5
        while True:
            try:
                return self._versioned(path, body)
            except ChatError as error:
                patience = patience or time.monotonic() + LOADING_SECONDS
                if not error.loading or time.monotonic() > patience:
                    raise
                pause = min(error.wait_seconds or 2 * pause, 5.0)
                time.sleep(pause)

    def _versioned(self, path: str, body: dict[str, Any] | None) -> Any:
        """As `_once`; a server that knows no such path is asked below /v1 as well, if the base URL has no version."""
        bases = [self.base_url]
        if not re.search(r"/v\d", urlsplit(self.base_url).path):
            bases += [f"{self.base_url}/v1", *([f"{self.base_url[:-4]}/v1"] if self.base_url.endswith("/api") else [])]
        errors: list[ChatError] = []
        for self.base_url in bases:
            try:
                return self._once(path, body)
            except ChatError as error:
                if "model" in error.said.lower() or not (error.status in (404, 405) or _UNKNOWN_PATH.search(error.said)):
                    raise
                errors.append(error)
        self.base_url = bases[0]
        if len(bases) == 1:
            raise errors[0]
        raise replace(errors[0], failure="missing", message=f"{errors[0]}; and no more below /v1 (most base URLs end with /v1)")

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        import httpx2
        import openai

        url = f"{self.shown}/{path}"
        self._began, self._first, sent = time.monotonic(), 0.0, False
        headers: dict[str, Any] = {} if self.key else {"Authorization": openai.Omit()}
        try:
            with self._new_client() as client:
                if body is None:
                    response = client.models.with_raw_response.list(extra_headers=headers).http_response
                else:
                    response = client.chat.completions.with_raw_response.create(**body, extra_headers=headers).http_response
                sent = True
                response.read()
        except openai.APIStatusError as error:
            raise _refused(error.status_code, _content(error.response), error.response.headers, url) from None
        except (openai.APIConnectionError, httpx2.TransportError, httpx2.DecodingError) as error:
            cause = error if sent else error.__cause__ or error
            if isinstance(cause, httpx2.ConnectTimeout):
                raise ChatError("agent_error", f"can't reach {url} within {CONNECT_SECONDS:g} s; is the server running?") from None
            if isinstance(cause, httpx2.TimeoutException):
                raise self._late(url) from None
            raise _unreachable(cause, url, sent) from None
        except (openai.OpenAIError, httpx2.HTTPError, httpx2.InvalidURL, UnicodeError, ValueError) as error:
            raise ChatError("agent_error", f"can't ask {url}: {type(error).__name__}: {error}") from None
        content = _content(response)
        if isinstance(content, str):
            if content.startswith(("{", "[")) or _EVENTS.match(content):
                raise ChatError("agent_error", f"the answer from {url} ends midway: {content[-200:]!r}", midway=True)
            page = _without_tags(content)[:300]
            raise ChatError("agent_error", f"expected JSON from {url}, got {page!r}", said=page or "nothing")
        if isinstance(content, dict) and content.get("error") and not content.get("choices"):
            raise _refused(None, content, response.headers, url)
        return content

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
                    if time.monotonic() - endpoint._began > endpoint.timeout:
                        raise endpoint._late(endpoint.shown, silent=False)
                    if not endpoint._first and b"data:" in chunk:
                        endpoint._first = time.monotonic()
                    yield chunk

            def close(self) -> None:
                self.stream.close()

        def bound(response: Any) -> None:
            packed = "content-encoding" in response.headers  # may grow a thousandfold
            response.stream = Bounded(response.stream, MAX_BYTES >> 6 if packed else MAX_BYTES)

        def in_time(request: Any) -> None:  # the package would send a prompt again that was not answered
            if time.monotonic() - self._began > 0.9 * self._quiet:
                raise self._late(self.shown)

        parts = urlsplit(self.base_url)
        direct: dict[str, Any] = {}
        if is_loopback(parts.hostname or ""):  # a proxy can't reach this machine's loopback
            direct = {f"all://{f'[{parts.hostname}]' if ':' in (parts.hostname or '') else parts.hostname}": None}
        timeout = openai.Timeout(self._quiet, connect=min(CONNECT_SECONDS, self.timeout))
        try:
            wire = openai.DefaultHttpxClient(
                timeout=timeout, follow_redirects=False, mounts=direct,  # a redirect would carry the prompt to another host
                event_hooks={"request": [in_time], "response": [bound]},
            )  # fmt: skip
            return openai.OpenAI(
                base_url=self.base_url, api_key=self.key or "none", timeout=timeout, max_retries=1, http_client=wire,
                default_headers={"User-Agent": "autoresearch"},
            )  # fmt: skip
        except (openai.OpenAIError, httpx2.InvalidURL, ValueError) as error:  # proxies of the environment count, too
            raise ChatError("missing", f"can't ask {self.shown}: {type(error).__name__}: {error}") from None

    def _late(self, url: str, silent: bool = True) -> ChatError:
        """The failure of a server that took the prompt and sends nothing, or no end: it may be slow, or hang."""
        alive = ""
        if self._probes:
            with contextlib.suppress(ChatError):
                Endpoint(self.base_url, self.key, ALIVE_SECONDS, _probes=False)._once("models", None)
                alive = ", though it still lists its models: it may hang, restart it"
        name, limit = ("silence", self._quiet) if silent and self._quiet < self.timeout else ("timeout", self.timeout)
        what = "nothing came" if silent else "no whole answer came"
        return ChatError(
            "agent_error", f"{what} from {url} within {limit:.3g} s{alive}; a slow model needs --{name} (in a night: --agent-args "
            f"'--{name} {2 * limit:.3g}')", silent=silent,
        )  # fmt: skip

    # --- what some servers don't take -----------------------------------------------------------------------------------

    def _body(self, model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request as this server has been found to take it."""
        limit = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
        if "system" in self._refused and messages[0]["role"] == "system":
            system, first, *rest = messages
            messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        body = {"model": model, "messages": messages, "stream": True, "temperature": self.temperature, limit: self.max_tokens}
        if "stream" not in self._refused:
            body["stream_options"] = {"include_usage": True}
        return {key: value for key, value in body.items() if value is not None and key not in self._refused}

    def _can_do_without(self, error: ChatError, body: dict[str, Any]) -> bool:
        """Whether the refusal names something that can be left out, and wasn't yet."""
        if error.too_small or error.failure != "agent_error":
            return False
        said = error.said.lower()
        sent = {*body, *(["system"] if body["messages"][0]["role"] == "system" else [])}
        named = [name for name, words in _REFUSED.items() if name in sent and words.search(said)]
        self._refused |= {*named[:1]}
        return bool(named)


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


def first_set(environ: Mapping[str, str], *names: str) -> str | None:
    """The first of these variables that is not blank."""
    return next((environ[name] for name in names if environ.get(name, "").strip()), None)


# --- what an answer means ------------------------------------------------------------------------------------------------


def read_answer(reply: Any, url: str = "the endpoint") -> Answer:
    """The text, the reasoning and the tokens of a whole answer, whatever is missing or odd in it. Raises ChatError."""
    choice = _first(reply.get("choices")) if isinstance(reply, dict) else None
    if not isinstance(choice, dict):
        raise ChatError("agent_error", f"expected choices[0].message in the answer, got {str(reply)[:300]}")
    finish = choice.get("finish_reason")
    if choice.get("error") or finish == "error":
        raise _refused(None, {"error": choice.get("error") or reply.get("error") or "the provider ended the answer"}, {}, url)
    message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
    message = {"content": message} if isinstance(message, str) else message
    if not isinstance(message, dict):
        raise ChatError("agent_error", f"expected choices[0].message in the answer, got {str(reply)[:300]}")
    text, thought = _text(message.get("content"))
    thoughts = [thought, *(_text(message.get(key))[0] for key in ("reasoning_content", "reasoning", "thinking"))]
    refusal = _text(message.get("refusal"))[0]
    if not text.strip() and refusal.strip():
        raise ChatError("agent_error", f"the model refuses: {refusal[:300]}")
    if not text.strip() and message.get("tool_calls"):
        raise ChatError("agent_error", f"the model called a tool instead of answering: {str(message['tool_calls'])[:200]}")
    if finish == "content_filter":
        raise ChatError("agent_error", "the provider's content filter ended the answer")
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    return Answer(
        text, _count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        _count(usage.get("completion_tokens", usage.get("output_tokens"))),
        cut_off=re.search("length|max", str(finish), re.I) is not None,
        reasoning="\n".join(dict.fromkeys(filter(None, thoughts))),  # some servers send them under two names
    )  # fmt: skip


def _first(value: Any) -> Any:
    """The first item of a list, of lists in it as well; None of an empty one; else the value itself."""
    while isinstance(value, list):
        value = value[0] if value else None
    return value


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
            (thought if thinks else text).append(_text(inner)[0])
    return "".join(text), "".join(thought)


def _count(value: Any) -> int | None:
    """A number of tokens; None for what is none."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and 0 <= float(value) < 1e9:
            return int(float(value))
    return None


def _content(response: Any) -> Any:
    """A response's content: parsed JSON, events joined to one answer, or its text where it is neither."""
    text = response.content.decode("utf-8-sig", "replace").strip()
    if "event-stream" in response.headers.get("content-type", "") or _EVENTS.match(text):
        return _joined(text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _joined(text: str) -> Any:
    """Server-sent events as the one answer that they make, or the error among them; the text itself where no answer ends in it."""
    message: dict[str, list[Any]] = {}  # each field of the deltas with all its parts
    finish = usage = None
    for line in re.split(r"\r\n|\n|\r", text):
        name, _, value = line.partition(":")
        if name == "data" and value.strip() == "[DONE]":
            finish = finish or "stop"
            break
        try:
            item = json.loads(value) if name in ("data", "error") else None
        except (ValueError, RecursionError):
            continue
        if not isinstance(item, dict):
            continue
        if name == "error" or item.get("error"):  # llama.cpp has a field of its own for it
            return {"error": item.get("error") or item}
        usage, choice = item.get("usage") or usage, _first(item.get("choices"))
        if not isinstance(choice, dict):
            continue
        if choice.get("error"):
            return {"choices": [choice]}
        finish = choice.get("finish_reason") or finish
        delta = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        for key, part in delta.items() if isinstance(delta, dict) else ():
            message.setdefault(key, []).extend(part if isinstance(part, list) else [part] if part else [])
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage} if finish else text


# --- what a refusal means ------------------------------------------------------------------------------------------------


def _without_tags(page: str) -> str:
    return " ".join(re.sub(r"<[^>]{0,500}>", " ", page[:20_000]).split())


def _said(body: Any) -> tuple[str, dict[str, Any]]:
    """A refusal's own words, and the object they stand in; whatever shape a server gives it."""
    body = _first(body)
    if not isinstance(body, dict):
        return _without_tags(str(body)), {}
    inner = _first(body.get("error", body.get("errors")))
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
    inner = metadata.get("headers") if isinstance(metadata, dict) else None  # a router's, with the provider's headers
    for source in (headers, inner if isinstance(inner, dict) else {}):
        told = {str(name).lower(): str(value)[:100] for name, value in source.items()}
        for name, unit in (("retry-after-ms", "ms"), ("retry-after", ""), ("x-ratelimit-reset", "")):
            if name in told and (wait := wait_seconds(f"{name}: {told[name]}{unit}")) is not None:
                return wait
    return wait_seconds(f"{said} {json.dumps(found)[:5000]}")


def _unreachable(error: BaseException, url: str, sent: bool) -> ChatError:
    reason = f"{error}" or type(error).__name__
    if "CERTIFICATE" in reason.upper():
        advice = "name the file of the certificate's authority in SSL_CERT_FILE"
    elif "SSL" in reason:
        advice = "the server may speak http, not https"
    elif type(error).__name__ in ("RemoteProtocolError", "ReadError", "WriteError", "CloseError", "DecodingError"):
        return ChatError("agent_error", f"the connection to {url} ended midway, twice: {reason}", midway=sent)
    elif "Proxy" in type(error).__name__ or "proxy" in reason.lower():
        advice = "see the variables HTTPS_PROXY, ALL_PROXY and NO_PROXY"
    else:
        advice = "is the server running?"
    return ChatError("agent_error", f"can't reach {url}: {reason}; {advice}")
