"""What this answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from reproductions.harness.claims import Claim
from reproductions.harness.rows import Row

NAMES = {
    "levels_memory": "levels with a memory",
    "memory": "the memory alone",
    "one_level_memory": "one level with it",
    "levels": "levels without it",
    "class_means": "class means",
    "external_learner": "an external learner (InCA)",
    "ewc": "EWC",
    "in_context": "in context",
}


def _finals(name: str, methods: Sequence[str]) -> Callable[[Sequence[Row]], str]:
    """Final accuracies, mean of the seeds, each at its newest settings."""

    def found(rows: Sequence[Row]) -> str:
        shown = []
        for method in methods:
            own = [r for r in rows if (r["set"], r["part"], r["method"]) == (name, "test", method)]
            own = [r for r in own if r["options"] == own[-1]["options"] and r["sizes"] == own[-1]["sizes"]]
            shown.append(f"{NAMES[method]} {100 * statistics.mean(r['final'] for r in own):.1f}%")
        return "135M parameters: " + ", ".join(shown)

    return found


RIVALS = ("levels_memory", "external_learner", "ewc", "in_context")
CLAIMS = (
    Claim(
        "NL Figure 6 (CLINC150)",
        "Hope's levels above in-context learning, EWC and InCA",
        "",
        "confirmed",
        _finals("clinc150", RIVALS),
        "--set clinc150 ...",
    ),
    Claim(
        "NL Figure 6 (DBpedia)",
        "likewise on 70 classes",
        "",
        "confirmed",
        _finals("dbpedia70", (*RIVALS, "class_means")),
        "--set dbpedia70 --classes 10 ...",
    ),
    Claim(
        "NL Figure 6 (why)",
        "because several levels learn at different frequencies",
        "",
        "refuted",
        _finals("clinc150", ("levels_memory", "memory", "one_level_memory", "levels")),
        "--set clinc150 ...",
    ),
)
