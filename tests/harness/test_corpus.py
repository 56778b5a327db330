"""A prepared dataset: splits without duplicates and copies, too small a text, and a preparation that is cut off."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, environment, prepare, some_text
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import HarnessError, corpus
from harness.corpus import DROPPED, TEST, TRAIN, VAL, choose_splits, held_out_limit, without
from harness.overlap import code_points, letters_of
from harness.tokenizer import Tokenizer

DOCUMENTS = [some_text(600, seed) for seed in range(100)]


def run(home, path, **options) -> tuple[dict | None, str]:
    """Prepare a text in this process. Returns the entry, None after an error, and what was said on standard error."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setenv("AUTORESEARCH_HOME", str(home))
        try:
            return corpus.prepare(f"text:{path}", "tiny", **options), said.getvalue()
        except HarnessError as error:
            if error.exit_code != 2:
                raise
            return None, f"{said.getvalue()}error: {error}"


def meta_of(entry) -> dict:
    return json.loads((Path(entry["held_dir"]) / "meta.json").read_text())


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.jsonl", b'{"text": 5}\n', "expected an object with a string field 'text', got an object with 'text'"),
    ("a.txt.gz", b"plain", "100 % of the text: cannot be read as .gz, it is damaged or incomplete"),
    ("a.txt", b"", "expected text, but found no document in 1 files (0 empty)"),
    ("a.txt", b" \n\n \t", "(1 empty)"),
    ("a.pdf", b"%PDF\0", "expected a file or folder of text, .jsonl, .ndjson, .json, .csv, .tsv, .parquet (or .gz, .bz2, .xz, .zst "
     "of them); found none among 1 files (a.pdf: .pdf that is no UTF-8 text is not read)"),
    ("a.txt", b"only a little text", "the text is too small: 18 bytes in 1 documents, expected at least about 1,920"),
])
def test_what_cannot_be_used_is_an_error_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    entry, why = run(tmp_path, tmp_path / name)
    assert entry is None
    assert said in why
    assert not (tmp_path / "train").exists()


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    done = prepare("--dataset", f"text:{tmp_path / 'a.txt'}", "--preset", "tiny", home=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: text:")
    assert "Traceback" not in done.stderr


def test_what_is_skipped_is_counted(tmp_path):
    (tmp_path / "in").mkdir()
    texts = [*DOCUMENTS, "  \n", DOCUMENTS[0], DOCUMENTS[1].upper().replace(" ", "  ")]
    (tmp_path / "in" / "a.txt").write_bytes("\n<|endoftext|>\n".join(texts).encode() + b" \xff bad")
    (tmp_path / "in" / "b.txt").write_bytes(b"")
    entry, said = run(tmp_path, tmp_path / "in")
    assert entry, said
    meta = meta_of(entry)
    assert {k: meta[k] for k in ("documents", "duplicates", "near_duplicates", "bytes_left_out", "empty", "empty_files")} == {
        "documents": 102, "duplicates": 1, "near_duplicates": 0, "bytes_left_out": 1, "empty": 1, "empty_files": 1}
    assert f"{tmp_path}/in/a.txt: 1 bytes, " in said
    (tmp_path / "in" / "b.docx").write_bytes(b"\0" * 9000)
    entry, said = run(tmp_path, tmp_path / "in")
    assert entry is None
    assert "12 % of the text would be left out, expected at most 2 %" in said
    assert f"{tmp_path}/in/b.docx: 9,000 bytes, 12 % of the text: .docx that is no UTF-8 text is not read" in said
    assert run(tmp_path, tmp_path / "in", allow_loss=True)[0]


def test_a_small_text_says_how_much_is_missing(tmp_path):
    (tmp_path / "a.txt").write_text(some_text(50_000), encoding="utf-8")
    entry, said = run(tmp_path, tmp_path / "a.txt")
    meta = meta_of(entry)
    assert f"note: val has {meta['val_bytes']:,} bytes, " in said
    assert f"{16_000 - meta['val_bytes']:,} fewer than the preset scores" in said
    assert "160,000 bytes of text would be enough" in said


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5000)), min_size=1, max_size=200))
@settings(max_examples=100)
def test_splits_are_disjoint_and_say_the_same_for_the_same_text(pairs):
    rng = np.random.default_rng(0)
    by_text = rng.integers(0, 2**63, 41).astype(np.uint64)
    hashes = np.array([(by_text[text], i) for i, (text, _) in enumerate(pairs)], np.uint64)
    sizes = np.array([size for _, size in pairs])
    splits, order = choose_splits(hashes, sizes)
    kept = [text for (text, _), split in zip(pairs, splits, strict=True) if split != DROPPED]
    assert sorted(kept) == sorted({text for text, _ in pairs}), "one of each text stays"
    limit = held_out_limit(int(sizes[splits != DROPPED].sum()))
    for split, parity in ((VAL, 0), (TEST, 1)):
        assert all(hashes[splits == split, 0] % 2 == parity), "a text that grows moves no document between val and test"
        own = sizes[splits == split]
        assert own.sum() - (own[-1] if len(own) else 0) <= limit + own.max(initial=0)
        others = hashes[(splits == TRAIN) & (hashes[:, 0] % 2 == parity), 0]
        assert own.sum() >= limit or not len(others)
    assert sorted(order) == sorted(np.flatnonzero((splits == VAL) | (splits == TEST)))
    again = rng.permutation(len(pairs))
    moved, _ = choose_splits(hashes[again], sizes[again])
    if len(set(pairs)) == len({text for text, _ in pairs}):  # duplicates of one size: which one stays does not matter
        role = {hashes[i, 0]: splits[i] for i in range(len(pairs)) if splits[i] != DROPPED}
        same = all(role[hashes[a, 0]] == s for a, s in zip(again, moved, strict=True) if s != DROPPED)
        assert same, "the order of the files does not matter"


