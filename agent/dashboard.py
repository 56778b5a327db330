"""`python -m agent.dashboard`: the night as a page in the browser, which follows the journal while the night runs.

The page only reads: the journal, metrics.jsonl, logs and git. On this machine it needs no password. With --host it can be opened
from the local network; then it prints an address with a token, and refuses requests without the token.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import click

from agent.errors import NightError, UsageError
from agent.git.worktree import Repository, Worktree
from agent.journal.folder import latest, require_tag
from agent.journal.journal import holder, read_events
from agent.journal.state import Night, fold
from agent.judgement.decision import noise
from agent.text import redact
from agent.views.glance import at_a_glance, in_detail, loss_curve, read_curve, running_trial, training

PAGE = Path(__file__).with_name("views") / "page.html"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = 8765
HOST = re.compile(r"(\[[0-9a-fA-F:]+\]|[\w.-]+)(?::\d+)?", re.ASCII)  # Host header: a name, and possibly a port
EVERY = 0.5  # seconds between two checks whether files have changed
Curve = list[list[float]]  # [[seconds, loss], ...]
Stamp = tuple[int, int, int] | None  # a file's inode, size in bytes and time of change; None without a file


class Reader:
    """Reads one night. What was read from a file is cached until the file changes, for all browsers together."""

    def __init__(self, repository: Repository, tag: str) -> None:
        self.repository, self.folder = repository, repository.root / "runs" / tag
        self.worktree = Worktree(repository, tag, self.folder / "worktree")
        self._night: tuple[Stamp, Night] = None, Night()
        self._curve: tuple[Path, Stamp, Curve] = Path(), None, []
        self._best: tuple[tuple[int, int], Curve] = (-1, -1), []

    def moment(self) -> tuple[Stamp, int | None]:
        """A value that changes when the journal changes, and when a driver starts or ends."""
        return _stamp(self.folder / "journal.jsonl"), holder(self.folder)

    def night(self) -> Night:
        """The state of the night. Raises JournalError if the journal is damaged."""
        stamp = _stamp(self.folder / "journal.jsonl")
        if stamp is None or stamp != self._night[0]:
            self._night = stamp, fold(read_events(self.folder / "journal.jsonl")[0])
        return self._night[1]

    def glance(self) -> dict[str, Any]:
        night = self.night()
        sigma = noise(night).sigma if night.experiments else 0.0
        return at_a_glance(night, holder(self.folder) is not None, sigma, self.folder)

    def detail(self, n: int) -> dict[str, Any] | None:
        night = self.night()
        if not 0 <= n < len(night.experiments):
            return None
        experiment = night.experiments[n]
        diff = self.worktree.diff(experiment.parent, experiment.commit) if experiment.commit and n else ""
        return in_detail(night, n, self.folder, redact(diff), noise(night).sigma)

    def running(self) -> dict[str, Any]:
        """The current training: its newest numbers, its loss curve, and the loss curve of the best experiment."""
        night = self.night()
        trial = running_trial(night)[1]
        if trial is None:
            return {"numbers": None, "points": [], "best": []}
        if night.best is not None and (held := (night.best, len(night.leader.trials))) != self._best[0]:
            self._best = held, loss_curve(night.leader, self.folder)
        path = self.folder / "trials" / trial.folder / "metrics.jsonl"
        if (path, stamp := _stamp(path)) != self._curve[:2]:
            self._curve = path, stamp, read_curve(path)
        return {"numbers": training(night, self.folder), "points": self._curve[2], "best": self._best[1]}


def _stamp(path: Path) -> Stamp:
    """A value that changes when the file changes; None without a file."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def application(reader: Reader, hosts: tuple[str, ...], token: str, over: Callable[[], bool]) -> Any:
    """The web application. hosts: accepted names in the Host header. token: "" if none is needed. over: returns whether to end."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("NONCE", nonce), headers={"Content-Security-Policy": policy})

    async def experiment(request: Request) -> Response:
        found = await asyncio.to_thread(reader.detail, request.path_params["n"])
        return JSONResponse(found) if found else PlainTextResponse("there is no such experiment", 404)

    async def damaged(request: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), 500)

    async def follow() -> AsyncIterator[str]:
        moment, curve = None, None
        yield "retry: 1000\n\n"  # milliseconds until a browser connects again after a broken connection
        while not over():
            try:
                if (now := reader.moment()) != moment:
                    moment = now
                    yield f"event: night\ndata: {json.dumps(await asyncio.to_thread(reader.glance))}\n\n"
                if (running := await asyncio.to_thread(reader.running)) != curve:
                    curve = running
                    yield f"event: curve\ndata: {json.dumps(running)}\n\n"
            except NightError as error:
                yield f"event: trouble\ndata: {json.dumps(str(error))}\n\n"
            await asyncio.sleep(EVERY)

    async def events(request: Request) -> Response:
        return StreamingResponse(follow(), media_type="text/event-stream")

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        """Refuse requests with another Host header than a name of this machine, and without the token if there is one."""
        if scope["type"] != "http":
            return await inner(scope, receive, send)
        request = Request(scope)
        refused: Response | None = None
        header = request.headers.get("host", "")
        asked, port = HOST.fullmatch(header), scope["server"][1]
        cookie = f"autoresearch-{port}"  # browsers do not separate the cookies of different ports of a host
        if asked is None or asked[1].lower().strip("[]") not in hosts:
            refused = PlainTextResponse(f"asked as {header}; expected one of {', '.join(hosts)}", 421)
        elif token and not secrets.compare_digest(request.cookies.get(cookie, "").encode(), token.encode()):
            given = request.query_params.get("token", "")
            refused = PlainTextResponse("open the address with the token, as the terminal shows it", 403)
            if secrets.compare_digest(given.encode(), token.encode()):
                refused = RedirectResponse("/", 303)
                refused.set_cookie(cookie, token, httponly=True, samesite="strict")
        if refused is not None:
            return await refused(scope, receive, send)

        async def careful(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
                                       (b"cache-control", b"no-store")]  # fmt: skip
            await send(message)

        return await inner(scope, receive, careful)

    routes = [Route("/", page), Route("/experiment/{n:int}", experiment), Route("/events", events)]
    inner = Starlette(routes=routes, exception_handlers={NightError: damaged})
    return guarded


@click.command()
@click.option("--tag", help="The night. Default: the latest.")
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen on; 0.0.0.0 opens the page to the local network, with a token.")
@click.option("--port", type=click.IntRange(0, 65535), help=f"Default: {PORT}, or another one if that is taken.")
def main(tag: str | None, host: str, port: int | None) -> None:
    """Show a night in the browser, and follow it."""
    try:
        import uvicorn
    except ImportError:
        raise click.ClickException("the page needs starlette and uvicorn; install them: pip install '.[page]'") from None
    try:
        repository = Repository(Path.cwd())
        tag = tag or latest(repository.root / "runs")
        require_tag(tag)
        reader = Reader(repository, tag)
        if not reader.night().base:
            raise UsageError(f"there is no night in {reader.folder}")
    except NightError as error:
        raise click.ClickException(str(error)) from None
    token = "" if host in LOOPBACK else secrets.token_urlsafe(24)
    shown = _address() if host == "0.0.0.0" else host
    listening = _listen(host, port)
    place = f"[{shown}]" if ":" in shown else shown
    address = f"http://{place}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    if token:
        _qr_code(address)
    click.echo(f"night {tag}: {address}")
    hosts = (*LOOPBACK, *(name.lower() for name in (shown, socket.gethostname(), f"{socket.gethostname()}.local")))
    server = uvicorn.Server(uvicorn.Config("", log_level="warning", timeout_graceful_shutdown=2))
    server.config.app = application(reader, hosts, token, lambda: server.should_exit)
    server.run(sockets=[listening])


def _listen(host: str, port: int | None) -> socket.socket:
    """A listening socket at this port; without a port, at the default port, or at any free one if that is taken. Raises
    ClickException if it cannot listen."""
    for attempt in (PORT, 0) if port is None else (port,):
        try:
            return socket.create_server((host, attempt), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            problem = error
    raise click.ClickException(f"cannot listen on {host}, port {port or PORT}: {problem}; choose another --host or --port")


def _address() -> str:
    """This machine's address in the local network: the source address of a packet to the internet. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _qr_code(address: str) -> None:
    """Print the address as a QR code for a phone, if the package segno is installed."""
    try:
        import segno
    except ImportError:
        return
    segno.make(address).terminal(out=sys.stdout, compact=True)


if __name__ == "__main__":
    main()
