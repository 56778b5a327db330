"""Any agent that speaks the Agent Client Protocol: this program is its client for one edit.

    python -m agent.acp TRAIN_FILE [--model M] -- COMMAND [ARGUMENT...] < prompt

It starts the command, opens a session in the working directory, sends the prompt, and serves what the agent asks for: files of the
working directory to read, and the train file to write. No terminal is offered, and no permission is given for anything else. An
agent whose tools do not ask can do more; the guard looks at what changed. The last line of standard output is a Reply.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.chat.edit import answer_prompt
from agent.coders.coder import Reply, with_last_lines
from agent.coders.error_text import name_failure
from agent.coders.own import OURS
from agent.text import one_line, redact

if TYPE_CHECKING:
    from acp.schema import (
        NewSessionResponse,
        PermissionOption,
        PromptResponse,
        ReadTextFileResponse,
        RequestPermissionResponse,
        ToolCallUpdate,
        WriteTextFileResponse,
    )

INSTALL = "python -m pip install agent-client-protocol"
AUTH_REQUIRED = -32000  # JSON-RPC error code of the protocol
READING, EDITING = ("read", "search", "think"), ("edit", "move", "delete")  # kinds of tool; no other gets a permission
MOST_FILE_BYTES = 4 << 20  # of a file that is read or written
MOST_MESSAGE = 100_000  # characters of the final message that are kept
EXIT_SECONDS = 2.0  # for an agent that has closed its output
LINE_BYTES = 64 << 20  # of one message of the protocol


class Client:
    """What the agent may ask of us, and what it has said so far. The method names are the package's."""

    def __init__(self, folder: Path, train_file: Path) -> None:
        self.folder, self.train_file = folder.resolve(), train_file.resolve()
        self.message = ""  # since the last tool call
        self.cost: float | None = None  # US dollars
        self.calls: dict[str, ToolCallUpdate] = {}  # the newest word about each tool call

    async def session_update(self, session_id: str, update: Any, **_: Any) -> None:
        kind = update.session_update
        if kind == "agent_message_chunk" and update.content.type == "text":
            self.message = (self.message + update.content.text)[-MOST_MESSAGE:]
        elif kind in ("tool_call", "tool_call_update"):
            self.message = ""
            self._remember(update)
        elif kind == "usage_update" and update.cost is not None and update.cost.currency.upper() == "USD":
            self.cost = update.cost.amount

    async def request_permission(
        self, session_id: str, tool_call: ToolCallUpdate, options: list[PermissionOption], **_: Any
    ) -> RequestPermissionResponse:  # fmt: skip
        from acp.schema import AllowedOutcome, DeniedOutcome, RequestPermissionResponse

        call = self._remember(tool_call)
        allowed = self.allows(call)
        wanted = ("allow_once",) if allowed else ("reject_once", "reject_always")  # "always" would be for other files, too
        if not allowed:
            print(f"no permission for: {one_line(redact(str(call.title or call.kind)), 200)}", file=sys.stderr)
        found = next((option for kind in wanted for option in options if option.kind == kind), None)
        outcome = AllowedOutcome(outcome="selected", option_id=found.option_id) if found else DeniedOutcome(outcome="cancelled")
        return RequestPermissionResponse(outcome=outcome)

    def allows(self, call: ToolCallUpdate) -> bool:
        """Whether a tool call only reads in the working directory, or changes the train file and nothing else."""
        edited = [self._inside(part.path) for part in call.content or [] if part.type == "diff"]
        paths = [self._inside(location.path) for location in call.locations or []] + edited
        if call.kind in EDITING or (edited and call.kind in (None, "other")):
            return bool(paths) and all(path == self.train_file for path in paths)
        return call.kind in READING and all(paths)

    async def read_text_file(
        self, session_id: str, path: str, line: int | None = None, limit: int | None = None, **_: Any
    ) -> ReadTextFileResponse:  # fmt: skip
        from acp import RequestError
        from acp.schema import ReadTextFileResponse

        file = self._inside(path)
        if file is None or not file.is_file() or file.stat().st_size > MOST_FILE_BYTES:
            raise RequestError.invalid_params({"path": path, "expected": f"a text file in {self.folder}"})
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        first = max((line or 1) - 1, 0)
        return ReadTextFileResponse(content="".join(lines[first : None if limit is None else first + limit]))

    async def write_text_file(self, session_id: str, path: str, content: str, **_: Any) -> WriteTextFileResponse:
        from acp import RequestError
        from acp.schema import WriteTextFileResponse

        if self._inside(path) != self.train_file or len(content) > MOST_FILE_BYTES:
            raise RequestError.invalid_params({"path": path, "expected": f"no other file than {self.train_file}"})
        with open(self.train_file, "w", encoding="utf-8", errors="replace", newline="") as file:
            file.write(content)
        return WriteTextFileResponse()

    async def create_terminal(self, *_: Any, **__: Any) -> Any:
        from acp import RequestError

        raise RequestError.method_not_found("terminal/create")

    def _remember(self, call: ToolCallUpdate) -> ToolCallUpdate:
        """The call with what was told of it before: an update holds only what is new."""
        from acp.schema import ToolCallUpdate

        known = self.calls.get(call.tool_call_id)
        told = {name: getattr(call, name) or getattr(known, name, None) for name in ("kind", "title", "content", "locations")}
        whole = self.calls[call.tool_call_id] = ToolCallUpdate.model_construct(tool_call_id=call.tool_call_id, **told)
        return whole

    def _inside(self, path: str) -> Path | None:
        """The path, with its links followed, or None where it leads out of the working directory."""
        try:
            real = (self.folder / path).resolve()
        except (OSError, ValueError, RuntimeError):
            return None
        return real if real.is_relative_to(self.folder) else None


