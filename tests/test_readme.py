"""The README tells the truth: its file map is the repository, and every command in it and in docs/ runs."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PINNED, ROOT, some_text
from model_server import BLOCK, CLOSING, ModelServer, Script
from night_kit import CACHE, git
from test_local import FAKE_SERVER, model_folder

from agent import errors
from agent.loop import INTERRUPTED

README = (ROOT / "README.md").read_text()
PAGES = (README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))))
# Blocks of `bash` are for another machine: docs/windows.md
BLOCKS = [line for page in PAGES for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]
IN_SENTENCES = re.findall(r"`((?:python|make|uv|scripts/setup\.sh) [^`]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S))
COMMANDS = list(dict.fromkeys(
    command for line in [*BLOCKS, *IN_SENTENCES] if (command := re.split(r"(?:^|\s\s+)#", line)[0].strip())))  # fmt: skip
ELSEWHERE = {"make test": "this suite", "python -m agent.doctor --deep": "tests/test_deep.py, ten minutes"}
HIDDEN = {".ci", ".github", ".gitignore", "AGENTS.md", "CHANGELOG.md", "LICENSE", "README.md", "Makefile", "constraints.txt",
          "pyproject.toml"}  # a map needs no entry for these

# An edit that every agent here makes; in a few steps it helps
LINE = next(line for line in (PINNED / "train_mlx.py").read_text().splitlines() if line.startswith("UNEMBEDDING_LR = "))
OLD, NEW = LINE.split("  #")[0], "UNEMBEDDING_LR = 0.01"
EDIT = f"""
import json, sys
from pathlib import Path
prompt = sys.stdin.read() if not sys.stdin.isatty() else ""
file = Path("train_mlx.py")
if prompt and "Answer with the one word" not in prompt:  # not when it is asked for its version
    text = file.read_text()
    file.write_text(text.replace({OLD!r}, {NEW!r}) if {OLD!r} in text else text.replace({NEW!r}, {OLD!r}))  # merged: back again
said = "ready. HYPOTHESIS: a larger step\\nDESCRIPTION: {NEW}"
"""
PROGRAMS = {  # what cannot be had here: coding agents, macOS's `open`, and uv, which would download
    "claude": f"""{EDIT}
print(json.dumps({{"type": "result", "is_error": False, "result": said, "total_cost_usd": 0.01, "usage": {{"output_tokens": 9}}}}))
""",
    "my-agent": f"{EDIT}\nassert sys.argv[1:] == ['--edit']\nprint(said)\n",
    "gemini": (ROOT / "tests" / "coders" / "acp_agent.py").read_text().replace("sys.argv[1:]", '["own-tool"]')
    .replace("GAIN = 0.05", NEW).replace("GAIN = 0.0", OLD),
    "open": "import sys\nassert b'<html' in open(sys.argv[1], 'rb').read(9999)\n",
    "uv": f"""
import os, subprocess, sys
if sys.argv[1] == "run":
    os.environ["AUTORESEARCH_BUDGET"] = "3steps"
    os.execv({str(Path(".venv/bin/python"))!r}, ["python", *sys.argv[2:]])
