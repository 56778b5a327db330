"""What becomes of one run of an agent: real programs in a real worktree, judged by the file first and by their words second."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from night_kit import Bed

from agent.coders import choice, shapes
from agent.coders.coder import CoderError, Reader
from agent.git.worktree import Repository, Worktree
from agent.journal.settings import Settings
from agent.proposal.ask import Desk, Proposal, ask

LIMIT = "Error: 429 Too Many Requests. Please try again in 20s."
LOGIN = "Error: 401 Unauthorized: invalid API key"
EDIT = "import re; p = pathlib.Path('train_mlx.py'); p.write_text(p.read_text().replace('GAIN = 0.0', 'GAIN = 0.5'))"


class Place:
    """A worktree and an agent that is a few lines of Python."""

    def __init__(self, folder: Path) -> None:
        bed = Bed(folder)
        repository = Repository(bed.repo)
        self.base = repository.head
        self.folder = folder / "night"
        self.worktree = Worktree(repository, "t", self.folder / "worktree")
        self.folder.mkdir()
        self.worktree.open(self.base)
        self.script = folder / "agent.py"

    @property
    def file(self) -> Path:
        return self.worktree.path / "train_mlx.py"

    def ask(
        self, body: str, reader: Reader = shapes.plain, idle: float | None = None, 
        ends: bool = False, **settings: object,
    ) -> Proposal:  # fmt: skip
        self.script.write_text(f"import json, os, pathlib, sys, time\nprompt = sys.stdin.read()\n{body}\n")
        command = f"{shlex.quote(sys.executable)} {shlex.quote(str(self.script))}"
        coder = replace(choice.template(command), reader=reader, idle_seconds=idle, tells_its_end=ends)
        given = {"max_agent_minutes": 0.5, **settings}
        self.worktree.lend(self.base)
        desk = Desk(self.folder, self.worktree, "train_mlx.py", coder, Settings(**given), lambda: False)  # type: ignore[arg-type]
        return ask(desk, "PROMPT", self.base, 1, 1, None)


@pytest.fixture
def desk(tmp_path: Path) -> Place:
    return Place(tmp_path)


def say(text: str) -> str:
    return f"print({text!r}, file=sys.stderr, flush=True)"


REFUSALS = [(LIMIT, "rate_limit", 20.0), (LOGIN, "login", None), ("thinking", "agent_error", None)]


@pytest.mark.parametrize(("said", "kind", "wait"), REFUSALS)
def test_an_agent_that_sits_on_a_refusal_until_the_wall_was_refused(desk: Place, said: str, kind: str, wait: float | None) -> None:
    got = desk.ask(f"{say(said)}\ntime.sleep(60)", max_agent_minutes=0.02)
    assert (got.kind, got.wait) == (kind, wait), got
    assert (said if kind != "agent_error" else "ended by the limit wall") in got.message
    assert ("log in to" in got.message) == (kind == "login")


def test_a_refusal_after_an_edit_that_was_not_finished_is_the_agents_error(desk: Place) -> None:
    got = desk.ask(f"{EDIT}\n{say(LIMIT)}\ntime.sleep(60)", max_agent_minutes=0.02)
    assert (got.kind, "limit wall" in got.message) == ("agent_error", True)


@pytest.mark.parametrize(("said", "kind"), [("working", "agent_error"), (LIMIT, "rate_limit")])
def test_silence_ends_one_that_prints_as_it_works(desk: Place, said: str, kind: str) -> None:
    begun = time.monotonic()
    got = desk.ask(f"{say(said)}\ntime.sleep(60)", idle=1.0)
    assert time.monotonic() - begun < 15
    assert got.kind == kind
    assert ("said nothing for 1 s" in got.message) == (kind == "agent_error")


def test_silence_is_no_fault_of_one_that_prints_at_its_end(desk: Place) -> None:
    got = desk.ask(f"time.sleep(2)\n{EDIT}\nprint('DESCRIPTION: slow and right')")
    assert (got.kind, got.description) == ("changed", "slow and right")


def test_who_prints_as_it_works_stands_in_the_table() -> None:
    assert [coder.name for coder in choice.TABLE.values() if coder.idle_seconds] == ["codex", "opencode", "copilot"]
    assert choice.template("mine").idle_seconds is None


@pytest.mark.parametrize("megabytes", [0, 3, 9])
def test_the_result_is_read_however_much_stands_before_it(desk: Place, megabytes: int) -> None:
    reply = json.dumps({"tokens_in": 5, "tokens_out": 7, "cost_usd": 0.25, "message": "DESCRIPTION: at the end"})
    got = desk.ask(f"for _ in range({megabytes * 1024}): print('x' * 1023)\n{EDIT}\nprint({reply!r})", shapes.own)
    assert (got.kind, got.description) == ("changed", "at the end")
    assert got.usage == {"cost": 0.25, "tokens": 12, "tokens_in": 5, "tokens_out": 7}


REPLY = json.dumps({"tokens_in": 5, "tokens_out": 7, "cost_usd": 0.25, "message": "DESCRIPTION: done"})


@pytest.mark.parametrize(("body", "kind"), [(EDIT, "changed"), ("", "noop")])
def test_one_that_never_exits_is_ended_soon_after_its_final_message(
    desk: Place, monkeypatch: pytest.MonkeyPatch, body: str, kind: str
) -> None:
    monkeypatch.setattr("agent.proposal.ask.LINGER_SECONDS", 0.5)
    got = desk.ask(f"{body}\nprint({REPLY!r}, flush=True)\ntime.sleep(60)", shapes.own, ends=True)
    assert (got.kind, got.usage["cost"]) == (kind, 0.25), got
    assert got.seconds < 20


def test_silence_without_a_final_message_is_no_end(desk: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.proposal.ask.LINGER_SECONDS", 0.2)
    got = desk.ask(f"print('I begin', flush=True)\ntime.sleep(1.5)\n{EDIT}\nprint({REPLY!r})", shapes.own, ends=True)
    assert (got.kind, got.description) == ("changed", "done")


def test_arguments_of_the_users_reach_the_agent(desk: Place) -> None:
    got = desk.ask(f"{EDIT}\nprint('DESCRIPTION:', sys.argv[1:])", agent_args="--effort high --note 'two words'")
    assert got.description == "['--effort', 'high', '--note', 'two words']"
    with pytest.raises(CoderError, match=r"--agent-args .*split into words: No closing quotation; expected such as"):
        choice.arguments("it's")


def test_what_an_agents_git_does_stays_in_a_repository_of_its_own(desk: Place) -> None:
    """opencode writes a number there, others a stash or a config; the user's folder stays as it is."""
    users = desk.worktree.repository.root / ".git"
    before = {path: path.read_bytes() for path in users.rglob("*") if path.is_file() and "objects" not in path.parts}
    git = "import subprocess; run = lambda *w: subprocess.run(['git', *w], check=True)"
    got = desk.ask(f"{git}\nopen('.git/its-number', 'w').write('1')\n{EDIT}\nrun('stash')\nrun('stash', 'pop')\n"
                   "run('config', 'core.hooksPath', '/tmp/x')\nrun('checkout', '-q', '-b', 'side')\nrun('log', '-1')\n"
                   "print('DESCRIPTION: d')")
    assert got.kind == "changed", got
    assert {path: path.read_bytes() for path in users.rglob("*") if path.is_file() and "objects" not in path.parts} == before


