"""The table of coding agents: what each is started with, and how what it printed is read."""

from __future__ import annotations

import calendar
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from night_kit import ROOT, Bed

from agent.coders import choice
from agent.coders.coder import BASE_ENV, Coder, CoderError, Job, Reply, cost_usd, usage_of, with_last_lines
from agent.coders.error_text import name_failure, wait_seconds
from agent.journal.journal import read_events
from agent.journal.state import fold

ALL = list(choice.TABLE.values())
PROGRAMS = [coder for coder in ALL if coder.binary != sys.executable]
SAID = "Raised it.\n\nHYPOTHESIS: larger steps\nDESCRIPTION: double LR"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "worktree").mkdir()
    (tmp_path / "scratch").mkdir()
    return Job(tmp_path / "worktree", "train_mlx.py", "PROMPT-TEXT", tmp_path / "scratch")


def install(folder: Path, *names: str) -> str:
    """A directory of programs that do nothing, as a PATH."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(stat.S_IRWXU)
    return str(folder)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    path = install(tmp_path / "bin", *(coder.binary for coder in PROGRAMS))
    return {"PATH": path, "HOME": str(tmp_path), "SECRET_OF_SOMETHING_ELSE": "s", "AWS_PROFILE": "p", "GITHUB_TOKEN": "g"}


# --- commands ----------------------------------------------------------------------------------------------------------


def test_the_table_is_complete() -> None:
    assert list(choice.TABLE) == ["claude", "codex", "gemini", "opencode", "aider", "qwen", "copilot", "cursor", "goose",
                                  "search", "chat", "local", "acp"]  # fmt: skip
    assert all(coder.install_hint and coder.login_hint for coder in ALL)


@pytest.mark.parametrize("coder", ALL, ids=lambda coder: coder.name)
def test_a_command_has_its_prompt_and_nobody_elses_secrets(coder: Coder, job: Job, environ: dict[str, str]) -> None:
    command = coder.command(replace(job, model="some-model", extra_args=("--extra", "1")), environ)
    assert os.path.isabs(command.argv[0])
    assert "SECRET_OF_SOMETHING_ELSE" not in command.env
    assert set(command.env) <= {*BASE_ENV, *coder.env_names, *coder.env_set, "TERM", "NO_COLOR",
                                "GEMINI_CLI_SYSTEM_SETTINGS_PATH", "QWEN_CODE_SYSTEM_SETTINGS_PATH"}  # fmt: skip
    assert command.env["HOME"] == environ["HOME"]
    given = " ".join(command.argv)
    assert "--extra 1" in given
    assert "some-model" in given or coder.name == "search"
    assert job.prompt_file.read_text() == "PROMPT-TEXT"
    assert command.stdin == ("PROMPT-TEXT" if coder.prompt_on_stdin else "")
    assert ("PROMPT-TEXT" in given) == (coder.name == "cursor")  # an argument shows in the list of processes
    assert all(isinstance(word, str) for word in command.argv)


def test_variables_are_passed_by_name(job: Job, environ: dict[str, str]) -> None:
    assert "GITHUB_TOKEN" not in choice.get("claude").command(job, environ).env
    assert choice.get("copilot").command(job, environ).env["GITHUB_TOKEN"] == "g"
    asked = replace(job, pass_env=("SECRET_OF_SOMETHING_ELSE", "NOT_THERE"))
    assert choice.get("claude").command(asked, environ).env["SECRET_OF_SOMETHING_ELSE"] == "s"


def argv(name: str, job: Job, environ: dict[str, str]) -> list[str]:
    return choice.get(name).command(job, environ).argv[1:]


def test_claude_may_edit_and_nothing_else(job: Job, environ: dict[str, str]) -> None:
    words = argv("claude", replace(job, max_cost_usd=1.5), environ)
    assert words[words.index("--tools") + 1] == "Read,Edit,Write,Grep,Glob"
    assert words[words.index("--permission-mode") + 1] == "acceptEdits"
    assert words[words.index("--max-budget-usd") + 1] == "1.5"
    assert "--dangerously-skip-permissions" not in words
    assert "--max-budget-usd" not in argv("claude", job, environ)
    assert "--max-budget-usd" in argv("claude", replace(job, max_cost_usd=0.0), environ), "nothing left is not no limit"


def test_codex_stays_in_its_sandbox_and_reads_the_prompt_last(job: Job, environ: dict[str, str]) -> None:
    words = argv("codex", replace(job, extra_args=("-c", "x=1")), environ)
    assert words[words.index("--sandbox") + 1] == "workspace-write"
    assert "sandbox_workspace_write.exclude_slash_tmp=true" in words
    assert words[words.index("-C") + 1] == str(job.worktree)
    assert words[-3:] == ["-c", "x=1", "-"]


def test_qwen_and_gemini_get_their_settings_beside_the_worktree(job: Job, environ: dict[str, str]) -> None:
    env = choice.get("qwen").command(job, environ).env
    rules = json.loads(Path(env["QWEN_CODE_SYSTEM_SETTINGS_PATH"]).read_text())["permissions"]
    assert rules["allow"] == ["Edit(/**)", "Read(/**)"]
    assert "Bash" in rules["deny"]
    assert "auto-edit" not in argv("qwen", job, environ)
    env = choice.get("gemini").command(job, environ).env
    assert Path(env["GEMINI_CLI_SYSTEM_SETTINGS_PATH"]).parent == job.scratch
    assert list(job.worktree.iterdir()) == []


def test_opencode_copilot_and_aider_are_held_to_edits(job: Job, environ: dict[str, str]) -> None:
    config = json.loads(choice.get("opencode").command(job, environ).env["OPENCODE_CONFIG_CONTENT"])
    assert {key: config["permission"][key] for key in ("edit", "bash", "external_directory")} == {
        "edit": "allow", "bash": "deny", "external_directory": "deny"}  # fmt: skip
    words = argv("copilot", job, environ)
    assert words[1:6] == ["view", "create", "edit", "grep", "glob"]
    assert "--disallow-temp-dir" in words
    assert not {"--allow-all-tools", "--allow-all-paths", "--yolo"} & set(words)
    words = argv("aider", job, environ)
    assert words[-1] == "train_mlx.py"
    assert words[words.index("--message-file") + 1] == str(job.prompt_file)
    assert "--no-auto-commits" in words


def test_our_own_run_from_the_driver_not_from_the_worktree(job: Job, environ: dict[str, str]) -> None:
    command = choice.get("chat").command(replace(job, base_url="http://127.0.0.1:1/v1"), environ)
    assert command.argv[:3] == [sys.executable, "-m", "agent.chat"]
    assert command.argv[3:] == ["train_mlx.py", "--base-url", "http://127.0.0.1:1/v1"]
    assert Path(command.env["PYTHONPATH"], "agent", "chat", "__main__.py").exists()
    assert command.env["PYTHONSAFEPATH"] == "1"
    assert argv("local", replace(job, base_url="http://x", model="m"), environ) == [
        "-m",
        "agent.local",
        "train_mlx.py",
        "--model",
        "m",
    ]
    assert argv("search", job, environ) == ["-m", "agent.search", "--train-file", "train_mlx.py"]


def test_a_program_that_is_not_there_is_an_error_with_its_mend(job: Job, tmp_path: Path) -> None:
    with pytest.raises(CoderError, match=r"agent claude: no program 'claude' on PATH; install it: npm install -g @anthropic"):
        choice.get("claude").command(job, {"PATH": str(tmp_path)})
    with pytest.raises(CoderError, match=r"unknown agent 'clod'; expected one of claude, codex, .*--agent-cmd"):
        choice.get("clod")


def test_a_template_is_split_but_no_shell_reads_it(job: Job, environ: dict[str, str], tmp_path: Path) -> None:
    install(tmp_path / "bin", "mine")
    command = choice.template("mine --file {train_file} --in '{worktree}' \"a; b\" {prompt_file}").command(job, environ)
    assert command.argv == [
        f"{tmp_path}/bin/mine",
        "--file",
        "train_mlx.py",
        "--in",
        str(job.worktree),
        "a; b",
        str(job.prompt_file),
    ]
    assert command.stdin == "PROMPT-TEXT"
    for bad in ("", "mine 'unclosed"):
        with pytest.raises(CoderError, match="--agent-cmd"):
            choice.template(bad)


# --- detection ---------------------------------------------------------------------------------------------------------


def test_detection_takes_the_first_that_is_installed_and_logged_in(tmp_path: Path) -> None:
    path = install(tmp_path / "bin", "claude", "codex", "qwen")
    environ = {"PATH": path, "HOME": str(tmp_path)}
    coder, reason = choice.detect(environ)
    assert coder.name == "search"
    assert "claude is installed but not logged in: run `claude`" in reason
    (tmp_path / ".codex").mkdir()
    (tmp_path / ".codex" / "auth.json").write_text("{}")
    coder, reason = choice.detect(environ)
    assert coder.name == "codex"
    assert reason.startswith("agent: codex, the first one installed and logged in (claude is installed but not")
    assert choice.detect(environ | {"ANTHROPIC_API_KEY": "k"})[0].name == "claude"
    assert choice.detect(environ | {"ANTHROPIC_API_KEY": ""})[0].name == "codex"


def test_a_login_file_without_a_login_does_not_count(tmp_path: Path) -> None:
    environ = {"PATH": install(tmp_path / "bin", "claude"), "HOME": str(tmp_path)}
    (tmp_path / ".claude.json").write_text('{"numStartups": 1}')
    assert choice.detect(environ)[0].name == "search"
    (tmp_path / ".claude.json").write_text('{"oauthAccount": {}}')
    assert choice.detect(environ)[0].name == "claude"


def test_a_night_without_a_choice_takes_the_first_that_is_logged_in_and_says_so(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    programs = tmp_path / "bin"
    install(programs, "claude", "codex")
    (programs / "codex").write_text(
        f"#!{sys.executable}\nimport json, pathlib\np = pathlib.Path('train_mlx.py')\n"
        "p.write_text(p.read_text().replace('GAIN = 0.0', 'GAIN = 0.05'))\n"
        f"for event in {CODEX!r}: print(json.dumps(event))\n"
    )
    (bed.home / ".codex").mkdir()
    (bed.home / ".codex" / "auth.json").write_text("{}")
    env = {"PATH": f"{programs}{os.pathsep}{os.defpath}", "HOME": str(bed.home), "PYTHONPATH": str(ROOT),
           "AUTORESEARCH_HOME": str(bed.home / "data")}  # fmt: skip
    options = ["--experiments", "1", "--tag", "night", "--baseline-seeds", "3", "--no-sandbox", "--disk-gb", "0",
               "--no-check-agent"]  # fmt: skip
    prices = ["--price-in", "1000", "--price-out", "10000"]
    done = subprocess.run([sys.executable, "-m", "agent.loop", *options, *prices], cwd=bed.repo, env=env, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    words = "agent: codex, the first one installed and logged in (claude is installed but not logged in: run `claude` and /login"
    assert words in done.stdout
    night = fold(read_events(bed.folder() / "journal.jsonl")[0])
    assert [(e.status, e.description, e.hypothesis) for e in night.done] == [("keep", "double LR", "larger steps")]
    assert (night.tokens, night.cost) == (980, pytest.approx(1.43))
    status = bed.loop("--status").stdout
    assert "980 tokens, $1.43" in status
    further = ["--resume", "--experiments", "9", "--max-cost", "1.4"]
    again = subprocess.run([sys.executable, "-m", "agent.loop", *further], cwd=bed.repo, env=env, capture_output=True, text=True,
                           timeout=120)  # fmt: skip
    assert "the agent has cost $1.43 of $1.40" in again.stdout


def test_nothing_installed_is_said(tmp_path: Path) -> None:
    assert "no coding agent is installed" in choice.detect({"PATH": str(tmp_path), "HOME": str(tmp_path)})[1]


# --- reading -----------------------------------------------------------------------------------------------------------


def lines(*events: object) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


CLAUDE = {"type": "result", "subtype": "success", "is_error": False, "api_error_status": None, "result": SAID,
          "total_cost_usd": 0.02, "usage": {"input_tokens": 30, "cache_creation_input_tokens": 500,
                                            "cache_read_input_tokens": 400, "output_tokens": 50}}  # fmt: skip
CODEX = [
    {"type": "thread.started", "thread_id": "t"},
    {"type": "item.completed", "item": {"type": "error", "message": "Model metadata not found, rate limit of nothing"}},
    {"type": "item.completed", "item": {"type": "agent_message", "text": "Let me look."}},
    {"type": "item.completed", "item": {"type": "agent_message", "text": SAID}},
    {"type": "turn.completed", "usage": {"input_tokens": 930, "cached_input_tokens": 400, "output_tokens": 50}},
]
GEMINI = {"session_id": "s", "response": SAID, "stats": {"models": {
    "a": {"tokens": {"prompt": 900, "candidates": 30, "total": 940, "cached": 0, "thoughts": 10}},
    "b": {"tokens": {"prompt": 30, "candidates": 10, "total": 40, "cached": 0, "thoughts": 0}}}}}  # fmt: skip
STEP = {"input": 430, "output": 20, "reasoning": 5, "cache": {"read": 30, "write": 5}}
OPENCODE = [
    {"type": "step_finish", "part": {"reason": "tool-calls", "tokens": STEP, "cost": 0.01}},
    {"type": "text", "part": {"type": "text", "text": SAID}},
    {"type": "step_finish", "part": {"reason": "stop", "tokens": STEP, "cost": 0.01}},
]
QWEN = [{"type": "system"}, {"type": "result", "is_error": False, "result": SAID,
                            "usage": {"input_tokens": 930, "output_tokens": 50, "cache_read_input_tokens": 4}}]  # fmt: skip
COPILOT = [
    {"type": "assistant.message", "data": {"content": SAID}},
    {"type": "assistant.message", "data": {"content": ""}},
    {"type": "result", "exitCode": 0},
]
AIDER = f"""Aider v0.86.2
Added train_mlx.py to the chat.

