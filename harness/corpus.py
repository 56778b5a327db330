"""
Prepare a dataset: stories, the user's own files or a hub dataset -> documents without duplicates -> train, val, test -> tokens.

`prepare` is the entry. Worker processes read and tokenise block by block and keep finished parts in `work/`, so that an
interrupted preparation continues where it stopped.
"""

import concurrent.futures
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from harness import HarnessError, home, sha256, write_atomically
from harness.download import bar, fetch, identity, sha256_of
from harness.machine import PRESETS, Preset, detect_preset
from harness.stories import book
from harness.tokenizer import Tokenizer

BLOCK_BYTES = 2 << 20           # text handed to one worker at a time; with WORKERS it decides how much memory is used
WORKERS = 32                    # maximum number of worker processes, of about 40 MB each
PASSAGE_BYTES = 2048            # a text without document separators is cut at blank lines into passages of about this size
DOCUMENT_BYTES = 1 << 16        # a document twice as long is cut into passages of this size: one book could fill a whole split
SEPARATOR = b"<|endoftext|>"    # between the documents of a .txt or .md file, if the file has any
STORIES_BYTES = 8 << 20         # size of the training stories: more than a CPU reads in five minutes
TEXT_KINDS = (".txt", ".md", ".jsonl", ".parquet")
TOKENIZER_BYTES = 16 << 20      # training text that the tokenizer learns from, sampled from the whole source
FORMAT = 3                      # raise it when the files on disk change their meaning: existing datasets are then rebuilt
DATASETS = {  # name: (licence, source, file pattern in the hub repository, its commit)
    "stories": ("MIT, made by harness/stories.py", "embedded grammar, seed 1", "", ""),
    "tinystories": ("CDLA-Sharing-1.0", "karpathy/tinystories-gpt4-clean", "*.parquet", "0397e27157956705a0260709da3095bb9c43d6a7"),
    "climbmix": ("CC-BY-NC-4.0", "karpathy/climbmix-400b-shuffle", "shard_*.parquet", "915333b4f8b8684f39aeaafea600fea6f43fb703"),
    "fineweb-edu": ("ODC-By", "HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),
}


def prepare(dataset: str, preset_name: str, *, vocab_size=0, field="text", shards=1, revision="") -> dict:
    """Make a dataset ready and make it the current one. Returns the entry that CONTRIBUTING.md describes.

    dataset: a name in DATASETS, or text:PATH. vocab_size: tokens; 0: the preset's. field: field of a .jsonl object or column of a
    .parquet file. shards: number of hub files. revision: commit, branch or tag of a hub dataset; "": the commit in DATASETS.
    Errors: HarnessError("usage", "data").
    """
    if preset_name not in PRESETS:
        raise HarnessError("usage", f"unknown preset {preset_name!r}; expected one of {', '.join(PRESETS)}")
    preset = replace(PRESETS[preset_name], vocab_size=vocab_size or PRESETS[preset_name].vocab_size)
    if dataset.startswith("text:") and dataset != "text:":  # absolute, because the driver hides this path from trainings
        dataset = f"text:{Path(dataset[5:]).expanduser().absolute()}"
    slug = re.sub(r"[^a-z0-9]+", "-", Path(dataset.removeprefix("text:")).stem.lower()).strip("-")[:32] or "text"
    ident = f"{slug}-{preset.vocab_size}-{fingerprint(dataset, preset, field, shards, revision)}"
    train, held = home() / "train" / ident, home() / "held" / ident
    with alone(ident):
        if problem := damage(train, held):
            if train.exists():
                print(f"note: {problem}; preparing it again", file=sys.stderr)
            build(dataset, preset, field, shards, revision, ident)
    meta = json.loads((train / "meta.json").read_text())
    entry = {"id": ident, "train_dir": str(train), "held_dir": str(held), "dataset": dataset, "preset": preset_name,
             "vocab_size": meta["vocab_size"], "seq_len": preset.seq_len, "budget": preset.budget,
             "data_hash": meta["data_hash"], "tokenizer_hash": meta["tokenizer_hash"], "device": detect_preset()}
    write_atomically(home() / "current.json", json.dumps(entry, indent=1).encode())
    return entry


# ---------------------------------------------------------------------------------------------------------------------
# Files -> blocks -> documents
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Block:
    """Part of a source file that one worker reads: bytes start..end, or row groups start..end of a parquet file."""
    path: str
    start: int
    end: int
    field: str = "text"         # field of a .jsonl object, or column of a .parquet file


def cut(window: bytes, *marks: bytes) -> int:
    """Find where to cut text: behind the first of `marks`, else a blank line, line end or space, else between two characters."""
    for mark in (*marks, b"\n\n", b"\n", b" "):
        if (found := window.find(mark)) >= 0:
            return found + len(mark)
    return next((i for i, b in enumerate(window[:4]) if b & 0xC0 != 0x80), 0)


def passages(data: bytes, size: int) -> list[bytes]:
    """Cut text into passages of about `size` bytes at blank lines, else line ends, else spaces. Joined, they are `data` again."""
    cuts, position = [0], 0
    while len(data) - position > 2 * size:
        position += size + cut(data[position + size : position + 8 * size])
        cuts.append(position)
    return [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True) if b > a or not data]


