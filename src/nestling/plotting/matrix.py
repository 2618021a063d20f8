"""A matrix of shares as a picture: what was asked against when."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nestling.plotting.curves import STYLE


def matrix_chart(panels: dict[str, Sequence[Sequence[float]]], *, x_label: str, y_label: str, columns: int = 3) -> str:
    """Matrices of numbers between 0 and 1 side by side, NaN left blank, as an SVG document.

    Args:
        panels: title and rows; the first row is drawn at the top.
        x_label: of the columns.
        y_label: of the rows.
        columns: panels beside one another at most.

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("a picture needs at least one matrix")
    across = min(columns, len(panels))
    down = math.ceil(len(panels) / across)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.9 * across + 0.9, 2.8 * down + 0.3), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for place, (title, rows) in zip(axes, panels.items(), strict=False):
            image = place.imshow(rows, vmin=0, vmax=1, cmap="cividis")
            place.set_title(title, loc="left", fontsize=10)
            place.set_xticks(range(len(rows[0])), range(1, len(rows[0]) + 1), fontsize=8)
            place.set_yticks(range(len(rows)), range(1, len(rows) + 1), fontsize=8)
            place.set_xlabel(x_label)
            place.set_ylabel(y_label)
            if len(rows) <= 10:
                _write_values(place, rows)
        for place in axes[len(panels) :]:
            place.set_visible(False)
        figure.colorbar(image, ax=axes.tolist(), shrink=0.7, label="accuracy")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _write_values(place: Axes, rows: Sequence[Sequence[float]]) -> None:
    """Percent, in the colour that can be read on it."""
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if not math.isnan(value):
                color = "black" if value > 0.5 else "white"
                place.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=color)
