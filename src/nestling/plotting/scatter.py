"""Scatter charts as SVG text: one panel a group, one mark a name."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure

from nestling.plotting.curves import COLORS, STYLE


@dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        name: of its mark, in the legend.
        group: the panel it belongs to.
        x, y: where; x above 0.
    """

    name: str
    group: str
    x: float
    y: float


def scatter_chart(points: Sequence[Point], *, x_label: str, y_label: str, width: float = 7.6) -> str:
    """Panels below one another, one a group, x on a logarithmic scale, as an SVG document.

    Args:
        points: at least one.
        x_label: with the unit.
        y_label: with the unit.
        width: inches at 72 points.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("a chart needs at least one point")
    groups = list(dict.fromkeys(p.group for p in points))
    names = list(dict.fromkeys(p.name for p in points))
    marks = "osD^v"
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 2.6 * len(groups) + 1.2), layout="constrained")
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
        for group, axes in zip(groups, panels, strict=True):
            for i, name in enumerate(names):
                mine = [p for p in points if (p.group, p.name) == (group, name)]
                axes.scatter(
                    [p.x for p in mine],
                    [p.y for p in mine],
                    s=42,
                    color=COLORS[i % len(COLORS)],
                    marker=marks[i // len(COLORS) % len(marks)],
                    label=name if axes is panels[0] else None,
                )
            axes.set_xscale("log")
            axes.set_title(group, loc="left", fontsize=11)
            axes.set_ylabel(y_label)
            axes.grid(visible=True)
        panels[-1].set_xlabel(x_label)
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=4)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