I'll look.
Tokens: 0.9k sent, 20 received. Cost: $0.01 message, $0.01 session.
{SAID}
Tokens: 30 sent, 1.2k received. Cost: $0.02 message, $0.03 session.
Applied edit to train_mlx.py
"""
GOOSE = {"messages": [{"role": "user", "content": [{"type": "text", "text": "PROMPT"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": SAID}]}], "metadata": {}}  # fmt: skip
OWN = "attempt 1: no_blocks\n" + json.dumps({"tokens_in": 930, "tokens_out": 50, "message": SAID, "failure": None})


@pytest.mark.parametrize(
    ("name", "stdout", "tokens", "cost"),
    [
        ("claude", "a warning\n" + lines(CLAUDE), (930, 50), 0.02),
        ("codex", "WARNING: something\n" + lines(*CODEX), (930, 50), None),
        ("gemini", json.dumps(GEMINI, indent=2), (930, 50), None),
        ("opencode", lines(*OPENCODE), (930, 50), 0.02),
        ("qwen", json.dumps(QWEN), (930, 50), None),
        ("copilot", lines(*COPILOT), (930, 50), None),
        ("aider", AIDER, (930, 1220), 0.03),
        ("cursor", lines({"type": "result", "is_error": False, "result": SAID}), (None, None), None),
        ("goose", json.dumps(GOOSE, indent=1), (None, None), None),
        ("search", SAID, (None, None), None),
        ("chat", OWN, (930, 50), None),
        ("local", OWN, (930, 50), None),
    ],
)
def test_what_each_prints_is_read(
    name: str, stdout: str, tokens: tuple[int | None, int | None], cost: float | None, job: Job
) -> None:
    usage = {"modelMetrics": {"m": {"usage": {"inputTokens": 930, "outputTokens": 50}}}}
    (job.scratch / "usage.json").write_text(json.dumps(usage))
    reply = choice.get(name).reply(stdout, "rate limit: only a word in a log", job)
    assert (reply.tokens_in, reply.tokens_out) == tokens
    assert reply.cost_usd == pytest.approx(cost)
    assert reply.message
    assert reply.message.endswith(SAID) or name == "aider"
    assert (reply.hypothesis, reply.description) == ("larger steps", "double LR")
    assert reply.failure is None or name == "search"  # all that is known of a plain program is its log


LIMIT = "Rate limit reached. Please try again in 20s."
AUTH = "Invalid API key: authentication failed."


def refused(name: str, status: int, message: str) -> tuple[str, str]:
    """What each prints when its model's server refuses: standard output, log."""
    failed = f"unexpected status {status}: {message}"
    session = {"type": "session.error", "data": {"message": message, "statusCode": status}}
    api = {"name": "APIError", "data": {"message": message, "statusCode": status, "responseHeaders": {"content-length": "429"}}}
    return {
        "claude": (lines({**CLAUDE, "is_error": True, "api_error_status": status, "result": f"API Error: {message}"}), ""),
        "codex": (lines(*CODEX[:2], {"type": "error", "message": f"Reconnecting... 1/5 ({failed})"},
                        {"type": "turn.failed", "error": {"message": failed}}), "WARNING: 1\n"),
        "gemini": ("", "Warning: dumb\n" + json.dumps({"error": {"message": message, "code": status}}, indent=2)),
        "opencode": (lines({"type": "error", "error": api}), ""),
        "aider": (f"Added train_mlx.py to the chat.\nlitellm.Error: {message}\nThe API provider says no.\n"
                  "Retrying in 0.5 seconds...\n", ""),
        "qwen": (json.dumps([*QWEN[:1], {"type": "result", "is_error": False, "result": f"[API Error: {status} {message}]"}]), ""),
        "copilot": (lines(session, {"type": "result", "exitCode": 1}), ""),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["claude", "codex", "gemini", "opencode", "aider", "qwen", "copilot"])
