"""Tasks with orthogonal gradients, one after another (NL section 4.3, Eq. 45): what each optimizer forgets.

    python -m reproductions orthogonal_tasks [--quick]

Linear regression in 32 dimensions. Task i draws its inputs from a 4-dimensional subspace of its own, orthogonal to the
others', so its gradient lives there and one matrix solves all eight tasks. They are trained in sequence, 100 steps
each. `overlap` adds that much isotropic noise to the inputs, so that the subspaces are no longer orthogonal; with
`conflict` the eight share 16 dimensions, two directions each with the next, and their targets disagree there.

Learning rate and momentum of every optimizer are those with the lowest mean loss over all tasks at the end, on two
validation seeds; a rate at an end of the grid makes the grid longer. The figures are of five other seeds. With
orthogonal tasks the same is done at each momentum by itself. Losses are divided by the loss of zero weights. Writes
results.json, table.md and forgetting.svg beside this file, and skips what is in results.json already; takes about
forty minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.optim import M3, DeepMomentum, DeltaMomentum, PreconditionedMomentum
from nestling.optim.preconditioners import NewtonSchulz
from nestling.plotting.curves import Series, line_chart

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
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
    grid: dict[tuple[float, float], float] = {}
    rates = list(RATES)
    for _ in range(1 + EXTENSIONS):
        for lr, b in itertools.product(rates, momenta):
            if (lr, b) not in grid:
                grid[lr, b] = statistics.mean(final(train(make, lr, b, setting, s)) for s in VALIDATION_SEEDS)
        best = min(grid, key=grid.__getitem__)
        if best[0] == rates[0]:
            rates.insert(0, rates[0] / math.sqrt(10))
        elif best[0] == rates[-1]:
            rates.append(rates[-1] * math.sqrt(10))
        else:
            return *best, False
    return *best, True


def run(name: str, setting: Setting, momenta: Sequence[float] = MOMENTA) -> dict[str, Any]:
    """Tune on the validation seeds, then measure."""
    make = OPTIMIZERS[name]
    lr, b, edge = tuned(make, setting, momenta)
    runs = [train(make, lr, b, setting, s) for s in SEEDS]
    each = [measures(r) for r in runs]
    row = {"optimizer": name, "setting": setting.name, "momenta": list(momenta), "lr": lr, "momentum": b, "edge": edge}
    for key in each[0]:
        row |= {key: statistics.mean(m[key] for m in each), f"{key}_spread": statistics.stdev(m[key] for m in each)}
    row["first_task"] = [statistics.mean(r[t][0] for r in runs) for t in range(TASKS + 1)]
    print(f"{setting.name:12} {name:18} lr {lr:.4g} momentum {b}: {each[0]}", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in units of 0.001 of the loss of zero weights."""
    lines = [
        "| tasks | optimizer | lr, momentum | loss after its task | loss of all at the end | forgotten |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        cells = [f"{1e3 * r[k]:.2f} ± {1e3 * r[f'{k}_spread']:.2f}" for k in ("learned", "final", "forgotten")]
        edge = " (edge of the grid)" if r["edge"] else ""
        lines.append(
            f"| {r['setting']} | {r['optimizer']} | {r['lr']:.2g}, {r['momentum']:g}{edge} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """All optimizers on all settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        print(measures(train(OPTIMIZERS["delta momentum"], 0.1, 0.9, SETTINGS[0], 0)))
        return
    found = {_key(r): r for r in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    wanted = [(name, s, MOMENTA) for s in SETTINGS for name in OPTIMIZERS]
    wanted += [(name, SETTINGS[0], (b,)) for name in OPTIMIZERS for b in MOMENTA]
    for name, setting, momenta in wanted:
        key = setting.name, name, momenta
        if key not in found:
            found[key] = run(name, setting, momenta)
            RESULTS.write_text(json.dumps(list(found.values()), indent=1) + "\n")
    ordered = [found[s.name, name, momenta] for name, s, momenta in wanted]
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    rows = [r for r in ordered if len(r["momenta"]) > 1]
    single = [r for r in ordered if len(r["momenta"]) == 1]
    text = f"{table(rows)}\nOrthogonal tasks, the rate tuned at each momentum:\n\n{table(single)}"
    (HERE / "table.md").write_text(text)
    shown = [r for r in rows if r["setting"] == SETTINGS[0].name]
    series = [Series(r["optimizer"], range(TASKS + 1), r["first_task"], i, dashed=i >= 6) for i, r in enumerate(shown)]
    chart = line_chart(series, x_label="tasks trained", y_label="loss of the first task")
    (HERE / "forgetting.svg").write_text(chart)
    print(text)


def _key(row: dict[str, Any]) -> tuple[str, str, tuple[float, ...]]:
    return row["setting"], row["optimizer"], tuple(row["momenta"])


if __name__ == "__main__":
    main()
