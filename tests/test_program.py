"""The brief that the project ships says nothing untrue: what it names exists, and what it promises is so.

A person may rewrite program.md at any time, so these tests read the copy in tests/pinned.
"""

from __future__ import annotations

import ast
import re

import pytest
from conftest import PINNED, ROOT

from agent.coders.coder import Reply, with_last_lines
from agent.journal.state import fold
from agent.proposal import briefing
from agent.search.catalogue import HIGH, KNOBS, SWITCHES

PROGRAM = (PINNED / "program.md").read_text(encoding="utf-8")
RUN, CLOCK = (ast.parse((ROOT / "harness" / name).read_text(encoding="utf-8")) for name in ("run.py", "clock.py"))
TRAINER = (PINNED / "train_mlx.py").read_text(encoding="utf-8")


def methods(name: str) -> set[str]:
    found = next(node for node in (*RUN.body, *CLOCK.body) if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.name for node in found.body if isinstance(node, ast.FunctionDef)}


def prompt() -> str:
    """The prompt of a night's first experiment."""
    summary = {"num_steps": 100.0, "total_tokens_M": 1.5, "num_params_M": 3.6, "depth": 2.0, "peak_vram_mb": 96.0,
               "mfu_percent": 9.0, "device": "a machine"}  # fmt: skip
    events = [
        {"event": "night_start", "tag": "t", "base": "c0", "train_file": "train_mlx.py", "seed": 1, "sources": {},
         "dataset": {"budget": "300s", "vocab_size": 1024, "seq_len": 128, "device": "cpu"}},
        {"event": "experiment", "n": 0, "parent": "c0"},
        {"event": "candidate", "n": 0, "commit": "c0", "ast": "a", "lines": 1, "description": "baseline", "usage": {},
         "seconds": 0},
        {"event": "trial_start", "n": 0, "k": 0, "seed": 1, "dir": "0000-1"},
        {"event": "trial_end", "n": 0, "k": 0, "seed": 1, "dir": "0000-1", "status": "ok", "val_bpb": 1.5, "summary": summary,
         "seconds": 1.0, "error": None},
        {"event": "verdict", "n": 0, "status": "keep", "reason": "baseline", "val_bpb": 1.5, "description": "baseline",
         "error": None, "usage": {}, "seconds": 0},
    ]  # fmt: skip
    return briefing.compose(fold({"seq": i, "t": 1000.0 + i, **event} for i, event in enumerate(events)), PROGRAM)


def test_it_reaches_the_agent_whole() -> None:
    """As far as a prompt has room; a person may write a longer one."""
    assert PROGRAM.strip()[: briefing.PROGRAM_CHARACTERS - 200] in prompt()


def test_the_section_it_points_to_is_in_the_prompt_and_holds_what_it_says() -> None:
    title = re.search(r'stand under "([^"]+)"', PROGRAM)
    assert title
    section = prompt().split(f"# {title[1]}\n")[1].split("\n#")[0]
    for fact in ("device a machine", "Budget 300s", "1.5 M tokens", "100 steps", "96 MB", "MFU 9"):
        assert fact in section


def test_the_last_lines_it_asks_for_are_those_that_are_read() -> None:
    example = "\n".join(line.strip() for line in PROGRAM.splitlines() if re.match(r"\s+(HYPOTHESIS|DESCRIPTION): ", line))
    reply = with_last_lines(Reply(message=f"Done.\n\n{example}"))
    assert (reply.hypothesis, reply.description) == ("why it should lower val_bpb", "what was changed, in at most 12 words")
    asked = prompt().split("# What to do now")[1]
    assert "HYPOTHESIS: " in asked
    assert example.splitlines()[1] in asked


def test_the_harness_has_every_name_that_it_tells_the_agent_to_use() -> None:
    named = set(re.findall(r"`run\.(\w+)", PROGRAM))
    assert {"batches", "tokens", "log", "finish", "budget"} == named
    assert named - {"budget"} <= methods("Run")
    assert "start" in methods("Budget")
    for name in ("start_run", "run.budget.start(", "run.batches(", "Progress", "run.finish(", "load_model(run_dir)"):
        assert name in TRAINER
        assert f"`{name}" in PROGRAM or f"`{name[:-1]}`" in PROGRAM


def test_the_limit_on_starting_is_the_harness_own() -> None:
    assigned = [node for node in CLOCK.body if isinstance(node, ast.Assign)]
    limit = next(ast.literal_eval(node.value) for node in assigned if getattr(node.targets[0], "id", "") == "STARTUP_LIMIT")
    assert limit == 180
    assert "within three minutes of the start" in PROGRAM


def test_the_tiers_it_shows_are_the_train_files() -> None:
    shown = re.findall(r'"([\w-]+)": \.\.\.', PROGRAM)
    assert shown
    for tier in shown:
        assert f'"{tier}": ' in TRAINER


WORDS = {  # how the brief calls what the catalogue thinks most of
    "MATRIX_LR": "matrix\nlearning rate", "EMBEDDING_LR": "embedding learning rate", "WARMDOWN_RATIO": "warmdown",
    "DEPTH": "one layer more or less", "NGRAM_LR": "n-gram tables, their learning rate",
    "NGRAM_BUCKETS[0]": "n-gram tables", "NGRAM_BUCKETS[1]": "n-gram tables",
    "QK gain": "normed queries and keys",
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(entry.key for entry in (*KNOBS, *SWITCHES) if entry.prior >= HIGH))
def test_brief_and_catalogue_agree_on_what_to_try_first(key: str) -> None:
    first = re.search(r"\*\*First\*\*:(.*?)\n- \*\*", PROGRAM, re.S)
    assert first
    assert " ".join(WORDS[key].split()) in " ".join(first[1].split())
