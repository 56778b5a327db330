"""Asking a coding agent for one change: a fresh process, a prompt, an edited file; judged by the file, not by its words.

An agent may write what it likes, so nothing of it is read or kept unless its kind and size are known.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent.coders.choice import arguments
from agent.coders.coder import WAITING, Coder, CoderError, Job, Reply, believed, usage_of
from agent.errors import Stopped
from agent.files import DEEPEST, GIB, MOST_ENTRIES, directory_bytes, read_plain, remove
from agent.git import guard
from agent.git.command import DAMAGE
from agent.git.worktree import Worktree
from agent.journal.settings import Settings
from agent.process import child
from agent.text import failure_record, one_line, redact

LINGER_SECONDS = 30.0  # that an agent may go on after its final message, when nothing is left to come but its exit
AGENT_BYTES = 4 * GIB  # in the worktree and the agent's scratch folder together: room for a virtual environment
LARGEST_OUTPUT = 64 << 20  # bytes; the spawner keeps far less of an output


@dataclass(frozen=True)
class Proposal:
    """What came of it. `kind` is changed, noop, violation, agent_error; or rate_limit, login, missing: ask again later."""

    kind: str
    description: str = ""
    hypothesis: str = ""
    message: str = ""
    seconds: float = 0.0
    wait: float | None = None  # seconds, with rate_limit, where the agent says
    tail: str = ""
    droppings: tuple[str, ...] = ()  # what the agent left beside its edit, to be removed
    usage: dict[str, Any] = field(default_factory=dict)  # cost in US dollars, tokens

    def error(self) -> dict[str, Any]:
        """As the journal keeps it."""
        return failure_record(self.kind, self.message, tail=self.tail)


@dataclass(frozen=True)
class Desk:
    """Where agents of a night work."""

    folder: Path  # runs/<tag>
    worktree: Worktree
    train_file: str
    coder: Coder
    settings: Settings
    stop: Callable[[], bool]


def ask(desk: Desk, prompt: str, base: str, n: int, seed: int, cost_left: float | None) -> Proposal:
    """Have the agent edit the worktree, which was lent at commit `base`. Stopped if the user wants to stop at once."""
    root, repository, settings = desk.worktree.path, desk.worktree.repository, desk.settings
    before, seen = read_plain(root / desk.train_file, guard.TRAIN_FILE_BYTES), guard.remember(repository)
    out, log = (desk.folder / "logs" / f"{n:04d}.agent.{kind}" for kind in ("out", "log"))
    out.parent.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="agent-", dir=desk.folder))
    job = Job(
        worktree=root, train_file=desk.train_file, prompt=redact(prompt), scratch=scratch, model=settings.model,
        base_url=settings.base_url, max_cost_usd=cost_left, pass_env=settings.agent_env,
        extra_args=arguments(settings.agent_args),
    )  # fmt: skip
    try:
        command = desk.coder.command(job, os.environ)
        env = {
            **{name: value for name, value in command.env.items() if name != "AUTORESEARCH_HOME"},  # it leads to held-out text
            "AUTORESEARCH_JOURNAL": str(desk.folder / "journal.jsonl"), "AUTORESEARCH_SEED": str(seed),
            "AUTORESEARCH_EXPERIMENT": str(n),
            "GIT_CEILING_DIRECTORIES": str(desk.folder),  # an agent that removes `.git` is not to find the user's repository
        }  # fmt: skip
        lingering = Lingering(desk.coder, job, out, log, LINGER_SECONDS)
        outcome = child.run(
            command.argv, cwd=root, env=env, log=log, stdin=command.stdin, stdout_to=out, stop=desk.stop,
            watch=lingering, bounds=_bounds(desk, scratch), pidfile=desk.folder / "agent.pid",
        )  # fmt: skip
        if outcome.reason == "stopped":
            raise Stopped
        reply = believed(desk.coder.reply(output_of(out), output_of(log), job), outcome.exit_code)
    except CoderError as error:
        return Proposal("missing", message=str(error), usage={"cost": 0.0})
    finally:
        with contextlib.suppress(OSError):
            remove(scratch)
    usage = {"cost": 0.0} if outcome.reason == "missing" else usage_of(
        desk.coder, reply, outcome.seconds, settings.price_in, settings.price_out)  # fmt: skip
    try:
        found = guard.check(repository, root, desk.worktree.tree(base), desk.train_file, before, seen)
        violations = [str(violation) for violation in found.violations]
        after = before if violations else read_plain(root / desk.train_file, guard.TRAIN_FILE_BYTES)
    except DAMAGE as error:  # the call has cost something all the same
        why = f"what the agent left cannot be read: {one_line(str(error), 300) or type(error).__name__}"
        return Proposal("agent_error", message=why, seconds=outcome.seconds, tail=outcome.tail(1500), usage=usage)
    if _holds_secret(after):
        violations = [f"{desk.train_file}: holds the value of a variable that looks like a key"]
    return replace(_judge(desk, outcome, reply, usage, violations, before, after), droppings=tuple(found.droppings))


def _bounds(desk: Desk, scratch: Path) -> child.Bounds:
    written = (desk.worktree.path, scratch)
    return child.Bounds(
        desk.settings.max_agent_minutes * 60, desk.coder.idle_seconds, directories=written,
        directory_bytes=sum(map(directory_bytes, written)) + AGENT_BYTES, spare_bytes=int(desk.settings.disk_gb * 1e9 / 2),
    )  # fmt: skip


class Lingering:
    """A `watch` that ends an agent as `finished` if its structured output has said so for `seconds` and it does not exit."""

    def __init__(self, coder: Coder, job: Job, out: Path, log: Path, seconds: float) -> None:
        self.coder, self.job, self.out, self.log, self.seconds = coder, job, out, log, seconds
        self.size, self.since = 0, time.monotonic()  # of its standard output, which has not grown since then

    def __call__(self) -> str | None:
        try:
            size = self.out.stat().st_size
        except OSError:
            return None
        now = time.monotonic()
        if size != self.size:
            self.size, self.since = size, now
        elif size and self.coder.tells_its_end and now - self.since > self.seconds:
            self.since = now
            reply = self.coder.reply(output_of(self.out), output_of(self.log), self.job)
            return "finished" if reply.failure is None and reply.message else None
        return None


def _judge(
    desk: Desk, outcome: child.Outcome, reply: Reply, usage: dict[str, Any], violations: list[str], before: bytes, after: bytes
) -> Proposal:  # fmt: skip
    derived = _describe(before, after) if after != before else ""

    def proposal(kind: str, message: str = "") -> Proposal:
        about = one_line(redact(reply.description or derived or reply.hypothesis or ""), 200)
        why = one_line(redact(reply.hypothesis or derived), 300)
        return Proposal(kind, about, why, message, outcome.seconds, reply.wait_seconds, outcome.tail(1500), usage=usage)

    if outcome.reason == "disk":
        used = f"more than {AGENT_BYTES / GIB:.0f} GiB or {MOST_ENTRIES} files, folders nested deeper than {DEEPEST}"
        return proposal("agent_error", f"the agent was ended: it wrote {used}, or the disk is full; its files were removed")
    if violations:
        return proposal("violation", "; ".join(violations[:5]))
    if outcome.reason == "missing":
        return proposal("missing", f"{outcome.tail(300)}; {desk.coder.install_hint}")
    last = one_line(outcome.tail(300), 300)
    detail = reply.detail or one_line(reply.message or "", 300) or last
    finished = reply.failure is None and bool(reply.message) and desk.coder.tells_its_end
    ended = outcome.reason != "exited" and not finished  # some never exit once their work is done
    if ended and (after != before or reply.failure not in WAITING):
        silent = "said nothing for" if outcome.reason == "idle" else "was ended by the limit " + outcome.reason + " after"
        seconds = desk.coder.idle_seconds or 0.0 if outcome.reason == "idle" else outcome.seconds
        return proposal("agent_error", f"the agent {silent} {seconds:.0f} s")
    if after != before:
        return proposal("changed")
    if reply.failure == "login":
        return proposal("login", f"{detail}; {desk.coder.login_hint}")
    if reply.failure in ("rate_limit", "missing"):
        return proposal(reply.failure, detail)
    if outcome.exit_code != 0 and not (finished and outcome.reason != "exited"):
        ending = f"exit code {outcome.exit_code}" if outcome.signal is None else f"signal {outcome.signal}"
        return proposal("agent_error", f"the agent failed with {ending} and changed nothing: {last or detail}")
    if reply.failure:
        return proposal(reply.failure, detail)
    return proposal("noop", f"the agent left {desk.train_file} as it was: {detail}")


_ASSIGNED = re.compile(r"(\w+) = (.*)")


def _describe(before: bytes, after: bytes) -> str:
    """A change in the words of its diff: `LR 0.1 -> 0.2`, or its first lines; for an agent that did not say what it did."""
    old, new = (text.decode("utf-8", "replace").splitlines() for text in (before, after))
    if len(old) + len(new) > 20_000:  # comparing takes their product
        return f"a file of {len(new)} lines, of {len(old)}"
    found, gone, come = [], 0, 0
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if tag == "equal":
            continue
        gone, come = gone + j - i, come + m - k
        pairs = zip(old[i:j], new[k:m], strict=True) if j - i == m - k else [("\n".join(old[i:j]), "\n".join(new[k:m]))]
        found += [_words(*(text.strip() for text in pair)) for pair in pairs]
    found = [words for words in found if words]
    more = f" and {len(found) - 2} more" if len(found) > 2 else ""
    return f"{'; '.join(one_line(part, 80) for part in found[:2]) or 'whitespace'}{more}, +{come} -{gone} lines"


def _words(old: str, new: str) -> str:
    was, now = (_ASSIGNED.fullmatch(text.split("  #")[0].strip()) for text in (old, new))
    if was and now and was[1] == now[1]:
        return f"{was[1]} {was[2]} -> {now[2]}" if was[2] != now[2] else ""
    return f"+ {new.splitlines()[0]}" if new else f"- {old.splitlines()[0]}" if old else ""


def _holds_secret(source: bytes) -> bool:
    """Candidates are committed, and commits are pushed: a key must not get into one."""
    text = source.decode("utf-8", "replace")
    return redact(text) != text


def output_of(path: Path) -> str:
    """The whole text of an output file, whose size the spawner limits; "" without a file. The result is on its last line."""
    try:
        return read_plain(path, LARGEST_OUTPUT).decode("utf-8", "replace")
    except OSError:
        return ""
