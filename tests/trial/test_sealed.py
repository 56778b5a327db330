"""What reaches a training and an agent, and what they reach: held-out text, other trials, planted bytecode, a TMPDIR."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, program, some_text
from night_kit import HARNESS, TRAINER, Bed, git

from agent.git.worktree import Repository, Worktree
from agent.journal.journal import read_events
from agent.journal.state import fold
from agent.night import setup
from agent.trial import sandbox
from agent.trial.lab import Lab, lay_harness, restore
from agent.trial.rights import SOURCES, folders, hidden_places
from agent.trial.sandbox import described
from agent.trial.trial import score_run
from agent.views.report import summary

needs_sandbox = pytest.mark.skipif(not sandbox.available().present, reason=str(sandbox.available()))

# Tries what it is told to and writes down how it went; in the trainer and in the scorer.
PROBE = '''
def probe(run, name):
    import socket
    def attempt(what):
        try:
            return what()
        except OSError as error:
            return type(error).__name__
    wanted = json.loads(Path(os.environ["AUTORESEARCH_PROBE"]).read_text())
    seen = {path: attempt(lambda: Path(path).read_text()) for path in wanted["read"]}
    seen["network"] = attempt(lambda: socket.create_connection(("127.0.0.1", wanted["port"]), 5) and "connected")
    seen["write"] = attempt(lambda: Path(wanted["write"]).with_suffix("." + name).write_text(name))
    seen["environment"] = sorted(os.environ)
    seen["scratch"] = [os.environ["TMPDIR"], sorted(os.listdir(os.environ["TMPDIR"]))]
    (Path(os.environ["TMPDIR"]) / f"compiled-by-{Path(run).name}-{name}").write_text("")
    (Path(run) / f"{name}.seen").write_text(json.dumps(seen))
'''


def places(entry: dict[str, Any], worktree: Worktree) -> tuple[Path, ...]:
    return hidden_places(entry, worktree.repository.root, worktree.repository.common, worktree.path)


@pytest.fixture
def home() -> Iterator[Path]:
    """Not below /tmp, which a sandbox hides as a whole, as it does /var/tmp."""
    places = [p for p in (Path.home(), Path(__file__).parent) if not any(p.is_relative_to(t) for t in ("/tmp", "/var/tmp"))]
    if not places:
        pytest.skip("needs a home folder or a checkout that is not below /tmp")
    with tempfile.TemporaryDirectory(prefix=".autoresearch-test-", dir=places[0]) as name:
        yield Path(name)


def probing(bed: Bed, port: int) -> dict[str, Path]:
    """Have trainer and scorer of a bed look at these files, of a night on the user's own text in the checkout."""
    harness = HARNESS.replace('"device": "cpu"}\n', '"device": "cpu", "dataset": "text:own"}\n', 1)
    harness = harness.replace("def prepare(out):", PROBE + "\ndef prepare(out):")
    harness = harness.replace("    noise = ", '    probe(run_dir, "scorer")\n    noise = ')
    trainer = TRAINER.replace("def main():", PROBE + "\n\ndef main():")
    trainer = trainer.replace("    with open(run", '    probe(run, "trainer")\n    with open(run')
    (bed.repo / "prepare_mlx.py").write_text(harness)
    (bed.repo / "train_mlx.py").write_text(trainer)
    (bed.repo / "own").mkdir()
    (bed.repo / "own" / "a.txt").write_text("the user's text")
    git(bed.repo, "add", "-A")
    git(bed.repo, "commit", "-qm", "own text")
    data = bed.home / "data"
    files = {
        "train": data / "train/toy/train.bin", "held": data / "held/toy/val.bin", "other": data / "held/other/val.bin",
        "other train": data / "train/other/train.bin", "other trial": bed.repo / "runs/older/trials/0000-1/weights",
        "other TMPDIR": bed.repo / "runs/older/tmp/0000-1/left", "current": data / "current.json",
        "download": data / "downloads/x/shard.parquet", "work": data / "work/y/parts", "own": bed.repo / "own/a.txt",
        "copy": bed.folder() / "worktree/own/a.txt", "git": bed.repo / ".git/HEAD", "plain": bed.repo / "program.md",
    }  # fmt: skip
    for name, path in files.items():
        if path.is_relative_to(data) or "older" in path.parts:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"text of {name}")
    files["current"].unlink()  # the harness writes it
    files["trial"], files["journal"] = bed.folder("shut") / "trials/0000-3/trainer.seen", bed.folder("shut") / "journal.jsonl"
    asked = {"read": [str(path) for path in files.values()], "port": port, "write": str(bed.home / "escaped")}
    (bed.tools / "probe.json").write_text(json.dumps(asked))
    return files


