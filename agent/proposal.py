"""Asking a coding agent for one change: a fresh process, a prompt, an edited file; judged by the file, not by its words."""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import guard, process
from agent.candidate import one_line
from agent.coders import Coder, CoderError, Job, Report, cost_usd
from agent.errors import Stopped
from agent.redact import redact
from agent.settings import Settings

READABLE = 1 << 20  # bytes of an agent's output that are looked at


@dataclass(frozen=True)
class Proposal:
    """What came of it. `kind` is changed, noop, violation, agent_error; or rate_limit, login, missing: ask again later."""

    kind: str
    description: str = ""
    message: str = ""
    seconds: float = 0.0
    wait: float | None = None  # seconds, with rate_limit, where the agent says
    tail: str = ""
    usage: dict[str, Any] = field(default_factory=dict)  # cost in US dollars, tokens

    def error(self) -> dict[str, Any]:
        """As the journal keeps it."""
        return {"kind": self.kind, "message": redact(one_line(self.message, 500)), "step": None, "tail": self.tail}


@dataclass(frozen=True)
class Bench:
    """Where agents of a night work."""

    folder: Path  # runs/<tag>
    worktree: Path
    train_file: str
    coder: Coder
    settings: Settings
    stop: Callable[[], bool]


def ask(bench: Bench, prompt: str, base: str, n: int, seed: int, cost_left: float | None) -> Proposal:
    """Have the agent edit the worktree, which is clean at commit `base`. Stopped if the user wants to stop at once."""
    train_file = bench.worktree / bench.train_file
    before, seen = train_file.read_bytes(), guard.remember(bench.worktree)
    out, log = (bench.folder / "logs" / f"{n:04d}.agent.{kind}" for kind in ("out", "log"))
    out.parent.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="agent-", dir=bench.folder))
    settings = bench.settings
    job = Job(
        worktree=bench.worktree, train_file=bench.train_file, prompt=redact(prompt), scratch=scratch, model=settings.model,
        base_url=settings.base_url, max_cost_usd=cost_left, pass_env=settings.agent_env,
    )  # fmt: skip
    try:
        command = bench.coder.command(job, os.environ)
        env = {
            **command.env, "AUTORESEARCH_JOURNAL": str(bench.folder / "journal.jsonl"), "AUTORESEARCH_SEED": str(seed),
            "AUTORESEARCH_EXPERIMENT": str(n),
        }  # fmt: skip
        outcome = process.run(
            command.argv, cwd=bench.worktree, env=env, log=log, stdin=command.stdin, stdout_to=out, stop=bench.stop,
            limits=process.Limits(wall_seconds=settings.max_agent_minutes * 60), pidfile=bench.folder / "agent.pid",
        )  # fmt: skip
        if outcome.reason == "stopped":
            raise Stopped
        report = bench.coder.report(_text(out), _text(log), job)
    except CoderError as error:
        return Proposal("missing", message=str(error))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    cost = cost_usd(report, settings.price_in, settings.price_out)
    usage = {"cost": cost, "tokens": (report.tokens_in or 0) + (report.tokens_out or 0)}
    violations = [str(violation) for violation in guard.check(bench.worktree, base, bench.train_file, seen)]
    if not violations and _holds_secret(train_file):
        violations = [f"{bench.train_file}: holds the value of a variable that looks like a key"]
    proposal = _judge(bench, outcome, report, usage, violations, before)
    if violations:
        guard.scrub(bench.worktree, base, seen)
    return proposal


def _judge(
    bench: Bench, outcome: process.Outcome, report: Report, usage: dict[str, Any], violations: list[str], before: bytes
) -> Proposal:  # fmt: skip
    def proposal(kind: str, message: str = "", description: str = "") -> Proposal:
        about = one_line(redact(description or report.description or report.hypothesis or ""), 200)
        return Proposal(kind, about, message, outcome.seconds, report.wait_seconds, outcome.tail(1500), usage)

    if outcome.reason == "missing":
        return proposal("missing", f"{outcome.tail(300)}; {bench.coder.install_hint}")
    if violations:
        return proposal("violation", "; ".join(violations[:5]))
    after = (bench.worktree / bench.train_file).read_bytes()
    last = one_line(outcome.tail(300), 300)
    detail = report.detail or one_line(report.message or "", 300) or last
    if outcome.reason != "exited":
        return proposal("agent_error", f"the agent was ended by the limit {outcome.reason} after {outcome.seconds:.0f} s")
    if after != before:
        return proposal("changed", description=_describe(report, before, after))
    if report.failure == "login":
        return proposal("login", f"{detail}; {bench.coder.login_hint}")
    if report.failure in ("rate_limit", "missing"):
        return proposal(report.failure, detail)
    if outcome.exit_code != 0:
        ending = f"exit code {outcome.exit_code}" if outcome.signal is None else f"signal {outcome.signal}"
        return proposal("agent_error", f"the agent failed with {ending} and changed nothing: {last or detail}")
    if report.failure:
        return proposal(report.failure, detail)
    return proposal("noop", f"the agent left {bench.train_file} as it was: {detail}")


def _describe(report: Report, before: bytes, after: bytes) -> str:
    """In the agent's words; without any, the first line it changed."""
    words = report.description or report.hypothesis
    if not words and report.message:
        words = next((line for line in reversed(report.message.splitlines()) if line.strip()), None)
    if words:
        return words
    old, new = (text.decode("utf-8", "replace").splitlines() for text in (before, after))
    for line in difflib.unified_diff(old, new, n=0, lineterm=""):
        if line[:1] in "+-" and line[:3] not in ("+++", "---") and line[1:].strip():
            return f"{line[0]} {line[1:].strip()}"
    return "whitespace"


def _holds_secret(path: Path) -> bool:
    """Candidates are committed, and commits are pushed: a key must not get into one."""
    text = path.read_bytes().decode("utf-8", "replace")
    return redact(text) != text


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(READABLE).decode("utf-8", "replace")
    except OSError:
        return ""
