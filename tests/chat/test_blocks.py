"""`agent/chat/blocks.py`: what models write is applied where there is exactly one way, and refused by name where there isn't."""

from __future__ import annotations

import ast
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.chat.blocks import EditError, apply_answer

SOURCE = """\
import math

LR = 0.1
WD = 0.1


def step(x):
    if x:
        y = 2
    return x * LR


def other(x):
    return x
"""
LAST = "\nHYPOTHESIS: faster\nDESCRIPTION: double the rate\n"
WANTED = SOURCE.replace("LR = 0.1", "LR = 0.2")


def block(old: str = "LR = 0.1", new: str = "LR = 0.2") -> str:
    middle = f"\n{new}" if new else ""
    return f"<<<<<<< SEARCH\n{old}\n======={middle}\n>>>>>>> REPLACE\n"


GOOD = block()
DRAFT = block(new="LR = 9")


@pytest.mark.parametrize(
    "answer",
    [
        "Raise it.\n" + GOOD,
        f"<think>maybe\n{DRAFT}no\n</think>\n{GOOD}{LAST}",
        f"maybe\n{DRAFT}no</think>{GOOD}",
        f"[THINK]{DRAFT}[/THINK]\n{GOOD}",
        f"<reasoning>{DRAFT}</reasoning>\n{GOOD}",
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}{LAST}",
        LAST + GOOD.rstrip() + "<|im_end|>",
        GOOD + "</s>",
        f"train_mlx.py\n```python\n{GOOD}```\n{LAST}",
        f"```python\n{GOOD}{LAST}",
        "<<<<<<< SEARCH\n```python\nLR = 0.1\n```\n=======\n```python\nLR = 0.2\n```\n>>>>>>> REPLACE\n",
        GOOD.replace("<<<<<<< SEARCH", "<<<<<<<SEARCH"),
        GOOD.replace("<<<<<<< SEARCH", "<<<<<<< SEARCH train_mlx.py"),
        GOOD.replace("<<<<<<< SEARCH", "<<<<<<< train_mlx.py SEARCH"),
        GOOD.replace("<<<<<<< SEARCH", "<<<<<<< search"),
        GOOD.replace("<<<<<<< SEARCH", "<<<<<<< ORIGINAL").replace(">>>>>>> REPLACE", ">>>>>>> UPDATED"),
        GOOD.replace("SEARCH", "HEAD").replace(">>>>>>> REPLACE", ">>>>>>> new"),
        GOOD.replace("=======", "====="),
        GOOD.replace("=======", "=======   ").replace("REPLACE", "REPLACE  "),
        "1. Raise it:\n" + "".join(f"   {line}\n" for line in GOOD.splitlines()),
        "- " + GOOD,
        GOOD.replace("\n", "\r\n"),
        block("LR = 0.1   "),
        block("\u00a0LR = 0.1".lstrip() + "\u00a0"),
        block("\nLR = 0.1", "\nLR = 0.2"),
        block("\n\nLR = 0.1\n", "LR = 0.2"),
        block("    LR = 0.1", "    LR = 0.2"),
        "```python\n" + WANTED + "```\n" + LAST,
        "Here is the file:\n~~~\n" + WANTED + "~~~\n",
        WANTED + LAST,
        "```python\nLR = 0.2\n```\nThe whole:\n```python\n" + WANTED + "```\n",
    ],
)  # fmt: skip
def test_what_models_write_around_an_edit_is_no_part_of_it(answer: str) -> None:
    assert apply_answer(SOURCE, answer) == WANTED


