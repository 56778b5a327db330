"""Held-out text in a train file, found by the program that the driver starts."""

import json

import numpy as np
import pytest
from conftest import PINNED, ROOT, program

from harness import HarnessError
from harness.screen import screen
from harness.tokenizer import Tokenizer

PARENT = (PINNED / "train_mlx.py").read_text()


@pytest.fixture(scope="module")
def held_out(tiny):
    """Tokens and text of the validation split."""
    tokens = np.fromfile(tiny.held / "val.bin", np.uint16)
    return tokens, Tokenizer((tiny.held / "tokenizer.model").read_bytes()).decode(tokens)


def screened(tmp_path, tiny, text, parent=PARENT):
    (tmp_path / "train_mlx.py").write_text(text)
    (tmp_path / "parent.py").write_text(parent)
    return program(ROOT / "prepare_mlx.py", "screen", tmp_path / "train_mlx.py", "--parent", tmp_path / "parent.py",
                   "--held", tiny.held, home=tiny.home)


CARRIERS = {
    "a string": lambda text, tokens: f"X = {text!r}",
    "pieces": lambda text, tokens: "X = [" + ",\n     ".join(repr(text[i : i + 7]) for i in range(0, len(text), 7)) + "]",
    "escaped": lambda text, tokens: "X = '" + "".join(f"\\x{b:02x}" for b in text.encode("ascii", "ignore")) + "'",
    "bytes": lambda text, tokens: f"X = {text.encode()!r}",
    "comments": lambda text, tokens: "".join(f"# {line}\n" for line in text.upper().splitlines()),
    "a docstring": lambda text, tokens: f'def f():\n    """{text}"""',
    "token ids": lambda text, tokens: f"X = {tokens.tolist()}",
    "a number a line": lambda text, tokens: "X = [\n" + "".join(f"    {token},\n" for token in tokens) + "]",
}


@pytest.mark.parametrize("carry", CARRIERS.values(), ids=CARRIERS)
def test_held_out_text_is_found_however_it_is_written(tiny, tmp_path, held_out, carry):
    tokens, text = held_out
    start = text.index("\n", 2000) + 1
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "train_mlx.py").write_text(PARENT + "\n" + carry(text[start : start + 600], tokens[700:1000]) + "\n")
    with pytest.raises(HarnessError, match=r"train_mlx\.py holds held-out text: \d+ pieces .* stand in the val split") as refused:
        screen(tmp_path / "train_mlx.py", tmp_path / "parent.py", tiny.held)
    assert refused.value.kind == "violation"


def test_the_command_refuses_by_exit_code_and_names_no_folder(tiny, tmp_path, held_out):
    done = screened(tmp_path, tiny, f"{PARENT}\nX = {held_out[1][2000:2600]!r}\n")
    assert done.returncode == 6, done.stdout + done.stderr
    record = json.loads(done.stderr.splitlines()[-1])
    assert record["kind"] == "violation"
    assert "holds held-out text" in record["message"]
    assert str(tiny.home) not in done.stderr


def test_the_test_split_counts_as_well(tiny, tmp_path):
    text = Tokenizer((tiny.held / "tokenizer.model").read_bytes()).decode(np.fromfile(tiny.held / "test.bin", np.uint16))
    assert screened(tmp_path, tiny, f"{PARENT}\nX = {text[500:1000]!r}\n").returncode == 6


def test_ordinary_files_pass_and_so_does_what_the_parent_has(tiny, tmp_path, held_out):
    assert screened(tmp_path, tiny, PARENT, parent="").returncode == 0
    with_text = f"{PARENT}\nX = {held_out[1][2000:2600]!r}\n"
    assert screened(tmp_path, tiny, with_text + "Y = 1\n", parent=with_text).returncode == 0


def test_held_out_data_that_is_absent_is_no_fault_of_the_file(tiny, tmp_path):
    done = program(ROOT / "prepare_mlx.py", "screen", PINNED / "train_mlx.py", "--held", tmp_path / "nowhere", home=tiny.home)
    assert done.returncode == 2
    assert json.loads(done.stderr.splitlines()[-1])["kind"] == "data"
