"""What this answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row


def _at(momentum: float) -> Callable[[Sequence[Row]], str]:
    def found(rows: Sequence[Row]) -> str:
        finals = []
        for name in ("SGD with momentum", "delta momentum", "DMGD"):
            key = (name, "orthogonal", [momentum])
            row = next(r for r in rows if (r["optimizer"], r["setting"], r["momenta"]) == key)
            finals.append(f"{name} {1e3 * row['final']:.1f}")
        return f"loss of all tasks at the end at momentum {momentum:g}, in thousandths: {', '.join(finals)}"

    return found


CLAIMS = (
    Claim(
        "NL section 4.3",
        "momentum forgets earlier tasks with orthogonal gradients; a memory that manages itself forgets less: a long "
        "momentum",
        "",
        "confirmed",
        _at(0.99),
    ),
    Claim("NL section 4.3, at 0.9", "the same at the usual momentum", "", "refuted", _at(0.9)),
)
