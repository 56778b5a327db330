"""The user's own files in all their kinds and states: what is read, and what is left out by name, line and share."""

import bz2
import errno
import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from conftest import some_text

from harness import HarnessError, files
from harness.corpus import check_losses, grouped
from harness.files import PASSAGE, damaged, find_files, json_texts, open_file, read_block
from harness.stories import Storyteller

DOCUMENTS = [some_text(600, seed) for seed in range(100)]
LINES = "".join(json.dumps({"id": 1, "text": d}) + "\n" for d in DOCUMENTS)
MARKED = "\n<|endoftext|>\n".join(DOCUMENTS)
PROSE = "\n\n".join(Storyteller(3).story() for _ in range(30))


def read(path: Path, work: Path, field: str = "text"):
    """The documents and losses of a file or folder."""
    found, losses = find_files(path)
    documents = []
    for file in found:
        blocks, lost = open_file(file, field, work)
        losses += lost
        for block in blocks:
            texts, lost, _ = read_block(block)
            documents += texts
            losses += lost
    return documents, losses


def table(path: Path, column, **options) -> None:
    parquet.write_table(pa.table({"text": column}), path, **options)


def packed(kind: str, data: bytes) -> bytes:
    if kind == "zst":
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, "zstd") as stream:
            stream.write(data)
        return out.getvalue().to_pybytes()
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](data)


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize(("name", "data"), [
    ("a.txt", MARKED.encode()), ("a.md", MARKED.encode()), ("LICENSE", MARKED.encode()), ("a.py", MARKED.encode()),
    ("a.JSONL", LINES.encode()), ("a.ndjson", LINES.encode()), ("a.jsonl", LINES.replace("\n", "\r\n").encode("utf-8-sig")),
    ("a.json", LINES.encode()), ("a.json", json.dumps(DOCUMENTS).encode()), ("a.json", json.dumps({"rows": DOCUMENTS}).encode()),
    ("a.json", json.dumps([{"text": d} for d in DOCUMENTS], indent=1).encode()),
    ("a.csv", ("id,text\n" + "".join(f'1,"{d}"\n' for d in DOCUMENTS)).encode()),
    ("a.csv", ("\ufefftext;id\r\n" + "".join(f'"{d}";1\r\n' for d in DOCUMENTS)).encode()),
    ("a.tsv", ("id\ttext\n" + "".join(f'1\t"{d}"\n' for d in DOCUMENTS)).encode()),
    ("a.txt", MARKED.encode("utf-16")), ("a.txt", MARKED.encode("utf-16-le")), ("a.txt", MARKED.encode("utf-32")),
    ("a.jsonl", LINES.encode("utf-16-be")),
    *((f"a.{kind}.{pack}", packed(pack, data.encode())) for pack in ("gz", "bz2", "xz", "zst")
      for kind, data in (("txt", MARKED), ("jsonl", LINES))),
], ids=lambda v: v if isinstance(v, str) else "")
def test_every_kind_of_file_gives_the_same_documents(tmp_path, work, name, data):
    (tmp_path / name).write_bytes(data)
    documents, losses = read(tmp_path / name, work)
    assert [d.strip("\n") for d in documents] == [d.strip("\n") for d in DOCUMENTS]
    assert losses == []


@pytest.mark.parametrize("column", [
    pa.array(DOCUMENTS), pa.array(DOCUMENTS, pa.large_string()), pa.array(DOCUMENTS).dictionary_encode(),
    pa.array(DOCUMENTS, pa.string_view()), pa.array([d.encode() for d in DOCUMENTS], pa.binary()),
], ids=lambda c: str(c.type))
def test_every_text_column_of_parquet_gives_the_same_documents(tmp_path, work, column):
    table(tmp_path / "a.parquet", column, row_group_size=30)
    assert read(tmp_path / "a.parquet", work) == (DOCUMENTS, [])


