"""`python -m agent.doctor --deep`: about ten minutes of trials that prove what could only be read or guessed about this machine.

Everything happens in a temporary folder with a clone of the checkout and data of its own. Each check ends as ok, note or bad, says
what that means and what to do. Results go to one file, made to be attached to an issue.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from agent.git.command import run_git
from agent.journal.journal import read_events
from agent.journal.state import fold
from agent.night.power import stay_awake
from agent.process.child import Bounds, Outcome, run, said_by, seconds_asleep
from agent.process.environment import clean_env, data_home
from agent.text import one_line
from agent.trial import rights, sandbox

MAC = sys.platform == "darwin"
LONGEST = 600.0  # seconds that one check may take
STEPS = 40  # of a training that is timed
ALLOCATED_MB = 512  # of arrays, to see whether they are counted
EXPECTED = 1.25  # peak memory over the forecast, at most
# Gradients of causal attention, fused ("causal") against the mask as an array, which MLX's fused backward pass does not take.
_ATTENTION = """
import json, time
import mlx.core as mx
gpu = mx.default_device() == mx.Device(mx.gpu)
shape = (4, 6, 1024, 128) if gpu else (1, 2, 128, 64)
q, k, v = (mx.random.normal(shape).astype(mx.bfloat16) for _ in range(3))
causal = mx.tril(mx.ones((shape[2], shape[2]), dtype=mx.bool_))
def measure(mask):
    loss = lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask).astype(mx.float32).sum()
    step, times = mx.grad(loss, (0, 1, 2)), []
    for _ in range(6):
        mx.clear_cache(); mx.reset_peak_memory()
        began = time.perf_counter(); mx.eval(step(q, k, v)); times.append(time.perf_counter() - began)
    return sorted(times)[2] * 1e3, mx.get_peak_memory() / 2**20
