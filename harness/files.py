"""
Read the user's files: any file or folder -> blocks for worker processes -> documents, and a list of what could not be read.

`find_files` lists them, `open_file` unpacks and checks one file and cuts it into blocks, `read_block` reads a block's documents.
Whatever is left out is recorded as a `Loss` with the user's own file name and line; corpus.py reports the losses and stops if they
are too large.
"""

import bz2
import codecs
import csv
import errno
import gzip
import io
import json
import lzma
import mimetypes
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from harness import HarnessError, sha256
from harness.overlap import passages

BLOCK_BYTES = 1 << 20           # text handed to one worker at a time; with corpus.WORKERS it decides how much memory is used
PASSAGE = 2048                  # characters: a text without document separators is cut into passages of about this size
DOCUMENT = 1 << 16              # characters: a document twice as long is cut to this size, because one book could fill a split
SEPARATOR = b"<|endoftext|>"    # between the documents of a text file, if the file has any
PACKED = (".gz", ".bz2", ".xz", ".zst")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PLAIN = (".txt", ".text", ".md")
NO_TEXT = ("audio/", "video/", "font/")  # and "image/": left out without counting as a loss; .ts may be a video or TypeScript
ENCODINGS = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp874", "koi8_r", "gb18030", "big5", "cp932",
             "euc_jp", "cp949")  # encodings that are tried for text that is not UTF-8
SNIFFED = 1 << 16               # bytes at the start of a file that show its kind and encoding


@dataclass(frozen=True)
class Loss:
    """Text that is left out. name: the user's file. bytes: how much. why: the reason. where: line, row or item, 0 if unknown.
    damage: whether the file itself is damaged."""
    name: str
    bytes: int
    why: str
    where: int = 0
    damage: bool = False


@dataclass(frozen=True)
class Block:
    """Part of a file that one worker reads: bytes start..end, or the row groups start..end of a parquet file.

    path: the file that is read, maybe an unpacked copy. name: the user's own file, for messages. kind: text, jsonl or parquet.
    field: field of a JSON object, or column of a table. size: bytes, to group small blocks.
    """
    path: str
    name: str
    kind: str
    start: int
    end: int
    field: str
    size: int


def find_files(root: Path) -> tuple[list[Path], list[Loss]]:
    """List the user's files in a fixed order, without hidden ones, and the files that are left out because they hold no known text.
    Errors: HarnessError("data") if there is nothing to read."""
    try:
        inside = (Path(folder, name) for folder, _, names in os.walk(root, onerror=refuse) for name in names)
        found = [root] if root.is_file() else sorted(p for p in inside if p.is_file())
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)]
        unknown = {p: why for p in found if (why := no_text(p))}
        out = [Loss(str(p), 0 if why == "no text" else p.stat().st_size, why) for p, why in unknown.items()]
    except OSError as error:
        macos = "; allow it in System Settings > Privacy & Security > Files and Folders" if sys.platform == "darwin" else ""
        raise HarnessError("data", f"{error.filename or root}: cannot be read ({error.strerror or error}){macos}") from error
    if len(unknown) == len(found):
        reason = (f"found none among {len(found)} files" if root.exists() else "there is no such path")
        named = ", ".join(f"{Path(o.name).name}: {o.why}" for o in out[:3])
        raise HarnessError("data", f"text:{root}: expected a file or folder of text, {', '.join(TABLES)} (or {', '.join(PACKED)} "
                           f"of them); {reason}{f' ({named})' if named else ''}")
    return [p for p in found if p not in unknown], out


def refuse(error: OSError) -> None:
    """Error handler for os.walk, which by default skips folders that cannot be listed. Raises `error`, unless the folder is
    gone."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def kind_of_name(path: Path) -> str:
    """The suffix of a file's name without its compression, in lower case: book.TXT.gz -> .txt."""
    return Path(path.name.lower().removesuffix(path.suffix.lower()) if path.suffix.lower() in PACKED else path.name.lower()).suffix


def no_text(path: Path) -> str:
    """Why a file is left out: "no text" for images, sound and video, else a reason; "" if the file is read."""
    suffix = kind_of_name(path)
    if suffix in (*TABLES, *PLAIN):
        return ""
    medium = mimetypes.guess_type(path.name)[0] or ""
    if medium.startswith("image/"):
        return "no text"
    if path.suffix.lower() in PACKED:
        return f"{suffix or 'this kind of file'} in {path.suffix} is not read"
    with open(path, "rb") as file:  # any other file is read if it looks like text: source code, logs, LICENSE
        head = file.read(SNIFFED)
    if encoding_of_head(head) != "utf-8" or (b"\0" not in head and valid(whole_characters(head)[0])):
        return ""
    return "no text" if medium.startswith(NO_TEXT) else f"{suffix or 'a file without suffix'} that is no UTF-8 text is not read"