def test_a_folder_is_read_in_order_and_what_is_no_text_is_named(tmp_path, work):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / "in" / "deep" / f"{i:03d}.{'md' if i % 2 else 'rs'}").write_text(document, encoding="utf-8")
    (tmp_path / "in" / ".hidden.txt").write_text("not this")
    (tmp_path / "in" / "image.png").write_bytes(b"\xff\xd8")
    (tmp_path / "in" / "old.docx").write_bytes(b"PK\0\0")
    (tmp_path / "in" / "all.tar.gz").write_bytes(b"12345")
    documents, losses = read(tmp_path / "in", work)
    assert documents == DOCUMENTS
    assert {(Path(loss.name).name, loss.bytes, loss.why) for loss in losses} == {
        ("image.png", 0, "no text"), ("old.docx", 4, ".docx that is no UTF-8 text is not read"),
        ("all.tar.gz", 5, ".tar in .gz is not read")}


@pytest.mark.parametrize(("encoding", "text"), [
    ("cp1252", PROSE.replace("e", "é")), ("cp1252", PROSE.replace('"', "”")),
    ("cp1252", "".join(c if i % 3000 else "é" for i, c in enumerate(PROSE, 1))),
    ("cp1251", "Мама мыла раму, а папа читал газету.\n" * 300), ("cp932", "今日は天気がいいです。公園に行きましょう。\n" * 300),
    ("gb18030", "今天天气很好，我们去公园。\n" * 300), ("cp1250", "Zażółć gęślą jaźń, źdźbło trawy łąka.\n" * 200),
])
def test_another_encoding_is_guessed_and_said(tmp_path, work, capsys, encoding, text):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    documents, losses = read(tmp_path / "a.txt", work)
    assert "".join(documents) == text
    assert losses == []
    assert f"note: {tmp_path / 'a.txt'}: read as {encoding}, guessed from its letters" in capsys.readouterr().err


def test_bytes_that_are_in_no_encoding_are_refused_by_file_and_line(tmp_path, work):
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\n" + bytes(range(128, 256)) * 50)
    with pytest.raises(HarnessError, match=r"a\.txt: expected UTF-8, got [\d,]+ bytes that are not, first in line 3; convert"):
        open_file(tmp_path / "a.txt", "text", work)
    (tmp_path / "b.txt").write_bytes(PROSE.encode("utf-16")[:-1])
    with pytest.raises(HarnessError, match=r"b\.txt: expected utf-16, got bytes that are not .*; convert the file"):
        open_file(tmp_path / "b.txt", "text", work)


@pytest.mark.parametrize(("name", "data", "where", "why"), [
    ("a.txt", b"one\ntwo \xff broken\n" + b"three and more\n" * 99, 2, "bytes that are not UTF-8"),
    ("a.txt", "é\né\n".encode() * 50 + b"\xe9\n", 101, "bytes that are not UTF-8"),
    ("a.jsonl", LINES.encode() + b'{"id": 7}\n' + LINES.encode(), 101, "expected an object with a string field 'text', got an "
     "object with 'id'; name the field with --field"),
    ("a.jsonl", LINES.encode() + b'{"text": 5}\n', 101, "expected an object with a string field 'text', got an object with 'text'"),
    ("a.jsonl", LINES.encode()[:-300], 100, "expected one JSON object per line, got Unterminated string"),
    ("a.jsonl", LINES.encode() + b"[" * 100_000 + b"\n", 101, "JSON nested too deep to be read"),
    ("a.json", b'["one", {"id": 1}]', 2, "expected an object with a string field 'text'"),
    ("a.json", b'["one", "two", "thr', 3, "JSON that cannot be read: Unterminated string"),
    ("a.csv", b"id,body\n1,x\n", 0, "expected one column 'text', its header has 'id', 'body'; choose one with --field"),
    ("a.csv", b"text,text\n1,x\n", 0, "expected one column 'text', its header has 'text', 'text'"),
    ("a.csv", b"id,text\n1,x\n2\n", 3, "a row without column 'text'"),
])
def test_a_few_bad_bytes_or_lines_are_left_out_with_their_line(tmp_path, work, monkeypatch, name, data, where, why):
    monkeypatch.setattr(files, "BLOCK_BYTES", 8000)  # the line's number is that in the file, not in the block
    (tmp_path / name).write_bytes(data)
    [loss] = read(tmp_path / name, work)[1]
    assert (loss.name, loss.where) == (str(tmp_path / name), where)
    assert why in loss.why
    assert loss.bytes > 0


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.txt.zst", "a.parquet", "a.json"])
def test_a_damaged_file_is_named_as_the_user_knows_it(tmp_path, work, name):
    (tmp_path / name).write_bytes(b"plain, no such file")
    [loss] = read(tmp_path / name, work)[1]
    assert loss.damage
    assert loss.why.startswith(f"cannot be read as {Path(name).suffix}, it is damaged or incomplete (")
    assert (loss.name, loss.bytes) == (str(tmp_path / name), 19)


