"""What this answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row

NAMES = {"m3": "M3", "muon": "Muon", "adamw": "AdamW"}


def _losses(rows: Sequence[Row], prefix: str = "") -> str:
    """Mean test loss of the seeds at the rate with the lowest validation loss of seed 0."""
    shown = []
    for name, title in NAMES.items():
        own = [r for r in rows if r["optimizer"] == prefix + name and not r["diverged"]]
        rate = min((r for r in own if r["seed"] == 0), key=lambda r: r["validation"])["rate"]
        shown.append(f"{title} {statistics.mean(r['test'] for r in own if r['rate'] == rate):.3f}")
    return ", ".join(shown)


def _vit(rows: Sequence[Row]) -> str:
    return f"test loss on MNIST, 0.2M parameters: {_losses(rows)}"


def _language(rows: Sequence[Row]) -> str:
    return f"nats per byte: Hope: {_losses(rows, 'hope ')}; Transformer++: {_losses(rows, 'transformer ')}"


CLAIMS = (
    Claim("NL Figure 11 (a small ViT)", "M3 below Muon below AdamW", "", "in part", _vit, "--parts vit --mnist DIR"),
    Claim("NL Figure 11 (language models)", "the same order", "", "confirmed", _language, "--parts language"),
)
