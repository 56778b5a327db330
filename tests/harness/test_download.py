"""Hub datasets against a real server that misbehaves: a whole dataset, or a clear error and a state to go on from."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from conftest import ROOT, environment, prepare, some_text
from hub_server import REVISION, Hub
from huggingface_hub import constants

from harness import HarnessError, corpus, download
from harness.corpus import DATASETS, UPSTREAM
from harness.score import read_held_out


def shard(seed: int) -> bytes:
    """A parquet file of 300 documents, about 190 KB."""
    texts = [some_text(500, seed * 1000 + i) for i in range(300)]
    out = io.BytesIO()
    parquet.write_table(pa.table({"text": texts}), out, row_group_size=100, compression=None)
    return out.getvalue()


FILES = {f"data/train-0000{i}.parquet": shard(i) for i in range(3)} | {"README.md": b"# a data set"}
FIRST, SECOND, THIRD = sorted(FILES)[1:]
PINNED = DATASETS["tinystories"][3]


@pytest.fixture
def hub():
    with Hub(FILES) as server:
        yield server


NOWHERE = "http://127.0.0.1:9"


def fetch(hub, home, *, dataset="tinystories", preset="tiny", url="", token="", said=None, **options) -> dict | str:
    """Prepare a hub dataset in this process, which reads the address of the hub once, at its import. Returns the entry, or the
    error's text; `said` takes what is printed meanwhile."""
    url = url or hub.url
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said or io.StringIO()):
        patch.setenv("AUTORESEARCH_HOME", str(home))
        patch.setenv("HF_TOKEN", token)
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(download, "FIRST_WAIT", 0.01)
        try:
            return corpus.prepare(dataset, preset, **options)
        except HarnessError as error:
            if error.exit_code != 2:
                raise
            return str(error)


def fetch_upstream(hub, home, **options):
    """With few tokens, because the text is small."""
    return fetch(hub, home, dataset="climbmix", preset="upstream", vocab_size=320, **options)


def ranges(hub, name):
    """Where each GET of a file began."""
    return [r for method, path, r, _ in hub.requests if method == "GET" and path.endswith(name)]


def is_whole(home, entry, files=(FIRST,), revision=PINNED):
    assert isinstance(entry, dict), entry
    assert entry["id"].startswith("tinystories-320-")
    [place] = (home / "train").iterdir()
    meta = json.loads((place / "meta.json").read_text())
    assert meta["revision"] == revision
    assert [(f["bytes"], f["sha256"]) for f in meta["files"]] == [
        (len(FILES[name]), hashlib.sha256(FILES[name]).hexdigest()) for name in files]
    assert meta["documents"] == 300 * len(files)


def is_refused(home, why, said):
    assert isinstance(why, str)
    assert said in why
    assert not (home / "train").exists()
    assert not (home / "current.json").exists()


def run(hub, home, **env):
    """The program itself, as a process."""
    return prepare("--dataset", "tinystories", "--preset", "tiny", "--json", home / "entry.json", home=home,
                   **{"HF_ENDPOINT": hub.url, **env})


def test_chosen_shards_only_and_then_no_network(hub, tmp_path):
    is_whole(tmp_path, fetch(hub, tmp_path, shards=2), (FIRST, SECOND))
    assert ranges(hub, THIRD) == ranges(hub, "README.md") == []
    again = fetch(hub, tmp_path, shards=2, url=NOWHERE)
    is_whole(tmp_path, again, (FIRST, SECOND))


def test_the_commit_is_the_pinned_one_or_the_given_one(hub, tmp_path):
    is_whole(tmp_path / "pinned", fetch(hub, tmp_path / "pinned"))
    assert f"/api/datasets/karpathy/tinystories-gpt4-clean/revision/{PINNED}" in [path for _, path, *_ in hub.requests]
    is_whole(tmp_path / "given", fetch(hub, tmp_path / "given", revision="a" * 40), revision="a" * 40)
    is_whole(tmp_path / "branch", fetch(hub, tmp_path / "branch", revision="main"), revision=REVISION)
    files = [path.split("/resolve/")[1] for method, path, *_ in hub.requests if method == "GET" and "/resolve/" in path]
    assert files == [f"{commit}/{FIRST}" for commit in (PINNED, "a" * 40, REVISION)]
    names = [name for name, *_ in (p.parts[-1:] for p in tmp_path.glob("*/train/*"))]
    assert len(set(names)) == 3, "another commit is another dataset"
    again = fetch(hub, tmp_path / "branch", revision="main", url=NOWHERE)
    is_whole(tmp_path / "branch", again, revision=REVISION)


