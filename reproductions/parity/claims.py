"""What this answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row


def _longer(rows: Sequence[Row]) -> str:
    def mean(length: str) -> float:
        return 100 * statistics.mean(r["accuracy"][length] for r in rows if (r["preset"], r["training"]) == key)

    key = ("hope", "carry")
    return (
        f"Hope, 2 layers of width 32: {mean('40'):.1f}% at the trained length of 40, {mean('160'):.1f}% at 160, "
        f"{mean('640'):.1f}% at 640"
    )


CLAIMS = (
    Claim(
        "NL Table 5 (parity)",
        "Hope tracks parity beyond the length it was trained on",
        "Hope 100 / 100, Transformer 46.4 / 0, DeltaNet 98.2 / 10.1 (within, beyond)",
        "confirmed",
        _longer,
    ),
)
