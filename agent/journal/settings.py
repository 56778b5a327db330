"""The user's settings for a night. Every driver session writes them to the journal; a resumed night starts with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

_OF_THE_AGENT = "agent", "agent_cmd", "agent_args", "model", "base_url", "price_in", "price_out"


@dataclass(frozen=True)
class Settings:
    """Limits hold for the whole night, but `hours` and `until` for one driver session. None means no limit."""

    agent: str | None = None  # a name in the table of coding agents; None: the first one that is installed and logged in
    agent_cmd: str | None = None
    agent_env: tuple[str, ...] = ()  # further variables that the agent may see, by name
    agent_args: str | None = None  # further arguments of the agent's command line, as typed
    model: str | None = None
    base_url: str | None = None
    experiments: int | None = None
    hours: float | None = None  # of `hours` and `until` at most one is set
    until: float | None = None  # Unix time
    max_cost: float | None = None  # US dollars
    price_in: float | None = None  # US dollars per million tokens, for agents that report tokens but no cost
    price_out: float | None = None
    max_agent_minutes: float = 15.0  # for one experiment
    target: float | None = None  # bits per byte
    patience: int | None = None  # experiments without a keep
    baseline_seeds: int = 6  # trainings of the baseline; same default as `Rule.baseline_trials`
    startup: float = 120.0  # seconds a training may take beyond its budget
    memory_gb: float | None = None  # limit of one training
    check_agent: bool = True  # ask the agent for one word before anything is trained
    sandbox: bool = True  # run trainings in a sandbox if the system has one
    disk_gb: float = 2.0  # free space below which the night ends
    breaker: int = 5  # so many failures of one kind in a row pause the night; twice as many end it
    backoff: float = 30.0  # seconds of the first pause; doubled after every further failure

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Settings:
        """The settings of an earlier session. Names that this version does not know are ignored."""
        known = {field.name for field in fields(cls)} & set(stored)
        values = {name: stored[name] for name in known}
        return cls(**{**values, "agent_env": tuple(values.get("agent_env") or ())})

    def end(self, began: float) -> float | None:
        """When a session that began at `began` starts no further experiment. None: no clock ends it. Both are Unix times."""
        if self.until is not None:
            return self.until
        return None if self.hours is None else began + self.hours * 3600

    def updated(self, given: Mapping[str, Any]) -> Settings:
        """These settings, with the options that the user gave this time. An option of None was not given.

        Another agent, or another end by the clock, replaces the one before: what was said of that agent does not hold for it."""
        chosen = {name: value for name, value in given.items() if value is not None and value != ()}
        dropped: dict[str, Any] = {}
        if chosen.keys() & {"hours", "until"}:
            dropped = dict.fromkeys(("hours", "until"))
        if any(chosen[name] != getattr(self, name) for name in ("agent", "agent_cmd") if name in chosen):
            dropped |= {**dict.fromkeys(_OF_THE_AGENT), "agent_env": ()}
        return replace(self, **{**dropped, **chosen})
