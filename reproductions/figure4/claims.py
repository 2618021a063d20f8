"""What this answers."""

from __future__ import annotations

from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row


def _bounded(rows: Sequence[Row]) -> str:
    momentum, bounded = (next(r for r in rows if r["method"] == name) for name in ("momentum", "bounded"))
    return (
        f"{bounded['median_ratio']:.2f} times momentum's steps in the median of 65 functions; a tenth fewer on "
        f"{bounded['faster_by_tenth']}, a tenth more on {bounded['slower_by_tenth']}; solved {bounded['converged']}, "
        f"momentum {momentum['converged']}"
    )


def _literal(rows: Sequence[Row]) -> str:
    row = next(r for r in rows if r["method"] == "Eq. 49 to the letter")
    return f"solves {row['converged']} of 65 functions with any of 75 settings"


CLAIMS = (
    Claim("NL Figure 4", "delta momentum reaches the minimum of the valley before momentum", "", "in part", _bounded),
    Claim("NL Figure 4 (Eq. 49)", "so does the rule as it is written", "", "refuted", _literal),
)
