"""The one word that an agent is asked for before anything is trained: real programs, whole nights from the command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from night_kit import Bed
from story_kit import told

from agent.coders import choice
from agent.coders.coder import Coder
from agent.journal.journal import Event, read_events
from agent.journal.settings import Settings
from agent.journal.state import fold
from agent.proposal.check import Answer, ask_for_a_word, before_the_night

RESULT = {"type": "result", "is_error": False, "result": "ready", "total_cost_usd": 0.03,
          "usage": {"input_tokens": 20, "output_tokens": 2}}  # fmt: skip
OUT_OF_DATE = {**RESULT, "is_error": True, "api_error_status": 401, "result": "OAuth token has expired", "total_cost_usd": 0}
LIMITED = {**RESULT, "is_error": True, "api_error_status": 429, "result": "rate limit, try again in 2 minutes"}
BETTER = "f = Path('train_mlx.py'); f.write_text(f.read_text().replace('GAIN = 0.0', 'GAIN = 0.05'))"


def program(folder: Path, name: str, body: str) -> Path:
    """A program of that name that reads its prompt and then does `body`."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    imports = "import json, os, sys, time\nfrom pathlib import Path\nprompt = sys.stdin.read()"
    file.write_text(f"#!{sys.executable}\n{imports}\n{body}\n")
    file.chmod(0o755)
    return file


def asked(folder: Path, coder: Coder, **settings: object) -> Answer:
    return ask_for_a_word(coder, Settings(**settings), folder, ("train_mlx.py", b"GAIN = 0.0\n"))  # type: ignore[arg-type]


def claude(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Coder:
    path = program(folder / "bin", "claude", body).parent
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    return choice.get("claude")


@pytest.mark.parametrize(("body", "kind", "words"), [
    (f"print({json.dumps(RESULT)!r})", "ok", "claude answered in "),
    (f"print({json.dumps(OUT_OF_DATE)!r}); sys.exit(1)", "login", "not logged in: 401 OAuth token has expired; run `claude`"),
    (f"print({json.dumps(LIMITED)!r}); sys.exit(1)", "rate_limit", "claude is rate-limited, for 120 s"),
    ("sys.exit('Segmentation fault')", "agent_error", "claude did not answer (exit code 1): Segmentation fault"),
    ("print('{}')", "agent_error", "claude did not answer"),
])  # fmt: skip
def test_a_cli_is_judged_by_what_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, kind: str, words: str
) -> None:
    answer = asked(tmp_path, claude(tmp_path, monkeypatch, body))
    assert answer.kind == kind, answer
    assert words in answer.words
    assert answer.usable == (kind in ("ok", "rate_limit"))
    assert not list(tmp_path.glob("agent-*"))


def test_it_works_in_a_repository_of_its_own_with_the_real_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = ("import subprocess\n"
            "root = subprocess.run(['git', 'log', '--format=%s', '--', 'train_mlx.py'], capture_output=True, text=True)\n"
            f"Path({str(tmp_path / 'seen')!r}).write_text(json.dumps([prompt, sys.argv, os.getcwd(), root.stdout]))\n"
            f"print({json.dumps(RESULT)!r})")  # fmt: skip
    answer = asked(tmp_path, claude(tmp_path, monkeypatch, body), model="some-model")
    assert answer.usage == {"cost": 0.03, "tokens": 22, "tokens_in": 20, "tokens_out": 2}
    prompt, argv, cwd, log = json.loads((tmp_path / "seen").read_text())
    assert "ready" in prompt
    assert argv[1:] == choice.get("claude").command(_job(tmp_path), os.environ).argv[1:]
    assert Path(cwd).is_relative_to(tmp_path)
    assert log == "check\n"


def _job(folder: Path) -> choice.Job:
    return choice.Job(folder, "train_mlx.py", "", folder, model="some-model")


def test_silence_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    coder = replace(claude(tmp_path, monkeypatch, "time.sleep(60)"), check_seconds=1.0)
    answer = asked(tmp_path, coder)
    assert (answer.kind, answer.words) == ("agent_error", "claude did not answer within 1 s: it said nothing")
    coder = replace(choice.template(str(program(tmp_path, "mine", "time.sleep(60)"))), check_seconds=1.0)
    assert asked(tmp_path, coder).kind == "odd", "nobody has told it to answer"


@pytest.mark.parametrize(("body", "kind"), [
    ("print('whatever')", "ok"),
    ("sys.exit(3)", "odd"),
    ("sys.exit(127)", "missing"),
    ("sys.exit('Error: 401 Unauthorized: invalid API key')", "login"),
    ("print('Authenticated as somebody; quota: 83 % left', file=sys.stderr)", "ok"),
])  # fmt: skip
def test_of_an_own_command_no_more_is_wanted_than_that_it_runs(tmp_path: Path, body: str, kind: str) -> None:
    answer = asked(tmp_path, choice.template(str(program(tmp_path, "mine", body))))
    assert answer.kind == kind, answer


@pytest.mark.parametrize(("body", "cost"), [
    ("sys.exit('Error: 429 Too Many Requests')", 0.0),
    ("print('quota: rate limit, 83 % left', file=sys.stderr)", None),
])  # fmt: skip
def test_only_a_call_that_was_refused_is_known_to_cost_nothing(tmp_path: Path, body: str, cost: float | None) -> None:
    assert asked(tmp_path, choice.template(str(program(tmp_path, "mine", body)))).usage["cost"] == cost