def test_refusals_are_named(name: str, job: Job) -> None:
    reply = choice.get(name).reply(*refused(name, 429, LIMIT), job)
    assert (reply.failure, reply.wait_seconds) == ("rate_limit", 20.0)
    assert reply.detail
    assert "Rate limit reached" in reply.detail
    reply = choice.get(name).reply(*refused(name, 401, AUTH), job)
    assert (reply.failure, reply.wait_seconds) == ("login", None)
    reply = choice.get(name).reply(*refused(name, 500, "The server had an error."), job)
    assert reply.failure == "agent_error"


@pytest.mark.parametrize("coder", ALL, ids=lambda coder: coder.name)
@pytest.mark.parametrize(
    "stdout", ["", "{", "[1, 2", "{}\n", "[]", '{"type": "result"}', '{"usage": 3, "part": 4}', "\x00\xff", "null"]
)
def test_no_output_makes_a_reader_raise(coder: Coder, stdout: str, job: Job) -> None:
    reply = coder.reply(stdout, "", job)
    assert reply.failure in (None, "agent_error")
    assert reply.failure or reply.message


@pytest.mark.parametrize("coder", ALL, ids=lambda coder: coder.name)
def test_one_that_was_ended_while_it_waited_is_read_from_its_log(coder: Coder, job: Job) -> None:
    reply = coder.reply("", f"noise\nERROR stream error: AI_APICallError: {LIMIT}\n", job)
    assert (reply.failure, reply.wait_seconds) == ("rate_limit", 20.0)
    assert reply.detail == f"ERROR stream error: AI_APICallError: {LIMIT}"


