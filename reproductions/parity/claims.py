"""What this answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row

NAMES = {"hope": "Hope", "hope_linear": "Hope with matrices", "deltanet": "DeltaNet"}
LENGTHS = ("40", "160", "640")


def _longer(rows: Sequence[Row]) -> str:
    tested = [r for r in rows if (r["part"], r["training"]) == ("test", "carry")]

    def mean(preset: str, length: str) -> str:
        return f"{100 * statistics.mean(r['accuracy'][length] for r in tested if r['preset'] == preset):.1f}"

    found = ", ".join(f"{name} {' / '.join(mean(preset, n) for n in LENGTHS)}" for preset, name in NAMES.items())
    return (
        f"trained on four windows of {LENGTHS[0]} with the state handed on, per cent at {', '.join(LENGTHS)}: {found}"
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