async def converse(client: Client, command: list[str], prompt: str, model: str | None) -> Reply:
    """One prompt to the agent that `command` starts, to the end of its turn. Raises RequestError, OSError or ConnectionError."""
    import acp
    from acp.schema import ClientCapabilities, FileSystemCapabilities, Implementation

    env = {name: value for name, value in os.environ.items() if name not in OURS}
    files = FileSystemCapabilities(read_text_file=True, write_text_file=True)
    pipes = {"limit": LINE_BYTES, "stderr": None}  # its log is ours
    agent = acp.spawn_agent_process(client, *command, env=env, cwd=client.folder, transport_kwargs=pipes)  # type: ignore[arg-type]
    async with agent as (connection, process):

        async def talk() -> PromptResponse:
            await connection.initialize(
                acp.PROTOCOL_VERSION, ClientCapabilities(fs=files, terminal=False), Implementation(name="autoresearch", version="1")
            )
            session = await connection.new_session(cwd=str(client.folder), mcp_servers=[])
            if model:
                await connection.set_config_option(_model_option(session, model), session.session_id, model)
            return await connection.prompt(session_id=session.session_id, prompt=[acp.text_block(prompt)])

        talking, ending = asyncio.ensure_future(talk()), asyncio.ensure_future(process.wait())
        await asyncio.wait((talking, ending), return_when=asyncio.FIRST_COMPLETED)
        if not talking.done() or isinstance(talking.exception(), ConnectionError):
            talking.cancel()
            await asyncio.wait((ending,), timeout=EXIT_SECONDS)
            end = f"ended with exit code {ending.result()}" if ending.done() else "closed its output"
            raise ConnectionError(f"the agent {end} before its turn was over; what it said is in the log")
        ending.cancel()
        response = talking.result()
    reply = Reply(*_tokens(response), client.cost, client.message.strip() or None)
    if response.stop_reason != "end_turn":
        return _failed(f"the agent stopped for {response.stop_reason}", reply)
    if reply.message is None and not reply.tokens_out:
        return _failed("an empty turn: the agent said nothing", reply)
    return with_last_lines(reply)


def _tokens(response: PromptResponse) -> tuple[int | None, int | None]:
    """Tokens in, with cached ones, and out: as the protocol has them, else as gemini 0.61 tells them. None: not told."""
    if usage := response.usage:
        out = usage.output_tokens + (usage.thought_tokens or 0)
        return max(usage.input_tokens, usage.total_tokens - out), out
    try:
        counts = (response.field_meta or {})["quota"]["token_count"]
        return int(counts["input_tokens"]), int(counts["output_tokens"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None, None


def _model_option(session: NewSessionResponse, model: str) -> str:
    """The id of the session's option for the model. ValueError without one that has this model."""
    for option in session.config_options or []:
        if option.type == "select" and "model" in (option.category, option.id):
            values = [one.value for entry in option.options for one in (getattr(entry, "options", None) or [entry])]
            if model in values:
                return option.id
            raise ValueError(f"no model {model!r}; the agent offers {', '.join(values[:20])}")
    raise ValueError("the agent offers no choice of models; leave out --model, and name the model in --agent-cmd where it can be")


def _failed(detail: str, reply: Reply = Reply(), **more: Any) -> Reply:  # noqa: B008  a Reply is frozen
    known = {"failure": "agent_error", "structured": True, **more}
    return Reply(reply.tokens_in, reply.tokens_out, reply.cost_usd, reply.message, detail=one_line(redact(detail), 500), **known)


def ask(train_file: Path, command: list[str], prompt: str, model: str | None) -> Reply:
    """As `converse`, with every failure named."""
    if importlib.util.find_spec("acp") is None:
        return _failed(f"the package agent-client-protocol is not installed; install it: {INSTALL}", failure="missing")
    if shutil.which(command[0]) is None:
        return _failed(f"no program {command[0]!r}; expected the command of an agent, such as 'gemini --acp'", failure="missing")
    from acp import RequestError

    client = Client(Path.cwd(), train_file)
    try:
        return asyncio.run(converse(client, command, prompt, model))
    except RequestError as error:
        words = f"{error} {error.data if error.data else ''}".strip()
        known = Reply(cost_usd=client.cost, message=client.message.strip() or None)
        if error.code == AUTH_REQUIRED:
            return _failed(f"{words}; log in with the agent's own command first", known, failure="login")
        named = name_failure(words)
        return _failed(words, known, failure=named.failure, wait_seconds=named.wait_seconds)
    except ValueError as error:
        return _failed(str(error), failure="missing")
    except OSError as error:
        return _failed(str(error) or type(error).__name__, structured=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("train_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--model", help="One of the models that the agent offers. Default: the agent's.")
def main(train_file: Path, command: tuple[str, ...], model: str | None) -> None:
    """Have the agent that COMMAND starts edit TRAIN_FILE as the prompt on standard input asks.

    Exit codes: 0 its turn ended, 1 a failure, 2 usage, 3 login, 4 rate limit, 5 missing."""
    answer_prompt(lambda prompt: ask(train_file, list(command), prompt, model))


if __name__ == "__main__":
    main()
