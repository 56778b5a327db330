"""From stories, the user's own files or a dataset of the hub -> documents without duplicates -> train, val, test -> tokens.

`prepare_mlx.py` calls `build` once for a dataset. All cores work block by block, and what is done is kept in `work/`:
interrupted, the same command goes on from there.
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
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from prepare_mlx import HarnessError, Preset, home, sha256, write_atomically
from stories import book
from tokenizer import Tokenizer

BLOCK_BYTES = 2 << 20           # text handed to one worker at a time; decides, with WORKERS, how much memory is used
WORKERS = 32                    # at most, of about 40 MB each
PASSAGE_BYTES = 2048            # a text without document separators is cut at blank lines into passages of this size
DOCUMENT_BYTES = 1 << 16        # a document twice as long is cut into passages of this size: a book would be a whole split
SEPARATOR = b"<|endoftext|>"    # between the documents of a .txt or .md file, where it has any
STORIES_BYTES = 8 << 20         # to train on: more than a CPU reads in five minutes
TEXT_KINDS = (".txt", ".md", ".jsonl", ".parquet")
TOKENIZER_BYTES = 16 << 20      # of training text, from all over the source, that the tokenizer learns from
DOWNLOADS, TRIES = 4, 5         # files at a time; times each is tried, with 0.5, 1, 2 and 4 seconds between
FORMAT = 3                      # raise it when what lies on disk changes its meaning: old datasets are then rebuilt
DATASETS = {  # name: (licence, source, file pattern in the hub repository, its commit)
    "stories": ("MIT, made by stories.py", "embedded grammar, seed 1", "", ""),
    "tinystories": ("CDLA-Sharing-1.0", "karpathy/tinystories-gpt4-clean", "*.parquet", "0397e27157956705a0260709da3095bb9c43d6a7"),
    "climbmix": ("CC-BY-NC-4.0", "karpathy/climbmix-400b-shuffle", "shard_*.parquet", "915333b4f8b8684f39aeaafea600fea6f43fb703"),
    "fineweb-edu": ("ODC-By", "HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),
}


@contextmanager
def progress(what: str, total: float, unit: str = "blocks") -> Iterator:
    """A bar on a terminal, else a line every ten seconds; use `advance(n)`. Bytes are shown with their rate."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
    columns = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else ("{task.completed}/{task.total} " + unit,)
    began = spoken = time.monotonic()
    with Progress("{task.description}", BarColumn(), *columns, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(what, total=total)

        def advance(n: float = 1) -> None:
            nonlocal spoken
            bar.advance(task, n)
            if not bar.console.is_terminal and time.monotonic() - spoken > 10:
                spoken, done = time.monotonic(), bar.tasks[task].completed
                print(f"{what}: {done:,.0f} of {total:,.0f} {unit}, {done / (spoken - began):,.1f} a second", file=sys.stderr)
        yield advance


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def identity(path: Path) -> dict:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def fetch(source: str, pattern: str, shards: int, revision: str) -> tuple[list[Path], dict]:
    """The first `shards` files of a hub dataset at a commit, branch or tag, and its commit with their names, sizes and SHA-256.

    What a branch means is looked up once and kept in listing.json: what is fetched later belongs to the same text, and what is
    there already needs no network. HF_ENDPOINT, proxies and HF_TOKEN are huggingface_hub's matter. Errors: HarnessError.
    """
    from huggingface_hub import HfApi
    place = home() / "downloads" / f"{source}@{revision}".replace("/", "--")
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "listing.json").exists():
        info = patiently(f"the list of {source} at {revision}",
                         lambda: HfApi().dataset_info(source, revision=revision, files_metadata=True, timeout=30))
        if re.fullmatch("[0-9a-f]{40}", revision) and info.sha != revision:
            raise HarnessError("data", f"{source}: expected commit {revision}, got {info.sha}")
        files = [{"name": s.rfilename, "bytes": s.size, "sha256": s.lfs and s.lfs.sha256} for s in info.siblings or []]
        write_atomically(place / "listing.json", json.dumps({"revision": info.sha, "files": files}, indent=1).encode())
    listing = json.loads((place / "listing.json").read_text())
    chosen = sorted((f for f in listing["files"] if fnmatch(f["name"], pattern)), key=lambda f: f["name"])[:shards]
    if not chosen:
        raise HarnessError("data", f"{source} has no file like {pattern}")
    with progress(f"fetching {source}", sum(f["bytes"] or 0 for f in chosen), "bytes") as advance, \
            concurrent.futures.ThreadPoolExecutor(DOWNLOADS) as pool:
        for job in [pool.submit(fetch_file, source, listing["revision"], f, place, advance) for f in chosen]:
            job.result()
    paths = [place / f["name"] for f in chosen]
    return paths, {"revision": listing["revision"], "files": [identity(p) for p in paths]}


