"""
Hardware helpers: presets by machine size, a fast BLAS, the tier, peak FLOP/s, and checks that a model fits in memory.

This module imports no framework. The train file passes in what depends on one: a matrix product to time, and measured memory.
"""

import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import HarnessError, home, sha256, write_atomically


@dataclass(frozen=True)
class Preset:
    """Settings that every experiment of a night shares, chosen by the size of the machine."""
    vocab_size: int             # tokens; 256 is a plain byte tokenizer
    seq_len: int                # tokens of context at evaluation
    eval_bytes: int             # bytes of validation text to score, at most
    budget: str                 # budget of one training: 300s, 200steps or 5Mtokens


PRESETS = {
    "tiny": Preset(vocab_size=320, seq_len=32, eval_bytes=16_000, budget="20steps"),        # the tests
    "demo": Preset(vocab_size=1024, seq_len=64, eval_bytes=50_000, budget="20ktokens"),     # make demo: speed changes no score
    "cpu": Preset(vocab_size=1024, seq_len=128, eval_bytes=250_000, budget="300s"),         # no GPU: small softmax
    "mac": Preset(vocab_size=4096, seq_len=512, eval_bytes=2_000_000, budget="300s"),       # Apple Silicon, 8-32 GB
    "mac-max": Preset(vocab_size=8192, seq_len=1024, eval_bytes=4_000_000, budget="300s"),  # Apple Silicon, 36 GB and up
    "cuda": Preset(vocab_size=8192, seq_len=2048, eval_bytes=8_000_000, budget="300s"),     # upstream's shape
    "upstream": Preset(vocab_size=8192, seq_len=2048, eval_bytes=20_000_000, budget="300s"),  # and its data: see corpus.UPSTREAM
}
TIERS = ("cpu", "mac", "mac-max", "cuda")
DTYPES = ("bfloat16", "float16", "float32")
STEP_FACTOR = 4  # peak memory of an update, relative to weights and moments: 1.0 to 3.5 measured on a CPU, where nothing is fused
PEAK_TFLOPS = {  # from vendors or core counts, bf16 on tensor units; the longest name that occurs in the device's name counts
    "M1": 2.6, "M1 Pro": 5.2, "M1 Max": 10.4, "M1 Ultra": 21, "M2": 3.6, "M2 Pro": 6.8, "M2 Max": 13.5, "M2 Ultra": 27.2,
    "M3": 4.1, "M3 Pro": 7.4, "M3 Max": 14.2, "M3 Ultra": 28, "M4": 4.6, "M4 Pro": 9.2, "M4 Max": 18.4,
    "M5": 16, "M5 Pro": 35, "M5 Max": 70, "A100": 312, "RTX 4090": 165, "H100": 989, "H200": 989,
}  # fmt: skip


def detect_preset() -> str:
    """Choose this machine's preset from what the operating system reports. No framework is imported."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return "mac-max" if memory >= 34 << 30 else "mac"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") else "cpu"


def load_fast_blas(threads: float | None = None) -> str | None:
    """Load OpenBLAS or MKL, on Linux only. Call it before `import mlx.core`, which otherwise binds its own, 50 times slower BLAS.

    threads: limit for one matrix product. A fraction is a share of the cores; None leaves the choice to the library. What the user
    set in the environment has precedence.
    Returns the library's name, or None. If no library is found, it prints a hint.
    """
    if sys.platform != "linux":
        return None
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    if threads and not any(name in os.environ for name in names):
        limit = threads if threads >= 1 else max(1, int(threads * len(os.sched_getaffinity(0))))
        os.environ.update(dict.fromkeys(names, str(limit)))
    in_environment = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))  # the `mkl` wheel puts it there
    for name in ["libopenblas.so.0", "libopenblas.so", *map(str, in_environment), "libmkl_rt.so.2", "libmkl_rt.so"]:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL).cblas_sgemm  # noqa: B018  (fails where a library lacks the function)
            return Path(name).name
    print("hint: no fast BLAS found, so matrix products on this CPU run about 50 times slower than they could; install one: "
          "`pip install mkl` (x86-64) or `apt-get install libopenblas0-pthread`", file=sys.stderr)
    return None


def process_peak() -> int:
    """Peak bytes that this process held in memory. On macOS this is the footprint, because resident memory leaves out Metal's
    buffers. On Linux it is VmHWM, because ru_maxrss starts at the parent's peak."""
    with contextlib.suppress(OSError, TypeError):
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])
    if sys.platform == "darwin":
        usage = (ctypes.c_uint64 * 64)()  # struct rusage_info_v4: a UUID of 16 bytes, then 64-bit numbers
        if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 4, ctypes.byref(usage)) == 0:
            return usage[2 + 28]  # ri_lifetime_max_phys_footprint
    try:
        import resource
    except ImportError:  # Windows
        import psutil
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def recall(key: object) -> dict:
    """The facts that `remember` has stored under this key on this machine; {} if there are none, or a sandbox hides the file."""
    try:
        return dict(json.loads((home() / "remembered.json").read_text())[name_of(key)])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def remember(key: object, facts: dict) -> None:
    """Store facts that took time to find out, for the next training by hand. Does nothing if the file cannot be written."""
    file = home() / "remembered.json"
    try:
        known = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    with contextlib.suppress(OSError):
        write_atomically(file, json.dumps(known | {name_of(key): facts}, indent=1).encode())


