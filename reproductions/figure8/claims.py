"""What this answers."""

from __future__ import annotations

from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row


def _sequence(rows: Sequence[Row], method: str) -> Row:
    """The run of both languages at the rate with the lowest validation loss."""
    grid = [r for r in rows if (r["part"], r.get("method")) == ("validation", method)]
    best = min(grid, key=lambda r: sum(s["loss"] for s in r["scores"][-1]))["rate"] if method != "icl" else 0.0
    return next(r for r in rows if (r["part"], r.get("method"), r.get("rate")) == ("sequence", method, best))


def _first(rows: Sequence[Row], method: str, measure: str) -> tuple[float, float]:
    """Of the first language, after it and after the second."""
    scores = _sequence(rows, method)["scores"]
    return scores[0][0][measure], scores[1][0][measure]


def _in_context(rows: Sequence[Row]) -> str:
    before, after = _first(rows, "icl", "loss")
    return f"Kalamang with its examples {before:.2f} nats a token, with Basque's {after:.2f}"


def _after(rows: Sequence[Row]) -> str:
    shown = [f"{name} {_first(rows, key, 'chrf')[1]:.1f}" for name, key in NAMES.items()]
    return "chrF of Kalamang after Basque: " + ", ".join(shown)


NAMES = {"in context": "icl", "one level": "level_1", "two": "level_2", "three": "level_3"}
CLAIMS = (
    Claim(
        "NL Figure 8 (in context)",
        "in-context learning forgets the first of two languages",
        "",
        "confirmed",
        _in_context,
    ),
    Claim("NL Figure 8 (levels)", "levels that learn stand above it after the second", "", "confirmed", _after),
    Claim("NL Figure 8 (more levels)", "the more levels, the higher", "", "refuted", _after),
)