def fetch_file(source: str, revision: str, file: dict, place: Path, advance) -> None:
    """Bring one file to `place`: continued where it broke off, under its name only when it is whole."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get  # hf_hub_download starts from nothing after every interruption
    from huggingface_hub.utils import build_hf_headers, tqdm
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # what is lost at most; it would be 10 MB
    url, path = hf_hub_url(source, file["name"], repo_type="dataset", revision=revision), place / file["name"]

    class Meter(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": True})
            advance(options.get("initial") or 0)

        def update(self, n=1):
            advance(n)

    def once() -> None:
        with open(f"{path}.part", "ab") as out:
            http_get(url, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=file["bytes"], tqdm_class=Meter)
        got = sha256_of(Path(f"{path}.part"))
        if got != (file["sha256"] or got):
            os.unlink(f"{path}.part")
            raise OSError(f"expected SHA-256 {file['sha256']}, got {got}; it is fetched anew")
        os.replace(f"{path}.part", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        patiently(file["name"], once)


def patiently(what: str, once):
    """Call `once` up to TRIES times. What will not get better (not found, forbidden, disk full) is an error at once."""
    for attempt in range(TRIES):
        try:
            return once()
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if attempt == TRIES - 1 or (400 <= status < 500 and status not in (408, 429)) or getattr(error, "errno", 0) == 28:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise HarnessError("data", f"{what} could not be fetched: {reason}. "
                                   "What arrived is kept, run the same command again to go on (a commit that is gone: --revision). "
                                   "HF_ENDPOINT, HTTPS_PROXY, HF_TOKEN count; `--dataset stories` needs no network") from error
            time.sleep(2**attempt / 2)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Files, cut into blocks and documents
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Block:
    """A piece of a source file that one worker reads: a byte range, or row groups of a parquet file."""
    path: str
    start: int
    end: int
    field: str = "text"         # of a .jsonl object, column of a .parquet file


def cut(window: bytes, *marks: bytes) -> int:
    """Where to cut text: after one of `marks`, a blank line, a line or a space, whichever is there; else between two characters."""
    for mark in (*marks, b"\n\n", b"\n", b" "):
        if (found := window.find(mark)) >= 0:
            return found + len(mark)
    return next((i for i, b in enumerate(window[:4]) if b & 0xC0 != 0x80), 0)


def passages(data: bytes, size: int) -> list[bytes]:
    """Cut text into passages of about `size` bytes at blank lines (else lines, else spaces); joined they are `data` again."""
    cuts, position = [0], 0
    while len(data) - position > 2 * size:
        position += size + cut(data[position + size : position + 8 * size])
        cuts.append(position)
    return [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True) if b > a or not data]


def read_block(block: Block) -> tuple[list[str], dict[str, int]]:
    """The documents of a block, and counts of what was skipped: `invalid_utf8`, `empty`."""
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
                raise HarnessError("data", f"{block.path}: expected one JSON object a line with a string field "
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
    """Cut one source file into blocks at document borders. A .gz file, and a parquet file of huge row groups, is first unpacked
    into `work`."""
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
                raise HarnessError("data", f"{path}: expected a text column {field!r}, it has {schema}; name one with --field")
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
            if max(groups, default=0) <= 8 * BLOCK_BYTES:
                return [Block(str(path), i, i + 1, field) for i in range(len(groups))]
            unpacked = work / f"{sha256(str(path).encode())[:12]}.jsonl"
            with open(unpacked, "w", encoding="utf-8") as target:
                for text in (t for batch in file.iter_batches(256, columns=[field]) for t in batch.column(0).to_pylist()):
                    target.write(json.dumps({field: text or ""}) + "\n")
            path = unpacked
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's errors are OSErrors or ValueErrors
        raise HarnessError("data", f"{path}: cannot be read as {path.suffix}, it is damaged or cut off ({error})") from error
    size, borders, lines = path.stat().st_size, [0], path.suffix.lower() == ".jsonl"
    with open(path, "rb") as f:
        while size - borders[-1] > BLOCK_BYTES:
            start = f.seek(borders[-1] + BLOCK_BYTES)
            borders.append(start + (len(f.readline()) if lines else cut(f.read(BLOCK_BYTES), SEPARATOR)))  # no line of JSON is cut
    return [Block(str(path), a, b, field) for a, b in zip(borders, [*borders[1:], size], strict=True) if b > a]


def own_files(dataset: str) -> list[Path]:
    """The user's files behind `text:PATH`, in a fixed order; what is hidden is left out."""
    root = Path(dataset.removeprefix("text:")).expanduser()
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    files = [p for p in found if Path(p.name.lower().removesuffix(".gz")).suffix in TEXT_KINDS
             and not any(part.startswith(".") for part in p.relative_to(root).parts)]
    if not files:
        reason = f"found none among {len(found)} files" if root.exists() else "there is no such path"
        raise HarnessError("data", f"text:{root}: expected {', '.join(TEXT_KINDS)} (or .gz of them), file or folder; {reason}")
    return files


