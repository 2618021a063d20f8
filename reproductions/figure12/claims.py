"""What this answers."""

from __future__ import annotations

from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row


def _steps(rows: Sequence[Row]) -> str:
    ordered = sorted(rows, key=lambda row: row["parameters"])
    sizes = ", ".join(f"{row['parameters'] / 1e6:.1f}" for row in ordered)
    told = [f"{title} {_ratios(ordered, name)}" for name, title in NAMES.items()]
    return f"over Muon's step, on a CPU at {sizes}M parameters: {'; '.join(told)}"


def _ratios(rows: Sequence[Row], name: str) -> str:
    return ", ".join(f"{row[name]['over_muon']:.2f}" for row in rows)


NAMES = {"m3": "M3", "adamuon": "AdaMuon"}
CLAIMS = (Claim("NL Figure 12", "M3's step costs about AdaMuon's and more than Muon's", "", "confirmed", _steps),)
