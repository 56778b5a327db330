"""A place for trials in small: the toy harness and trainer of `night_kit.py`, without a night."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from night_kit import HARNESS, TRAINER

from agent.trial.lab import Lab


def lab(folder: Path, source: str = TRAINER, **changes: Any) -> Lab:
    for name in ("work", "frozen", "train", "held", "trials"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "work" / "train_mlx.py").write_text(source)
    (folder / "frozen" / "prepare_mlx.py").write_text(HARNESS)
    settings: dict[str, Any] = {
        "folder": folder, "worktree": folder / "work", "train_file": "train_mlx.py", "harness": folder / "frozen/prepare_mlx.py",
        "train_dir": folder / "train", "held_dir": folder / "held", "budget": "5s", "vocab_size": 256, "startup_seconds": 20.0,
        "sandboxed": False,
    }  # fmt: skip
    return Lab(**{**settings, **changes})