print(json.dumps({"fused": measure("causal"), "array": measure(causal), "gpu": gpu}))
"""


@dataclass(frozen=True)
class Result:
    """`state` is ok, note, bad or skip; `facts` are the numbers measured."""

    check: str
    state: str
    text: str
    facts: dict[str, Any]


class Bench:
    """A temporary folder with a clone of the checkout, its own data and its own logs."""

    def __init__(self, checkout: Path, place: Path) -> None:
        self.place, self.repo, self.home = place, place / "clone", place / "data"
        run_git(checkout, "clone", "--quiet", str(checkout), str(self.repo))

    def run(self, *argv: str, **more: str) -> tuple[Outcome, str]:
        """A command of the clone, and what it wrote to standard output."""
        out = self.place / "out"
        env = clean_env({"AUTORESEARCH_HOME": str(self.home), "AUTORESEARCH_SCORE": "0", **more})
        outcome = run(argv, cwd=self.repo, env=env, log=self.place / "log", stdout_to=out, bounds=Bounds(LONGEST))
        return outcome, out.read_text("utf-8", "replace")

    def train(self, name: str) -> tuple[Outcome, dict[str, Any]]:
        """A short training of the train file: its outcome and what train.json says."""
        folder = self.place / name
        outcome, _ = self.run(sys.executable, "train_mlx.py", "--budget", f"{STEPS}steps", "--run-dir", str(folder))
        try:
            return outcome, json.loads((folder / "train.json").read_text())
        except (OSError, ValueError):
            return outcome, {}


def examine(checkout: Path) -> Iterator[Result]:
    """All checks, the quick ones first."""
    yield clocks()
    yield awake()
    yield hidden_link()
    (checkout / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkout / "runs", prefix=".doctor-") as folder:  # Linux's sandbox hides /tmp
        bench = Bench(checkout, Path(folder))
        yield counted(bench)
        yield (fused := attention(bench))
        made, _ = bench.run(sys.executable, "prepare_mlx.py", "--dataset", "stories")
        if made.ok:
            yield memory(bench)
            yield dtypes(bench) if fused.state != "skip" else Result("dtypes", "skip", "no GPU in use", {})
        else:
            yield Result("data", "bad", f"stories could not be prepared: {one_line(made.tail(300), 300)}", {})
        yield night(bench)


def clocks() -> Result:
    """Do the clocks that tell sleep from work agree while the machine is awake?"""
    slept, wall, steady = seconds_asleep(), time.time(), time.monotonic()
    time.sleep(2)
    facts = {"asleep": seconds_asleep() - slept, "wall": time.time() - wall, "monotonic": time.monotonic() - steady}
    if abs(facts["asleep"]) > 0.1 or abs(facts["wall"] - facts["monotonic"]) > 0.1:
        words = "the clocks drift apart while the machine is awake, so trainings may be taken for interrupted; report this"
        return Result("clocks", "bad", words, facts)
    return Result("clocks", "ok", "time asleep is told apart from time awake", facts)


def awake() -> Result:
    """Does `caffeinate` hold off idle sleep?"""
    if not MAC:
        return Result("awake", "skip", "caffeinate is a program of macOS", {})
    with stay_awake():
        time.sleep(1)
        said = said_by(["pmset", "-g", "assertions"])[1]
    held = "caffeinate" in said and "PreventUserIdleSystemSleep" in said
    words = "caffeinate holds off idle sleep" if held else "pmset does not list caffeinate: set sleep to never for a night"
    return Result("awake", "ok" if held else "bad", words, {"pmset": said[:1000]})


def hidden_link() -> Result:
    """Can a candidate reach a hidden file through a hard link, a clone or a symbolic link, or write to a file of the user's?"""
    if not sandbox.available().present:
        return Result("links", "note", f"no sandbox here: {sandbox.available()}", {})
    code = """
import os, subprocess, sys
hidden, folder, own = sys.argv[1:]
for way, make in {"hard": lambda to: os.link(hidden, to), "symbolic": lambda to: os.symlink(hidden, to),
                  "clone": lambda to: subprocess.run(["cp", "-c", hidden, to], check=True)}.items():
    try:
        make(os.path.join(folder, way))
        print("READ", way, open(os.path.join(folder, way)).read())
    except Exception as error:
        print("refused", way, type(error).__name__)
try:
    os.link(own, os.path.join(folder, "own"))
    open(os.path.join(folder, "own"), "w").write("changed")
    print("WRITTEN", "hard")
except Exception as error:
    print("refused", "write", type(error).__name__)
"""
    with tempfile.TemporaryDirectory(dir=Path.home()) as name:
        folder, hidden = Path(name) / "run", Path(name) / "hidden" / "held.txt"
        folder.mkdir()
        hidden.parent.mkdir()
        hidden.write_text("held-out text")
        (own := Path(name) / "own.txt").write_text("the user's")
        argv = [sys.executable, "-c", code, str(hidden), str(folder), str(own)]
        wrapped = sandbox.wrap(argv, rights.rules([folder], [], [hidden.parent]))
        said = said_by(wrapped, Path(name))[1]
        written = own.read_text() != "the user's"
    if "held-out text" in said or "refused" not in said:
        return Result("links", "bad", "a trained file can read the held-out text through a link; do not trust scores, report this",
                      {"said": said})
    if written:
        words = "a trained file can write to your own files through a hard link; report this"
        return Result("links", "bad", words, {"said": said})
    return Result("links", "ok", "links and clones of held-out text are refused, and hard links to your own files", {"said": said})


def counted(bench: Bench) -> Result:
    """Is the memory of GPU buffers counted? `--memory-gb` depends on it."""
    code = f"import time\nimport mlx.core as mx\na = mx.ones(({ALLOCATED_MB}, 1 << 18))\nmx.eval(a)\ntime.sleep(2)"
    outcome, _ = bench.run(sys.executable, "-c", code)
    if not outcome.ok:
        return Result("counted", "bad", f"MLX does not run: {one_line(outcome.tail(300), 200)}", {})
    words = f"a program with {ALLOCATED_MB} MB of MLX's arrays is seen to take {outcome.peak_rss_mb:.0f} MB"
    if outcome.peak_rss_mb < ALLOCATED_MB:
        return Result("counted", "note", f"{words}: --memory-gb can rely on metrics.jsonl only", {"peak_mb": outcome.peak_rss_mb})
    return Result("counted", "ok", words, {"peak_mb": outcome.peak_rss_mb})


def attention(bench: Bench) -> Result:
    """Is the fused backward pass of attention taken?"""
    outcome, said = bench.run(sys.executable, "-c", _ATTENTION)
    if not outcome.ok:
        return Result("attention", "bad", f"attention fails: {one_line(outcome.tail(300), 200)}", {})
    facts = json.loads(said.splitlines()[-1])
    (fast, small), (slow, large) = facts["fused"], facts["array"]
    words = f"causal {fast:.1f} ms and {small:.0f} MB, with an array as mask {slow:.1f} ms and {large:.0f} MB"
    if not facts["gpu"]:
        return Result("attention", "skip", f"no GPU in use; {words}", facts)
    fused = small < 0.8 * large
    taken = "taken" if fused else "not taken"
    return Result("attention", "ok" if fused else "note", f"the fused backward pass is {taken}: {words}", facts)


