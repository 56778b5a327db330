"""What every coding agent is described with: a job goes in, a command comes out, its output is read into a reply.

Nothing here starts a process: `agent/process/child.py` does, with the `Command` an adapter returns.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from agent.coders.error_text import Failure as Failure
from agent.coders.error_text import name_failure
from agent.errors import UsageError

WAITING = ("rate_limit", "login")  # refusals that an agent may sit on until a limit ends it
REFUSAL_SECONDS = 60.0  # a service refuses at once: after a longer call some model was at work, whether its output tells or not
# What any program needs to find its home, its network and its language. Secrets are passed by name, per agent.
BASE_ENV = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR",
    "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS",
)  # fmt: skip
PLAIN_OUTPUT = {"TERM": "dumb", "NO_COLOR": "1"}  # colours and spinners would only have to be stripped from the logs


class CoderError(UsageError):
    """An agent that can't be asked: unknown, not installed, or given a job it can't do. The message says the mend."""


@dataclass(frozen=True)
class Job:
    """One experiment's request to a coding agent."""

    worktree: Path  # its working directory, and all it may write to
    train_file: str  # the file to edit, relative to the worktree
    prompt: str
    scratch: Path  # an existing directory outside the worktree, fresh for every job: prompt file, histories, usage
    model: str | None = None
    base_url: str | None = None  # chat only
    max_cost_usd: float | None = None  # passed on where the CLI has such a limit
    pass_env: tuple[str, ...] = ()  # further variables of the user's environment, by name
    extra_args: tuple[str, ...] = ()  # further arguments for the CLI, as the user wrote them
    check: bool = False  # asked for one word before a night: no edit is wanted

    @property
    def prompt_file(self) -> Path:
        return self.scratch / "prompt.md"

    def scratch_file(self, name: str) -> str:
        return str(self.scratch / name)


@dataclass(frozen=True)
class Command:
    """What the spawner runs, with the worktree as working directory."""

    argv: list[str]
    env: dict[str, str]  # the whole environment: nothing is inherited
    stdin: str  # "" where the CLI takes its prompt another way: standard input is then empty, never the terminal


@dataclass(frozen=True)
class Reply:
    """What an agent's output says. It is evidence: whether the train file changed is what decides."""

    tokens_in: int | None = None  # as billed: cached tokens included; None where the CLI doesn't say
    tokens_out: int | None = None
    cost_usd: float | None = None
    message: str | None = None  # the last message, stripped
    hypothesis: str | None = None
    description: str | None = None
    failure: Failure | None = None
    detail: str | None = None  # the line that names the failure, for the log and for the human
    wait_seconds: float | None = None  # with `rate_limit`: how long, where the answer says
    structured: bool = False  # the failure stands in an error field, not only in words of a log


Reader = Callable[[str, str, Job], Reply]  # standard output, log (standard error), the job that was run


@dataclass(frozen=True)
class Login:
    """A file below the user's HOME that exists once somebody has logged in, and text that must be in it."""

    path: str  # relative to HOME, or to the variable named in `below`
    needle: str = ""
    below: str = "HOME"


@dataclass(frozen=True)
class Coder:
    """A coding agent as data. `command` and `reply` are all that the driver calls."""

    name: str
    binary: str  # looked up on the user's PATH; an absolute path is taken as it is
    arguments: Callable[[Job], list[str]]  # everything after the binary
    reader: Reader
    install_hint: str  # the command that installs it
    login_hint: str  # the command that mends an expired login
    env_names: tuple[str, ...] = ()  # its own variables in the user's environment
    env_set: Mapping[str, str] = field(default_factory=dict)
    settings: Callable[[Job], dict[str, str]] | None = None  # variables made for the job; it may write to the scratch
    login_env: tuple[str, ...] = ()  # any of these set means logged in
    login_files: tuple[Login, ...] = ()
    prompt_on_stdin: bool = True
    idle_seconds: float | None = None  # the longest silence of one that prints as it works; None: it prints at its end
    extra_args_last: bool = True  # False where `arguments` puts `job.extra_args` before its last word
    tells_its_end: bool = True  # its output has a final message or a usage record once its work is done
    free: bool = False  # it costs nothing, so that no price is missing
    check_seconds: float = 180.0  # for the one word it is asked for before a night

    def command(self, job: Job, environ: Mapping[str, str]) -> Command:
        """The command for `job`, from the user's environment. Writes `job.prompt_file`.

        Raises CoderError where the program isn't on the PATH of `environ`."""
        path = self.found(environ)
        job.prompt_file.write_text(job.prompt, encoding="utf-8")
        names = (*BASE_ENV, *self.env_names, *job.pass_env)
        env = {name: environ[name] for name in names if name in environ}
        env |= PLAIN_OUTPUT | dict(self.env_set) | (self.settings(job) if self.settings else {})
        extra = job.extra_args if self.extra_args_last else ()
        return Command([path, *self.arguments(job), *extra], env, job.prompt if self.prompt_on_stdin else "")

    def reply(self, stdout: str, log: str, job: Job) -> Reply:
        """What the finished agent said. Never raises: output that can't be read is an `agent_error`."""
        try:
            reply = self.reader(stdout, log, job)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            detail = f"{self.name}: output of an unknown shape ({type(error).__name__}: {str(error)[:200]})"
            return Reply(failure="agent_error", detail=detail)
        reply = _of_plain_types(reply)
        if reply == Reply():
            reply = Reply(failure="agent_error", detail=f"{self.name} said nothing")
        if reply.failure is None and reply.tokens_out == 0 and reply.message:  # no model wrote this: the program did
            named = name_failure(reply.message)
            if named.failure != "agent_error":
                reply = replace(reply, failure=named.failure, detail=named.detail, wait_seconds=named.wait_seconds, structured=True)
        return with_last_lines(reply)

    def find(self, environ: Mapping[str, str]) -> str | None:
        """The program's path, or None where it isn't installed."""
        return shutil.which(self.binary, path=environ.get("PATH", ""))

    def found(self, environ: Mapping[str, str]) -> str:
        """The program's path. CoderError where it isn't installed."""
        if path := self.find(environ):
            return path
        raise CoderError(f"agent {self.name}: no program {self.binary!r} on PATH; install it: {self.install_hint}")

    def logged_in(self, environ: Mapping[str, str]) -> bool:
        """Whether there is a sign of a login. A sign only: an expired one is found out by the first experiment."""
        if any(environ.get(name) for name in self.login_env):
            return True
        return any(_has_login(login, environ) for login in self.login_files)


