"""What several test files share: the real programs run as processes, and a small dataset prepared once in a home of its own."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from harness.machine import load_fast_blas

load_fast_blas(threads=1)  # before a test imports MLX; for small matrices more threads only wait for each other
settings.register_profile("untimed", deadline=None)  # a busy machine may take long over one example
settings.load_profile("untimed")
os.environ.pop("AUTORESEARCH_TIER", None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us in the background has it ignored, by children too
ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / "tests" / "pinned"  # copies of the train files for tests that know their text: see CONTRIBUTING.md
SECONDS = 120
PLANTED = {  # secrets of an environment
    "ACME_API_KEY": "sk-ant-planted-0123456789",
    "GITHUB_TOKEN": "ghp_planted_abcdefgh",
    "DB_PASSWORD": 'quo"te\\d-pa/ss wörd',
    "HTTPS_PROXY": "http://user:pr0xy-pass%21word@proxy:3128",
    "SOME_PRIVATE_KEY": "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEF\nZZZZvQIBADANBgkqhkiG9w0BAQEF\n-----END KEY-----",
}


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what tests recorded for it, and say which files are no longer what tests look into.

    After a night, or once a person wrote their own brief, the latter is fine."""
    recorded = [line for report in terminalreporter.stats.get("", []) if report.when == "teardown"
                for name, line in report.user_properties if name == "summary"]  # fmt: skip
    for line in sorted(recorded):
        terminalreporter.write_line(line)
    for name in ("train_mlx.py", "train_torch.py", "program.md"):
        if (ROOT / name).read_bytes() != (PINNED / name).read_bytes():
            terminalreporter.write_line(f"note: {name} differs from tests/pinned/{name}, which the tests of its insides ran on; "
                                        "if you changed it by hand, run: make pin")


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a program under test: nothing of ours from outside, no network, MLX without compiling."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTORESEARCH_", "HF_"))}
    return {**kept, "AUTORESEARCH_HOME": str(home), "MLX_DISABLE_COMPILE": "1", "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT), **more}


def on_windows(*early: str) -> dict[str, str]:
    """Variables with which a program, and what it starts, takes itself for one on Windows. early: modules that need POSIX."""
    return {"PYTHONPATH": f"{ROOT / 'tests' / 'windows'}{os.pathsep}{ROOT}", "ACTED_EARLY": " ".join(early)}


def program(*argv: object, home: Path, cwd: Path = ROOT, seconds: float = SECONDS, **more: str) -> subprocess.CompletedProcess:
    """Run Python on `argv` to its end; both outputs as text."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=environment(home, **more), timeout=seconds,
                          capture_output=True, text=True)


def prepare(*argv: object, home: Path, **more: str) -> subprocess.CompletedProcess:
    return program(ROOT / "prepare_mlx.py", *argv, home=home, **more)


def summary_of(output: str) -> dict[str, str]:
    """The keys of the one summary block in a program's output."""
    _, block = output.split("---\n")
    return dict(line.split(":", 1) for line in block.replace(" ", "").splitlines())


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset and the home it lies in."""
    home: Path
    entry: dict

    @property
    def train(self) -> Path:
        return Path(self.entry["train_dir"])

    @property
    def held(self) -> Path:
        return Path(self.entry["held_dir"])


def some_text(size: int, seed: int = 1) -> str:
    """`size` characters of sentences in paragraphs: learnable, all different, not only ASCII."""
    rng = random.Random(seed)
    words = ["tree", "house", "river", "small", "green", "runs", "sleeps", "über", "naïve", "cats", "dogs", "3", "1984", "don't"]
    lines, length = [], 0
    while length < size:
        line = " ".join(rng.choice(words) for _ in range(rng.randint(4, 12))).capitalize() + rng.choice([".", "!", "?", " …"])
        lines.append(line + ("\n\n" if rng.random() < 0.3 else "\n"))
        length += len(lines[-1])
    return "".join(lines)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Dataset:
    """400 KB of generated text, prepared with the preset `tiny` (320 tokens, rows of 32)."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text(some_text(400_000), encoding="utf-8")
    done = prepare("--dataset", f"text:{home / 'text.txt'}", "--preset", "tiny", "--json", home / "entry.json", home=home)
    assert done.returncode == 0, done.stderr
    return Dataset(home, json.loads((home / "entry.json").read_text()))


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> Path:
    """The run directory of train_mlx.py after 20 steps on `tiny`, not scored."""
    run_dir = tmp_path_factory.mktemp("trained")
    done = program(PINNED / "train_mlx.py", home=tiny.home, AUTORESEARCH_DATA=str(tiny.train), AUTORESEARCH_RUN_DIR=str(run_dir),
                   AUTORESEARCH_BUDGET="20steps", AUTORESEARCH_SCORE="0")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def full_disk():
    """Fills the disk: from the call on, this process and its children write no file beyond so many bytes."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
