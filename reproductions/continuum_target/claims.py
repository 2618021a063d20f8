"""What this answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row


def _targets(rows: Sequence[Row]) -> str:
    names = {"next": "next token", "value": "the token itself", "reconstruction": "reconstruction"}
    shown = [f"{t} {statistics.mean(r['loss'] for r in rows if r['target'] == n):.3f}" for n, t in names.items()]
    return "nats per byte at 2.4M parameters: " + ", ".join(shown)


CLAIMS = (
    Claim(
        "arXiv:2604.06169 (In-Place TTT)",
        "fast weights of an MLP learn better from the next token than by reconstruction",
        "",
        "confirmed",
        _targets,
        "--train BOOK ... --valid BOOK",
    ),
)
