"""What a machine says of itself while something is measured: memory of a process, energy, swapping, other programs.

Everything here works without a password. Where a machine does not say something, the reason is told instead of a number.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

MAC = sys.platform == "darwin"
RAPL = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
MACMON_MS = 200                                                                 # between two samples of power
FANLESS = "MacBook Air", "MacBook Neo"                                          # they slow down after minutes of full load


def swapped_out() -> int:
    """Bytes that this machine has written to swap since it started."""
    if MAC:  # psutil counts page-outs of files there
        said = subprocess.run(["vm_stat"], capture_output=True, text=True).stdout
        page, pages = re.search(r"page size of (\d+)", said), re.search(r"Swapouts: +(\d+)", said)
        return int(page[1]) * int(pages[1]) if page and pages else 0
    import psutil
    return psutil.swap_memory().sout


def others_percent(seconds: float = 1.0) -> float:
    """Percent of all CPU cores that programs use in the next `seconds`. Call it while nothing of ours runs."""
    import psutil
    return psutil.cpu_percent(interval=seconds)


def conditions() -> list[str]:
    """What would make this machine slower than it is: no fan, running on its battery. Empty if nothing is known."""
    import psutil
    found = []
    if MAC:
        said = subprocess.run(["system_profiler", "SPHardwareDataType"], capture_output=True, text=True).stdout
        if any(f"Model Name: {name}" in said for name in FANLESS):
            found.append("no fan: it slows down after some minutes, so that later rounds are slower")
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return found + (["it runs on its battery"] if battery and not battery.power_plugged else [])


# ---------------------------------------------------------------------------------------------------------------------
# Energy
# ---------------------------------------------------------------------------------------------------------------------


class Untold(Exception):
    """This machine does not tell its energy; the message says why and what would help."""


class Rapl:
    """The energy counters of the CPU packages, on Linux."""

    source = "CPU packages, RAPL"

    def __init__(self) -> None:
        self.zones = [zone for zone in sorted(RAPL.glob("intel-rapl:*")) if zone.name.count(":") == 1]  # AMD's have that name, too
        if not self.zones:
            raise Untold("this system has no RAPL counters")
        try:
            self.last = self.read()
        except OSError as error:
            raise Untold(f"RAPL's counters may be read by root only; `sudo chmod a+r {RAPL}/*/energy_uj` allows it until the next "
                         "start") from error
        self.total = 0.0

    def read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self.zones]

    def joules(self) -> float:
        now = self.read()
        for zone, old, new in zip(self.zones, self.last, now, strict=True):
            wrapped = int((zone / "max_energy_range_uj").read_text()) if new < old else 0
            self.total += (new - old + wrapped) / 1e6
        self.last = now
        return self.total


class Nvml:
    """The energy counter of the first visible NVIDIA GPU."""

    source = "GPU board, NVML"

    def __init__(self) -> None:
        self.handle, first = ctypes.c_void_p(), (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        try:
            self.library = ctypes.CDLL(NVML)
            failed = self.library.nvmlInit_v2() or self.library.nvmlDeviceGetHandleByIndex_v2(int(first), ctypes.byref(self.handle))
        except (OSError, ValueError) as error:
            raise Untold(f"NVIDIA's management library gives no access to GPU {first} ({error})") from error
        if failed:
            raise Untold(f"NVIDIA's management library gives no access to GPU {first} (error {failed})")
        self.joules()

    def joules(self) -> float:
        millijoules = ctypes.c_ulonglong()
        if failed := self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(millijoules)):
            raise Untold(f"this GPU has no energy counter (error {failed})")
        return millijoules.value / 1000


class Macmon:
    """The power of an Apple chip, added up over time, from the program macmon."""

    source = "CPU, GPU and Neural Engine, macmon"

    def __init__(self) -> None:
        if not (program := shutil.which("macmon")):
            raise Untold("macOS tells its power to root only; `brew install macmon` reads it without a password")
        self.watts, self.total, self.since, self.ready = 0.0, 0.0, time.monotonic(), threading.Event()
        self.lock = threading.Lock()
        self.process = subprocess.Popen([program, "pipe", "-i", str(MACMON_MS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.follower = threading.Thread(target=self.follow, daemon=True)
        self.follower.start()
        if not self.ready.wait(10) or not self.watts > 0:
            self.close()
            raise Untold("macmon gives no power here; try `macmon pipe -s 1`")

    def follow(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines, contextlib.suppress(ValueError, KeyError, TypeError):
            for line in lines:
                watts = float(json.loads(line)["all_power"])
                with self.lock:
                    now = time.monotonic()
                    self.total += watts * (now - self.since)                    # a sample is the mean since the one before
                    self.watts, self.since = watts, now
                self.ready.set()
        self.watts = math.nan  # it ended, and its energy is unknown from here on
        self.ready.set()

    def joules(self) -> float:
        with self.lock:
            return self.total + self.watts * (time.monotonic() - self.since)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.follower.join()


def energy_meter(on_cuda: bool) -> Rapl | Nvml | Macmon:
    """The meter for what trains here: `source` names what it counts, `joules()` only grows. Errors: Untold."""
    return Nvml() if on_cuda else Macmon() if MAC else Rapl()
