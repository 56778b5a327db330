"""
From text to token shards: the embedded stories, the user's own files or a dataset of the hub -> documents without
duplicates -> train, val and test -> tokens on disk.

`prepare_mlx.py` calls `build` once for a dataset; nothing here runs while a model is trained or scored.
"""

import concurrent.futures
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from prepare_mlx import HarnessError, Preset, Tokenizer, home, sha256, write_atomically

BLOCK_BYTES = 8 << 20           # text handed to one worker at a time
PASSAGE_BYTES = 2048            # a text without document separators is cut at blank lines into passages of this size
SEPARATOR = b"<|endoftext|>"    # between the documents of a .txt or .md file, where it has any
STORIES = 12_000                # of about 900 bytes: more than a CPU reads in five minutes
TEXT_KINDS = (".txt", ".md", ".jsonl", ".parquet")

FORMAT = 1                      # raise it when what lies on disk changes its meaning: old datasets are then rebuilt

DATASETS = {  # name: (licence, source, file pattern in the hub repository)
    "stories": ("MIT, made by this file", "embedded grammar, seed 1", ""),
    "tinystories": ("CDLA-Sharing-1.0", "karpathy/tinystories-gpt4-clean", "*.parquet"),
    "climbmix": ("ODC-By", "karpathy/climbmix-400b-shuffle", "shard_*.parquet"),
    "fineweb-edu": ("ODC-By", "HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Stories: a seeded grammar
# ---------------------------------------------------------------------------------------------------------------------

WORDS = {k: v.split() for k, v in {
    "name": "Ada Ben Cleo Dan Elsa Finn Gus Hana Ivo June Kofi Lila Max Nora Omar Pia Quin Rosa Sam Tess Uma Vic Wren Yan Zoe",
    "animal": "fox owl bear rabbit hedgehog mouse dragon robot giant otter frog pony goose badger cat turtle crow wolf snail",
    "noun": "lantern key kite drum map scarf bell boat pie telescope book clock seed shell stone rope basket hat button candle "
            "feather ladder mirror needle pebble pillow puzzle ribbon shoe spoon stick sword ticket wheel whistle wagon blanket",
    "adjective": "little big old red blue green golden silver shiny heavy warm cold soft broken lost round quiet loud strange "
                 "wooden tiny dusty bright dark kind brave shy clever lazy curious gentle stubborn cheerful sleepy honest greedy",
    "place": "forest river mill market castle lighthouse garden cave school harbour meadow library hill barn island village bridge "
             "tower lake field kitchen attic road beach",
    "did": "found lost carried dropped painted hid washed mended borrowed wanted saw heard followed counted shook opened pushed "
           "pulled wrapped shared kept forgot remembered touched watched cleaned",
    "acted": "danced sang ran swam climbed slept read waited whistled jumped laughed cried walked stumbled sneezed listened "
             "nodded wondered shivered smiled",
    "how": "quickly slowly happily sadly quietly loudly carefully suddenly again alone together proudly",
    "felt": "happy sad angry afraid proud lonely surprised tired hungry calm worried grateful",
    "near": "under behind beside inside near above below across",
    "food": "soup bread honey berries cheese pancakes plums nuts porridge cake",
    "when": "then later yesterday today tomorrow soon once",
}.items()}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LESSONS = ["it is better to share", "a small friend can be a great help", "nobody is too old to learn", "a promise must be kept",
           "being brave means being afraid and going on", "good things take time", "the truth is the shortest way home"]


class Storyteller:
    """Writes children's stories of about 900 characters, all different: grammar, counting, and things that come back later."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def word(self, kind: str) -> str:
        """A word of a kind; the first ones of a list are the most frequent, as in any language."""
        words = WORDS[kind]
        return words[int(len(words) * self.rng.random() ** 1.7)]

    def someone(self) -> str:
        made_up = self.rng.random() < 0.4  # a name nobody has heard before, to be copied from context
        syllables = (self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(self.rng.randint(2, 3)))
        return "".join(syllables).capitalize() if made_up else self.word("name")

    def thing(self, article: str = "") -> str:
        adjectives = [self.word("adjective") for _ in range(self.rng.choice([0, 1, 1, 2]))]
        words = " ".join([*adjectives, self.word("noun")])
        return f"{article or self.rng.choice(['the', 'the', 'a', 'one', 'that'])} {words}"

    def where(self) -> str:
        adjective = self.word("adjective") + " " if self.rng.random() < 0.3 else ""
        return f"{self.word('near')} the {adjective}{self.word('place')}"

    def clause(self) -> str:
        """What somebody did, without who: "carried the little red kite across the meadow"."""
        tail = self.rng.choice(["", "", " " + self.where(), " " + self.word("how")])
        return self.rng.choice([self.word("acted"), f"{self.word('did')} {self.thing()}"]) + tail

    def story(self) -> str:
        rng, hero, friend, animal = self.rng, self.someone(), self.someone(), self.word("animal")
        he, his = rng.choice([("he", "his"), ("she", "her"), ("it", "its")])
        treasure, place, hiding, feeling = self.thing("the"), self.word("place"), self.where(), self.word("felt")
        trait, numbers = self.word("adjective"), NUMBERS[: rng.randint(2, 9)]

        def line() -> str:
            first, second = self.clause(), self.clause()
            who, other = rng.choice([hero, he.capitalize(), f"The {animal}", friend]), rng.choice([hero, friend, f"the {animal}"])
            return rng.choice([
                f"{who} {first}.", f"{who} {first} and {second}.", f"{who} {first}, but {other} {second}.",
                f"When {other} {first}, {hero} was {feeling}.", f"{who} {first} because {other} {second}.",
                f'"Have you seen {treasure}?" asked {hero}. "No," said {other}, "but I {first} {self.word("when")}."',
                f'"I am {self.word("felt")}," said {other}. "I {first}, and {self.word("when")} I {second}."',
                f"There was {self.thing('a')} {self.where()}, and {hero} {second}.",
                f"{hero} counted {his} {self.word('noun')}s: {', '.join(numbers)}. {numbers[-1].capitalize()} of them!",
                f"They ate {self.word('food')} and {self.word('food')} {self.where()}."])
        opening = rng.choice([
            f"Once upon a time there was a {trait} {animal} named {hero}. {hero} lived near the {place}.",
            f"In a house by the {place} lived {hero}, the {trait} {animal}.",
            f"{hero} was a {animal}, and everybody said that {he} was {trait}."])
        trouble = rng.choice([
            f"One day {treasure} was gone, and {hero} felt {feeling}.", f"More than anything {hero} wanted {treasure}.",
            f'"Bring me {treasure}," said {friend}, "or I will be {feeling}."'])
        finding = rng.choice([
            f"At last {hero} looked {hiding}. There was {treasure}!", f'"Look {hiding}," said {friend}. And there lay {treasure}.'])
        ending = rng.choice([
            f"{hero} thanked {friend} and went home to the {place}.", f"So {hero} gave {treasure} to {friend}.",
            f"After that {hero} the {animal} was never {feeling} again.", f"And {hero} learned that {rng.choice(LESSONS)}."])
        middle = [line() for _ in range(rng.randint(3, 7))]
        after = [line() for _ in range(rng.randint(1, 3))]
        text = "\n\n".join(" ".join(p) for p in ([opening, trouble], middle, [finding, *after, ending]))
        return re.sub(r"\b([Aa]) (?=old|honest)", r"\1n ", text)


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


def passages(data: bytes) -> list[bytes]:
    """Cut text into passages of about PASSAGE_BYTES at blank lines (else lines, else spaces); joined they are `data` again."""
    cuts, position = [0], 0
    while len(data) - position > 2 * PASSAGE_BYTES:
        window = data[position + PASSAGE_BYTES : position + 8 * PASSAGE_BYTES]
        for mark in (b"\n\n", b"\n", b" "):
            found = window.find(mark)
            if found >= 0:
                position += PASSAGE_BYTES + found + len(mark)
                break
        else:  # no white space at all: cut between two characters of UTF-8
            position += PASSAGE_BYTES + next((i for i, b in enumerate(window[:4]) if b & 0xC0 != 0x80), 0)
        cuts.append(position)
    return [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True)]


def read_block(block: Block) -> tuple[list[str], dict[str, int]]:
    """The documents of a block, and counts of what was skipped: `invalid_utf8`, `empty`."""
    raw: list[bytes]
    if block.path.endswith(".parquet"):
        import pyarrow.parquet as parquet
        table = parquet.ParquetFile(block.path).read_row_groups(range(block.start, block.end), columns=[block.field])
        raw = [(text or "").encode("utf-8", "surrogatepass") for text in table.column(block.field).to_pylist()]
    else:
        with open(block.path, "rb") as f:
            f.seek(block.start)
            data = f.read(block.end - block.start)
        if block.path.endswith(".jsonl"):
            try:
                raw = [json.loads(line)[block.field].encode("utf-8", "surrogatepass") for line in data.splitlines() if line.strip()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise HarnessError("data", f"{block.path}: expected one JSON object a line with a string field "
                                   f"{block.field!r}, got {error!r}; name the field with --field") from error
        elif SEPARATOR in data:
            raw = [document.strip(b"\r\n") for document in data.split(SEPARATOR)]
        else:
            raw = passages(data)
    documents, skipped = [], {"invalid_utf8": 0, "empty": 0}
    for document in raw:
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError:
            skipped["invalid_utf8"] += 1
            continue
        if text.strip():
            documents.append(text)
        else:
            skipped["empty"] += 1
    return documents, skipped


def blocks_of(path: Path, field: str, work: Path) -> list[Block]:
    """Cut one source file into blocks at document borders. A .gz file is unpacked into `work` first."""
    if path.suffix == ".gz":
        unpacked = work / f"{hashlib.sha256(str(path).encode()).hexdigest()[:12]}-{path.stem}"
        with gzip.open(path, "rb") as source, open(unpacked, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        path = unpacked
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet
        file = parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise HarnessError("data", f"{path}: no column {field!r}, it has {file.schema_arrow.names}; name one with --field")
        return [Block(str(path), i, i + 1, field) for i in range(file.num_row_groups)]
    marks = (b"\n",) if path.suffix == ".jsonl" else (SEPARATOR, b"\n\n", b"\n", b" ")
    size, borders = path.stat().st_size, [0]
    with open(path, "rb") as f:
        while size - borders[-1] > BLOCK_BYTES:
            f.seek(borders[-1] + BLOCK_BYTES)
            window = f.read(BLOCK_BYTES)
            found = next((window.index(m) + len(m) for m in marks if m in window), len(window))
            borders.append(borders[-1] + BLOCK_BYTES + found)
    return [Block(str(path), a, b, field) for a, b in zip(borders, [*borders[1:], size], strict=True) if b > a]


def own_files(dataset: str) -> list[Path]:
    """The user's files behind `text:PATH`, in a fixed order."""
    root = Path(dataset.removeprefix("text:")).expanduser()
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    files = [p for p in files if p.suffix in TEXT_KINDS or (p.suffix == ".gz" and Path(p.stem).suffix in TEXT_KINDS)]
    if not files:
        raise HarnessError("data", f"text:{root}: expected a file or a folder with {', '.join(TEXT_KINDS)} (or .gz of them), "
                           f"found {'none in it' if root.exists() else 'no such path'}")
    return files


def source_files(dataset: str, work: Path, shards: int) -> tuple[list[Path], dict]:
    """The files of a dataset, fetched or made if need be, and where they came from."""
    if dataset.startswith("text:"):
        return own_files(dataset), {"source": dataset.removeprefix("text:"), "licence": "the user's own"}
    if dataset not in DATASETS:
        raise HarnessError("data", f"unknown dataset {dataset!r}; expected one of {', '.join(DATASETS)} or text:PATH")
    licence, source, pattern = DATASETS[dataset]
    if dataset == "stories":
        teller = Storyteller(seed=1)
        text = f"\n{SEPARATOR.decode()}\n".join(teller.story() for _ in range(STORIES))
        (work / "stories.txt").write_text(text, encoding="utf-8")
        return [work / "stories.txt"], {"source": source, "licence": licence}
    from huggingface_hub import HfApi, hf_hub_download
    try:
        info = HfApi().dataset_info(source)
        names = sorted(s.rfilename for s in info.siblings or [] if fnmatch(s.rfilename, pattern))[:shards]
        files = [Path(hf_hub_download(source, name, repo_type="dataset", revision=info.sha)) for name in names]
    except Exception as error:
        raise HarnessError("data", f"{dataset}: {source} could not be fetched: {type(error).__name__}: {error}. What arrived is "
                           "kept and the next try goes on from there. HF_ENDPOINT, HTTPS_PROXY and HF_TOKEN are honoured; "
                           "`--dataset stories` needs no network") from error
    if not files:
        raise HarnessError("data", f"{dataset}: {source} has no file like {pattern}")
    return files, {"source": source, "licence": licence, "revision": info.sha, "files": names}


# ---------------------------------------------------------------------------------------------------------------------
# Preparation: documents without duplicates -> train / val / test -> token shards
# ---------------------------------------------------------------------------------------------------------------------

TRAIN, VAL, TEST, DROPPED = 0, 1, 2, 3
NOT_A_WORD = re.compile(r"[\W_]+")


def digests_of(block: Block) -> tuple[list[bytes], list[int], dict[str, int]]:
    """A 16-byte digest of each document's normalised text (lower case, words only), its bytes, and what was skipped.

    Documents that differ in case, spacing or punctuation only have one digest: they are duplicates, and share a split.
    """
    documents, skipped = read_block(block)
    digests = [hashlib.blake2b((NOT_A_WORD.sub(" ", d).strip().lower() or d).encode(), digest_size=16).digest() for d in documents]
    return digests, [len(d.encode()) for d in documents], skipped


def tokenize_block(block: Block, splits: bytes, model: bytes, part: Path) -> tuple[list[str], list[str]]:
    """Write the block's training tokens to `part`, return its validation and test documents."""
    documents, _ = read_block(block)
    chosen: list[list[str]] = [[d for d, s in zip(documents, splits, strict=True) if s == k] for k in (TRAIN, VAL, TEST)]
    if not part.exists():  # else an earlier, interrupted preparation made it
        write_atomically(part, Tokenizer(model).encode_documents(chosen[TRAIN]).tobytes())
    return chosen[VAL], chosen[TEST]


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(dataset: str, preset: Preset, field: str, shards: int) -> str:
    """What a prepared dataset depends on, as 10 hex digits: its name, the user's files byte by byte, and the preset."""
    digest = hashlib.sha256(json.dumps([FORMAT, dataset, asdict(preset), field, shards]).encode())
    for path in own_files(dataset) if dataset.startswith("text:") else []:
        digest.update(path.name.encode())
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:10]


def damage(train: Path, held: Path) -> str:
    """What is wrong with a prepared dataset, "" if nothing: every file has to have the size and SHA-256 of meta.json."""
    for place in (train, held):
        try:
            meta = json.loads((place / "meta.json").read_text())
            for name, (size, digest) in meta["prepared"].items():
                if not (place / name).is_file() or (place / name).stat().st_size != size or sha256_of(place / name) != digest:
                    return f"{place / name} is not the file that was prepared ({size:,} bytes)"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{place / 'meta.json'} cannot be used ({type(error).__name__}: {error})"
    return ""


def build(dataset: str, preset: Preset, field: str, shards: int, ident: str) -> None:
    """Fetch, clean, split, tokenise. Interrupted, it goes on where it was; nothing is seen as ready before the last rename."""
    from rich.progress import Progress
    work = home() / "work" / ident
    (work / "parts").mkdir(parents=True, exist_ok=True)
    files, origin = source_files(dataset, work, shards)
    blocks = [b for path in files for b in blocks_of(path, field, work)]
    workers = min(os.cpu_count() or 1, max(1, len(blocks)))
    with Progress(transient=True) as bar, concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        # 1. every document once: duplicates go, and the digest says which split a document belongs to
        counts = {"documents": 0, "duplicates": 0, "invalid_utf8": 0, "empty": 0}
        found = [list(zip(d, n, strict=True)) for d, n, skipped in
                 bar.track(pool.map(digests_of, blocks), total=len(blocks), description="reading")
                 if not counts.update({k: counts[k] + v for k, v in skipped.items()})]
        total = sum(n for documents in found for _, n in documents)
        share = min(max(1.3 * preset.eval_bytes / max(total, 1), 0.0005), 0.1)  # of documents to val, and to test
        seen: set[bytes] = set()
        everything = hashlib.sha256()
        splits = []
        for documents in found:
            row = bytearray()
            for digest, _ in documents:
                place = int.from_bytes(digest[:8], "big") / 2**64
                split = DROPPED if digest in seen else VAL if place < share else TEST if place < 2 * share else TRAIN
                seen.add(digest)
                everything.update(digest + bytes([split]))
                row.append(split)
            splits.append(bytes(row))
            counts["documents"] += len(row)
            counts["duplicates"] += row.count(DROPPED)
        if not total:
            raise HarnessError("data", f"{dataset}: no document in {len(files)} files ({counts})")

        # 2. the tokenizer, from training documents spread over the source
        def sample(limit: int = 16 << 20) -> Iterator[str]:
            for i in range(0, len(blocks), max(1, len(blocks) * BLOCK_BYTES // limit)):
                yield from (d for d, s in zip(read_block(blocks[i])[0], splits[i], strict=True) if s == TRAIN)
        tokenizer = Tokenizer.train(sample(), preset.vocab_size)

        # 3. token shards; a part's name says what it was made from
        stamp = sha256(tokenizer.model + everything.digest())[:12]
        parts = [work / "parts" / f"{stamp}-{i:06d}.bin" for i in range(len(blocks))]
        tokenised = pool.map(tokenize_block, blocks, splits, [tokenizer.model] * len(blocks), parts)
        held_out = list(bar.track(tokenised, total=len(blocks), description="tokenising"))

    target = work / "train"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    with open(target / "train.bin", "wb") as out:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)
    meta = {"format": FORMAT, "dataset": dataset, **origin, **counts, "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id, "seq_len": preset.seq_len, "budget": preset.budget,
            "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
            "data_hash": everything.hexdigest()[:16],
            "tokenizer_hash": sha256(tokenizer.model)[:16] if tokenizer.model else "bytes"}
    keep_held_out(home() / "held" / ident, meta, tokenizer, preset, held_out)
    (target / "tokenizer.model").write_bytes(tokenizer.model)
    finish(target, meta)
    (home() / "train").mkdir(exist_ok=True)
    shutil.rmtree(home() / "train" / ident, ignore_errors=True)
    os.replace(target, home() / "train" / ident)  # from here on it is ready
    shutil.rmtree(work)
    print(f"{dataset}: {counts['documents']:,} documents ({counts['duplicates']:,} duplicates left out, {counts['invalid_utf8']:,} "
          f"not UTF-8, {counts['empty']:,} empty), vocabulary {tokenizer.vocab_size:,}", file=sys.stderr)


def keep_held_out(place: Path, meta: dict, tokenizer: Tokenizer, preset: Preset, held_out: list) -> None:
    """Write val.bin and test.bin, whole documents in order up to `eval_bytes`, where only the scorer looks."""
    place.mkdir(parents=True, exist_ok=True)
    held = dict(meta)
    for k, name in enumerate(("val", "test")):
        texts, size = [], 0
        for text in (t for pair in held_out for t in pair[k]):
            if size >= preset.eval_bytes:
                break
            texts.append(text)
            size += len(text.encode())
        tokens = tokenizer.encode_documents(texts)
        if tokenizer.decode_bytes(tokens) != "".join(texts).encode():
            raise HarnessError("data", f"{name}: the tokenizer lost something; please report this text")
        if len(tokens) < 2 * preset.seq_len:
            raise HarnessError("data", f"{name} has {size:,} bytes in {len(texts)} documents, {len(tokens):,} tokens: expected at "
                               f"least {2 * preset.seq_len:,} (two rows); use a text about "
                               f"{math.ceil(2 * preset.seq_len / max(len(tokens), 1))} times as long or a smaller preset")
        if size < 0.8 * preset.eval_bytes:
            print(f"note: {name} has {size:,} bytes, {preset.eval_bytes - size:,} fewer than this preset would score; "
                  "the score is noisier", file=sys.stderr)
        held |= {f"{name}_bytes": size, f"{name}_documents": len(texts), f"{name}_sha256": sha256("".join(texts).encode())}
        (place / f"{name}.bin").write_bytes(tokens.tobytes())
    (place / "tokenizer.model").write_bytes(tokenizer.model)
    finish(place, held)


def finish(place: Path, meta: dict) -> None:
    """Write meta.json, with the size and SHA-256 of every other file there."""
    files = {p.name: (p.stat().st_size, sha256_of(p)) for p in sorted(place.iterdir()) if p.name != "meta.json"}
    write_atomically(place / "meta.json", json.dumps(meta | {"prepared": files}, indent=1).encode())
