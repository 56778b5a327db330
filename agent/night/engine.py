"""The steps of a night: propose, train, decide, keep or put aside. `Engine.run` has their order.

Each step reads the journal, does one thing and writes it down, and each may be repeated after a crash. The branch moves only after
a verdict is in the journal. So after a driver was killed, the next one reads the journal, makes git agree with it, and goes on.

Some errors come from outside: a full disk, a damaged repository, a removed folder, too little memory (`DAMAGE`). Each costs one
experiment: `mend` repairs the worktree and gives the verdict. If the repair fails, the night ends and says why. Any other
exception costs its experiment, too: at a resume the same candidate would raise it again.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.errors import BaselineError, NightError, Stopped
from agent.files import read_part, read_plain, write_anew
from agent.git import guard
from agent.git.command import DAMAGE
from agent.git.guard import TRAIN_FILE_BYTES
from agent.git.worktree import Worktree
from agent.journal.folder import finished_run, prune
from agent.journal.journal import Journal
from agent.journal.settings import Settings
from agent.journal.state import REPEATED, Experiment, apply, fold
from agent.judgement import novelty, validity
from agent.judgement.decision import Rule, judge, noise
from agent.judgement.novelty import Verdict
from agent.night import limits
from agent.night.hooks import Hooks
from agent.night.limits import Stopper
from agent.proposal import briefing
from agent.proposal.ask import Desk, Proposal, ask
from agent.proposal.digest import family
from agent.text import clean, failure_record, one_line
from agent.trial.lab import Lab, lay_harness
from agent.trial.order import TrialResult
from agent.trial.trial import run_trial, score_run, screen
from agent.views import results
from agent.views.glance import at_a_glance, score
from agent.views.terminal import TERMINAL_LOG, Console

MOST_REMOVALS = 2  # of a training's folders, or stops by the GPU's watchdog, after which the training is repeated
TRACEBACK_BYTES = 1 << 20  # that driver.log keeps of earlier ones
MOST_KILLS = 3  # of the driver in one training: a candidate can kill what started it, and would at each --resume


@dataclass
class Engine:
    """One driver session on one night."""

    journal: Journal
    worktree: Worktree
    lab: Lab
    desk: Desk
    settings: Settings
    stopper: Stopper
    console: Console
    program: Path  # read again for every experiment, so that the human can steer

    def __post_init__(self) -> None:
        self.night = fold(self.journal.events)
        self.rule = Rule(baseline_trials=self.settings.baseline_seeds, experiments=self.settings.experiments or Rule.experiments)
        self.began = time.monotonic()
        self.hooks = Hooks(self.program.parent, self.lab.folder, self.record, self.console.say, self.stopper.now)
        self.console.follow(lambda: at_a_glance(self.night, True, noise(self.night).sigma, self.lab.folder))
        self._python: dict[str, int] = {}  # Python's packages, as they were when last looked at
        self._noted = {""}  # what was said once in this session and need not be said after each experiment

    def record(self, event: str, **fields: Any) -> None:
        """Journal an event, without secrets and numbers that no journal can hold, and move the state on by it."""
        if self.journal.follow():
            self.restored()
        apply(self.night, self.journal.append(event, **_bounded(clean(fields))))

    def restored(self) -> None:
        """Say that the night's folder had gone, and make the folder of logs again."""
        (self.lab.folder / "logs").mkdir(exist_ok=True)
        text = "the night's folder was removed, moved or replaced while the driver worked; its journal is there again"
        self.console.say(f"note: {text}")
        apply(self.night, self.journal.append("note", text=text))

    def recover(self) -> None:
        """Make git and views agree with the journal."""
        self.worktree.open(self._best_commit())
        self.follow()

    def run(self) -> tuple[str, str]:
        """Propose, train, decide, keep or put aside, until a limit or a request ends the night: the name and words of that.

        A step that the journal already holds is passed over: a night whose driver was killed goes on where it was.
        """
        if self.night.best is None:
            try:
                self.baseline()
            except DAMAGE as damage:
                self.repair("the baseline", damage)
                if self.night.best is None:  # else its verdict was journalled before the damage
                    self.baseline()
        while True:
            if (self.night.open is None or self.night.open.commit is None) and (end := self.before_asking()):
                return end
            if self.night.open is None:
                self.record("experiment", n=len(self.night.experiments), parent=self._best_commit(), step=briefing.step(self.night))
            experiment = self.night.experiments[-1]
            try:
                if experiment.commit is None and (end := self.propose(experiment)):
                    return end
                if experiment.commit is not None and experiment.status is None:
                    verdict = self.early_verdict(experiment) or self.train_and_decide(experiment)
                    self.conclude(experiment, *self.verified(experiment, verdict))  # moves the branch, if it is a keep
            except DAMAGE as damage:
                self.mend(experiment, damage)
            except (NightError, Stopped):
                raise
            except Exception as mistake:
                self.mend(experiment, mistake)

    def train_and_decide(self, experiment: Experiment) -> Verdict:
        """Train and score the candidate until there is a verdict; a promising one in turns with the best."""
        best = self.night.leader
        while True:
            subject = experiment
            if experiment.scores:
                step = judge(self.night, experiment, self.rule)
                if step.action in ("keep", "discard"):
                    return Verdict(step.action, step.words, None)
                subject = best if step.action == "train best" else experiment
                self.console.say(f"{experiment.name}: {step.words}; {step.next_words}")
            result = self.trial(subject)
            if result.status != "ok" and subject is best:
                return Verdict("discard", f"the best could not be trained beside it: {result.status}", result.error)
            if result.status != "ok":
                return Verdict(result.status, (result.error or {}).get("message", ""), result.error)

    def mend(self, experiment: Experiment, damage: Exception) -> None:
        """Repair damage, and end this experiment with it. NightError if the repair fails."""
        ours = not isinstance(damage, DAMAGE)
        if ours:
            log = keep_traceback(self.lab.folder, damage)
            self.console.say(f"note: that is a mistake of the driver's; the details are in {log}")
        words = self.repair(experiment.name, damage)
        cause = f"the driver failed over it, {type(damage).__name__}" if ours else "damaged from outside, and repaired"
        if experiment.status is None:
            kind = "agent_error" if experiment.commit is None else "crash"
            reason = f"{cause}: {words}"
            self.conclude(experiment, kind, reason, failure_record(kind, reason))

    def repair(self, name: str, damage: BaseException) -> str:
        """Make everything agree with the journal again. Returns what the damage was. NightError if the repair fails."""
        words = one_line(str(damage), 300) or type(damage).__name__
        self.console.say(f"{name}: {words}; repairing")
        try:
            self.follow()
        except DAMAGE as worse:
            again = one_line(str(worse), 300) or type(worse).__name__
            raise NightError(f"{name}: {words}; the repair failed, too: {again}; mend it, then --resume") from damage
        return words

    def follow(self) -> None:
        """Make worktree, branch, refs and views agree with the journal. Raises DAMAGE if that fails."""
        if self.journal.follow():
            self.restored()
        prune(self.night, self.lab.folder)  # first what makes room
        self.worktree.fill(self._best_commit())
        stays = self.worktree.move(self._best_commit())
        for words in (stays, *self.worktree.keep_refs({e.n: e.commit for e in self.night.experiments if e.commit})):
            self.note_once(words)
        with contextlib.suppress(OSError):  # a view; it is written again after the next experiment
            results.write_results(self.night, self.lab.folder / "results.tsv")

    def before_asking(self) -> tuple[str, str] | None:
        """Before a new experiment, or another call for one that has no candidate yet: a reason to end the night, after a pause if
        failures came in a row."""
        if self.stopper.finishing():
            return "stopped", "stopped by request"
        if self.journal.follow():
            self.restored()
        if self.stopper.alone:
            self.note_once(f"the terminal was closed; the night went on, and wrote to {TERMINAL_LOG} what it said")
        free = shutil.disk_usage(self.lab.folder).free / 1e9
        if end := limits.over(self.night, self.settings, seconds_left=self._seconds_left(), free_gb=free):
            return end
        if self.night.open is None and (wait := limits.pause(self.night, self.settings)):
            kind, length = self.night.streak()
            self.console.say(f"{length} experiments in a row ended as {kind}; pausing {wait:.0f} s")
            self.stopper.sleep(wait, lambda left: self.console.show(f"pausing, {left:.0f} s left"))
            if self.stopper.finishing():
                return "stopped", "stopped by request"
        return None

    def baseline(self) -> None:
        """Measure the unchanged train file with several seeds. BaselineError if it does not train."""
        if self.night.open is None:
            self.record("experiment", n=0, parent=self.night.base)
        experiment = self.night.experiments[0]
        if experiment.commit is None:
            self.worktree.fill(self.night.base)
            self.candidate(experiment, self.night.base, Proposal("changed", "baseline"))
        while len(experiment.scores) < self.settings.baseline_seeds:
            result = self.trial(experiment)
            if result.status != "ok":
                error = result.error or {}
                self.record("note", text=f"the baseline ended as {result.status}: {error.get('message')}")
                raise BaselineError(
                    f"the unchanged {self.lab.train_file} ended as {result.status}: {error.get('message')}\n"
                    f"{error.get('tail', '')}\nmend it, commit it, and start a night with "
                    f"another --tag; full output: {self.lab.folder / 'logs'}"
                )
            if self.stopper.finishing() and len(experiment.scores) < self.settings.baseline_seeds:
                raise Stopped
        self.conclude(experiment, "keep", "baseline", None)

    def propose(self, experiment: Experiment) -> tuple[str, str] | None:
        """Ask the agent for a candidate, or give the verdict if none came. Returns why the night ends, if it does."""
        n, parent = experiment.n, experiment.parent
        self.console.stage(f"experiment {n} (best {self.night.leader.mean:.4f}): the agent is at work")
        cost_left = self.settings.max_cost - self.night.cost if self.settings.max_cost is not None else None
        said = self.hooks.before_experiment(self.night, experiment)
        prompt = briefing.compose(self.night, briefing.program(self.program), said)
        checkout, self._python = guard.in_checkout(self.worktree.repository), self._python or guard.in_python()
        self.worktree.lend(parent)
        self.record("asked", n=n)
        proposal = ask(self.desk, prompt, parent, n, self.night.seed + n, cost_left)
        self.tell_changes(experiment, checkout)
        if proposal.droppings:
            self.note(f"{experiment.name}: removed what the agent left beside its edit: {_listed(proposal.droppings)}")
        if proposal.kind == "changed":
            source = read_plain(self.worktree.path / self.lab.train_file, TRAIN_FILE_BYTES)
            commit = self.worktree.repository.commit(parent, self.lab.train_file, source, proposal.description)
            self.candidate(experiment, commit, proposal)
            return None
        spent = {"usage": proposal.usage, "seconds": proposal.seconds}
        if proposal.kind in ("rate_limit", "login", "missing"):
            self.record("agent_failed", n=n, kind=proposal.kind, wait=proposal.wait, message=proposal.message, **spent)
            return self._no_agent(proposal.kind, proposal.message)
        self.conclude(experiment, proposal.kind, proposal.message, proposal.error(), proposal.description, spent)
        return None

    def candidate(self, experiment: Experiment, commit: str, proposal: Proposal) -> None:
        """Journal the worktree's train file as the candidate of this experiment."""
        source, about = novelty.source(self.worktree.path / self.lab.train_file), proposal.description
        self.record(
            "candidate", n=experiment.n, commit=commit, ast=source.identity, lines=source.lines, description=about,
            hypothesis=proposal.hypothesis, family=family(about, self.worktree.diff(experiment.parent, commit)),
            usage=proposal.usage, seconds=round(proposal.seconds, 1),
        )  # fmt: skip
        self.worktree.keep_refs({experiment.n: commit})  # also the baseline's, which the user may rebase away
        if experiment.n:
            self.console.say(f"experiment {experiment.n}: {about}")

    def early_verdict(self, experiment: Experiment) -> Verdict | None:
        """The verdict on a candidate that needs no training: unchanged, trained before, no Python, or with data of its own."""
        if experiment.scores:
            return None
        self.lay(experiment)
        file = self.lab.worktree / self.lab.train_file
        if found := novelty.early_verdict(self.night, experiment) or novelty.broken(file):
            return found
        parent = self.worktree.repository.file_at(experiment.parent, self.lab.train_file)
        return novelty.burdened(file.read_bytes(), parent) or novelty.refused(screen(self.lab, parent))

    def verified(self, experiment: Experiment, verdict: Verdict) -> Verdict:
        """The same verdict, unless it is a keep and the candidate looks ahead: before a keep every row is probed for that."""
        if verdict.status != "keep":
            return verdict
        self.console.stage(f"{experiment.name}: every row is probed before it is kept")
        folder = next(trial.folder for trial in reversed(experiment.trials) if trial.status == "ok")
        run_dir, reference = self.lab.folder / "trials" / folder, self.night.experiments[0].summary()
        for _ in range(validity.MOST_INTERRUPTIONS):
            result = score_run(self.lab, run_dir, "val", reference, verifying=True)
            seconds, status = round(result.seconds, 1), result.status
            self.record("verified", n=experiment.n, dir=folder, status=status, seconds=seconds, error=result.error)
            if status != "interrupted":
                return novelty.refused(result) or verdict
        why = (result.error or {}).get("message")
        return Verdict("discard", f"it could not be probed before a keep, in {validity.MOST_INTERRUPTIONS} attempts: {why}", None)

    def lay(self, experiment: Experiment) -> None:
        """Restore the candidate's files in the worktree and the night's harness, and remove whatever else could be imported."""
        self.worktree.fill(experiment.commit or "")  # byte by byte: git would believe sizes and times
        lay_harness(self.worktree.repository, self.night.base, self.lab.folder)

    def trial(self, experiment: Experiment) -> TrialResult:
        """Train and score an experiment's file with its next seed. Repeat that if the machine slept, or its speed changed."""
        if experiment.status is None and experiment.n and experiment.repeats.get("killed", 0) >= MOST_KILLS:
            why = f"the driver was killed in each of {MOST_KILLS} attempts at this training"
            return TrialResult("crash", 0.0, error=failure_record("crash", why))
        k = len([trial for trial in experiment.trials if trial.status != "running"])
        seed = self.night.seed + k  # trial k of every candidate has the same seed: a pair
        run_dir = self.lab.folder / "trials" / f"{experiment.n:04d}-{seed}"
        name, baseline = experiment.name, self.night.experiments[0].summary() if experiment.n or k else {}
        while True:
            self.lay(experiment)
            self.console.stage(f"{name}, trial {k + 1}" + f": {experiment.description}" * (experiment.n > 0))
            self.record("trial_start", n=experiment.n, k=k, seed=seed, dir=run_dir.name)
            result = self._trained(experiment, run_dir, seed, baseline)
            result = validity.validated(self.night, experiment, result, self.lab.budget_seconds)
            self.record(
                "trial_end", n=experiment.n, k=k, seed=seed, dir=run_dir.name, status=result.status, val_bpb=result.val_bpb,
                summary=result.summary, seconds=round(result.seconds, 1), error=result.error,
            )  # fmt: skip
            if result.status == "ok":
                words = validity.disturbance(result) if validity.decisive(self.lab.budget_seconds) else ""
                unquiet = f"; the machine {words}" if words else ""
                self.console.say(f"{name}, trial {k + 1}: val_bpb {result.val_bpb:.4f} ({result.seconds:.0f} s{unquiet})")
            if result.status not in REPEATED:
                return result
            self.console.say(f"{name}, trial {k + 1} is repeated: {(result.error or {}).get('message')}")

    def conclude(
        self, experiment: Experiment, status: str, reason: str, error: dict[str, Any] | None, description: str = "",
        spent: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Journal the verdict on an experiment, then let git, the views and the user's hook follow."""
        mean = experiment.mean
        self.record(
            "verdict", n=experiment.n, status=status, reason=reason, val_bpb=mean, description=description, error=error,
            **(spent or {"usage": {}, "seconds": 0.0}),
        )  # fmt: skip
        self.follow()
        sigma = noise(self.night).sigma
        shown = f" {words}" if (words := score(experiment, sigma)) else ""
        self.console.say(f"{experiment.name}: {status}{shown} ({reason}); best {score(self.night.leader, sigma)}")
        self.hooks.after_experiment(self.night, experiment)

    def _trained(self, experiment: Experiment, run_dir: Path, seed: int, reference: dict[str, Any]) -> TrialResult:
        """The result of one training: `interrupted` if somebody removed or moved a folder that it needs. The third time that this,
        or the GPU's watchdog, ends a trial it is a crash, because the candidate may do that itself."""
        began = time.monotonic()
        try:
            result: TrialResult | OSError = run_trial(self.lab, run_dir, seed, reference)
        except OSError as problem:
            result = problem
        moved = self.journal.follow()
        if moved:
            self.restored()
        if moved or not run_dir.is_dir() or not self.worktree.path.is_dir():
            error = failure_record("removed", "a folder that the training needs was removed or moved meanwhile")
            result = TrialResult("interrupted", time.monotonic() - began, error=error)
        if isinstance(result, OSError):
            raise result
        if result.kind in ("removed", "watchdog") and experiment.repeats.get(result.kind, 0) >= MOST_REMOVALS:
            return replace(result, status="crash", error={**(result.error or {}), "kind": "crash"})
        return result

    def held_out(self) -> None:
        """Score baseline and best on the held-out test text, once each."""
        for n in sorted({0, self.night.leader.n}):
            experiment = self.night.experiments[n]
            found = finished_run(experiment, self.lab.folder)
            if n in self.night.tests or found is None:
                continue
            trial, run_dir = found
            self.console.stage(f"held-out test of {experiment.name}")
            result = score_run(self.lab, run_dir, "test")
            if result.status == "interrupted":
                return
            self.record(
                "test_score", n=n, split="test", val_bpb=trial.val_bpb, test_bpb=result.val_bpb, summary=result.summary,
                error=result.error,
            )  # fmt: skip

    def tell_changes(self, experiment: Experiment, checkout: dict[str, int]) -> None:
        """Note, once for each name, what the agent may have changed outside its worktree, and what a training may have planted."""
        before, self._python = self._python, guard.in_python()
        in_checkout = guard.changed(checkout, guard.in_checkout(self.worktree.repository))
        for what, names in (
            (f"changed while the agent of {experiment.name} was at work", in_checkout),
            (f"Python's packages changed before {experiment.name} was trained", guard.changed(before, self._python)),
        ):
            if fresh := sorted(names - self._noted):
                self._noted.update(fresh)
                self.note(f"{what}: {_listed(fresh)}; if it was not you, look at it")

    def note(self, text: str) -> None:
        """Journal and say something that the user should know."""
        self.record("note", text=text)
        self.console.say(f"note: {text}")

    def note_once(self, text: str) -> None:
        """The same, unless it was said in this session or is empty."""
        if text not in self._noted:
            self._noted.add(text)
            self.note(text)

    def _seconds_left(self) -> float:
        return limits.seconds_left(self.settings, time.monotonic() - self.began, time.time())

    def _best_commit(self) -> str:
        return (self.night.leader.commit if self.night.best is not None else None) or self.night.base

    def _no_agent(self, kind: str, message: str) -> tuple[str, str] | None:
        wait = limits.without_agent(self.night, self.settings, kind, message, self._seconds_left())
        if isinstance(wait, tuple):
            return wait
        self.console.say(f"rate limit: {message}; waiting {wait:.0f} s")
        self.stopper.sleep(wait, lambda left: self.console.show(f"rate limit, {left:.0f} s left"))
        return ("stopped", "stopped by request") if self.stopper.finishing() else None


def keep_traceback(folder: Path, error: BaseException) -> Path:
    """Add where an unexpected error came from to the night's logs, if that is possible. Returns the file's path."""
    log = folder / "logs" / "driver.log"
    with contextlib.suppress(OSError):
        before = read_part(log, -TRACEBACK_BYTES, TRACEBACK_BYTES) if log.exists() else b""
        write_anew(log, before + "".join(traceback.format_exception(error)).encode("utf-8", "replace"))
    return log


def _bounded(value: Any) -> Any:
    """A value that JSON can hold and read again: what is no finite number of a usual size, which only a stranger sends, is None."""
    if isinstance(value, dict):
        return {key: _bounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bounded(item) for item in value]
    unusual = isinstance(value, (int, float)) and not (math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 63)
    return None if unusual else value


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
