"""`python -m agent.loop`: a night of experiments, from one command to results.tsv, a picture and a line that says what was won."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option, option_group

from agent.coders.choice import choose
from agent.errors import NightError, Stopped, UsageError
from agent.files import remove, size_in_words
from agent.git.worktree import Repository, Worktree
from agent.journal.folder import choose_tag, latest, neighbours, require_tag, runs_folder
from agent.journal.journal import Journal, holder, read_events
from agent.journal.state import Night, fold
from agent.judgement.decision import noise
from agent.night import setup
from agent.night.limits import Stopper, next_time, request_stop
from agent.night.power import battery_warning, stay_awake
from agent.night.session import run_session
from agent.views import results, terminal
from agent.views.glance import at_a_glance
from agent.views.terminal import TERMINAL_LOG, Console, complain

INTERRUPTED = 130  # exit code: stopped at once by the user, resumable


_EXIT_CODES = """\b
Exit codes:
    0  the night ended as planned
    1  it ended early; the last lines say why
    2  a wrong option or folder
    8  another driver works on this night
    9  the journal is damaged
   10  the data or the harness failed
   11  the unchanged train file does not train
   12  the agent does not answer, or --max-cost can't be held with it
  130  stopped at once

Every night that has begun can go on with --resume.
"""


@cloup.command(epilog=_EXIT_CODES)
@option_group(
    "Everyday",
    option("--agent", help="Coding agent by name, or `search`, which needs no language model. Default: the first one logged in."),
    option("--model", help="Model that the agent uses."),
    option("--dataset", help="Dataset, as in prepare_mlx.py --dataset. Default: the one you prepared last, else this machine's."),
    option("--experiments", type=click.IntRange(0), help="Stop after this many experiments."),
    option("--hours", type=click.FloatRange(0),
           help="Start no experiment after this many hours. Default: 8 without --experiments."),
    option("--until", metavar="HH:MM",
           help="Start no experiment after this time of day, such as 07:00. A resume ends at the same time, or on the next day."),
    option("--max-cost", type=click.FloatRange(0), help="Stop once the agent has cost this much, in US dollars."),
    option("--tag", help="Name of the night: branch autoresearch/TAG, folder runs/TAG. Default: today's date."),
)
@option_group(
    "A night that exists (--tag says which; default: the latest)",
    option("--status", is_flag=True, help="Show how it stands."),
    option("--watch", is_flag=True, help="With --status: follow it until it ends."),
    option("--json", "as_json", is_flag=True, help="With --status: as JSON, for programs."),
    option("--stop", "stop_", is_flag=True, help="Ask it to stop after its experiment; a second time: now."),
    option("--resume", is_flag=True, help="Continue it, as it was begun but for the options given now."),
    option("--forget", metavar="TAG", help="Remove a night whole: folder, worktree, branch and refs. Asks first."),
    option("--yes", is_flag=True, help="With --forget: do not ask."),
)
@option_group(
    "The agent",
    option("--agent-cmd", help="Any command as the agent: it reads the prompt on standard input and edits the file."),
    option("--agent-args", help="Extra arguments for the agent's command line, for example '--effort high'."),
    option("--agent-env", multiple=True, help="Another environment variable that the agent may see. Repeatable."),
    option("--base-url", help="URL of the endpoint for --agent chat."),
    option("--check-agent/--no-check-agent", default=None,
           help="Ask the agent for one word before anything is trained. Default: on."),
    option("--max-agent-minutes", type=click.FloatRange(0), help="Time limit for the agent in one experiment. Default: 15."),
    option("--price-in", type=click.FloatRange(0),
           help="US dollars per million input tokens, for agents that report only tokens."),
    option("--price-out", type=click.FloatRange(0),
           help="US dollars per million output tokens, for agents that report only tokens."),
)
@option_group(
    "The training",
    option("--budget", help="Budget of one training: 300s, 200steps or 5Mtokens. Default: the preset's."),
    option("--preset", help="Machine size, as in prepare_mlx.py --preset. Default: this machine's."),
    option("--train-file", default="train_mlx.py", show_default=True, help="File to improve."),
    option("--seed", type=click.IntRange(0), default=1, show_default=True,
           help="Seed of the first training of each file in a new night; its second uses the next seed, and so on."),
    option("--baseline-seeds", type=click.IntRange(3), help="Trainings of the unchanged file, to measure the noise."),
    option("--startup", type=click.FloatRange(1), help="Seconds that a training may take on top of its budget. Default: 120."),
    option("--memory-gb", type=click.FloatRange(0.1), help="Memory limit of a training, in GiB."),
    option("--sandbox/--no-sandbox", default=None,
           help="Train without network and with write access to the run folder only. Default: on."),
)
@option_group(
    "When to stop or pause",
    option("--target", type=float, help="Stop once val_bpb is this low."),
    option("--patience", type=click.IntRange(1), help="Stop after this many experiments in a row without a keep."),
    option("--disk-gb", type=click.FloatRange(0), help="Stop when less disk space than this is free, in GB. Default: 2."),
    option("--breaker", type=click.IntRange(1),
           help="Failures of one kind in a row that pause the night; twice as many end it. Default: 5."),
    option("--backoff", type=click.FloatRange(0), help="Seconds of the first such pause. Default: 30."),
)
@option_group(
    "Other",
    option("--picture/--no-picture", default=True, help="Write progress.png, report.html and report.md at the end. Default: on."),
    option("--plain", is_flag=True, help="Print plain lines, also on a terminal."),
    option("--dashboard", is_flag=False, flag_value="127.0.0.1", metavar="[ADDRESS]",
           help="Serve a page that shows the night while it runs. With 0.0.0.0, a phone on your network can open it with a token."),
    cloup.version_option(package_name="autoresearch-apple-silicon", prog_name="autoresearch"),
    cloup.help_option("-h", "--help"),
)
def main(
    tag: str | None, resume: bool, status: bool, watch: bool, as_json: bool, plain: bool, stop_: bool, forget: str | None,
    yes: bool, **options: Any,
) -> None:  # fmt: skip
    """Let a coding agent improve train_mlx.py overnight. Each change that lowers val_bpb is kept on a branch of its own."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    try:
        if (watch or as_json) and (not status or watch == as_json):
            raise UsageError("--watch and --json need --status, and cannot be combined")
        if forget is not None:
            code = _forget(forget, yes)
        elif status:
            code = _status(tag, watch, as_json, plain)
        else:
            code = _stop(tag) if stop_ else _night(tag, resume, plain, _with_end(options))
    except NightError as error:
        complain(str(error))
        code = error.exit_code
    except OSError as error:  # a full disk, a folder without rights: nothing is lost, the journal knows how far it came
        if status and isinstance(error, BrokenPipeError):  # `--status | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in the buffer
            code = 0
        else:
            complain(f"{error}; mend it, then run the same command again")
            code = NightError.exit_code
    sys.exit(code)


