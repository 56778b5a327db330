"""
Search a train file for held-out text: as written, in its string constants, and as a list of token ids.

A copy must be nearly literal to be found: letters and digits are compared, in lower case. Encoded or compressed text is not found;
the driver bounds how many bytes of constants and comments a candidate may add.
"""

import ast
import re
from pathlib import Path

from harness import HarnessError
from harness.score import read_held_out
from harness.tokenizer import Tokenizer

WINDOW, STRIDE = 32, 8          # letters and digits compared at once, and between two comparisons in the held-out text
COPIED = 8                      # windows that make a copy: about 90 letters and digits in one piece, or several pieces of 40 each


def screen(source: Path, parent: Path | None, held: Path) -> None:
    """Refuse a train file that holds text of the validation or test split. What its parent file holds, too, does not count.
    Errors: HarnessError("violation"), ("data") if the held-out text is missing or changed."""
    for split in ("val", "test"):
        _, tokenizer, _, text = read_held_out(held, split)
        windows = windows_of(source.read_bytes(), tokenizer) - (windows_of(parent.read_bytes(), tokenizer) if parent else set())
        plain = letters(text.decode("utf-8", "replace"))
        found = [plain[i : i + WINDOW] for i in range(0, len(plain), STRIDE) if plain[i : i + WINDOW] in windows]
        if len(set(found)) >= COPIED:
            raise HarnessError("violation", f"{source.name} holds held-out text: {len(set(found))} pieces of {WINDOW} letters that "
                               f"its parent lacks stand in the {split} split; a train file brings no text of its own")


def letters(text: str) -> str:
    """The letters and digits of a text, in lower case: line breaks, quotes and punctuation do not hide a copy."""
    return re.sub(r"[\W_]+", "", text.casefold())


def windows_of(source: bytes, tokenizer: Tokenizer) -> set[str]:
    """Every WINDOW letters of a Python file: of its text, its string constants, and its numbers read as token ids."""
    text = source.decode("utf-8", "replace")
    numbers = map(int, re.findall(r"(?<![\w.])\d{1,7}(?![\w.])", text))
    texts = [text, tokenizer.decode([i for i in numbers if i < tokenizer.vocab_size])]
    try:
        found = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found = []  # the driver refuses such a file
    strings = (c.encode("utf-8", "replace") if isinstance(c, str) else c for c in found if isinstance(c, (str, bytes)))
    texts.append(b"".join(strings).decode("utf-8", "replace"))
    return {plain[i : i + WINDOW] for plain in map(letters, texts) for i in range(len(plain) - WINDOW + 1)}