def source_files(dataset: str, preset: Preset, shards: int, revision: str, ident: str) -> tuple[list[Path], dict]:
    """The files of a dataset, fetched or made if need be, and where they came from."""
    if dataset.startswith("text:"):
        files = own_files(dataset)
        return files, {"source": dataset[5:], "licence": "the user's own", "files": [identity(p) for p in files]}
    licence, source, pattern, pinned = DATASETS[dataset]
    if dataset == "stories":
        told, sealed = home() / "work" / ident / "stories.txt", home() / "held" / f"{ident}.txt"
        told.write_bytes(book(1, STORIES_BYTES, SEPARATOR))
        if not sealed.exists():  # made once, by chance: nobody can make it again, and a second preparation finds the same text
            sealed.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(sealed, book(None, 2 * preset.eval_bytes + 10_000, SEPARATOR))
        return [told, sealed], {"source": f"{source}; val and test without a seed", "licence": licence}
    files, facts = fetch(source, pattern, shards, revision or pinned)
    return files, {"source": source, "licence": licence, **facts}


# ---------------------------------------------------------------------------------------------------------------------
# Preparation: documents without duplicates -> train / val / test -> token shards
# ---------------------------------------------------------------------------------------------------------------------

TRAIN, VAL, TEST, DROPPED = 0, 1, 2, 3
NOT_A_WORD = re.compile(r"[\W_]+")


def digests_of(block: Block, kept: Path) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """For each document two digests, uint64 [n, 2], of its normalised text (lower case, words only) and of its bytes; its bytes,
    int64 [n]; and what was skipped. Documents of one normalised text are near duplicates: only the first one stays.
    """
    if not kept.exists():  # else an earlier, interrupted preparation made it
        documents, skipped = read_block(block)
        pairs = [(NOT_A_WORD.sub(" ", d).strip().lower() or d, d) for d in documents]
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for pair in pairs for text in pair)
        sizes = np.array([len(d.encode()) for d in documents], np.int64)
        write_atomically(kept, json.dumps(skipped).encode() + b"\n" + sizes.tobytes() + digests)
    skipped, _, numbers = kept.read_bytes().partition(b"\n")
    n = len(numbers) // 24
    return np.frombuffer(numbers, np.uint64, offset=8 * n).reshape(n, 2), np.frombuffer(numbers, np.int64, n), json.loads(skipped)


