"""Checkpoints that exist whole or not at all.

A checkpoint is written into a hidden directory, flushed to the disk, and renamed to `checkpoint-STEP` when complete; an
old one is renamed away before it is deleted. So whatever moment a process dies at, every `checkpoint-*` can be loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestling.memory.checked_file import flush, replacing

STAGING = ".saving"
DELETING = ".deleting"
NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(out: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in Path(out).glob("checkpoint-*") if (m := NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def last_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(out)
    return found[-1] if found else None


def checkpoint_step(path: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint directory")
    return int(match[1])


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `target` when the block ends well and is removed when it does not."""
    staging = staging_path(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        flush_tree(staging)
        remove_tree(target)
        os.rename(staging, target)
        flush(target.parent)
    finally:
        shutil.rmtree(staging.parent, ignore_errors=True)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """`staged_directory` in a directory that others use: scratch names of its own, parents made where they lack."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    made, old = scratch / "new", scratch / "old"
    made.mkdir()
    try:
        yield made
        flush_tree(made)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(made, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
        flush(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def staging_path(target: Path) -> Path:
    """Where `target` is written before it is complete: under the same name, in a hidden directory beside it."""
    return target.parent / STAGING / target.name


def remove_tree(path: Path) -> None:
    """Delete a directory so that it is never seen half deleted."""
    if path.exists():
        doomed = path.parent / DELETING
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def prune(out: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(out)[:-keep]:
        remove_tree(path)


def clear_leftovers(out: str | Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for name in (STAGING, DELETING):
        shutil.rmtree(Path(out) / name, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that the file holds the old or the new value, never half of one."""
    target = Path(path)
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def move_files(source: Path, target: Path) -> None:
    """Move every file of `source` into `target`, each replacing its namesake in one step."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        os.replace(file, target / file.name)
    flush(target)


def flush_tree(directory: Path) -> None:
    """Wait until everything below a directory is on the disk."""
    for path in [*directory.rglob("*"), directory]:
        flush(path)
