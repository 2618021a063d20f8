"""The results as tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence

from nestling.plotting.curves import Series, line_chart
from reproductions.harness.grid import best_rate
from reproductions.harness.level_records import levels_tables
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row
from reproductions.harness.rows import first as first_of


def make_report(rows: Sequence[Row]) -> Report:
    """The scores and a picture of the first language before and after the second (NL Figure 8 has both on its axes);
    the levels' measures, the rates tried, and how well the frozen model knows each language."""
    both, alone, grids = _newest(rows)
    parts = {"results": EMPTY, "levels": EMPTY, "rates": EMPTY, "languages": _languages(rows)}
    if grids:
        lines = [
            [f"`{method}`", ", ".join(f"{rate:.3g}: {grid[rate]:.4f}" for rate in sorted(grid))]
            for method, grid in grids.items()
        ]
        parts["rates"] = table(["method", "mean loss of the validation languages at the end, by lr"], lines)
    if not both:
        return Report(parts)
    first, second = next(iter(both.values()))["languages"]
    drawn = [
        Series(method, [1, 2], [row["scores"][0][0]["chrf"], row["scores"][1][0]["chrf"]], color)
        for color, (method, row) in enumerate(both.items())
    ]
    drawn.sort(key=lambda line: -line.y[-1])
    labels = {"x_label": f"languages learned, {second} the second", "y_label": f"{first} to English, chrF"}
    parts["results"] = _scores(both, alone, first, second) + f"\n\n![{first} before and after {second}](languages.svg)"
    parts["levels"] = "\n".join(levels_tables({method: row["measures"] for method, row in both.items()}))
    return Report(parts, {"languages.svg": lambda: line_chart(drawn, **labels)})


def criterion(row: Row) -> float:
    """Mean loss of all languages after the last."""
    last = row["scores"][-1]
    return float(sum(score["loss"] for score in last) / len(last))


def _newest(rows: Sequence[Row]) -> tuple[dict[str, Row], dict[str, Row], dict[str, dict[float, float]]]:
    """Rows of both languages and of the second alone at every method's best rate, with the newest row's sizes, and the
    criterion by rate; all by method."""
    sequences = [row for row in rows if row["part"] == "sequence"]
    tried = [row for row in rows if row["part"] == "validation"]
    last = (sequences or tried or [{}])[-1]
    own = [row for row in rows if all(row.get(key) == last[key] for key in ("model", "sizes", "seed") if last)]
    tried = [row for row in own if row["part"] == "validation" and row["languages"] == tried[-1]["languages"]]
    grids: dict[str, dict[float, float]] = {}
    for row in tried:
        if row["method"] != "icl":
            grids.setdefault(row["method"], {})[row["rate"]] = criterion(row)
    grids = dict(sorted(grids.items()))
    rates = {"icl": 0.0} | {method: best_rate(grid) for method, grid in grids.items()}
    if not sequences:
        return {}, {}, grids

    def at_best(part: str, languages: list[str]) -> dict[str, Row]:
        named = {"part": part, "languages": languages}
        found = {m: first_of(own, {**named, "method": m, "rate": rate}) for m, rate in rates.items()}
        return {method: row for method, row in found.items() if row is not None}

    both, alone = at_best("sequence", last["languages"]), at_best("alone", last["languages"][1:])
    return {m: row for m, row in both.items() if m in alone}, alone, grids


def _languages(rows: Sequence[Row]) -> str:
    """By falling bits."""
    measured = sorted((r for r in rows if r["part"] == "measure"), key=lambda r: -r["bits_per_byte"])
    lines = [[r["language"], f"{r['bits_per_byte']:.3f}", f"{r['loss']:.3f}", str(r["tokens"])] for r in measured]
    return table(["language", "bits per byte", "nats a token", "tokens"], lines) if lines else EMPTY


def _scores(rows: dict[str, Row], alone: dict[str, Row], first: str, second: str) -> str:
    columns = [f"{x}, {kind}" for kind in ("chrF", "loss") for x in (first, second)]
    lines = []
    for method, both in rows.items():
        single = alone[method]
        pairs = [(both["scores"][0][0], both["scores"][1][0]), (single["scores"][0][0], both["scores"][1][1])]
        cells = [f"{a['chrf']:.1f}, {b['chrf']:.1f}" for a, b in pairs]
        cells += [f"{a['loss']:.3f}, {b['loss']:.3f}" for a, b in pairs]
        examples = ", ".join(str(own[0]["examples"]) for own in (both["scores"][0], single["scores"][0]))
        speed = f"{both['tokens'] / both['learning_seconds']:.0f}" if both["rate"] else ""
        rate = f"{both['rate']:.3g}" if both["rate"] else ""
        lines.append([f"`{method}`", rate, *cells, examples, speed])
    told = (
        f"Each language alone, and after both in sequence ({first} first); chrF of greedy translations, and nats a "
        "token of the right answers."
    )
    head = ["method", "lr", *(f"{c}: alone, sequence" for c in columns), "examples", "tokens/s"]
    return f"{told}\n\n{table(head, lines)}"
