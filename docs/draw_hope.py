"""Draw one block of Hope as a flow of data: its memories, how often each is updated, and what writes what.

    python docs/draw_hope.py

Bands are update periods, the fastest on top, as in the pictures of levels. Grey arrows carry the tokens; what is read
with is a query. Orange arrows write. The stream of tokens runs along the bottom; each part reads it and adds to it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from nestling.plotting.curves import COLORS, STYLE

HERE = Path(__file__).parent
INK, SOFT, FLOW = "#20242a", "#5c626b", "#7b828c"
MEMORY, WRITE, SLOW = COLORS[0], COLORS[1], "#8a8f98"
BANDS = ("#f4f6f9", "#eaeef4")
WIDTH, CLOCK, RIGHT = 15.4, 2.35, 15.2
# Top and height of every band, its words, and the periods of its wave.
ROWS = (
    (0.0, 1.75, "every token", 40),
    (-1.9, 1.75, "every 64 tokens", 14),
    (-3.8, 1.55, "every 128 tokens", 7),
    (-5.5, 1.55, "in training only", 0),
)
STREAM = -7.75


def hope_figure() -> Figure:
    """The picture, to be drawn under `plotting.curves.STYLE`."""
    figure = Figure(figsize=(WIDTH, 9.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(-8.75, 0.85)
    axes.set_axis_off()
    axes.text(0.15, 0.48, "One block of Hope", fontsize=17, fontweight="bold", color=INK, va="center")
    axes.text(4.55, 0.48, "self-modifying Titans", fontsize=13, color=SOFT, va="center")
    axes.text(10.3, 0.48, "continuum memory system", fontsize=13, color=SOFT, va="center")
    for i, (top, height, words, cycles) in enumerate(ROWS):
        _band(axes, top, height, words, cycles, BANDS[i % 2])
    axes.plot([9.95, 9.95], [0.75, STREAM - 0.35], color="white", lw=5, zorder=1)
    _stream(axes)
    _titans(axes)
    _continuum(axes)
    _legend(axes)
    return figure


def _titans(axes: Axes) -> None:
    """Projections, the four memories that make keys, values and rates, the memory that answers, and the gate."""
    _box(axes, 2.6, -5.85, 1.55, 0.95, SLOW, "projections", "short convolution")
    _flow(axes, [(3.1, STREAM), (3.1, -6.8)])
    for i, (what, name) in enumerate((("keys", "M_k"), ("values", "M_v"), ("rates", "M_η"), ("retention", "M_α"))):
        _box(axes, 4.55 + i * 1.07, -2.15, 0.97, 0.9, MEMORY, what, name)
    _flow(axes, [(4.15, -6.2), (6.63, -6.2), (6.63, -3.05)], "every token u", at=(5.35, -6.0))
    _flow(axes, [(3.1, -5.85), (3.1, -0.55), (6.65, -0.55)], "read with the query q", at=(4.85, -0.35))
    _box(axes, 6.65, -0.3, 2.05, 1.15, MEMORY, "memory M", "an MLP that learns", "while it reads")
    _write(
        axes,
        [(5.56, -2.15), (5.56, -1.15), (6.65, -1.15)],
        "write M(v) at the key k,\nat rates η and α",
        at=(4.4, -1.3),
    )
    _loop(axes, 8.76, -2.6, "")
    axes.text(6.75, -3.36, "each is written alike", fontsize=10.5, color=WRITE, va="center", zorder=5)
    _flow(axes, [(8.7, -0.85), (9.4, -0.85), (9.4, -5.85)], "answer M(q)", at=(9.22, -4.3), rotation=90)
    _box(axes, 8.3, -5.85, 1.5, 0.95, SLOW, "gate", "output projection")
    _flow(axes, [(9.4, -6.8), (9.4, STREAM + 0.16)])


def _continuum(axes: Axes) -> None:
    """A level in every band but the first."""
    places = ((10.3, -2.35, "level 1", MEMORY), (12.0, -4.15, "level 2", MEMORY), (13.7, -5.85, "level 3", SLOW))
    for x, top, name, color in places:
        _box(axes, x, top, 1.2, 0.95, color, name, "an MLP")
        _flow(axes, [(x + 0.3, STREAM), (x + 0.3, top - 0.95)])
        _flow(axes, [(x + 0.95, top - 0.95), (x + 0.95, STREAM + 0.16)])
    _loop(axes, 11.55, -2.85, "writes itself with\n64 tokens at once")
    _loop(axes, 13.25, -4.65, "writes itself with\n128 tokens at once")


def _stream(axes: Axes) -> None:
    """The residual stream along the bottom, with a plus where a part adds to it."""
    axes.plot([0.3, RIGHT - 0.25], [STREAM, STREAM], color=INK, lw=2.6, zorder=2, solid_capstyle="butt")
    _arrow(axes, (RIGHT - 0.3, STREAM), (RIGHT, STREAM), INK, 18)
    axes.text(0.3, STREAM + 0.3, "tokens in", fontsize=12, color=INK, va="center")
    axes.text(RIGHT, STREAM - 0.35, "to the next block", fontsize=12, color=INK, va="center", ha="right")
    for x in (9.4, 11.25, 12.95, 14.65):
        axes.add_patch(Circle((x, STREAM), 0.16, fc="white", ec=INK, lw=1.6, zorder=4))
        axes.text(x, STREAM - 0.012, "+", fontsize=14, color=INK, ha="center", va="center", zorder=5)


def _legend(axes: Axes) -> None:
    y, x = -8.45, 0.3
    for color, text in ((MEMORY, "memory: changes while it reads"), (SLOW, "weights: change in training")):
        axes.plot([x, x], [y - 0.13, y + 0.13], color=color, lw=4, solid_capstyle="round")
        axes.text(x + 0.15, y, text, fontsize=12, color=INK, va="center")
        x += 3.45
    for color, text in ((FLOW, "what flows"), (WRITE, "what writes")):
        _arrow(axes, (x, y), (x + 0.45, y), color, 14)
        axes.text(x + 0.55, y, text, fontsize=12, color=INK, va="center")
        x += 1.9


def _band(axes: Axes, top: float, height: float, words: str, cycles: int, color: str) -> None:
    shape = "round,pad=0,rounding_size=0.14"
    axes.add_patch(FancyBboxPatch((0, top - height), RIGHT, height, boxstyle=shape, fc=color, ec="none", zorder=0))
    middle = top - height / 2
    axes.text(0.2, middle + 0.45, "updated", fontsize=11, color=SOFT, va="center")
    axes.text(0.2, middle + 0.14, words, fontsize=12.5, fontweight="bold", color=INK, va="center")
    x = np.linspace(0.22, CLOCK - 0.35, 800)
    wave = np.sin(2 * np.pi * cycles * (x - x[0]) / (x[-1] - x[0]))
    axes.plot(x, middle - 0.33 + 0.17 * wave, color=INK, lw=0.8 if cycles > 30 else 1.3)


def _box(axes: Axes, left: float, top: float, width: float, height: float, color: str, *lines: str) -> None:
    shape = "round,pad=0,rounding_size=0.09"
    axes.add_patch(
        FancyBboxPatch((left, top - height), width, height, boxstyle=shape, fc="white", ec=color, lw=1.8, zorder=3)
    )
    step = height / (len(lines) + 0.6)
    for i, line in enumerate(lines):
        first = i == 0
        axes.text(
            left + width / 2,
            top - step * (i + 0.8),
            line,
            fontsize=(12 if width > 1 else 11) if first else 10.5,
            fontweight="bold" if first else "normal",
            color=color if first and color == MEMORY else INK if first else SOFT,
            ha="center",
            va="center",
            zorder=4,
        )


def _flow(
    axes: Axes,
    points: list[tuple[float, float]],
    text: str = "",
    at: tuple[float, float] = (0, 0),
    rotation: float = 0,
    color: str = FLOW,
) -> None:
    """An arrow along `points`, with words at a place."""
    x, y = zip(*points, strict=True)
    axes.plot(x[:-1], y[:-1], color=color, lw=1.7, zorder=2, solid_joinstyle="round")
    _arrow(axes, points[-2], points[-1], color, 15)
    if text:
        ink = color if color == WRITE else INK
        axes.text(*at, text, fontsize=11.5, color=ink, va="center", ha="center", rotation=rotation, zorder=5)


def _write(axes: Axes, points: list[tuple[float, float]], text: str, at: tuple[float, float]) -> None:
    _flow(axes, points, text, at, color=WRITE)


def _loop(axes: Axes, x: float, y: float, text: str) -> None:
    """A box writes itself: an arrow that leaves its right side and comes back."""
    loop = FancyArrowPatch(
        (x - 0.03, y + 0.28), (x - 0.03, y - 0.28), connectionstyle="arc3,rad=-1.25", shrinkA=0, shrinkB=0
    )
    loop.set(arrowstyle="-|>", mutation_scale=14, color=WRITE, linewidth=1.7, zorder=5)
    axes.add_patch(loop)
    axes.text(x + 0.45, y, text, fontsize=10.5, color=WRITE, va="center", zorder=5)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, size: float) -> None:
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=size, shrinkA=0, shrinkB=0)
    arrow.set(color=color, linewidth=1.7, zorder=3)
    axes.add_patch(arrow)


def main() -> None:
    """The picture."""
    with rc_context(STYLE):
        figure = hope_figure()
        figure.savefig(HERE / "pictures" / "hope.svg", format="svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