def seen_by(bed: Bed, files: dict[str, Path], who: str, trial: str) -> dict[str, bool | list[str]]:
    seen = json.loads((bed.folder() / "trials" / trial / f"{who}.seen").read_text())
    errors = ("FileNotFoundError", "PermissionError", "OSError")
    return {name: seen[str(path)] not in errors for name, path in files.items()} | {"network": seen["network"] == "connected"}


def newest_run(folder: Path, n: int) -> Path:
    """The run directory of an experiment that was kept: its newest."""
    return max((folder / "trials").glob(f"{n:04d}-*"), key=lambda path: int(path.name.partition("-")[2]))


@needs_sandbox
def test_a_training_reads_its_own_shard_and_no_text_the_score_is_made_from(home: Path) -> None:
    bed = Bed(home, "better")
    with socket.create_server(("127.0.0.1", 0)) as server:
        files = probing(bed, server.getsockname()[1])
        asks = {"AUTORESEARCH_PROBE": str(bed.tools / "probe.json")}
        open_to_all = bed.run("--experiments", "0", "--no-sandbox", **asks)
        assert open_to_all.returncode == 0, open_to_all.stdout + open_to_all.stderr
        seen = seen_by(bed, files, "trainer", "0000-3")
        unseen = [name for name, readable in seen.items() if not readable]
        assert unseen == ["current", "trial", "journal"], "without a sandbox all is seen; this is not there yet"
        for left in bed.home.glob("escaped.*"):
            left.unlink()
        done = bed.run("--experiments", "1", tag="shut", **asks)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = bed.folder("shut")
    files["copy"] = folder / "worktree/own/a.txt"
    baseline, candidate = (newest_run(folder, n) for n in (0, 1))
    asked = json.loads((baseline / "trainer.seen").read_text())
    readable = {name for name, path in files.items() if asked.get(str(path)) not in ("FileNotFoundError", "PermissionError", None)}
    assert readable == {"train", "plain"}
    second = json.loads((candidate / "trainer.seen").read_text())  # the baseline's third run was there while the candidate trained
    assert files["journal"].exists()
    assert second[str(files["trial"])] in ("FileNotFoundError", "PermissionError")
    assert second[str(files["journal"])] in ("FileNotFoundError", "PermissionError")
    assert asked["network"] != "connected"
    assert not list(bed.home.glob("escaped.trainer"))
    scorer = json.loads((baseline / "scorer.seen").read_text())
    assert scorer[str(files["held"])] == "text of held"
    assert (scorer["network"] != "connected") == sandbox.nests()
    assert (bed.home / "escaped.scorer").exists() != sandbox.nests()
    assert f"sandbox of trainings: {described().partition(':')[0]}\n" in done.stdout
    events = read_events(folder / "journal.jsonl")[0]
    assert [event["sandbox"] for event in events if event["event"] == "session"] == [described()], "all of it is on record"
    assert "AUTORESEARCH_DATA" in asked["environment"]
    assert not {"AUTORESEARCH_HOME"} & {*asked["environment"], *scorer["environment"]}, "where held-out data lies"
    # a TMPDIR for each trial, with nothing in it
    for trial in (baseline.name, candidate.name):
        scratch = json.loads((folder / "trials" / trial / "trainer.seen").read_text())["scratch"]
        assert scratch == [str(folder / "tmp" / trial), []]
    assert [path.name for path in (folder / "tmp").iterdir()] == [".metadata_never_index"]


