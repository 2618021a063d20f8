"""What this answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row

NAMES = {"hope": "Hope", "hope_attention": "Hope-Attention", "transformer": "Transformer++"}


TOKENS = 400_384


def _losses(rows: Sequence[Row]) -> str:
    shown = []
    for preset, title in NAMES.items():
        losses = [r["loss"] for r in rows if (r["part"], r["preset"], r["tokens"]) == ("test", preset, TOKENS)]
        shown.append(f"{title} {statistics.mean(losses):.3f}")
    return "nats per byte at 2.4M parameters, 400 kB: " + ", ".join(shown)


CLAIMS = (
    Claim(
        "NL Table 2 (at 2.4M)",
        "Hope's loss is below Transformer++'s on equal tokens",
        "Wiki ppl at 760M: Hope 18.68, Transformer++ 24.18",
        "confirmed",
        _losses,
        "--train BOOK ... --valid BOOK --test BOOK",
    ),
)
