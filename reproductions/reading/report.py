"""The results as tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nestling.plotting.curves import Series, line_chart
from reproductions.harness.level_records import levels_tables
from reproductions.harness.result_file import Row

POINTS = 24
"""Of a line in a picture at most: each is a mean over the tokens since the one before."""


def write_report(
    folder: Path,
    grids: dict[str, list[Row]],
    alone: dict[str, list[Row]],
    sequence: dict[str, Row],
    drawn: Sequence[str],
) -> str:
    """table.md, and a picture for every text.

    Args:
        folder: where to.
        grids: validation rows by method.
        alone: a row for every text, by method; "frozen" is among them, unless it is empty.
        sequence: likewise, the row of two texts.
        drawn: methods in the pictures, six at most.
    """
    parts = []
    if alone:
        parts += ["## Every text alone", "", *_alone(alone)]
        for index, row in enumerate(alone["frozen"]):
            picture = draw({name: alone[name][index] for name in drawn if name in alone})
            (folder / f"{row['texts'][0]}.svg").write_text(picture)
    if sequence:
        parts += ["", "## One after the other", "", *_sequence(sequence), "", *_judged(sequence)]
        parts += ["", "## Levels", "", *levels_tables({m: row.get("measures") or [] for m, row in sequence.items()})]
    parts += ["", "## Rates", "", *_grids(grids)]
    text = "\n".join(parts).strip() + "\n"
    (folder / "table.md").write_text(text)
    return text


def draw(rows: dict[str, Row]) -> str:
    """Loss against position."""
    lines = []
    for color, (name, row) in enumerate(rows.items()):
        ends, losses = row["curves"][0]
        share = max(1, -(-len(ends) // POINTS))
        groups = range(0, len(ends), share)
        mean = [sum(losses[i : i + share]) / len(losses[i : i + share]) for i in groups]
        last = [ends[min(i + share, len(ends)) - 1] for i in groups]
        lines.append(Series(name, last, mean, color, dashed=name.startswith("frozen")))
    return line_chart(lines, x_label="tokens read", y_label="loss, nats a token")


def _alone(rows: dict[str, list[Row]]) -> list[str]:
    frozen = rows["frozen"]
    names = [row["texts"][0] for row in frozen]
    lines = [*_header(["method", "lr", *names, "tokens/s"])]
    for method, own in rows.items():
        cells = [_change(r["second_halves"][0], f["second_halves"][0]) for r, f in zip(own, frozen, strict=True)]
        lines.append(_line([f"`{method}`", _rate(own[0]), *cells, _speed(own)]))
    return ["Loss of the second half in nats a token, and in brackets against frozen.", "", *lines]


def _sequence(rows: dict[str, Row]) -> list[str]:
    first, second = rows["frozen"]["texts"]
    columns = [f"{first}, second half", f"{second}, second half", f"{first} held out: after it", f"after {second}"]
    lines = [*_header(["method", "lr", *columns, f"{second} held out", f"{first}'s first tokens again", "tokens/s"])]
    frozen = rows["frozen"]
    for method, row in rows.items():
        if row["diverged"]:
            lines.append(_line([f"`{method}`", _rate(row), "diverged", *[""] * 6]))
            continue
        pairs = [(row["second_halves"][i], frozen["second_halves"][i]) for i in (0, 1)]
        pairs += [(row["held"][i][j], frozen["held"][i][j]) for i, j in ((0, 0), (1, 0), (1, 1))]
        pairs += [(row["again"], frozen["again"])]
        lines.append(_line([f"`{method}`", _rate(row), *[_change(*pair) for pair in pairs], _speed([row])]))
    return [f"{first}, then {second}. Nats a token, and in brackets against frozen.", "", *lines]


def _judged(rows: dict[str, Row]) -> list[str]:
    frozen = rows["frozen"]
    sets = list(frozen["choices"])
    columns = ["WikiText, nats a token", "LAMBADA, accuracy", "LAMBADA, nats a word", *[f"{s}, acc_norm" for s in sets]]
    lines = ["After both texts; frozen is before.", "", *_header(["method", *columns])]
    for method, row in rows.items():
        if row["diverged"]:
            continue
        lambada = row.get("lambada")
        cells = [f"{row['wikitext']:.3f}" if "wikitext" in row else ""]
        cells += [f"{lambada['accuracy']:.1%}", f"{lambada['loss']:.3f}"] if lambada else ["", ""]
        cells += [f"{row['choices'][s]['normalised']:.1%}" for s in sets]
        lines.append(_line([f"`{method}`", *cells]))
    counts = {"LAMBADA": (frozen.get("lambada") or {}).get("items", 0)} | {
        s: frozen["choices"][s]["items"] for s in sets
    }
    return [*lines, "", "Items: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + "."]


def _grids(grids: dict[str, list[Row]]) -> list[str]:
    lines = [*_header(["method", "criterion on the validation stream, by lr"])]
    for method, rows in grids.items():
        told = ", ".join(f"{r['rate']:.3g}: {r['criterion']:.4f}" for r in sorted(rows, key=lambda r: r["rate"]))
        lines.append(_line([f"`{method}`", told]))
    return lines


def _header(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _change(value: float, frozen: float) -> str:
    return f"{value:.3f} ({value - frozen:+.3f})"


def _rate(row: Row) -> str:
    return f"{row['rate']:.3g}" if row["rate"] else ""


def _speed(rows: Sequence[Row]) -> str:
    tokens = sum(curve[0][-1] for row in rows for curve in row["curves"])
    return f"{tokens / max(1e-9, sum(row['learning_seconds'] for row in rows)):.0f}"