def test_copilot_ended_between_two_tries_has_said_why(job: Job) -> None:
    failed = {"type": "model.call_failure", "data": {"statusCode": 429, "errorMessage": LIMIT}}
    reply = choice.get("copilot").reply(lines(failed), "Error: Cannot invoke native session after disposal", job)
    assert (reply.failure, reply.wait_seconds) == ("rate_limit", 20.0)
    assert choice.get("copilot").reply(lines(failed, *COPILOT), "", job).failure is None


def test_gemini_stopping_a_loop_is_an_agent_error(job: Job) -> None:
    stopped = {"response": "more more more", "stats": {"models": {}}, "warnings": ["Loop detected, stopping execution"]}
    reply = choice.get("gemini").reply(json.dumps(stopped), "", job)
    assert (reply.failure, reply.detail) == ("agent_error", "Loop detected, stopping execution")


def test_what_the_model_wrote_is_no_evidence_of_a_failure(job: Job) -> None:
    said = "I looked at a 429, too many requests, and at an invalid API key."
    assert choice.template("mine").reply(said, "", job).failure is None
    assert choice.get("claude").reply(lines({**CLAUDE, "result": said}), "", job).failure is None


@pytest.mark.parametrize(("text", "failure"), [
    ("HTTP 429 Too Many Requests", "rate_limit"),
    ("Claude AI usage limit reached|1795370902", "rate_limit"),
    ("RESOURCE_EXHAUSTED: quota exceeded", "rate_limit"),
    ("529 overloaded_error", "rate_limit"),
    ("401 Unauthorized", "login"),
    ("Invalid API key · Please run /login", "login"),
    ("OAuth token has expired", "login"),
    ("You are not logged in", "login"),
    ('File "x.py", line 429, in main', "agent_error"),
    ('File "x.py", line 401, in main', "agent_error"),
    ("ENOENT: no such file", "agent_error"),
])  # fmt: skip
def test_failures_have_names(text: str, failure: str) -> None:
    named = name_failure(f"first line\n{text}\nlast line")
    assert named.failure == failure
    assert named.detail == (text if failure != "agent_error" else "last line")


