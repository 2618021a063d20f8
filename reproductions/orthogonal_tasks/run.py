"""Tasks with orthogonal gradients, one after another (NL section 4.3, Eq. 45): what each optimizer forgets.

Linear regression in 32 dimensions. Task i draws its inputs from a 4-dimensional subspace of its own, orthogonal to the
others', so its gradient lives there and one matrix solves all eight tasks. They are trained in sequence, 100 steps
each. `overlap` adds that much isotropic noise to the inputs, so that the subspaces are no longer orthogonal; with
`conflict` the eight share 16 dimensions, two directions each with the next, and their targets disagree there.

Learning rate and momentum of every optimizer are those with the lowest mean loss over all tasks at the end, on two
validation seeds; a rate at an end of the grid makes the grid longer. The figures are of five other seeds. With
orthogonal tasks the same is done at each momentum by itself. Losses are divided by the loss of zero weights. Takes
about forty minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.optim import M3, DeepMomentum, DeltaMomentum, PreconditionedMomentum
from nestling.optim.preconditioners import NewtonSchulz
from nestling.plotting.curves import Series, line_chart
from reproductions.harness.command import Reproduction
from reproductions.harness.grid import best_rate, grow_rate
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows

INPUTS, OUTPUTS, TASKS, RANK = 32, 8, 8, 4
STEPS, BATCH, NOISE, TEST = 100, 16, 0.05, 256
VALIDATION_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
RATES = tuple(10 ** (-3.5 + i / 2) for i in range(9))
EXTENSIONS = 4
MOMENTA = (0.5, 0.9, 0.99)

Make = Callable[[Tensor, float, float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD with momentum": lambda w, lr, b: torch.optim.SGD([w], lr, b),
    "Adam": lambda w, lr, b: torch.optim.Adam([w], lr, (b, 0.99)),
    "Muon": lambda w, lr, b: PreconditionedMomentum(
        [w], lr, b, output=NewtonSchulz(adjust="original", dtype=torch.float32), average=True, nesterov=True
    ),
    "Muon of torch.optim (bfloat16)": lambda w, lr, b: torch.optim.Muon([w], lr, weight_decay=0.0, momentum=b),
    "delta momentum": lambda w, lr, b: DeltaMomentum([w], lr, b),
    "delta momentum, delta 0.1": lambda w, lr, b: DeltaMomentum([w], lr, b, 0.1),
    "DMGD": lambda w, lr, b: DeepMomentum([w], lr, b),
    "M3": lambda w, lr, b: M3([w], lr, (b, 0.95, b)),
    "M3 without slow momentum": lambda w, lr, b: M3([w], lr, (b, 0.95, b), 0.0),
    "M3 without second moment": lambda w, lr, b: M3([w], lr, (b, 0.95, b), second_moment=False),
}


@dataclass(frozen=True)
class Setting:
    """How the tasks' inputs lie to one another."""

    name: str
    overlap: float = 0.0
    conflict: bool = False


SETTINGS = (
    Setting("orthogonal"),
    Setting("overlap 0.1", 0.1),
    Setting("overlap 0.3", 0.3),
    Setting("conflict", 0, True),
)


