"""The driver: `python -m agent.loop` runs a night of experiments."""

__version__ = "0.2.0"