def _with_end(options: dict[str, Any]) -> dict[str, Any]:
    """The options with --until as a Unix time: what comes before the night, such as a download, does not move its end.

    UsageError if --hours was given, too."""
    until = options["until"]
    if until is not None and options["hours"] is not None:
        raise UsageError("give --hours or --until, not both")
    return {**options, "until": None if until is None else next_time(until)}


def _status(tag: str | None, watch: bool, as_json: bool, plain: bool) -> int:
    folder = _folder(tag)
    look = Look(folder)
    if as_json:
        click.echo(json.dumps(look()[0]))
    elif watch:
        terminal.watch(look, plain)
    else:
        terminal.print_lines(look()[1])
    return 0


def _stop(tag: str | None) -> int:
    folder = _folder(tag)
    pid = holder(folder)
    if pid is None:
        raise UsageError(f"no driver works on the night {folder.name}")
    click.echo(f"asked process {pid} to stop: {request_stop(folder)}")
    return 0


def _folder(tag: str | None) -> Path:
    """The folder of a night that has begun. UsageError if there is none."""
    runs = runs_folder(Repository(Path.cwd()).root)
    folder = runs / (tag or latest(runs))
    if not read_events(folder / "journal.jsonl")[0]:
        raise UsageError(f"there is no night in {folder}")
    return folder