@pytest.mark.parametrize(("total", "limit"), [(1000, 100), (10_000_000, 1_000_000), (30_000_000, 2_000_000),
                                              (60_000_000, 3_000_000), (10**9, 8_000_000)])
def test_a_tenth_of_a_small_text_is_held_out_and_never_more_than_is_scored(total, limit):
    assert held_out_limit(total) == limit


def test_a_shared_range_leaves_the_rest_of_its_document():
    document = b"a" * 100 + b"b" * 50 + b"c" * 30 + b"d" * 40
    assert without(document, []) == [document]
    assert without(document, [(100, 150)]) == [b"a" * 100, b"c" * 30 + b"d" * 40]
    assert without(document, [(100, 150), (180, 220)]) == [b"a" * 100], "what is too short goes, too"
    assert without(document, [(0, 220)]) == []


def held_and_trained(entry: dict) -> tuple[str, str, str]:
    """The letters of the train, val and test text of a prepared dataset, documents apart."""
    folders = (Path(entry["train_dir"]) / "train.bin", Path(entry["held_dir"]) / "val.bin", Path(entry["held_dir"]) / "test.bin")
    tokenizer = Tokenizer((folders[0].parent / "tokenizer.model").read_bytes())
    texts = []
    for path in folders:
        tokens = np.fromfile(path, np.uint16)
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id))[1:]
        texts.append("|".join("".join(map(chr, letters_of(code_points(tokenizer.decode(p[1:])))[0])) for p in parts))
    return texts[0], texts[1], texts[2]


def shared_share(one: str, other: str, length: int = 48) -> float:
    """The share of the shingles of `length` letters of one text that stand in the other. 60 characters have about 48 letters."""
    known = {other[i : i + length] for i in range(len(other) - length + 1)}
    shingles = [s for i in range(0, len(one) - length + 1, 3) if "|" not in (s := one[i : i + length])]
    return sum(s in known for s in shingles) / len(shingles)


PROSE = "\n\n".join(textwrap.fill(some_text(900, seed).replace("\n", " "), 72) for seed in range(300))
COPIES = {
    "crlf": PROSE.replace("\n", "\r\n").encode(),
    "shifted": PROSE[1010:].encode(),
    "wrapped, in UTF-16": textwrap.fill(PROSE, 50).encode("utf-16"),
    "one line, twice": (" ".join([PROSE, PROSE]).replace("\n", " ")).encode(),
    "paragraphs in another order": "\n\n".join(sorted(PROSE.split("\n\n"))).encode(),
}


@pytest.mark.parametrize("how", COPIES)
def test_no_copy_of_held_out_text_is_trained_on(tmp_path, monkeypatch, how):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(PROSE)
    (tmp_path / "in" / "b.txt").write_bytes(COPIES[how])
    train, val, test = held_and_trained(corpus.prepare(f"text:{tmp_path / 'in'}", "tiny"))
    assert len(train) > 0.6 * len(letters_of(code_points(PROSE))[0])
    assert min(len(val), len(test)) > 10_000
    assert max(shared_share(val, train), shared_share(test, train), shared_share(test, val)) < 0.01