# ---------------------------------------------------------------------------------------------------------------------
# One file: unpack, find the encoding, cut into blocks
# ---------------------------------------------------------------------------------------------------------------------

def open_file(path: Path, field: str, work: Path) -> tuple[list[Block], list[Loss]]:
    """Cut one file into blocks at document borders. A compressed file, another encoding than UTF-8, JSON and tables are first
    converted to UTF-8 text or JSON lines in `work`. Errors: HarnessError("data") if a parquet file has no such column or the
    encoding of the text is unknown; OSError for a full disk."""
    losses: list[Loss] = []
    original, name, kind = path, str(path), kind_of_name(path)
    unpacked = work / f"{sha256(name.encode())[:12]}{kind}"
    try:
        if path.suffix.lower() in PACKED:
            unpack(path, unpacked)
            path = unpacked
        if kind == ".parquet":
            return parquet_blocks(path, name, field, work, losses), losses
        path, start = as_utf8(path, name, unpacked.with_suffix(".utf8"))
        if kind == ".json" and is_json_lines(path):
            kind = ".jsonl"
        if kind in (".json", ".csv", ".tsv"):
            lines = unpacked.with_suffix(".lines")
            with open(lines, "w", encoding="utf-8") as target:
                for text in (json_texts if kind == ".json" else csv_texts)(path, name, field, losses):
                    target.write(json.dumps({field: text}) + "\n")
            path, start, kind = lines, 0, ".jsonl"
    except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:  # pyarrow's errors are OSErrors or ValueErrors
        return [], [damaged(name, original.stat().st_size, error)]
    jsonl = kind in (".jsonl", ".ndjson")
    borders, size = [start], path.stat().st_size
    with open(path, "rb") as f:
        while size - borders[-1] > BLOCK_BYTES:
            at = f.seek(borders[-1] + BLOCK_BYTES)
            borders.append(at + (len(f.readline()) if jsonl else cut(f.read(BLOCK_BYTES))))  # a JSON line is never cut
    return [Block(str(path), name, "jsonl" if jsonl else "text", a, b, field, b - a)
            for a, b in zip(borders, [*borders[1:], size], strict=True) if b > a], losses


