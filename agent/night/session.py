"""One session of a driver: from the data being there to the line that says what was won."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.coders.choice import choose
from agent.errors import NightError, Stopped
from agent.files import read_plain, remove, size_in_words
from agent.git.command import DAMAGE
from agent.git.worktree import Repository, Worktree
from agent.journal.folder import clear_leftovers, finished_run, sweep
from agent.journal.journal import Journal
from agent.journal.state import fold
from agent.night import setup
from agent.night.engine import Engine, keep_traceback
from agent.night.limits import Stopper
from agent.process import child
from agent.process.environment import clean_env
from agent.proposal.ask import Desk
from agent.proposal.check import before_the_night
from agent.text import one_line, safe_tail, safe_text
from agent.trial import sandbox
from agent.trial.lab import Lab, TrainText, lay_harness, run_child
from agent.trial.rights import folders, hidden_places
from agent.views import results
from agent.views.terminal import Console

REPORT, SAMPLE = (Path(__file__).resolve().parents[2] / "scripts" / name for name in ("report.py", "sample.py"))
PROMPTS, STORY_TOKENS = ("", "Once upon a time"), 150  # of what baseline and best write for the report
STORY_SECONDS, STORY_BYTES, STORY_CHARACTERS = 120.0, 1 << 20, 4000


def run_session(
    journal: Journal, repository: Repository, worktree: Worktree, stopper: Stopper, console: Console, options: dict[str, Any],
    beside: contextlib.ExitStack,
) -> int:  # fmt: skip
    """Run one driver session and return its exit code. beside: holds programs that run until the session ends."""
    folder, root = journal.folder, repository.root
    night = fold(journal.events)
    for pid in sweep(folder):  # before anything is started, whose record would take the place of a leftover's
        console.say(f"ended process {pid}, left by a driver that was killed")
    if journal.torn:
        console.say(f"note: the journal's last line was torn; it is set aside in {journal.torn}")
    if not night.base:
        clear_leftovers(folder)
        harness = lay_harness(repository, repository.head, folder)
        console.stage("preparing data")
        entry = setup.dataset(
            harness, root, options["dataset"], options["preset"], folder / "logs" / "prepare.log", stopper.now, console.show
        )
        entry["budget"] = options["budget"] or entry["budget"]
        night = setup.begin(journal, repository, worktree.tag, options["train_file"], entry, options["seed"])
    setup.refuse_older(journal, repository, night)
    setup.require_data(night.dataset)
    setup.keep_choices(night)
    setup.leave_out_of_backups(folder)
    harness = lay_harness(repository, night.base, folder)
    settings = setup.chosen(night, options)
    coder, about = choose(settings.to_json())
    boxed = sandbox.described() if settings.sandbox else "none: off, as asked"
    journal.append("session", settings=settings.to_json(), pid=os.getpid(), agent=coder.name, sandbox=boxed)
    train_dir, held_dir = folders(night.dataset)
    lab = Lab(
        folder=folder, worktree=worktree.path, train_file=night.train_file, harness=harness, repository=repository, base=night.base,
        train_dir=train_dir, held_dir=held_dir, text=TrainText(train_dir), budget=night.dataset["budget"],
        vocab_size=int(night.dataset["vocab_size"]),
        hidden=hidden_places(night.dataset, root, repository.common, worktree.path), startup_seconds=settings.startup,
        memory_bytes=int(settings.memory_gb * 2**30) if settings.memory_gb else None, sandboxed=settings.sandbox, stop=stopper.now,
        show=console.metrics, spare_bytes=int(settings.disk_gb * 1e9 / 2),
    )  # fmt: skip
    desk = Desk(folder, worktree, night.train_file, coder, settings, stopper.now)
    engine = Engine(journal, worktree, lab, desk, settings, stopper, console, root / "program.md")
    for line in setup.in_plain_words(night, settings, about, shutil.disk_usage(folder).free / 1e9):
        console.say(line)
    console.say(f"sandbox of trainings: {boxed if boxed.startswith('none') else boxed.partition(':')[0]}")
    try:
        source = night.train_file, repository.file_at(night.base, night.train_file)
        before_the_night(coder, settings, folder, source, engine.night, engine.record, console.say, stopper.now)
        engine.recover()
        if options["dashboard"]:
            beside.enter_context(_page(options["dashboard"], folder, root, console.say))
        name, words = engine.run()
        if name != "stopped" or not stopper.now():
            _held_out(engine)
            if options["picture"]:
                _write_stories(engine)
        engine.record("night_end", reason=name, text=words)
    except Exception as error:
        raise _ended(engine, error) from error
    engine.hooks.night_end(engine.night, words)
    place, drawn = f"runs/{folder.name}", ""
    with contextlib.suppress(OSError):  # the night is over and written down: what cannot be tidied is no failure of it
        (folder / "stop").unlink(missing_ok=True)
        worktree.close()
    if options["picture"]:
        console.stage("writing the report")
        drawn = f", report: {place}/report.html" if _report(folder, root) else f", no report: {place}/logs/report.log"
    console.say(f"the night ends: {words}")
    console.say(f"results: {place}/results.tsv{drawn}; {size_in_words(folder)} in {place}")
    console.say(results.last_line(engine.night))
    fine = name not in ("failures", "login", "missing", "rate_limit")
    return 0 if fine and not results.refused(engine.night) and not engine.night.unproposed() else 1


def _ended(engine: Engine, error: Exception) -> Exception:
    """Journal whatever ends a night, if at all possible, and tell the user's hook. Returns what the command line has to say."""
    words = one_line(str(error), 1000) or type(error).__name__
    if isinstance(error, Stopped):
        words = "stopped at once by request"
    elif not isinstance(error, NightError):
        log = keep_traceback(engine.lab.folder, error)
        words = f"{type(error).__name__}: {words}; the details are in {log}; mend it, then: python -m agent.loop --resume"
    try:
        engine.record("night_end", reason="stopped" if isinstance(error, Stopped) else "error", text=words)
    except Exception as unwritten:
        words += f"; this end could not be journalled: {one_line(str(unwritten), 300) or type(unwritten).__name__}"
        engine.night.ended = "error"  # for the hook; the journal says the same at the next start: nobody works on it
    engine.hooks.night_end(engine.night, words)
    return error if isinstance(error, (Stopped, NightError)) else NightError(words)