def memory(bench: Bench) -> Result:
    """Does a training stay within its forecast? It does not where MLX copies the n-gram tables to update some rows."""
    outcome, made = bench.train("memory")
    if not made:
        return Result("memory", "bad", f"train_mlx.py fails: {one_line(outcome.tail(400), 300)}", {})
    peak, expected = made["peak_vram_mb"], made.get("expected_vram_mb") or 0.0
    facts = {key: made.get(key) for key in ("peak_vram_mb", "expected_vram_mb", "mfu_percent", "training_seconds", "device")}
    words = f"{peak:,.0f} MB at the peak, {expected:,.0f} MB expected"
    if peak > EXPECTED * expected:
        return Result("memory", "note", f"{words}: the n-gram tables may be copied at each step; report this", facts)
    return Result("memory", "ok", words, facts)


def dtypes(bench: Bench) -> Result:
    """Which dtype trains fastest here? Chips before the M3 have no bf16 units. It is remembered in the user's own data home."""
    place = bench.place / "dtypes.json"
    data = json.loads((bench.home / "current.json").read_text())["train_dir"]
    outcome, _ = bench.run(
        sys.executable, "scripts/benchmark.py", "dtype", "--rounds", "2", "--steps", str(STEPS // 2), "--data", data,
        "--json", str(place), AUTORESEARCH_HOME=str(data_home()),
    )  # fmt: skip
    if not outcome.ok:
        return Result("dtypes", "bad", f"no dtype trains: {one_line(outcome.tail(300), 200)}", {})
    facts = json.loads(place.read_text())
    speeds = {name: median(rates) for name, rates in facts["tokens_per_second"].items() if rates}
    words = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in speeds.items())
    return Result("dtypes", "ok", f"{words}; {facts['said']}", facts)


def night(bench: Bench) -> Result:
    """A night in small, with the sandbox on: does it run, and does a training start as fast the second time?"""
    run_git(bench.repo, "checkout", "--quiet", "--", ".")
    outcome, said = bench.run(
        sys.executable, "-m", "agent.loop", "--agent", "search", "--dataset", "stories", "--preset", "tiny", "--experiments", "2",
        "--baseline-seeds", "3", "--tag", "deep", "--disk-gb", "0",
    )  # fmt: skip
    events, _ = read_events(bench.repo / "runs" / "deep" / "journal.jsonl")
    if not outcome.ok or not events:
        return Result("night", "bad", f"a small night fails: {one_line((said + outcome.tail(600))[-400:], 400)}", {})
    state = fold(events)
    starts = [t.seconds - float(t.summary.get("training_seconds") or 0) for e in state.experiments for t in e.trials if t.summary]
    facts = {"overheads": starts, "sandbox": state.sandbox, "statuses": [e.status for e in state.experiments]}
    slow = MAC and len(starts) > 2 and median(starts[1:]) > 0.9 * starts[0] and starts[0] > 15
    box = state.sandbox.partition(":")[0] or "no sandbox"
    words = f"{len(state.done)} experiments in {box}; start and score took {starts[0]:.1f} s at first, "
    words += f"then {median(starts[1:]):.1f} s"
    advice = ": kernels seem to be compiled again in every training; report this" if slow else ""
    return Result("night", "note" if slow else "ok", words + advice, facts)


def write(results: list[Result], path: Path) -> None:
    """Write the file for an issue: machine, versions, every result."""
    versions = {}
    for name in ("mlx", "numpy", "torch"):
        found = said_by([sys.executable, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"])[1]
        versions[name] = found if re.fullmatch(r"[\w.+]+", found) else ""
    chip = said_by(["sysctl", "-n", "machdep.cpu.brand_string"])[1] if MAC else platform.processor()
    about = {"system": platform.platform(), "machine": platform.machine(), "chip": chip, "python": platform.python_version(),
             "cpus": os.cpu_count(), "versions": versions}  # fmt: skip
    path.write_text(json.dumps({**about, "results": [asdict(result) for result in results]}, indent=1) + "\n", encoding="utf-8")
