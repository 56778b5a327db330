"""After `git merge autoresearch/<tag>` of a night's win, the tests and the tools still work, whatever the agent changed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PINNED, ROOT, environment

from agent.search.changes import changes
from agent.search.trainfile import TrainFile
from scripts.ablations import ABLATIONS
from scripts.benchmark import variant
from scripts.compare_peers import Failed

SOURCE = (PINNED / "train_mlx.py").read_text()
LOOK_AT_THE_FILE = ["tests/test_program.py",
                    "tests/test_layout.py::" + "test_a_train_file_imports_the_harness_and_its_framework_only"]
TRAINS_IT = ["tests/train/test_run.py::" + "test_the_file_as_it_stands_trains_and_is_scored"]


def swap(*pairs: tuple[str, str]):
    def edit(source: str) -> str:
        for old, new in pairs:
            assert old in source, old
            source = source.replace(old, new)
        return source
    return edit


def swiglu(source: str) -> str:
    """As the catalogue of `search` has it."""
    file = TrainFile(source.encode(), "cpu")
    return file.apply(next(c for c in changes(file) if (c.key, c.new) == ("MLP", "SwiGLU")).edits).decode()


def without_softcap(source: str) -> str:
    source = re.sub(r"^SOFTCAP = .*\n", "", source, flags=re.M)
    return swap(("    softcap: float = SOFTCAP\n", ""),
                ("        return self.config.softcap * mx.tanh(logits / self.config.softcap) if self.config.softcap else logits\n",
                 "        return logits\n"))(source)


WINS = {
    "a constant": swap(("MATRIX_LR = 0.02", "MATRIX_LR = 0.03")),
    "a depth": swap(('DEPTH = {"cpu": 2', 'DEPTH = {"cpu": 1')),
    "an activation": swap(("mx.square(mx.maximum(self.c_fc(x), 0))", "nn.silu(self.c_fc(x))")),
    "SwiGLU": swiglu,
    "a norm after each sublayer": swap(("self.attn(norm(x), ve)", "norm(self.attn(norm(x), ve))"),
                                       ("self.mlp(norm(x))", "norm(self.mlp(norm(x)))")),
    "a deletion": without_softcap,
    "a renamed function": swap(("schedule(", "rates_of_step(")),
    "no tiers": lambda source: re.sub(r'{"cpu": ([^,{}()]+), [^{}]*}\[TIER\]', r"\1", source),
}
TOGETHER = ["a constant", "a depth", "a norm after each sublayer", "a deletion", "SwiGLU", "a renamed function", "no tiers"]


def git(checkout: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=checkout, check=True, capture_output=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose train file is the pinned one, as it was before the night."""
    place = tmp_path_factory.mktemp("merge") / "checkout"
    subprocess.run(["git", "clone", "-q", ROOT, place], check=True)
    git(place, "checkout", "-q", "-B", "before")
    (place / "train_mlx.py").write_text(SOURCE)
    git(place, "commit", "-q", "--allow-empty", "-a", "-m", "before the night")
    return place


def merge(checkout: Path, tag: str, source: str) -> None:
    """What the README says: the night's branch has one more commit, and is merged."""
    git(checkout, "checkout", "-q", "-B", f"autoresearch/{tag}", "before")
    (checkout / "train_mlx.py").write_text(source)
    git(checkout, "commit", "-q", "-a", "-m", tag)
    git(checkout, "checkout", "-q", "-B", "main", "before")
    git(checkout, "merge", "-q", "--no-edit", f"autoresearch/{tag}")


def suite(checkout: Path, home: Path, *tests: str) -> None:
    env = environment(home) | {"PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], cwd=checkout, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("win", [*WINS, "all together"])
def test_a_merged_win_turns_nothing_red(checkout: Path, tmp_path: Path, win: str) -> None:
    source = SOURCE
    for part in TOGETHER if win == "all together" else [win]:
        changed = WINS[part](source)
        assert changed != source, part
        source = changed
    compile(source, win, "exec")
    merge(checkout, "night", source)
    suite(checkout, tmp_path, *LOOK_AT_THE_FILE)
    if win == "all together":
        suite(checkout, tmp_path, *TRAINS_IT)


@pytest.mark.parametrize("win", WINS)
def test_tools_that_edit_the_file_say_what_no_longer_fits_and_go_on(win: str) -> None:
    source = WINS[win](SOURCE)
    assert len(changes(TrainFile(source.encode(), "cpu"))) > 40
    said = []
    for name in ABLATIONS:
        try:
            compile(variant(source, name), name, "exec")
        except Failed as failure:
            said.append(str(failure))
    assert all("no longer has the text" in words or "expected a line" in words for words in said)
    assert len(said) < len(ABLATIONS) / 2


def test_only_tests_that_any_train_file_passes_look_at_the_one_that_a_night_changes() -> None:
    """All others import the copies in tests/pinned."""
    looking = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")
               if re.search(r"^\s*(import|from) train_(mlx|torch)\b", path.read_text(), re.M)]
    assert not looking


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_suite_is_green_after_the_merge(checkout: Path, tmp_path: Path) -> None:
    source = SOURCE
    for part in TOGETHER:
        source = WINS[part](source)
    merge(checkout, "night", source)
    suite(checkout, tmp_path, "tests", "--ignore=tests/test_merge.py")
