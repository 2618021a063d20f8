"""Pictures of the valley."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from nestling.plotting.curves import COLORS, STYLE


def valley_chart(panels: list[tuple[tuple[float, float, float], dict[str, Tensor]]]) -> str:
    """Contours of psi and the ways of the optimizers, a panel for every function, SVG."""
    r, theta = np.meshgrid(np.linspace(-5, 5, 100), np.linspace(-6, 6, 100))
    with rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.8), layout="constrained")
        for axes, ((k, alpha, omega), ways) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            psi = r**2 + k * (r - theta + alpha * np.sin(omega * r)) ** 2
            levels = np.geomspace(0.02, psi.max(), 14)
            axes.contourf(r, theta, psi + 1e-3, levels=levels, norm=LogNorm(), cmap="Greys_r", alpha=0.55)
            for color, (name, way) in zip(COLORS, ways.items(), strict=False):
                axes.plot(*way.T.numpy(), color=color, marker="o", markersize=2.5, linewidth=1.0, label=name)
            axes.plot(0, 0, marker="*", color="black", markersize=12, linestyle="none")
            axes.set(xlabel="r", ylabel="theta", xlim=(-5, 5), ylim=(-6, 6))
            axes.set_title(f"k = {k:g}, alpha = {alpha:g}, omega = {omega:g}", fontsize=11)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, fontsize=9)
        return _svg(figure)


def ratio_chart(constants: Tensor, ratio: Tensor) -> str:
    """Steps of delta momentum over momentum's for every function of the grid, SVG."""
    stiff, amplitudes, frequencies = (sorted(set(constants[:, i].tolist())) for i in range(3))
    columns = [(a, w) for a in amplitudes for w in frequencies if a > 0 or w == frequencies[0]]
    grid = torch.full((len(stiff), len(columns)), math.nan, dtype=torch.float64)
    for (k, a, w), value in zip(constants.tolist(), ratio.tolist(), strict=True):
        grid[stiff.index(k), columns.index((a, w))] = value
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        shown = np.ma.masked_invalid(np.log2(grid.numpy()))
        axes.imshow(
            shown,
            cmap=colormaps["RdBu_r"].with_extremes(bad="#dddddd"),
            norm=TwoSlopeNorm(0.0, -1.5, 1.5),
            aspect="auto",
        )
        for (i, j), value in np.ndenumerate(grid.numpy()):
            text = f"{value:.2f}" if math.isfinite(value) else "-"
            dark = math.isfinite(value) and abs(math.log2(value)) > 1
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axes.set_yticks(range(len(stiff)), [f"k = {k:g}" for k in stiff])
        axes.set_xticks(range(len(columns)), [f"{a:g}\n{w:g}" for a, w in columns])
        axes.set_xlabel("amplitude alpha (above) and frequency omega (below)")
        axes.set_title(
            "steps of bounded delta momentum over momentum's, each at its best setting (blue: fewer)", fontsize=11
        )
        return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