def read_block(block: Block) -> tuple[list[str], dict[str, int]]:
    """Read a block's documents. Also returns how many documents were skipped: {"invalid_utf8", "empty"}.
    Errors: HarnessError("data") if a .jsonl line has no such text field."""
    if block.path.lower().endswith(".parquet"):
        import pyarrow.parquet as parquet
        table = parquet.ParquetFile(block.path).read_row_groups(range(block.start, block.end), columns=[block.field])
        raw = [(text or "").encode() for text in table.column(block.field).to_pylist()]
    else:
        with open(block.path, "rb") as f:
            f.seek(block.start)
            data = f.read(block.end - block.start)
        if block.path.lower().endswith(".jsonl"):
            try:
                raw = [json.loads(line)[block.field].encode("utf-8", "surrogatepass") for line in data.splitlines() if line.strip()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise HarnessError("data", f"{block.path}: expected one JSON object per line with a string field "
                                   f"{block.field!r}, got {error!r}; name the field with --field") from error
        elif SEPARATOR in data:
            raw = [document.strip(b"\r\n") for document in data.rstrip().removesuffix(SEPARATOR).split(SEPARATOR)]
        else:
            raw = passages(data, PASSAGE_BYTES)
    documents, skipped = [], {"invalid_utf8": 0, "empty": 0}
    for document in (passage for d in raw for passage in passages(d, DOCUMENT_BYTES)):
        try:
            if (text := document.decode("utf-8")).strip():
                documents.append(text)
            else:
                skipped["empty"] += 1
        except UnicodeDecodeError:
            skipped["invalid_utf8"] += 1
    return documents, skipped


def blocks_of(path: Path, field: str, work: Path) -> list[Block]:
    """Cut one source file into blocks at document borders. A .gz file, or a parquet file with huge row groups, is first unpacked
    into `work`. Errors: HarnessError("data") if the file is damaged or has no such text column."""
    try:
        if path.suffix.lower() == ".gz":
            unpacked = work / f"{sha256(str(path).encode())[:12]}-{path.stem.lower()}"
            with gzip.open(path, "rb") as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            path = unpacked
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as parquet
            file = parquet.ParquetFile(path)
            schema = {f.name: str(f.type) for f in file.schema_arrow}
            if schema.get(field) not in ("string", "large_string"):
                raise HarnessError("data", f"{path}: expected a text column {field!r}, it has {schema}; choose one with --field")
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
            if max(groups, default=0) <= 8 * BLOCK_BYTES:
                return [Block(str(path), i, i + 1, field) for i in range(len(groups))]
            unpacked = work / f"{sha256(str(path).encode())[:12]}.jsonl"
            with open(unpacked, "w", encoding="utf-8") as target:
                for text in (t for batch in file.iter_batches(256, columns=[field]) for t in batch.column(0).to_pylist()):
                    target.write(json.dumps({field: text or ""}) + "\n")
            path = unpacked
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's errors are OSErrors or ValueErrors
        raise HarnessError("data", f"{path}: cannot be read as {path.suffix}, it is damaged or incomplete ({error})") from error
    size, borders, lines = path.stat().st_size, [0], path.suffix.lower() == ".jsonl"
    with open(path, "rb") as f:
        while size - borders[-1] > BLOCK_BYTES:
            start = f.seek(borders[-1] + BLOCK_BYTES)
            # a JSON line is never cut
            borders.append(start + (len(f.readline()) if lines else cut(f.read(BLOCK_BYTES), SEPARATOR)))
    return [Block(str(path), a, b, field) for a, b in zip(borders, [*borders[1:], size], strict=True) if b > a]


def own_files(dataset: str) -> list[Path]:
    """List the user's files behind `text:PATH` in a fixed order, without hidden ones.
    Errors: HarnessError("data") if there are none."""
    root = Path(dataset.removeprefix("text:")).expanduser()
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    files = [p for p in found if Path(p.name.lower().removesuffix(".gz")).suffix in TEXT_KINDS
             and not any(part.startswith(".") for part in p.relative_to(root).parts)]
    if not files:
        reason = f"found none among {len(found)} files" if root.exists() else "there is no such path"
        raise HarnessError("data", f"text:{root}: expected a file or folder of {', '.join(TEXT_KINDS)} (or .gz of them); {reason}")
    return files


def source_files(dataset: str, preset: Preset, shards: int, revision: str, ident: str) -> tuple[list[Path], dict]:
    """Return a dataset's files, fetched or generated if they are missing, and their origin for meta.json.
    Errors: HarnessError("data")."""
    if dataset.startswith("text:"):
        files = own_files(dataset)
        return files, {"source": dataset[5:], "licence": "the user's own", "files": [identity(p) for p in files]}
    licence, source, pattern, pinned = DATASETS[dataset]
    if dataset == "stories":
        training, held_out = home() / "work" / ident / "stories.txt", home() / "held" / f"{ident}.txt"
        training.write_bytes(book(1, STORIES_BYTES, SEPARATOR))
        if not held_out.exists():  # without a seed, so that nobody can generate it again; kept, so that a repetition finds it
            held_out.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(held_out, book(None, 2 * preset.eval_bytes + 10_000, SEPARATOR))
        return [training, held_out], {"source": f"{source}; val and test without a seed", "licence": licence}
    files, facts = fetch(source, pattern, shards, revision or pinned)
    return files, {"source": source, "licence": licence, **facts}


# ---------------------------------------------------------------------------------------------------------------------
# Preparation: documents without duplicates -> train / val / test -> token shards
# ---------------------------------------------------------------------------------------------------------------------

TRAIN, VAL, TEST, DROPPED = 0, 1, 2, 3
NOT_A_WORD = re.compile(r"[\W_]+")


def digests_of(block: Block, kept: Path) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Return for each document of a block two digests, uint64 [n, 2], its size in bytes, int64 [n], and the counts of skipped
    documents. `kept` is the file that stores all three.

    The first digest is of the normalised text (lower case, words only), the second of the bytes. Documents with the same normalised
    text are near duplicates; only the first one stays.
    """
    if not kept.exists():  # an interrupted preparation may have left it
        documents, skipped = read_block(block)
        pairs = [(NOT_A_WORD.sub(" ", d).strip().lower() or d, d) for d in documents]
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for pair in pairs for text in pair)
        sizes = np.array([len(d.encode()) for d in documents], np.int64)
        write_atomically(kept, json.dumps(skipped).encode() + b"\n" + sizes.tobytes() + digests)
    skipped, _, numbers = kept.read_bytes().partition(b"\n")
    n = len(numbers) // 24
    return np.frombuffer(numbers, np.uint64, offset=8 * n).reshape(n, 2), np.frombuffer(numbers, np.int64, n), json.loads(skipped)


def choose_splits(digests: np.ndarray, sizes: np.ndarray, eval_bytes: int, n_held_out: int = 0) -> np.ndarray:
    """Assign each document to TRAIN, VAL, TEST or DROPPED (duplicates), by its digest alone: uint8 [n].

    The documents with the lowest digests go to val, the next ones to test, until each has `eval_bytes`, at most a tenth of the
    text. If n_held_out > 0, val and test share the last `n_held_out` documents instead.
    digests: uint64 [n, 2], see `digests_of`. sizes: int64 [n], bytes.
    """
    first = np.unique(digests[:, 0], return_index=True)[1]                      # in the order of the digests
    pool = first[first >= len(digests) - n_held_out] if n_held_out else first
    limit = int(sizes[pool].sum()) // 2 if n_held_out else min(eval_bytes, int(sizes[pool].sum()) // 10)
    passed = np.cumsum(sizes[pool]) - sizes[pool]                               # bytes before each document
    val = passed < limit
    splits = np.full(len(digests), DROPPED, np.uint8)
    splits[first], splits[pool] = TRAIN, np.select([val, passed < limit + sizes[pool][val].sum()], [VAL, TEST], TRAIN)
    return splits


def tokenize_block(block: Block, splits: bytes, model: bytes, part: Path) -> tuple[list[str], list[str]]:
    """Write a block's training tokens to `part`. Returns its validation and its test documents."""
    pairs = list(zip(read_block(block)[0], splits, strict=True))
    chosen = [[d for d, s in pairs if s == k] for k in (TRAIN, VAL, TEST)]
    if not part.exists():  # an interrupted preparation may have left it
        write_atomically(part, Tokenizer(model).encode_documents(chosen[TRAIN]).tobytes())
    return chosen[VAL], chosen[TEST]


def begin_worker(parent: int) -> None:
    """Set up a worker process: ignore Ctrl-C, which the parent handles, and exit when the parent is gone."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def fingerprint(dataset: str, preset: Preset, field: str, shards: int, revision: str) -> str:
    """Hash everything that a prepared dataset depends on: the user's files byte by byte, or name and commit; and the preset.
    Returns 10 hexadecimal digits. Errors: HarnessError("usage")."""
    if dataset == "text:" or shards < 1:
        raise HarnessError("usage", f"expected a path after text: and --shards of at least 1, got {dataset} and {shards}")
    if not (own := dataset.startswith("text:")) and dataset not in DATASETS:
        raise HarnessError("usage", f"unknown dataset {dataset!r}; expected one of {', '.join(DATASETS)} or text:PATH")
    pinned = "" if own else DATASETS[dataset][3]
    if revision and not pinned:
        raise HarnessError("usage", f"--revision {revision}: {dataset} is not a hub dataset")
    text = [(p.name, sha256_of(p)) for p in own_files(dataset)] if own else [dataset, shards, revision or pinned]
    return sha256(json.dumps([FORMAT, text, field, asdict(preset)]).encode())[:10]


def damage(train: Path, held: Path) -> str:
    """Compare every file of a prepared dataset with the size and SHA-256 in meta.json. Returns the problem, "" if there is none."""
    try:
        for place in (train, held):
            for file in json.loads((place / "meta.json").read_text())["prepared"]:
                if identity(place / file["name"]) != file:
                    return f"{place / file['name']} is not the file of {file['bytes']:,} bytes that was prepared"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{train.name} is incomplete ({type(error).__name__}: {error})"
    return ""


@contextmanager
def alone(ident: str) -> Iterator[None]:
    """Lock the preparation of a dataset. A second process waits here, and then finds the dataset prepared."""
    (home() / "work").mkdir(parents=True, exist_ok=True)
    with open(home() / "work" / f"{ident}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(dataset: str, preset: Preset, field: str, shards: int, revision: str, ident: str) -> None:
    """Fetch, clean, split and tokenise. Only the last rename makes the dataset visible as ready. Arguments: see `prepare`.
    Errors: HarnessError("data")."""
    work = home() / "work" / ident
    (work / "parts").mkdir(parents=True, exist_ok=True)
    files, origin = source_files(dataset, preset, shards, revision, ident)
    blocks = [b for path in files for b in blocks_of(path, field, work)]
    numbers = range(len(blocks))
    pool = concurrent.futures.ProcessPoolExecutor(
        min(os.cpu_count() or 1, WORKERS, max(1, len(blocks))), multiprocessing.get_context("spawn"), begin_worker, (os.getpid(),))
    try:
        # 1. digests of all documents: they find duplicates and choose each document's split
        kept = [work / "parts" / f"{i:06d}.digests" for i in numbers]
        with bar("reading", len(blocks)) as advance:
            read = [r for r in pool.map(digests_of, blocks, kept) if not advance()]
        if not sum(len(sizes) for _, sizes, _ in read):
            raise HarnessError("data", f"{dataset}: expected text, but found no document in {len(files)} files "
                               f"({', '.join(f'{sum(r[2][k] for r in read):,} {k}' for k in ('invalid_utf8', 'empty'))})")
        digests, sizes = (np.concatenate([r[k] for r in read]) for k in (0, 1))
        n_held_out = sum(len(r[1]) for b, r in zip(blocks, read, strict=True) if Path(b.path).parent == home() / "held")
        splits = choose_splits(digests, sizes, preset.eval_bytes, n_held_out)
        stays = splits != DROPPED
        same = len(splits) - len(np.unique(digests[:, 1]))
        counts = {"source_files": len(files), "empty_files": sum(p.stat().st_size == 0 for p in files), "documents": len(splits),
                  "bytes": int(sizes[stays].sum()), "duplicates": same, "near_duplicates": int((~stays).sum()) - same,
                  **{k: sum(r[2][k] for r in read) for k in ("invalid_utf8", "empty")}}
        if counts["bytes"] < 20 * preset.seq_len or not (splits == TRAIN).any():
            raise HarnessError("data", f"the text is too small: {counts['bytes']:,} bytes in {stays.sum():,} documents, expected "
                               f"at least about {60 * preset.seq_len:,}, and {10 * preset.eval_bytes:,} for a full evaluation")
        everything = sha256(digests.tobytes() + splits.tobytes())
        by_block = [part.tobytes() for part in np.split(splits, np.cumsum([len(r[1]) for r in read])[:-1])]
        # 2. the tokenizer, learned from training documents of the whole source
        def sample() -> Iterator[str]:
            step = max(1, len(blocks) // 32)
            for i in numbers[::step]:
                left = TOKENIZER_BYTES // len(numbers[::step])
                for text in (d for d, s in zip(read_block(blocks[i])[0], by_block[i], strict=True) if s == TRAIN):
                    if (left := left - len(text.encode())) < 0:
                        break
                    yield text
        model = work / "parts" / f"{everything[:12]}.model"
        if not model.exists():
            write_atomically(model, Tokenizer.train(sample(), preset.vocab_size).model)
        tokenizer = Tokenizer(model.read_bytes())
        # 3. token shards; the hash in a part's name covers text and tokenizer
        stamp = sha256(tokenizer.model + everything.encode())[:12]
        parts = [work / "parts" / f"{stamp}-{i:06d}.bin" for i in numbers]
        with bar("tokenising", len(blocks)) as done:
            held_out = [t for t in pool.map(tokenize_block, blocks, by_block, [tokenizer.model] * len(parts), parts) if not done()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

    (target := work / "train").mkdir(exist_ok=True)
    with open(target / "train.bin", "wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    meta = {"format": FORMAT, "dataset": dataset, **origin, **counts, "vocab_size": tokenizer.vocab_size, "dtype": dtype,
            "bos_id": tokenizer.bos_id, "seq_len": preset.seq_len, "budget": preset.budget, "data_hash": everything[:16],
            "tokenizer_hash": sha256(tokenizer.model)[:16] if tokenizer.model else "bytes"}
    keep_held_out(home() / "held" / ident, dict(meta), tokenizer, preset, held_out)
    (target / "tokenizer.model").write_bytes(tokenizer.model)
    finish(target, meta)
    (home() / "train").mkdir(exist_ok=True)
    shutil.rmtree(home() / "train" / ident, ignore_errors=True)
    os.replace(target, home() / "train" / ident)  # now the dataset is ready
    shutil.rmtree(work)
    described = ", ".join(f"{n:,} {k.replace('_', ' ')}" for k, n in counts.items())
    print(f"{dataset}: {described}; vocabulary {tokenizer.vocab_size:,}", file=sys.stderr)


def keep_held_out(place: Path, meta: dict, tokenizer: Tokenizer, preset: Preset, held_out: list) -> None:
    """Write val.bin and test.bin, complete documents in order, to the folder that only the scorer reads.

    held_out: for each block its (validation documents, test documents). Errors: HarnessError("data") if a split is too small.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, mode=0o700)
    for k, name in enumerate(("val", "test")):
        texts = [text for pair in held_out for text in pair[k]]
        tokens, data = tokenizer.encode_documents(texts), "".join(texts).encode()
        if tokenizer.decode_bytes(tokens) != data:
            raise HarnessError("data", f"{name}: the tokenizer does not reproduce this text; please report it with the text")
        if (need := 2 * preset.seq_len) > len(tokens):
            raise HarnessError("data", f"the text is too small: {name} has {len(tokens):,} tokens, expected at least {need:,} (two "
                               f"rows); use {need / max(len(tokens), 1):.1f} times as much text, or a smaller preset")
        if (short := preset.eval_bytes - len(data)) > 0:
            print(f"note: {name} has {len(data):,} bytes, a tenth of the text, which is {short:,} fewer than the preset scores: "
                  f"the score will be noisier; {10 * preset.eval_bytes:,} bytes of text would be enough", file=sys.stderr)
        meta |= {f"{name}_bytes": len(data), f"{name}_documents": len(texts), f"{name}_sha256": sha256(data)}
        (place / f"{name}.bin").write_bytes(tokens.tobytes())
    (place / "tokenizer.model").write_bytes(tokenizer.model)
    finish(place, meta)


def finish(place: Path, meta: dict) -> None:
    """Write meta.json with the size and SHA-256 of every other file in `place`."""
    files = [identity(p) for p in sorted(place.iterdir()) if p.name != "meta.json"]
    write_atomically(place / "meta.json", json.dumps(meta | {"prepared": files}, indent=1).encode())
