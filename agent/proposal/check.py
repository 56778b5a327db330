"""Ask a coding agent for one word before anything is trained: is it there, logged in, and able to answer?

The agent runs as in an experiment: same command line, environment and spawner. Only its prompt is short and its working directory
is a scratch repository with a copy of the train file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.coders.choice import arguments
from agent.coders.coder import Coder, CoderError, Job, Reply, believed, usage_of
from agent.errors import AgentError, Stopped
from agent.files import GIB, read_plain, remove
from agent.git.command import run_git
from agent.git.guard import TRAIN_FILE_BYTES
from agent.journal.settings import Settings
from agent.journal.state import Night
from agent.process import child
from agent.proposal.ask import Lingering, output_of
from agent.text import one_line, redact

PROMPT = """\
This only checks that you can be reached before a night of experiments. Use no tool and change no file.
Answer with the one word: ready
"""
NOT_STARTED = (126, 127)  # exit codes of a shell for a program that is no program, or is not there
LINGER_SECONDS = 3.0  # that an agent may go on after its answer
SKIP = "--no-check-agent starts the night without asking"


@dataclass(frozen=True)
class Answer:
    """`kind` is ok, odd (the user's own command failed or did not finish; the night starts anyway), rate_limit, login, missing or
    agent_error."""

    kind: str
    words: str  # one line for the human
    seconds: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)  # as `usage_of`

    @property
    def usable(self) -> bool:
        """Whether a night may begin: a rate limit passes while the baseline is trained."""
        return self.kind in ("ok", "odd", "rate_limit")


def before_the_night(
    coder: Coder, settings: Settings, folder: Path, source: tuple[str, bytes], night: Night, record: Callable[..., None],
    say: Callable[[str], None], stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Ask the night's agent, journal and tell what it answered. AgentError if no night could be run with it.

    source: name and content of the train file. Nothing is asked if the user wants that, or if no experiment is left to be done.
    """
    done = settings.experiments is not None and len(night.done) >= settings.experiments
    if not settings.check_agent or done or night.spent(settings.max_cost):
        return
    left = settings.max_cost - night.cost if settings.max_cost is not None else None
    answer = ask_for_a_word(coder, settings, folder, source, stop, left)
    record("agent_check", kind=answer.kind, message=answer.words, usage=answer.usage, seconds=round(answer.seconds, 1))
    say(answer.words)
    if not answer.usable:
        mend = f"mend it, then: python -m agent.loop --resume --tag {night.tag}; {SKIP}"
        raise AgentError(f"{answer.words}\nnothing was trained in this session; {mend}")
    if settings.max_cost is not None and answer.kind != "rate_limit" and answer.usage.get("cost") is None:
        what = f"{coder.name} does not report its cost, so --max-cost {settings.max_cost:g} cannot be enforced"
        raise AgentError(f"{what}; {_price_mend(coder, answer)}")


def _price_mend(coder: Coder, answer: Answer) -> str:
    if answer.usage.get("tokens_out"):
        return "it counts tokens: give --price-in and --price-out"
    own = 'have it print a last line such as {"cost_usd": 0.02}, or ' if coder.name == "cmd" else ""
    return f"{own}limit the night by --experiments or --hours instead"


def ask_for_a_word(
    coder: Coder, settings: Settings, folder: Path, source: tuple[str, bytes], stop: Callable[[], bool] = lambda: False,
    cost_left: float | None = None,
) -> Answer:  # fmt: skip
    """One call of the agent, in a scratch repository below `folder`. Stopped if the user wants to stop at once.

    What it printed is kept in `folder/logs/check.agent.out` and `.log`."""
    name, content = source
    (folder / "logs").mkdir(exist_ok=True)
    out, log = folder / "logs" / "check.agent.out", folder / "logs" / "check.agent.log"
    place = Path(tempfile.mkdtemp(prefix="agent-", dir=folder))  # the prefix that a later driver sweeps away
    try:
        work, scratch = place / "worktree", place / "scratch"
        work.mkdir()
        scratch.mkdir()
        (work / name).write_bytes(content)
        _make_repository(work)
        job = Job(
            worktree=work, train_file=name, prompt=PROMPT, scratch=scratch, model=settings.model, base_url=settings.base_url,
            max_cost_usd=cost_left, pass_env=settings.agent_env, extra_args=arguments(settings.agent_args), check=True,
        )  # fmt: skip
        command = coder.command(job, os.environ)
        known = {name: value for name, value in command.env.items() if name != "AUTORESEARCH_HOME"}  # as in `ask`
        env = {**known, "AUTORESEARCH_JOURNAL": str(folder / "journal.jsonl"), "AUTORESEARCH_EXPERIMENT": "0",
               "AUTORESEARCH_SEED": "0", "GIT_CEILING_DIRECTORIES": str(place)}  # fmt: skip
        outcome = child.run(
            command.argv, cwd=work, env=env, log=log, stdin=command.stdin, stdout_to=out, stop=stop,
            watch=Lingering(coder, job, out, log, LINGER_SECONDS),
            bounds=child.Bounds(coder.check_seconds, directories=(place,), directory_bytes=GIB), pidfile=folder / "agent.pid",
        )  # fmt: skip
        if outcome.reason == "stopped":
            raise Stopped
        reply = believed(coder.reply(output_of(out), output_of(log), job), outcome.exit_code)
        edited = _read(work / name) not in (content, b"")
    except CoderError as error:
        return Answer("missing", str(error))
    finally:
        with contextlib.suppress(OSError):
            remove(place)
    usage = {} if outcome.reason == "missing" else usage_of(coder, reply, outcome.seconds, settings.price_in, settings.price_out)
    kind, words = _judge(coder, outcome, reply, edited)
    return Answer(kind, one_line(redact(words), 600), outcome.seconds, usage)


def _judge(coder: Coder, outcome: child.Outcome, reply: Reply, edited: bool) -> tuple[str, str]:
    """Kind and words of an `Answer`."""
    last = one_line(outcome.tail(300), 300)
    detail = reply.detail or one_line(reply.message or "", 300) or last or "it said nothing"
    code = "" if outcome.exit_code in (0, None) else f" (exit code {outcome.exit_code})"
    if outcome.reason == "missing" or (coder.name == "cmd" and outcome.exit_code in NOT_STARTED):
        return "missing", f"{coder.name} can't be started: {last or detail}; {coder.install_hint}"
    if reply.failure == "rate_limit":
        wait = f", for {reply.wait_seconds:.0f} s" if reply.wait_seconds else ""
        return "rate_limit", f"{coder.name} is rate-limited{wait}: {detail}; the night starts anyway"
    if reply.failure == "login":
        return "login", f"{coder.name} is not logged in: {detail}; {coder.login_hint}"
    if reply.failure == "missing":
        return "missing", f"{coder.name} can't work: {detail}"
    if coder.name == "cmd":
        if outcome.reason == "exited" and outcome.exit_code == 0:
            return "ok", f"{coder.binary} ran in {outcome.seconds:.0f} s"
        end = f"was still busy after {outcome.seconds:.0f} s" if outcome.reason != "exited" else f"failed{code}: {last or detail}"
        return "odd", f"note: {coder.binary}, asked for one word, {end}; the night starts anyway"
    answered = bool(reply.tokens_out) or (reply.failure is None and bool(reply.message)) or edited
    if answered and (coder.tells_its_end or outcome.exit_code == 0):
        said = one_line(reply.message or "", 250)
        about = f": {said}" if said.strip(" .!").lower() not in ("", "ready") and not reply.failure and not edited else ""
        return "ok", f"{coder.name} answered in {outcome.seconds:.0f} s{about}"
    if outcome.reason != "exited":
        return "agent_error", f"{coder.name} did not answer within {coder.check_seconds:.0f} s: {last or detail}"
    return "agent_error", f"{coder.name} did not answer{code}: {detail}"


def _make_repository(folder: Path) -> None:
    """Some agents work in a git repository only, and some in one with a commit only."""
    run_git(folder, "init", "--quiet", "--template=")
    run_git(folder, "add", "--all")
    who = ("-c", "user.name=autoresearch", "-c", "user.email=autoresearch@localhost")
    run_git(folder, *who, "commit", "--quiet", "--message=check")


def _read(path: Path) -> bytes:
    try:
        return read_plain(path, TRAIN_FILE_BYTES)
    except OSError:
        return b""
