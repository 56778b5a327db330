"""The real command lines against the scripted model: `make test-agents`.

They are installed from npm and PyPI into a cache (AUTORESEARCH_AGENTS_DIR, or one below the user's cache directory), run with an
empty HOME and a clean environment, and reach this machine's loopback only: every proxy variable points at the scripted server,
which refuses to pass anything on. What each of them did is printed as a table at the end.

Each command line is a group of its own, since a group installs it once; groups run beside each other. What the driver does with a
named failure is the same for all, so whole nights of failures are run by one of them only.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import ROOT
from model_server import CLOSING, TOKENS_IN, TOKENS_OUT, ModelServer, Script
from night_kit import Bed, checkout_digest, git

from agent.coders import choice
from agent.coders.coder import Coder, Job, Reply
from agent.journal.journal import Event, read_events
from agent.journal.state import Night, fold
from agent.process import child

pytestmark = [pytest.mark.agents, pytest.mark.timeout(900)]
PROMPT = "Improve the training file train_mlx.py. MARKER-7 of the prompt."
SOURCE = "LR = 0.1\n"


def no_setup(home: Path, url: str) -> None:
    """Most need nothing in their HOME."""


def gemini_home(home: Path, url: str) -> None:
    (home / ".gemini").mkdir()
    (home / ".gemini/settings.json").write_text('{"security": {"auth": {"selectedType": "gemini-api-key"}}}')


def opencode_home(home: Path, url: str) -> None:
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "x", "models": {"m": {"name": "m"}},
                "options": {"baseURL": f"{url}/v1", "apiKey": "k"}}  # fmt: skip
    (home / ".config/opencode").mkdir(parents=True)
    (home / ".config/opencode/opencode.json").write_text(json.dumps({"provider": {"x": provider}}))


@dataclass(frozen=True)
class Real:
    package: str
    version: str  # what the adapters were read from
    env: dict[str, str] = field(default_factory=dict)  # {url} is filled in
    model: str | None = None
    extra: tuple[str, ...] = ()
    setup: Callable[[Path, str], None] = no_setup
    limited_seconds: float = 40  # for a rate limit: some go on trying, and are ended
    tells_wait: bool = True  # whether a rate limit's wait can be read from what it prints
    no_proxy: bool = True  # whether it goes past its proxy to this machine's loopback


CODEX = ("-c", "model_provider=x", "-c", 'model_providers.x.base_url="{url}/v1"', "-c", 'model_providers.x.name="x"',
         "-c", 'model_providers.x.wire_api="responses"', "-c", "model_providers.x.request_max_retries=1",
         "-c", "model_providers.x.stream_max_retries=1")  # fmt: skip
REAL = {
    "claude": Real(
        "@anthropic-ai/claude-code", "2.1.197", {"ANTHROPIC_BASE_URL": "{url}", "ANTHROPIC_AUTH_TOKEN": "key"}
    ),
    "codex": Real("@openai/codex", "0.169.0", {"OPENAI_API_KEY": "key"}, "gpt-5", CODEX, tells_wait=False),
    "gemini": Real(
        "@google/gemini-cli", "0.61.0", {"GEMINI_API_KEY": "key", "GOOGLE_GEMINI_BASE_URL": "{url}"}, "gemini-2.5-flash",
        setup=gemini_home,
    ),
    "opencode": Real(  # it asks its maker for a list of models first, and waits long where there is no way out
        "opencode-ai", "1.18.33", {"OPENCODE_DISABLE_MODELS_FETCH": "1"}, "x/m", setup=opencode_home,
    ),
    "aider": Real(
        "aider-chat", "0.86.2", {"OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": "key"}, "openai/m",
        ("--edit-format", "diff", "--no-show-model-warnings"),
    ),
    "qwen": Real(
        "@qwen-code/qwen-code", "0.15.10", {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "key"}, "m",
        ("--auth-type", "openai"), limited_seconds=150, no_proxy=False,
    ),
    "copilot": Real(
        "@github/copilot", "1.0.102",
        {"COPILOT_PROVIDER_BASE_URL": "{url}/v1", "COPILOT_MODEL": "m", "COPILOT_OFFLINE": "true"},
    ),
}  # fmt: skip


def cache() -> Path:
    if given := os.environ.get("AUTORESEARCH_AGENTS_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoresearch-agents"


def install(name: str) -> Path:
    """The directory of the program, installed if need be; skips the test, by name, where that can't be done."""
    real = REAL[name]
    temporary = {Path(place).resolve() for place in ("/tmp", tempfile.gettempdir())}
    if name == "codex" and temporary & set(cache().resolve().parents):
        pytest.skip("codex: it makes no helper programs for a HOME in the temporary directory, and cannot edit without them; "
                    "set AUTORESEARCH_AGENTS_DIR to a folder elsewhere")  # fmt: skip
    folder = cache() / f"{name}-{real.version}"
    bin_folder = folder / ("bin" if name == "aider" else "node_modules/.bin")
    if (folder / "ready").exists():
        return bin_folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name == "aider":
        steps = [[sys.executable, "-m", "venv", str(folder)],
                 [str(bin_folder / "python"), "-m", "pip", "install", "-q", f"{real.package}=={real.version}"]]  # fmt: skip
    elif npm := shutil.which("npm"):
        steps = [[npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", f"{real.package}@{real.version}"]]
    else:
        pytest.skip(f"{name}: npm is not installed")
    for step in steps:
        done = subprocess.run(step, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=800)
        if done.returncode:
            pytest.skip(f"{name}: can't be installed here: {(done.stderr or done.stdout).strip()[-300:]}")
    version = subprocess.run(
        [str(bin_folder / name), "--version"], env={"PATH": os.environ["PATH"], "HOME": str(folder)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if version.returncode or real.version not in version.stdout:
        pytest.skip(f"{name}: installed but does not run here: {(version.stderr or version.stdout).strip()[-300:]}")
    (folder / "ready").touch()
    return bin_folder


@dataclass
class Session:
    """What one run of a command line left behind."""

    reply: Reply
    outcome: child.Outcome
    text: str  # of the train file
    outside: dict[str, str]  # files beside the worktree
    worktree: list[str]
    server: ModelServer
    stdout: str

    def __str__(self) -> str:
        return f"{self.outcome}\n{self.reply}\n--- out\n{self.stdout[-3000:]}\n--- log\n{self.outcome.tail(3000)}"


def clean(real: Real, programs: Path, home: Path, url: str, proxy: str) -> dict[str, str]:
    """The whole environment of somebody who has this command line and nothing else, but for a proxy that leads nowhere."""
    real.setup(home, url)
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HOME": str(home),
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        **{key: value.format(url=url) for key, value in real.env.items()},
    }  # fmt: skip


def run(name: str, script: Script, seconds: float = 60, protocol: str = "") -> Session:
    """One job, run by the driver's own spawner; by the Agent Client Protocol if `protocol` has the options for it."""
    programs, real = install(name), REAL[name]
    (cache() / "work").mkdir(exist_ok=True)
    # not in the system's temporary directory: some treat that as a free-for-all, others refuse a HOME there
    with tempfile.TemporaryDirectory(dir=cache() / "work", prefix=f"{name}-", ignore_cleanup_errors=True) as temporary:
        base = Path(temporary)
        home, worktree, scratch, beside = (base / part for part in ("home", "worktree", "scratch", "beside"))
        for folder in (home, worktree, scratch, beside):
            folder.mkdir()
        (worktree / "train_mlx.py").write_text(SOURCE)
        (beside / "outside.py").write_text(SOURCE)
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "base"]):
            subprocess.run([*git, *words], cwd=worktree, env={"PATH": os.environ["PATH"], "HOME": str(home)}, check=True)
        script.path = str((beside if script.path == "outside.py" else worktree) / script.path)
        script.creates = script.creates and str(beside / script.creates)
        with ModelServer(script) as server:
            environ = clean(real, programs, home, server.url, server.url)
            extra = tuple(word.replace("{url}", server.url) for word in real.extra)
            job = Job(worktree, "train_mlx.py", PROMPT, scratch, model=real.model, extra_args=extra)
            coder: Coder = choice.acp(f"{name} {protocol}", environ) if protocol else choice.get(name)
            job = replace(job, model=None) if protocol else job
            command = coder.command(job, environ)
            outcome = child.run(
                command.argv, cwd=worktree, env=command.env, log=base / "log", stdin=command.stdin,
                stdout_to=base / "out", bounds=child.Bounds(wall_seconds=seconds),
            )  # fmt: skip
            stdout = (base / "out").read_text()
            reply = coder.reply(stdout, (base / "log").read_text(), job)
            outside = {path.name: path.read_text() for path in beside.iterdir()}
            files = sorted(path.name for path in worktree.iterdir())
            session = Session(reply, outcome, (worktree / "train_mlx.py").read_text(), outside, files, server, stdout)
            ROWS.append((name, real.version, script, session))
            print(session, file=sys.stderr)
            return session


ROWS: list[tuple[str, str, Script, Session]] = []


@pytest.fixture(autouse=True)
def told(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """What was seen, a line a run, for the table at the end: tests/conftest.py prints it."""
    ROWS.clear()
    yield
    for name, version, script, seen in ROWS:
        case = {200: "endless" if script.endless else "outside" if script.creates else "edit" if script.edits else "no edit"}
        wait = f" wait {script.retry_after}" if script.retry_after else ""
        ended = seen.outcome.exit_code if seen.outcome.reason == "exited" else seen.outcome.reason
        reply = seen.reply
        record_property("summary", (
            f"{name:9} {version:9} {case.get(script.status, f'{script.status}{wait}'):11} exit {ended!s:5} "
            f"{seen.outcome.seconds:5.1f} s  changed {seen.text != SOURCE!s:5} failure {reply.failure!s:11} "
            f"wait {reply.wait_seconds!s:5} in {reply.tokens_in!s:5} out {reply.tokens_out!s:5} usd {reply.cost_usd} "
            f"elsewhere {sorted(set(seen.server.refused))}"
        ))  # fmt: skip


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in REAL])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def usage(server: ModelServer) -> tuple[int, int]:
    """Of all turns; titles that some make of the prompt, without tools, are not in what they report."""
    turns = sum("tools" in request["body"] for request in server.requests) or len(server.requests)
    return turns * TOKENS_IN, turns * TOKENS_OUT