def test_where_held_out_text_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bed = Bed(tmp_path)
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "moved"))
    worktree = Worktree(Repository(bed.repo), "t", bed.folder("t") / "worktree")
    entry = {"id": "toy", "held_dir": str(tmp_path / "home/held/toy"), "name": "stories"}
    homes = [tmp_path / "moved", tmp_path / "home", bed.repo / "runs", bed.repo / ".git"]
    assert set(places(entry, worktree)) == set(homes)
    assert tmp_path / "moved" in places({"id": "toy", "name": "stories"}, worktree), "as the journal has it, without folders"
    outside = places({**entry, "name": f"text:{tmp_path / 'book.txt'}"}, worktree)
    assert set(outside) - set(homes) == {tmp_path / "book.txt"}
    inside = places({**entry, "name": "text:notes"}, worktree)
    assert set(inside) - set(homes) == {bed.repo / "notes", worktree.path / "notes"}
    assert worktree.path not in places({**entry, "name": "text:."}, worktree), "else there would be nothing to train"
    # the same text, once prepared from somewhere else; and a file that is only linked into the folder
    held, letters = tmp_path / "home/held/toy", tmp_path / "letters"
    held.mkdir(parents=True, exist_ok=True)
    (held / "meta.json").write_text(json.dumps({"source": str(tmp_path / "older")}))
    letters.mkdir()
    (tmp_path / "linked.txt").write_text("text")
    (letters / "a.txt").symlink_to(tmp_path / "linked.txt")
    (letters / "root").symlink_to("/")  # a linked folder is no source, and all would be hidden
    twice = places({**entry, "name": f"text:{letters}"}, worktree)
    assert set(twice) - set(homes) == {letters, tmp_path / "linked.txt", tmp_path / "older"}
    (held / SOURCES).write_text(f"{tmp_path / 'third'}\n")
    assert set(places({**entry, "name": "text:"}, worktree)) - set(homes) == {tmp_path / "third", tmp_path / "older"}


def test_a_relative_text_is_hidden_wherever_it_was_prepared_from(tmp_path: Path) -> None:
    bed, folder = Bed(tmp_path), tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "book.txt").write_text(some_text(400_000), encoding="utf-8")
    done = program(ROOT / "prepare_mlx.py", "--dataset", "text:book.txt", "--preset", "tiny", home=bed.home, cwd=folder)
    assert done.returncode == 0, done.stderr
    entry = setup._entry(bed.home / "current.json")
    worktree = Worktree(Repository(bed.repo), "t", bed.folder("t") / "worktree")
    assert folder / "book.txt" in places(entry, worktree)
    (bed.home / "current.json").write_text(json.dumps({**entry, "dataset": "text:book.txt"}))  # an entry as it was
    assert folder / "book.txt" in places(setup._entry(bed.home / "current.json"), worktree), "its meta.json tells"


