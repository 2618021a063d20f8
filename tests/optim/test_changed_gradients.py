"""What is done to `.grad` between backward pass and step is what every optimizer steps with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Optimizer

from nestling.optim import DeltaGradientDescent, GeneralizedGradientDescent, MultiFrequency, OptimizerLevel
from nestling.optim.objectives import DOT, HUBER, L2
from tests.optim.models import Network, batch, loss_of
from tests.optim.subjects import SUBJECTS, Subject

everyone = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
Change = Callable[[list[Tensor]], object]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(found: nn.Module, wanted: nn.Module, tolerance: float = 1e-10) -> None:
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def times(factor: float) -> Change:
    """Every gradient, as clipping by the norm does."""
    return lambda parameters: [p.grad.mul_(factor) for p in parameters if p.grad is not None]


def factors() -> Iterator[float]:
    """Other ones at every step."""
    yield from (1.0, 0.03, 0.4, 1e-3, 0.2, 0.7)


def slow(subject: Subject, model: nn.Module, lr: float, period: int) -> MultiFrequency:
    """The subject at a period."""
    level = OptimizerLevel(model.parameters(), period)
    return MultiFrequency({"slow": level}, optimizer=lambda _: subject.make(model, lr), reduce="mean")


@everyone
@pytest.mark.parametrize("period", [1, 3])
def test_a_gradient_times_a_factor_is_that_of_the_loss_times_it(subject: Subject, period: int) -> None:
    """Whole steps, and of slow levels whose period's gradients have a factor each; two backward passes a step."""
    clipped, scaled = Network(), Network()
    optimizers = [slow(subject, model, 0.01, period) for model in (clipped, scaled)]
    for step, factor in enumerate(factors()):
        for optimizer, model, on_loss in zip(optimizers, (clipped, scaled), (1.0, factor), strict=True):
            optimizer.zero_grad()
            for half in (batch(2 * step), batch(2 * step + 1)):
                (0.5 * on_loss * loss_of(model, half)).backward()
            if model is clipped:
                times(factor)(list(model.parameters()))
            optimizer.step()
    same(clipped, scaled)


@everyone
def test_a_scaler_leaves_no_trace(subject: Subject) -> None:
    """Its factor is in what the layers' hooks see, and divided out of `.grad`; an overflow is skipped and forgotten."""
    plain, scaled = Network(torch.float32), Network(torch.float32)
    alone, under = subject.make(plain, 0.01), subject.make(scaled, 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        data = batch(step, dtype=torch.float32)
        if step != 3:
            alone.zero_grad()
            loss_of(plain, data).backward()
            alone.step()
        scaled.zero_grad()
        scaler.scale(loss_of(scaled, data)).backward()
        if step == 3:
            scaled.second.weight.grad[0, 0] = float("inf")
        elif step % 2:
            scaler.unscale_(under)  # as before clipping; otherwise `scaler.step` does it
        scaler.step(under)
        scaler.update()
    same(scaled, plain, 1e-4)


def test_a_step_that_a_scaler_skips_is_forgotten() -> None:
    """Whichever way its gradients are cleared."""
    for to_none in (True, False):
        models = [nn.Linear(4, 3, dtype=torch.float64) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        for model, disturb in zip(models, (True, False), strict=True):
            optimizer = GeneralizedGradientDescent(model.parameters(), 0.5, model=model)
            x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            if disturb:
                (100 * model(3 * x)).square().mean().backward()
                model.zero_grad(set_to_none=to_none)
            model(x).square().mean().backward()
            optimizer.step()
        same(*models)


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.middle = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B]` tokens to `[B, 7]` logits."""
        return self.head(torch.tanh(self.middle(self.table(tokens))))


def cut(parameters: list[Tensor]) -> None:
    """Entry by entry: no factor does this."""
    clip_grad_value_(parameters, 0.02)


def noise(parameters: list[Tensor]) -> None:
    for p in parameters:
        assert p.grad is not None
        p.grad += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel()))


def clip(parameters: list[Tensor]) -> None:
    clip_grad_norm_(parameters, 0.1)


def nothing(parameters: list[Tensor]) -> None:
    """The gradient as it came."""


def penalty(model: nn.Module) -> Tensor:
    """Reaches the weights past their layers."""
    return 0.1 * sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


PAIRS: dict[str, tuple[Callable[..., Optimizer], Callable[..., Optimizer]]] = {
    "dot product": (
        partial(GeneralizedGradientDescent, objective=DOT, inner_steps=1),
        lambda p, lr, model: SGD(p, lr),
    ),
    "L2": (partial(GeneralizedGradientDescent, objective=L2, inner_steps=400), DeltaGradientDescent),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("change", [nothing, cut, noise, clip], ids=lambda c: c.__name__)
@pytest.mark.parametrize("period", [1, 3])
def test_generalized_is_its_special_cases_for_any_gradient(pair: str, change: Change, period: int) -> None:
    """Also for parts of the gradient that no token explains: a tied embedding's, and a penalty's. (The closed form of
    a slow level takes every step's inputs, so there the steps are alike.)"""
    models = [Tied(), Tied()]
    for model, make in zip(models, PAIRS[pair], strict=True):
        inner = partial(make, lr=0.3, model=model)
        level = OptimizerLevel(model.parameters(), period)
        optimizer = MultiFrequency({"all": level}, optimizer=inner, reduce="mean")
        for step in range(6):
            optimizer.zero_grad()
            first = 0 if pair == "L2" and period > 1 else step
            tokens = torch.randint(0, 7, (12,), generator=torch.Generator().manual_seed(first))
            (F.cross_entropy(model(tokens), tokens.roll(1)) + penalty(model)).backward()
            change(list(model.parameters()))
            optimizer.step()
    same(*models, 1e-6 if pair == "L2" else 1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_factor_is_found_at_any_scale(scale: float) -> None:
    """In float32, where squares of such gradients vanish or overflow."""
    models = [Network(torch.float32), Network(torch.float32)]
    for model, on_loss in zip(models, (1.0, scale), strict=True):
        optimizer = GeneralizedGradientDescent(model.parameters(), 0.01, model=model, objective=HUBER)
        (on_loss * loss_of(model, batch(0, dtype=torch.float32))).backward()
        times(1 / on_loss)(list(model.parameters()))
        optimizer.step()
    same(*models, 1e-4)