def test_it_reads_the_prompt_and_edits_with_its_own_tools(name: str) -> None:
    seen = run(name, Script())
    assert "MARKER-7" in seen.server.prompts
    assert seen.text == "LR = 0.2\n"
    assert seen.worktree == [".git", "train_mlx.py"]
    assert seen.reply.failure is None
    assert seen.reply.message
    assert seen.reply.message.endswith(CLOSING) or name == "aider"  # whose message is all it printed
    assert seen.reply.hypothesis == "a larger step learns faster"
    assert seen.reply.description == "double the learning rate"
    assert (seen.reply.tokens_in, seen.reply.tokens_out) == usage(seen.server)
    assert (seen.reply.cost_usd is not None) == (name == "claude")


def test_an_answer_without_an_edit_is_no_failure(name: str) -> None:
    seen = run(name, Script(edits=False))
    assert seen.text == SOURCE
    assert seen.reply.failure is None
    assert (seen.reply.tokens_in, seen.reply.tokens_out) == usage(seen.server)
    assert seen.reply.description == "double the learning rate"


def test_nothing_outside_the_worktree_is_written(name: str) -> None:
    seen = run(name, Script(path="outside.py", creates="new.py"))
    assert seen.outside == {"outside.py": SOURCE}
    assert seen.text == SOURCE
    assert len(seen.server.requests) >= 2  # the edit was tried
    assert seen.reply.failure in (None, "agent_error")