assert sys.argv[1] in ("sync", "pip"), sys.argv
""",
}  # fmt: skip


def test_the_file_map_is_the_repository() -> None:
    listed = set(re.findall(r"^\| `([\w./]+)` \|", README, re.M))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    there = {name.split("/")[0] + ("/" if "/" in name else "") for name in tracked}
    assert listed == {name for name in there if name.strip("/") not in HIDDEN}


def test_a_person_with_ten_minutes_can_read_it() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    assert 300 < len([word for word in text.split() if re.search(r"\w", word)]) <= 1200
    assert len(COMMANDS) > 20, COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python")])
def test_a_command_takes_its_options(command: str) -> None:
    """In a second each; that it works is tested below."""
    words = command.split()[1:]
    program = words[:2] if words[0] == "-m" else words[:1]
    shown = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert not [w for w in words if w.startswith("--") and w != "--acp'" and not re.search(rf"{w.strip(chr(39))}\b", shown.stdout)
                and "--edit" not in w]


def test_help_has_every_exit_code() -> None:
    shown = subprocess.run([sys.executable, "-m", "agent.loop", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    table = {int(code) for code in re.findall(r"^ +(\d+)  ", shown.stdout.split("Exit codes:")[1], re.M)}
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.NightError))
    assert table == {0, INTERRUPTED, *(kind.exit_code for kind in kinds)}


class Hour:
    """A person's machine: an empty home with some texts, a fresh checkout, and the programs above on PATH."""

    def __init__(self, folder: Path) -> None:
        self.home, self.project, self.bin = folder / "home", folder / "project", folder / "bin"
        for made in (self.home / "notes" / "2024", self.home / "books", self.home / "src" / "project", self.project, self.bin):
            made.mkdir(parents=True)
        for n in range(40):
            (self.home / "notes" / "2024" / f"{n}.md").write_text(some_text(2000, seed=n))
        (self.home / "books" / "bleak-house.txt").write_text(some_text(60_000, seed=100))
        rows = (json.dumps({"conversation": some_text(600, seed=200 + n)}) for n in range(100))
        (self.home / "chats.jsonl").write_text("\n".join(rows))
        for n in range(30):
            (self.home / "src" / "project" / f"{n}.py").write_text(f"NAMES = '''{some_text(2000, seed=400 + n)}'''\n")
        for name, source in PROGRAMS.items():
            (self.bin / name).write_text(f"#!{sys.executable}\n{source}")
            (self.bin / name).chmod(0o755)
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, tracked):
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.project / name)
        shutil.copy(PINNED / "train_mlx.py", self.project)  # the edit below has to find its line, whatever a night has changed
        git(self.project, "init", "-q", "-b", "main")
        git(self.project, "add", "-A")
        git(self.project, "commit", "-q", "-m", "start")
        self._set_up()
        self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home), "COLUMNS": "80", "XDG_CACHE_HOME": CACHE,
                    "AUTORESEARCH_HOME": str(self.home / "data"), "ANTHROPIC_API_KEY": "x"}  # fmt: skip
        self.tag = ""

    def _set_up(self) -> None:
        """A .venv with the packages of this process, as scripts/setup.sh would make it, and a scripted server for mlx_lm."""
        venv = self.project / ".venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        site = next(venv.glob("lib/python*/site-packages"))
        (site / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        (site / "mlx_lm").mkdir()
        # In the package, because an agent's environment is not passed on
        facts = {"FAKE_FACTS": str(self.home / "facts"), "FAKE_REPLIES": json.dumps([REPLY] * 9)}
        (site / "mlx_lm" / "__init__.py").write_text(
            f"import os, sys\nos.environ |= {facts!r}\nsys.path.append({str(ROOT / 'tests')!r})\n")
        (site / "mlx_lm" / "__main__.py").write_text(FAKE_SERVER)
        for library in Path(sys.prefix, "lib").glob("lib*.so*"):  # MKL
            (venv / "lib" / library.name).symlink_to(library)
        for mark in (".ready", ".dev"):
            (venv / mark).touch()

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", f"source .venv/bin/activate\n{command}"], cwd=self.project, env=self.env, input="y\n",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)  # fmt: skip


REPLY = BLOCK.format(path="train_mlx.py", old=LINE, new=LINE.replace(OLD, NEW)) + CLOSING


@pytest.fixture
def hour() -> Iterator[Hour]:
    folder = ROOT / "runs" / "readme-test"  # the sandbox of Linux hides /tmp
    shutil.rmtree(folder, ignore_errors=True)
    yield Hour(folder)
    shutil.rmtree(folder)


def in_small(command: str, hour: Hour, url: str) -> str:
    """The same command with little data, short trainings, and an end."""
    command = command.replace("TAG", hour.tag).replace("http://localhost:1234", url)
    if command == "make demo":
        return f"{command} OPTIONS='--experiments 1 --budget 3steps'"
    if command.startswith("python prepare_mlx.py --dataset"):
        return f"{command} --preset tiny"
    if command.startswith("python scripts/benchmark.py dtype"):
        return f"{command} --rounds 1 --steps 3"
    if command.startswith("python scripts/benchmark.py compare"):
        return (f"{command} --backends mlx-cpu --rounds 1 --steps 1 --equal-steps 3steps --equal-seconds 0 "
                "--constant NGRAM_BUCKETS=(97,)".replace("(97,)", "'(97,)'"))  # fmt: skip
    if command.endswith("--resume"):
        return f"{command} --experiments 2"
    if command.startswith("python -m agent.loop --agent") or command == "python -m agent.loop":
        model = " --model $HOME/model" if "local" in command else " --model m" if "chat" in command else ""
        return f"{command}{model} --experiments 1 --baseline-seeds 3 --budget 10steps"
    return command


def look_at_the_page(hour: Hour, command: str) -> str:
    """Start the page, fetch it once, end it. Returns what it said."""
    with subprocess.Popen(["bash", "-c", f"source .venv/bin/activate\nexec {command} --port 0"], cwd=hour.project, env=hour.env,
                          stdout=subprocess.PIPE, text=True) as server:  # fmt: skip
        assert server.stdout
        said = server.stdout.readline()
        with urllib.request.urlopen(said.split()[-1], timeout=30) as page:
            assert b"<html" in page.read()
        server.terminate()
    return said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs_in_the_order_of_the_readme(hour: Hour) -> None:
    model_folder(hour.home / "model")
    said: dict[str, str] = {}
    with ModelServer(Script(replies=[REPLY] * 9)) as server:
        prepared = hour.run("python prepare_mlx.py --dataset text:$HOME/notes --preset tiny")  # for nights before "Your data"
        assert prepared.returncode == 0, prepared.stdout
        for command in (c for c in COMMANDS if c not in ELSEWHERE):
            if command == "python -m agent.dashboard":
                assert hour.tag in look_at_the_page(hour, command)
                continue
            done = hour.run(in_small(command, hour, server.url))
            said[command] = done.stdout
            assert (done.returncode, "Traceback" in done.stdout) == (0, False), f"{command}\n{done.stdout}"
            if command.endswith("--agent claude") and (night := re.search(r" night (\S+): train_mlx\.py", done.stdout)):
                hour.tag = night[1]
    assert f"+{NEW}" in said["git diff main autoresearch/TAG"], "the night kept it"
    assert NEW in (hour.project / "train_mlx.py").read_text(), "merged"
    assert "is forgotten" in said["python -m agent.loop --forget TAG"]
    assert sum("the night ends" in text for text in said.values()) > 6
