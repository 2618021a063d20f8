"""memory.json: which snapshots a memory has, and which of them is the head."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nestling.continual.store.memory_file import MemoryFileError
from nestling.memory.checked_file import read_json, replacing

INDEX = "memory.json"
FORMAT = "nestling-memory"
FORMAT_VERSION = 1
NAME = re.compile(r"snapshot-\d{4,9}\.safetensors")
MAX_INDEX = 16 << 20  # bytes; some 50,000 snapshots


@dataclass(frozen=True)
class Snapshot:
    """One saved state of a memory.

    Attributes:
        number: 1, 2, ... in the order of writing.
        parent: the snapshot it went on from; None for the first, and where that one was pruned.
        time: when, ISO 8601 in UTC.
        note: one line.
        documents: learned from so far.
        tokens: learned from so far.
        bytes: size of its file.
        sha256: checksum of its content.
        autosave: the next save takes its place.
    """

    number: int
    parent: int | None
    time: str
    note: str
    documents: int
    tokens: int
    bytes: int
    sha256: str
    autosave: bool


@dataclass(frozen=True)
class Index:
    """The snapshots of a memory, and the number of the head; 0 before the first save."""

    head: int
    snapshots: list[Snapshot]

    def snapshot(self, number: int, place: Path) -> Snapshot:
        """The snapshot of a number; `place` is for the message.

        Raises:
            MemoryFileError: there is none.
        """
        for snapshot in self.snapshots:
            if snapshot.number == number:
                return snapshot
        have = ", ".join(str(s.number) for s in self.snapshots[-20:])
        raise MemoryFileError(f"{place} has no snapshot {number}; it has {have or 'none'}")

    def headed_by(self, snapshot: Snapshot) -> Index:
        """With a snapshot that was read before the index as its head, which a writer may have moved or replaced."""
        others = [s for s in self.snapshots if s.number != snapshot.number]
        return Index(snapshot.number, sorted([*others, snapshot], key=lambda s: s.number))

    def line(self) -> list[Snapshot]:
        """The head, its parent, and so on to the first."""
        known = {s.number: s for s in self.snapshots}
        found = []
        number: int | None = self.head
        while number is not None and number in known:
            found.append(known[number])
            number = known[number].parent
        return found


def snapshot_name(number: int) -> str:
    """File name of a snapshot. Files are found by number only, so memory.json cannot lead anywhere else."""
    return f"snapshot-{number:04d}.safetensors"


def read_index(directory: Path) -> Index:
    """Read memory.json.

    Raises:
        MemoryFileError: it is missing, no regular file, too long, damaged, or inconsistent.
    """
    path = directory / INDEX
    if not path.exists():
        raise MemoryFileError(
            f"no memory at {directory}; write one with: nestling learn MODEL FILE --memory {directory}"
        )
    if path.is_symlink() or not path.is_file():
        raise MemoryFileError(f"{path} must be a file of its own, not a link")
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_INDEX + 1)
        if len(text) > MAX_INDEX:
            raise ValueError(f"longer than {MAX_INDEX >> 20} MiB")
        return _index(read_json(text))
    except (KeyError, TypeError, ValueError) as error:
        raise MemoryFileError(f"{path} is damaged: {str(error)[:200]}; restore it from a copy") from error
    except OSError as error:
        raise MemoryFileError(f"{path} cannot be read: {error.strerror or error}") from error


def is_memory_directory(directory: Path) -> bool:
    """Whether a directory says that it is a memory of this format. Damage is for `read_index` to find."""
    path = directory / INDEX
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            value = read_json(file.read(MAX_INDEX))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def write_index(directory: Path, index: Index) -> None:
    """Replace memory.json in one step.

    Raises:
        MemoryFileError: the disk is full or not writable; the old one is intact.
    """
    entries = [{"file": snapshot_name(s.number), **asdict(s)} for s in index.snapshots]
    value = {"format": FORMAT, "version": FORMAT_VERSION, "head": index.head, "snapshots": entries}
    try:
        with replacing(directory / INDEX) as scratch:
            scratch.write_text(json.dumps(value, indent=1) + "\n", encoding="ascii")
    except OSError as error:
        raise MemoryFileError(f"{directory / INDEX} cannot be written: {error.strerror or error}") from error


def _index(value: Any) -> Index:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError("not an index of a memory")
    if value.get("version") != FORMAT_VERSION:
        raise ValueError(f"format version {str(value.get('version'))[:20]}; this release reads {FORMAT_VERSION}")
    if not isinstance(value["snapshots"], list):
        raise ValueError("the snapshots are no list")
    snapshots = [_snapshot(entry) for entry in value["snapshots"]]
    numbers = {s.number for s in snapshots}
    if len(numbers) != len(snapshots):
        raise ValueError("two snapshots of one number")
    if type(value["head"]) is not int or value["head"] not in numbers:
        raise ValueError("the head is not among the snapshots")
    if any(s.parent is not None and (s.parent >= s.number or s.parent not in numbers) for s in snapshots):
        raise ValueError("a snapshot whose parent is not an earlier one")
    return Index(value["head"], snapshots)


def _snapshot(entry: Any) -> Snapshot:
    kinds = {"number": int, "time": str, "note": str, "documents": int, "tokens": int, "bytes": int, "sha256": str}
    kinds |= {"autosave": bool}
    if not isinstance(entry, dict) or entry.keys() != {"file", *(f.name for f in fields(Snapshot))}:
        raise ValueError("a snapshot has other fields")
    if not all(type(entry[key]) is kind for key, kind in kinds.items()):
        raise ValueError("a snapshot's fields are of wrong kinds")
    if entry["parent"] is not None and type(entry["parent"]) is not int:
        raise ValueError("a snapshot's parent is no number")
    if not 0 < entry["number"] < 10**9 or min(entry["documents"], entry["tokens"], entry["bytes"]) < 0:
        raise ValueError("a snapshot's number is out of range")
    if entry["file"] != snapshot_name(entry["number"]):
        raise ValueError(f"snapshot {entry['number']} is said to be in {str(entry['file'])[:80]!r}")
    return Snapshot(**{f.name: entry[f.name] for f in fields(Snapshot)})