def test_an_expired_login_is_a_login(name: str) -> None:
    seen = run(name, Script(status=401))
    assert seen.text == SOURCE
    assert seen.reply.failure == "login", seen.reply
    assert seen.reply.detail


@pytest.mark.parametrize("wait", [None, 3])
def test_a_rate_limit_is_named_with_its_wait(name: str, wait: int | None) -> None:
    seen = run(name, Script(status=429, retry_after=wait), REAL[name].limited_seconds)
    assert seen.text == SOURCE
    assert seen.reply.failure == "rate_limit", seen.reply
    assert seen.reply.wait_seconds == (wait if REAL[name].tells_wait else None)


def test_a_stream_without_an_end_is_ended_and_still_read(name: str) -> None:
    seen = run(name, Script(endless=True), seconds=12)
    assert seen.outcome.reason == "wall" or name == "gemini"  # which may notice in time that it goes round in circles
    assert seen.text == SOURCE
    assert seen.reply.failure == "agent_error"


ACP = "--acp --skip-trust -m gemini-2.5-flash"


@pytest.mark.xdist_group("gemini")
def test_gemini_edits_by_the_agent_client_protocol() -> None:
    seen = run("gemini", Script(), protocol=ACP)
    assert "MARKER-7" in seen.server.prompts
    assert (seen.text, seen.worktree) == ("LR = 0.2\n", [".git", "train_mlx.py"])
    assert (seen.reply.failure, seen.reply.description) == (None, "double the learning rate")
    assert (seen.reply.tokens_in, seen.reply.tokens_out) == usage(seen.server)


@pytest.mark.xdist_group("gemini")
def test_gemini_is_held_to_the_worktree_by_the_protocol() -> None:
    seen = run("gemini", Script(path="outside.py", creates="new.py"), protocol=ACP)
    assert (seen.outside, seen.text) == ({"outside.py": SOURCE}, SOURCE)


# --- whole nights, from the command line -------------------------------------------------------------------------------


@dataclass
class Lived:
    """One night of one experiment, as its user finds it in the morning."""

    code: int
    output: str
    events: list[Event]
    night: Night
    kept: str  # the train file on the night's branch
    server: ModelServer
    touched: list[str]  # what is not as it was in the user's checkout


