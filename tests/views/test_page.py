"""The page of a night: what it answers, whom it refuses, and how it looks and follows in a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from night_kit import Bed, git

from agent.journal.journal import Journal

MARKUP = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
ROOT = Path(__file__).resolve().parents[2]


def night(bed: Bed, experiments: int = 3) -> Journal:
    """A journal with markup in every field that an agent or a training can fill; the journal stays open."""
    base = git(bed.repo, "rev-parse", "HEAD")
    journal = Journal(bed.folder())
    dataset = {"id": f"toy {MARKUP}", "budget": "5s"}
    journal.append("night_start", tag="night", base=base, train_file="train_mlx.py", seed=1, dataset=dataset, machine={})
    journal.append("session", settings={"experiments": experiments + 5}, pid=1, agent=MARKUP, sandbox=MARKUP)
    for n in range(experiments + 1):
        finish(journal, bed, n, base)
    return journal


def finish(journal: Journal, bed: Bed, n: int, base: str) -> None:
    """One experiment from its beginning to its verdict; every third is kept."""
    journal.append("experiment", n=n, parent=base, step="free")
    (bed.repo / "train_mlx.py").write_text(f"# {MARKUP} {n}\n")
    git(bed.repo, "commit", "-q", "-a", "--allow-empty", "-m", MARKUP)
    commit = git(bed.repo, "rev-parse", "HEAD")
    journal.append("candidate", n=n, commit=commit, ast=str(n), lines=9, description=f"change {n} {MARKUP}", hypothesis=MARKUP,
                   family=MARKUP, usage={"cost": 0.01, "tokens": 5}, seconds=1.0)
    for k in range(2):
        folder = f"{n:04d}-{k + 1}"
        journal.append("trial_start", n=n, k=k, seed=k + 1, dir=folder)
        run = bed.folder() / "trials" / folder
        run.mkdir(parents=True)
        rows = [json.dumps({"seconds": s, "loss": 5 - s / 20}) for s in range(50)]
        (run / "metrics.jsonl").write_text("\n".join([*rows, '{"loss": 1e999}', "[[[", MARKUP]))
        score = 1.5 - 0.01 * n + 0.002 * k
        journal.append("trial_end", n=n, k=k, seed=k + 1, dir=folder, status="ok", val_bpb=score, summary={}, seconds=5.0,
                       error=None)
    failed = {"kind": "crash", "message": MARKUP, "tail": MARKUP} if n % 3 == 2 else None
    (bed.folder() / "logs").mkdir(exist_ok=True)
    (bed.folder() / "logs" / f"{n:04d}-2.train.log").write_text(MARKUP)
    journal.append("verdict", n=n, status="crash" if failed else "keep" if n % 3 == 0 else "discard", reason=MARKUP, val_bpb=score,
                   description="", error=failed, usage={}, seconds=0.0)


def finish_open(journal: Journal, n: int) -> None:
    """The verdict on an experiment whose agent brought nothing."""
    journal.append("verdict", n=n, status="agent_error", reason=MARKUP, val_bpb=None, description="", error=None, usage={},
                   seconds=0.0)


@contextmanager
def served(bed: Bed, *options: str) -> Iterator[str]:
    """The program at work; gives the address that it prints."""
    command = [sys.executable, "-m", "agent.dashboard", "--port", "0", *options]
    done = subprocess.Popen(command, cwd=bed.repo, env=bed.environment(), stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    try:
        line = next((line for line in done.stdout if "http://" in line), "")  # perhaps below a QR code
        assert line.startswith("night night: http://")
        yield line.split()[-1]
    finally:
        done.terminate()
        done.wait(20)
        done.stdout.close()


def get(address: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def test_the_page_the_night_and_an_experiment(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    with night(bed), served(bed) as address:
        status, page, headers = get(address)
        policy = headers["content-security-policy"]
        assert status == 200
        assert "default-src 'none'" in policy
        assert re.search(r"script-src 'nonce-[\w-]{20,}'", policy)
        assert not re.search(r"(?:src|href)=(?!\"data:,\")", page), "nothing is loaded from elsewhere"
        shown = heard(address, "night")
        assert [(e["n"], e["status"], e["trials"]) for e in shown["experiments"]] == [
            (0, "keep", 2), (1, "discard", 2), (2, "crash", 2), (3, "keep", 2)]
        assert shown["experiments"][1]["score"] == pytest.approx(1.491)
        assert shown["experiments"][1]["error"] == pytest.approx(shown["sigma"] / 2**0.5)
        assert (shown["best"], shown["running"], shown["wanted"]) == (3, True, 8)
        one = json.loads(get(address + "experiment/3")[1])
        assert f"+# {MARKUP} 3" in one["diff"]
        assert len(one["curves"]["this"]) == 50, "lines that are no numbers are passed over"
        assert one["log"] == MARKUP
        assert get(address + "experiment/99")[0] == 404
        assert get(address + "experiment/-1")[0] == 404
        for name in ("evil.example", "127.0.0.1.evil.example", "[::1", "127.0.0.1:x", "evil@127.0.0.1", "127.0.0.1/", ""):
            assert get(address, Host=name)[0] in (400, 421), "another name for this machine: DNS rebinding"
        assert get(address, Host="LOCALHOST:1")[0] == 200
        for path in ("../journal.jsonl", "..%2f..%2fetc/passwd", "experiment/../../x", "experiment/1e9", f"experiment/{9**99}",
                     "%00", "static/../night"):
            assert get(address + path)[0] == 404


def test_in_the_local_network_nobody_is_answered_without_the_token(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    with night(bed), served(bed, "--host", "0.0.0.0") as printed:
        port, token = re.findall(r":(\d+)/\?token=(\S+)", printed)[0]
        address = f"http://127.0.0.1:{port}/"
        assert get(address, Cookie="autoresearch=x")[0] == 403
        for path in ("", "events", "experiment/1", "?token=wrong", "?token=%C3%BC"):
            assert get(address + path)[0] == 403
        assert get(address, Cookie=f"autoresearch-{port}=w\xfcrong")[0] == 403

        class Stay(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *_: object) -> None:
                return None

        with pytest.raises(urllib.error.HTTPError) as moved:
            urllib.request.build_opener(Stay).open(f"{address}?token={token}", timeout=20)
        cookie = moved.value.headers["set-cookie"]
        moved.value.close()
        assert "httponly" in cookie.lower()
        assert "samesite=strict" in cookie.lower()
        assert get(address + "experiment/1", Cookie=cookie.split(";")[0])[0] == 200


def heard(address: str, event: str) -> Any:
    """The data of the next event of this kind, by a reader of its own."""
    with urllib.request.urlopen(address + "events", timeout=20) as stream:
        for line in stream:
            if line == f"event: {event}\n".encode():
                return json.loads(stream.readline().removeprefix(b"data: "))
    raise AssertionError("the stream has ended")


def test_files_that_are_half_written_huge_or_no_files_and_two_readers(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    with night(bed) as journal, served(bed) as address:
        journal.append("experiment", n=4, parent="x", step="free")
        journal.append("trial_start", n=4, k=0, seed=1, dir="0004-1")
        run = bed.folder() / "trials" / "0004-1"
        run.mkdir()
        metrics = run / "metrics.jsonl"
        os.mkfifo(metrics)
        assert heard(address, "curve")["points"] == [], "a pipe is never opened"
        metrics.unlink()
        metrics.write_text('{"seconds": 1, "loss": 3}\n' * 2 + '{"seconds": 2, "lo')
        os.truncate(metrics, 500 << 20)
        assert heard(address, "curve")["points"] == [[1, 3]] * 2
        with open(journal.path, "ab") as file:
            file.write(b'{"v":1,"seq":99,"t":1.0,"eve')  # a line that is being written
        with ThreadPoolExecutor() as readers:
            both = list(readers.map(heard, [address] * 2, ["night"] * 2))
        assert [shown["open"]["n"] for shown in both] == [4, 4]
        journal.path.write_bytes(journal.path.read_bytes().replace(b'"n":1', b'"n":7', 1))
        assert "is damaged" in heard(address, "trouble")
        status, said, _ = get(address + "experiment/1")
        assert (status, "is damaged" in said, "Traceback" in said) == (500, True, False)


def test_the_loop_shows_the_page_while_the_night_runs(tmp_path: Path) -> None:
    """The page's address is one of the night's lines. The page ends with the night."""
    bed = Bed(tmp_path, "slow better")
    driver = bed.start("--experiments", "2", "--no-sandbox", "--dashboard", AUTORESEARCH_SLOW="2")
    assert driver.stdout is not None
    said = ""
    while not (found := re.search(r"night night: (http://127\.0\.0\.1:\d+/)\n", said)):
        line = driver.stdout.readline()
        assert line, said
        said += line
    shown = heard(found[1], "night")
    assert (shown["tag"], shown["running"]) == ("night", True)
    said += driver.communicate(timeout=60)[0]
    assert driver.returncode == 0, said
    with pytest.raises(urllib.error.URLError):
        get(found[1])
    assert not (bed.folder() / "dashboard.pid").exists()


def test_a_page_that_cannot_start_costs_the_night_a_note(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "better")
    done = bed.run("--experiments", "1", "--no-sandbox", "--dashboard", "203.0.113.7")
    assert done.returncode == 0, done.stdout
    assert "note: the page has ended, the night goes on: Error: cannot listen on 203.0.113.7" in done.stdout
    assert "1 kept" in done.stdout


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    with night(bed), socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = subprocess.run([sys.executable, "-m", "agent.dashboard", "--port", port], cwd=bed.repo, env=bed.environment(),
                              capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_night_or_with_a_damaged_one_it_says_so(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    def start(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "agent.dashboard", *options], cwd=bed.repo, env=bed.environment(),
                              capture_output=True, text=True, timeout=60)
    assert "there is no night" in start().stderr
    assert "there is no night" in start("--tag", "gone").stderr
    assert "expected letters" in start("--tag", "../x").stderr
    with night(bed) as journal:
        path = journal.path
    path.write_bytes(path.read_bytes().replace(b'"n":1', b'"n":7', 1))
    assert "is damaged" in start().stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService("/usr/bin/chromedriver") if os.path.exists("/usr/bin/chromedriver") else None
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def until(what: object, seconds: float = 10.0) -> float:
    began = time.monotonic()
    while not what():  # type: ignore[operator]
        assert time.monotonic() - began < seconds, "it never came"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.mark.browser
def test_in_a_browser_it_loads_follows_opens_and_stays_clean(tmp_path: Path, browser) -> None:
    from selenium.webdriver.common.by import By

    bed = Bed(tmp_path)
    with night(bed) as journal, served(bed) as address:
        browser.set_window_size(1280, 900)
        browser.get(address)
        rows = lambda: len(browser.find_elements(By.CSS_SELECTOR, "#rows tr"))  # noqa: E731
        until(lambda: rows() == 4)
        assert len(browser.find_elements(By.CSS_SELECTOR, "#chart circle")) == 3
        assert len(browser.find_elements(By.CSS_SELECTOR, "#chart path.fail")) == 1
        finish(journal, bed, 4, git(bed.repo, "rev-parse", "HEAD"))
        assert until(lambda: rows() == 5) < 2, "an append is seen within two seconds"
        journal.append("experiment", n=5, parent=git(bed.repo, "rev-parse", "HEAD"), step="free")
        until(lambda: "the agent is at work" in browser.find_element(By.ID, "phase").text)
        button = browser.find_element(By.CSS_SELECTOR, "#rows tr:nth-child(2) button")
        assert MARKUP in button.text, "shown as text"
        button.send_keys("\n")  # by keyboard
        until(lambda: browser.find_elements(By.CSS_SELECTOR, "dialog[open] .added"))
        assert MARKUP in browser.find_element(By.CSS_SELECTOR, "dialog pre").text
        if pictures := os.environ.get("PICTURES"):
            browser.save_screenshot(f"{pictures}/detail.png")
        browser.find_element(By.CSS_SELECTOR, "dialog header button").click()
        finish_open(journal, 5)
        until(lambda: browser.find_element(By.CSS_SELECTOR, "#rows td:nth-child(2)").text == "agent_error")
        assert browser.switch_to.active_element == button, "who reads with the keyboard stays where they are"
        for width, scheme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")):
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                    {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500})
            wide = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide[0] <= wide[1], "nothing hangs out on the right"
            if pictures:
                browser.save_screenshot(f"{pictures}/page-{width}-{scheme}.png")
        assert "owned" not in browser.title
        assert browser.get_log("browser") == []


@pytest.mark.browser
def test_the_page_survives_a_night_that_is_killed_and_resumed(tmp_path: Path, browser) -> None:
    """The driver is killed with SIGKILL while the page is open, and resumed; then the page's own program is."""
    from selenium.webdriver.common.by import By

    bed = Bed(tmp_path, "slow better worse")
    words = ("--experiments", "3", "--no-sandbox")
    driver = bed.start(*words, AUTORESEARCH_SLOW="600")
    until(lambda: b'"trial_start","n":1' in (bed.folder() / "journal.jsonl").read_bytes()
          if (bed.folder() / "journal.jsonl").exists() else False, 30)
    shown = lambda name: browser.find_element(By.ID, name).text  # noqa: E731
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with served(bed, "--port", str(port)) as address:
        browser.get(address)
        until(lambda: "Experiment 1 of 3: training 1, seed 1" in shown("phase"))
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate(timeout=60)
        assert until(lambda: "--resume" in shown("phase")) < 3, "nothing was written: the driver's absence is noticed"
        driver = bed.start(*words, "--resume", AUTORESEARCH_SLOW="600")
        until(lambda: "Experiment 1 of 3: training 1, seed 1" in shown("phase"), 30)
    until(lambda: "does not answer" in shown("phase"))
    for _ in range(2):
        assert bed.loop("--stop").returncode == 0
    driver.communicate(timeout=60)
    with served(bed, "--port", str(port)):
        until(lambda: "The night has ended: stopped" in shown("phase"))
        driver = bed.start(*words, "--resume", AUTORESEARCH_SLOW="0")
        said, _ = driver.communicate(timeout=120)
        assert driver.returncode == 0, said
        until(lambda: "The night has ended: all experiments asked for are done" in shown("phase"))
        assert [row.text.split()[:2] for row in browser.find_elements(By.CSS_SELECTOR, "#rows tr")] == [
            ["3", "discard"], ["2", "keep"], ["1", "discard"], ["0", "keep"]]
    errors = [line["message"] for line in browser.get_log("browser") if "ERR_CONNECTION_REFUSED" not in line["message"]]
    assert [line for line in errors if "ERR_INCOMPLETE_CHUNKED" not in line] == [], "but that nobody answered for a while"


@pytest.mark.browser
def test_two_thousand_experiments_are_drawn_without_a_wait(tmp_path: Path, browser) -> None:
    from selenium.webdriver.common.by import By

    bed = Bed(tmp_path)
    with night(bed, 0) as journal:
        for n in range(1, 2001):
            journal.append("experiment", n=n, parent="x", step="free")
            journal.append("trial_start", n=n, k=0, seed=1, dir="none")
            journal.append("trial_end", n=n, k=0, seed=1, dir="none", status="ok", val_bpb=1.5 - n / 9999, summary={}, seconds=1.0,
                           error=None)
            journal.append("verdict", n=n, status="discard", reason="no", val_bpb=1.4, description="d", error=None, usage={},
                           seconds=0.0)
        with served(bed) as address:
            browser.get(address)
            until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#rows tr")) == 2001, 20)
            took = browser.execute_script("const a = performance.now(); show(night); return performance.now() - a")
            assert took < 2000, "milliseconds, to draw all of it again"
