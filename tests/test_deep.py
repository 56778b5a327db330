"""`doctor --deep`: each check measures something real, and its file can be attached to an issue."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from agent import deep
from agent.trial import sandbox


def test_the_clocks_of_a_machine_that_is_awake_agree() -> None:
    result = deep.clocks()
    assert (result.state, result.facts["asleep"]) == ("ok", pytest.approx(0, abs=0.1))
    assert result.facts["wall"] > 1.9


def test_links_to_what_is_hidden_are_tried_for_real() -> None:
    result = deep.hidden_link()
    if sandbox.available().present:
        assert result.state == "ok"
        assert result.facts["said"].count("refused") == 4
    else:
        assert (result.state, "no sandbox" in result.text) == ("note", True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_of_it_on_this_machine(tmp_path: Path) -> None:
    checkout = ROOT / "runs" / "deep-test"  # the sandbox of Linux hides /tmp
    subprocess.run(["rm", "-rf", checkout], check=True)
    subprocess.run(["git", "clone", "-q", ROOT, checkout], check=True)
    try:
        done = subprocess.run([sys.executable, "-m", "agent.doctor", "--deep"], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        written = json.loads((checkout / "runs" / "doctor.json").read_text())
        checks = {result["check"]: result["state"] for result in written["results"]}
        assert checks.keys() == {"clocks", "awake", "links", "counted", "attention", "memory", "dtypes", "night"}
        assert (checks["memory"], checks["night"]) == ("ok", "ok")
        assert written["versions"]["mlx"]
    finally:
        subprocess.run(["rm", "-rf", checkout], check=True)
