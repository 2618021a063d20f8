"""A nested system as a picture: levels as bands from fast to slow, components as boxes, transfers as arrows.

At the left of every band a wave shows its frequency (not to scale: each level some octaves below the one above), in the
spirit of NL Figures 1 and 2. Transfers between the same two levels of the same kind are one arrow at the right.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from nestling.levels.components import Component, SystemLevel, TransferKind, count_text, state_text
from nestling.plotting.curves import COLORS, STYLE

if TYPE_CHECKING:
    from nestling.levels.system import NestedSystem

KINDS = {"attention": COLORS[2], "fast weights": COLORS[0], "optimizer state": COLORS[4], "parameters": "#6b7280"}
MOVES: dict[TransferKind, str] = {
    "parametric": COLORS[0],
    "non-parametric": COLORS[2],
    "backpropagation": COLORS[1],
    "initialisation": COLORS[3],
    "generation": COLORS[4],
}
INK, SOFT, BAND = "#20242a", "#5c626b", ("#f4f6f9", "#eaeef4")
AXIS, BOX_WIDTH, BOX_HEIGHT, GAP, PAD, LANE = 2.0, 2.75, 1.12, 0.18, 0.22, 0.42
PER_ROW, MOST = 3, 6
WRAP = 31


@dataclass(frozen=True)
class Lane:
    """An arrow from one level to another, at the right of the bands."""

    source: int
    target: int
    kind: TransferKind
    text: str


def draw_system(system: NestedSystem, path: Path) -> None:
    """Write the picture of a system to a file.

    Raises:
        ValueError: an ending of `path` that matplotlib does not know.
    """
    with rc_context(STYLE):
        figure = system_figure(system)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata, bbox_inches="tight", facecolor="white")


def system_figure(system: NestedSystem) -> Figure:
    """The picture, to be drawn under `plotting.curves.STYLE`."""
    lanes = _lanes(system)
    rows = [_rows(level) for level in system.levels]
    columns = max(len(row) for level in rows for row in level)
    inner = columns * (BOX_WIDTH + GAP) - GAP + 2 * PAD
    heights = [len(level) * (BOX_HEIGHT + GAP) - GAP + 2 * PAD for level in rows]
    total = sum(heights) + GAP * (len(heights) - 1)
    tops, y = [], 0.0
    for height in heights:
        tops.append((y, height))
        y -= height + GAP
    spans = [tuple(_port(lane, lanes, tops, side) for side in (lane.source, lane.target)) for lane in lanes]
    places = _pack(spans)
    legend = _legend_items(system, lanes)
    width = max(AXIS + inner + 0.35 + (max(places, default=-1) + 1) * LANE, sum(w for *_, w in legend) + 0.2)
    figure = Figure(figsize=(width, total + 1.55))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(-total - 0.75, 0.8)
    axes.set_axis_off()
    axes.text(0, 0.5, system.name, fontsize=14, fontweight="bold", color=INK, va="center")
    for i, (level, level_rows, (top, height)) in enumerate(zip(system.levels, rows, tops, strict=True)):
        _band(axes, top, height, AXIS + inner, BAND[i % 2])
        _clock(axes, level, _cycles(system, level), top, height)
        for r, row in enumerate(level_rows):
            left = AXIS + PAD + (columns - len(row)) * (BOX_WIDTH + GAP) / 2
            for c, component in enumerate(row):
                _box(axes, left + c * (BOX_WIDTH + GAP), top - PAD - r * (BOX_HEIGHT + GAP), component)
    for lane, span, column in zip(lanes, spans, places, strict=True):
        _draw_lane(axes, AXIS + inner + 0.36 + column * LANE, AXIS + inner, lane, *span)
    _draw_legend(axes, legend, -total - 0.45)
    return figure


def _rows(level: SystemLevel) -> list[list[Component]]:
    """The level's boxes, the largest first; what is beyond `MOST` is one box."""
    boxes = sorted(level.components, key=lambda c: -(c.parameters + c.state + c.growth))
    if len(boxes) > MOST:
        kept, rest = boxes[: MOST - 1], boxes[MOST - 1 :]
        together = Component(
            name=f"{len(rest)} more",
            kind=rest[0].kind,
            frequency=level.frequency,
            context=rest[0].context,
            objective=", ".join(dict.fromkeys(c.objective for c in rest)),
            rule=", ".join(c.name for c in rest),
            parameters=sum(c.parameters for c in rest),
            parameter_bytes=sum(c.parameter_bytes for c in rest),
            state=sum(c.state for c in rest),
            state_bytes=sum(c.state_bytes for c in rest),
        )
        boxes = [*kept, together]
    return [boxes[i : i + PER_ROW] for i in range(0, len(boxes), PER_ROW)]


def _lanes(system: NestedSystem) -> list[Lane]:
    """Transfers between levels, those of one kind between the same two levels as one; the short ones inside."""
    place = {c.name: level.index - 1 for level in system.levels for c in level.components}
    found: dict[tuple[int, int, TransferKind], list[str]] = {}
    for t in system.transfers:
        if place[t.source] != place[t.target]:
            found.setdefault((place[t.source], place[t.target], t.kind), []).append(t.what)
    lanes = [Lane(*ends, ", ".join(dict.fromkeys(what))) for ends, what in found.items()]
    return sorted(lanes, key=lambda x: (abs(x.source - x.target), min(x.source, x.target), x.kind))


def _band(axes: Axes, top: float, height: float, right: float, color: str) -> None:
    shape = "round,pad=0,rounding_size=0.14"
    axes.add_patch(FancyBboxPatch((0, top - height), right, height, boxstyle=shape, fc=color, ec="none", zorder=0))