def test_a_failure_is_named_by_its_last_line_with_words() -> None:
    assert name_failure('{\n  "error": "it broke"\n}\n\n').detail == '"error": "it broke"'
    assert name_failure("").detail == ""


NOON = calendar.timegm((2026, 11, 22, 12, 0, 0))  # UTC, a Sunday


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose local time is UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(("text", "seconds"), [
    ("Please try again in 20s.", 20),
    ("Please try again\nin 3 hours and 14 minutes.", 11640),
    ("try again in 1h 20m", 4800),
    ("quota will reset after 17h23m5s", 62585),
    ("retry in 1.5s", 1.5),
    ("try again in 250ms", 0.25),
    ('"retryDelay": "34s"', 34),
    ("retry-after: 30", 30),
    ("wait 5 minutes", 300),
    (f"usage limit reached|{int(NOON) + 90}", 90),
    ("limit reached ∙ resets 3pm", 3 * 3600),
    ("resets 11:30am (Europe/Berlin)", 22.5 * 3600),
    ("resets 2pm (Europe/Berlin)", 3600),
    ("Your limit resets at 21:00", 9 * 3600),
    ("limit reached, try again at 21:00:30 UTC", 9 * 3600 + 30),
    ("resets Nov 28, 9am", 5 * 86400 + 21 * 3600),
    ("You've hit your usage limit. Upgrade to Pro or try again at Nov 23rd, 2026 10:03 AM.", 22 * 3600 + 180),
    ("try again at Jan 2nd 9:00", None),  # more than a week
    ("available again in 5 hours", 5 * 3600),
    ("quota resets at 2026-11-22T12:30:00Z", 1800),
    ("quota resets at 2026-11-22 13:30:00+01:00", 1800),
    ("resets 7am PST", 3 * 3600),
    (f"usage limit reached|{NOON - 20}", 30),
    (f'"reset_at": {NOON + 60}000', 60),
    ("resets 11:58", 30),
    ("resets at 2026-11-22T11:59:50Z", 30),
    ("resets at 2026-11-21T11:59:50Z", None),
    ("wait until 1:99pm on Foo 77", None),
    ("try again at 99:99", None),
    ("try again at 12:00+99:99", None),
    ("resets at 0001-01-01 00:00", None),
    ("retried 5 times (total retry wait time: 16.60 seconds) Last error: 429. Please try again in 3s.", 3),
    ("Retrying in 4.0 seconds...", None),
    ("Rate limit reached", None),
    ("retry-after: 99999999", None),
    ("in 20 seconds it was done", None),
])  # fmt: skip
def test_waits_are_read(text: str, seconds: float | None, utc: None) -> None:
    assert wait_seconds(text, now=NOON) == seconds


