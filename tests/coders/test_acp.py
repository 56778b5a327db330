"""`--agent acp`: our client of the Agent Client Protocol against a scripted agent, and a night with it."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from night_kit import Bed

from agent.acp import ask
from agent.coders import choice
from agent.coders.coder import CoderError, Reply
from agent.journal.journal import read_events
from agent.journal.state import fold

pytest.importorskip("acp")
AGENT = shlex.join([sys.executable, str(Path(__file__).with_name("acp_agent.py"))])


Talk = Callable[..., Reply]


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """A conversation with the scripted agent, which plays the words of `scenario`, in a worktree and as the loop has it."""
    (tmp_path / "worktree").mkdir()
    (tmp_path / "worktree" / "train_mlx.py").write_text("GAIN = 0.0\n")
    (tmp_path / "outside.py").write_text("SECRET = 1\n")
    monkeypatch.chdir(tmp_path / "worktree")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in choice.get("acp").env_set.items():
        monkeypatch.setenv(name, value)

    def converse(*scenario: str, model: str | None = None, command: str = AGENT) -> Reply:
        return ask(Path("train_mlx.py"), [*shlex.split(command), *scenario], "PROMPT-TEXT", model)

    return converse


def edited(folder: Path) -> bool:
    return (folder / "worktree" / "train_mlx.py").read_text() == "GAIN = 0.05\n"


def seen(folder: Path) -> dict:
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("way", ["fs", "own-tool"])
def test_an_edit_with_its_words_usage_and_cost(talk: Talk, tmp_path: Path, way: str) -> None:
    reply = talk(way, "cost", "dump")
    assert edited(tmp_path)
    assert (reply.failure, reply.hypothesis, reply.description) == (None, "larger steps", "double LR")
    assert reply.message == "Raised it.\n\nHYPOTHESIS: larger steps\nDESCRIPTION: double LR", "what follows the last tool call"
    assert (reply.tokens_in, reply.tokens_out, reply.cost_usd) == (1050, 50, 0.25)
    assert "PROMPT-TEXT" in seen(tmp_path)["prompt"]
    assert not {"PYTHONPATH", "PYTHONSAFEPATH"} & set(seen(tmp_path)["env"]), "those are our client's own"


def test_tokens_that_are_told_outside_of_the_protocol_are_counted(talk: Talk) -> None:
    reply = talk("meta")
    assert (reply.failure, reply.tokens_in, reply.tokens_out) == (None, 3000, 150)


def test_permission_is_given_to_read_the_worktree_and_to_edit_the_train_file(talk: Talk, tmp_path: Path) -> None:
    talk("asks", "dump")
    assert seen(tmp_path)["permission"] == ["allow_once", *["reject_once"] * 8]


def test_no_file_outside_is_served_and_no_other_one_written(talk: Talk, tmp_path: Path) -> None:
    reply = talk("strays", "fs", "dump")
    assert len(seen(tmp_path)["errors"]) == 6
    assert (tmp_path / "outside.py").read_text() == "SECRET = 1\n"
    assert sorted(path.name for path in (tmp_path / "worktree").iterdir()) == ["train_mlx.py"]
    assert (reply.failure, edited(tmp_path)) == (None, True)


def test_a_model_is_chosen_among_those_that_the_agent_offers(talk: Talk, tmp_path: Path) -> None:
    assert talk("models", "dump", model="large").failure is None
    assert seen(tmp_path)["model"] == "large"
    unknown = talk("models", model="huge")
    assert (unknown.failure, unknown.detail) == ("missing", "no model 'huge'; the agent offers small, large")
    none = talk(model="large")
    assert (none.failure, "offers no choice of models" in (none.detail or "")) == ("missing", True)


@pytest.mark.parametrize(("scenario", "failure", "words", "wait"), [
    ("auth", "login", "Authentication required", None),
    ("error=429 Too Many Requests, try again in 20s", "rate_limit", "429", 20.0),
    ("error=the model crashed", "agent_error", "the model crashed", None),
    ("stop=refusal", "agent_error", "the agent stopped for refusal", None),
    ("dies", "agent_error", "exit code 1", None),
])  # fmt: skip
def test_failures_are_named(talk: Talk, tmp_path: Path, scenario: str, failure: str, words: str, wait: float | None) -> None:
    began = time.monotonic()
    reply = talk(scenario)
    assert (reply.failure, reply.wait_seconds) == (failure, wait), reply
    assert words in (reply.detail or "")
    assert time.monotonic() - began < 30
    assert not edited(tmp_path)


def test_a_program_that_does_not_speak_the_protocol_is_an_agent_error(talk: Talk) -> None:
    assert talk("just text", command="echo").failure == "agent_error"


def test_the_agents_command_is_needed_and_looked_for_at_the_start() -> None:
    with pytest.raises(CoderError, match="--agent acp needs the agent's command; for example --agent-cmd"):
        choice.choose({"agent": "acp"})
    with pytest.raises(CoderError, match="no program 'no-such-agent' on PATH"):
        choice.choose({"agent": "acp", "agent_cmd": "no-such-agent --acp"})
    coder, about = choice.choose({"agent": "acp", "agent_cmd": AGENT})
    assert (coder.name, about) == ("acp", f"agent: {AGENT} by the Agent Client Protocol")


def test_a_known_agent_sees_the_variables_of_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "gemini").write_text("#!/bin/sh\n")
    (tmp_path / "gemini").chmod(0o755)
    coder = choice.acp("gemini --acp", {"PATH": str(tmp_path)})
    assert set(choice.get("gemini").env_names) <= set(coder.env_names)
    assert coder.settings is choice.get("gemini").settings


def test_a_night_by_the_protocol(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    done = bed.loop("--agent", "acp", "--agent-cmd", f"{AGENT} own-tool cost", "--tag", "night", "--baseline-seeds", "3",
                    "--disk-gb", "0", "--no-picture", "--no-sandbox", "--experiments", "1", "--max-cost", "5")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "acp answered in" in done.stdout
    night = fold(read_events(bed.folder() / "journal.jsonl")[0])
    assert [(e.status, e.description, e.cost) for e in night.done] == [("keep", "double LR", 0.25)]
    assert night.cost == 0.5
