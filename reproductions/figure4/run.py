"""The valley of NL Eq. 53 under momentum and delta momentum (NL Figure 4), over a grid of what the paper leaves out.

psi(r, theta) = r^2 + k (r - theta + alpha sin(omega r))^2 from (-3.5, 2), whose minimum is (0, 0). The paper gives
neither k, alpha and omega nor the rates. Every function of a grid is minimised by every method with every setting of
the method's grid, in float64. Steps to convergence: after how many steps the point stays within 0.01 of the minimum.
Each method is judged at its best setting for the function, at the one setting that is best for all functions, and
beside momentum at equal settings. Takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.optim import DeltaMomentum
from reproductions.figure4.plot import ratio_chart, valley_chart
from reproductions.harness.command import Reproduction
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows

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


def sweep(method: Method, constants: Tensor, steps: int) -> Tensor:
    """Steps to convergence of a method, `[rates x momenta, functions]`."""
    return torch.stack([steps_to_stay(descend(method, lr, b, constants, steps)) for lr in RATES for b in MOMENTA])


def summary(found: Tensor, base: Tensor, constants: Tensor) -> Row:
    """A method beside momentum, each at its best setting for the function and at one setting for all functions."""
    best, one = found.amin(0), found[_for_all(found)]
    ratio = best / base.amin(0)
    both = ratio.isfinite() & (ratio > 0)  # solved by both
    either = (found.isfinite() | base.isfinite()).sum()
    return {
        "converged": int(best.isfinite().sum()),
        "converged_one_setting": int(one.isfinite().sum()),
        "one_setting": _setting(_for_all(found)),
        "median_steps": _finite(best.median()),
        "ahead": float((found < base).sum() / either),
        "behind": float((found > base).sum() / either),
        "median_ratio": _finite(ratio[both].median()) if both.any() else None,
        "faster_by_tenth": int((ratio[both] < 0.9).sum()),
        "slower_by_tenth": int((ratio[both] > 1.1).sum()),
        "settings_that_converge": float(found.isfinite().double().mean()),
        "best": [_best(c, found[:, i]) for i, c in enumerate(constants.tolist())],
    }


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every method, beside momentum."""
    constants = functions()
    base: Tensor | None = None
    for method in METHODS:
        key = {"method": method.name, "limit": args.steps, "near": NEAR}
        if rows.find(key) is not None:
            continue
        if base is None:
            base = sweep(METHODS[0], constants, args.steps)
        found = base if method is METHODS[0] else sweep(method, constants, args.steps)
        rows.get(key, lambda f=found, b=base: summary(f, b, constants))
        print(f"{method.name}: done", flush=True)


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Eight steps."""
    args.steps = 8
    run(args, rows)


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


def _best(constants: Sequence[float], steps: Tensor) -> Row:
    """A function with steps and setting of the best run on it, steps None if no setting converges."""
    found = float(steps.min())
    name = dict(zip(("k", "alpha", "omega"), constants, strict=True))
    return name | ({"steps": found} | _setting(int(steps.argmin())) if math.isfinite(found) else {"steps": None})


def report(rows: Sequence[Row]) -> Report:
    """The table, two valleys with the ways of both methods at their best settings, and the ratios over the grid."""
    own = {row["method"]: row for row in rows}
    if not own:
        return Report({"results": EMPTY})
    head = [f"functions of {len(functions())} solved (one setting for all)", "median steps"]
    head += ["steps over momentum's, median", "10% faster / slower", "settings that converge"]
    head += ["ahead / behind of momentum at equal lr and momentum"]
    text = table(["method", *head], [_line(name, row) for name, row in own.items()])
    if not all(name in own for name in (METHODS[0].name, COMPARED)):
        return Report({"results": text})
    base, other = ([_steps(f) for f in own[name]["best"]] for name in (METHODS[0].name, COMPARED))
    ratio = torch.tensor([o / b if b and o / b else math.nan for o, b in zip(other, base, strict=True)]).double()
    pictures = {"ratios.svg": lambda: ratio_chart(functions(), ratio)}
    both = [f for name in (METHODS[0].name, COMPARED) for f in own[name]["best"]]
    if all(f["steps"] is not None for f in both if (f["k"], f["alpha"], f["omega"]) in SHOWN):
        pictures["valley.svg"] = lambda: valley_chart([(shown, _ways(own, shown)) for shown in SHOWN])
    text += "\n\n![ways in two valleys](valley.svg)\n\n![ratio over the grid](ratios.svg)"
    return Report({"results": text}, pictures)


def _steps(function: Row) -> float:
    return math.inf if function["steps"] is None else float(function["steps"])


def _line(name: str, row: Row) -> list[str]:
    return [
        name,
        f"{row['converged']} ({row['converged_one_setting']})",
        _shown(row["median_steps"], 0),
        _shown(row["median_ratio"], 2),
        f"{row['faster_by_tenth']} / {row['slower_by_tenth']}",
        f"{row['settings_that_converge']:.0%}",
        f"{row['ahead']:.0%} / {row['behind']:.0%}",
    ]


def _ways(rows: dict[str, Row], shown: tuple[float, float, float]) -> dict[str, Tensor]:
    """The points of momentum's and the compared method's best runs on a function, by label."""
    ways = {}
    for method in METHODS:
        if method.name not in (METHODS[0].name, COMPARED):
            continue
        best = next(f for f in rows[method.name]["best"] if (f["k"], f["alpha"], f["omega"]) == shown)
        if best["steps"] is None:
            continue
        constants, steps = torch.tensor([shown], dtype=torch.float64), int(best["steps"])
        way = descend(method, best["lr"], best["momentum"], constants, max(1, steps))[:, 0]
        label = f"{method.name}: {steps} steps (lr {best['lr']:.2g}, {best['momentum']:g})"
        ways[label] = way[: steps + 1]
    return ways


def arguments(parser: argparse.ArgumentParser) -> None:
    """The limit."""
    parser.add_argument("--steps", type=int, default=2000, help="at most")


REPRODUCTION = Reproduction(run, report, quick, arguments)