# --- last lines and cost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("message", "hypothesis", "description"), [
    (SAID, "larger steps", "double LR"),
    ("**HYPOTHESIS:** bold\n- Description: `x = 2`", "bold", "x = 2"),
    ("HYPOTHESIS: old\nHYPOTHESIS: new", "new", None),
    ("DESCRIPTION: set `LR` to `0.2`\r\n", None, "set `LR` to `0.2`"),
    ("my hypothesis: none of these", None, None),
    ("HYPOTHESIS:\n\nDESCRIPTION: d", None, "d"),
    ("", None, None),
])  # fmt: skip
def test_the_last_message_is_taken_apart(message: str, hypothesis: str | None, description: str | None) -> None:
    reply = with_last_lines(Reply(message=message))
    assert (reply.hypothesis, reply.description) == (hypothesis, description)


def test_cost_is_reported_or_reckoned_or_unknown() -> None:
    tokens = Reply(tokens_in=2_000_000, tokens_out=100_000)
    assert cost_usd(tokens, 3.0, 15.0) == pytest.approx(7.5)
    assert cost_usd(replace(tokens, cost_usd=1.0), 3.0, 15.0) == 1.0
    assert cost_usd(tokens, 3.0, None) is None
    assert cost_usd(Reply(), 3.0, 15.0) is None


@pytest.mark.parametrize("name", ["codex", "gemini", "opencode", "aider", "qwen", "copilot"])
def test_a_refused_call_costs_nothing_unless_a_model_was_at_work(name: str, job: Job) -> None:
    coder = choice.get(name)
    for said in (refused(name, 429, LIMIT), refused(name, 401, AUTH)):
        assert usage_of(coder, coder.reply(*said, job), 5.0, 3.0, 15.0)["cost"] == 0.0
    assert usage_of(coder, coder.reply(*refused(name, 500, "The server had an error."), job), 5.0, 3.0, 15.0)["cost"] is None


