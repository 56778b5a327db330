"""Downloads from the Hugging Face hub that resume and are checked by SHA-256, and the progress bar for them and for preparation."""

import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from harness import HarnessError, home, write_atomically

DOWNLOADS, TRIES = 4, 5         # files fetched at a time; attempts for each
UNREACHED = "ConnectError", "ConnectTimeout", "OfflineModeIsEnabled"  # of httpx or httpx2, as huggingface_hub chooses
FIRST_WAIT = 0.5                # seconds before the second attempt; each wait is twice the one before


@contextmanager
def bar(what: str, total: float, unit: str = "blocks") -> Iterator[Callable[..., None]]:
    """Show a progress bar on a terminal, elsewhere a line every ten seconds. Yields `advance(n=1)`. Unit "bytes" adds a rate."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
    columns = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else ("{task.completed}/{task.total} " + unit,)
    began = printed = time.monotonic()
    lively = sys.stdout.isatty()  # rich takes a file for one where FORCE_COLOR is set
    with Progress("{task.description}", BarColumn(), *columns, TimeRemainingColumn(), transient=True, disable=not lively) as shown:
        task = shown.add_task(what, total=total)

        def advance(n: float = 1) -> None:
            nonlocal printed
            shown.advance(task, n)
            if not lively and time.monotonic() - printed > 10:
                printed, done = time.monotonic(), shown.tasks[task].completed
                print(f"{what}: {done:,.0f} of {total:,.0f} {unit}, {done / (printed - began):,.1f} per second", file=sys.stderr)
        yield advance


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a lock file: a second process that asks for it waits here, and then finds the work done."""
    from filelock import FileLock
    with FileLock(lock):
        yield


def sha256_of(path: Path) -> str:
    """The SHA-256 digest of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def identity(path: Path) -> dict:
    """Name, size in bytes and SHA-256 of a file, as meta.json records them."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def fetch(source: str, pattern: str, shards: int, revision: str, held_out: str = "") -> tuple[list[Path], dict]:
    """Fetch the first `shards` files of a hub dataset whose names match `pattern`, and the file `held_out`, if one is named, which
    comes last. Returns their paths, and a dict with the commit and each file's name, size and SHA-256.

    revision: a commit, branch or tag. A branch is resolved once and kept in listing.json, so that later files belong to the same
    commit; files that are already here need no network. huggingface_hub handles HF_ENDPOINT, HF_TOKEN and proxies.
    Errors: HarnessError("data") if the files cannot be fetched or do not match.
    """
    place = home() / "downloads" / f"{source}@{revision}".replace("/", "--")
    place.mkdir(parents=True, exist_ok=True)
    with alone(place / ".lock"):  # two presets of one dataset share the download
        chosen, commit = fetch_files(source, pattern, shards, revision, place, held_out)
    paths = [place / f["name"] for f in chosen]
    return paths, {"revision": commit, "files": [identity(p) for p in paths]}


def fetch_files(
        source: str, pattern: str, shards: int, revision: str, place: Path, held_out: str) -> tuple[list[dict], str]:
    """Fetch into `place` what is missing there. Returns the entries of the files in listing.json, and the commit. See `fetch`."""
    from huggingface_hub import HfApi
    if not (place / "listing.json").exists():
        info = patiently(f"the list of {source} at {revision}",
                         lambda: HfApi().dataset_info(source, revision=revision, files_metadata=True, timeout=10),
                         first_contact=True)
        if re.fullmatch("[0-9a-f]{40}", revision) and info.sha != revision:
            raise HarnessError("data", f"{source}: expected commit {revision}, got {info.sha}")
        files = [{"name": s.rfilename, "bytes": s.size, "sha256": s.lfs and s.lfs.sha256} for s in info.siblings or []]
        write_atomically(place / "listing.json", json.dumps({"revision": info.sha, "files": files}, indent=1).encode())
    listing = json.loads((place / "listing.json").read_text())
    files = sorted((f for f in listing["files"] if fnmatch(f["name"], pattern)), key=lambda f: f["name"])
    chosen = [f for f in files if f["name"] != held_out][:shards]
    if not chosen:
        raise HarnessError("data", f"{source}: no file matches {pattern}")
    if held_out:
        last = [f for f in files if f["name"] == held_out]
        if not last:
            raise HarnessError("data", f"{source} at {listing['revision']}: expected {held_out}, the file with the validation text")
        chosen += last
    announce(source, chosen, place, held_out)
    with bar(f"fetching {source}", sum(f["bytes"] or 0 for f in chosen), "bytes") as advance, \
            concurrent.futures.ThreadPoolExecutor(DOWNLOADS) as pool:
        for job in [pool.submit(fetch_file, source, listing["revision"], f, place, advance) for f in chosen]:
            job.result()
    return chosen, listing["revision"]