def damaged(name: str, size: int, error: BaseException, where: str = "") -> Loss:
    """The Loss for a file, or a part of it, that cannot be read. Errors: OSError for a full disk, which is not the file's fault."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        raise error
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return Loss(name, size, f"cannot be read ({error.strerror})", damage=True)
    return Loss(name, size, f"cannot be read as {Path(name).suffix}, it is damaged or incomplete{where} "
                f"({' '.join(str(error).split())[:300]})", damage=True)


def unpack(path: Path, target: Path) -> None:
    """Decompress a file."""
    kind = path.suffix.lower()
    if kind == ".zst":
        import pyarrow
        source = pyarrow.input_stream(str(path), compression="zstd")
    else:
        source = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[kind](path, "rb")
    with source, open(target, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def cut(window: bytes) -> int:
    """Find where a block may end: after the first separator, else after a blank line, line end or space, else between
    characters."""
    for mark in (SEPARATOR, b"\n\n", b"\r\n\r\n", b"\n", b"\r", b" "):
        if (found := window.find(mark)) >= 0:
            return found + len(mark)
    return next((i for i, b in enumerate(window[:4]) if b & 0xC0 != 0x80), 0)


def encoding_of_head(head: bytes) -> str:
    """The encoding that the first bytes of a file show: by its byte order mark, or by the zero bytes of UTF-16; else utf-8."""
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
                       (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig")):
        if head.startswith(mark):
            return name
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 5 and min(even, odd) * 50 < max(even, odd):
        return "utf-16-be" if even > odd else "utf-16-le"
    return "utf-8"


def as_utf8(path: Path, name: str, target: Path) -> tuple[Path, int]:
    """Return a UTF-8 file with the text of `path`, and the byte at which the text begins. This is `path` itself if it is UTF-8,
    possibly with a few bad bytes. Text in another encoding, recognised by its byte order mark or guessed, is converted to
    `target`; a guess is printed. Errors: HarnessError("data") if the encoding is unknown."""
    with open(path, "rb") as file:
        encoding = encoding_of_head(file.read(SNIFFED))
    if encoding == "utf-8-sig":
        return path, len(codecs.BOM_UTF8)
    if encoding == "utf-8":
        bad, good, sample = bad_bytes(path)
        if bad <= good or not bad:  # UTF-8 with some damage
            return path, 0
        if not (encoding := guess(sample)):
            if bad * 50 < path.stat().st_size:  # a few stray bytes in plain ASCII
                return path, 0
            raise HarnessError("data", f"{name}: expected UTF-8, got {bad:,} bytes that are not, first {place_of(path)}; convert "
                               "the file: iconv -f ITS-ENCODING -t UTF-8")
        print(f"note: {name}: read as {encoding}, guessed from its letters", file=sys.stderr, flush=True)
    try:
        with open(path, encoding=encoding, newline="") as source, open(target, "w", encoding="utf-8", newline="") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except UnicodeError as error:
        raise HarnessError("data", f"{name}: expected {encoding}, got bytes that are not ({error}); convert the file: "
                           "iconv -f ITS-ENCODING -t UTF-8") from error
    return target, 0


def bad_bytes(path: Path) -> tuple[int, int, bytes]:
    """Count the bytes of a file that are not UTF-8, and its valid characters beyond ASCII. Also returns about 64 KB of lines with
    invalid bytes, as a sample to guess the encoding from."""
    bad = good = 0
    sample, rest = b"", b""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            data, rest = (rest + chunk, b"")
            if data.isascii():
                continue
            data, rest = whole_characters(data)
            text = data.decode("utf-8", "ignore")
            good += len(text) - int(np.count_nonzero(np.frombuffer(data, np.uint8) < 128))
            if wrong := len(data) - len(text.encode()):
                bad += wrong
                lines = (line for line in data.splitlines(keepends=True) if not valid(line))
                while len(sample) < SNIFFED and (line := next(lines, b"")):
                    sample += line[:4096]
    return bad + len(rest), good, sample + rest


def whole_characters(data: bytes) -> tuple[bytes, bytes]:
    """Split off the incomplete UTF-8 character at the end of `data`."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:  # the start of the last character
            needed = 1 if data[-back] < 0xC0 else 2 if data[-back] < 0xE0 else 3 if data[-back] < 0xF0 else 4
            return (data[:-back], data[-back:]) if needed > back else (data, b"")
    return data, b""