def test_every_built_in_agent_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert asked(tmp_path, choice.get("search")).kind in ("ok", "agent_error")  # nothing to try on a file of one line
    without = asked(tmp_path, choice.get("chat"))
    assert not without.usable
    assert "no endpoint; give --base-url" in without.words
    nobody = asked(tmp_path, choice.get("chat"), base_url="http://127.0.0.1:9/v1", model="m")
    assert not nobody.usable
    assert "127.0.0.1:9" in nobody.words
    absent = asked(tmp_path, choice.get("local"), model="nobody/nothing")
    assert (absent.kind, "nobody/nothing is not on this machine" in absent.words) == ("missing", True)


def test_what_it_leaves_is_neither_read_blindly_nor_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = ("os.remove('train_mlx.py'); os.mkfifo('train_mlx.py'); os.makedirs('a/' * 500); os.chmod('.', 0o500)\n"
            f"print({json.dumps(RESULT)!r})")  # fmt: skip
    assert asked(tmp_path, claude(tmp_path, monkeypatch, body)).kind == "ok"
    assert not list(tmp_path.glob("agent-*"))


def test_an_agent_whose_next_call_may_cost_too_much_is_not_asked(tmp_path: Path) -> None:
    night = told().night  # which has cost 0.75, and its dearest call 0.5
    calls = tmp_path / "calls"
    body = f"open({str(calls)!r}, 'a').write('x'); print(json.dumps({{'cost_usd': 0}}))"
    mine = choice.template(str(program(tmp_path, "mine", body)))
    for most, called in ((1.24, ""), (1.25, "x")):
        calls.write_text("")
        before_the_night(mine, Settings(max_cost=most), tmp_path, ("train_mlx.py", b"GAIN = 0.0\n"), night,
                         lambda *words, **fields: None, lambda text: None, lambda: False)  # fmt: skip
        assert calls.read_text() == called


# --- whole nights ------------------------------------------------------------------------------------------------------

FAST = ("--baseline-seeds", "3", "--disk-gb", "0", "--no-picture", "--no-sandbox", "--tag", "night")


def events_of(bed: Bed) -> list[Event]:
    return read_events(bed.folder() / "journal.jsonl")[0]


def kinds(bed: Bed) -> set[str]:
    return {event["event"] for event in events_of(bed)}


@pytest.mark.parametrize(("options", "words"), [
    (("--agent", "chat"), "no endpoint; give --base-url"),
    (("--agent", "chat", "--base-url", "http://127.0.0.1:9/v1", "--model", "m"), "127.0.0.1:9"),
    (("--agent-cmd", "{bin}/mine"), "cmd can't be started"),
    (("--agent", "claude"), "OAuth token has expired"),
])  # fmt: skip
def test_a_night_without_a_working_agent_ends_before_anything_is_trained(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    bed = Bed(tmp_path)
    path = program(tmp_path / "bin", "claude", f"print({json.dumps(OUT_OF_DATE)!r}); sys.exit(1)").parent
    (path / "mine").write_text("#!/no/such/interpreter\n")
    (path / "mine").chmod(0o755)
    done = bed.loop(*(word.format(bin=path) for word in options), *FAST, "--experiments", "5",
                    PATH=f"{path}{os.pathsep}{os.environ['PATH']}")  # fmt: skip
    assert done.returncode == 12, done.stdout + done.stderr
    assert words in done.stderr
    assert "nothing was trained" in done.stderr
    assert "trial_start" not in kinds(bed)
    assert events_of(bed)[-1]["event"] == "night_end"


def test_the_call_is_journalled_paid_for_and_told(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    calls = tmp_path / "calls"
    body = f"open({str(calls)!r}, 'a').write('x')\n{BETTER}\nprint({json.dumps(RESULT)!r})"
    path = program(tmp_path / "bin", "claude", body).parent
    env = {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    done = bed.loop("--agent", "claude", *FAST, "--experiments", "1", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "claude answered in " in done.stdout
    night = fold(events_of(bed))
    assert [e.status for e in night.done] == ["keep"]
    assert (round(night.cost, 2), calls.read_text()) == (0.06, "xx")
    bed.loop("--resume", "--no-picture", **env)
    assert calls.read_text() == "xx", "no experiment is left to ask it for"


def test_a_limit_of_cost_needs_an_agent_that_tells_a_cost(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    mine = program(tmp_path / "bin", "mine", BETTER)
    limited = ("--agent-cmd", str(mine), *FAST, "--experiments", "1", "--max-cost", "5")
    done = bed.loop(*limited)
    assert done.returncode == 12
    assert "cmd does not report its cost, so --max-cost 5 cannot be enforced; have it print a last line such as" in done.stderr
    program(tmp_path / "bin", "mine", f"{BETTER}\nprint('DESCRIPTION: gain')\nprint(json.dumps({{'cost_usd': 0.2}}))")
    done = bed.loop(*limited, "--resume")
    (experiment,) = fold(events_of(bed)).done
    assert (experiment.status, experiment.description, experiment.cost) == ("keep", "gain", 0.2), done.stdout + done.stderr


def test_a_night_whose_agent_never_changed_the_file_is_no_success(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "fail")  # whose nights leave out the question
    done = bed.run("--experiments", "2", "--no-sandbox")
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1].endswith("the agent never changed the file: 2 agent_error")
    bed.plan("better")
    done = bed.run("--experiments", "3", "--resume", "--no-sandbox")
    assert (done.returncode, "never changed" in done.stdout) == (0, False), done.stdout
