"""A candidate's source, looked at without running it: does it parse, is it new, how long is it, does it carry data?

Where that decides already, there is an early verdict and no training.

Two sources with the same `identity` train the same model: comments, formatting, docstrings and the seed do not count.

Length is measured in tokens, so that no formatting shortens a file. A string counts a token for each of its bytes, because a string
can hold code: `exec("...")`, even of compressed code, is longer than the code itself.
"""

from __future__ import annotations

import ast
import hashlib
import io
import math
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from agent.journal.state import Experiment, Night
from agent.text import failure_record, parsed
from agent.trial.order import TrialResult

_SEED_NAME = re.compile(r"(?:.*_)?seed", re.IGNORECASE)
_SEED_CALLS = {
    "seed", "manual_seed", "manual_seed_all", "set_seed", "default_rng", "RandomState", "Random", "PRNGKey", "random.key",
}  # fmt: skip

TOKENS_A_LINE = 15  # of train_mlx.py, so that `lines` is close to what an editor shows without comments
WORD_BYTES = 40  # a longer name or number counts a token for each byte, as a string does
DATA_BYTES = 4096  # of constants and comments that a candidate may have more than its parent
SOURCE_BYTES = 32 << 10  # of everything: short names can carry data, too
_RUNS_TEXT = {"exec", "eval", "compile", "__builtins__", "__import__", "__doc__", "getsource"}  # can run a comment or docstring


class SourceError(Exception):
    """The train file is not Python; the message names the line."""


@dataclass(frozen=True)
class Source:
    """`identity` is a SHA-256. `lines` is the length in lines of TOKENS_A_LINE tokens, without comments and docstrings."""

    identity: str
    lines: int


UNREADABLE = Source("", 0)  # of a file that does not parse: equal to no other


class Verdict(NamedTuple):
    """How an experiment ends: keep, discard or the name of a failure; why; the failure's record."""

    status: str
    reason: str
    error: dict[str, Any] | None


def fingerprint(content: bytes, name: str = "the train file") -> Source:
    """Identity and length of a Python source. SourceError, which says `name`, if the source does not parse."""
    try:
        whole = parsed(content)
        names = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(whole) if not _is_method(node)}
        hidden = _text_bytes(content) if names & _RUNS_TEXT else 0
        tree = ast.fix_missing_locations(_Essence().visit(whole))
        dump = ast.dump(tree, annotate_fields=False)
        tokens = sum(_weight(token) for token in _tokens(ast.unparse(tree).encode("utf-8", "surrogatepass")))
        lines = math.ceil((tokens + hidden) / TOKENS_A_LINE)
    except SyntaxError as error:
        text = (error.text or "").strip()
        raise SourceError(f"{name}, line {error.lineno}: {error.msg}: {text}") from None
    except (ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise SourceError(f"{name}: not a Python source: {error}") from None
    return Source(hashlib.sha256(dump.encode("utf-8", "surrogatepass")).hexdigest(), lines)


def source(path: Path) -> Source:
    """Identity and length of a train file; `UNREADABLE` if it does not parse."""
    try:
        return fingerprint(path.read_bytes(), path.name)
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
        fingerprint(train_file.read_bytes(), train_file.name)
    except (SourceError, OSError) as wrong:
        return _fault("crash", str(wrong))
    return None


def burdened(source: bytes, parent: bytes) -> Verdict | None:
    """A violation, if a train file holds far more constants and comments than its parent: a place for data, such as held-out
    text in an encoding that no search finds."""
    for kind, more, most in (
        ("strings, numbers and comments", data_bytes(source) - data_bytes(parent), DATA_BYTES),
        ("text", len(source) - len(parent), SOURCE_BYTES),
    ):
        if more > most:
            what = f"the file has {more:,} bytes of {kind} more than its parent, expected at most {most:,}"
            return _fault("violation", f"{what}; a train file brings no data of its own")
    return None


def data_bytes(source: bytes) -> int:
    """Bytes of all constants, comments and long names in a Python file."""
    try:
        return sum(len(token.string.encode("utf-8", "surrogatepass")) for token in _tokens(source) if _carries(token))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return len(source)


def refused(result: TrialResult) -> Verdict | None:
    """The verdict on a candidate that a check refused, None if it passed."""
    error = result.error or {}
    return Verdict(result.status, error.get("message", ""), result.error) if result.status != "ok" else None


def _tokens(source: bytes) -> Iterator[tokenize.TokenInfo]:
    return tokenize.tokenize(io.BytesIO(source).readline)


def _carries(token: tokenize.TokenInfo) -> bool:
    """Whether a token can carry data: a string, a comment, a number, or a name of unusual length."""
    return token.type not in (*_STRUCTURE, tokenize.OP) and (token.type != tokenize.NAME or len(token.string) > WORD_BYTES)


def _weight(token: tokenize.TokenInfo) -> int:
    """How many tokens a token counts for: one, or its bytes if it is a string, a comment, or a long name or number."""
    size = len(token.string.encode("utf-8", "surrogatepass"))
    if token.type in _STRUCTURE:
        return 0
    return size if size > WORD_BYTES or token.type not in (tokenize.NAME, tokenize.OP, tokenize.NUMBER) else 1


_STRUCTURE = {
    tokenize.ENCODING, tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def _text_bytes(source: bytes) -> int:
    """Bytes of comments and docstrings: of all that `_Essence` leaves out."""
    comments = sum(_weight(token) for token in _tokens(source) if token.type == tokenize.COMMENT)
    documented = (node for node in ast.walk(parsed(source)) if isinstance(node, _DOCUMENTED))
    docstrings = (ast.get_docstring(node, clean=False) or "" for node in documented)
    return comments + sum(len(text.encode("utf-8", "surrogatepass")) for text in docstrings)


_DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _is_method(node: ast.AST) -> bool:
    """Whether this is `mx.eval`, `mx.compile` or another method that happens to be called like a builtin function."""
    return isinstance(node, ast.Attribute) and node.attr in ("eval", "compile", "exec")


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
