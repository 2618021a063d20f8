"""What this answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row


def _with_and_without(rows: Sequence[Row]) -> str:
    def mean(model: str, updates: str) -> str:
        losses = [r["loss"] for r in rows if (r["model"], r["updates"]) == (model, updates)]
        return f"{statistics.mean(losses):.3f}"

    names = {
        "hope_linear": "Hope with matrices",
        "hope_attention": "Hope-Attention",
        "hope_attention, window 32": "with a window of 32",
    }
    shown = [f"{model} {mean(name, 'proximal, gain')} ({mean(name, 'none')})" for name, model in names.items()]
    return (
        "nats per byte at 0.15M parameters with updates (without): " + ", ".join(shown) + "; ranges of 3 seeds overlap"
    )


CLAIMS = (
    Claim(
        "NL section 7.1 (in context)",
        "MLPs that update at their own periods while they read are better than plain ones",
        "",
        "in part",
        _with_and_without,
        "--train BOOK ... --valid BOOK",
    ),
)