def test_common_phrases_beyond_one_per_cent_are_taken_out_of_the_users_text(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    notes = [f"{some_text(300, i)} Please do not reply to this message, nobody reads the mailbox of it." for i in range(700)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": n}) + "\n" for n in notes))
    train, val, test = held_and_trained(corpus.prepare(f"text:{tmp_path / 'a.jsonl'}", "tiny"))
    assert "nobodyreads" in val
    assert max(shared_share(val, train), shared_share(test, train)) < 0.01


def test_two_presets_train_on_the_same_documents_and_one_scores_the_beginning_of_the_other(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "a.txt").write_text(PROSE)
    small, large = (held_and_trained(corpus.prepare(f"text:{tmp_path / 'a.txt'}", preset, vocab_size=320))
                    for preset in ("tiny", "demo"))
    assert small[0] == large[0]
    for k in (1, 2):
        assert len(small[k]) < len(large[k])
        assert large[k].startswith(small[k])
        assert shared_share(large[k], small[0]) < 0.01


def test_thousands_of_notes_are_read_in_few_parts_and_the_tokenizer_learns_from_all(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "in").mkdir()
    for i in range(1000):  # the last ones have a letter of their own
        (tmp_path / "in" / f"{i:04d}.md").write_text(some_text(200, i) if i < 800 else some_text(200, i).replace("e", "ø"))
    began = time.monotonic()
    entry = corpus.prepare(f"text:{tmp_path / 'in'}", "tiny")
    assert time.monotonic() - began < 30
    tokenizer = Tokenizer((Path(entry["train_dir"]) / "tokenizer.model").read_bytes())
    assert "ø".encode() in tokenizer.pieces


@pytest.mark.parametrize("error", ["OSError(28, 'No space left on device')", "OSError(13, 'Permission denied', '/x/y')"])
def test_what_the_machine_refuses_is_named(tmp_path, monkeypatch, error):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "a.txt").write_text(PROSE[:9000])

    def refuse(*_):
        raise eval(error)
    monkeypatch.setattr(corpus, "finish", refuse)
    with pytest.raises(HarnessError) as caught:
        corpus.prepare(f"text:{tmp_path / 'a.txt'}", "tiny", vocab_size=256)
    assert caught.value.exit_code == 2
    if "28" in error:
        assert f"the disk of {tmp_path / 'home'} is full: preparing takes about three times the size" in str(caught.value)
    else:
        assert "/x/y: Permission denied; expected files that can be read" in str(caught.value)


def test_a_prepared_file_that_changed_is_noticed_and_made_again(tmp_path):
    (tmp_path / "a.txt").write_text(some_text(60_000), encoding="utf-8")
    entry, _ = run(tmp_path, tmp_path / "a.txt")
    for place, name in (("train", "train.bin"), ("train", "tokenizer.model"), ("held", "val.bin")):
        file = Path(entry[f"{place}_dir"]) / name
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        again, said = run(tmp_path, tmp_path / "a.txt")
        assert f"note: {file} is not the file of {len(good):,} bytes that was prepared; preparing it again" in said
        assert file.read_bytes() == good
        assert again == entry


def test_other_text_and_another_vocabulary_get_a_tokenizer_of_their_own(tmp_path):
    (tmp_path / "a.txt").write_text(some_text(60_000, 1), encoding="utf-8")
    hashes = []
    for change in (None, "text", "vocabulary"):
        if change == "text":
            (tmp_path / "a.txt").write_text(some_text(60_000, 2).replace("e", "ø"), encoding="utf-8")
        entry, _ = run(tmp_path, tmp_path / "a.txt", vocab_size=400 if change == "vocabulary" else 0)
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
    for i in range(2):  # a part each
        (tmp_path / "a" / f"{i}.txt").write_text(some_text(530_000, i), encoding="utf-8")
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
    assert len([p for p in kept if p.suffix == ".digests"]) == 2
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


@pytest.fixture
def few_stories(monkeypatch):
    monkeypatch.setattr(corpus, "STORIES_BYTES", 150_000)


def test_held_out_stories_are_nobodys_to_make_again_and_stay_what_they_are(tmp_path, monkeypatch, few_stories):
    """Not even the same command makes them a second time elsewhere; but it finds those that are there, whatever was lost."""
    one, other = tmp_path / "one", tmp_path / "other"
    for home in (other, one):
        monkeypatch.setenv("AUTORESEARCH_HOME", str(home))
        entry = corpus.prepare("stories", "tiny")
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
    shutil.rmtree(train)
    shutil.rmtree(one / "held" / train.name)
    assert corpus.prepare("stories", "tiny") == entry
    assert told(one) == (meta, text)
    assert (one / "held").stat().st_mode & 0o077 == 0


def test_stories_that_were_cut_off_keep_what_was_held_out(tmp_path, monkeypatch, few_stories):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))

    def interrupt(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as cut_off:
        cut_off.setattr(corpus, "choose_splits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            corpus.prepare("stories", "tiny")
    assert not (tmp_path / "train").exists()
    [sealed] = tmp_path.glob("held/*.txt")
    text = sealed.read_text()
    corpus.prepare("stories", "tiny")
    assert told(tmp_path)[1] == text


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


def test_disk_names_do_not_depend_on_odd_paths(tmp_path):
    folder = tmp_path / "Ünï cödé & spaces"
    folder.mkdir()
    (folder / "ſtrange name.txt").write_text(some_text(60_000), encoding="utf-8")
    entry, _ = run(tmp_path, folder / "ſtrange name.txt")
    assert entry["id"].isascii()


def test_an_error_of_the_harness_names_its_exit_code():
    assert [HarnessError(k, "").exit_code for k in ("data", "usage", "violation", "else")] == [2, 2, 6, 1]