def _held_out(engine: Engine) -> None:
    """Score on the held-out test text; a night that cannot is complete without."""
    try:
        engine.held_out()
    except DAMAGE as damage:
        engine.note(f"the held-out test could not be scored: {one_line(str(damage), 300) or type(damage).__name__}")


def _write_stories(engine: Engine) -> None:
    """Have baseline and best write from the same prompts, in the sandbox of a training; a model that cannot is left out."""
    lab, night = engine.lab, engine.night
    for experiment in (night.experiments[n] for n in sorted({0, night.leader.n} - set(night.stories))):
        found = finished_run(experiment, lab.folder)
        if found is None or not night.leader.n:
            continue
        run_dir = found[1]
        engine.console.stage(f"{experiment.name} writes a text for the report")
        out, log = (lab.folder / "logs" / f"{run_dir.name}.sample.{kind}" for kind in ("out", "log"))
        words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        argv = [sys.executable, "-B", str(SAMPLE), str(run_dir), "--json", "--tokens", str(STORY_TOKENS), *words]
        ours = [SAMPLE.parents[1] / name for name in ("scripts", "agent", "harness")]
        try:
            scratch = lab.scratch(run_dir)
            confined = lab.confined(argv, [scratch], run_dir, lab.train_dir, *ours)
            env = {"AUTORESEARCH_DATA": str(lab.train_dir)}
            outcome = run_child(lab, confined, log, run_dir, STORY_SECONDS, env, stdout_to=out)
            texts = json.loads(read_plain(out, STORY_BYTES)) if outcome.ok else []
            told = [{key: safe_text(str(text[key]).encode("utf-8", "replace"))[:STORY_CHARACTERS] for key in ("prompt", "text")}
                    for text in texts]  # fmt: skip
        except (*DAMAGE, ValueError, KeyError, TypeError):  # its own code runs: it may print anything
            continue
        finally:
            with contextlib.suppress(OSError):
                remove(lab.scratch(run_dir))
        if told:
            engine.record("stories", n=experiment.n, texts=told)


def _page(host: str, folder: Path, cwd: Path, say: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
    """The night in the browser while the block runs. Its address is said once; a page that cannot start is a note."""
    log, said = folder / "logs" / "dashboard.log", False

    def watch() -> None:
        nonlocal said
        if not said and "http://" in (text := safe_tail(log, 8000)):  # its last line, below the QR code
            said = True
            for line in text.splitlines():
                say(line)

    argv = [sys.executable, "-B", "-m", "agent.dashboard", "--tag", folder.name, "--host", host]
    env = clean_env({"PYTHONPATH": str(REPORT.parents[1])})
    return child.beside(
        argv, cwd=cwd, env=env, log=log, watch=watch, pidfile=folder / "dashboard.pid",
        ended=lambda outcome: say(f"note: the page has ended, the night goes on: {one_line(outcome.tail(1000), 300)}"),
    )  # fmt: skip


def _report(folder: Path, cwd: Path) -> bool:
    """Write progress.png, report.html and report.md; a report that fails is a line in its log, never a lost night."""
    try:
        return child.run(
            [sys.executable, "-B", str(REPORT), str(folder)], cwd=cwd, env=clean_env(), log=folder / "logs" / "report.log",
            bounds=child.Bounds(wall_seconds=120), pidfile=folder / "report.pid",
        ).ok  # fmt: skip
    except OSError:
        return False
