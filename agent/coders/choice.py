"""Choose a coding agent: by name, by the user's own command, or the first one that is installed and logged in.

The rows of the table are in `clis.py` (command lines of others) and `own.py` (agents of this project). Use a row like this:

coder = choice.get("claude")
command = coder.command(job, os.environ)                  # argv, whole environment, standard input
...agent/process/child.py runs it with the worktree as working directory...
reply = coder.reply(stdout, log, job)                     # usage, last message, named failure
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agent.coders import shapes
from agent.coders.clis import CLIS
from agent.coders.coder import Coder, CoderError, Job
from agent.coders.own import OWN
from agent.errors import UsageError
from agent.text import redact

TABLE: dict[str, Coder] = {coder.name: coder for coder in (*CLIS, *OWN)}
FALLBACK = "search"  # needs neither a login nor a network


def get(name: str) -> Coder:
    """The agent of that name. Raises CoderError."""
    if name not in TABLE:
        raise CoderError(f"unknown agent {name!r}; expected one of {', '.join(TABLE)}, or --agent-cmd 'a command'")
    return TABLE[name]


def arguments(text: str | None) -> tuple[str, ...]:
    """The words of --agent-args, split as a shell splits them. Raises CoderError."""
    try:
        return tuple(shlex.split(text or ""))
    except ValueError as error:
        raise CoderError(f"--agent-args {text!r} can't be split into words: {error}; expected such as '--effort high'") from error


def template(command: str) -> Coder:
    """The user's own command: the prompt on standard input, the worktree as working directory.

    `{train_file}`, `{worktree}` and `{prompt_file}` in it are filled in. No shell reads it. Raises CoderError."""
    words = _words(command)

    def filled_in(job: Job) -> list[str]:
        filled = words[1:]
        values = {"train_file": job.train_file, "worktree": job.worktree, "prompt_file": job.prompt_file}
        for key, value in values.items():
            filled = [word.replace("{" + key + "}", str(value)) for word in filled]
        return filled

    return Coder(
        name="cmd",
        binary=words[0],
        arguments=filled_in,
        reader=shapes.command,
        tells_its_end=False,
        install_hint=f"put {words[0]} on PATH, or give its full path in --agent-cmd",
        login_hint=f"log in to {words[0]}; variables that it needs are passed by --agent-env NAME",
    )


def _words(command: str) -> list[str]:
    """The words of --agent-cmd, with an absolute path of the program: it starts in the night's worktree. Raises CoderError."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise CoderError(f"--agent-cmd {command!r} can't be split into words: {error}") from error
    if not words:
        raise CoderError("--agent-cmd is empty; expected a command, for example 'my-agent --edit {train_file}'")
    if os.sep in words[0]:
        words[0] = os.path.abspath(os.path.expanduser(words[0]))
    return words


def acp(command: str | None, environ: Mapping[str, str]) -> Coder:
    """The agent that the command starts, spoken to by the Agent Client Protocol. It sees what its own row of the table sees.

    Raises CoderError without a command, or where its program is not on the PATH of `environ`."""
    if command is None:
        raise CoderError("--agent acp needs the agent's command; for example --agent-cmd 'gemini --acp'")
    words, row = _words(command), TABLE["acp"]
    found = shutil.which(words[0], path=environ.get("PATH", ""))
    if found is None:
        raise CoderError(f"--agent acp: no program {words[0]!r} on PATH; install it, or give its full path in --agent-cmd")
    known = next((coder for coder in CLIS if coder.binary == os.path.basename(words[0])), None)
    row = replace(row, arguments=lambda job: [*TABLE["acp"].arguments(job), found, *words[1:]])
    if known is None:
        return row
    return replace(row, env_names=known.env_names, env_set={**known.env_set, **row.env_set}, settings=known.settings)


def detect(environ: Mapping[str, str]) -> tuple[Coder, str]:
    """The first agent of the table that is installed and logged in; `search` where there is none. And a line for the human: what
    was taken, and why the ones before it were not."""
    passed: list[str] = []
    for coder in TABLE.values():
        if not coder.login_env and not coder.login_files:
            continue  # chat and local are asked for by name: an endpoint or gigabytes of memory are the user's choice
        if coder.find(environ) is None:
            continue
        if coder.logged_in(environ):
            also = f" ({'; '.join(passed)})" if passed else ""
            return coder, f"agent: {coder.name}, the first one installed and logged in{also}"
        passed.append(f"{coder.name} is installed but not logged in: {coder.login_hint}")
    why = "; ".join(passed) or "no coding agent is installed"
    return TABLE[FALLBACK], f"agent: {FALLBACK}, the built-in proposer without a language model ({why})"


def choose(options: Mapping[str, Any]) -> tuple[Coder, str]:
    """The coding agent and a line about it. CoderError if it is unknown or not installed: better now than after the baseline."""
    if options.get("agent") and options.get("agent_cmd") and options["agent"] != "acp":
        raise UsageError("give --agent or --agent-cmd, not both; only --agent acp takes both")
    arguments(options.get("agent_args"))
    if options.get("agent") == "acp":
        coder, about = acp(options.get("agent_cmd"), os.environ), f"agent: {options.get('agent_cmd')} by the Agent Client Protocol"
    elif options.get("agent_cmd"):
        coder, about = template(options["agent_cmd"]), f"agent: {options['agent_cmd']}"
    elif options.get("agent"):
        coder, about = get(options["agent"]), f"agent: {options['agent']}"
    else:
        coder, about = detect(os.environ)
    coder.found(os.environ)
    return coder, redact(about)