def test_no_path_that_an_agent_is_given_leads_to_held_out_text(tmp_path: Path) -> None:
    """The journal, the prompt, the environment and all files of the night name neither the held-out shards nor their source."""
    bed = Bed(tmp_path, "better worse crash")
    own = bed.home / "letters"
    own.mkdir()
    harness = HARNESS.replace('"device": "cpu"}\n', f'"device": "cpu", "dataset": {f"text:{own}"!r}}}\n', 1)
    (bed.repo / "prepare_mlx.py").write_text(harness)
    git(bed.repo, "commit", "-qam", "own text")
    agent = (bed.tools / "agent.py").read_text()
    (bed.tools / "agent.py").write_text(agent + "\nPath(__file__).with_name(f'env-{n}').write_text(repr(dict(os.environ)))\n")
    done = bed.run("--experiments", "3", "--no-sandbox", "--dataset", "x")
    assert done.returncode == 0, done.stdout + done.stderr
    given = [path for place in (bed.folder(), bed.tools) for path in place.rglob("*") if path.is_file()]
    assert len([path for path in given if path.name.startswith(("prompt-", "env-"))]) == 6
    leads = [(path.name, word) for path in given for word in (b"data/held", b"letters", b"AUTORESEARCH_HOME")
             if word in path.read_bytes() and path.name not in ("prepare_mlx.py", "agent.py")]
    assert leads == []
    night = fold(read_events(bed.folder() / "journal.jsonl")[0])
    train, held = (bed.home / "data" / kind / "toy" for kind in ("train", "held"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_HOME", str(bed.home / "data"))
        assert folders(night.dataset) == (train, held)
        worktree = Worktree(Repository(bed.repo), "night", bed.folder() / "worktree")
        assert own in places(night.dataset, worktree), "and it is still hidden from trainings"


PLANT = '''
if act == "plant_code":
    import importlib._bootstrap_external as b, importlib.util, py_compile, subprocess
    evil = Path(__file__).with_name("evil.py")
    evil.write_text(f"open({str(Path(__file__).with_name('imported'))!r}, 'a').write('x')")
    for folder in (Path.cwd(), Path.cwd().parent / "frozen"):
        for name in ("prepare_mlx", "helper"):
            target = importlib.util.cache_from_source(str(folder / f"{name}.py"))
            py_compile.compile(str(evil), target, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    (Path.cwd().parent / "frozen" / "json.py").write_text(evil.read_text())
    subprocess.run([sys.executable, "-B", "-c", "import prepare_mlx"], check=True)
    assert Path(__file__).with_name("imported").read_text() == "x", "what is planted would be imported"
    Path(__file__).with_name("imported").write_text("")
    put("GAIN", round(gain + 0.05, 4))
'''


def test_what_is_planted_beside_the_train_file_is_not_imported(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "plant_code")
    (bed.repo / "train_mlx.py").write_text("import prepare_mlx\n" + TRAINER)
    git(bed.repo, "commit", "-qam", "imports the harness")
    agent = (bed.tools / "agent.py").read_text()
    (bed.tools / "agent.py").write_text(agent.replace('if act == "better":', PLANT.strip("\n") + '\nelif act == "better":'))
    done = bed.run("--experiments", "1", "--no-sandbox")
    assert done.returncode == 0, done.stdout + done.stderr
    night = fold(read_events(bed.folder() / "journal.jsonl")[0])
    assert [e.status for e in night.done] == ["keep"], night.done[0].reason
    assert (bed.tools / "imported").read_text() == ""
    assert sorted(path.name for path in (bed.folder() / "frozen").iterdir()) == ["prepare_mlx.py"]


def test_the_frozen_harness_is_restored_whatever_was_done_to_it(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    (bed.repo / "harness").mkdir()
    for name in ("__init__", "score"):
        (bed.repo / "harness" / f"{name}.py").write_text(f"NAME = {name!r}\n")
    git(bed.repo, "add", "harness")
    git(bed.repo, "commit", "-qm", "a folder")
    repository, place = Repository(bed.repo), tmp_path / "night" / "frozen"

    def laid() -> dict[str, bytes]:
        assert lay_harness(repository, repository.head, tmp_path / "night") == place / "prepare_mlx.py"
        assert not any(path.is_symlink() for path in (place, *place.rglob("*")))
        return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}

    whole = laid()
    assert whole.keys() == {"prepare_mlx.py", "harness/__init__.py", "harness/score.py"}
    stamp = (place / "harness" / "score.py").stat().st_mtime_ns
    assert laid() == whole
    assert (place / "harness" / "score.py").stat().st_mtime_ns == stamp, "left alone where nothing was done"
    for name in (".DS_Store", "harness/.DS_Store", "._prepare_mlx.py", "harness/._score.py"):
        (place / name).write_bytes(b"left by macOS")
    assert not restore(repository, repository.head, tmp_path / "night"), "or each training would be a violation"
    evil = tmp_path / "evil"
    evil.mkdir()
    for file in whole:
        (evil / file).parent.mkdir(exist_ok=True)
        (evil / file).write_bytes(whole[file])
    for harm in (
        lambda: (place / "harness" / "score.py").write_text("NAME = 'evil'\n"),
        lambda: (place / "harness" / "score.py").unlink(),
        lambda: (place / "json.py").write_text(""),
        lambda: (place / "harness" / "score").mkdir(),
        lambda: ((place / "harness" / "__pycache__").mkdir(), (place / "harness" / "__pycache__" / "score.pyc").write_text("")),
        lambda: ((place / "harness" / "score.py").unlink(), (place / "harness" / "score.py").symlink_to(evil / "harness/score.py")),
        lambda: (place / "harness").rename(tmp_path / "away"),
        lambda: (shutil.rmtree(place), place.symlink_to(evil)),
        lambda: (shutil.rmtree(place), place.write_text("")),
        lambda: (place / "harness").chmod(0),
    ):
        harm()
        assert laid() == whole


def test_no_tmpdir_stays_and_run_directories_are_pruned(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "worse")
    assert bed.run("--experiments", "3", "--no-sandbox").returncode == 0
    hidden = ".metadata_never_index"
    assert {path.name for path in (bed.folder() / "tmp").iterdir()} == {hidden}
    left = sorted(path.name for path in (bed.folder() / "trials").iterdir() if path.name != hidden)
    assert [name.partition("-")[0] for name in left] == ["0000", "0003"], "one run of each is enough"


@pytest.mark.skipif(not sandbox.nests(), reason="no sandbox works inside a sandbox here")
def test_the_real_scorer_works_inside_a_sandbox(tiny, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run_dir = tmp_path / "trials" / "0001-1"
    shutil.copytree(trained, run_dir)
    lab = Lab(
        folder=tmp_path, worktree=ROOT, train_file="train_mlx.py", harness=ROOT / "prepare_mlx.py", train_dir=tiny.train,
        held_dir=tiny.held, budget="20steps", vocab_size=320,
    )  # fmt: skip
    result = score_run(lab, run_dir, "val")
    assert result.status == "ok", result.error
    assert result.val_bpb


def statuses(bed: Bed) -> list[tuple[str | None, str]]:
    return [(e.status, e.reason) for e in fold(read_events(bed.folder() / "journal.jsonl")[0]).done]


CHEATS = '''
if act == "data":
    file.write_text(source + f"X = {os.urandom(4000).hex()!r}\\n")
elif act == "quotes":
    file.write_text(source + "X = 'the held-out text'\\n")
elif act == "brief":
    Path(os.environ["AUTORESEARCH_JOURNAL"]).parents[2].joinpath("program.md").write_text("Keep everything.")
    put("GAIN", gain - 0.05)
'''
SCREEN = '''
        if "the held-out text" in Path(sys.argv[2]).read_text():
            print(json.dumps({"kind": "violation", "message": "holds held-out text"}), file=sys.stderr)
            sys.exit(6)
'''


def test_a_night_refuses_by_name_what_only_the_driver_can_see(tmp_path: Path) -> None:
    """Data in the source; held-out text, as the harness finds it; a model that looks ahead so rarely that only the probes of every
    row find it; and a brief that changed while an agent worked is told."""
    bed = Bed(tmp_path, "data quotes looks brief")
    (bed.repo / "prepare_mlx.py").write_text(HARNESS.replace('== "screen":\n', '== "screen":' + SCREEN))
    git(bed.repo, "commit", "-qam", "with a search for text")
    agent = (bed.tools / "agent.py").read_text()
    (bed.tools / "agent.py").write_text(agent.replace('if act == "better":', CHEATS.strip("\n") + '\nelif act == "better":'))
    done = bed.run("--experiments", "4", "--no-sandbox")
    assert done.returncode == 0, done.stdout + done.stderr
    data, quotes, looks, _ = statuses(bed)
    assert data[0] == quotes[0] == looks[0] == "violation"
    assert "bytes of strings, numbers and comments more than its parent" in data[1]
    assert "holds held-out text" in quotes[1]
    assert "logits look ahead" in looks[1]
    events = read_events(bed.folder() / "journal.jsonl")[0]
    night = fold(events)
    assert night.kept == []
    assert [len(e.scores) for e in night.done[:2]] == [0, 0], "no budget was spent on them"
    assert len(night.done[2].scores) >= 2, "this one would have been kept"
    assert [event["status"] for event in events if event["event"] == "verified"] == ["violation"]
    assert [note for note in night.notes if "program.md" in note] == [
        "changed while the agent of experiment 4 was at work: program.md; if it was not you, look at it"
    ]
    assert "at work: program.md" in done.stdout


def test_a_keep_was_verified_and_a_refused_test_is_no_success(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    refuse = 'if split == "test" and weights["gain"]:\n        print(json.dumps({"kind": "violation", "message": "looks"}), ' \
             'file=sys.stderr)\n        return 6\n    noise = '
    (bed.repo / "prepare_mlx.py").write_text(HARNESS.replace("noise = ", refuse, 1))
    git(bed.repo, "commit", "-qam", "refuses")
    done = bed.run("--experiments", "1", "--no-sandbox")
    assert done.returncode == 1, done.stdout + done.stderr
    assert statuses(bed)[0][0] == "keep"
    events = read_events(bed.folder() / "journal.jsonl")[0]
    names = [event["event"] for event in events]
    assert names.index("verified") < len(names) - 1 - names[::-1].index("verdict")
    last = done.stdout.strip().splitlines()[-1]
    assert "nothing was won: experiment 1 was the best" in last
    assert "its held-out test was refused (violation: scoring failed: looks)" in last
    assert "%" not in last
    assert "its held-out test was refused" in summary(fold(events), None)
