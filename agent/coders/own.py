"""The rows of the agents that come with this project: `search`, `chat`, `local` and `acp`, each a module run as a program."""

from __future__ import annotations

import sys
from pathlib import Path

from agent.coders import shapes
from agent.coders.clis import OPENAI, model
from agent.coders.coder import Coder, Job

ROOT = str(Path(__file__).resolve().parent.parent.parent)
# The worktree is the working directory; its copy of our modules must not be the one that runs.
OURS = {"PYTHONPATH": ROOT, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def chat(job: Job) -> list[str]:
    endpoint = ["--base-url", job.base_url] if job.base_url else []
    return ["-m", "agent.chat", job.train_file, *model(job, "--model"), *endpoint, *check(job)]


def local(job: Job) -> list[str]:
    return ["-m", "agent.local", job.train_file, *model(job, "--model"), *check(job)]


def check(job: Job) -> list[str]:
    """Before a night: one word is asked with a prompt of the real size, and the time of a proposal is told."""
    return ["--check"] if job.check else []


OWN = (
    Coder(
        name="search",
        binary=sys.executable,
        arguments=lambda job: ["-m", "agent.search", "--train-file", job.train_file],
        reader=shapes.plain,
        tells_its_end=False,
        free=True,
        install_hint="it comes with this project",
        login_hint="it needs no login",
        env_set=OURS,
    ),
    Coder(
        name="chat",
        check_seconds=600.0,  # a server may have to load its model first
        binary=sys.executable,
        arguments=chat,
        reader=shapes.own,
        install_hint="it comes with this project",
        login_hint="set OPENAI_API_KEY to a key for the endpoint given with --base-url",
        env_names=("AUTORESEARCH_API_KEY", *OPENAI),
        env_set=OURS,
    ),
    Coder(
        name="local",
        check_seconds=600.0,  # it loads a model of many gigabytes
        free=True,
        binary=sys.executable,
        arguments=local,
        reader=shapes.own,
        install_hint="python -m pip install mlx-lm",
        login_hint="it needs no login",
        env_names=("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "MLX_METAL_FAST_SYNCH"),
        env_set=OURS,
    ),
    # The agent's own command is put behind it by `choice.acp`. It permits edits of the train file only; an agent that does not ask
    # is held by nothing but the guard.
    Coder(
        name="acp",
        binary=sys.executable,
        arguments=lambda job: ["-m", "agent.acp", job.train_file, *model(job, "--model"), "--"],
        reader=shapes.own,
        install_hint="it comes with this project",
        login_hint="log in with the command of the agent itself; variables that it needs are passed by --agent-env NAME",
        env_set=OURS,
    ),
)