def test_damage_inside_parquet_is_named_by_row_and_row_group(tmp_path, work):
    buffers = [None, pa.py_buffer(b"\0\0\0\0\5\0\0\0\x0a\0\0\0"), pa.py_buffer(b"hello\xff\xfeabc")]
    bad = pa.Array.from_buffers(pa.string(), 2, buffers)
    for size in (1000, 30):
        table(tmp_path / "utf8.parquet", pa.chunked_array([pa.array(DOCUMENTS), bad]), row_group_size=size)
        documents, [loss] = read(tmp_path / "utf8.parquet", work)
        assert documents == [*DOCUMENTS, "hello", "abc"]
        assert (loss.why, loss.where, loss.bytes) == ("bytes that are not UTF-8", 102, 2)
    table(tmp_path / "page.parquet", DOCUMENTS, row_group_size=50, compression="zstd")
    data = bytearray((tmp_path / "page.parquet").read_bytes())
    data[200:2200] = bytes(2000)
    (tmp_path / "page.parquet").write_bytes(data)
    documents, [loss] = read(tmp_path / "page.parquet", work)
    assert documents == DOCUMENTS[50:]
    assert "cannot be read as .parquet, it is damaged or incomplete in row group 0 (" in loss.why


def test_a_column_that_is_absent_twice_there_or_no_text_is_named(tmp_path, work):
    parquet.write_table(pa.table({"n": [1, 2]}), tmp_path / "a.parquet")
    for field in ("text", "n"):
        with pytest.raises(HarnessError, match=rf"text column '{field}', it has {{'n': 'int64'}}; choose one with --field"):
            open_file(tmp_path / "a.parquet", field, work)
    parquet.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "b.parquet")
    with pytest.raises(HarnessError, match="expected a text column 'text', it has 2 columns of this name; choose one with --field"):
        open_file(tmp_path / "b.parquet", "text", work)


