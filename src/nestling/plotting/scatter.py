"""Scatter charts as SVG text: one panel a group, a name at every point."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nestling.plotting.curves import COLORS, STYLE

LINE = 0.17
"""Inches of a name."""
LEADER = {"arrowstyle": "-", "relpos": (0, 0.5), "color": "#b4b8be", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
"""From the left of a name to its point."""


@dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        name: beside it.
        group: the panel it belongs to.
        x, y: where; x above 0.
    """

    name: str
    group: str
    x: float
    y: float


def scatter_chart(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    width: float = 7.6,
) -> str:
    """Panels below one another, one a group, x on a logarithmic scale, as an SVG document.

    Every point has its name at the right of its panel, the highest first, with a line to it.

    Args:
        points: at least one.
        x_label: with the unit.
        y_label: with the unit.
        y_range: of all panels, so that what looks far apart is; None fits each to its points.
        width: inches at 72 points.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("a chart needs at least one point")
    groups = {group: [p for p in points if p.group == group] for group in dict.fromkeys(p.group for p in points)}
    names = list(dict.fromkeys(p.name for p in points))
    heights = [max(2.0, LINE * len(mine) + 0.3) for mine in groups.values()]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, sum(heights) + 0.5 * len(groups) + 0.5), layout="constrained")
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for (group, mine), height, axes in zip(groups.items(), heights, panels, strict=True):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            for point in mine:
                color = COLORS[names.index(point.name) % len(COLORS)]
                axes.scatter([point.x], [point.y], s=36, color=color, marker=_mark(names.index(point.name)))
            axes.set_title(group, loc="left", fontsize=11)
            axes.set_ylabel(y_label)
            axes.grid(visible=True)
            if y_range is not None:
                margin = 0.04 * (y_range[1] - y_range[0])
                axes.set_ylim(y_range[0] - margin, y_range[1] + margin)
            _name(axes, mine, names, LINE / height)
        panels[-1].set_xlabel(x_label)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _mark(index: int) -> str:
    """A mark for each round of the colours."""
    return "osD^v"[index // len(COLORS) % 5]


def _name(axes: Axes, points: Sequence[Point], names: Sequence[str], line: float) -> None:
    """Names in a column at the right, each as near to the height of its point as those above leave room.

    Args:
        axes: with all points in it.
        points: of this panel.
        names: of all panels, for the colours.
        line: height of a name, as a share of the panel's.
    """
    low, high = axes.get_ylim()
    # Of equal heights the rightmost first: then no line crosses another.
    ordered = sorted(points, key=lambda p: (-p.y, -p.x))
    wanted = [(p.y - low) / (high - low) for p in ordered]
    slots: list[float] = []
    for index, height in enumerate(wanted):
        highest = slots[-1] - line if slots else 1.0
        lowest = line * (len(wanted) - 1 - index)
        slots.append(max(min(height, highest), min(lowest, highest)))
    for point, slot in zip(ordered, slots, strict=True):
        axes.annotate(
            point.name,
            (point.x, point.y),
            (1.1, slot),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=COLORS[names.index(point.name) % len(COLORS)],
            arrowprops=LEADER,
        )