def choose_splits(digests: np.ndarray, sizes: np.ndarray, eval_bytes: int, sealed: int = 0) -> np.ndarray:
    """TRAIN, VAL, TEST or DROPPED, uint8 [n], from what a document says alone: those of lowest digest go to val and then to test
    until each has `eval_bytes`, at most a tenth of everything. The last `sealed` documents are val and test, if there are any."""
    first = np.unique(digests[:, 0], return_index=True)[1]                      # in order of the digest
    pool = first[first >= len(digests) - sealed] if sealed else first
    limit = int(sizes[pool].sum()) // 2 if sealed else min(eval_bytes, int(sizes[pool].sum()) // 10)
    passed = np.cumsum(sizes[pool]) - sizes[pool]                               # bytes before each
    val = passed < limit
    splits = np.full(len(digests), DROPPED, np.uint8)
    splits[first], splits[pool] = TRAIN, np.select([val, passed < limit + sizes[pool][val].sum()], [VAL, TEST], TRAIN)
    return splits


def tokenize_block(block: Block, splits: bytes, model: bytes, part: Path) -> tuple[list[str], list[str]]:
    """Write the block's training tokens to `part`, return its validation and test documents."""
    pairs = list(zip(read_block(block)[0], splits, strict=True))
    chosen = [[d for d, s in pairs if s == k] for k in (TRAIN, VAL, TEST)]
    if not part.exists():  # else an earlier, interrupted preparation made it
        write_atomically(part, Tokenizer(model).encode_documents(chosen[TRAIN]).tobytes())
    return chosen[VAL], chosen[TEST]


def begin_worker(parent: int) -> None:
    """Ctrl-C is the parent's to handle; a parent that was killed takes its workers along."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def fingerprint(dataset: str, preset: Preset, field: str, shards: int, revision: str) -> str:
    """What a prepared dataset depends on, as 10 hex digits: the user's files byte by byte, or its name and commit; the preset."""
    if dataset == "text:" or shards < 1:
        raise HarnessError("usage", f"expected text:PATH with a path and --shards of 1 or more, got {dataset} and {shards}")
    if not (own := dataset.startswith("text:")) and dataset not in DATASETS:
        raise HarnessError("usage", f"unknown dataset {dataset!r}; expected one of {', '.join(DATASETS)} or text:PATH")
    pinned = "" if own else DATASETS[dataset][3]
    if revision and not pinned:
        raise HarnessError("usage", f"--revision {revision}: {dataset} is no dataset of the hub")
    text = [(p.name, sha256_of(p)) for p in own_files(dataset)] if own else [dataset, shards, revision or pinned]
    return sha256(json.dumps([FORMAT, text, field, asdict(preset)]).encode())[:10]


def damage(train: Path, held: Path) -> str:
    """What is wrong with a prepared dataset, "" if nothing: every file has to have the size and SHA-256 of meta.json."""
    try:
        for place in (train, held):
            for file in json.loads((place / "meta.json").read_text())["prepared"]:
                if identity(place / file["name"]) != file:
                    return f"{place / file['name']} is not the file of {file['bytes']:,} bytes that was prepared"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{train.name} is not whole ({type(error).__name__}: {error})"
    return ""