def test_what_a_refused_call_has_used_before_is_not_free(job: Job) -> None:
    codex, opencode = choice.get("codex"), choice.get("opencode")
    command = {"type": "item.completed", "item": {"type": "command_execution", "command": "cat train_mlx.py"}}
    out, log = refused("codex", 429, LIMIT)
    assert usage_of(codex, codex.reply(lines(command) + out, log, job), 5.0, 3.0, 15.0)["cost"] is None
    out, log = refused("opencode", 429, LIMIT)
    assert usage_of(opencode, opencode.reply(lines(OPENCODE[0]) + out, log, job), 5.0, None, None)["cost"] == 0.01
    gemini = choice.get("gemini")
    assert usage_of(gemini, gemini.reply(*refused("gemini", 429, LIMIT), job), 300.0, None, None)["cost"] is None, "it took long"
    own = choice.template("mine")
    assert usage_of(own, own.reply("I read the file.\n", LIMIT, job), 5.0, None, None)["cost"] is None


# --- evidence ----------------------------------------------------------------------------------------------------------


def test_words_of_a_log_are_no_evidence_against_exit_code_0(tmp_path: Path) -> None:
    """An agent that says who is logged in and what is left of a quota, and changes nothing, has changed nothing."""
    bed = Bed(tmp_path, "better")
    agent = tmp_path / "agent.sh"
    agent.write_text("#!/bin/sh\necho 'Authenticated as somebody; rate limit: 99 left; 401 files read' >&2\n")
    agent.chmod(0o755)
    done = bed.loop("--agent-cmd", str(agent), "--tag", "night", "--baseline-seeds", "3", "--disk-gb", "0", "--no-picture",
                    "--no-sandbox", "--experiments", "1")
    assert [e.status for e in fold(read_events(bed.folder() / "journal.jsonl")[0]).done] == ["noop"], done.stdout


@pytest.mark.parametrize(("text", "failure"), [
    ("Authenticated as somebody", "agent_error"), ("quota: 83 % left", "agent_error"), ("Error: quota exceeded", "rate_limit"),
    ("You exceeded your current quota", "rate_limit"), ("authentication failed", "login"), ("not authenticated", "login"),
    ("please authenticate", "login"), ("the authenticated session goes on", "agent_error"),
])  # fmt: skip
def test_words_that_only_look_like_a_limit_or_a_login_are_none(text: str, failure: str) -> None:
    assert name_failure(text).failure == failure


def test_a_command_is_found_from_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.sh").write_text("#!/bin/sh\n")
    (tmp_path / "agent.sh").chmod(0o755)
    assert choice.template("./agent.sh --fast").find({"PATH": ""}) == str(tmp_path / "agent.sh")
    with pytest.raises(CoderError, match=r"no program .*gone\.sh"):
        choice.choose({"agent_cmd": "./gone.sh"})


