"""The user's own text in all its kinds, duplicates, splits, too small a text, and a preparation that is cut off."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from conftest import ROOT, environment, prepare, some_text
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import HarnessError, corpus
from harness.corpus import DROPPED, TEST, TRAIN, VAL, Block, choose_splits, passages, read_block
from harness.tokenizer import Tokenizer

DOCUMENTS = [some_text(600, seed) for seed in range(100)]


def write(folder: Path, kind: str) -> None:
    """The same hundred documents as one file of a kind."""
    lines = "".join(json.dumps({"id": 1, "text": d}) + "\n" for d in DOCUMENTS)
    marked = "\n<|endoftext|>\n".join(DOCUMENTS)
    folder.mkdir()
    if kind == "parquet":
        parquet.write_table(pa.table({"text": DOCUMENTS, "n": range(100)}), folder / "a.parquet", row_group_size=30)
    elif kind.endswith(".gz"):
        (folder / f"a.{kind}").write_bytes(gzip.compress((lines if "jsonl" in kind else marked).encode()))
    elif kind == "folder":
        (folder / "deep").mkdir()
        for i, document in enumerate(DOCUMENTS):
            (folder / "deep" / f"{i:03d}.{'md' if i % 2 else 'txt'}").write_text(document, encoding="utf-8")
        (folder / "deep" / "image.png").write_bytes(b"\xff\xd8")
        (folder / ".hidden.txt").write_text("not this")
    else:
        (folder / f"a.{kind}").write_text(lines if kind.lower() == "jsonl" else marked, encoding="utf-8")


def run(home, path, *more):
    return prepare("--dataset", f"text:{path}", "--preset", "tiny", "--json", home / "entry.json", *more, home=home)


def meta_of(home) -> dict:
    return json.loads((Path(json.loads((home / "entry.json").read_text())["held_dir"]) / "meta.json").read_text())


@pytest.mark.parametrize("kind", ["txt", "md", "JSONL", "parquet", "txt.gz", "jsonl.gz", "folder"])
def test_every_kind_of_text_gives_the_same_documents(tmp_path, kind):
    write(tmp_path / "in", kind)
    done = run(tmp_path, tmp_path / "in")
    assert done.returncode == 0, done.stderr
    meta = meta_of(tmp_path)
    assert meta["bytes"] == sum(len(d.strip("\n").encode() if "txt" in kind or kind == "md" else d.encode()) for d in DOCUMENTS)
    assert meta["documents"] >= 100
    assert (meta["duplicates"], meta["near_duplicates"], meta["invalid_utf8"], meta["empty"]) == (0, 0, 0, 0)


def test_another_field_and_column(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in DOCUMENTS))
    assert run(tmp_path, tmp_path / "a.jsonl", "--field", "body").returncode == 0
    done = run(tmp_path, tmp_path / "a.jsonl")
    assert done.returncode == 2
    assert "expected one JSON object per line with a string field 'text', got KeyError('text')" in done.stderr
    assert "name the field with --field" in done.stderr


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.jsonl", b'{"text": 5}\n', "expected one JSON object per line"),
    ("a.jsonl", b'{"text": "x"', "expected one JSON object per line"),
    ("a.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-20], "cannot be read as .gz, it is damaged or incomplete"),
    ("a.txt.gz", b"plain", "cannot be read as .gz, it is damaged or incomplete"),
    ("a.parquet", b"PAR1 no", "cannot be read as .parquet, it is damaged or incomplete"),
    ("a.txt", b"", "expected text, but found no document in 1 files (0 invalid_utf8, 0 empty)"),
    ("a.txt", b"\xff\xfe\x00a", "expected text, but found no document in 1 files (1 invalid_utf8, 0 empty)"),
    ("a.txt", b" \n\n \t", "(0 invalid_utf8, 1 empty)"),
    ("a.pdf", b"x", "expected a file or folder of .txt, .md, .jsonl, .parquet (or .gz of them)"),
    ("a.txt", b"only a little text", "the text is too small: 18 bytes in 1 documents, expected at least about 1,920"),
])
def test_what_cannot_be_used_is_an_error_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    done = run(tmp_path, tmp_path / name)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "train").exists()


def test_a_column_that_is_absent_or_no_text_is_named(tmp_path):
    parquet.write_table(pa.table({"n": [1, 2]}), tmp_path / "a.parquet")
    for more in ((), ("--field", "n")):
        done = run(tmp_path, tmp_path / "a.parquet", *more)
        assert done.returncode == 2
        wanted = more[1] if more else "text"
        assert f"expected a text column {wanted!r}, it has {{'n': 'int64'}}; choose one with --field" in done.stderr


def test_what_is_skipped_is_counted(tmp_path):
    texts = [d.encode() for d in DOCUMENTS] + [b"\xff broken", b"  \n", DOCUMENTS[0].encode(),
                                               DOCUMENTS[1].upper().replace(" ", "  ").encode()]
    (tmp_path / "a.txt").write_bytes(b"\n<|endoftext|>\n".join(texts))
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).rename(tmp_path / "in" / name)
    assert run(tmp_path, tmp_path / "in").returncode == 0
    meta = meta_of(tmp_path)
    assert {k: meta[k] for k in ("documents", "duplicates", "near_duplicates", "invalid_utf8", "empty", "empty_files")} == {
        "documents": 102, "duplicates": 1, "near_duplicates": 1, "invalid_utf8": 1, "empty": 1, "empty_files": 1}


def test_a_small_text_says_how_much_is_missing(tmp_path):
    (tmp_path / "a.txt").write_text(some_text(50_000), encoding="utf-8")
    done = run(tmp_path, tmp_path / "a.txt")
    assert done.returncode == 0
    meta = meta_of(tmp_path)
    assert f"note: val has {meta['val_bytes']:,} bytes, " in done.stderr
    assert f"{16_000 - meta['val_bytes']:,} fewer than the preset scores" in done.stderr
    assert "160,000 bytes of text would be enough" in done.stderr


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5000)), min_size=1, max_size=200), st.integers(1, 50_000))
@settings(max_examples=100, deadline=None)
def test_splits_are_disjoint_full_and_say_the_same_for_the_same_text(pairs, eval_bytes):
    rng = np.random.default_rng(0)
    by_text = rng.integers(0, 2**63, 41).astype(np.uint64)
    digests = np.array([(by_text[text], i) for i, (text, _) in enumerate(pairs)], np.uint64)
    sizes = np.array([size for _, size in pairs])
    splits = choose_splits(digests, sizes, eval_bytes)
    kept = [text for (text, _), split in zip(pairs, splits, strict=True) if split != DROPPED]
    assert sorted(kept) == sorted({text for text, _ in pairs}), "one of each text stays"
    limit = min(eval_bytes, sizes[splits != DROPPED].sum() // 10)
    assert sizes[splits == VAL].sum() >= limit
    assert sizes[splits == VAL].sum() + sizes[splits == TEST].sum() + sizes[splits == TRAIN].sum() == sizes[splits != DROPPED].sum()
    assert np.array_equal(choose_splits(digests, sizes, eval_bytes), splits)


@given(st.text("ab \n", max_size=3000), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_passages_joined_are_the_text(text, size):
    parts = passages(text.encode(), size)
    assert b"".join(parts) == text.encode()
    assert all(parts) or not text


def test_text_without_white_space_is_cut_between_characters():
    text = "日本語" * 20_000
    assert "".join(p.decode() for p in passages(text.encode(), 2048)) == text


def test_blocks_cover_a_file_and_cut_no_document(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 5000)
    (tmp_path / "a.txt").write_bytes(b"".join(d.encode() + b"<|endoftext|>\n" for d in DOCUMENTS))
    blocks = corpus.blocks_of(tmp_path / "a.txt", "text", tmp_path)
    assert len(blocks) > 5
    assert [b.start for b in blocks[1:]] == [b.end for b in blocks[:-1]]
    read = [read_block(block) for block in blocks]
    assert [d for documents, _ in read for d in documents] == [d.strip("\n") for d in DOCUMENTS]
    assert all(skipped == {"invalid_utf8": 0, "empty": 0} for _, skipped in read), "a separator at the end makes no document"


def test_a_parquet_file_of_one_huge_row_group_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 4000)
    parquet.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet", compression=None)
    blocks = corpus.blocks_of(tmp_path / "a.parquet", "text", tmp_path)
    assert len(blocks) > 5
    assert [d for block in blocks for d in read_block(block)[0]] == DOCUMENTS


def test_a_line_of_json_longer_than_many_blocks_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 4000)
    texts = [DOCUMENTS[0], some_text(50_000), *DOCUMENTS[1:9]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in texts))
    blocks = corpus.blocks_of(tmp_path / "a.jsonl", "text", tmp_path)
    assert len(blocks) > 2
    assert [d for block in blocks for d in read_block(block)[0]] == texts


def test_blocks_of_text_without_white_space_end_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 4000)
    (tmp_path / "a.txt").write_text("日本語" * 5000, encoding="utf-8")
    read = [read_block(block) for block in corpus.blocks_of(tmp_path / "a.txt", "text", tmp_path)]
    assert len(read) > 5
    assert "".join(d for documents, _ in read for d in documents) == "日本語" * 5000
    assert not sum(skipped["invalid_utf8"] for _, skipped in read)


def test_a_book_is_cut_so_that_it_cannot_be_a_whole_split(tmp_path):
    book = some_text(400_000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": book}) + "\n")
    documents, _ = read_block(Block(str(tmp_path / "a.jsonl"), 0, 10**9))
    assert "".join(documents) == book
    assert max(map(len, documents)) < 140_000


@pytest.mark.parametrize(("place", "name"), [("train", "train.bin"), ("train", "tokenizer.model"), ("held", "val.bin")])
def test_a_prepared_file_that_changed_is_noticed_and_made_again(tmp_path, place, name):
    (tmp_path / "a.txt").write_text(some_text(60_000), encoding="utf-8")
    assert run(tmp_path, tmp_path / "a.txt").returncode == 0
    entry = json.loads((tmp_path / "entry.json").read_text())
    file = Path(entry[f"{place}_dir"]) / name
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    done = run(tmp_path, tmp_path / "a.txt")
    assert done.returncode == 0
    assert f"note: {file} is not the file of {len(good):,} bytes that was prepared; preparing it again" in done.stderr
    assert file.read_bytes() == good
    assert json.loads((tmp_path / "entry.json").read_text()) == entry


def test_other_text_and_another_vocabulary_get_a_tokenizer_of_their_own(tmp_path):
    (tmp_path / "a.txt").write_text(some_text(60_000, 1), encoding="utf-8")
    hashes = []
    for change in (None, "text", "vocabulary"):
        if change == "text":
            (tmp_path / "a.txt").write_text(some_text(60_000, 2).replace("e", "ø"), encoding="utf-8")
        assert run(tmp_path, tmp_path / "a.txt", *(("--vocab-size", 400) if change == "vocabulary" else ())).returncode == 0
        entry = json.loads((tmp_path / "entry.json").read_text())
        tokens = np.fromfile(Path(entry["train_dir"]) / "train.bin", np.uint16)
        tokenizer = Tokenizer((Path(entry["train_dir"]) / "tokenizer.model").read_bytes())
        text = (tmp_path / "a.txt").read_text(encoding="utf-8")
        assert all(part in text for part in tokenizer.decode(tokens).split("\n\n")[:5])
        hashes.append(entry["tokenizer_hash"])
    assert len(set(hashes)) == 3


def test_unknown_names_are_refused_with_what_there_is(tmp_path):
    done = prepare("--dataset", "tinystory", home=tmp_path)
    assert done.returncode == 2
    assert "unknown dataset 'tinystory'; expected one of stories, tinystories, climbmix, fineweb-edu or text:PATH" in done.stderr
    done = prepare("--dataset", "stories", "--preset", "huge", home=tmp_path)
    assert "unknown preset 'huge'; expected one of tiny, demo, cpu, mac, mac-max, cuda" in done.stderr


def test_list_shows_source_and_licence(tmp_path):
    lines = prepare("--list", home=tmp_path).stdout.splitlines()
    for name, (licence, source, _, revision) in corpus.DATASETS.items():
        assert any(line.startswith(name) and all(word in line for word in (licence, source, revision)) for line in lines)


def big(path: Path, megabytes: int) -> None:
    with open(path, "w", encoding="utf-8") as out:
        for seed in range(megabytes):
            out.write(some_text(1_000_000, seed))


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_preparation_that_is_cut_off_goes_on_and_ends_the_same(tmp_path, how):
    (tmp_path / "a").mkdir()
    for i in range(10):  # a block each
        (tmp_path / "a" / f"{i}.txt").write_text(some_text(600_000, i), encoding="utf-8")
    argv = [sys.executable, ROOT / "prepare_mlx.py", "--dataset", f"text:{tmp_path / 'a'}", "--preset", "tiny"]
    process = subprocess.Popen(argv, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    work, deadline = tmp_path / "work", time.monotonic() + 100
    while not list(work.glob("*/parts/*-*.bin")) and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, how)
    said = process.communicate()[1]
    assert process.returncode != 0
    assert not (tmp_path / "train").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert said.splitlines()[-1] == "interrupted; run the same command again to continue from here"
    kept = {p: p.stat().st_mtime_ns for p in work.glob("*/parts/*") if p.suffix != ".tmp"}
    assert len([p for p in kept if p.suffix == ".digests"]) == 10
    gone = psutil.wait_procs(workers, timeout=10)
    assert not gone[1], "a killed parent takes its workers along"

    hold = subprocess.Popen(argv, env=environment(tmp_path), stdout=subprocess.PIPE, text=True)
    changed = False
    while hold.poll() is None:
        for p, stamp in kept.items():
            changed |= p.exists() and p.stat().st_mtime_ns != stamp
        time.sleep(0.02)
    assert hold.returncode == 0
    assert not changed, "what was done is not done again"
    assert "ready: a-320-" in hold.stdout.read()
    hold.stdout.close()
    whole = prepare("--dataset", f"text:{tmp_path / 'a'}", "--preset", "tiny", home=tmp_path / "other")
    assert whole.returncode == 0
    [one], [other] = list((tmp_path / "train").iterdir()), list((tmp_path / "other" / "train").iterdir())
    assert (one / "train.bin").read_bytes() == (other / "train.bin").read_bytes()


def told(home) -> tuple[dict, str]:
    """The meta.json of the held-out stories of a home, and their text as it lies there."""
    [meta], [text] = home.glob("held/*/meta.json"), home.glob("held/*.txt")
    return json.loads(meta.read_text()), text.read_text()


def test_held_out_stories_are_nobodys_to_make_again_and_stay_what_they_are(tmp_path):
    """Not even the same command makes them a second time elsewhere; but it finds those that are there, whatever was lost."""
    one, other = tmp_path / "one", tmp_path / "other"
    for home in (one, other):
        assert prepare("--dataset", "stories", "--preset", "tiny", home=home).returncode == 0
    (train,), (train_too,) = one.glob("train/*"), other.glob("train/*")
    (meta, text), (meta_too, text_too) = told(one), told(other)
    assert (train / "train.bin").read_bytes() == (train_too / "train.bin").read_bytes(), "what is trained on is the same for all"
    tokenizer = Tokenizer((train / "tokenizer.model").read_bytes())
    trained = tokenizer.decode(np.fromfile(train / "train.bin", np.uint16))
    stories, stories_too = (set(t.split("\n<|endoftext|>\n")) for t in (text, text_too))
    assert not stories & stories_too
    assert not any(story in trained for story in stories)
    assert meta["data_hash"] != meta_too["data_hash"], "their scores are never compared"
    for split in ("val", "test"):
        held = np.fromfile(one / "held" / train.name / f"{split}.bin", np.uint16)
        assert all(tokenizer.decode(part[1:]) in stories for part in np.split(held, np.flatnonzero(held == tokenizer.bos_id))[1:])
        assert 16_000 <= meta[f"{split}_bytes"] < 24_000
    for lost in (train, one / "held" / train.name):
        shutil.rmtree(lost)
        assert prepare("--dataset", "stories", "--preset", "tiny", home=one).returncode == 0
        assert told(one) == (meta, text)
    assert (one / "held").stat().st_mode & 0o077 == 0


def test_stories_that_were_cut_off_keep_what_was_held_out(tmp_path):
    argv = [sys.executable, ROOT / "prepare_mlx.py", "--dataset", "stories", "--preset", "tiny"]
    process = subprocess.Popen(argv, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("work/*/parts/*.digests")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "train").exists()
    [sealed] = tmp_path.glob("held/*.txt")
    text = sealed.read_text()
    assert prepare("--dataset", "stories", "--preset", "tiny", home=tmp_path).returncode == 0
    meta, after = told(tmp_path)
    assert after == text
    assert meta["val_bytes"] + meta["test_bytes"] == sum(len(story) for story in text.split("\n<|endoftext|>\n"))


@pytest.mark.slow
def test_all_cores_and_bounded_memory(tmp_path):
    """64 MB of text: memory does not grow with it, and every core has a worker."""
    big(tmp_path / "a.txt", 64)
    argv = [sys.executable, ROOT / "prepare_mlx.py", "--dataset", f"text:{tmp_path / 'a.txt'}", "--preset", "cpu"]
    process = subprocess.Popen(argv, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = workers = 0
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in family))
            workers = max(workers, sum(p.memory_info().rss > 30e6 for p in family[1:]))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    assert process.returncode == 0
    assert peak < 2e9
    assert workers >= min(os.cpu_count(), 8)


def test_a_lone_surrogate_in_json_is_counted_as_no_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}\n{"text": "fine"}\n')
    assert read_block(Block(str(tmp_path / "a.jsonl"), 0, 100)) == (["fine"], {"invalid_utf8": 1, "empty": 0})


def test_disk_names_do_not_depend_on_odd_paths(tmp_path):
    folder = tmp_path / "Ünï cödé & spaces"
    folder.mkdir()
    (folder / "ſtrange name.txt").write_text(some_text(60_000), encoding="utf-8")
    assert run(tmp_path, folder / "ſtrange name.txt").returncode == 0
    assert json.loads((tmp_path / "entry.json").read_text())["id"].isascii()


def test_an_error_of_the_harness_names_its_exit_code():
    assert [HarnessError(k, "").exit_code for k in ("data", "usage", "violation", "else")] == [2, 2, 6, 1]