def valid(data: bytes) -> bool:
    """Whether bytes are UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def guess(sample: bytes) -> str:
    """Guess the 8-bit or East Asian encoding of text from a sample that is not UTF-8; "" if none fits."""
    try:
        from charset_normalizer import from_bytes
    except ImportError:  # it comes with the project's dependencies; without it the file is refused by name
        return ""
    best = from_bytes(sample, cp_isolation=list(ENCODINGS)).best()
    if not best:
        return ""
    encoding = "cp1252" if "cp1252" in best.could_be_from_charset else best.encoding
    # damaged text must not pass: characters beyond ASCII must be letters beside letters, or typographic marks
    odd = re.findall(r"(\w?)([^\x00-\x7f])(?=(\w?))", sample.decode(encoding, "ignore"))
    fine = sum(char in "“”‘’„‚–—…«»€£°§©®•\u00a0" or ord(char) > 0x2FFF or (char.isalpha() and bool(before or after))
               for before, char, after in odd)
    return encoding if fine > 0.8 * len(odd) else ""


def place_of(path: Path) -> str:
    """The place of the first byte that is not UTF-8, such as "in line 7"."""
    with open(path, "rb") as file:
        return next((f"in line {n}" for n, line in enumerate(file, 1) if not valid(line)), "at its end")


def parquet_blocks(path: Path, name: str, field: str, work: Path, losses: list[Loss]) -> list[Block]:
    """Blocks of a parquet file: one for each row group, or JSON lines of it in `work` if its row groups are huge.
    Errors: HarnessError("data") if there is no such column, or more than one, or it holds no text."""
    import pyarrow.parquet as parquet
    file = parquet.ParquetFile(path)
    columns = [f for f in file.schema_arrow if f.name == field]
    if len(columns) != 1 or not is_text(columns[0].type):
        schema = {f.name: str(f.type) for f in file.schema_arrow}
        got = f"it has {len(columns)} columns of this name" if len(columns) > 1 else f"it has {schema}"
        raise HarnessError("data", f"{name}: expected a text column {field!r}, {got}; choose one with --field")
    sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    if max(sizes, default=0) <= 16 * BLOCK_BYTES:
        return [Block(str(path), name, "parquet", i, i + 1, field, size) for i, size in enumerate(sizes)]
    lines, row = work / f"{sha256(name.encode())[:12]}.lines", 0
    with open(lines, "w", encoding="utf-8") as target:
        for batch in file.iter_batches(256, columns=[field]):
            for data in as_bytes(batch.column(0)):
                row += 1
                target.write(json.dumps({field: decode(data or b"", name, losses, row)}) + "\n")
    return [replace(b, name=name) for b in open_file(lines.rename(lines.with_suffix(".jsonl")), field, work)[0]]


def is_text(kind) -> bool:
    """Whether a pyarrow type holds strings, or bytes that may be UTF-8."""
    import pyarrow.types as types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
                                         types.is_large_binary))


def as_bytes(column) -> list[bytes | None]:
    """The texts of a pyarrow column as bytes, because a file may hold strings that are not UTF-8."""
    import pyarrow
    import pyarrow.types as types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pyarrow.large_binary()).to_pylist()


def is_json_lines(path: Path) -> bool:
    """Whether a .json file holds an object in each line, as many exports do."""
    with open(path, "rb") as file:
        first, second = file.readline(1 << 20).strip(), file.readline(1 << 20).strip()
    return first.startswith(b"{") and first.endswith(b"}") and second.startswith(b"{")


def json_texts(path: Path, name: str, field: str, losses: list[Loss]) -> Iterator[str]:
    """The texts of a .json file: of a list of strings or objects, or of one object that has the field or one such list.
    A list is read item by item, so that its size does not matter."""
    decoder, buffer, item = json.JSONDecoder(), "", 0
    with open(path, encoding="utf-8", errors="replace") as file:
        buffer = file.read(SNIFFED).lstrip()
        if not buffer.startswith("["):
            whole = parsed(lambda: json.loads(buffer + file.read()), name, 1)
            lists = [v for v in whole.values() if isinstance(v, list)] if isinstance(whole, dict) and field not in whole else []
            for item, value in enumerate(lists[0] if len(lists) == 1 else [whole], 1):
                yield from text_in(value, name, field, losses, item)
            return
        buffer = buffer[1:]
        while True:
            buffer = buffer.lstrip(" \t\r\n,")
            if buffer.startswith("]"):
                return
            try:
                value, end = parsed(lambda: decoder.raw_decode(buffer), name, item + 1)  # noqa: B023  (called at once)
                whole_item = end < len(buffer)  # a number at the end may go on
            except ValueError as error:
                value, whole_item, problem = None, False, error
            if whole_item:
                item += 1
                yield from text_in(value, name, field, losses, item)
                buffer = buffer[end:]
            elif more := file.read(max(SNIFFED, len(buffer))):
                buffer += more
            else:
                losses.append(Loss(name, len(buffer.encode("utf-8", "replace")), f"JSON that cannot be read: {problem}", item + 1))
                return


def parsed(parse, name: str, where: int):
    """The value of `parse()`. Errors: HarnessError("data") for JSON that is nested too deep to be read."""
    try:
        return parse()
    except RecursionError as error:
        raise HarnessError("data", f"{name}: item or line {where} is JSON nested too deep to be read; expected an object with a "
                           "text field") from error


def text_in(value: object, name: str, field: str, losses: list[Loss], where: int) -> Iterator[str]:
    """The text of one JSON value: a string, or an object's field. What has none is recorded as a loss; null is no text."""
    text = value.get(field, value) if isinstance(value, dict) else value
    if isinstance(text, str):
        yield text
    elif text is not None:
        got = f"an object with {', '.join(map(repr, list(value)[:8]))}" if isinstance(value, dict) else type(value).__name__
        losses.append(Loss(name, len(json.dumps(value)), f"expected an object with a string field {field!r}, got {got}; name the "
                           "field with --field", where))


def csv_texts(path: Path, name: str, field: str, losses: list[Loss]) -> Iterator[str]:
    """The texts of a .csv or .tsv file with a header line. A file without the column is recorded as a loss."""
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        marks = max(",;\t", key=file.readline().count)
        file.seek(0)
        rows = csv.reader((line.replace("\0", "") for line in file), delimiter=marks)
        try:
            header = next(rows, [])
            if header.count(field) != 1:
                size = path.stat().st_size
                shown = ", ".join(repr(h[:40]) for h in header[:8])
                losses.append(Loss(name, size, f"expected one column {field!r}, its header has {shown}; choose one with --field"))
                return
            column = header.index(field)
            for row in rows:
                if len(row) > column:
                    yield row[column]
                elif row:
                    losses.append(Loss(name, sum(map(len, row)), f"a row without column {field!r}", rows.line_num))
        except csv.Error as error:
            losses.append(Loss(name, path.stat().st_size, f"CSV that cannot be read: {error}", rows.line_num))


