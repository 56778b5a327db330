"""
Prepare a dataset: stories, the user's own files or a hub dataset -> documents without duplicates -> train, val, test -> tokens.

`prepare` is the entry. Worker processes read and tokenise part by part and keep finished parts in `work/`, so that an interrupted
preparation continues where it stopped. files.py reads files; overlap.py cuts texts and finds what two texts share.
"""

import concurrent.futures
import concurrent.futures.process
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from harness import HarnessError, home, sha256, write_atomically
from harness.download import alone, bar, fetch, identity, sha256_of
from harness.files import BLOCK_BYTES, SEPARATOR, Block, Loss, find_files, open_file, read_block
from harness.machine import PRESETS, Preset, detect_preset
from harness.overlap import COPY, NEIGHBOURS, SHINGLE, WINDOW, code_points, find, letters_of, sampled, stretches
from harness.stories import book
from harness.tokenizer import Tokenizer

WORKERS = 12                    # maximum number of worker processes, each of about 120 MB
HELD_OUT = 2_000_000            # bytes: val and test each get a tenth of the text until they have this much
HELD_OUT_MOST = 8_000_000       # bytes: beyond HELD_OUT each gets a twentieth of the text, until it has this much
STORIES_BYTES = 8 << 20         # size of the training stories: more than a CPU reads in five minutes
TOKENIZER_BYTES = 16 << 20      # training text that the tokenizer learns from, sampled from all documents
SHORTEST = 64                   # bytes: once held-out text is cut out of a training document, shorter remainders are left out
PHRASES = 0.007                 # share of held-out text that may also be in train, in stretches too short to be copies
LIMIT = 0.02                    # share of the text that may be left out unless --allow-loss is given
FORMAT = 4                      # raise it when the files on disk change their meaning: existing datasets are then rebuilt
DATASETS = {  # name: (licence, source, file pattern in the hub repository, its commit)
    "stories": ("MIT, made by harness/stories.py", "embedded grammar, seed 1", "", ""),
    "tinystories": ("CDLA-Sharing-1.0", "karpathy/tinystories-gpt4-clean", "*.parquet", "0397e27157956705a0260709da3095bb9c43d6a7"),
    "climbmix": ("CC-BY-NC-4.0", "karpathy/climbmix-400b-shuffle", "shard_*.parquet", "915333b4f8b8684f39aeaafea600fea6f43fb703"),
    "fineweb-edu": ("ODC-By", "HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),
}
UPSTREAM = "climbmix", "shard_06542.parquet"    # the preset `upstream`: its dataset, and the file that val and test come from


def prepare(dataset: str, preset_name: str, *, vocab_size=0, field="text", shards=1, revision="", allow_loss=False,
            make_current=True) -> dict:
    """Make a dataset ready. Returns the entry that CONTRIBUTING.md describes.

    dataset: a name in DATASETS, or text:PATH. vocab_size: tokens; 0: the preset's. field: field of a JSON object or column of a
    table. shards: number of hub files. revision: commit, branch or tag of a hub dataset; "": the commit in DATASETS.
    allow_loss: go on even if more than LIMIT of the text cannot be read. make_current: make it the default of trainings and nights.
    Errors: HarnessError("usage", "data").
    """
    if preset_name not in PRESETS:
        raise HarnessError("usage", f"unknown preset {preset_name!r}; expected one of {', '.join(PRESETS)}")
    preset = replace(PRESETS[preset_name], vocab_size=vocab_size or PRESETS[preset_name].vocab_size)
    if preset_name == "upstream" and dataset != UPSTREAM[0]:
        raise HarnessError("usage", f"the preset upstream scores a file of {UPSTREAM[0]}, and the dataset is {dataset}: leave "
                           "--dataset out, or choose --preset cuda, which has the same vocabulary and rows")
    held_file = UPSTREAM[1] if preset_name == "upstream" else ""
    if dataset.startswith("text:") and dataset != "text:":  # absolute, because the driver hides this path from trainings
        dataset = f"text:{Path(dataset[5:]).expanduser().absolute()}"
    slug = re.sub(r"[^a-z0-9]+", "-", Path(dataset.removeprefix("text:")).stem.lower()).strip("-")[:32] or "text"
    ident = f"{slug}-{preset.vocab_size}-{fingerprint(dataset, preset, field, shards, revision, held_file)}"
    train, held = home() / "train" / ident, home() / "held" / ident
    (home() / "work").mkdir(parents=True, exist_ok=True)
    with alone(home() / "work" / f"{ident}.lock"):
        if problem := damage(train, held):
            if train.exists():
                print(f"note: {problem}; preparing it again", file=sys.stderr)
            try:
                build(dataset, preset, field, shards, revision, ident, allow_loss, held_file)
            except (OSError, concurrent.futures.process.BrokenProcessPool) as error:
                raise trouble(error, ident) from error
    meta = json.loads((train / "meta.json").read_text())
    entry = {"id": ident, "train_dir": str(train), "held_dir": str(held), "dataset": dataset, "preset": preset_name,
             "vocab_size": meta["vocab_size"], "seq_len": preset.seq_len, "budget": preset.budget,
             "data_hash": meta["data_hash"], "tokenizer_hash": meta["tokenizer_hash"], "device": detect_preset()}
    if make_current:
        write_atomically(home() / "current.json", json.dumps(entry, indent=1).encode())
    return entry


def trouble(error: BaseException, ident: str) -> HarnessError:
    """The error that explains why preparing failed: the disk is full, a file is not accessible, or a worker ran out of memory."""
    work = home() / "work" / ident
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return HarnessError("data", f"the disk of {home()} is full: preparing takes about three times the size of the text; free "
                            "some space, or set AUTORESEARCH_HOME to a folder on another disk, and run the same command again")
    if isinstance(error, OSError):
        return HarnessError("data", f"{error.filename or work}: {error.strerror or error}; expected files that can be read, and a "
                            f"folder {home()} that can be written")
    return HarnessError("data", "a worker process was killed, most likely because memory ran out; free some memory and run the "
                        "same command again: it goes on where it stopped")


# ---------------------------------------------------------------------------------------------------------------------
# Reading: files -> parts, each with the documents that one worker read
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """The documents that one worker read, one after another in the file `text`."""
    text: Path
    sizes: np.ndarray           # int64 [n]: bytes of each document
    hashes: np.ndarray          # uint64 [n, 2]: of each document's letters, and of its bytes
    losses: list[Loss]
    empty: int                  # documents of white space only

    @property
    def ends(self) -> np.ndarray:
        """Where each document ends in `text`: int64 [n]."""
        return np.cumsum(self.sizes)

    def documents(self, numbers) -> list[bytes]:
        """Read the documents with these numbers."""
        ends = self.ends
        with open(self.text, "rb") as file:
            return [file.read(int(self.sizes[n])) for n in numbers if file.seek(int(ends[n] - self.sizes[n])) >= 0]


def grouped(blocks: list[Block]) -> list[list[Block]]:
    """Join small blocks, in order, to groups of about BLOCK_BYTES, so that thousands of small files make few parts."""
    groups: list[list[Block]] = []
    size = BLOCK_BYTES
    for block in blocks:
        if size + block.size > BLOCK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(block)
        size += block.size
    return groups


def read_part(blocks: list[Block], place: Path) -> Part:
    """Read the documents of some blocks and store them as `place`.text and `place`.digests. Documents with the same letters,
    that is duplicates and near duplicates, get the same first hash."""
    text, digests = place.with_suffix(".text"), place.with_suffix(".digests")
    if not digests.exists():  # an interrupted preparation may have left it
        documents: list[str] = []
        losses: list[Loss] = []
        empty = 0
        for block in blocks:
            found, lost, without = read_block(block)
            documents, losses, empty = documents + found, losses + lost, empty + without
        letters, at = letters_of(code_points("".join(documents)))
        borders = np.searchsorted(at, np.cumsum([0, *map(len, documents)]))
        raw = [d.encode() for d in documents]
        pairs = ((letters[a:b].tobytes() or d, d) for a, b, d in zip(borders, borders[1:], raw, strict=False))
        hashes = b"".join(hashlib.blake2b(data, digest_size=8).digest() for pair in pairs for data in pair)
        write_atomically(text, b"".join(raw))
        facts = json.dumps({"losses": [asdict(loss) for loss in losses], "empty": empty}).encode()
        write_atomically(digests, facts + b"\n" + np.array([len(d) for d in raw], np.int64).tobytes() + hashes)
    facts, _, numbers = digests.read_bytes().partition(b"\n")
    found, n = json.loads(facts), len(numbers) // 24
    return Part(text, np.frombuffer(numbers, np.int64, n), np.frombuffer(numbers, np.uint64, offset=8 * n).reshape(n, 2),
                [Loss(**loss) for loss in found["losses"]], found["empty"])


def check_losses(losses: list[Loss], kept: int, allow_loss: bool) -> None:
    """Print what is left out, file by file with its share of the text. kept: bytes of the text that was read.
    Errors: HarnessError("data") if more than LIMIT of the text is lost and `allow_loss` is not set."""
    if plain := [loss for loss in losses if not loss.bytes]:
        names = Counter(Path(loss.name).suffix or Path(loss.name).name for loss in plain)
        print(f"note: left out {len(plain):,} files that hold no text ({', '.join(f'{n} {k}' for k, n in names.most_common(5))})",
              file=sys.stderr)
    by_file: dict[str, list[Loss]] = {}
    for loss in losses:
        if loss.bytes:
            by_file.setdefault(loss.name, []).append(loss)
    lost = sum(loss.bytes for loss in losses)
    total = max(kept + lost, 1)
    lines = []
    for name, found in sorted(by_file.items(), key=lambda item: -sum(loss.bytes for loss in item[1])):
        size, where = sum(loss.bytes for loss in found), sorted(loss.where for loss in found if loss.where)
        places = f" (line or row {', '.join(map(str, where[:3]))}{', ...' if len(where) > 3 else ''})" if where else ""
        lines.append(f"{name}: {size:,} bytes, {share(size, total)} of the text: {found[0].why}{places}")
    shown = "\n  ".join([*lines[:10], *([f"and {len(lines) - 10:,} more files"] if len(lines) > 10 else [])])
    if lost > LIMIT * total and not allow_loss:
        raise HarnessError("data", f"{share(lost, total)} of the text would be left out, expected at most {100 * LIMIT:g} %:\n"
                           f"  {shown}\nmend or move these files, or add --allow-loss to go on without them")
    if lines:
        print(f"note: left out {lost:,} bytes, {share(lost, total)} of the text:\n  {shown}", file=sys.stderr)


def share(part: int, total: int) -> str:
    """A share in per cent with two significant digits: 0.031 %."""
    return f"{100 * part / total:.2g} %" if part < total else "100 %"


def source_files(dataset: str, preset: Preset, shards: int, revision: str, ident: str,
                 held_file: str) -> tuple[list[Path], list[Loss], dict]:
    """Fetch or generate the files of a dataset if they are missing. Returns the files, what was left out, and the origin for
    meta.json. For `stories`, and for a hub dataset with a `held_file`, the last file has the held-out text. Errors:
    HarnessError("data")."""
    if dataset.startswith("text:"):
        files, losses = find_files(Path(dataset[5:]))
        return files, losses, {"source": dataset[5:], "licence": "the user's own", "files": [identity(p) for p in files]}
    licence, source, pattern, pinned = DATASETS[dataset]
    if dataset == "stories":
        training, held_out = home() / "work" / ident / "stories.txt", home() / "held" / f"{ident}.txt"
        training.write_bytes(book(1, STORIES_BYTES, SEPARATOR))
        if not held_out.exists():  # without a seed, so that nobody can generate it again; kept, so that a repetition finds it
            held_out.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(held_out, book(None, 3 * preset.eval_bytes + 10_000, SEPARATOR))
        return [training, held_out], [], {"source": f"{source}; val and test without a seed", "licence": licence}
    files, facts = fetch(source, pattern, shards, revision or pinned, held_file)
    return files, [], {"source": source, "licence": licence, **facts}


# ---------------------------------------------------------------------------------------------------------------------
# Splits: remove duplicates, choose val and test by hash, then remove from train what is also in held-out text
# ---------------------------------------------------------------------------------------------------------------------

TRAIN, VAL, TEST, DROPPED = 0, 1, 2, 3


def choose_splits(hashes: np.ndarray, sizes: np.ndarray, n_held_out: int = 0, most: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Assign each document to TRAIN, VAL, TEST or DROPPED (duplicates). Returns this, uint8 [n], and the numbers of the held-out
    documents in the order in which a preset scores them.

    Only the text decides, so that every preset gets the same training documents. After duplicates are dropped, the documents
    with the lowest hashes are held out, even hashes for val and odd hashes for test, until each split has `held_out_limit`
    bytes. If n_held_out > 0, val and test come from the last `n_held_out` documents instead, in their order, until each has
    `most` bytes (0: all of them), and no other document is held out. hashes: uint64 [n, 2], see `Part`. sizes: int64 [n],
    bytes.
    """
    first = np.unique(hashes[:, 0], return_index=True)[1]                       # in the order of the hashes
    splits = np.full(len(hashes), DROPPED, np.uint8)
    splits[first] = TRAIN
    pool = first[first >= len(hashes) - n_held_out] if n_held_out else first
    limit = (most or sizes[pool].sum()) if n_held_out else held_out_limit(int(sizes[pool].sum()))
    if n_held_out:
        pool = np.sort(pool)
        splits[pool] = DROPPED
    order = []
    for parity, split in ((0, VAL), (1, TEST)):
        own = pool[hashes[pool, 0] % 2 == parity]
        own = own[np.cumsum(sizes[own]) - sizes[own] < limit]                   # bytes before each document
        splits[own] = split
        order.append(own)
    return splits, np.concatenate(order)


def held_out_limit(total: int) -> int:
    """Bytes that val and test each get of a text of `total` bytes."""
    return min(HELD_OUT_MOST, total // 10, max(HELD_OUT, total // 20))


def compared(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose the windows of a UTF-8 text to compare. Returns the position of each in letters, int64 [k], its hash, uint64 [k], and
    the position of each letter in bytes, int64 [letters]."""
    letters, at = letters_of(code_points(data.decode()))
    if not data.isascii():
        at = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)[at]
    return *sampled(letters), at


def shared(data: bytes, sizes: np.ndarray, wanted: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the stretches that documents share with held-out text. Returns two arrays. The first has a row for each stretch, int64
    [k, 4]: document, first byte in the document, byte after the last, number of letters. The second has a row for each held-out
    window in a stretch shorter than COPY, float64 [k, 3]: the window, letters of the stretch, and how many shingles of SHINGLE
    letters the window represents.

    data: the documents, one after another. sizes: int64 [n], bytes of each. wanted: bool [n], which documents count. index: sorted
    hashes of the held-out windows.
    """
    begins, hashes, at = compared(data)
    hit, windows = find(hashes, index)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    owner = np.searchsorted(ends, at, side="right")                             # the document of each letter
    counts = wanted[owner[begins[hit]]] & wanted[owner[begins[hit] + WINDOW - 1]]
    begins, windows = begins[hit][counts], windows[counts]
    at = np.append(at, len(data))
    rows, phrases = [], []
    for a, b in zip(*stretches(begins), strict=True):
        inside = windows[np.searchsorted(begins, a) : np.searchsorted(begins, b)]
        if b - a < COPY:  # a stretch goes on for up to NEIGHBOURS - 1 letters at both ends, for as many in all on average
            phrases += [(window, b - a, (b - a + NEIGHBOURS - SHINGLE) / len(inside)) for window in inside]
        rows += [(n, max(at[a], starts[n]) - starts[n], min(at[b], ends[n]) - starts[n], b - a)
                 for n in range(owner[a], owner[b - 1] + 1) if wanted[n]]
    return np.array(rows, np.int64).reshape(-1, 4), np.array(phrases, np.float64).reshape(-1, 3)


def leak(found: list[tuple[np.ndarray, np.ndarray]], times: np.ndarray, shortest: int) -> float:
    """Estimate the share of held-out shingles that train still has after shared stretches of `shortest` letters or more are
    removed. found: what `shared` returned for each part. times: how often each window of the index occurs in held-out text."""
    remaining = np.zeros(len(times))
    for _, phrases in found:
        short = phrases[phrases[:, 1] < shortest]
        np.maximum.at(remaining, short[:, 0].astype(np.int64), short[:, 2])
    # NEIGHBOURS + 1 windows of text give two that are compared, and nearly as many shingles as windows
    return float(remaining @ times) / max(times.sum() * (NEIGHBOURS + 1) / 2, 1)


def shared_in_part(part: Part, splits: bytes, index: Path) -> tuple[np.ndarray, np.ndarray]:
    """`shared` for the training documents of a part. index: file of the held-out windows."""
    return shared(part.text.read_bytes(), part.sizes, np.frombuffer(splits, np.uint8) == TRAIN, np.load(index))


def batches_of(documents: list[bytes]) -> Iterator[list[bytes]]:
    """Split a list of documents into lists of about BLOCK_BYTES, to bound memory."""
    ends = np.cumsum([len(d) for d in documents]) // BLOCK_BYTES
    for group in np.split(np.arange(len(documents)), np.flatnonzero(np.diff(ends)) + 1):
        yield [documents[n] for n in group]


def windows_of(documents: list[bytes]) -> np.ndarray:
    """The hashes of all chosen windows of some documents, including repeated ones: uint64 [n]."""
    return np.concatenate([np.empty(0, np.uint64), *(compared(b"".join(d))[1] for d in batches_of(documents))])


def repeated(documents: list[bytes], index: np.ndarray) -> np.ndarray:
    """Which documents contain a copy from the text whose windows are in `index`: bool [n]."""
    found, passed = np.zeros(len(documents), bool), 0
    for batch in batches_of(documents):
        rows, _ = shared(b"".join(batch), np.array([len(d) for d in batch], np.int64), np.ones(len(batch), bool), index)
        found[passed + rows[rows[:, 3] >= COPY, 0]] = True
        passed += len(batch)
    return found


def without(document: bytes, spans: list[tuple[int, int]]) -> list[bytes]:
    """The pieces of a document that remain when byte ranges, in ascending order, are cut out; without pieces below SHORTEST."""
    if not spans:
        return [document]
    edges = [0, *(edge for span in spans for edge in span), len(document)]
    pieces = (document[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
    return [p for p in pieces if len(p) >= SHORTEST and p.strip()]


def training_texts(part: Part, numbers: np.ndarray, spans: np.ndarray) -> list[str]:
    """The texts of some training documents, without the stretches that held-out text has, too. spans: int64 [k, 4], see
    `shared`."""
    by_document: dict[int, list[tuple[int, int]]] = {}
    for n, a, b, _ in spans.tolist():
        by_document.setdefault(n, []).append((a, b))
    return [piece.decode() for n, document in zip(numbers.tolist(), part.documents(numbers), strict=True)
            for piece in without(document, by_document.get(n, []))]


# ---------------------------------------------------------------------------------------------------------------------
# Building: parts -> tokenizer -> token shards
# ---------------------------------------------------------------------------------------------------------------------

def tokenize_part(part: Part, splits: bytes, spans: np.ndarray, model: bytes, target: Path) -> tuple[int, int]:
    """Write the training tokens of a part to `target`. Returns the number of documents and bytes.
    Errors: HarnessError("data") if decoding the tokens does not give the same text."""
    texts = training_texts(part, np.flatnonzero(np.frombuffer(splits, np.uint8) == TRAIN), spans)
    data = "".join(texts).encode()
    if not target.exists():  # an interrupted preparation may have left it
        tokenizer = Tokenizer(model)
        tokens = tokenizer.encode_documents(texts)
        if tokenizer.decode_bytes(tokens.tolist()) != data:
            raise HarnessError("data", "train: the tokenizer does not reproduce this text; please report it with the text")
        write_atomically(target, tokens.tobytes())
    return len(texts), len(data)


def begin_worker() -> None:
    """Set up a worker process: ignore Ctrl-C, which the parent handles, and exit when the parent is gone."""
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def fingerprint(dataset: str, preset: Preset, field: str, shards: int, revision: str, held_file: str = "") -> str:
    """Hash everything that a prepared dataset depends on: the preset, and for own text every byte of the files and what is left
    out, for another dataset its name and commit. Returns 10 hexadecimal digits. Errors: HarnessError("usage", "data")."""
    if dataset == "text:" or shards < 1:
        raise HarnessError("usage", f"expected a path after text: and --shards of at least 1, got {dataset} and {shards}")
    if not (own := dataset.startswith("text:")) and dataset not in DATASETS:
        raise HarnessError("usage", f"unknown dataset {dataset!r}; expected one of {', '.join(DATASETS)} or text:PATH")
    pinned = "" if own else DATASETS[dataset][3]
    if revision and not pinned:
        raise HarnessError("usage", f"--revision {revision}: {dataset} is not a hub dataset")
    try:
        files, losses = find_files(Path(dataset[5:])) if own else ([], [])
        facts = [(p.name, sha256_of(p)) for p in files] + [asdict(loss) for loss in losses]
        text = facts if own else [dataset, shards, revision or pinned, *([held_file] if held_file else [])]
    except OSError as error:
        raise HarnessError("data", f"{error.filename}: cannot be read ({error.strerror or error})") from error
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


def build(dataset: str, preset: Preset, field: str, shards: int, revision: str, ident: str, allow_loss: bool,
          held_file: str) -> None:
    """Fetch, clean, split and tokenise. Only the last rename makes the dataset visible as ready. Arguments: see `prepare`.
    Errors: HarnessError("data")."""
    work = home() / "work" / ident
    (work / "parts").mkdir(parents=True, exist_ok=True)
    own = dataset.startswith("text:")
    files, losses, origin = source_files(dataset, preset, shards, revision, ident, held_file)
    made = dataset == "stories"  # its held-out text is made, not copied
    last = str(files[-1]) if made or held_file else ""
    workers = min(os.cpu_count() or 1, WORKERS)
    pool: concurrent.futures.Executor
    if sum(p.stat().st_size for p in files) < BLOCK_BYTES:  # a worker process would take longer to start than to work
        pool = concurrent.futures.ThreadPoolExecutor(1)
    else:
        pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker)
    try:
        # 1. files -> documents and their hashes
        few = 1 + len(files) // (8 * workers)
        opened = list(pool.map(open_file, files, [field] * len(files), [work] * len(files), chunksize=few))
        losses += [loss for _, lost in opened for loss in lost]
        held_out = [b for blocks, _ in opened for b in blocks if b.name == last]
        groups = grouped([b for blocks, _ in opened for b in blocks if b not in held_out]) + grouped(held_out)
        numbers = range(len(groups))
        with bar("reading", len(groups)) as advance:
            parts = [p for p in pool.map(read_part, groups, [work / "parts" / f"{i:06d}" for i in numbers]) if not advance()]
        losses += [loss for part in parts for loss in part.losses]
        sizes = np.concatenate([np.empty(0, np.int64), *(part.sizes for part in parts)])
        hashes = np.concatenate([np.empty((0, 2), np.uint64), *(part.hashes for part in parts)])
        if not own and (broken := next((loss for loss in losses if loss.damage), None)):
            raise HarnessError("data", f"{broken.name}: {broken.why}; remove this file and run the same command again")
        check_losses(losses, int(sizes.sum()), allow_loss)
        empty = sum(part.empty for part in parts)
        if not len(sizes):
            raise HarnessError("data", f"{dataset}: expected text, but found no document in {len(files)} files ({empty:,} empty)")
        # 2. the split, and what train shares with it
        n_held_out = sum(len(part.sizes) for part in parts[len(parts) - len(grouped(held_out)) :])
        splits, order = choose_splits(hashes, sizes, n_held_out, preset.eval_bytes if held_file else 0)
        first = np.cumsum([0, *(len(part.sizes) for part in parts)])            # number of each part's first document
        val, test = (documents_of(parts, first, order[splits[order] == k]) for k in (VAL, TEST))
        in_val = windows_of([] if made else val)
        twice = repeated(test, np.unique(in_val))                               # in val, too: neither train nor test
        splits[order[splits[order] == TEST][twice]] = DROPPED
        order, test = order[splits[order] != DROPPED], [d for d, out in zip(test, twice, strict=True) if not out]
        in_test = windows_of([] if made else test)
        index, times = np.unique(np.concatenate([in_val, in_test]), return_counts=True)
        np.save(work / "held_out.npy", index)
        by_part = [s.tobytes() for s in np.split(splits, first[1:-1])]
        with bar("comparing", len(groups)) as advance:
            found = [f for f in pool.map(shared_in_part, parts, by_part, [work / "held_out.npy"] * len(parts)) if not advance()]
        # of the user's own text, also shorter stretches are removed until at most PHRASES is shared; a hub dataset keeps phrases
        shortest = next((n for n in (COPY, SHINGLE) if leak(found, times, n) <= PHRASES), 0) if own else COPY
        spans = [rows[rows[:, 3] >= shortest] for rows, _ in found]
        stays = splits != DROPPED
        same = len(splits) - len(np.unique(hashes[:, 1]))
        counts = {"source_files": len(files), "empty_files": sum(p.stat().st_size == 0 for p in files), "documents": len(splits),
                  "bytes": int(sizes[stays].sum()), "duplicates": same,
                  "near_duplicates": len(splits) - len(np.unique(hashes[:, 0])) - same, "empty": empty,
                  "bytes_left_out": sum(loss.bytes for loss in losses),
                  "bytes_copied_from_held_out": int(sum((rows[:, 2] - rows[:, 1]).sum() for rows in spans))}
        if counts["bytes"] < 20 * preset.seq_len or not (splits == TRAIN).any():
            raise HarnessError("data", f"the text is too small: {counts['bytes']:,} bytes in {stays.sum():,} documents, expected "
                               f"at least about {60 * preset.seq_len:,}, and {enough(preset):,} for a full evaluation; "
                               f"{same:,} duplicates were left out")
        origin["shared_with_train"] = round(leak(found, times, shortest), 5)
        chosen = [within(order[splits[order] == k], sizes, preset.eval_bytes) for k in (VAL, TEST)]
        everything = sha256(b"".join(numbers.tobytes() for numbers in (hashes, splits, *chosen, *spans)))

        # 3. the tokenizer, learned from training documents of the whole source
        def sample() -> Iterator[str]:
            rate = min(TOKENIZER_BYTES / max(int(sizes[splits == TRAIN].sum()), 1), 1)
            for i, part in enumerate(parts):
                drawn = (splits[first[i] : first[i + 1]] == TRAIN) & (part.hashes[:, 1] <= np.uint64(int(rate * (2**64 - 1))))
                yield from training_texts(part, np.flatnonzero(drawn), spans[i])
        model = work / "parts" / f"{everything[:12]}.model"
        if not model.exists():
            write_atomically(model, Tokenizer.train(sample(), preset.vocab_size).model)
        tokenizer = Tokenizer(model.read_bytes())
        # 4. token shards; the hash in a file's name covers text and tokenizer
        stamp = sha256(tokenizer.model + everything.encode())[:12]
        shards_of = [work / "parts" / f"{stamp}-{i:06d}.bin" for i in numbers]
        with bar("tokenising", len(groups)) as advance:
            written = [w for w in pool.map(tokenize_part, parts, by_part, spans, [tokenizer.model] * len(parts), shards_of)
                       if not advance()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    counts |= {"train_documents": sum(n for n, _ in written), "train_bytes": sum(n for _, n in written)}

    (target := work / "train").mkdir(exist_ok=True)
    with open(target / "train.bin", "wb") as out:
        for path in shards_of:
            out.write(path.read_bytes())
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    meta = {"format": FORMAT, "dataset": dataset, **origin, **counts, "vocab_size": tokenizer.vocab_size, "dtype": dtype,
            "bos_id": tokenizer.bos_id, "seq_len": preset.seq_len, "budget": preset.budget, "data_hash": everything[:16],
            "tokenizer_hash": sha256(tokenizer.model)[:16] if tokenizer.model else "bytes"}
    texts = [[d.decode() for d in documents[: len(numbers)]] for documents, numbers in zip((val, test), chosen, strict=True)]
    keep_held_out(home() / "held" / ident, dict(meta), tokenizer, preset, texts)
    (target / "tokenizer.model").write_bytes(tokenizer.model)
    finish(target, meta)
    (home() / "train").mkdir(exist_ok=True)
    shutil.rmtree(home() / "train" / ident, ignore_errors=True)
    os.replace(target, home() / "train" / ident)  # now the dataset is ready
    shutil.rmtree(work)
    described = ", ".join(f"{n:,} {k.replace('_', ' ')}" for k, n in counts.items() if n)
    print(f"{dataset}: {described}; vocabulary {tokenizer.vocab_size:,}", file=sys.stderr)


def documents_of(parts: list[Part], first: np.ndarray, numbers: np.ndarray) -> list[bytes]:
    """Read the documents with these numbers, which count through all parts. first: number of the first document of each part."""
    found: dict[int, bytes] = {}
    for i, part in enumerate(parts):
        own = numbers[(numbers >= first[i]) & (numbers < first[i + 1])]
        found |= zip(own.tolist(), part.documents(own - first[i]), strict=True)
    return [found[n] for n in numbers.tolist()]


def within(numbers: np.ndarray, sizes: np.ndarray, limit: int) -> np.ndarray:
    """The first of these documents that together have at least `limit` bytes; all of them if they have less."""
    return numbers[np.cumsum(sizes[numbers]) - sizes[numbers] < limit]


def enough(preset: Preset) -> int:
    """Bytes of text that are enough for val to have as much as the preset scores."""
    return preset.eval_bytes * (10 if preset.eval_bytes <= HELD_OUT else 20)


def keep_held_out(place: Path, meta: dict, tokenizer: Tokenizer, preset: Preset, held_out: list[list[str]]) -> None:
    """Write val.bin and test.bin, complete documents in order, to the folder that only the scorer reads.

    held_out: the documents of val, then those of test. Errors: HarnessError("data") if a split is too small.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, mode=0o700)
    for name, texts in zip(("val", "test"), held_out, strict=True):
        tokens, data = tokenizer.encode_documents(texts), "".join(texts).encode()
        if tokenizer.decode_bytes(tokens) != data:
            raise HarnessError("data", f"{name}: the tokenizer does not reproduce this text; please report it with the text")
        if (need := 2 * preset.seq_len) > len(tokens):
            raise HarnessError("data", f"the text is too small: {name} has {len(tokens):,} tokens, expected at least {need:,} (two "
                               f"rows); use {need / max(len(tokens), 1):.1f} times as much text, or a smaller preset")
        if (short := preset.eval_bytes - len(data)) > 0:
            print(f"note: {name} has {len(data):,} bytes, which is {short:,} fewer than the preset scores: the score will be "
                  f"noisier; {enough(preset):,} bytes of text would be enough", file=sys.stderr)
        meta |= {f"{name}_bytes": len(data), f"{name}_documents": len(texts), f"{name}_sha256": sha256(data)}
        (place / f"{name}.bin").write_bytes(tokens.tobytes())
    (place / "tokenizer.model").write_bytes(tokenizer.model)
    finish(place, meta)


def finish(place: Path, meta: dict) -> None:
    """Write meta.json with the size and SHA-256 of every other file in `place`."""
    files = [identity(p) for p in sorted(place.iterdir()) if p.name != "meta.json"]
    write_atomically(place / "meta.json", json.dumps(meta | {"prepared": files}, indent=1).encode())
