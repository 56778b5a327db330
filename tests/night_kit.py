"""A repository in small for the driver's tests: a harness, a train file and agents that honour the doors, in milliseconds.

Everything is a real file, a real process and a real git repository; only the model is missing. The score of a training is
`1.5 - GAIN + noise(seed)`, and MODE makes the trainer misbehave.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = str(Path(tempfile.gettempdir()) / f"autoresearch-test-cache-{os.getuid()}")  # matplotlib's fonts, indexed once

HARNESS = '''\
import json, os, random, sys
from pathlib import Path

def prepare(out):
    home = Path(os.environ["AUTORESEARCH_HOME"])
    entry = {"id": "toy", "train_dir": str(home / "train/toy"), "held_dir": str(home / "held/toy"), "preset": "tiny",
             "vocab_size": 256, "seq_len": 64, "budget": "5s", "data_hash": "d1", "tokenizer_hash": "t1", "device": "cpu"}
    for key in ("train_dir", "held_dir"):
        Path(entry[key]).mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(entry))
    print("prepared")

def score(run_dir, split):
    run = Path(run_dir)
    made = json.loads((run / "train.json").read_text())
    weights = json.loads((run / "weights.safetensors").read_text())
    if weights.get("mode") == "unscorable" or (weights.get("mode") == "looks" and json.load(sys.stdin)["verify"]):
        print(json.dumps({"kind": "violation", "message": "logits look ahead"}), file=sys.stderr)
        return 6
    noise = random.Random(f"{made['seed']} {weights['gain']}").gauss(0, 0.001)
    bpb = 1.5 - weights["gain"] + noise + (0.01 if split == "test" else 0)
    values = {f"{split}_bpb": f"{bpb:.6f}", "training_seconds": 1.0, "total_seconds": 1.5, "peak_vram_mb": 512.0,
              "mfu_percent": 1.0, "total_tokens_M": 0.1, "num_steps": 10, "num_params_M": 0.5, "depth": 2, "val_bytes": 1000,
              "val_sha256": "v1", "data_hash": "d1", "tokenizer_hash": "t1", "seq_len": 64, "budget": made["budget"],
              "device": "cpu", "seed": made["seed"]}
    print("---")
    for key, value in values.items():
        print(f"{key}: {value}")
    return 0

if __name__ == "__main__":
    if sys.argv[1] == "screen":
        sys.exit()
    if sys.argv[1] == "score":
        sys.exit(score(sys.argv[2], sys.argv[sys.argv.index("--split") + 1]))
    prepare(sys.argv[sys.argv.index("--json") + 1])
'''

TRAINER = '''\
import json, os, sys, time
from pathlib import Path

GAIN = 0.0
MODE = "ok"
SEED = int(os.environ.get("AUTORESEARCH_SEED", "1"))


def main():
    run = Path(os.environ["AUTORESEARCH_RUN_DIR"])
    with open(run / "metrics.jsonl", "w") as metrics:
        for step in range(3):
            row = {"step": step, "tokens": 100 * step, "seconds": 0.1, "loss": 5.0 - step, "tokens_per_second": 1000.0}
            print(json.dumps(row), file=metrics, flush=True)
        if MODE == "nan":
            print('{"step": 3, "loss": NaN}', file=metrics, flush=True)
            time.sleep(60)
    if MODE == "crash":
        raise RuntimeError("matmul: shapes do not fit")
    if MODE == "oom":
        (run / "error.json").write_text('{"kind": "oom", "message": "out of memory", "step": 3}')
        sys.exit(4)
    if MODE == "hang":
        time.sleep(600)
    if MODE == "slow":
        time.sleep(float(os.environ.get("AUTORESEARCH_SLOW", "1")))
    if MODE != "silent":
        (run / "weights.safetensors").write_text(json.dumps({"gain": GAIN, "mode": MODE}))
        (run / "config.json").write_text("{}")
        made = {"seed": SEED, "budget": os.environ["AUTORESEARCH_BUDGET"]}
        (run / "train.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
'''

# What it does in experiment N is the N-th word of AUTORESEARCH_PLAN (the last one is repeated).
AGENT = '''\
import os, re, sys, time
from pathlib import Path

prompt = sys.stdin.read()
n = int(os.environ["AUTORESEARCH_EXPERIMENT"])
plan = Path(__file__).with_name("plan").read_text().split()
act = plan[min(n, len(plan)) - 1]
file = Path("train_mlx.py")
source = file.read_text()

def put(name, value):
    file.write_text(re.sub(rf"^{name} = .*$", f"{name} = {value}", file.read_text(), flags=re.M))

if n == 0:  # asked for one word before the night
    print("ready")
    sys.exit()
gain = float(re.search(r"^GAIN = (.*)$", source, re.M)[1])
Path(__file__).with_name(f"prompt-{n}").write_text(prompt)
with open(Path(__file__).with_name("calls"), "a") as calls:
    calls.write(f"{n} {act}\\n")
if act == "better":
    put("GAIN", round(gain + 0.05, 4))
elif act == "worse":
    put("GAIN", round(gain - 0.05 - n / 1000, 4))
elif act == "looks":
    put("MODE", '"looks"')
    put("GAIN", round(gain + 0.05, 4))
elif act in ("nan", "crash", "oom", "hang", "silent", "unscorable", "slow"):
    put("MODE", f'"{act}"')
    put("GAIN", gain - n / 1000)
elif act == "syntax":
    file.write_text(source + "def broken(:\\n")
elif act == "import":
    file.write_text("import no_such_module\\n" + source)
elif act == "comment":
    file.write_text(source + "# only a comment\\n")
elif act == "seed":
    put("SEED", "7")
elif act == "simpler":
    file.write_text(source.replace("        (run / \\"config.json\\").write_text(\\"{}\\")\\n", ""))
    put("GAIN", gain + 0.001)
elif act == "violation":
    Path("prepare_mlx.py").write_text("print('---')")
elif act == "extra":
    Path("notes.txt").write_text("hello")
    put("GAIN", round(gain + 0.05, 4))
elif act == "fail":
    sys.exit("agent: something broke")
elif act == "hangs":
    time.sleep(600)
elif act == "login":
    print("Error: 401 authentication failed: invalid API key", file=sys.stderr)
    sys.exit(1)
elif act == "plant":
    file.write_text(source + f'KEY = "{os.environ.get("PLANTED_API_KEY")}"\\n')
elif act == "limit":
    flag = Path(__file__).with_name(f"limited-{n}")
    if not flag.exists():
        flag.write_text("")
        print("Error: 429 rate limit exceeded, retry after 1 seconds", file=sys.stderr)
        sys.exit(1)
    put("GAIN", round(gain + 0.05, 4))
elif act == "leak":
    put("GAIN", round(gain + 0.05, 4))
    print("DESCRIPTION: my key is", os.environ.get("PLANTED_API_KEY"))
    sys.exit()
print("HYPOTHESIS: it helps")
print(f"DESCRIPTION: {act} {n}")
'''


def git(cwd: Path, *args: str) -> str:
    names = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *names, *args], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Bed:
    """A repository with a toy night in it, beside an agent that follows a plan."""

    def __init__(self, folder: Path, plan: str = "better worse", name: str = "repo") -> None:
        self.home = folder / "home"
        self.repo = folder / name
        self.tools = folder / "tools"
        for made in (self.home, self.repo, self.tools):
            made.mkdir(parents=True)
        (self.repo / "prepare_mlx.py").write_text(HARNESS)
        (self.repo / "train_mlx.py").write_text(TRAINER)
        (self.repo / "program.md").write_text("# Program\nLower val_bpb.\n")
        (self.repo / ".gitignore").write_text("ignored.txt\n__pycache__/\n")
        git(self.repo, "init", "-q", "-b", "main")
        git(self.repo, "add", "-A")
        git(self.repo, "commit", "-q", "-m", "start")
        (self.tools / "agent.py").write_text(AGENT)
        self.plan(plan)

    def plan(self, words: str) -> None:
        (self.tools / "plan").write_text(words)

    def calls(self) -> list[str]:
        path = self.tools / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def agent(self) -> str:
        import shlex

        return f"{shlex.quote(sys.executable)} {shlex.quote(str(self.tools / 'agent.py'))}"

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "AUTORESEARCH_"))}
        own = {
            "HOME": str(self.home), "AUTORESEARCH_HOME": str(self.home / "data"), "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": CACHE,
            "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200",
            "AUTORESEARCH_NOTIFY": "0",
        }  # fmt: skip
        return {**kept, **own, **extra}

    def command(self, *options: str, tag: str = "night") -> list[str]:
        fast = ("--baseline-seeds", "3", "--backoff", "0.1", "--disk-gb", "0", "--startup", "30", "--no-picture",
                "--no-check-agent")  # fmt: skip
        return [sys.executable, "-m", "agent.loop", "--agent-cmd", self.agent, "--tag", tag, *fast, *options]

    def run(self, *options: str, tag: str = "night", **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*options, tag=tag), cwd=self.repo, env=self.environment(**extra), capture_output=True, text=True,
            timeout=240,
        )  # fmt: skip

    def start(self, *options: str, tag: str = "night", **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*options, tag=tag), cwd=self.repo, env=self.environment(**extra), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def loop(self, *options: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agent.loop", *options], cwd=self.repo, env=self.environment(**extra), capture_output=True,
            text=True, timeout=240,
        )  # fmt: skip

    def folder(self, tag: str = "night") -> Path:
        return self.repo / "runs" / tag


def checkout_digest(repo: Path) -> dict[str, str]:
    """Every byte a user can see in their checkout, their index, their config and their own refs; not runs/."""
    found: dict[str, str] = {}
    ours = {Path("runs"), Path(".git/objects"), Path(".git/worktrees")}  # a night changes them meanwhile
    for top, folders, files in os.walk(repo):
        place = Path(top).relative_to(repo)
        folders[:] = [name for name in folders if place / name not in ours and "autoresearch" not in name]
        for name in files:
            if "autoresearch" not in name:
                found[str(place / name)] = hashlib.sha256(Path(top, name).read_bytes()).hexdigest()
    return dict(sorted(found.items()))
