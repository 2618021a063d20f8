"""The results as tables and pictures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial

from nestling.plotting.curves import Series, line_chart
from reproductions.harness.level_records import levels_tables
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row
from reproductions.harness.stream_methods import ABLATIONS, METHODS

POINTS = 24
"""Of a line in a picture at most: each is a mean over the tokens since the one before."""
STACKS = ("cms_2", "cms_3", "cms_4")
SHOWN = (*METHODS, "one_level+taught", "one_level+taught+rehearsal")
"""In the first table; the others stand in the whole ones."""
DRAWN = ("frozen", "frozen_long", "one_level", "{best}", "lora", "full")
NAMES = {"cldf_examples": "Kalamang"}


def make_report(rows: Sequence[Row]) -> Report:
    """`results`, the longest sequence of two texts in short; `alone`, `sequence`, `judged`, `levels`, `rates` and
    `short` (sequences of fewer tokens) in full; a picture of every text that was read alone."""
    groups = _sequences(rows)
    parts = dict.fromkeys(("results", "alone", "sequence", "judged", "levels", "rates", "short"), EMPTY)
    grids = _grids(rows)
    if grids:
        parts["rates"] = _rates(grids)
    if not groups:
        return Report(parts)
    main, *others = groups
    sizes = main[-1]["sizes"]
    by_method = _chosen(main, grids)
    alone = _alone_rows([row for row in rows if row["part"] == "alone" and row["sizes"] == sizes], grids)
    pictures = {f"{name}.svg": picture for name, picture in _pictures(alone, grids).items()}
    if "frozen" in by_method:
        parts["results"] = _short_table(by_method)
        if pictures:
            name = next(iter(pictures))
            parts["results"] += f"\n\n![loss while reading {title(name.removesuffix('.svg'))}]({name})"
        parts["sequence"], parts["judged"] = _sequence(by_method), _judged(by_method)
    if "frozen" in alone:
        more = [f"![loss while reading {title(name.removesuffix('.svg'))}]({name})" for name in list(pictures)[1:]]
        parts["alone"] = "\n\n".join([_alone(alone), *more])
    parts["levels"] = "\n".join(levels_tables({m: row.get("measures") or [] for m, row in by_method.items()}))
    if others:
        parts["short"] = _others(others)
    return Report(parts, pictures)


def title(name: str) -> str:
    """Of a text, from its file's name."""
    return NAMES.get(name) or re.sub(r"_\d+$", "", name).replace("-", " ")


