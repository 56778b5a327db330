"""An OpenAI-compatible endpoint, asked with the standard library: one question, one whole answer, every failure named."""

from __future__ import annotations

import email.utils
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from typing import IO, Any

from agent.coders.coder import Failure
from agent.coders.error_text import wait_seconds

MAX_BYTES = 16 << 20  # no answer is longer than this; a stream without an end is


class ChatError(Exception):
    """An endpoint that gave no answer. `wait_seconds` belongs to `rate_limit`, where the endpoint says it."""

    def __init__(self, failure: Failure, message: str, wait_seconds: float | None = None) -> None:
        super().__init__(message)
        self.failure: Failure = failure
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Answer:
    text: str
    tokens_in: int | None
    tokens_out: int | None
    cut_off: bool  # by its length


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    base_url: str
    key: str | None = None
    timeout: float = 600.0  # seconds for a whole answer
    max_tokens: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError("missing", f"expected a base URL such as http://127.0.0.1:1234/v1, got {self.base_url!r}")

    def ask(self, model: str, messages: list[dict[str, str]]) -> Answer:
        """The answer to `messages`. Raises ChatError."""
        body: dict[str, Any] = {"model": model, "messages": messages, "stream": False}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        reply = self._request("chat/completions", body)
        try:
            choice = reply["choices"][0]
            text = choice["message"].get("content") or ""
            usage = reply.get("usage") or {}
            counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
            return Answer(text, *counts, cut_off=choice.get("finish_reason") == "length")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ChatError("agent_error", f"expected choices[0].message in the answer, got {str(reply)[:300]}") from error

    def only_model(self) -> str:
        """The endpoint's model, if it has exactly one. Raises ChatError."""
        reply = self._request("models", None)
        listed = reply.get("data") if isinstance(reply, dict) else None
        names = [str(model.get("id")) for model in listed or [] if isinstance(model, dict)]
        if len(names) != 1:
            raise ChatError("missing", f"{self.base_url} has {len(names)} models, say which with --model: {', '.join(names[:20])}")
        return names[0]

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        url = f"{self.base_url.rstrip('/')}/{path}"
        headers = {"Content-Type": "application/json", "User-Agent": "autoresearch"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        local = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
        proxies = [urllib.request.ProxyHandler({})] if local else []  # a proxy can't reach this machine's loopback
        opener = urllib.request.build_opener(_NoRedirects, *proxies)
        deadline = time.monotonic() + self.timeout
        try:
            with opener.open(urllib.request.Request(url, data, headers), timeout=self.timeout) as response:
                content = _read(response, deadline, self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(error, url) from error
        except TimeoutError as error:
            raise ChatError("agent_error", f"no answer from {url} within {self.timeout:g} s; raise --timeout") from error
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            raise ChatError("agent_error", f"can't reach {url}: {reason}; is the server running?") from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise ChatError("agent_error", f"expected JSON from {url}, got {content[:200]!r}") from error


def _read(response: Any, deadline: float, timeout: float) -> bytes:
    content = bytearray()
    while chunk := response.read1(65536):
        content += chunk
        if len(content) > MAX_BYTES:
            raise ChatError("agent_error", f"the answer is longer than {MAX_BYTES >> 20} MiB: a stream without an end?")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{timeout} s")
    return bytes(content)


def _refused(error: urllib.error.HTTPError, url: str) -> ChatError:
    try:
        text = error.read(10_000).decode("utf-8", "replace")
    except OSError:
        text = ""
    try:
        found = json.loads(text)["error"]
        said = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        said = text.strip()
    detail = f"{error.code} from {url}: {said[:500] or error.reason}"
    if error.code in (401, 403):
        return ChatError("login", f"{detail}; expected a valid key in AUTORESEARCH_API_KEY or OPENAI_API_KEY")
    if error.code in (429, 529):
        return ChatError("rate_limit", detail, _retry_after(error.headers.get("Retry-After")) or wait_seconds(said))
    if error.code == 404:
        detail += "; is the base URL complete (most end with /v1), and is the model there?"
    if 300 <= error.code < 400:
        detail += f"; it redirects to {error.headers.get('Location')}: give that as --base-url if you trust it"
    return ChatError("agent_error", detail)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if not value:
        return None
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
