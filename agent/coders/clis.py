"""The rows of the table: binary, arguments, environment and login of each coding agent."""

from __future__ import annotations

import sys
from pathlib import Path

from agent.coders import shapes
from agent.coders.base import Coder, Job, Login

ROOT = str(Path(__file__).resolve().parent.parent.parent)  # our own agents run from here, not from the worktree's copy
CLOUD = (
    "AWS_PROFILE", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AWS_BEARER_TOKEN_BEDROCK", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION",
)  # fmt: skip


def _model(job: Job, flag: str) -> list[str]:
    return [flag, job.model] if job.model else []


def _claude(job: Job) -> list[str]:
    # acceptEdits: without it the write is denied and the exit code is 0 all the same
    limits = ["--max-budget-usd", f"{job.max_cost_usd:g}"] if job.max_cost_usd else []
    return ["-p", "--output-format", "json", "--permission-mode", "acceptEdits", "--tools", "Read,Edit,Write,Grep,Glob",
            "--no-session-persistence", "--setting-sources", "", "--strict-mcp-config",
            *_model(job, "--model"), *limits]  # fmt: skip


CLAUDE = Coder(
    name="claude",
    binary="claude",
    arguments=_claude,
    reader=shapes.claude,
    install_hint="npm install -g @anthropic-ai/claude-code",
    login_hint="run `claude` once and /login, or `claude setup-token` and set CLAUDE_CODE_OAUTH_TOKEN",
    env_names=(
        "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL", "ANTHROPIC_MODEL",
        "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_CUSTOM_HEADERS", "ANTHROPIC_VERTEX_PROJECT_ID", "CLOUD_ML_REGION",
        "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CONFIG_DIR", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", *CLOUD,
    ),
    env_set={"DISABLE_AUTOUPDATER": "1", "DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"},
    login_env=("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK",
               "CLAUDE_CODE_USE_VERTEX"),
    login_files=(
        Login(".claude/.credentials.json"),
        Login(".credentials.json", below="CLAUDE_CONFIG_DIR"),
        Login(".claude.json", '"oauthAccount"'),  # macOS keeps the token itself in the keychain
    ),
    edit_only="its tools are Read, Edit, Write, Grep and Glob; acceptEdits covers the working directory only",
)  # fmt: skip


def _own(module: str, reader_note: str) -> Coder:
    def arguments(job: Job) -> list[str]:
        named = _model(job, "--model") + (["--base-url", job.base_url] if job.base_url else [])
        return ["-m", f"agent.{module}", *named, *(["--train-file", job.train_file] if module != "search" else [])]

    return Coder(
        name=module,
        binary=sys.executable,
        arguments=arguments,
        reader=shapes.plain,
        install_hint="it comes with this project",
        login_hint=reader_note,
        # PYTHONSAFEPATH: the worktree, the working directory, must not shadow the driver's own modules
        env_set={"PYTHONPATH": ROOT, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        edit_only="it writes the train file and nothing else",
    )


CLIS = (CLAUDE, _own("search", "it needs no login"))