@dataclass(frozen=True)
class Problem:
    """Bases `[tasks, inputs, rank]` and targets `[tasks, outputs, inputs]` of a seed."""

    bases: Tensor
    targets: Tensor
    overlap: float

    @classmethod
    def draw(cls, setting: Setting, generator: torch.Generator) -> Problem:
        """Random directions; one target for all tasks unless they conflict."""
        basis = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator)).Q
        stride = RANK // 2 if setting.conflict else RANK
        columns = [[(i * stride + j) % (TASKS * stride) for j in range(RANK)] for i in range(TASKS)]
        targets = torch.randn(TASKS if setting.conflict else 1, OUTPUTS, INPUTS, generator=generator)
        return cls(basis[:, columns].permute(1, 0, 2), targets.expand(TASKS, -1, -1), setting.overlap)

    def sample(self, task: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        x = torch.randn(rows, RANK, generator=generator) @ self.bases[task].T
        x = x + self.overlap * torch.randn(rows, INPUTS, generator=generator)
        return x, x @ self.targets[task].T + NOISE * torch.randn(rows, OUTPUTS, generator=generator)


def losses(weight: Tensor, tests: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Squared error of every task over that of zero weights."""
    return [float((x @ weight.T - y).square().mean() / y.square().mean()) for x, y in tests]


def train(make: Make, rate: float, momentum: float, setting: Setting, seed: int) -> list[list[float]]:
    """All tasks' losses at the start and after each task; infinite from where the weights are not finite."""
    generator = torch.Generator().manual_seed(seed)
    problem = Problem.draw(setting, generator)
    tests = [problem.sample(i, TEST, generator) for i in range(TASKS)]
    weight = torch.zeros(OUTPUTS, INPUTS, requires_grad=True)
    optimizer = make(weight, rate, momentum)
    found = [losses(weight.detach(), tests)]
    for task in range(TASKS):
        for _ in range(STEPS):
            x, y = problem.sample(task, BATCH, generator)
            gap = x @ weight.detach().T - y
            weight.grad = 2 * gap.T @ x / BATCH
            if not weight.grad.isfinite().all():
                return found + [[math.inf] * TASKS] * (TASKS - task)
            optimizer.step()
        found.append(losses(weight.detach(), tests))
    return found


def final(found: list[list[float]]) -> float:
    """Mean loss over all tasks at the end."""
    value = statistics.mean(found[-1])
    return value if math.isfinite(value) else math.inf


def measures(found: list[list[float]]) -> dict[str, float]:
    """Loss of a task right after it, of all at the end, and the rise between (all tasks but the last)."""
    after = [found[i + 1][i] for i in range(TASKS)]
    return {
        "learned": statistics.mean(after),
        "final": final(found),
        "forgotten": statistics.mean(found[-1][i] - after[i] for i in range(TASKS - 1)),
    }


def tuned(make: Make, setting: Setting, momenta: Sequence[float]) -> tuple[float, float, bool]:
    """Rate and momentum with the lowest loss on the validation seeds, and whether the rate is the grid's last."""
    losses: dict[tuple[float, float], float] = {}

    def at_best_momentum(rate: float) -> float:
        for b in momenta:
            losses[rate, b] = statistics.mean(final(train(make, rate, b, setting, s)) for s in VALIDATION_SEEDS)
        return min(losses[rate, b] for b in momenta)

    def beyond(name: str, rates: Sequence[float], up: bool) -> float | None:
        if len(rates) >= len(RATES) + EXTENSIONS:
            return None
        return rates[-1] * math.sqrt(10) if up else rates[0] / math.sqrt(10)

    grid = grow_rate(at_best_momentum, RATES, beyond)
    rate = best_rate(grid)
    return rate, min(momenta, key=lambda b: losses[rate, b]), rate in (min(grid), max(grid))


def measure(name: str, setting: Setting, momenta: Sequence[float]) -> Row:
    """Tune on the validation seeds, then measure."""
    make = OPTIMIZERS[name]
    lr, b, edge = tuned(make, setting, momenta)
    runs = [train(make, lr, b, setting, s) for s in SEEDS]
    each = [measures(r) for r in runs]
    row: Row = {"lr": lr, "momentum": b, "edge": edge}
    for key in each[0]:
        row |= {key: statistics.mean(m[key] for m in each), f"{key}_spread": statistics.stdev(m[key] for m in each)}
    row["first_task"] = [statistics.mean(r[t][0] for r in runs) for t in range(TASKS + 1)]
    print(f"{setting.name:12} {name:18} lr {lr:.4g} momentum {b}: {each[0]}", flush=True)
    return row


def run(args: argparse.Namespace, rows: Rows) -> None:
    """All optimizers on all settings, and on orthogonal tasks at each momentum."""
    wanted = [(name, setting, MOMENTA) for setting in SETTINGS for name in args.optimizers]
    wanted += [(name, SETTINGS[0], (b,)) for name in args.optimizers for b in MOMENTA]
    for name, setting, momenta in wanted:
        if setting.name in args.settings and (len(momenta) > 1 or not args.no_single):
            key = {"optimizer": name, "setting": setting.name, "momenta": list(momenta)}
            rows.get(key, lambda n=name, s=setting, m=momenta: measure(n, s, m))


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """One optimizer at one rate and seed."""
    found = train(OPTIMIZERS["delta momentum"], 0.1, 0.9, SETTINGS[0], 0)
    row = measures(found) | {f"{key}_spread": 0.0 for key in measures(found)}
    row |= {"lr": 0.1, "momentum": 0.9, "edge": True, "first_task": [losses[0] for losses in found]}
    rows.get({"optimizer": "delta momentum", "setting": SETTINGS[0].name, "momenta": list(MOMENTA)}, lambda: row)


def report(rows: Sequence[Row]) -> Report:
    """Orthogonal tasks with a picture; other tasks; orthogonal ones at each momentum."""
    order = {name: i for i, name in enumerate(OPTIMIZERS)}
    rows = sorted(rows, key=lambda r: order[r["optimizer"]])
    every = [r for r in rows if len(r["momenta"]) > 1]
    shown = [r for r in every if r["setting"] == SETTINGS[0].name]
    others = [r for setting in SETTINGS[1:] for r in every if r["setting"] == setting.name]
    single = [r for r in rows if len(r["momenta"]) == 1]
    parts = {"results": lines_of(shown), "other-tasks": lines_of(others), "each-momentum": lines_of(single)}
    if not shown:
        return Report(parts)
    parts["results"] += "\n\n![loss of the first task](forgetting.svg)"
    ordered = sorted(shown, key=lambda r: -r["first_task"][-1])
    series = [
        Series(r["optimizer"], range(TASKS + 1), r["first_task"], i, dashed=i >= 6)
        for r in ordered
        for i in [order[r["optimizer"]]]
    ]
    labels = {"x_label": "tasks trained", "y_label": "loss of the first task"}
    return Report(parts, {"forgetting.svg": lambda: line_chart(series, height=4.6, **labels)})


def lines_of(rows: Sequence[Row]) -> str:
    """A table, in units of 0.001 of the loss of zero weights."""
    if not rows:
        return EMPTY
    lines = []
    for r in rows:
        cells = [f"{1e3 * r[k]:.2f} ± {1e3 * r[f'{k}_spread']:.2f}" for k in ("learned", "final", "forgotten")]
        edge = " (edge of the grid)" if r["edge"] else ""
        lines.append([r["setting"], r["optimizer"], f"{r['lr']:.2g}, {r['momentum']:g}{edge}", *cells])
    head = ["tasks", "optimizer", "lr, momentum", "loss after its task", "loss of all at the end", "forgotten"]
    return table(head, lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows."""
    parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS), choices=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--settings", nargs="*", default=[s.name for s in SETTINGS], choices=[s.name for s in SETTINGS])
    parser.add_argument("--no-single", action="store_true", help="not at each momentum by itself")


REPRODUCTION = Reproduction(run, report, quick, arguments)
