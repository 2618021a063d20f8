"""Line charts as SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# The palette of Okabe and Ito, told apart with any kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE: Any = {  # matplotlib types the keys as a literal of all its settings
    "font.family": "sans-serif",
    "font.size": 11,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be selected
    "svg.hashsalt": "nestling",  # equal data give equal files
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3c4149",
    "xtick.color": "#5c626b",
    "ytick.color": "#5c626b",
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: as the legend shows it.
        x, y: points, in drawing order.
        color: index into `COLORS`.
        dashed: for a line that is a reference to the others.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dashed: bool = False


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, width: float = 7.6, height: float = 3.6) -> str:
    """A chart of several lines with a legend, as an SVG document.

    Args:
        series: the lines; at least one.
        x_label: with the unit.
        y_label: with the unit.
        width: inches at 72 points.
        height: likewise.

    Raises:
        ValueError: no series, or one whose x and y differ in length.
    """
    if not series:
        raise ValueError("a chart needs at least one series")
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for line in series:
            if len(line.x) != len(line.y):
                raise ValueError(f"series {line.label!r} has {len(line.x)} x values and {len(line.y)} y values")
            axes.plot(
                line.x,
                line.y,
                label=line.label,
                color=COLORS[line.color % len(COLORS)],
                linestyle="--" if line.dashed else "-",
                linewidth=1.4 if line.dashed else 2.0,
            )
        axes.grid(visible=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # they are written as whole numbers
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(series) > 1:
            figure.legend(frameon=False, fontsize=10, loc="outside upper left", ncols=2)  # never over a line
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
