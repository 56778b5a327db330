"""`python -m agent.dashboard`: the night as a page in the browser, which follows the journal while the night runs.

It only reads: the journal, metrics.jsonl, logs and git. On this machine it needs no password. With --host for the local network it
prints an address with a token, and answers nobody without it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import sys
from collections.abc import AsyncIterator
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
from agent.views.glance import at_a_glance, in_detail, read_curve

PAGE = Path(__file__).with_name("views") / "page.html"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "autoresearch"
EVERY = 0.5  # seconds between two looks at the files


class Reader:
    """One night, read again when its journal has grown."""

    def __init__(self, repository: Repository, tag: str) -> None:
        self.repository, self.folder = repository, repository.root / "runs" / tag
        self.worktree = Worktree(repository, tag, self.folder / "worktree")
        self._seen, self._night = (-1, -1), Night()

    def stamp(self) -> tuple[int, int]:
        """Changes when the journal does."""
        try:
            status = (self.folder / "journal.jsonl").stat()
        except OSError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    def night(self) -> Night:
        if (stamp := self.stamp()) != self._seen:
            self._night, self._seen = fold(read_events(self.folder / "journal.jsonl")[0]), stamp
        return self._night

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

    def running(self) -> list[list[float]]:
        """The loss curve of the training that runs now."""
        night = self.night()
        trials = [trial for e in night.experiments for trial in e.trials if trial.status == "running"]
        return read_curve(self.folder / "trials" / trials[-1].folder / "metrics.jsonl") if trials else []


def application(reader: Reader, hosts: tuple[str, ...], token: str) -> Any:
    """The web application. hosts: names it may be asked under. token: "" where none is wanted."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("NONCE", nonce), headers={"Content-Security-Policy": policy})

    async def night(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(reader.glance))

    async def experiment(request: Request) -> Response:
        found = await asyncio.to_thread(reader.detail, request.path_params["n"])
        return JSONResponse(found) if found else PlainTextResponse("there is no such experiment", 404)

    async def follow() -> AsyncIterator[str]:
        journal, curve = None, None
        while True:
            if (stamp := reader.stamp()) != journal:
                journal = stamp
                yield f"event: night\ndata: {json.dumps(await asyncio.to_thread(reader.glance))}\n\n"
            if (points := await asyncio.to_thread(reader.running)) != curve:
                curve = points
                yield f"event: curve\ndata: {json.dumps(points)}\n\n"
            await asyncio.sleep(EVERY)

    async def events(request: Request) -> Response:
        return StreamingResponse(follow(), media_type="text/event-stream")

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        """Only for who asks by a name of this machine, and knows the token if there is one."""
        if scope["type"] != "http":
            return await inner(scope, receive, send)
        request = Request(scope)
        refused: Response | None = None
        if (request.url.hostname or "") not in hosts:
            refused = PlainTextResponse(f"asked as {request.url.hostname}; expected one of {', '.join(hosts)}", 421)
        elif token and not secrets.compare_digest(request.cookies.get(COOKIE, "").encode(), token.encode()):
            given = request.query_params.get("token", "")
            refused = PlainTextResponse("open the address with the token, as the terminal shows it", 403)
            if secrets.compare_digest(given.encode(), token.encode()):
                refused = RedirectResponse("/", 303)
                refused.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        if refused is not None:
            return await refused(scope, receive, send)

        async def careful(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
                                       (b"cache-control", b"no-store")]  # fmt: skip
            await send(message)

        return await inner(scope, receive, careful)

    inner = Starlette(routes=[Route("/", page), Route("/night", night), Route("/experiment/{n:int}", experiment),
                              Route("/events", events)])  # fmt: skip
    return guarded


@click.command()
@click.option("--tag", help="The night. Default: the latest.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: the local network, by token.")
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65535))
def main(tag: str | None, host: str, port: int) -> None:
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
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    place = f"[{shown}]" if ":" in shown else shown
    address = f"http://{place}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    click.echo(f"night {tag}: {address}")
    if token:
        _qr_code(address)
    hosts = (*LOOPBACK, shown, socket.gethostname(), f"{socket.gethostname()}.local")
    config = uvicorn.Config(application(reader, hosts, token), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


def _address() -> str:
    """This machine's address in the local network: the one a packet to outside would leave from. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _qr_code(address: str) -> None:
    """For the phone; without the package the address has to do."""
    try:
        import segno
    except ImportError:
        return
    segno.make(address).terminal(out=sys.stdout, compact=True)


if __name__ == "__main__":
    main()
