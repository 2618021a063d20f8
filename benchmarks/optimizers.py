"""Time of a step and bytes of state of the optimizers, against `torch.optim`'s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer, _muon

from benchmarks.report import Report, Verdict
from benchmarks.timing import Subject, interleave, speed_ratio
from nestling.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    FeatureMomentum,
    GeneralizedGradientDescent,
    PreconditionedMomentum,
)
from nestling.optim.preconditioners import NewtonSchulz

CYCLE = 8  # steps that are timed together, M3's default cycle, so that its slow Newton-Schulz is in every measurement
# Matrices of a transformer of width 256 with MLPs of 688; 13 layers are 10.3M parameters.
LAYER = ((256, 256),) * 4 + ((688, 256),) * 2 + ((256, 688),)
LAYERS = 13
M3_GOAL, DELTA_GOAL = 1.3, 2.0
MUON, SGD_MOMENTUM = "torch.optim.Muon, iteration in float32", "torch.optim.SGD, momentum"
OURS_M3, OURS_DELTA = "M3", "DeltaMomentum"
Entry = tuple[Subject, Optimizer]
COLUMNS = ["one step", "parameters", "ms", "ratio", "bytes of state per parameter"]


class Float32Muon(Muon):
    """`torch.optim.Muon` with its iteration in float32.

    torch iterates in bfloat16, which CPUs without bfloat16 products emulate at a fiftieth of the speed: a
    ratio over that would flatter everything else.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As torch's."""
        theirs = _muon._zeropower_via_newtonschulz
        _muon._zeropower_via_newtonschulz = _float32_iteration
        try:
            return super().step(closure)
        finally:
            _muon._zeropower_via_newtonschulz = theirs


def _float32_iteration(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """torch's own lines without the cast."""
    a, b, c = coefficients
    x = grad.mT if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if grad.size(0) > grad.size(1) else x


def optimizers(rounds: int, quick: bool) -> list[Report]:
    """Matrix steps against Muon's, elementwise steps against SGD's, and the rules that need layer inputs."""
    layers = 1 if quick else LAYERS
    plain = [
        (SGD_MOMENTUM, lambda p: SGD(p, 1e-3, momentum=0.9)),
        ("torch.optim.AdamW", lambda p: AdamW(p, 1e-3)),
        (OURS_DELTA, lambda p: DeltaMomentum(p, 1e-3)),
        ("PreconditionedMomentum", lambda p: PreconditionedMomentum(p, 1e-3)),
        ("DeepMomentum", lambda p: DeepMomentum(p, 1e-3)),
        ("FeatureMomentum", lambda p: FeatureMomentum(p, 1e-3)),
        ('DeltaMomentum, keys="matrix"', lambda p: DeltaMomentum(p, 1e-3, keys="matrix")),
    ]
    output = NewtonSchulz(adjust="original")
    matrix = [
        (MUON, lambda p: Float32Muon(p, 1e-3)),
        ("PreconditionedMomentum, Newton-Schulz", lambda p: PreconditionedMomentum(p, 1e-3, output=output)),
        (OURS_M3, lambda p: M3(p, 1e-3)),
    ]
    reports = []
    for title, makes, name, goal in (
        ("Steps of a gradient's cost", plain, OURS_DELTA, DELTA_GOAL),
        ("Orthogonal steps", matrix, OURS_M3, M3_GOAL),
    ):
        report = Report(f"{title}: matrices of {layers} transformer layers of width 256, float32", COLUMNS)
        _compare(report, [_cycle(n, make, layers) for n, make in makes], rounds, None if quick else (name, goal))
        reports.append(report)
    reports[0].notes.append("ratio: time over the first row's, median (lowest to highest) of the rounds")
    reports[1].notes.append(
        f"{CYCLE} steps are timed together, one cycle of M3; torch iterates in bfloat16, the first row in float32"
    )
    reports.append(_with_inputs(rounds))
    return reports


def _with_inputs(rounds: int) -> Report:
    """Forward, backward and step, since these rules also work in the backward pass."""
    report = Report("Rules on layer inputs: forward, backward and step, MLP 512-1376-512, 1,024 tokens", COLUMNS)
    subjects = []
    for name, make in (
        ("torch.optim.SGD", lambda m: SGD(m.parameters(), 1e-3)),
        ("DeltaGradientDescent", lambda m: DeltaGradientDescent(m.parameters(), 1e-3, model=m)),
        ('DeltaGradientDescent, solver="step"', _step_solver),
        ("GeneralizedGradientDescent", lambda m: GeneralizedGradientDescent(m.parameters(), 1e-3, model=m)),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 1376), nn.SiLU(), nn.Linear(1376, 512))
        subjects.append(_training(name, model, make(model)))
    _compare(report, subjects, rounds, None)
    report.notes.append("between backward and step they hold one in x in matrix, or in + out numbers a token, a layer")
    return report


def _step_solver(model: nn.Module) -> Optimizer:
    return DeltaGradientDescent(model.parameters(), 1e-3, model=model, solver="step")


def _training(name: str, model: nn.Module, optimizer: Optimizer) -> Entry:
    x = torch.randn(1024, 512)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return Subject(name, step, tokens=1), optimizer


def _cycle(name: str, make: Callable[[list[nn.Parameter]], Optimizer], layers: int) -> Entry:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape) * 0.02) for shape in LAYER * layers]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = make(parameters)

    def steps() -> None:
        for _ in range(CYCLE):
            optimizer.step()

    return Subject(name, steps, tokens=CYCLE), optimizer


def _compare(report: Report, entries: list[Entry], rounds: int, goal: tuple[str, float] | None) -> None:
    """Rows of all, as multiples of the first one's time; a step is the subjects' unit."""
    timings = interleave([subject for subject, _ in entries], rounds)
    for timing, (subject, optimizer) in zip(timings, entries, strict=True):
        count, size = _state_size(optimizer)
        ratio = speed_ratio(timings[0], timing)
        shown = "1" if timing is timings[0] else str(ratio)
        milliseconds = 1e3 * timing.median / subject.tokens
        report.rows.append([subject.name, f"{count / 1e6:.1f}M", f"{milliseconds:,.1f}", shown, f"{size / count:.2f}"])
        if goal is not None and subject.name == goal[0]:
            what = f"time of {subject.name}'s step over {timings[0].subject.name}'s"
            report.verdicts.append(Verdict(what, ratio.median, goal[1], at_least=False))


def _state_size(optimizer: Optimizer) -> tuple[int, int]:
    """Parameters, and bytes of their state."""
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return count, sum(v.numel() * v.element_size() for v in tensors if v.dim())
