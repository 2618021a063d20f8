"""The results as a table and a picture."""

from __future__ import annotations

from pathlib import Path

from nestling.plotting.curves import Series, line_chart
from reproductions.harness.level_records import levels_tables
from reproductions.harness.result_file import Row


def write_report(folder: Path, rows: dict[str, tuple[Row, Row]], grids: dict[str, dict[float, float]]) -> str:
    """table.md, and languages.svg: the first language before and after the second (NL Figure 8 has both on its axes).

    Args:
        folder: where to.
        rows: of every method the run of both languages and that of the second alone.
        grids: criterion by rate, by method.
    """
    lines = []
    if rows:
        first, second = next(iter(rows.values()))[0]["languages"]
        lines += _scores(rows, first, second)
        drawn = [
            Series(method, [1, 2], [both["scores"][0][0]["chrf"], both["scores"][1][0]["chrf"]], color)
            for color, (method, (both, _)) in enumerate(rows.items())
        ]
        labels = {"x_label": f"languages learned, {second} the second", "y_label": f"{first} to English, chrF"}
        (folder / "languages.svg").write_text(line_chart(drawn, **labels))
        lines += ["", *levels_tables({method: both["measures"] for method, (both, _) in rows.items()})]
    lines += ["", "| method | mean loss of the validation languages at the end, by lr |", "| --- | --- |"]
    for method, grid in grids.items():
        lines.append(f"| `{method}` | " + ", ".join(f"{rate:.3g}: {grid[rate]:.4f}" for rate in sorted(grid)) + " |")
    text = "\n".join(lines).strip() + "\n"
    (folder / "table.md").write_text(text)
    return text


def _scores(rows: dict[str, tuple[Row, Row]], first: str, second: str) -> list[str]:
    columns = [f"{x}, {kind}" for kind in ("chrF", "loss") for x in (first, second)]
    lines = [
        "Each language alone, and after both in sequence; chrF of greedy translations, and nats a token of the right "
        "answers.",
        "",
        "| method | lr | " + " | ".join(f"{c}: alone, sequence" for c in columns) + " | examples | tokens/s |",
        "| --- | --- | " + "--- | " * len(columns) + "--- | --- |",
    ]
    for method, (both, alone) in rows.items():
        pairs = [(both["scores"][0][0], both["scores"][1][0]), (alone["scores"][0][0], both["scores"][1][1])]
        cells = [f"{a['chrf']:.1f}, {b['chrf']:.1f}" for a, b in pairs]
        cells += [f"{a['loss']:.3f}, {b['loss']:.3f}" for a, b in pairs]
        examples = ", ".join(str(own[0]["examples"]) for own in (both["scores"][0], alone["scores"][0]))
        speed = f"{both['tokens'] / both['learning_seconds']:.0f}" if both["rate"] else ""
        rate = f"{both['rate']:.3g}" if both["rate"] else ""
        lines.append(f"| `{method}` | {rate} | {' | '.join(cells)} | {examples} | {speed} |")
    return lines
