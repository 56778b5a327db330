"""What the user asked of a night. Every driver session writes its settings to the journal; a resume starts from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Limits are of the whole night, but `hours` is of one session; None is no limit."""

    agent: str | None = None  # a name of the table; None takes the first one that is installed and logged in
    agent_cmd: str | None = None
    agent_env: tuple[str, ...] = ()  # further variables that the agent may see, by name
    agent_args: str | None = None  # further arguments of the agent's command line, as typed
    model: str | None = None
    base_url: str | None = None
    experiments: int | None = None
    hours: float | None = None
    max_cost: float | None = None  # US dollars
    price_in: float | None = None  # US dollars a million tokens, for agents that count tokens but no cost
    price_out: float | None = None
    max_agent_minutes: float = 15.0  # for one experiment
    target: float | None = None  # bits per byte
    patience: int | None = None  # experiments without a keep
    baseline_seeds: int = 6  # as `Rule.baseline_trials`
    startup: float = 120.0  # seconds a training may take beyond its budget
    memory_gb: float | None = None  # of a training
    check_agent: bool = True  # ask it for one word before anything is trained
    sandbox: bool = True  # of trainings, where the system has one
    disk_gb: float = 2.0  # free space below which the night ends
    breaker: int = 5  # failures of one kind in a row that pause the night; twice as many end it
    backoff: float = 30.0  # seconds of the first pause; doubled with every further failure

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Settings:
        """Settings of an earlier session; names this version does not know are passed over."""
        known = {field.name for field in fields(cls)} & set(stored)
        values = {name: stored[name] for name in known}
        return cls(**{**values, "agent_env": tuple(values.get("agent_env") or ())})

    def updated(self, given: Mapping[str, Any]) -> Settings:
        """With the options that the user gave this time in place of the old ones; None is not given."""
        return replace(self, **{name: value for name, value in given.items() if value is not None and value != ()})
