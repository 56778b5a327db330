"""`python -m agent.chat TRAIN_FILE --base-url URL [--model M] < prompt`: one edit through an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from pathlib import Path

import click

from agent.chat.edit import answer_prompt, check, edit
from agent.chat.endpoint import READ_CHARACTERS, SILENT_SECONDS, Endpoint, first_set
from agent.coders.coder import Reply


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("train_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--base-url", help="Such as http://127.0.0.1:1234/v1. Default: OPENAI_BASE_URL.")
@click.option("--model", help="Default: the endpoint's, if it has exactly one.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
              help="Timeout per reply, in seconds.")
@click.option("--silence", type=click.FloatRange(min=0, min_open=True),
              help=f"Longest silence of a server that replies, in seconds. Default: {SILENT_SECONDS:g}, and 1 more for each "
              f"{READ_CHARACTERS} characters of the prompt.")
@click.option("--max-tokens", type=click.IntRange(1), help="Maximum tokens per reply. Default: the endpoint's.")
@click.option("--temperature", type=click.FloatRange(0), help="Default: the endpoint's.")
@click.option("--check", "only_check", is_flag=True,
              help="Edit nothing: ask for one word with a prompt as long as a night's, and tell how long a proposal takes.")
def main(
    train_file: Path, base_url: str | None, model: str | None, timeout: float, silence: float | None, max_tokens: int | None,
    temperature: float | None, only_check: bool,
) -> None:  # fmt: skip
    """Edit TRAIN_FILE as the prompt on standard input asks, through an OpenAI-compatible endpoint.

    The key is read from AUTORESEARCH_API_KEY or OPENAI_API_KEY. Exit codes: 0 edited, 1 no usable edit, 2 usage, 3 login, 4 rate
    limit, 5 missing."""
    url = base_url or first_set(os.environ, "OPENAI_BASE_URL", "OPENAI_API_BASE")
    if url is None:
        raise click.UsageError("no endpoint; give --base-url, for example http://127.0.0.1:1234/v1, or set OPENAI_BASE_URL")

    def work(prompt: str) -> Reply:
        key = first_set(os.environ, "AUTORESEARCH_API_KEY", "OPENAI_API_KEY")
        endpoint = Endpoint(url, key, timeout, max_tokens, temperature, silence)
        name = model or endpoint.only_model()
        return (check if only_check else edit)(lambda messages: endpoint.ask(name, messages), prompt, train_file)

    answer_prompt(work)


if __name__ == "__main__":
    main()