def name_of(key: object) -> str:
    """A short hash of a key: of its JSON, where anything that JSON lacks counts by its text."""
    return sha256(json.dumps(key, default=str, sort_keys=True).encode())[:16]


def find_tier(own: str | None) -> str:
    """Return the tier whose constants a train file uses: $AUTORESEARCH_TIER if it is set, else `own`, else this machine's.
    SystemExit if unknown."""
    tier = os.environ.get("AUTORESEARCH_TIER") or own or detect_preset()
    if tier not in TIERS:
        raise SystemExit(f"error: AUTORESEARCH_TIER={tier}: expected one of {', '.join(TIERS)}")
    return tier


def measured_dtypes() -> str:
    """Return dtypes.json of the data home as text: the fastest dtype of each measured device. $AUTORESEARCH_DTYPES holds the file
    as it was when a night began, because all trainings of a night compute in the same dtype, and scores do, too."""
    text = os.environ.get("AUTORESEARCH_DTYPES")
    with contextlib.suppress(OSError, ValueError):
        return (home() / "dtypes.json").read_text() if text is None else text
    return "{}"


def find_dtype(device: str, default: str = "bfloat16") -> str:
    """Return the name of the dtype in which a train file computes on this device: what `scripts/benchmark.py dtype` found fastest
    there and wrote to dtypes.json in the data home, or `default` while nobody has measured.

    device: the train file's own name for it.
    """
    with contextlib.suppress(ValueError, AttributeError):
        known = json.loads(measured_dtypes()).get(device)
        return known if known in DTYPES else default
    return default


def peak_flops(device: str, product: Callable[[], object], flops: float) -> tuple[float, float]:
    """Return (peak, measured) in FLOP/s. `peak`, the reference for MFU, comes from PEAK_TFLOPS; for an unknown device it is
    `measured`, the fastest of four calls.

    product: runs large matrix products of `flops` FLOPs in all and waits for the results.
    """
    times = []
    for _ in range(4):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    names = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b(?! (?:Pro|Max|Ultra)\b)", device)]  # "M5 Ultra" is no "M5"
    measured = flops / min(times)
    return (PEAK_TFLOPS[max(names, key=len)] * 1e12 if names else measured), measured


def extrapolate(peak: Callable[[int], float], rows: int) -> Callable[[int], float]:
    """Return the peak bytes of a pass as a function of its rows: a line through measurements at an eighth and a quarter of `rows`.

    peak: runs a pass of so many rows and returns its peak bytes.
    """
    few, more = max(1, rows // 8), max(2, rows // 4)
    low, high = peak(few), peak(more)
    return lambda n: high + (high - low) / (more - few) * (n - more)


def check_weights(held: Callable[[int], int], depth: int, limit: float | None) -> None:
    """Raise HarnessError("oom") if weights and optimizer moments exceed the device's memory. The message names the largest
    depth that fits.

    held: depth -> bytes of weights and moments. limit: bytes of device memory, None if unknown.
    """
    if limit and held(depth) > limit:
        fits = next((n for n in range(depth - 1, 0, -1) if STEP_FACTOR * held(n) <= limit), 0)
        raise HarnessError("oom", f"weights and moments of depth {depth} take {held(depth) / 2**30:.2f} GiB, this device has "
                           f"{limit / 2**30:.2f}; " + (f"the largest that fits: DEPTH = {fits}, with the width that goes with it"
                                                       if fits else "lower WIDTH or NGRAM_BUCKETS"))


def check_memory(expected: Callable[[int], float] | None, passes: int, rows: int, seq_len: int, limit: float | None,
                 held: Callable[[int], int], depth: int) -> None:
    """Raise HarnessError("oom") if a step of `passes` passes of `rows` rows each is expected to exceed the device's memory.
    The message names the largest pass that fits.

    expected: number of passes -> peak bytes of a step of the same batch size; None if unknown. limit, held: see check_weights.
    """
    if not expected or not limit or expected(passes) <= limit:
        return
    every, has = passes * rows, f"GiB, this device has {limit / 2**30:.2f}"
    if fits := next((n for n in range(passes + 1, every + 1) if every % n == 0 and expected(n) <= limit), 0):
        raise HarnessError("oom", f"passes of {rows * seq_len:,} tokens are expected to take {expected(passes) / 2**30:.2f} {has}; "
                           f"the largest that fits: MICRO_TOKENS = {every // fits * seq_len}")
    fits = next((n for n in range(depth - 1, 0, -1) if expected(every) * held(n) <= limit * held(depth)), 0)
    raise HarnessError("oom", f"even passes of one row are expected to take {expected(every) / 2**30:.2f} {has}; lower BATCH_TOKENS"
                       + (f", or DEPTH to {fits}" if fits else ", WIDTH or NGRAM_BUCKETS"))
