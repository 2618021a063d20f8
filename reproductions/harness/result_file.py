"""Finished runs, a line each, shared by several processes; and a learning rate chosen from a grid that grows."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

Row = dict[str, Any]
GRID = (3e-5, 1e-4, 3e-4, 1e-3)
LOWEST, HIGHEST = 1e-7, 1.0


class ResultFile:
    """Rows of JSON values in a file of lines.

    Args:
        path: made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._read()

    def get(self, key: Mapping[str, Any], make: Callable[[], Row]) -> Row:
        """The row that has all of `key`; made now, and written down, unless it is there.

        A process that wants a row that another one is making waits for it.
        """
        wanted: Row = json.loads(json.dumps(dict(key)))
        name = hashlib.sha256(json.dumps([str(self.path.resolve()), wanted], sort_keys=True).encode()).hexdigest()
        with FileLock(Path(tempfile.gettempdir()) / f"nestling-{name[:24]}.lock"):
            self._read()
            if (found := self.find(wanted)) is not None:
                return found
            row = wanted | make()
            self.rows.append(row)
            self._write(row)
        return row

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """The first row that has all of `key`."""
        return next((row for row in self.rows if all(k in row and row[k] == v for k, v in key.items())), None)

    def _read(self) -> None:
        """All whole lines: the last may have been cut off by an interruption."""
        if not self.path.exists():
            return
        self.rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                continue

    def _write(self, row: Row) -> None:
        """One call of write, so that lines of two processes do not mix, and never in a line that was cut off."""
        with self.path.open("ab+") as file:
            cut = ""
            if file.seek(0, 2):
                file.seek(-1, 2)
                cut = "" if file.read(1) == b"\n" else "\n"
            file.write((cut + json.dumps(row) + "\n").encode())


def tune_rate(measure: Callable[[float], float], grid: Sequence[float] = GRID) -> dict[float, float]:
    """The measure, lower is better, at every rate of a grid that grows until the best is not at its edge.

    The grid goes on as 1, 3, 10, 30, ..., from 1e-7 to 1. A measure that is not finite is no candidate; with none
    finite, only smaller rates are tried.

    Args:
        measure: of a rate.
        grid: two rates or more, each 1 or 3 times a power of ten.

    Returns:
        measure by rate, by rising rate.
    """
    found = {rate: measure(rate) for rate in sorted(grid)}
    while True:
        rates = sorted(found)
        best = best_rate(found)
        if best == rates[0] and best > LOWEST:
            new = next_rate(best, up=False)
        elif best == rates[-1] and best < HIGHEST and len(rates) > 1:
            new = next_rate(best, up=True)
        else:
            return {rate: found[rate] for rate in rates}
        found[new] = measure(new)


def best_rate(found: Mapping[float, float]) -> float:
    """The rate of the smallest finite measure, the lower of equals; with none finite the lowest rate."""
    return min(sorted(found), key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)


def next_rate(rate: float, up: bool) -> float:
    """The neighbour in 1, 3, 10, 30, ... of one of them."""
    exponent = math.floor(math.log10(rate * 1.001))
    first = round(rate / 10**exponent) == 1
    factor = (3 if first else 10) if up else (0.3 if first else 1)
    return float(f"{factor * 10.0**exponent:.6g}")