@pytest.mark.parametrize(
    ("search", "replace", "before", "after"),
    [
        ("if x:\n    y = 2", "if x:\n    y = 3", "y = 2", "y = 3"),  # indentation lost
        ("        if x:\n            y = 2", "        if x:\n            y = 3", "y = 2", "y = 3"),  # too much of it
        ("\tif x:\n\t\ty = 2", "\tif x:\n\t\ty = 3", "y = 2", "y = 3"),  # tabs
        ("  if x:\n    y = 2", "  if x:\n    y = 3\n    z = 1", "y = 2", "y = 3\n        z = 1"),  # two blanks for four
        ("    if x: \n        y = 2 ", "    if x:\n        y = 3", "y = 2", "y = 3"),  # blanks at the ends of lines
        ("y = 2", "y = 2\nif y:\n    y = 4", "y = 2", "y = 2\n        if y:\n            y = 4"),
        ("def step(x):\n...\n    return x * LR", "def step(x, z):\n...\n    return x * LR + z",
         "def step(x):\n    if x:\n        y = 2\n    return x * LR",
         "def step(x, z):\n    if x:\n        y = 2\n    return x * LR + z"),
        ("WD = 0.1", "", "WD = 0.1\n", ""),
    ],
)  # fmt: skip
def test_an_edit_that_fits_in_one_way_only_is_made_to_fit(search: str, replace: str, before: str, after: str) -> None:
    assert apply_answer(SOURCE, block(search, replace)) == SOURCE.replace(before, after)


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("I would raise LR.", "no_blocks"),
        ("", "no_blocks"),
        ("```python\nLR = 0.2\n```", "no_blocks"),  # not most of the file
        (f"<think>{GOOD}", None),  # thoughts that never end hold all that was said
        ("<<<<<<< SEARCH\nLR = 0.1\n=======\nLR = 0.2\n", "unfinished_block"),
        ("<<<<<<< SEARCH\nLR = 0.1\n>>>>>>> REPLACE\n", "unfinished_block"),
        ("<<<<<<< SEARCH\n" + GOOD, "unfinished_block"),
        (block("", "X = 1"), "empty_search"),
        (block("\n", "\n\n"), "empty_search"),
        (block("LR = 0.5"), "not_found"),
        (block("R = 0.1", "R = 0.2"), "not_found"),  # not a whole line
        (block("if x:\ny = 2", "if x:\ny = 3"), "not_found"),  # indentation that can't be known
        (GOOD + block(new="LR = 0.3"), "not_found"),  # one place twice
        (block("def step(x):\n    ...\n    return x * LR", "def step(x):\n    return 1"), "not_found"),
        (block("    if x:\n        y = 2\n    return x * LR", "    # ... as before\n    return 1"), "elision"),
        (block("LR = 0.1", "LR = 0.2\n# rest of the code unchanged"), "elision"),
        ("```python\n" + WANTED.replace("    if x:\n        y = 2\n", "    # ... existing code ...\n") + "```", "elision"),
        ("```python\n" + WANTED.replace("def other(x):\n    return x\n", "") + "```", "elision"),  # a function is gone
        (block("    return x", "    return y"), None),
        (block("LR = 0.1", "LR = 0.1"), "no_change"),
        (block(new="LR = (0.1"), "not_python"),
        (block(new="LR = '\x00'"), "not_python"),
        (block(new="LR = '\ud800'"), "not_python"),
        (block("x = 1\n=======\ny = 2", "z"), "not_found"),
    ],
)  # fmt: skip
def test_what_cannot_be_applied_in_one_way_has_a_name(answer: str, name: str | None) -> None:
    if name is None:
        assert apply_answer(SOURCE, answer) != SOURCE
        return
    with pytest.raises(EditError) as caught:
        apply_answer(SOURCE, answer)
    assert caught.value.name == name
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize("search", ["A = 1", "A = 1 ", "  A = 1"])
def test_a_search_that_matches_two_places_is_never_guessed(search: str) -> None:
    with pytest.raises(EditError, match=r"ambiguous: block 1 of 1: .*'A = 1', occur 2 times, at lines 1, 3"):
        apply_answer("A = 1\nB = 2\nA = 1\n", block(search, search.replace("1", "2")))


def test_a_failed_search_shows_the_nearest_lines_of_the_file() -> None:
    with pytest.raises(EditError) as caught:
        apply_answer(SOURCE, block("    if x:\n        y = 3\n    return x * LR", "    return 1"))
    assert "    if x:\n        y = 2\n    return x * LR" in caught.value.shown
    with pytest.raises(EditError) as caught:
        apply_answer(SOURCE, block("def stepp(x):", "def step(z):"))
    assert "def step(x):" in caught.value.shown


def test_reasoning_beside_an_empty_answer_counts_and_beside_an_edit_does_not() -> None:
    assert apply_answer(SOURCE, "", f"I think so.\n{GOOD}") == WANTED
    assert apply_answer(SOURCE, GOOD, DRAFT) == WANTED
    with pytest.raises(EditError, match="not_found: block 2 of 2"):
        apply_answer(SOURCE, "", DRAFT + GOOD)  # drafts that contradict each other
    with pytest.raises(EditError, match=r"no_blocks: .*empty but for its reasoning"):
        apply_answer(SOURCE, "", "hm")
    with pytest.raises(EditError, match="no_blocks"):
        apply_answer(SOURCE, "I would rather not.", GOOD)


TRAIN = "from prepare_mlx import start_run\n\nLR = 0.1\n\n\ndef load_model(run_dir):\n    return 1\n\n\nwith start_run(__file__) as run:\n    run.finish()\n"  # noqa: E501


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("def load_model(run_dir):\n    return 1", "", r"no longer defines load_model\(run_dir\)"),
        ("def load_model(run_dir):", "def load(run_dir):", r"no longer defines load_model\(run_dir\)"),
        ("def load_model(run_dir):", "def load_model():", r"no longer defines load_model\(run_dir\)"),
        ("with start_run(__file__) as run:\n    run.finish()", "print(1)", r"no longer calls start_run\(\)"),
    ],
)
def test_the_harness_keeps_what_it_calls(old: str, new: str, said: str) -> None:
    with pytest.raises(EditError, match=f"breaks_contract: .*{said}"):
        apply_answer(TRAIN, block(old, new))
    assert apply_answer(TRAIN, GOOD) == TRAIN.replace("LR = 0.1", "LR = 0.2")


