"""What this answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row

STEPS = 3000


def _mean(rows: Sequence[Row], preset: str, ablation: str | None = None) -> str:
    """Mean accuracy of the longest trainings on the three difficulties, at the rate that short ones chose."""
    short = [r for r in rows if (r["preset"], r["ablation"], r["seed"]) == (preset, None, 0) and r["steps"] < STEPS]
    rate = max(short, key=lambda r: sum(r["validation"]))["rate"]
    own = [r for r in rows if (r["preset"], r["ablation"], r["steps"], r["rate"]) == (preset, ablation, STEPS, rate)]
    own = [r for r in own if ablation is None or r["seed"] == 0]
    return " / ".join(f"{statistics.mean(r['test'][i] for r in own):.2f}" for i in range(3))


def _seed(rows: Sequence[Row], ablation: str | None) -> str:
    """Of seed 0, at which the ablations ran."""
    return _mean([r for r in rows if r["seed"] == 0], "titans_lmm", ablation)


def _chunks(rows: Sequence[Row]) -> str:
    return (
        f"recall of 4, 16, 32 pairs: Titans' memory at chunk 64 {_mean(rows, 'titans_lmm')}, DeltaNet "
        f"{_mean(rows, 'deltanet')}; at chunk 1 {_seed(rows, 'chunk 1')}"
    )


def _ascent(rows: Sequence[Row]) -> str:
    return (
        f"recall with ascent {_seed(rows, 'ascent in place of descent')}, with descent {_seed(rows, None)} (one seed)"
    )


def _steps(rows: Sequence[Row]) -> str:
    one, two = _seed(rows, "chunk 1"), _seed(rows, "chunk 1, 2 inner steps")
    return f"recall at chunk 1 with two steps {two}, with one {one} (one seed)"


def _parts(rows: Sequence[Row]) -> str:
    changes = {"as it is": None, "without momentum": "no momentum", "without retention": "no retention"}
    return "recall " + ", ".join(f"{name} {_seed(rows, change)}" for name, change in changes.items()) + " (one seed)"


CLAIMS = (
    Claim(
        "arXiv:2510.09551 (Titans Revisited)",
        "with large chunks Titans does not always beat its baselines",
        "",
        "confirmed",
        _chunks,
    ),
    Claim(
        "arXiv:2602.21204 (ascent)",
        "gradient ascent in the memory works as well as descent",
        "",
        "confirmed",
        _ascent,
        "--ablations --seeds 0",
    ),
    Claim(
        "arXiv:2602.21204 (steps)",
        "more inner steps do not help",
        "",
        "confirmed",
        _steps,
        "--ablations --seeds 0",
    ),
    Claim(
        "Titans Table 5 (on recall)",
        "momentum and retention matter",
        "",
        "in part",
        _parts,
        "--ablations --seeds 0",
    ),
)