def draw(rows: dict[str, Row]) -> str:
    """Loss against position, the highest at the end first in the legend."""
    lines = []
    for color, (name, row) in enumerate(rows.items()):
        ends, losses = row["curves"][0]
        share = max(1, -(-len(ends) // POINTS))
        groups = range(0, len(ends), share)
        mean = [sum(losses[i : i + share]) / len(losses[i : i + share]) for i in groups]
        last = [ends[min(i + share, len(ends)) - 1] for i in groups]
        lines.append(Series(name, last, mean, color, dashed=name.startswith("frozen")))
    lines.sort(key=lambda line: -line.y[-1])
    return line_chart(lines, x_label="tokens read", y_label="loss, nats a token")


def _sequences(rows: Sequence[Row]) -> list[list[Row]]:
    """Sequences that read and asked the same, the longest first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == "sequence":
            key = json.dumps([row[name] for name in ("model", "texts", "read", "judges", "sizes", "seed")])
            groups.setdefault(key, []).append(row)
    return sorted(groups.values(), key=lambda own: -sum(own[0]["read"]))


def _grids(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The newest validation stream's rows by method, options after what they are options of."""
    tried = [row for row in rows if row["part"] == "validation"]
    keys = ("model", "texts", "read", "sizes", "seed")
    tried = [row for row in tried if all(row[key] == tried[-1][key] for key in keys) and row["rate"]]
    names = sorted({row["method"] for row in tried}, key=_order)
    return {name: [row for row in tried if row["method"] == name] for name in names}


def _order(method: str) -> list[int]:
    """By base method, then by options as they are listed."""
    base, *options = method.split("+")
    return [list(METHODS).index(base), *(list(ABLATIONS).index(option) for option in options)]


def _best(grids: dict[str, list[Row]], method: str) -> float | None:
    """The best rate of a method's grid, None without one."""
    rows = [row for row in grids.get(method, ()) if _on_grid(row["rate"])]
    return min(rows, key=lambda r: (_finite(r["criterion"]), r["rate"]))["rate"] if rows else None


def _on_grid(rate: float) -> bool:
    """A rate that every method tries where its best is near, and not one of --rate between them."""
    return f"{rate:.6e}".split("e")[0] in ("1.000000", "3.000000")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _chosen(rows: Sequence[Row], grids: dict[str, list[Row]]) -> dict[str, Row]:
    """A row for every method, at the rate that validation chose where there is one."""
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: _order(row["method"])):
        if row["method"] not in found or row["rate"] == _best(grids, row["method"]):
            found[row["method"]] = row
    return found


def _alone_rows(rows: Sequence[Row], grids: dict[str, list[Row]]) -> dict[str, dict[str, Row]]:
    """By method and text; methods that have read all texts."""
    texts = list(dict.fromkeys(row["texts"][0] for row in rows))
    found: dict[str, dict[str, Row]] = {}
    for text in texts:
        for method, row in _chosen([r for r in rows if r["texts"] == [text] and not r["diverged"]], grids).items():
            found.setdefault(method, {})[text] = row
    found = {method: own for method, own in found.items() if len(own) == len(texts)}
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _pictures(alone: dict[str, dict[str, Row]], grids: dict[str, list[Row]]) -> dict[str, Callable[[], str]]:
    if "frozen" not in alone:
        return {}
    lowest = {m: min(_finite(row["criterion"]) for row in grids[m]) for m in STACKS if m in grids}
    best = min(lowest, key=lambda m: lowest[m]) if lowest else STACKS[0]
    drawn = [method for name in DRAWN if (method := name.format(best=best)) in alone]
    return {text: partial(draw, {method: alone[method][text] for method in drawn}) for text in alone["frozen"]}


def _short_table(rows: dict[str, Row]) -> str:
    frozen = rows["frozen"]
    first, second = map(title, frozen["texts"])
    lines = []
    for method in (m for m in SHOWN if m in rows and not rows[m]["diverged"]):
        row = rows[method]
        lost = f"{row['held'][1][0] - row['held'][0][0]:.3f}" if row["rate"] else ""
        cells = [_change(row["second_halves"][i], frozen["second_halves"][i]) for i in (0, 1)]
        cells += [lost, f"{row['held'][1][0]:.3f}", f"{row['held'][1][1]:.3f}"]
        cells += [f"{row['wikitext']:.3f}" if "wikitext" in row else ""]
        lines.append([f"`{method}`", _rate(row), *cells, f"{row['lambada']['loss']:.3f}" if "lambada" in row else ""])
    head = ["method", "lr", f"{first}, second half", f"{second}, second half", f"{first} lost by {second}"]
    head += [f"{first} held out, at the end", f"{second} held out", "WikiText", "LAMBADA, a word"]
    read = [f"{name} ({tokens:,} tokens)" for name, tokens in zip((first, second), frozen["read"], strict=True)]
    told = f"{', then '.join(read)}. Nats a token; in brackets against frozen."
    return f"{told}\n\n{table(head, lines)}"


def _alone(rows: dict[str, dict[str, Row]]) -> str:
    frozen = rows["frozen"]
    lines = []
    for method, own in rows.items():
        cells = [_change(own[text]["second_halves"][0], frozen[text]["second_halves"][0]) for text in frozen]
        lines.append([f"`{method}`", _rate(next(iter(own.values()))), *cells, _speed(list(own.values()))])
    told = "Loss of the second half in nats a token, and in brackets against frozen."
    return f"{told}\n\n{table(['method', 'lr', *map(title, frozen), 'tokens/s'], lines)}"


def _sequence(rows: dict[str, Row]) -> str:
    frozen = rows["frozen"]
    first, second = map(title, frozen["texts"])
    lines = []
    for method, row in rows.items():
        if row["diverged"]:
            lines.append([f"`{method}`", _rate(row), "diverged", *[""] * 6])
            continue
        pairs = [(row["second_halves"][i], frozen["second_halves"][i]) for i in (0, 1)]
        pairs += [(row["held"][i][j], frozen["held"][i][j]) for i, j in ((0, 0), (1, 0), (1, 1))]
        pairs += [(row["again"], frozen["again"])]
        lines.append([f"`{method}`", _rate(row), *[_change(*pair) for pair in pairs], _speed([row])])
    head = ["method", "lr", f"{first}, second half", f"{second}, second half", f"{first} held out: after it"]
    head += [f"after {second}", f"{second} held out", f"{first}'s first tokens again", "tokens/s"]
    return f"{first}, then {second}. Nats a token, and in brackets against frozen.\n\n{table(head, lines)}"


def _judged(rows: dict[str, Row]) -> str:
    frozen = rows["frozen"]
    sets = list(frozen["choices"])
    head = ["method", "WikiText, nats a token", "LAMBADA, accuracy", "LAMBADA, nats a word"]
    lines = []
    for method, row in rows.items():
        if row["diverged"]:
            continue
        lambada = row.get("lambada")
        cells = [f"{row['wikitext']:.3f}" if "wikitext" in row else ""]
        cells += [f"{lambada['accuracy']:.1%}", f"{lambada['loss']:.3f}"] if lambada else ["", ""]
        lines.append([f"`{method}`", *cells, *(f"{row['choices'][s]['normalised']:.1%}" for s in sets)])
    counts = {"LAMBADA": (frozen.get("lambada") or {}).get("items", 0)}
    counts |= {s: frozen["choices"][s]["items"] for s in sets}
    items = ", ".join(f"{name} {count}" for name, count in counts.items())
    told = f"After both texts; frozen is before. Items: {items}."
    return f"{told}\n\n{table([*head, *(f'{s}, acc_norm' for s in sets)], lines)}"


def _others(groups: Sequence[Sequence[Row]]) -> str:
    """All rows of the shorter sequences; where a running mean of the weights was scored, in a line of its own."""
    lines = []
    for rows in groups:
        for row in sorted(rows, key=lambda row: (_order(row["method"]), row["rate"])):
            shown = [f"{row['read'][0]:,}", f"`{row['method']}`", _rate(row)]
            halves = [f"{half:.3f}" for half in row["second_halves"]]
            if "held" in row:
                lines.append([*shown, *halves, *_held(row["held"]), f"{row['wikitext']:.3f}"])
                shown, halves = [shown[0], f"{shown[1]}, its mean", shown[2]], ["", ""]
            if "mean_held" in row:
                lines.append([*shown, *halves, *_held(row["mean_held"]), f"{row['mean_wikitext']:.3f}"])
    first, second = map(title, groups[0][0]["texts"])
    head = ["tokens each", "method", "lr", f"{first}, second half", f"{second}, second half"]
    head += [f"{first} held out: after it", f"after {second}", "lost", f"{second} held out", "WikiText"]
    return table(head, lines)


def _held(held: Sequence[Sequence[float]]) -> list[str]:
    return [f"{held[0][0]:.3f}", f"{held[1][0]:.3f}", f"{held[1][0] - held[0][0]:+.3f}", f"{held[1][1]:.3f}"]


def _rates(grids: dict[str, list[Row]]) -> str:
    lines = []
    for method, rows in grids.items():
        told = ", ".join(f"{r['rate']:.3g}: {r['criterion']:.4f}" for r in sorted(rows, key=lambda r: r["rate"]))
        lines.append([f"`{method}`", told])
    return table(["method", "criterion on the validation stream, by lr"], lines)


def _change(value: float, frozen: float) -> str:
    return f"{value:.3f} ({value - frozen:+.3f})"


def _rate(row: Row) -> str:
    return f"{row['rate']:.3g}" if row["rate"] else ""


def _speed(rows: Sequence[Row]) -> str:
    tokens = sum(curve[0][-1] for row in rows for curve in row["curves"])
    return f"{tokens / max(1e-9, sum(row['learning_seconds'] for row in rows)):.0f}"
