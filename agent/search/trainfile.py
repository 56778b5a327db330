"""Read a train file without running it: find its constants and their byte positions, so that one literal can be replaced.

    file = TrainFile(data, tier="mac")
    file.constants["DEPTH"].value               # of `DEPTH = {"cpu": 2, "mac": 3}[TIER]`: 3
    file.apply([file.constants["DEPTH"].set(4)])   # every other byte stays, comments too
    file.constants["WIDTH"].value               # of `WIDTH = 64 * DEPTH`: 192; `set` replaces the expression by a literal
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_BOM = b"\xef\xbb\xbf"
_DIVISIONS = (ast.Div, ast.FloorDiv)
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
              ast.Div: operator.truediv}  # fmt: skip
_NAME = re.compile(r"[A-Z][A-Z0-9_]*")


@dataclass(frozen=True)
class Edit:
    """Bytes `start` to `end` of the file become `text`."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Constant:
    """A value and the bytes that spell it. `text`: the literal as written. `template`: how to write a new one; "" for the bare
    literal."""

    name: str
    value: Any
    start: int
    end: int
    text: str
    template: str = ""

    def set(self, value: Any) -> Edit:
        """The edit that gives the constant another value, written in the style of the old one."""
        return Edit(self.start, self.end, self.template.format(spell(value)) if self.template else spell(value, self.text))


def spell(value: Any, like: str = "") -> str:
    """A literal as a person would write it: 0.03, or 2**18 and 20_000 if the old literal, `like`, was written in that style."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "(" + ", ".join(map(spell, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, int):
        if "**" in like and value > 0 and value & (value - 1) == 0:
            return f"2**{value.bit_length() - 1}"
        return f"{value:_}" if "_" in like else str(value)
    return repr(float(f"{value:.3g}"))


class TrainFile:
    """The source of a train file. SyntaxError or ValueError if it does not parse.

    constants: every upper-case constant of the module whose value can be computed here. These are literals, `NAME[i]` for the items
    of a tuple, the entry for `tier` of a table by tier, and expressions of such constants.
    lacking: constants whose table has no entry for `tier`. leaders: constants that others are computed from.
    """

    def __init__(self, data: bytes, tier: str) -> None:
        self.data = data
        self.text = data.decode("utf-8")
        self.tree = ast.parse(data)
        self.tier = tier
        lengths = [len(line) for line in data.removeprefix(_BOM).splitlines(keepends=True)]
        self._starts = [len(_BOM) * data.startswith(_BOM)]
        for length in lengths:
            self._starts.append(self._starts[-1] + length)
        self.constants: dict[str, Constant] = {}
        self.lacking: list[str] = []
        self.leaders: set[str] = set()
        for node in self.tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
            if isinstance(node, ast.Assign) and isinstance(target, ast.Name) and _NAME.fullmatch(target.id):
                self._read(target.id, node.value)

    def _read(self, name: str, node: ast.expr) -> None:
        for old in [old for old in self.constants if old.partition("[")[0] == name]:
            del self.constants[old]  # the name is assigned a second time
        if table := _table(node):
            node = table.get(self.tier, node)  # a change edits only this tier's entry
        value = self._value(node)
        if value is None:
            tables = [table for part in ast.walk(node) if isinstance(part, ast.expr) and (table := _table(part))]
            if any(self.tier not in table for table in tables):
                self.lacking.append(name)
            return
        self.leaders |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & set(self.constants)
        self.constants[name] = self._constant(name, value, node)
        if isinstance(node, ast.Tuple):
            for i, part in enumerate(node.elts):
                self.constants[f"{name}[{i}]"] = self._constant(f"{name}[{i}]", value[i], part)

    def _value(self, node: ast.expr) -> Any:
        """The value of an expression of literals, earlier constants, tables by tier, tuples and arithmetic; None for any other."""
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.constants[node.id].value
        if table := _table(node):
            return self._value(table[self.tier]) if self.tier in table else None
        if isinstance(node, ast.Tuple):
            parts = tuple(self._value(part) for part in node.elts)
            return None if None in parts else parts
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._value(node.operand)
            return -value if _is_number(value) else None
        if isinstance(node, ast.BinOp):
            left, right = self._value(node.left), self._value(node.right)
            if not (_is_number(left) and _is_number(right)):
                return None
            if isinstance(node.op, ast.Pow):
                return left**right if 0 <= right <= 64 and abs(left) <= 1024 else None
            if type(node.op) in _OPERATORS and not (isinstance(node.op, _DIVISIONS) and right == 0):
                return _OPERATORS[type(node.op)](left, right)
        return None

    def _constant(self, name: str, value: Any, node: ast.expr) -> Constant:
        start, end = self.span(node)
        computed = any(isinstance(part, ast.Name) for part in ast.walk(node))  # an expression has no style for a literal to follow
        return Constant(name, value, start, end, "" if computed else self.data[start:end].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        """First byte of a node and the byte after its last."""
        begin, end = getattr(node, "lineno", 1), getattr(node, "end_lineno", 1)
        return self._starts[begin - 1] + node.col_offset, self._starts[end - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def scope(self, name: str) -> tuple[int, int]:
        """First and last byte of a class or function of the module, of the whole file for ""; (0, 0) if there is no such name."""
        if not name:
            return 0, len(self.data)
        for node in self.tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return self.span(node)
        return 0, 0

    def find(self, scope: str, text: str) -> tuple[int, int] | None:
        """First and last byte of `text` in a scope; None unless it occurs there exactly once."""
        begin, end = self.scope(scope)
        part, wanted = self.data[begin:end], text.encode()
        if part.count(wanted) != 1:
            return None
        start = begin + part.index(wanted)
        return start, start + len(wanted)

    def apply(self, edits: Iterable[Edit]) -> bytes:
        """The file after these edits. ValueError if two overlap, SyntaxError if the result is not Python."""
        data = self.data
        last = len(data) + 1
        for edit in sorted(set(edits), key=lambda e: (e.start, e.end), reverse=True):
            if edit.end > last or (edit.start == edit.end == last):
                raise ValueError(f"two edits of the bytes {edit.start} to {edit.end}")
            data = data[: edit.start] + edit.text.encode() + data[edit.end :]
            last = edit.start
        ast.parse(data)
        return data


def _table(node: ast.expr) -> dict[str, ast.expr]:
    """The entries of a table by tier, `{"cpu": 2, ...}[TIER]`; {} for anything else."""
    if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict)):
        return {}
    entries = zip(node.value.keys, node.value.values, strict=True)
    return {key.value: value for key, value in entries if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