def test_line_endings_of_the_file_stay() -> None:
    assert apply_answer("A = 1\r\nB = 2\r\n", block("B = 2", "B = 3")) == "A = 1\r\nB = 3\r\n"
    assert apply_answer("A = 1\nB = 2", block("B = 2", "B = 3")) == "A = 1\nB = 3\n"


HOSTILE = {
    "brackets": block(new="LR = " + "(" * 100_000),
    "nested": block(new="LR = " + "[" * 100_000 + "]" * 100_000),
    "minus": block(new="LR = " + "-" * 100_000 + "1"),
    "attributes": block(new="LR = a" + ".b" * 100_000),
    "digits": block(new="LR = " + "9" * 100_000),
    "openings": "<<<<<<< SEARCH\n" * 33_000,
    "one_line_of_openings": "<" * 500_000,
    "middles": "<<<<<<< SEARCH\n" + "=======\n" * 60_000 + ">>>>>>> REPLACE\n",
    "closings": ">>>>>>> REPLACE\n" * 33_000,
    "blocks": GOOD * 10_000,
    "blanks": " " * 500_000 + "\n" + GOOD,
    "tabs": "\t" * 500_000 + "<<<<<<< SEARCH",
    "blank_lines": block("\n" * 300_000),
    "one_letter_lines": block("x\n" * 200_000),
    "fences": "```\n" * 120_000,
    "fence_of_ticks": "`" * 500_000,
    "thinks": "<think>" * 70_000,
    "thinks_closed": "<think></think>" * 30_000 + GOOD,
    "ellipses": block("...\n" * 100_000, "...\n" * 100_000),
    "own_ellipses": block("".join(f"# ... {n}\n" for n in range(20_000)), "".join(f"# ... {n}\n" for n in range(20_000))),
    "ellipses_between": block(*("".join(f"X{n} = {n}\n...\n" for n in range(800)) for _ in "ab")) * 12,
    "ellipses_and_middles": "<<<<<<< SEARCH\n" + ("...\n" * 9000 + "=======\n") * 8 + "...\n>>>>>>> REPLACE\n",
    "shifted": block("  x = 1\n" * 2000),
    "overlaps": block(new="LR = 0.2" + "\nx = 1" * 2500) + block("x = 1\n" * 1200 + "WD = 0.1") * 20,
    "growth": block(new="LR = 0.1" + "\nx = 1" * 900) + "".join(block(f"X{n} = {n}", "y = 1\n" * 900) for n in range(40)),
    "sum": block(new="LR = " + "+".join("1" * 40_000)),
    "hashes": block("# " * 100_000, "#" * 200_000),
    "angle": "<" * 4 + "\n" + "<|" * 200_000,
    "nul": "\x00" * 500_000,
    "surrogates": "\ud800" * 300_000,
    "too_long": "x" * 3_000_000,
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_nothing_a_model_sends_raises_or_takes_long(answer: str) -> None:
    source = SOURCE + "".join(f"X{number} = {number}\n" for number in range(800))
    for text, reasoning in ((answer, answer[:1000]), ("", answer)):
        began = time.process_time()
        assert len(outcome(source, text, reasoning)) < 70_000
        assert time.process_time() - began < 1.0


def outcome(source: str, answer: str, reasoning: str) -> str:
    """The edited file, or what its model is told."""
    try:
        edited = apply_answer(source, answer, reasoning)
    except EditError as error:
        return f"{error.name}: {error}\n{error.shown}"
    ast.parse(edited)
    return edited


@given(st.text(alphabet="<>=`# \nSEARCHPLx.|\t\r", max_size=300))
def test_any_text_is_an_edit_or_a_named_refusal(answer: str) -> None:
    assert outcome(SOURCE, answer, answer)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30, unique=True), st.data())
def test_any_run_of_lines_can_be_replaced_by_any_other(numbers: list[int], data: st.DataObject) -> None:
    lines = [f"X{number} = {number}\n" for number in numbers]
    start = data.draw(st.integers(0, len(lines) - 1))
    end = data.draw(st.integers(start + 1, len(lines)))
    new = "".join(f"Y{n} = r'\\g<0> {n}'\n" for n in data.draw(st.lists(st.integers(0, 9), max_size=5)))
    expected = "".join(lines[:start]) + new + "".join(lines[end:])
    answer = f"<<<<<<< SEARCH\n{''.join(lines[start:end])}=======\n{new}>>>>>>> REPLACE\n"
    assert apply_answer("".join(lines), answer) == expected