def test_a_folder_that_may_not_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    """As macOS refuses Documents to a terminal that was not allowed to read there."""
    (tmp_path / "notes" / "private").mkdir(parents=True)
    (tmp_path / "notes" / "a.txt").write_text("text")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("private"):
            raise PermissionError(1, "Operation not permitted", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(HarnessError, match=r"private: cannot be read \(Operation not permitted\); allow it in System Settings"):
        find_files(tmp_path / "notes")


def test_null_is_an_empty_text_and_no_loss(tmp_path, work):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n')
    (tmp_path / "b.json").write_text('[null, "two"]')
    table(tmp_path / "c.parquet", ["three", None])
    assert read(tmp_path / "a.jsonl", work) == (["one"], [])
    assert read(tmp_path / "b.json", work) == (["two"], [])
    assert read(tmp_path / "c.parquet", work) == (["three"], [])


def test_a_lone_surrogate_costs_itself_and_not_its_document(tmp_path, work):
    (tmp_path / "a.jsonl").write_text('{"text": "one \\ud800two \\ud83d\\ude00"}\n')
    documents, [loss] = read(tmp_path / "a.jsonl", work)
    assert documents == ["one two 😀"]
    assert (loss.bytes, loss.why) == (3, "lone surrogates, which are no characters")


def test_a_json_list_is_read_item_by_item(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SNIFFED", 100)
    (tmp_path / "a.json").write_text(json.dumps([*DOCUMENTS, 17, {"text": "last"}]))
    losses = []
    texts = json_texts(tmp_path / "a.json", "a.json", "text", losses)
    assert list(texts) == [*DOCUMENTS, "last"]
    assert [loss.where for loss in losses] == [101]


def test_json_nested_too_deep_is_an_error_by_name(tmp_path, work):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(HarnessError, match=r"a\.json: item or line 1 is JSON nested too deep to be read"):
        open_file(tmp_path / "a.json", "text", work)


def test_a_full_disk_is_not_the_files_fault(tmp_path):
    with pytest.raises(OSError, match="No space"):
        damaged("a.gz", 1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert damaged("a.gz", 1, PermissionError(errno.EACCES, "Permission denied")).why == "cannot be read (Permission denied)"


def test_more_than_two_per_cent_is_an_error_that_names_each_file(capsys):
    losses = [files.Loss("/in/b.txt", 150, "bytes that are not UTF-8", 7),
              files.Loss("/in/b.txt", 50, "bytes that are not UTF-8", 9),
              files.Loss("/in/c.docx", 100, "not read"), files.Loss("/in/p.png", 0, "no text")]
    check_losses(losses, 29_700, allow_loss=False)
    said = capsys.readouterr().err
    assert "note: left out 1 files that hold no text (1 .png)" in said
    assert "note: left out 300 bytes, 1 % of the text:" in said
    assert "/in/b.txt: 200 bytes, 0.67 % of the text: bytes that are not UTF-8 (line or row 7, 9)" in said
    with pytest.raises(HarnessError, match="3 % of the text would be left out, expected at most 2 %") as caught:
        check_losses(losses, 9_700, allow_loss=False)
    assert "/in/c.docx: 100 bytes, 1 % of the text: not read" in str(caught.value)
    assert "or add --allow-loss" in str(caught.value)
    check_losses(losses, 9_700, allow_loss=True)


def test_blocks_cover_a_file_and_cut_no_document(tmp_path, work, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 5000)
    (tmp_path / "a.txt").write_bytes(b"".join(d.encode() + b"<|endoftext|>\n" for d in DOCUMENTS))
    blocks, _ = open_file(tmp_path / "a.txt", "text", work)
    assert len(blocks) > 5
    assert [b.start for b in blocks[1:]] == [b.end for b in blocks[:-1]]
    documents, losses = read(tmp_path / "a.txt", work)
    assert documents == [d.strip("\n") for d in DOCUMENTS], "a separator at the end makes no document"
    assert losses == []


def test_a_parquet_file_of_one_huge_row_group_is_read_in_blocks(tmp_path, work, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 3000)
    table(tmp_path / "a.parquet", DOCUMENTS, compression=None)
    blocks, _ = open_file(tmp_path / "a.parquet", "text", work)
    assert len(blocks) > 5
    assert {b.name for b in blocks} == {str(tmp_path / "a.parquet")}
    assert [d for block in blocks for d in read_block(block)[0]] == DOCUMENTS


def test_a_line_of_json_longer_than_many_blocks_stays_whole(tmp_path, work, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 4000)
    texts = [DOCUMENTS[0], some_text(50_000), *DOCUMENTS[1:9]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in texts))
    assert len(open_file(tmp_path / "a.jsonl", "text", work)[0]) > 2
    assert read(tmp_path / "a.jsonl", work) == (texts, [])


@pytest.mark.parametrize("text", ["日本語" * 5000, "ab " * 9000, "a\r\n" * 9000])
def test_blocks_end_between_characters_and_joined_they_are_the_text(tmp_path, work, monkeypatch, text):
    monkeypatch.setattr(files, "BLOCK_BYTES", 4000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    documents, losses = read(tmp_path / "a.txt", work)
    assert "".join(documents) == text
    assert losses == []


def test_small_files_are_read_together_and_large_ones_in_parts(tmp_path, work, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(300):
        (tmp_path / "in" / f"{i}.txt").write_text(DOCUMENTS[i % 100])
    blocks = [b for path in find_files(tmp_path / "in")[0] for b in open_file(path, "text", work)[0]]
    assert len(blocks) == 300
    [group] = grouped(blocks)
    assert group == blocks


def test_a_book_is_cut_so_that_it_cannot_be_a_whole_split(tmp_path, work):
    book = some_text(400_000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": book}) + "\n")
    (tmp_path / "b.txt").write_text(book)
    for name, longest in (("a.jsonl", 140_000), ("b.txt", 3 * PASSAGE)):
        documents, _ = read(tmp_path / name, work)
        assert "".join(documents) == book
        assert max(map(len, documents)) < longest