def _cycles(system: NestedSystem, level: SystemLevel) -> float:
    """Periods of a level's wave: the slowest of the system has one, every faster frequency twice as many."""
    if level.frequency.unit in ("never", "query"):
        return 0.0 if level.frequency.unit == "never" else 55.0
    ranks = sorted({other.frequency.rank for other in system.levels if other.frequency.unit not in ("query", "never")})
    return 1.0 * 2.0 ** min(len(ranks) - 1 - ranks.index(level.frequency.rank), 5)


def _clock(axes: Axes, level: SystemLevel, cycles: float, top: float, height: float) -> None:
    """Index, frequency in words, and a wave."""
    middle = top - height / 2
    axes.text(0.18, middle + 0.34, f"Level {level.index}", fontsize=11, fontweight="bold", color=INK, va="center")
    words = [level.updates, *filter(None, [level.frequency.rate_text()])]
    axes.text(0.18, middle + 0.08, "updates  " + ", ".join(words), fontsize=9, color=SOFT, va="center")
    x = np.linspace(0.18, AXIS - 0.3, 800)
    wave = np.sin(2 * np.pi * cycles * (x - x[0]) / (x[-1] - x[0]))
    axes.plot(x, middle - 0.28 + 0.15 * wave, color=INK, lw=0.6 if cycles > 40 else 1.1, zorder=2)


def _box(axes: Axes, left: float, top: float, component: Component) -> None:
    color = KINDS[component.kind]
    shape = "round,pad=0,rounding_size=0.09"
    bottom = top - BOX_HEIGHT
    axes.add_patch(
        FancyBboxPatch((left, bottom), BOX_WIDTH, BOX_HEIGHT, boxstyle=shape, fc="white", ec=color, lw=1.4, zorder=3)
    )
    axes.plot([left + 0.07] * 2, [bottom + 0.13, top - 0.13], color=color, lw=3.2, solid_capstyle="round", zorder=4)
    copies = f"  ×{component.copies}" if component.copies > 1 else ""
    room = WRAP - len(copies)
    name = component.name if len(component.name) <= room else f"…{component.name[1 - room :]}"
    counts = [count_text(component.parameters, component.parameter_bytes), state_text(component)]
    held = "; ".join(c for c in counts if c)
    lines = [
        (name + copies, INK, "bold", 8.6),
        (f"{component.context}: {component.objective}", SOFT, "normal", 7.6),
        (component.rule, SOFT, "normal", 7.6),
        (held, SOFT, "normal", 7.6),
    ]
    for i, (text, ink, weight, size) in enumerate(lines):
        short = (
            text if len(text) <= WRAP + 10 else textwrap.shorten(text.partition(";")[0], WRAP + 10, placeholder=" …")
        )
        axes.text(
            left + 0.19, top - 0.2 - i * 0.24, short, fontsize=size, color=ink, fontweight=weight, va="center", zorder=4
        )


def _pack(spans: list[tuple[float, ...]]) -> list[int]:
    """A column for every lane, the first in which it meets no other."""
    columns: list[list[tuple[float, float]]] = []
    places = []
    for span in spans:
        low, high = min(span) - 0.08, max(span) + 0.08
        fits = (i for i, taken in enumerate(columns) if all(high < a or low > b for a, b in taken))
        place = next(fits, len(columns))
        if place == len(columns):
            columns.append([])
        columns[place].append((low, high))
        places.append(place)
    return places


def _draw_lane(axes: Axes, x: float, edge: float, lane: Lane, start: float, end: float) -> None:
    """From the source band's edge out to the lane, along it, and back to the target band."""
    color = MOVES[lane.kind]
    axes.plot([edge, x, x], [start, start, end], color=color, lw=1.5, solid_joinstyle="round", zorder=2)
    axes.plot([edge], [start], marker="o", ms=3.5, color=color, zorder=5)
    _arrow(axes, (x, end), (edge - 0.02, end), color)
    room = int(abs(start - end) * 13) + 3
    text = textwrap.shorten(lane.text, max(room, 10), placeholder=" …")
    back = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none"}
    axes.text(x, (start + end) / 2, text, rotation=90, fontsize=7.4, color=color, ha="center", va="center", bbox=back)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0)
    arrow.set(color=color, linewidth=1.5, zorder=5)
    axes.add_patch(arrow)


def _port(lane: Lane, lanes: list[Lane], tops: list[tuple[float, float]], level: int) -> float:
    """Height at which a lane meets a band: the arrows of a band spread over its edge."""
    top, height = tops[level]
    above = [x for x in lanes if max(x.source, x.target) == level]
    below = [x for x in lanes if min(x.source, x.target) == level]
    passing = [x for x in lanes if level in (x.source, x.target) and x not in above and x not in below]
    order = [*above, *passing, *reversed(below)]
    return top - height * (order.index(lane) + 1) / (len(order) + 1)


def _legend_items(system: NestedSystem, lanes: list[Lane]) -> list[tuple[str, str, bool, float]]:
    """Text, color, whether it is an arrow, and the room it takes."""
    items = [(k, KINDS[k], False, 0.42 + 0.074 * len(k)) for k in dict.fromkeys(c.kind for c in system.components)]
    moves = {lane.kind for lane in lanes}
    return items + [(m, color, True, 0.68 + 0.074 * len(m)) for m, color in MOVES.items() if m in moves]


def _draw_legend(axes: Axes, items: list[tuple[str, str, bool, float]], y: float) -> None:
    x = 0.1
    for text, color, arrow, room in items:
        if arrow:
            _arrow(axes, (x, y), (x + 0.32, y), color)
        else:
            axes.plot([x, x], [y - 0.1, y + 0.1], color=color, lw=3.2, solid_capstyle="round")
        axes.text(x + (0.4 if arrow else 0.12), y, text, fontsize=8.5, color=INK, va="center")
        x += room