def _has_login(login: Login, environ: Mapping[str, str]) -> bool:
    root = environ.get(login.below)
    if not root:
        return False
    try:
        return login.needle in (Path(root) / login.path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


_LARGEST_COUNT = 1e12  # tokens, dollars or seconds: an agent that claims more says nothing


def _of_plain_types(reply: Reply) -> Reply:
    """The reply with None in place of what is no count, amount or text: an output may hold anything, and is journalled."""

    def amount(value: object) -> float | None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LARGEST_COUNT
        return value if number else None  # type: ignore[return-value]

    def count(value: object) -> int | None:
        return None if (known := amount(value)) is None else int(known)

    def text(value: object) -> str | None:
        return value if isinstance(value, str) else None

    failure = reply.failure if reply.failure in (None, *get_args(Failure)) else "agent_error"
    return replace(
        reply, tokens_in=count(reply.tokens_in), tokens_out=count(reply.tokens_out), cost_usd=amount(reply.cost_usd),
        message=text(reply.message), hypothesis=text(reply.hypothesis), description=text(reply.description), failure=failure,
        detail=text(reply.detail), wait_seconds=amount(reply.wait_seconds), structured=reply.structured is True,
    )  # fmt: skip


_LAST_LINE = re.compile(r"^[ \t>*_`#-]*(HYPOTHESIS|DESCRIPTION)[*_`]*[ \t]*:(.*)$", re.I | re.M)


def with_last_lines(reply: Reply) -> Reply:
    """Fills in `hypothesis` and `description` from the last HYPOTHESIS: and DESCRIPTION: line of the message."""
    found = {key.lower(): _unquoted(text) for key, text in _LAST_LINE.findall(reply.message or "")}
    return replace(
        reply,
        hypothesis=reply.hypothesis or found.get("hypothesis"),
        description=reply.description or found.get("description"),
    )


def _unquoted(text: str) -> str | None:
    text = text.strip(" \t\r*")
    if text.startswith("`") and text.endswith("`") and text.count("`") == 2:
        text = text[1:-1].strip()
    return text or None


def cost_usd(reply: Reply, price_in: float | None, price_out: float | None) -> float | None:
    """What the agent cost: as reported, else from its tokens at `price_in`/`price_out` USD per million tokens.

    None where neither the cost nor both tokens and prices are known: unknown is not free."""
    if reply.cost_usd is not None:
        return reply.cost_usd
    if price_in is None or price_out is None or reply.tokens_in is None or reply.tokens_out is None:
        return None
    return (reply.tokens_in * price_in + reply.tokens_out * price_out) / 1e6


def usage_of(coder: Coder, reply: Reply, seconds: float, price_in: float | None, price_out: float | None) -> dict[str, Any]:
    """What a call that took so many seconds has used, as the journal keeps it. `cost` in US dollars; None: it has cost something
    that isn't known."""
    cost = cost_usd(reply, price_in, price_out)
    refused = cost is None and seconds < REFUSAL_SECONDS and _refused(reply)
    return {
        "cost": 0.0 if coder.free or refused else cost,
        "tokens": (reply.tokens_in or 0) + (reply.tokens_out or 0), "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out,
    }  # fmt: skip


def _refused(reply: Reply) -> bool:
    """Whether no model was at work: no tokens are told, and what was said, if anything, is the refusal itself."""
    if reply.failure not in (*WAITING, "missing") or reply.tokens_in or reply.tokens_out:
        return False
    return not reply.message or name_failure(reply.message).failure != "agent_error"


def believed(reply: Reply, exit_code: int | None) -> Reply:
    """The reply without a refusal that only words of a log tell of, such as "Authenticated as", against exit code 0."""
    logged = exit_code == 0 and reply.failure in WAITING and not reply.structured
    return replace(reply, failure=None) if logged else reply