@contextmanager
def alone(ident: str) -> Iterator[None]:
    """One preparation of a dataset at a time: a second one waits, and then finds it done."""
    (home() / "work").mkdir(parents=True, exist_ok=True)
    with open(home() / "work" / f"{ident}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(dataset: str, preset: Preset, field: str, shards: int, revision: str, ident: str) -> None:
    """Fetch, clean, split, tokenise. Interrupted, it goes on where it was; nothing is seen as ready before the last rename."""
    work = home() / "work" / ident
    (work / "parts").mkdir(parents=True, exist_ok=True)
    files, origin = source_files(dataset, preset, shards, revision, ident)
    blocks = [b for path in files for b in blocks_of(path, field, work)]
    numbers = range(len(blocks))
    pool = concurrent.futures.ProcessPoolExecutor(
        min(os.cpu_count() or 1, WORKERS, max(1, len(blocks))), multiprocessing.get_context("spawn"), begin_worker, (os.getpid(),))
    try:
        # 1. every document once: duplicates go, and the digest says which split a document belongs to
        kept = [work / "parts" / f"{i:06d}.digests" for i in numbers]
        with progress("reading", len(blocks)) as advance:
            read = [r for r in pool.map(digests_of, blocks, kept) if not advance()]
        if not sum(len(sizes) for _, sizes, _ in read):
            raise HarnessError("data", f"{dataset}: expected text, found no document in {len(files)} files "
                               f"({', '.join(f'{sum(r[2][k] for r in read):,} {k}' for k in ('invalid_utf8', 'empty'))})")
        digests, sizes = (np.concatenate([r[k] for r in read]) for k in (0, 1))
        sealed = sum(len(r[1]) for b, r in zip(blocks, read, strict=True) if Path(b.path).parent == home() / "held")
        splits = choose_splits(digests, sizes, preset.eval_bytes, sealed)
        stays = splits != DROPPED
        same = len(splits) - len(np.unique(digests[:, 1]))
        counts = {"source_files": len(files), "empty_files": sum(p.stat().st_size == 0 for p in files), "documents": len(splits),
                  "bytes": int(sizes[stays].sum()), "duplicates": same, "near_duplicates": int((~stays).sum()) - same,
                  **{k: sum(r[2][k] for r in read) for k in ("invalid_utf8", "empty")}}
        if counts["bytes"] < 20 * preset.seq_len or not (splits == TRAIN).any():
            raise HarnessError("data", f"the text is too small: {counts['bytes']:,} bytes in {stays.sum():,} documents, expected "
                               f"about {60 * preset.seq_len:,} at least, {10 * preset.eval_bytes:,} for the whole evaluation")
        everything = sha256(digests.tobytes() + splits.tobytes())
        by_block = [part.tobytes() for part in np.split(splits, np.cumsum([len(r[1]) for r in read])[:-1])]
        # 2. the tokenizer, from training documents spread over the source
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
        # 3. token shards; a part's name says what it was made from
        stamp = sha256(tokenizer.model + everything.encode())[:12]
        parts = [work / "parts" / f"{stamp}-{i:06d}.bin" for i in numbers]
        with progress("tokenising", len(blocks)) as done:
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
    os.replace(target, home() / "train" / ident)  # from here on it is ready
    shutil.rmtree(work)
    said = ", ".join(f"{n:,} {k.replace('_', ' ')}" for k, n in counts.items())
    print(f"{dataset}: {said}; vocabulary {tokenizer.vocab_size:,}", file=sys.stderr)


def keep_held_out(place: Path, meta: dict, tokenizer: Tokenizer, preset: Preset, held_out: list) -> None:
    """Write val.bin and test.bin, whole documents in order, where only the scorer looks."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, mode=0o700)
    for k, name in enumerate(("val", "test")):
        texts = [text for pair in held_out for text in pair[k]]
        tokens, data = tokenizer.encode_documents(texts), "".join(texts).encode()
        if tokenizer.decode_bytes(tokens) != data:
            raise HarnessError("data", f"{name}: the tokenizer lost something; please report this text")
        if (need := 2 * preset.seq_len) > len(tokens):
            raise HarnessError("data", f"the text is too small: {name} has {len(tokens):,} tokens, expected at least {need:,} (two "
                               f"rows); use about {need / max(len(tokens), 1):.1f} times as much text, or a smaller preset")
        if (short := preset.eval_bytes - len(data)) > 0:
            print(f"note: {name} has {len(data):,} bytes, a tenth of the text and {short:,} fewer than the preset scores; "
                  f"{10 * preset.eval_bytes:,} bytes of text would fill it; the score is noisier", file=sys.stderr)
        meta |= {f"{name}_bytes": len(data), f"{name}_documents": len(texts), f"{name}_sha256": sha256(data)}
        (place / f"{name}.bin").write_bytes(tokens.tobytes())
    (place / "tokenizer.model").write_bytes(tokenizer.model)
    finish(place, meta)


def finish(place: Path, meta: dict) -> None:
    """Write meta.json, with the size and SHA-256 of every other file there."""
    files = [identity(p) for p in sorted(place.iterdir()) if p.name != "meta.json"]
    write_atomically(place / "meta.json", json.dumps(meta | {"prepared": files}, indent=1).encode())