def live(name: str, script: Script, minutes: float = 3.0, check: bool = False) -> Lived:
    """`python -m agent.loop --agent NAME --experiments 1` on a toy repository, by the real command line."""
    programs, real = install(name), REAL[name]
    (cache() / "work").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache() / "work", prefix=f"{name}-", ignore_cleanup_errors=True) as temporary:
        bed = Bed(Path(temporary))
        outside = bool(script.creates)  # in the checkout around the worktree, which is the user's
        script.path = str((bed.repo if outside else bed.folder() / "worktree") / "train_mlx.py")
        script.old, script.new, script.creates = "GAIN = 0.0", "GAIN = 0.05", script.creates and str(bed.repo / script.creates)
        journal = bed.folder() / "journal.jsonl"
        script.lifted = lambda: journal.exists() and b'"agent_failed"' in journal.read_bytes()
        before = checkout_digest(bed.repo)
        with ModelServer(script) as server:
            env = clean(real, programs, bed.home, server.url, "http://127.0.0.1:9" if real.no_proxy else server.url)
            env |= {"AUTORESEARCH_HOME": str(bed.home / "data"), "PYTHONPATH": str(ROOT)}
            extra = shlex.join(word.replace("{url}", server.url) for word in real.extra)
            options = [*(("--agent-args", extra) if extra else ()), *(("--model", real.model) if real.model else ())]
            done = subprocess.run(
                [sys.executable, "-m", "agent.loop", "--agent", name, "--experiments", "1", "--tag", "night", "--no-sandbox",
                 "--baseline-seeds", "3", "--disk-gb", "0", "--max-agent-minutes", str(minutes),
                 "--check-agent" if check else "--no-check-agent", *options],
                cwd=bed.repo, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
        events = read_events(journal)[0]
        branch = git(bed.repo, "branch", "--list", "--format=%(refname)", "autoresearch/night")  # none where nothing was kept
        kept = git(bed.repo, "show", f"{branch or 'HEAD'}:train_mlx.py")
        touched = sorted(path for path, _ in before.items() ^ checkout_digest(bed.repo).items())
        lived = Lived(done.returncode, done.stdout + done.stderr, events, fold(events), kept, server, touched)
        print(lived.output, *(f"{log}: {log.read_text()[-3000:]}" for log in bed.folder().glob("logs/*.agent.*")), file=sys.stderr)
        return lived


def test_a_night_by_this_agent_commits_its_edit(name: str) -> None:
    lived = live(name, Script(), check=True)
    assert lived.code == 0
    assert f"{name} answered in" in lived.output
    assert lived.server.checks
    (experiment,) = lived.night.done
    assert (experiment.status, lived.night.kept) == ("keep", [1])
    assert "GAIN = 0.05\n" in lived.kept
    assert (experiment.description, experiment.hypothesis) == ("double the learning rate", "a larger step learns faster")
    used = next(event["usage"] for event in lived.events if event["event"] == "candidate" and event["n"] == 1)
    assert (used["tokens_in"], used["tokens_out"]) == usage(lived.server)
    assert (used["cost"] is not None) == (name == "claude")
    assert "Lower val_bpb." in lived.server.prompts, "the user's program.md"
    assert "The baseline trains 10 steps" in lived.server.prompts
    assert lived.touched == []


ENDINGS = {
    "endless": (Script(endless=True), ("agent_error",)),
    "no edit": (Script(edits=False), ("noop",)),
    "outside": (Script(creates="new.py"), ("noop", "agent_error", "violation")),
}


@pytest.mark.xdist_group("claude")
@pytest.mark.parametrize("case", ENDINGS)
def test_each_other_ending_has_its_status(case: str) -> None:
    script, statuses = ENDINGS[case]
    lived = live("claude", replace(script), 0.3 if case == "endless" else 3.0)
    (experiment,) = lived.night.done
    assert experiment.status in statuses, experiment
    assert lived.code == (experiment.status != "violation"), "the agent never changed the file"
    assert "GAIN = 0.0\n" in lived.kept
    assert lived.touched == []


def test_an_expired_login_is_told_with_its_mend_before_anything_is_trained(name: str) -> None:
    lived = live(name, Script(status=401), check=True)
    assert (lived.code, lived.night.trials) == (12, 0)
    assert choice.get(name).login_hint in lived.output
    assert lived.night.done == []
    assert "GAIN = 0.0\n" in lived.kept
    assert lived.touched == []


@pytest.mark.xdist_group("claude")
def test_a_rate_limit_is_waited_out_and_uses_no_experiment() -> None:
    lived = live("claude", Script(status=429, retry_after=3), REAL["claude"].limited_seconds / 60)
    assert lived.code == 0
    waits = [(event["kind"], event["wait"]) for event in lived.events if event["event"] == "agent_failed"]
    assert waits == [("rate_limit", 3.0)]
    assert "rate limit: " in lived.output
    assert [experiment.status for experiment in lived.night.done] == ["keep"]
    assert "GAIN = 0.05\n" in lived.kept
