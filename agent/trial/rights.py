"""What a candidate may read and write: rules for `agent/trial/sandbox.py`, and where the held-out text lies."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.process.environment import data_home
from agent.trial.sandbox import HIDDEN, READ, WRITE

# Logins and keys in the home folder. Without network they cannot leave at once, but a log goes into the next prompt.
PRIVATE = (
    ".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".netrc", ".git-credentials", ".npmrc", ".pypirc", ".claude",
    ".claude.json", ".codex", ".gemini", ".qwen", ".copilot", ".cursor", ".aider.conf.yml", ".config/gh", ".config/gcloud",
    ".config/git/credentials", ".config/goose", ".config/opencode", ".local/share/opencode", ".config/github-copilot",
    ".cache/huggingface/token", "Library/Keychains", "Library/Cookies",
)  # fmt: skip


def held_out_places(entry: Mapping[str, Any], root: Path, git_folder: Path, worktree: Path) -> tuple[Path, ...]:
    """Where held-out text lies that a training must not read: all held-out shards, what they were made from; of the user's
    own text also what git keeps of it, where it is a part of the checkout `root`."""
    homes = {data_home(), Path(entry["held_dir"]).parent.parent}
    found = [home / name for home in homes for name in ("held", "downloads", "work")]
    root = root.resolve()
    for source in _own_text(entry, root):
        found.append(source)
        if source.is_relative_to(root):
            found += [git_folder, worktree / source.relative_to(root)]
    return tuple(path for path in dict.fromkeys(found) if path != worktree)


def _own_text(entry: Mapping[str, Any], root: Path) -> Iterator[Path]:
    """The user's files behind `text:PATH`: where this night had them from and, as the same text has the same id, where the data
    was first made from; also what links in a folder lead to. A relative path is of older data, and taken from `root`."""
    if not str(entry.get("name") or "").startswith("text:"):
        return
    paths = [entry["name"].removeprefix("text:")]
    with contextlib.suppress(OSError, ValueError, KeyError):
        paths.append(json.loads((Path(entry["held_dir"]) / "meta.json").read_text(encoding="utf-8"))["source"])
    for path in paths:
        source = (root / Path(path).expanduser()).resolve()
        yield source
        yield from (link.resolve() for link in source.rglob("*") if link.is_symlink() and link.is_file())


def rules(writable: Iterable[Path], readable_only: Iterable[Path] = (), hidden: Iterable[Path] = ()) -> dict[str, str]:
    """What each path allows; all of Python can be read, and no login or key in the home folder.

    Raises FileNotFoundError for a writable or readable path that does not exist; a hidden one may be absent.
    """
    # later ones win: a caller may hide even Python's own folders, or open one of the private ones
    packages = [path for path in sys.path if path.endswith("-packages")]  # of the user, or linked from another environment
    found = {os.path.realpath(path): READ for path in (sys.prefix, sys.base_prefix, *packages) if os.path.isdir(path)}
    private = (Path.home() / name for name in PRIVATE)
    found |= {os.path.realpath(path): HIDDEN for path in [*private, *hidden] if os.path.exists(path)}
    for right, paths in ((READ, readable_only), (WRITE, writable)):
        for path in paths:
            if not os.path.exists(path):
                raise FileNotFoundError(f"expected {path} to exist, so that the sandbox can open it to {right}; create it first")
            found[os.path.realpath(path)] = right
    return found
