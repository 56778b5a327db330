"""A budget has one meaning in the driver and in the harness."""

import pytest

from agent.errors import UsageError
from agent.trial.order import parse_budget
from harness import HarnessError
from harness.clock import Budget


@pytest.mark.parametrize(("text", "amount", "unit"), [
    ("300s", 300, "s"), ("1.5s", 1.5, "s"), (".5s", 0.5, "s"), ("200steps", 200, "steps"), ("2ksteps", 2000, "steps"),
    ("5Mtokens", 5e6, "tokens"), (" 5s\n", 5, "s")])
def test_driver_and_harness_read_a_budget_alike(text: str, amount: float, unit: str) -> None:
    assert parse_budget(text) == (amount, unit)
    assert (Budget(text).amount, Budget(text).unit) == (amount, unit)


@pytest.mark.parametrize("text", ["", "5", "s", "1.2.3s", "-3s", "0s", "0.0s", ".s", "5 s", "5m", "5Gtokens", "nans", "infs", "٣s",
                                  "9" * 400 + "s"])
def test_what_is_no_budget_is_refused_by_both(text: str) -> None:
    with pytest.raises(UsageError, match="expected something like 300s, 200steps or 5Mtokens"):
        parse_budget(text)
    with pytest.raises(HarnessError, match="expected something like 300s, 200steps or 5Mtokens"):
        Budget(text)