def test_an_agent_that_fills_the_disk_is_ended_and_its_files_are_removed(desk: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.proposal.ask.AGENT_BYTES", 50 << 20)
    got = desk.ask("open('big', 'wb').write(b'x' * (80 << 20)); time.sleep(30)")
    assert (got.kind, "the disk is full" in got.message) == ("agent_error", True), got
    desk.worktree.fill(desk.base)
    assert not (desk.worktree.path / "big").exists()


def test_files_beside_an_honest_edit_are_told_and_cost_nothing(desk: Place) -> None:
    got = desk.ask(f"{EDIT}\nos.mkdir('.ruff_cache'); open('.ruff_cache/x', 'w').close(); open('.DS_Store', 'w').close()\n"
                   "open('notes.md', 'w').close()")
    assert got.kind == "changed", got
    assert set(got.droppings) == {".ruff_cache/", "notes.md"}, "macOS, not the agent, leaves .DS_Store"


def test_a_train_file_that_is_a_sparse_giant_is_not_read(desk: Place) -> None:
    begun = time.monotonic()
    got = desk.ask("os.truncate('train_mlx.py', 60 << 30); os.truncate('prepare_mlx.py', 60 << 30)")
    assert (got.kind, "at most" in got.message) == ("violation", True), got
    assert time.monotonic() - begun < 20


def test_what_an_agent_says_of_its_edit_is_believed_and_kept_apart(desk: Place) -> None:
    got = desk.ask(f"{EDIT}\nprint('HYPOTHESIS: it learns faster\\nDESCRIPTION: more gain')")
    assert (got.description, got.hypothesis) == ("more gain", "it learns faster")


@pytest.mark.parametrize(
    ("edits", "described"),
    [
        ([("GAIN = 0.0", "GAIN = 0.5")], "GAIN 0.0 -> 0.5, +1 -1 lines"),
        ([("GAIN = 0.0", "GAIN = 0.5  # new"), ('MODE = "ok"', 'MODE = "slow"')],
         "GAIN 0.0 -> 0.5; MODE \"ok\" -> \"slow\", +2 -2 lines"),
        ([("import json, os", "import math\nimport json, os")], "+ import math, +1 -0 lines"),
        ([("    if MODE == \"oom\":\n", "    if MODE == \"none\":\n")], "+ if MODE == \"none\":, +1 -1 lines"),
        ([("GAIN = 0.0\n", "")], "- GAIN = 0.0, +0 -1 lines"),
        ([("import json", "import math, json"), ("GAIN = 0.0", "GAIN = 1"), ("5.0 - step", "4.0 - step")],
         "+ import math, json, os, sys, time; GAIN 0.0 -> 1 and 1 more, +3 -3 lines"),
        ([("GAIN = 0.0\n", "GAIN = 0.0\n\n")], "whitespace, +1 -0 lines"),
    ],
)  # fmt: skip
def test_an_agent_without_words_is_described_by_its_diff(desk: Place, edits: list[tuple[str, str]], described: str) -> None:
    body = "p = pathlib.Path('train_mlx.py'); text = p.read_text()\n"
    body += "\n".join(f"assert {old!r} in text; text = text.replace({old!r}, {new!r}, 1)" for old, new in edits)
    got = desk.ask(f"{body}\np.write_text(text)\nprint('Let me know if you would like anything else!')")
    assert got.kind == "changed", got
    assert got.description == got.hypothesis == described
