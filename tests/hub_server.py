"""A small server on loopback that speaks the hub's file protocol, and misbehaves when told to.

    with Hub({"a.parquet": data}) as hub:
        hub.misbehave("a.parquet", "drop 1000", "503", "wrong")     # the next three GETs; later ones are served well
        ... HF_ENDPOINT=hub.url ...
        hub.requests                                                # (method, path, Range, Authorization) of each
"""

import hashlib
import json
import re
import threading
from collections import defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`files`: path in the repository -> bytes. Every repository name and every commit is answered alike; a branch is at
    REVISION."""

    def __init__(self, files: dict[str, bytes], token: str | None = None):
        self.files, self.token, self.requests = files, token, []
        self.plans: dict[str, deque] = defaultdict(deque)
        self.stopped = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_HEAD

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def misbehave(self, name: str, *behaviours: str) -> None:
        """What the next GETs of a file get: `ok`, a status as `503`, `drop N`, `stall N`, `truncate N` or `wrong`. "list" is the
        listing of the repository."""
        self.plans[name].extend(behaviours)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path  # a proxy is asked for whole addresses
        self.requests.append((handler.command, path, handler.headers.get("Range"), handler.headers.get("Authorization")))
        if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            return self.reply(handler, 401, b'{"error": "token needed"}')
        if found := re.match(r"/api/datasets/[^/]+/[^/]+(?:/revision/([^/]+))?$", path):
            return self.listing(handler, found[1] if re.fullmatch("[0-9a-f]{40}", found[1] or "") else REVISION)
        found = re.match(r"/datasets/[^/]+/[^/]+/resolve/([0-9a-f]{40})/(.+)$", path)
        if not found or found[2] not in self.files:
            return self.reply(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.file(handler, found[2])

    def listing(self, handler: BaseHTTPRequestHandler, revision: str) -> None:
        behaviour = self.plans["list"].popleft() if self.plans["list"] else "ok"
        if behaviour.isdigit():
            return self.reply(handler, int(behaviour), b"no")
        revision = REVISION if behaviour == "wrong" else revision
        files = [{"rfilename": name, "size": len(data), "blobId": "0" * 40,
                  "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                 for name, data in self.files.items()]
        info = {"_id": "1", "id": "a/b", "sha": revision, "private": False, "gated": False, "disabled": False, "downloads": 0,
                "likes": 0, "tags": [], "siblings": files}
        return self.reply(handler, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def file(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        data = self.files[name]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)),
                   "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if handler.command == "HEAD":
            return self.reply(handler, 200, data, headers)
        behaviour, _, number = (self.plans[name].popleft() if self.plans[name] else "ok").partition(" ")
        if behaviour.isdigit():
            return self.reply(handler, int(behaviour), b"no", {"Retry-After": "0"})
        start, status = 0, 200
        if span := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or ""):
            start, status = int(span[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if behaviour == "wrong":
            body = bytes(b ^ 1 for b in body)
        if behaviour == "truncate":
            body = body[: int(number)]
        if behaviour not in ("drop", "stall"):
            return self.reply(handler, status, body, headers)
        handler.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(body[: int(number)])
        handler.wfile.flush()
        if behaviour == "stall":
            self.stopped.wait(60)
        handler.close_connection = True
        handler.connection.close()
        return None

    def reply(self, handler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        handler.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
