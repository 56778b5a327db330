"""The user's own programs at three moments of a night: executables in `hooks/` of their checkout.

    hooks/before_experiment   what it prints goes into the agent's prompt, as data
    hooks/after_experiment    once there is a verdict
    hooks/night_end           once the night is over, or has failed

Each gets one JSON object on standard input, the checkout as working directory, the user's environment, and 30 seconds. One that
fails, hangs or is not executable costs a note in the journal, never the night. One that was written or changed after the driver
began is not run: it may be an agent's work, or a training's, and would see the user's keys.

Without a hook of its own, the end of a night is shown as a notification of the desktop (scripts/hooks/notify.py), if there is
one. AUTORESEARCH_NOTIFY=0 turns that off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.files import read_plain
from agent.journal.state import Experiment, Night
from agent.process import child
from agent.process.environment import clean_env
from agent.text import one_line, safe_text
from agent.views import results

FOLDER = "hooks"
NAMES = ("before_experiment", "after_experiment", "night_end")
NOTIFY = Path(__file__).resolve().parents[2] / "scripts" / "hooks" / "notify.py"
SECONDS = 30.0
OUTPUT_BYTES = 64 << 10  # of each output that is kept
TEXT_CHARACTERS = 2_000  # of what before_experiment says that reaches the prompt


class Hooks:
    """The hooks of one checkout. `record` journals an event, `say` takes a line for the human."""

    def __init__(
        self, root: Path, night_folder: Path, record: Callable[..., None], say: Callable[[str], None], stop: Callable[[], bool]
    ) -> None:  # fmt: skip
        self.root, self.folder, self._record, self._say, self._stop = root, night_folder, record, say, stop
        self._said: dict[str, str] = {}  # by hook: the same trouble a hundred times is one note
        self._known = {name: _digest(root / FOLDER / name) for name in NAMES}
        self._notify = _digest(NOTIFY) if _desktop() else ""

    def before_experiment(self, night: Night, experiment: Experiment) -> str:
        """What the hook says for the agent, bounded; "" without one."""
        return self._run("before_experiment", {**_about(night), "n": experiment.n, "step": experiment.step}, self._stop)

    def after_experiment(self, night: Night, experiment: Experiment) -> None:
        """For every experiment but the baseline."""
        if experiment.n:
            self._run("after_experiment", {**_about(night), "experiment": _told(night, experiment)}, self._stop)

    def night_end(self, night: Night, text: str) -> None:
        """Also for a night that was stopped at once: this is how its owner hears of it."""
        with contextlib.suppress(Exception):  # the night is over all the same: a full disk must not hide how it ended
            about = {**_about(night), "reason": night.ended, "text": text, "summary": results.last_line(night)}
            self._run("night_end", about, lambda: False)
            if self._notify and self._notify == _digest(NOTIFY) and not os.path.lexists(self.root / FOLDER / "night_end"):
                self._call([sys.executable, "-B", NOTIFY], "night_end", about, lambda: False)

    def _run(self, name: str, about: dict[str, Any], stop: Callable[[], bool]) -> str:
        path = self.root / FOLDER / name
        if not path.is_file():
            return ""
        if _digest(path) != self._known[name]:
            words = "was added or changed after the driver started, so it was not run; the next --resume will use it"
            return self._trouble(name, words)
        if not os.access(path, os.X_OK):
            return self._trouble(name, f"is not executable and was not run; run: chmod +x {FOLDER}/{name}")
        try:
            outcome, out = self._call([path], name, about, stop)
        except OSError as error:  # a full disk
            return self._trouble(name, f"could not be run: {one_line(str(error), 300)}")
        if outcome.reason == "stopped":
            return ""
        if not outcome.ok:
            endings = {
                "wall": f"was ended after {SECONDS:g} s", "log": "was ended, for it printed without end",
                "missing": "could not be started",
            }  # fmt: skip
            code = f"exit code {outcome.exit_code}" if outcome.signal is None else f"signal {outcome.signal}"
            last = one_line(outcome.tail(300), 300) or "it said nothing on standard error"
            return self._trouble(name, f"{endings.get(outcome.reason) or f'failed with {code}'}: {last}")
        self._said.pop(name, None)
        try:
            return _shortened(safe_text(read_plain(out, 2 * OUTPUT_BYTES)).strip())
        except OSError:  # the hook itself has removed the night's folder
            return ""

    def _call(
        self, command: list[str | Path], name: str, about: dict[str, Any], stop: Callable[[], bool]
    ) -> tuple[child.Outcome, Path]:  # fmt: skip
        """How the program ended, and the file that holds what it printed."""
        out, log = (self.folder / "logs" / f"hook.{name}.{kind}" for kind in ("out", "log"))
        words = json.dumps({"event": name, "folder": str(self.folder), **about}, ensure_ascii=False) + "\n"
        outcome = child.run(
            command, cwd=self.root, env=clean_env(keep_secrets=True), log=log, stdin=words, stdout_to=out, stop=stop,
            bounds=child.Bounds(SECONDS, log_bytes=OUTPUT_BYTES), pidfile=self.folder / "hook.pid",
        )  # fmt: skip
        return outcome, out

    def _trouble(self, name: str, text: str) -> str:
        if self._said.get(name) != text:
            self._said[name] = text
            note = f"{FOLDER}/{name} {text}"
            self._say(f"note: {note}")
            self._record("note", text=note)
        return ""


def _desktop() -> bool:
    """Whether a notification would reach somebody."""
    if os.environ.get("AUTORESEARCH_NOTIFY") == "0":
        return False
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return shutil.which("osascript") is not None if sys.platform == "darwin" else bool(shown and shutil.which("notify-send"))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _shortened(text: str) -> str:
    if len(text) <= TEXT_CHARACTERS:
        return text
    left_out = f"\n({len(text) - TEXT_CHARACTERS} more characters)"
    return text[: TEXT_CHARACTERS - len(left_out)] + left_out


def _about(night: Night) -> dict[str, Any]:
    """What every hook is told."""
    best = None if night.best is None else _told(night, night.leader)
    baseline = None if night.baseline is None else night.baseline.mean
    return {
        "tag": night.tag, "branch": f"autoresearch/{night.tag}", "train_file": night.train_file, "experiments": len(night.done),
        "kept": len(night.kept), "baseline_val_bpb": baseline, "best": best, "cost_usd": round(night.cost, 4),
        "tokens": night.tokens,
    }  # fmt: skip


def _told(night: Night, experiment: Experiment) -> dict[str, Any]:
    return {
        "n": experiment.n, "status": experiment.status, "val_bpb": experiment.mean, "description": experiment.description,
        "hypothesis": experiment.hypothesis, "reason": experiment.reason, "commit": experiment.commit, "step": experiment.step,
        "trials": len(experiment.scores),
    }  # fmt: skip