class Look:
    """One look after another at a night: its numbers, and the lines of --status. The journal is read again when it has grown."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._size, self._night, self._torn = folder, -1, Night(), b""

    def __call__(self) -> tuple[dict[str, Any], list[str]]:
        journal = self.folder / "journal.jsonl"
        if (size := journal.stat().st_size) != self._size:
            events, self._torn = read_events(journal)
            self._night, self._size = fold(events), size
        pid, sigma = holder(self.folder), noise(self._night).sigma if self._night.experiments else 0.0
        lines = results.status(self._night, pid, sigma, self.folder)
        if self._torn:
            lines.append(f"the last line of the journal is torn ({len(self._torn)} bytes); the next driver sets it aside")
        return at_a_glance(self._night, pid is not None, sigma, self.folder), lines


def _forget(tag: str, sure: bool) -> int:
    """Remove a night after showing what it is. UsageError while a driver works on it, or where nothing is left of it."""
    require_tag(tag)
    repository = Repository(Path.cwd())
    folder = runs_folder(repository.root) / tag
    worktree = Worktree(repository, tag, folder / "worktree")
    commits = worktree.refs()
    if not (folder.is_dir() or commits):
        raise UsageError(f"--forget {tag}: there is no folder runs/{tag}, and no branch or ref of such a night")
    if folder.is_dir() and (pid := holder(folder)) is not None:
        raise UsageError(f"--forget {tag}: process {pid} works on it; first: python -m agent.loop --stop --tag {tag}")
    events = read_events(folder / "journal.jsonl")[0]
    if events:
        click.echo(results.last_line(fold(events)))
    merged = "" if not commits or worktree.merged() else f"; what was kept on {worktree.branch} is merged nowhere"
    click.echo(f"runs/{tag}: {size_in_words(folder)}; {len(commits)} refs of git{merged}")
    if not sure and not click.confirm("remove all of it?"):
        return 1
    worktree.forget()
    remove(folder)
    click.echo(f"the night {tag} is forgotten")
    return 0


def _night(tag: str | None, resume: bool, plain: bool, options: dict[str, Any]) -> int:
    repository = Repository(Path.cwd())
    runs = runs_folder(repository.root)
    tag = choose_tag(runs, tag, resume, repository.leftover)
    folder = runs / tag
    worktree = Worktree(repository, tag, folder / "worktree")
    new = not read_events(folder / "journal.jsonl")[0]
    warnings = setup.refuse_unfit(repository, worktree, options["train_file"], options["budget"]) if new else []
    if new:
        choose(options)  # before anything is made: a typing error leaves nothing behind
    with Journal(folder) as journal, Console(plain, folder / TERMINAL_LOG) as console:
        (folder / "logs").mkdir(exist_ok=True)
        stopper = Stopper(folder, console.say, console.leave)
        stopper.install()
        busy = [f"the night {other} is running too: both share the machine's time" for other in neighbours(folder)]
        for warning in (*warnings, *battery_warning(), *busy):
            console.say(f"note: {warning}")
        try:
            with stay_awake(), contextlib.ExitStack() as beside:  # through the download of the data, too
                return run_session(journal, repository, worktree, stopper, console, options, beside)
        except Stopped:
            return _interrupted(journal, console, tag)


def _interrupted(journal: Journal, console: Console, tag: str) -> int:
    console.say(f"stopped; go on with: python -m agent.loop --resume --tag {tag}")
    if journal.events:
        console.say(results.last_line(fold(journal.events)))
    return INTERRUPTED


if __name__ == "__main__":
    main()