def announce(source: str, chosen: list[dict], place: Path, held_out: str) -> None:
    """Say on standard error what will be downloaded, and how much room there is. Errors: HarnessError("data") if there is too
    little."""
    missing = [f for f in chosen if not (place / f["name"]).exists()]
    parts = [place / f"{f['name']}.part" for f in missing]
    size = sum(f["bytes"] or 0 for f in missing) - sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise HarnessError("data", f"{source}: {size / 1e9:.2f} GB to download, {free / 1e9:.2f} GB free on the disk of {home()}; "
                           "free some space, or set AUTORESEARCH_HOME to a folder on another disk")
    if missing:
        names = ", ".join(f["name"] + (" (validation and test text)" if f["name"] == held_out else "") for f in missing)
        print(f"to download: {size / 1e9:.2f} GB from {source}, {len(missing)} of {len(chosen)} files: {names}\n"
              f"to {place}, {free / 1e9:.2f} GB free; unpacking and preparing takes about three times the size of the text besides",
              file=sys.stderr, flush=True)


def fetch_file(source: str, revision: str, file: dict, place: Path, advance: Callable[..., None]) -> None:
    """Fetch one file into `place`. A partial download resumes; the file gets its name only when it is complete.

    file: {"name", "bytes", "sha256"}. advance: called with the number of bytes that arrived.
    Errors: HarnessError("data") after TRIES attempts.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get  # hf_hub_download would start from zero after every interruption
    from huggingface_hub.utils import build_hf_headers, tqdm
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # an interruption loses one chunk at most; the default is 10 MB
    url, path = hf_hub_url(source, file["name"], repo_type="dataset", revision=revision), place / file["name"]

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": True})
            advance(options.get("initial") or 0)

        def update(self, n=1):
            advance(n)

    def once() -> None:
        with open(f"{path}.part", "ab") as out:
            http_get(url, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=file["bytes"], tqdm_class=Bar)
        got = sha256_of(Path(f"{path}.part"))
        if got != (file["sha256"] or got):
            os.unlink(f"{path}.part")
            raise OSError(f"expected SHA-256 {file['sha256']}, got {got}; the partial file was deleted")
        os.replace(f"{path}.part", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        patiently(file["name"], once)


def patiently(what: str, once: Callable, first_contact: bool = False):
    """Call `once` up to TRIES times and return its result. Errors that a retry cannot mend (not found, forbidden, disk full) are
    raised at once. Without any connection at the first contact there are two tries, because this machine is most likely offline.
    Errors: HarnessError("data") that names `what`."""
    for attempt in range(TRIES):
        try:
            return once()
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            offline = first_contact and attempt and type(error).__name__ in UNREACHED
            hopeless = (400 <= status < 500 and status not in (408, 429)) or getattr(error, "errno", 0) == 28
            if attempt == TRIES - 1 or offline or hopeless:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise HarnessError("data", f"{what} could not be fetched: {reason}. "
                                   "Run the same command again to continue; what arrived is kept. Check HF_ENDPOINT, "
                                   "HTTPS_PROXY and HF_TOKEN; --revision chooses another commit; `--dataset stories` needs no "
                                   "network") from error
            time.sleep(FIRST_WAIT * 2**attempt)
    return None
