"""The layer inputs behind a gradient that a slow level has summed over its period."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from nestling.optim import (
    DeltaGradientDescent,
    GeneralizedGradientDescent,
    MultiFrequency,
    OjaGradientDescent,
    OptimizerLevel,
)
from nestling.optim.objectives import DOT

PERIOD, LR = 3, 0.5


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(step: int) -> Tensor:
    """Other lengths at every step, so that one step's inputs do not stand for another's."""
    generator = torch.Generator().manual_seed(step)
    return (1 + step % PERIOD) * torch.randn(8, 3, dtype=torch.float64, generator=generator)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2].sin()).square().mean()


def slow(model: nn.Module, kind: Any = DeltaGradientDescent, reduce: Any = "mean", **settings: Any) -> MultiFrequency:
    level = OptimizerLevel(model.parameters(), PERIOD)
    return MultiFrequency({"slow": level}, optimizer=partial(kind, lr=LR, model=model, **settings), reduce=reduce)


def train(model: nn.Module, optimizer: Optimizer, steps: range, clear: str = "none", parts: int = 1) -> None:
    """One optimizer step for each of `steps`; gradients are cleared as `clear` says before it."""
    owner = model if clear.startswith("model") else optimizer
    for step in steps:
        owner.zero_grad(set_to_none=clear.endswith("none"))
        for part in batch(step).chunk(parts):
            (loss_of(model, part) / parts).backward()
        optimizer.step()


def whole_periods(periods: int, lr: float, **settings: Any) -> list[Tensor]:
    """The equation: one step for every period, on all its rows at once."""
    model = make_model()
    optimizer = DeltaGradientDescent(model.parameters(), lr, model=model, **settings)
    for period in range(periods):
        optimizer.zero_grad()
        loss_of(model, torch.cat([batch(PERIOD * period + i) for i in range(PERIOD)])).backward()
        optimizer.step()
    return weights(model)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clear", ["none", "zero", "model none", "model zero"])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_slow_level_sees_its_whole_period(clear: str, parts: int) -> None:
    """However gradients are cleared and however many backward passes a step has."""
    model = make_model()
    train(model, slow(model), range(3 * PERIOD), clear, parts)
    same(weights(model), whole_periods(3, LR))


@pytest.mark.parametrize("settings", [{}, {"solver": "step"}, {"erase": 0.3}, {"erase": 0.0}])
def test_a_sum_is_the_mean_at_a_rate_times_the_period(settings: dict[str, Any]) -> None:
    """Gradient and Gram matrix are summed alike, so that their proportion stays."""
    model = make_model()
    train(model, slow(model, reduce="sum", **settings), range(2 * PERIOD))
    same(weights(model), whole_periods(2, LR * PERIOD, **settings))


@pytest.mark.parametrize("kind", [DeltaGradientDescent, GeneralizedGradientDescent, OjaGradientDescent])
@pytest.mark.parametrize("stop", range(1, 2 * PERIOD))
def test_resumes_exactly_inside_a_period(stop: int, kind: Any) -> None:
    model = make_model()
    optimizer = slow(model, kind)
    train(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(stop, 3 * PERIOD))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make_model()
    other.load_state_dict(saved["model"])
    resumed = slow(other, kind)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(stop, 3 * PERIOD))
    same(weights(other), weights(model), 0.0)
    assert all(values.keys() == {"step"} for values in resumed.state_dict()["state"].values())  # no sums are left


@pytest.mark.parametrize("kind", [DeltaGradientDescent, GeneralizedGradientDescent, OjaGradientDescent])
@pytest.mark.parametrize("dropped", range(PERIOD))
def test_gradients_that_were_dropped_leave_no_inputs(kind: Any, dropped: int) -> None:
    """A step whose gradients were set to None counts for the period and for nothing else."""
    found = []
    for backward in (True, False):
        model = make_model()
        optimizer = slow(model, kind)
        for step in range(PERIOD):
            optimizer.zero_grad()
            if step != dropped or backward:
                loss_of(model, batch(step)).backward()
            if step == dropped:
                for p in model.parameters():
                    p.grad = None
            optimizer.step()
        found.append(weights(model))
    same(*found, 0.0)


@pytest.mark.parametrize("kind", [DeltaGradientDescent, GeneralizedGradientDescent, OjaGradientDescent])
@pytest.mark.parametrize("clear", ["zero", "model zero"])
def test_gradients_that_were_set_to_zero_leave_no_inputs(kind: Any, clear: str) -> None:
    found = []
    for disturb in (True, False):
        model = make_model()
        optimizer = slow(model, kind)
        train(model, optimizer, range(1), clear)
        if disturb:
            loss_of(model, 100 * batch(7)).backward()
        train(model, optimizer, range(1, PERIOD), clear)
        found.append(weights(model))
    same(*found, 0.0)


@pytest.mark.parametrize("clear", ["none", "zero", "model none", "model zero"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_generalized_steps_with_the_whole_gradient(clear: str, reduce: Any) -> None:
    """With the dot product nothing but the gradient counts: of all steps of the period, and not of its last."""
    model, other = make_model(), make_model()
    train(model, slow(model, GeneralizedGradientDescent, reduce, objective=DOT, inner_steps=1), range(6), clear, 2)
    level = OptimizerLevel(other.parameters(), PERIOD)
    train(other, MultiFrequency({"slow": level}, optimizer=partial(SGD, lr=LR), reduce=reduce), range(6), clear, 2)
    same(weights(model), weights(other))


def test_generalized_takes_the_last_tokens_for_all() -> None:
    """Steps alike: the mean is one step's, however many they are. Any steps: a sum is the mean at a rate times the
    period."""
    alike, alone = make_model(), make_model()
    optimizer = slow(alike, GeneralizedGradientDescent)
    for _ in range(PERIOD):
        train(alike, optimizer, range(1))
    train(alone, GeneralizedGradientDescent(alone.parameters(), LR, model=alone), range(1))
    same(weights(alike), weights(alone))
    models = [make_model(), make_model()]
    for model, reduce, lr in zip(models, ("sum", "mean"), (LR, LR * PERIOD), strict=True):
        optimizer = slow(model, GeneralizedGradientDescent, reduce)
        optimizer.param_groups[0]["lr"] = lr
        train(model, optimizer, range(2 * PERIOD))
    same(weights(models[0]), weights(models[1]))


def test_a_step_that_is_refused_forgets_its_period() -> None:
    """As it forgets the gradient sum: the next period has its own inputs only."""
    found = []
    for disturb in (True, False):
        model = make_model()
        optimizer = slow(model, on_nonfinite="skip")
        if disturb:
            train(model, optimizer, range(PERIOD - 1))
            loss_of(model, batch(2)).backward()
            model[0].weight.grad[0, 0] = float("nan")
            optimizer.step()
        train(model, optimizer, range(PERIOD, 2 * PERIOD))
        found.append(weights(model))
    same(*found, 0.0)


@pytest.mark.parametrize("kind", [DeltaGradientDescent, GeneralizedGradientDescent, OjaGradientDescent])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_seen_once(kind: Any, reentrant: bool) -> None:
    """A layer that is used twice, each time in a part that the backward pass runs again."""
    found = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(3, 3).double()
        optimizer = kind(layer.parameters(), lr=LR, model=layer)
        x = batch(1).requires_grad_()
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        x.square().mean().backward()
        optimizer.step()
        found.append(weights(layer))
    same(*found)