def test_an_edit_with_a_final_message_counts_though_the_process_never_ends(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    program = tmp_path / "bin" / "opencode"
    program.parent.mkdir()
    program.write_text(f"""#!{sys.executable}
import json, time
from pathlib import Path
file = Path("train_mlx.py")
file.write_text(file.read_text().replace("GAIN = 0.0", "GAIN = 0.05"))
print(json.dumps({{"type": "text", "part": {{"text": "DESCRIPTION: more gain"}}}}))
part = {{"reason": "stop", "cost": 0.1, "tokens": {{"input": 1, "output": 1}}}}
print(json.dumps({{"type": "step_finish", "part": part}}), flush=True)
time.sleep(600)
""")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = bed.loop("--agent", "opencode", "--tag", "night", "--baseline-seeds", "3", "--disk-gb", "0", "--no-picture",
                    "--no-sandbox", "--experiments", "1", "--max-agent-minutes", "0.05", "--no-check-agent",
                    PATH=path, OPENCODE_API_KEY="x")
    (experiment,) = fold(read_events(bed.folder() / "journal.jsonl")[0]).done
    assert (experiment.status, experiment.description, experiment.cost) == ("keep", "more gain", 0.1), done.stdout


RESULT = '{"type":"result","is_error":false,"result":"%s","usage":{"input_tokens":5,"output_tokens":%d},"total_cost_usd":0.1}'
NO_MODEL = json.dumps({"type": "error", "error": {"name": "UnknownError", "data": {"message": "Unexpected server error."}}})
EMPTY_TURN = '{"type":"turn.started"}\n{"type":"turn.completed","usage":{"input_tokens":0,"output_tokens":0}}\n'


@pytest.mark.parametrize(("name", "out", "log", "failure", "words"), [
    ("claude", 'Warning: {"a"}\n' + RESULT % ("done", 6), "", None, "done"),
    ("claude", '[{"type":"system"},' + RESULT % ("done", 6) + "]", "", None, "done"),
    ("claude", '{"type":"system"}\n' + RESULT % ("done", 6), "", None, "done"),
    ("claude", RESULT % ("You have hit your limit - resets 9pm", 0), "", "rate_limit", "hit your limit"),
    ("claude", RESULT % ("I read about rate limits and changed nothing", 9), "", None, "rate limits"),
    ("codex", EMPTY_TURN, "", "agent_error", "an empty turn"),
    ("opencode", NO_MODEL, "ERROR service=server error=ModelNotFound: Model not found: x\n", "agent_error", "Model not found: x"),
    ("qwen", "[" * 100_000, "", "agent_error", "[["),
    ("claude", "[" * 100_000, "", "agent_error", "[["),
])  # fmt: skip
def test_outputs_that_are_not_as_documented(job: Job, name: str, out: str, log: str, failure: str | None, words: str) -> None:
    reply = choice.get(name).reply(out, log, job)
    assert reply.failure == failure
    assert words in (reply.detail or reply.message or "")


HUGE = "9" * 400
DEEP = '{"a":' * 100_000
ODD = [
    ("claude", '{"type":"result","result":["x"],"total_cost_usd":"0.1","usage":{"input_tokens":1,"output_tokens":"many"}}'),
    ("claude", f'{{"type":"result","result":"x","total_cost_usd":-1,"usage":{{"input_tokens":{HUGE},"output_tokens":true}}}}'),
    ("claude", '{"type":"result","result":"x","total_cost_usd":Infinity,"usage":{"input_tokens":1e999,"output_tokens":NaN}}'),
    ("codex", '{"type":"turn.completed","usage":{"input_tokens":1e999,"output_tokens":1}}'),
    ("chat", '{"message":{"a":1},"tokens_in":[],"tokens_out":-5,"cost_usd":NaN,"failure":"made up","wait_seconds":"soon"}'),
    ("chat", f'{{"message":"x","tokens_in":{HUGE},"structured":"yes","detail":7}}'),
    *((name, DEEP) for name in ("claude", "codex", "gemini", "opencode", "qwen", "copilot", "goose", "chat")),
    ("aider", "Tokens: 1 sent\n" * 250_000),
    ("claude", '{ "\n' * 1_000_000),
    ("claude", '{ "}\n' * 800_000),
    ("gemini", "x" * 4_000_000),
]


@pytest.mark.parametrize(("name", "out"), ODD, ids=range(len(ODD)))
def test_whatever_an_agent_prints_can_be_added_up_and_journalled_within_a_second(job: Job, name: str, out: str) -> None:
    began = time.monotonic()
    reply = choice.get(name).reply(out, "", job)
    used = usage_of(choice.get(name), reply, 5.0, 1.0, 1.0)
    assert time.monotonic() - began < 5  # of a busy machine
    assert json.loads(json.dumps(used, allow_nan=False)) == used
    assert all(isinstance(text, (str, type(None))) for text in (reply.message, reply.detail))
    assert all(isinstance(count, (int, type(None))) and (count or 0) < 1e13 for count in (reply.tokens_in, reply.tokens_out))
    assert used["cost"] is None or used["cost"] >= 0
    assert reply.failure in (None, "agent_error")


def test_a_log_full_of_refusals_is_read_within_a_second(job: Job) -> None:
    began = time.monotonic()
    reply = choice.get("claude").reply("", "429 rate limit, try again at 21:00\n" * 100_000, job)
    assert reply.failure == "rate_limit"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("out", "message", "cost", "tokens"), [
    ('DESCRIPTION: d\n{"cost_usd": 0.5, "tokens_in": 10, "tokens_out": 2}', "DESCRIPTION: d", 0.5, (10, 2)),
    ('{"cost_usd": 0.5}\n', None, 0.5, (None, None)),
    ('DESCRIPTION: d\n{"loss": 0.5}', 'DESCRIPTION: d\n{"loss": 0.5}', None, (None, None)),
    ('DESCRIPTION: d\n{"cost_usd": "free"}', "DESCRIPTION: d", None, (None, None)),
    ("DESCRIPTION: d", "DESCRIPTION: d", None, (None, None)),
])  # fmt: skip
def test_an_own_command_may_tell_its_cost(
    job: Job, out: str, message: str | None, cost: float | None, tokens: tuple[int | None, int | None]
) -> None:
    reply = choice.template("mine").reply(out, "", job)
    assert (reply.message, reply.cost_usd, (reply.tokens_in, reply.tokens_out)) == (message, cost, tokens)
