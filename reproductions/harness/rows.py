"""Finished runs, a line each: made once, shared by several processes, and read again after an interruption."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from reproductions.harness.machine import stamp

Row = dict[str, Any]
NAME = "results.jsonl"
"""Of the file, in the folder of a reproduction or of a run."""


class Rows:
    """Rows of JSON values in a file of lines.

    Every row that is made here says under `made` what made it: commit, machine, threads, torch, command.

    Args:
        path: made with the first row.
        command: what was called, for `made`.
        committed: rows to compare with; what a new row and the committed one of the same key say is printed.
    """

    def __init__(self, path: Path, command: str = "", committed: Iterable[Row] = ()) -> None:
        self.path, self.command, self.committed = path, command, list(committed)
        self.rows = read_rows(path)

    def get(self, key: Mapping[str, Any], make: Callable[[], Row]) -> Row:
        """The row that has all of `key`; made now, and written down, unless it is there.

        A process or thread that wants a row that another one is making waits for it.
        """
        wanted: Row = json.loads(json.dumps(dict(key)))
        name = hashlib.sha256(json.dumps([str(self.path.resolve()), wanted], sort_keys=True).encode()).hexdigest()
        with FileLock(Path(tempfile.gettempdir()) / f"nestling-{name[:24]}.lock"):
            self.rows = read_rows(self.path)
            if (found := self.find(wanted)) is not None:
                return found
            row = wanted | make() | {"made": stamp(self.command)}
            self._write(row)
            self.rows = read_rows(self.path)
        if (known := first(self.committed, wanted)) is not None:
            made = {name: value for name, value in row.items() if name not in wanted}
            print(f"    committed and now: {compared(known, made)}", flush=True)
        return row

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """The first row that has all of `key`."""
        return first(self.rows, key)

    def _write(self, row: Row) -> None:
        """One call of write, so that lines of two processes do not mix, and never in a line that was cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            cut = ""
            if file.seek(0, 2):
                file.seek(-1, 2)
                cut = "" if file.read(1) == b"\n" else "\n"
            file.write((cut + json.dumps(row) + "\n").encode())


def first(rows: Iterable[Row], key: Mapping[str, Any]) -> Row | None:
    """The first of some rows that has all of `key`, as JSON would write it."""
    wanted = json.loads(json.dumps(dict(key)))
    return next((row for row in rows if all(k in row and row[k] == v for k, v in wanted.items())), None)


def read_rows(path: Path) -> list[Row]:
    """All whole lines of a file that need not exist: the last may have been cut off by an interruption."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def compared(known: Row, row: Row) -> str:
    """Every number at the top of two rows of one key, `name known, new`; seconds are of no interest."""
    shown = []
    for name, value in row.items():
        if name in known and _is_result(name, value) and _is_result(name, known[name]):
            shown.append(f"{name} {known[name]:.6g}, {value:.6g}")
        elif isinstance(value, list) and value and all(_is_result(name, v) for v in value) and name in known:
            shown.append(f"{name} {_listed(known[name])}, {_listed(value)}")
        elif isinstance(value, dict) and name != "made" and isinstance(known.get(name), dict) and known[name] != value:
            shown.append(f"{name} ({compared(known[name], value)})")
        elif isinstance(value, dict) and name != "made" and known.get(name) == value:
            shown.append(f"{name} equal")
    return "; ".join(shown)


def _is_result(name: str, value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and "seconds" not in name


def _listed(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]" if len(values) <= 8 else f"{len(values)} values"
