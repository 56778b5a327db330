"""A source looked at without running it."""

from __future__ import annotations

import ast
import base64
import lzma
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import PINNED, ROOT

from agent.git.guard import TRAIN_FILE_BYTES
from agent.judgement.novelty import DATA_BYTES, SOURCE_BYTES, SourceError, burdened, fingerprint


def source_of(tmp_path: Path, text: str | bytes) -> Any:
    path = tmp_path / "train_mlx.py"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return fingerprint(path.read_bytes(), path.name)


def test_identity_ignores_comments_formatting_docstrings_and_seeds(tmp_path: Path) -> None:
    base = source_of(tmp_path, 'X = {"a": 1}\nSEED = 1\ndef f(a):\n    """Doc."""\n    return a + 1\nmx.random.seed(3)\n')
    other_style = '# note\nX = {"a": 1,}\nSEED = int(g("S"))\n\n\ndef f(a):\n  "Other."\n  return (a + 1)\nmx.random.seed(9)\n'
    same = source_of(tmp_path, other_style)
    assert same == base
    for change in ("X = {'a': 2}", "X = {'b': 1}"):
        other = source_of(tmp_path, f'{change}\nSEED = 1\ndef f(a):\n    return a + 1\nmx.random.seed(3)\n')
        assert other.identity != base.identity
    assert source_of(tmp_path, "x = 1; y = 2").lines == source_of(tmp_path, "x = 1\ny = 2\n\n# c\n").lines == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("mx.random.seed(run.seed)", "mx.random.seed(run.seed + 1)", True),
        ("mx.random.seed(run.seed)", "mx.random.seed(-7 * args.data_seed)", True),
        ("k = mx.random.key(1)", "k = mx.random.key(2)", True),
        ("r = np.random.default_rng(1)", "r = np.random.default_rng(2)", True),
        ("r = random.Random(SEED)", "r = random.Random(SEED + 5)", True),
        ("batches(8, seed=1)", "batches(8, seed=2)", True),
        ("mx.random.seed(run.seed)", "mx.random.seed(step)", False),  # in a loop it would repeat its noise
        ("r = np.random.default_rng([seed, step])", "r = np.random.default_rng([seed, 1])", False),
        ("cache.key(1)", "cache.key(2)", False),
        ("batches(8, seed=1)", "batches(9, seed=1)", False),
        ("f(reseed_every=1)", "f(reseed_every=2)", False),
    ],
)
def test_what_is_only_another_seed(tmp_path: Path, one: str, other: str, same: bool) -> None:
    assert (source_of(tmp_path, one) == source_of(tmp_path, other)) is same


@pytest.mark.parametrize("text", ["def f(:\n", "x = 1\0", b"\xff\xfe = 1\n", "(" * 5000])
def test_what_is_not_python_is_named(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(SourceError, match=r"train_mlx\.py"):
        source_of(tmp_path, text)


def test_length_is_close_to_the_lines_that_an_editor_shows(tmp_path: Path) -> None:
    for name in ("train_mlx.py", "train_torch.py"):
        tree = ast.parse((PINNED / name).read_text())
        strings = sum(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in ast.walk(tree))
        docstrings = sum((ast.get_docstring(node) or "").count("\n") for node in ast.walk(tree) if hasattr(node, "body")
                         and isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)))  # fmt: skip
        shown = len([line for line in ast.unparse(tree).splitlines() if line.strip()]) - strings - docstrings
        assert source_of(tmp_path, (PINNED / name).read_text()).lines == pytest.approx(shown, rel=0.2)


def pieces(text: str, size: int) -> str:
    return ", ".join(repr(text[i : i + size]) for i in range(0, len(text), size))


def packed(code: str) -> bytes:
    return base64.b85encode(lzma.compress(code.encode()))


