"""What a candidate may read and write: rules for `agent/trial/sandbox.py`, and what is hidden from it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.files import real_path
from agent.process.environment import data_home
from agent.trial.sandbox import HIDDEN, READ, WRITE

# Logins and keys in the home folder. Without network they cannot leave at once, but a log goes into the next prompt.
PRIVATE = (
    ".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".netrc", ".git-credentials", ".npmrc", ".pypirc", ".claude",
    ".claude.json", ".codex", ".gemini", ".qwen", ".copilot", ".cursor", ".aider.conf.yml", ".config/gh", ".config/gcloud",
    ".config/git/credentials", ".config/goose", ".config/opencode", ".local/share/opencode", ".config/github-copilot",
    ".cache/huggingface/token", "Library/Keychains", "Library/Cookies",
)  # fmt: skip


SOURCES = "sources.txt"  # beside the held-out shards: the user's files that they were made from, a path a line


def folders(entry: Mapping[str, Any]) -> tuple[Path, Path]:
    """The train and the held-out folder of a night's dataset. The journal, which agents read, does not name them; journals of
    earlier versions do."""
    train, held = (Path(entry.get(f"{kind}_dir") or data_home() / kind / entry["id"]) for kind in ("train", "held"))
    return train, held


def public(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset as the journal describes it to agents: without a path that leads to held-out text. The path of the user's own
    text is kept beside the held-out shards, so that it stays hidden from trainings."""
    name = str(entry.get("name") or "")
    if name.startswith("text:"):
        kept, path = folders(entry)[1] / SOURCES, name.removeprefix("text:")
        known = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
        kept.write_text("".join(f"{line}\n" for line in dict.fromkeys([*known, path])), encoding="utf-8")
        name = "text:"
    return {**{key: value for key, value in entry.items() if key not in ("train_dir", "held_dir")}, "name": name or None}


def hidden_places(entry: Mapping[str, Any], root: Path, git_folder: Path, worktree: Path) -> tuple[Path, ...]:
    """What a training may not see: all prepared data, all nights with their trials and TMPDIRs, git's folder with other
    candidates, and the user's own text. What is given to a training is opened inside."""
    root = root.resolve()
    found = [data_home(), folders(entry)[1].parent.parent, root / "runs", worktree.parent.parent, git_folder]
    for source in _own_text(entry, root):
        found.append(source)
        if source.is_relative_to(root):
            found.append(worktree / source.relative_to(root))
    return tuple(path for path in dict.fromkeys(found) if path != worktree)


def _own_text(entry: Mapping[str, Any], root: Path) -> Iterator[Path]:
    """The user's files behind `text:PATH`: where this night had them from and, as the same text has the same id, where the data
    was first made from; also what links in a folder lead to. A relative path is of older data, and taken from `root`."""
    if not str(entry.get("name") or "").startswith("text:"):
        return
    held, paths = folders(entry)[1], [entry["name"].removeprefix("text:")]
    with contextlib.suppress(OSError, ValueError, KeyError):
        paths.append(json.loads((held / "meta.json").read_text(encoding="utf-8"))["source"])
    with contextlib.suppress(OSError):
        paths += (held / SOURCES).read_text(encoding="utf-8").splitlines()
    for path in filter(None, paths):
        source = Path(real_path(root / Path(path).expanduser()))
        yield source
        yield from (link.resolve() for link in source.rglob("*") if link.is_symlink() and link.is_file())


def rules(writable: Iterable[Path], readable_only: Iterable[Path] = (), hidden: Iterable[Path] = ()) -> dict[str, str]:
    """What each path allows; all of Python can be read, and no login or key in the home folder.

    Raises FileNotFoundError for a writable or readable path that does not exist; a hidden one may be absent.
    """
    # later ones win: a caller may hide even Python's own folders, or open one of the private ones
    packages = [path for path in sys.path if path.endswith("-packages")]  # of the user, or linked from another environment
    found = {real_path(path): READ for path in (sys.prefix, sys.base_prefix, *packages) if os.path.isdir(path)}
    private = (Path.home() / name for name in PRIVATE)
    found |= {real_path(path): HIDDEN for path in [*private, *hidden] if os.path.exists(path)}
    for right, paths in ((READ, readable_only), (WRITE, writable)):
        for path in paths:
            if not os.path.exists(path):
                raise FileNotFoundError(f"expected {path} to exist, so that the sandbox can open it to {right}; create it first")
            found[real_path(path)] = right
    return found