def test_the_preset_upstream_scores_upstreams_validation_file(tmp_path):
    files = {f"shard_0000{i}.parquet": shard(i) for i in range(3)} | {UPSTREAM[1]: shard(9)}
    with Hub(files) as server:
        said = io.StringIO()
        entry = fetch_upstream(server, tmp_path, shards=2, said=said)
        assert isinstance(entry, dict), entry
        assert entry["id"].startswith("climbmix-320-")
        size = sum(len(files[name]) for name in ("shard_00000.parquet", "shard_00001.parquet", UPSTREAM[1]))
        assert said.getvalue().startswith(
            f"to download: {size / 1e9:.2f} GB from karpathy/climbmix-400b-shuffle, 3 of 3 files: shard_00000.parquet, "
            f"shard_00001.parquet, {UPSTREAM[1]} (validation and test text)\nto {tmp_path}/downloads/")
        assert ranges(server, "shard_00002.parquet") == []
        assert f"/api/datasets/karpathy/climbmix-400b-shuffle/revision/{DATASETS['climbmix'][3]}" in [
            path for _, path, *_ in server.requests]
    [train], [held] = (tmp_path / "train").iterdir(), [p for p in (tmp_path / "held").iterdir() if p.is_dir()]
    meta = json.loads((train / "meta.json").read_text())
    assert [f["name"] for f in meta["files"]] == ["shard_00000.parquet", "shard_00001.parquet", UPSTREAM[1]]
    assert (meta["seq_len"], meta["budget"]) == (2048, "300s")
    texts = {name: parquet.read_table(io.BytesIO(data)).column("text").to_pylist() for name, data in files.items()}
    _, tokenizer, val, _text = read_held_out(held, "val")
    documents = [tokenizer.decode_bytes(d).decode() for d in np.split(val, np.flatnonzero(val == meta["bos_id"])[1:])]
    own = [t for t in texts[UPSTREAM[1]] if t in set(documents)]
    assert documents == own, "in the order of the file"
    assert 100 < len(own) < 200, "the other half is the test"
    trained = tokenizer.decode_bytes(np.fromfile(train / "train.bin", dtype=meta["dtype"])).decode()
    assert trained.startswith(texts["shard_00000.parquet"][0])
    assert not any(t in trained for t in texts[UPSTREAM[1]])
    assert prepare("--preset", "upstream", "--dataset", "stories", home=tmp_path).stderr.startswith(
        "error: the preset upstream scores a file of climbmix")


def test_upstreams_validation_file_has_to_be_there(tmp_path):
    with Hub({"shard_00000.parquet": shard(1)}) as server:
        is_refused(tmp_path, fetch_upstream(server, tmp_path), f"expected {UPSTREAM[1]}, the file with the validation text")


def test_another_commit_than_the_pinned_one_is_refused(hub, tmp_path):
    hub.misbehave("list", "wrong")
    is_refused(tmp_path, fetch(hub, tmp_path), f"karpathy/tinystories-gpt4-clean: expected commit {PINNED}, got {REVISION}")
    is_whole(tmp_path, fetch(hub, tmp_path))


def test_what_has_no_commits_is_asked_for_none(tmp_path):
    done = prepare("--dataset", "stories", "--preset", "tiny", "--revision", "main", home=tmp_path)
    assert done.returncode == 2
    assert "--revision main: stories is not a hub dataset" in done.stderr


def test_another_preset_of_what_is_there_needs_no_network(hub, tmp_path):
    is_whole(tmp_path, fetch(hub, tmp_path))
    entry = fetch(hub, tmp_path, vocab_size=256, url=NOWHERE)
    assert isinstance(entry, dict), entry
    assert entry["id"].startswith("tinystories-256-")


@pytest.mark.parametrize("behaviour", ["drop 70000", "429", "503", "truncate 5000", "wrong"])
def test_after_one_mishap_the_dataset_is_whole(hub, tmp_path, behaviour):
    hub.misbehave(FIRST, behaviour)
    is_whole(tmp_path, fetch(hub, tmp_path))
    assert len(ranges(hub, FIRST)) >= 2


def test_a_dropped_download_goes_on_where_it_was(hub, tmp_path):
    hub.misbehave(FIRST, "drop 70000")
    is_whole(tmp_path, fetch(hub, tmp_path))
    assert ranges(hub, FIRST) == [None, "bytes=65536-"]


def test_the_list_is_asked_for_again(hub, tmp_path):
    hub.misbehave("list", "503", "429")
    is_whole(tmp_path, fetch(hub, tmp_path))


