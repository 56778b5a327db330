"""Three hundred experiments that fail in every way, one driver, one kill in the middle: nothing left behind, nothing growing."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

import psutil
import pytest
from night_kit import Bed, checkout_digest
from test_kill import check

from agent.journal.journal import read_events

EXPERIMENTS = 300
ACTS = """better worse worse worse worse worse crash nan oom comment seed violation extra fail noop syntax import unscorable silent
simpler hang"""  # so few gains that the toy's score stays above 0


def verdicts(bed: Bed) -> int:
    path = bed.folder() / "journal.jsonl"
    return sum(event["event"] == "verdict" for event in read_events(path)[0]) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_hundred_experiments(tmp_path: Path) -> None:
    dice = random.Random(3)
    acts = ACTS.split()
    plan = [dice.choice(acts) for _ in range(EXPERIMENTS)]
    bed = Bed(tmp_path, " ".join(plan))
    before = checkout_digest(bed.repo)
    options = ("--experiments", str(EXPERIMENTS), "--budget", "1s", "--startup", "2", "--breaker", "9", "--no-sandbox")
    samples: list[tuple[int, float, int]] = []  # experiment, resident MB, open files
    killed = False
    while True:
        with open(bed.tools / "out", "a") as out:
            driver = subprocess.Popen(bed.command(*options), cwd=bed.repo, env=bed.environment(), stdout=out, stderr=out)
        process = psutil.Process(driver.pid)
        while driver.poll() is None:
            time.sleep(2)
            try:
                done = verdicts(bed)
                samples.append((done, process.memory_info().rss / 2**20, process.num_fds()))
            except psutil.Error:
                continue
            if not killed and done > EXPERIMENTS // 10:
                killed = True
                samples.clear()  # of the driver that is killed; the next one's are watched to the end
                driver.send_signal(signal.SIGKILL)
        if driver.wait() == 0:
            break
        assert driver.returncode == -signal.SIGKILL, (bed.tools / "out").read_text()[-3000:]
    night = check(bed, EXPERIMENTS)
    print(f"outcomes: {dict(Counter(e.status for e in night.done))}", file=sys.stderr)
    quarter = len(samples) // 4
    # The middle of the open files, for a sample that falls on the start of a child sees a dozen that are closed at once.
    for name, column, middle, room in (("resident MB", 1, max, 16.0), ("open files", 2, median, 3.0)):
        early = middle(sample[column] for sample in samples[quarter : 2 * quarter])
        late = middle(sample[column] for sample in samples[-quarter:-1])
        print(f"{name}: {samples[1][column]:.0f} at first, {early:.0f} early, {late:.0f} late", file=sys.stderr)
        assert late <= early + room, f"{name} grew from {early} to {late}"
    assert len(list((bed.folder() / "trials").iterdir())) <= 3 * 20
    assert checkout_digest(bed.repo) == before