PACKERS = {
    "exec": lambda code: f"exec({code!r})",
    "many short strings": lambda code: f"exec(''.join([{pieces(code, 30)}]))",
    "zlib": lambda code: f"import zlib\nexec(zlib.decompress({zlib.compress(code.encode(), 9)!r}))",
    "base85": lambda code: f"import base64, lzma\nexec(lzma.decompress(base64.b85decode({packed(code)!r})))",
    "a number": lambda code: f"exec(({int.from_bytes(code.encode()[:1500], 'big')}).to_bytes(1500, 'big'))",
    "docstring": lambda code: f"{packed(code).decode()!r}\nimport base64, lzma\nexec(lzma.decompress(base64.b85decode(__doc__)))",
    "comment": lambda code: f"# {packed(code).decode()}\nimport base64, lzma\n"
                            "exec(lzma.decompress(base64.b85decode(open(__file__).readline()[2:])))",
    "one expression": lambda code: "x = [" + ", ".join(f"f(a{i}, {i})" for i in range(1500)) + "]",
}


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_no_string_and_no_long_line_makes_a_file_shorter(tmp_path: Path, pack: Any) -> None:
    code = (PINNED / "train_mlx.py").read_text()
    short = pack(code)
    share = 1500 / len(code.encode()) if "to_bytes" in short else 1.0  # of the code, in one number
    assert source_of(tmp_path, short).lines > share * source_of(tmp_path, code).lines


def test_a_file_that_brings_data_is_refused_by_name() -> None:
    parent, noise = (PINNED / "train_mlx.py").read_bytes(), random.Random(1).randbytes(DATA_BYTES)
    text = base64.b64encode(noise).decode()
    numbers = ", ".join(map(str, noise))
    carriers = [
        f"X = {text!r}", f"X = {noise!r}", f"X = [{numbers}]", f"# {text}", f'def f():\n    """{text}"""',
        f"X = {hex(int.from_bytes(noise, 'big'))}", f"X = [{pieces(text, 9)}]", f"_{text.translate({43: 95, 47: 95, 61: 95})} = 1",
    ]  # fmt: skip
    for more in carriers:
        refused = burdened(parent + f"\n{more}\n".encode(), parent)
        assert refused is not None
        assert refused.status == "violation"
        assert "of strings, numbers and comments more than its parent, expected at most 4,096" in refused.reason
    words = "X = [" + ", ".join(f"a{i % 97}b" for i in range(SOURCE_BYTES // 4)) + "]"
    assert "of text more than its parent" in burdened(parent + words.encode(), parent).reason  # type: ignore[union-attr]


def test_an_ordinary_change_brings_no_data() -> None:
    parent = (PINNED / "train_mlx.py").read_bytes()
    change = "\n".join(f"    y{i} = mx.maximum(x, {i}.5) * weights['wte_{i}']  # a comment on line {i}" for i in range(80))
    assert burdened(parent + f"\ndef f(x, weights):\n{change}\n    return x\n".encode(), parent) is None
    assert burdened(b"import mlx.core as mx\n", parent) is None, "less is always allowed"


@pytest.mark.parametrize("piece", [".a", "()", "+1"])
def test_deep_nesting_does_not_end_the_driver(tmp_path: Path, piece: str) -> None:
    """Python's own parser follows it on the stack, and a full stack ends the whole process."""
    file = tmp_path / "train.py"
    file.write_text("a" + piece * ((TRAIN_FILE_BYTES - 1) // len(piece)))
    look = "import sys; from pathlib import Path; from agent.judgement import novelty; from agent.git import guard"
    look += "; file = Path(sys.argv[1]); print(novelty.broken(file).reason); guard._names(file.read_bytes())"
    done = subprocess.run([sys.executable, "-c", look, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "train.py: not a Python source" in done.stdout) == (0, True), done.stderr


def test_a_dotted_name_without_end_takes_no_memory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="a dotted name of more than 500 parts"):
        source_of(tmp_path, "from a" + ".\\\n a" * 20_000 + " import b")
    source_of(tmp_path, f"# {'.' * 5000}\n" + "a.b(1.5, c.d)\n" * 2000)