@pytest.mark.parametrize(("name", "behaviour", "said"), [
    (SECOND, "wrong", "expected SHA-256"),
    (SECOND, "503", "503"),
    (SECOND, "truncate 5000", "Consistency check failed"),
    ("list", "503", f"tinystories-gpt4-clean at {PINNED} could not be fetched"),
])
def test_lasting_trouble_is_a_clear_error_and_later_it_goes_on(hub, tmp_path, name, behaviour, said):
    hub.misbehave(name, *[behaviour] * 20)
    is_refused(tmp_path, fetch(hub, tmp_path, shards=2), said)
    hub.plans.clear()
    before = len(ranges(hub, FIRST))
    is_whole(tmp_path, fetch(hub, tmp_path, shards=2), (FIRST, SECOND))
    if name != "list":
        assert len(ranges(hub, FIRST)) == before == 1, "the first shard was kept"


def test_lasting_trouble_is_named_after_so_many_tries(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    tried = []

    def once():
        tried.append(1)
        raise OSError("expected SHA-256 1, got 2")
    with pytest.raises(HarnessError, match=r"a file could not be fetched: OSError: expected SHA-256 1, got 2\. Run"):
        download.patiently("a file", once)
    assert len(tried) == download.TRIES


def test_a_killed_download_goes_on_where_it_was(hub, tmp_path):
    hub.misbehave(FIRST, "stall 150000")
    process = subprocess.Popen([sys.executable, ROOT / "prepare_mlx.py", "--dataset", "tinystories", "--preset", "tiny"],
                               env=environment(tmp_path, HF_ENDPOINT=hub.url), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    place = tmp_path / "downloads"
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size >= 131072 for p in place.rglob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "train").exists()
    is_whole(tmp_path, fetch(hub, tmp_path))
    assert ranges(hub, FIRST) == [None, "bytes=131072-"]


def test_two_presets_at_once_share_one_download(hub, tmp_path):
    hub.misbehave(FIRST, "drop 70000")
    argv = [sys.executable, ROOT / "prepare_mlx.py", "--dataset", "tinystories", "--preset"]
    both = [subprocess.Popen([*argv, preset], env=environment(tmp_path, HF_ENDPOINT=hub.url), stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for preset in ("tiny", "demo")]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert ranges(hub, FIRST) == [None, "bytes=65536-"]
    assert len(list((tmp_path / "train").iterdir())) == 2


def test_what_will_not_get_better_is_said_at_once(hub, tmp_path):
    hub.token = "hf_right"
    started = time.monotonic()
    is_refused(tmp_path, fetch(hub, tmp_path, token="hf_wrong"), "could not be fetched")
    assert len([r for r in hub.requests if "/api/datasets/" in r[1]]) == 1
    assert time.monotonic() - started < 60
    is_whole(tmp_path, fetch(hub, tmp_path, token="hf_right"))
    assert {auth for *_, auth in hub.requests[-2:]} == {"Bearer hf_right"}


def test_a_proxy_is_used(hub, tmp_path):
    done = run(hub, tmp_path, HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=hub.url, http_proxy=hub.url, NO_PROXY="", no_proxy="")
    assert done.returncode == 0, done.stderr
    assert "ready: tinystories-320-" in done.stdout
    is_whole(tmp_path, json.loads((tmp_path / "entry.json").read_text()))


def test_what_does_not_fit_on_the_disk_is_not_begun(hub, tmp_path, monkeypatch):
    """What is here already needs no room, and a part of a file only the rest."""
    chosen = [{"name": f"{i}.parquet", "bytes": 10**9} for i in range(3)]
    monkeypatch.setattr(download.shutil, "disk_usage", lambda place: SimpleNamespace(free=1_500_000_000))
    with pytest.raises(HarnessError, match=r"karpathy/x: 3\.00 GB to download, 1\.50 GB free on the disk of .*set AUTORES"):
        download.announce("karpathy/x", chosen, tmp_path, "")
    (tmp_path / "0.parquet").touch()
    with open(tmp_path / "1.parquet.part", "wb") as part:
        part.truncate(600_000_000)
    download.announce("karpathy/x", chosen, tmp_path, "")


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["refused", "forbidden"])
def test_no_server_at_all(tmp_path, offline):
    """With the preset that is large: the machine is offline, and says so within seconds."""
    started = time.monotonic()
    done = prepare("--preset", "upstream", home=tmp_path, **offline)
    assert time.monotonic() - started < download.FIRST_WAIT * 2**download.TRIES, "no more than two tries"
    assert done.returncode == 2, done.stderr
    is_refused(tmp_path, done.stderr, "the list of karpathy/climbmix-400b-shuffle at")
    assert "could not be fetched: " + ("OfflineModeIsEnabled" if offline else "ConnectError") in done.stderr
    assert "Run the same command again to continue" in done.stderr
    assert "`--dataset stories` needs no network" in done.stderr


def test_a_shard_that_is_no_parquet_is_named(tmp_path):
    with Hub({FIRST: FILES[FIRST][:-100]}) as server:
        is_refused(tmp_path, fetch(server, tmp_path), "cannot be read as .parquet, it is damaged or incomplete")