# ---------------------------------------------------------------------------------------------------------------------
# One block: documents
# ---------------------------------------------------------------------------------------------------------------------

def decode(data: bytes, name: str, losses: list[Loss], where: int) -> str:
    """The text of UTF-8 bytes. Bytes that are not UTF-8 are left out and recorded."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "ignore")
        losses.append(Loss(name, len(data) - len(text.encode()), "bytes that are not UTF-8", where))
        return text


def line_number(path: str, offset: int) -> int:
    """The number of the line that a byte of a file stands in, from 1."""
    lines = 1
    with open(path, "rb") as file:
        while offset > 0 and (data := file.read(min(offset, 1 << 20))):
            lines, offset = lines + data.count(b"\n"), offset - len(data)
    return lines


def read_block(block: Block) -> tuple[list[str], list[Loss], int]:
    """Read a block. Returns its documents, what was left out, and how many documents were empty."""
    losses: list[Loss] = []
    if block.kind == "parquet":
        raw, size = parquet_texts(block, losses), DOCUMENT
    else:
        with open(block.path, "rb") as f:
            f.seek(block.start)
            data = f.read(block.end - block.start)
        if block.kind == "jsonl":
            raw, size = json_lines(data, block, losses), DOCUMENT
        else:
            text, size = decode(data, block.name, losses, 0), PASSAGE
            if losses:
                first = next(n for n, line in enumerate(io.BytesIO(data)) if not valid(line))
                losses = [replace(losses[0], where=line_number(block.path, block.start) + first)]
            raw = [text]
            if (mark := SEPARATOR.decode()) in text:
                raw, size = [d.strip("\r\n") for d in text.rstrip().removesuffix(mark).split(mark)], DOCUMENT
    documents, empty = [], 0
    for document in raw:
        whole, surrogates = without_surrogates(document)
        if surrogates:
            losses.append(Loss(block.name, 3 * surrogates, "lone surrogates, which are no characters"))
        for part in passages(whole, size):
            documents.append(part) if part.strip() else (empty := empty + 1)
    return documents, losses, empty


def without_surrogates(text: str) -> tuple[str, int]:
    """A text without lone surrogates, which UTF-8 cannot encode, and how many there were."""
    try:
        text.encode("utf-8")
        return text, 0
    except UnicodeEncodeError:
        kept = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
        return kept, sum(0xD800 <= ord(c) < 0xE000 for c in text)


def json_lines(data: bytes, block: Block, losses: list[Loss]) -> list[str]:
    """The texts of JSON lines. A line that cannot be read is recorded with its number in the user's file."""
    texts: list[str] = []
    first = 0  # number of the block's first line; looked up when it is needed
    for n, line in enumerate(data.split(b"\n")):
        if not line.strip():
            continue
        problems: list[Loss] = []
        try:
            value = parsed(lambda: json.loads(line), block.name, n + 1)  # noqa: B023  (called at once)
            texts += text_in(value, block.name, block.field, problems, 0)
        except ValueError as error:
            problems = [Loss(block.name, 0, f"expected one JSON object per line, got {str(error)[:100]}")]
        except HarnessError as error:
            problems = [Loss(block.name, 0, f"expected one JSON object per line: {error}")]
        if problems:
            first = first or line_number(block.path, block.start)
            losses += [replace(p, bytes=len(line), where=first + n) for p in problems]
    return texts


def parquet_texts(block: Block, losses: list[Loss]) -> list[str]:
    """The texts of a parquet file's row groups; null is an empty text."""
    import pyarrow.parquet as parquet
    try:
        file = parquet.ParquetFile(block.path)
        table = file.read_row_groups(range(block.start, block.end), columns=[block.field])
        first = 1 + sum(file.metadata.row_group(i).num_rows for i in range(block.start))
        return [decode(data or b"", block.name, losses, row) for row, data in enumerate(as_bytes(table.column(0)), first)]
    except (OSError, ValueError) as error:
        losses.append(damaged(block.name, block.size, error, f" in row group {block.start}"))
        return []
