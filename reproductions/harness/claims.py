"""The papers' claims, each with what was found here: `python -m reproductions --claims` writes docs/results.md."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reproductions.harness.report import table
from reproductions.harness.rows import NAME, Row, read_rows

ROOT = Path(__file__).parents[1]
PAGE = ROOT.parent / "docs" / "results.md"
PAPERS = {
    "NL": "Behrouz et al., Nested Learning, arXiv:2512.24695",
    "NL-cr": "its camera-ready version, NeurIPS 2025",
    "Titans": "Behrouz et al., Titans, arXiv:2501.00663",
}
LIST = "\n".join(f"- **{name}**: {title}" for name, title in PAPERS.items())
HEAD = f"""# Results

Every table and figure of the papers, and some claims of others, beside what was measured here. The page is generated
from the rows of the reproductions by `python -m reproductions --claims`.

Everything here is small: models of 0.2 to 135 million parameters, hours of one machine. *Confirmed*, *refuted* and *in
part* (on some of what was tried, or within the spread of the seeds) are said of what was run, at the size that the
column "here" and the linked page say, and not of the papers' own experiments. "Theirs" are the papers' figures, for
comparison.

{LIST}
"""


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        source: paper, and table or figure.
        says: the claim, in a few words.
        theirs: its figure; empty where the paper shows a picture.
        verdict: of what was run here.
        here: of the reproduction's rows, what was found; None where nothing ran.
        options: of the command that makes the rows, `python -m reproductions NAME OPTIONS`.
    """

    source: str
    says: str
    theirs: str
    verdict: Literal["confirmed", "in part", "refuted", "not run"]
    here: Callable[[Sequence[Row]], str] | None = None
    options: str = ""


def declared() -> dict[str, tuple[Claim, ...]]:
    """The claims that reproductions answer, by name, from `claims.py` beside each."""
    names = sorted(path.parent.name for path in ROOT.glob("*/claims.py") if path.parent != Path(__file__).parent)
    return {name: importlib.import_module(f"reproductions.{name}.claims").CLAIMS for name in names}


def not_run() -> tuple[Claim, ...]:
    """Those that nothing answers yet."""
    claims: tuple[Claim, ...] = importlib.import_module("reproductions.not_run").CLAIMS
    return claims


def page() -> str:
    """docs/results.md."""
    found = [(claim, name) for name, claims in declared().items() for claim in claims]
    found += [(claim, "") for claim in not_run()]
    rows = {name: read_rows(ROOT / name / NAME) for name in dict.fromkeys(name for _, name in found if name)}
    order = list(PAPERS)
    papers = [claim.source.split()[0] for claim, _ in found]
    ranks = [order.index(paper) if paper in order else len(order) for paper in papers]
    ordered = [pair for _, pair in sorted(enumerate(found), key=lambda item: (ranks[item[0]], _natural(item[1][0])))]
    counts = [sum(claim.verdict == verdict for claim, _ in found) for verdict in VERDICTS]
    told = ", ".join(f"{count} {verdict}" for verdict, count in zip(VERDICTS, counts, strict=True))
    head = ["claim of", "it says", "theirs", "here", "verdict", "command"]
    text = table(head, [_line(claim, name, rows.get(name, [])) for claim, name in ordered])
    return f"{HEAD}\n{len(found)} claims: {told}.\n\n{text}\n"


def write() -> Path:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return PAGE


VERDICTS = ("confirmed", "in part", "refuted", "not run")


def _line(claim: Claim, name: str, rows: Sequence[Row]) -> list[str]:
    if claim.here is None:
        return [claim.source, claim.says, claim.theirs, "", f"*{claim.verdict}*", ""]
    command = f"`python -m reproductions {name}{' ' * bool(claim.options)}{claim.options}`"
    found = f"{claim.here(rows)} ([{name}](../reproductions/{name}/RESULTS.md))"
    return [claim.source, claim.says, claim.theirs, found, f"**{claim.verdict}**", command]


def _natural(claim: Claim) -> tuple[str, int]:
    """Tables before figures before sections, by number."""
    words = claim.source.split()
    kind = words[1] if len(words) > 1 else ""
    digits = "".join(c for c in words[2] if c.isdigit()) if len(words) > 2 else ""
    order = {"Table": "0", "Figure": "1"}.get(kind, "2")
    return order + (claim.source if order == "2" else ""), int(digits or 0)
