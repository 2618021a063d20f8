"""The valley of NL Eq. 53 under momentum and delta momentum (NL Figure 4), over a grid of what the paper leaves out.

    python -m reproductions figure4 [--quick]

psi(r, theta) = r^2 + k (r - theta + alpha sin(omega r))^2 from (-3.5, 2), whose minimum is (0, 0). The paper gives
neither k, alpha and omega nor the rates. Every function of a grid is minimised by every method with every setting of
the method's grid, in float64. Steps to convergence: after how many steps the point stays within 0.01 of the minimum.
Each method is judged at its best setting for the function, at the one setting that is best for all functions, and
beside momentum at equal settings. Writes results.json, table.md, valley.svg and ratios.svg beside this file; takes
about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.optim import DeltaMomentum
from reproductions.figure4.plot import ratio_chart, valley_chart

HERE = Path(__file__).parent
START = (-3.5, 2.0)
NEAR = 1e-2
STIFFNESS, AMPLITUDE, FREQUENCY = (1.0, 3.0, 10.0, 30.0, 100.0), (0.0, 0.5, 1.0, 2.0), (1.0, 2.0, 4.0, 8.0)
RATES = tuple(10 ** (-4 + i / 4) for i in range(15))
MOMENTA = (0.5, 0.8, 0.9, 0.95, 0.99)
SHOWN = ((3.0, 1.0, 4.0), (30.0, 1.0, 1.0))
COMPARED = "bounded"


@dataclass(frozen=True)
class Method:
    """A row of the table: the optimizer and how much of the delta rule it has."""

    name: str
    make: Callable[[Tensor, float, float], torch.optim.Optimizer]


def _delta(scale: str, delta: float) -> Callable[[Tensor, float, float], torch.optim.Optimizer]:
    return lambda p, lr, beta: DeltaMomentum([p], lr, beta, delta, scale=scale, on_nonfinite="skip")


METHODS = (
    Method("momentum", lambda p, lr, beta: torch.optim.SGD([p], lr, beta)),
    Method("normalised", _delta("nlms", 1.0)),
    Method("normalised, delta 0.5", _delta("nlms", 0.5)),
    Method("normalised, delta 0.1", _delta("nlms", 0.1)),
    Method("bounded", _delta("bounded", 1.0)),
    Method("Eq. 49 to the letter", _delta("literal", 1.0)),
)


def functions() -> Tensor:
    """`[functions, 3]`: k, alpha, omega. Without amplitude the frequency means nothing and is listed once."""
    rows = [(k, a, w) for k, a, w in itertools.product(STIFFNESS, AMPLITUDE, FREQUENCY) if a > 0 or w == FREQUENCY[0]]
    return torch.tensor(rows, dtype=torch.float64)


def gradient(points: Tensor, constants: Tensor) -> Tensor:
    """d psi / d (r, theta), `[functions, 2]`."""
    (r, theta), (k, alpha, omega) = points.unbind(-1), constants.unbind(-1)
    gap = 2 * k * (r - theta + alpha * torch.sin(omega * r))
    return torch.stack((2 * r + gap * (1 + alpha * omega * torch.cos(omega * r)), -gap), -1)


def descend(method: Method, rate: float, momentum: float, constants: Tensor, steps: int) -> Tensor:
    """All points of the way, `[steps + 1, functions, 2]`; every function is a row of one parameter.

    A row that leaves the plane is held where it left: it has diverged.
    """
    points = torch.tensor(START, dtype=torch.float64).repeat(len(constants), 1).requires_grad_()
    optimizer = method.make(points, rate, momentum)
    way = [points.detach().clone()]
    for _ in range(steps):
        lost = ~(way[-1].abs().amax(-1) < 1e6)
        if lost.all():
            return torch.stack(way + way[-1:] * (steps + 1 - len(way)))
        points.grad = gradient(points.detach(), constants).masked_fill(lost[:, None], 0.0)
        optimizer.step()
        way.append(torch.where(lost[:, None], math.inf, points.detach().nan_to_num(math.inf)))
    return torch.stack(way)


def steps_to_stay(way: Tensor) -> Tensor:
    """The first step from which on a point stays near the minimum, or infinity, `[functions]`."""
    away = ~(way.norm(dim=-1) < NEAR)
    last = torch.where(away.any(0), len(way) - away.flip(0).float().argmax(0), 0)
    return torch.where(last < len(way), last.double(), math.inf)


def sweep(constants: Tensor, steps: int) -> dict[str, Tensor]:
    """Steps to convergence of every method, `[rates, momenta, functions]`."""
    found = {}
    for method in METHODS:
        runs = [steps_to_stay(descend(method, lr, b, constants, steps)) for lr in RATES for b in MOMENTA]
        found[method.name] = torch.stack(runs).view(len(RATES), len(MOMENTA), -1)
        print(f"{method.name}: done", flush=True)
    return found


def summary(steps: dict[str, Tensor]) -> dict[str, Any]:
    """Ratios to momentum, each at its best setting for the function and at one setting for all functions."""
    base = steps["momentum"].flatten(0, 1)
    rows = {}
    for name, found in steps.items():
        flat = found.flatten(0, 1)
        best, one = flat.amin(0), flat[_for_all(flat)]
        ratio = best / base.amin(0)
        both = ratio.isfinite() & (ratio > 0)  # solved by both
        rows[name] = {
            "converged": int(best.isfinite().sum()),
            "converged_one_setting": int(one.isfinite().sum()),
            "one_setting": _setting(_for_all(flat)),
            "median_steps": _finite(best.median()),
            "ahead": float((flat < base).sum() / (flat.isfinite() | base.isfinite()).sum()),
            "behind": float((flat > base).sum() / (flat.isfinite() | base.isfinite()).sum()),
            "median_ratio": _finite(ratio[both].median()),
            "faster_by_tenth": int((ratio[both] < 0.9).sum()),
            "slower_by_tenth": int((ratio[both] > 1.1).sum()),
            "settings_that_converge": float(flat.isfinite().double().mean()),
        }
    return rows


def _for_all(flat: Tensor) -> int:
    """The setting with the most functions converged, then with the lowest median."""
    count = flat.isfinite().sum(-1)
    return int((count - flat.nan_to_num(posinf=1e9).median(-1).values / 1e10).argmax())


def _setting(index: int) -> dict[str, float]:
    return {"lr": RATES[index // len(MOMENTA)], "momentum": MOMENTA[index % len(MOMENTA)]}


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _shown(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _best(flat: Tensor) -> dict[str, float] | None:
    """Steps and setting of the best run on one function, or None if no setting converges."""
    steps = float(flat.min())
    return {"steps": steps} | _setting(int(flat.argmin())) if math.isfinite(steps) else None


def table(rows: dict[str, Any], count: int) -> str:
    """Markdown."""
    lines = [
        f"| method | functions of {count} solved (one setting for all) | median steps | steps over momentum's, median "
        "| 10% faster / slower | settings that converge | ahead / behind of momentum at equal lr and momentum |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {r['converged']} ({r['converged_one_setting']}) | {_shown(r['median_steps'], 0)} | "
            f"{_shown(r['median_ratio'], 2)} | {r['faster_by_tenth']} / {r['slower_by_tenth']} | "
            f"{r['settings_that_converge']:.0%} | {r['ahead']:.0%} / {r['behind']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def picture(constants: Tensor, steps: dict[str, Tensor], count: int) -> None:
    """Two valleys with the ways of both methods at their best settings, and the ratios over the grid."""
    panels = []
    for shown in SHOWN:
        index = constants.tolist().index(list(shown))
        ways = {}
        for method in METHODS:
            if method.name not in (METHODS[0].name, COMPARED):
                continue
            flat = steps[method.name].flatten(0, 1)[:, index]
            setting = _setting(int(flat.argmin()))
            way = descend(method, setting["lr"], setting["momentum"], constants[index : index + 1], count)[:, 0]
            label = f"{method.name}: {flat.min():.0f} steps (lr {setting['lr']:.2g}, {setting['momentum']:g})"
            ways[label] = way[: int(min(flat.min(), count)) + 1]
        panels.append((shown, ways))
    (HERE / "valley.svg").write_text(valley_chart(panels))
    ratio = steps[COMPARED].flatten(0, 1).amin(0) / steps[METHODS[0].name].flatten(0, 1).amin(0)
    (HERE / "ratios.svg").write_text(ratio_chart(constants, ratio.masked_fill(ratio == 0, math.nan)))


def main() -> None:
    """Sweep, table, pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="20 steps, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    count = 20 if args.quick else args.steps
    constants = functions()
    steps = sweep(constants, count)
    rows = summary(steps)
    print(table(rows, len(constants)))
    if args.quick:
        return
    record = {"steps": count, "near": NEAR, "rates": RATES, "momenta": MOMENTA, "methods": rows}
    picture(constants, steps, count)
    record["functions"] = [
        dict(zip(("k", "alpha", "omega"), c, strict=True)) | {n: _best(s.flatten(0, 1)[:, i]) for n, s in steps.items()}
        for i, c in enumerate(constants.tolist())
    ]
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "table.md").write_text(table(rows, len(constants)))


if __name__ == "__main__":
    main()
