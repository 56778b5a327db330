"""A candidate's source, looked at without running it: does it parse, is it new, how long is it?

Where that decides already, there is an early verdict and no training.

Two sources with the same `identity` train the same model: comments, formatting, docstrings and the seed do not count.
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from agent.journal.state import Experiment, Night
from agent.text import failure_record

_SEED_NAME = re.compile(r"(?:.*_)?seed", re.IGNORECASE)
_SEED_CALLS = {
    "seed", "manual_seed", "manual_seed_all", "set_seed", "default_rng", "RandomState", "Random", "PRNGKey", "random.key",
}  # fmt: skip


class SourceError(Exception):
    """The train file is not Python; the message names the line."""


@dataclass(frozen=True)
class Source:
    """`identity` is a SHA-256, `lines` counts lines of code as Python itself would format them."""

    identity: str
    lines: int


UNREADABLE = Source("", 0)  # of a file that does not parse: equal to no other


class Verdict(NamedTuple):
    """How an experiment ends: keep, discard or the name of a failure; why; the failure's record."""

    status: str
    reason: str
    error: dict[str, Any] | None


def fingerprint(path: Path) -> Source:
    """Look at a train file. SourceError if it does not parse, OSError if it cannot be read."""
    try:
        tree = ast.parse(path.read_bytes(), filename=path.name)
        tree = ast.fix_missing_locations(_Essence().visit(tree))
        dump = ast.dump(tree, annotate_fields=False)
        lines = ast.unparse(tree).count("\n") + 1
    except SyntaxError as error:
        text = (error.text or "").strip()
        raise SourceError(f"{path.name}, line {error.lineno}: {error.msg}: {text}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise SourceError(f"{path.name}: not a Python source: {error}") from None
    return Source(hashlib.sha256(dump.encode("utf-8", "surrogatepass")).hexdigest(), lines)


def source(path: Path) -> Source:
    """Identity and length of a train file; `UNREADABLE` if it does not parse."""
    try:
        return fingerprint(path)
    except (SourceError, OSError):
        return UNREADABLE


def early_verdict(night: Night, experiment: Experiment) -> Verdict | None:
    """The verdict on a candidate whose training would tell nothing new: no change, or a file that was trained before."""
    if not experiment.ast:
        return None
    for earlier in night.experiments[: experiment.n]:
        if earlier.ast != experiment.ast:
            continue
        if earlier.commit == experiment.parent:
            return _fault("noop", "only the seed, comments or formatting changed")
        if earlier.status in ("keep", "discard") and earlier.mean is not None:
            return Verdict("discard", f"trained before as experiment {earlier.n}: {earlier.mean:.4f}", None)
        if earlier.status in ("crash", "oom", "nan", "timeout", "violation"):  # one of the guard's has no file to be equal to
            return Verdict(earlier.status, f"trained before as experiment {earlier.n}", earlier.error)
    return None


def broken(train_file: Path) -> Verdict | None:
    """A crash, if the train file does not parse: found before a budget is spent on it."""
    try:
        fingerprint(train_file)
    except (SourceError, OSError) as wrong:
        return _fault("crash", str(wrong))
    return None


def not_importable(error: dict[str, Any] | None) -> Verdict | None:
    """A crash, if importing the train file once ended with this error."""
    return Verdict("crash", error["message"], error) if error else None


class _Essence(ast.NodeTransformer):
    """Drops what does not change a training: docstrings, and the value of everything called a seed."""

    def _without_docstring(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        body = getattr(node, "body", [])
        first = body[0] if body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
        return node

    visit_Module = _without_docstring
    visit_FunctionDef = _without_docstring
    visit_AsyncFunctionDef = _without_docstring
    visit_ClassDef = _without_docstring

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        if all(isinstance(target, ast.Name) and _SEED_NAME.fullmatch(target.id) for target in node.targets):
            node.value = ast.Constant(0)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and _SEED_NAME.fullmatch(node.target.id):
            node.value = ast.Constant(0)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = _name(node.func)
        owned = f"{_name(node.func.value)}.{name}" if isinstance(node.func, ast.Attribute) else name
        if name in _SEED_CALLS or owned in _SEED_CALLS:
            node.args = [ast.Constant(0) if _is_seed(arg) else arg for arg in node.args]
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg and _SEED_NAME.fullmatch(node.arg) and _is_seed(node.value):
            node.value = ast.Constant(0)
        return node


def _name(node: ast.expr) -> str:
    """The last part of a dotted name, "" of anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_seed(node: ast.expr) -> bool:
    """A constant, something called a seed, or made of these alone: 3, run.seed, run.seed + 1; not step."""
    if isinstance(node, ast.BinOp):
        return _is_seed(node.left) and _is_seed(node.right)
    if isinstance(node, ast.UnaryOp):
        return _is_seed(node.operand)
    return isinstance(node, ast.Constant) or _SEED_NAME.fullmatch(_name(node)) is not None


def _fault(kind: str, message: str) -> Verdict:
    return Verdict(kind, message, failure_record(kind, message))
