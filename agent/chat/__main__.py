"""`python -m agent.chat TRAIN_FILE --base-url URL [--model M] < prompt`: one edit through an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from agent.chat.edit import edit, finish
from agent.chat.endpoint import ChatError, Endpoint
from agent.coders.coder import Reply


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("train_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--base-url", help="Such as http://127.0.0.1:1234/v1. Default: OPENAI_BASE_URL.")
@click.option("--model", help="Default: the endpoint's, if it has exactly one.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
              help="Timeout per reply, in seconds.")
@click.option("--max-tokens", type=click.IntRange(1), help="Maximum tokens per reply. Default: the endpoint's.")
@click.option("--temperature", type=click.FloatRange(0), help="Default: the endpoint's.")
def main(
    train_file: Path, base_url: str | None, model: str | None, timeout: float, max_tokens: int | None, temperature: float | None
) -> None:
    """Edit TRAIN_FILE as the prompt on standard input asks, through an OpenAI-compatible endpoint.

    The key is read from AUTORESEARCH_API_KEY or OPENAI_API_KEY. Exit codes: 0 edited, 1 no usable edit, 2 usage, 3 login, 4 rate
    limit, 5 missing."""
    environ = os.environ
    url = base_url or environ.get("OPENAI_BASE_URL") or environ.get("OPENAI_API_BASE")
    if not url:
        raise click.UsageError("no endpoint; give --base-url, for example http://127.0.0.1:1234/v1, or set OPENAI_BASE_URL")
    key = environ.get("AUTORESEARCH_API_KEY") or environ.get("OPENAI_API_KEY")
    prompt = sys.stdin.read()
    if not prompt.strip():
        raise click.UsageError("no prompt; expected it on standard input")
    try:
        endpoint = Endpoint(url, key, timeout, max_tokens=max_tokens, temperature=temperature)
        name = model or endpoint.only_model()
    except ChatError as error:
        finish(Reply(failure=error.failure, detail=str(error), wait_seconds=error.wait_seconds))
    finish(edit(lambda messages: endpoint.ask(name, messages), prompt, train_file))


if __name__ == "__main__":
    main()
