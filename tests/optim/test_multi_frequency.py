from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from nestling.optim import MultiFrequency, OptimizerLevel
from nestling.optim.multi_frequency import ACCUMULATED
from tests.optim import reference_multi_frequency as reference

PERIODS = (1, 2, 3, 7)
STEPS = 43


def make_weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator, dtype=dtype) for _ in PERIODS]


def loss_at(weights: Sequence[Tensor], step: int) -> Tensor:
    """A loss that ties all levels together and changes from step to step."""
    generator = torch.Generator().manual_seed(step)
    targets = [torch.randn(3, 4, generator=generator, dtype=w.dtype) for w in weights]
    product = weights[0] * weights[1] + torch.tanh(weights[2]) * weights[3]
    return (product - targets[0]).square().sum() + sum(
        (w - t).square().sum() for w, t in zip(weights, targets, strict=True)
    )


def gradient_at(weights: Sequence[Tensor], step: int) -> list[Tensor]:
    leaves = [w.detach().clone().requires_grad_() for w in weights]
    return list(torch.autograd.grad(loss_at(leaves, step), leaves))


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(w) for w in make_weights()]


def levels_of(weights: Sequence[Tensor]) -> dict[str, OptimizerLevel]:
    return {f"level{p}": OptimizerLevel([w], p) for w, p in zip(weights, PERIODS, strict=True)}


def train(
    optimizer: Optimizer, weights: Sequence[Tensor], first: int, last: int, accumulate: int = 1, **options: Any
) -> list[list[Tensor]]:
    """Steps first..last; every gradient arrives in `accumulate` equal parts."""
    history = []
    for step in range(first, last + 1):
        optimizer.zero_grad(**options)
        for _ in range(accumulate):
            (loss_at(weights, step) / accumulate).backward()
        optimizer.step()
        history.append([w.detach().clone() for w in weights])
    return history


def check(found: list[list[Tensor]], wanted: list[list[Tensor]], **tolerance: Any) -> None:
    for step, (a, b) in enumerate(zip(found, wanted, strict=True), 1):
        for level, (x, y) in enumerate(zip(a, b, strict=True)):
            torch.testing.assert_close(x, y, msg=lambda m, s=step, i=level: f"step {s} level {i}: {m}", **tolerance)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_gradient_descent_is_the_equation(reduce: Any) -> None:
    wanted = reference.run(
        make_weights(), PERIODS, gradient_at, lambda _, w, g: w - 0.01 * g, STEPS, mean=reduce == "mean"
    )
    weights = parameters()
    optimizer = MultiFrequency(levels_of(weights), optimizer=partial(SGD, lr=0.01), reduce=reduce)
    check(train(optimizer, weights, 1, STEPS), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner", [AdamW, partial(SGD, lr=1e-5, momentum=0.9, maximize=True), Adagrad], ids=str)
def test_any_inner_optimizer_steps_with_the_sums(inner: Callable[..., Optimizer]) -> None:
    """Against an inner optimizer of its own for every level, fed by the reference."""
    lone = parameters()
    alone = [inner([p]) for p in lone]

    def update(level: int, weight: Tensor, total: Tensor) -> Tensor:
        lone[level].grad = total.clone()
        alone[level].step()
        return lone[level].detach().clone()

    wanted = reference.run(make_weights(), PERIODS, gradient_at, update, STEPS)
    weights = parameters()
    check(train(MultiFrequency(levels_of(weights), optimizer=inner), weights, 1, STEPS), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner", [AdamW, partial(AdamW, foreach=False), partial(SGD, momentum=0.9, nesterov=True)])
def test_period_one_everywhere_is_the_inner_optimizer(inner: Callable[..., Optimizer]) -> None:
    a, b = parameters(), parameters()
    one = {f"{i}": OptimizerLevel([p]) for i, p in enumerate(a)}
    check(train(MultiFrequency(one, optimizer=inner), a, 1, 20), train(inner(b), b, 1, 20), rtol=0, atol=0)


def test_gradient_accumulation_and_ways_to_clear_gradients_change_nothing() -> None:
    """A step is an optimizer step: neither its parts nor what zero_grad leaves behind matter."""
    runs = []
    for accumulate, to_none in ((1, True), (1, False), (4, True)):
        weights = parameters()
        optimizer = MultiFrequency(levels_of(weights), optimizer=partial(SGD, lr=0.01))
        runs.append(train(optimizer, weights, 1, STEPS, accumulate, set_to_none=to_none))
    check(runs[1], runs[0], rtol=0, atol=0)
    check(runs[2], runs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stop", range(1, 15))
def test_resumes_exactly_at_any_step(stop: int) -> None:
    whole = parameters()
    wanted = train(MultiFrequency(levels_of(whole)), whole, 1, 30)
    first = parameters()
    optimizer = MultiFrequency(levels_of(first))
    train(optimizer, first, 1, stop)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = MultiFrequency(levels_of(second))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    check(train(resumed, second, stop + 1, 30), wanted[stop:], rtol=0, atol=0)


class Counting(SGD):
    """Keeps a state that belongs to no parameter."""

    def step(self, closure: Any = None) -> Any:
        self.state["calls"] = self.state.get("calls", 0) + 1  # type: ignore[index, call-overload]
        return super().step(closure)


def test_states_of_no_parameter_belong_to_their_level() -> None:
    weights = parameters()
    optimizer = MultiFrequency(levels_of(weights), optimizer=partial(Counting, lr=1e-3))
    train(optimizer, weights, 1, 7)
    resumed = MultiFrequency(levels_of(weights), optimizer=partial(Counting, lr=1e-3))
    resumed.load_state_dict(optimizer.state_dict())
    assert [level.optimizer.state["calls"] for level in resumed.levels] == [7, 3, 2, 1]  # type: ignore[index]


def test_sums_stay_float32_for_bfloat16_parameters_and_over_a_resume() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = MultiFrequency({"slow": OptimizerLevel([p], 200)}, optimizer=partial(SGD, lr=1.0))
    for step in range(199):
        p.grad = torch.full_like(p, 1.0)
        optimizer.step()
        if step == 150:
            saved = optimizer.state_dict()
            optimizer = MultiFrequency({"slow": OptimizerLevel([p], 200)}, optimizer=partial(SGD, lr=1.0))
            optimizer.load_state_dict(saved)
    total = optimizer.state[p][ACCUMULATED]
    assert total.dtype == torch.float32 and total.tolist() == [199.0] * 3  # in bfloat16 256 + 1 is 256
    p.grad = torch.full_like(p, 1.0)
    optimizer.step()
    assert p.dtype == torch.bfloat16 and p.tolist() == [-200.0] * 3
    assert not optimizer.state_dict()["state"] and p.grad.tolist() == [1.0] * 3


def test_schedulers_see_the_groups_and_rates_scale_with_the_period() -> None:
    weights = parameters()
    optimizer = MultiFrequency(levels_of(weights), optimizer=partial(SGD, lr=1.0), rate_exponent=-0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([p**-0.5 for p in PERIODS])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    inner = [level.optimizer.param_groups[0]["lr"] for level in optimizer.levels]
    assert inner == pytest.approx([0.5 * p**-0.5 for p in PERIODS])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[-1]["lr"] = 7.0
    assert optimizer.levels[-1].optimizer.param_groups[0]["lr"] == 7.0  # still one group, after a load too


def test_a_slow_level_decays_at_its_own_steps() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = MultiFrequency({"slow": OptimizerLevel([p], 3)}, optimizer=partial(AdamW, lr=0.1, weight_decay=0.5))
    values = []
    for _ in range(6):
        p.grad = torch.zeros(2)
        optimizer.step()
        values.append(p[0].item())
    assert values == pytest.approx([1, 1, 0.95, 0.95, 0.95, 0.95**2])


def test_gradients_that_come_and_go() -> None:
    """A parameter without a gradient adds nothing; one that never had one is left alone at the update."""
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = MultiFrequency({"slow": OptimizerLevel([a, b, c], 2)}, optimizer=partial(AdamW, lr=1.0))
    a.grad, b.grad = torch.ones(1), None
    optimizer.step()
    a.grad, b.grad = None, -torch.ones(1)
    optimizer.step()
    assert (a.item(), b.item(), c.item()) == pytest.approx((-1, 1, 0))
    assert a.grad is None and set(optimizer.state_dict()["state"]) == {0, 1}


def test_closure_is_called_once_with_gradients() -> None:
    weights, calls = parameters(), []
    optimizer = MultiFrequency(levels_of(weights), optimizer=partial(SGD, lr=0.01))

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_at(weights, len(calls))
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(STEPS)]
    assert calls == [True] * STEPS and losses[0] == loss_at(make_weights(), 1).item()
    wanted = reference.run(make_weights(), PERIODS, gradient_at, lambda _, w, g: w - 0.01 * g, STEPS)
    check([[w.detach() for w in weights]], wanted[-1:], rtol=1e-12, atol=1e-12)


def test_a_copy_is_independent_and_goes_on() -> None:
    weights = parameters()
    optimizer = MultiFrequency(levels_of(weights))
    train(optimizer, weights, 1, 5)
    twin = copy.deepcopy({"optimizer": optimizer, "weights": weights})
    wanted = train(optimizer, weights, 6, 20)
    check(train(twin["optimizer"], twin["weights"], 6, 20), wanted, rtol=0, atol=0)


def test_add_param_group_joins_a_level() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = MultiFrequency({"slow": OptimizerLevel([a], 2)}, optimizer=partial(SGD, lr=1.0))
    optimizer.add_param_group({"params": [b], "lr": 10.0, "level": "slow"})
    for _ in range(2):
        a.grad, b.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
    assert (a.item(), b.item()) == (-2.0, -20.0) and len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="one of slow"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "level": "slwo"})
    optimizer.step()
    with pytest.raises(ValueError, match="1 steps into its period"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "level": "slow"})


def test_errors_say_what_to_do() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="levels is empty"):
        MultiFrequency({})
    with pytest.raises(ValueError, match="period of level 'a' is a number of steps, 1 or more, not 0"):
        MultiFrequency({"a": OptimizerLevel([p], 0)})
    with pytest.raises(ValueError, match="level 'a' has no parameters"):
        MultiFrequency({"a": OptimizerLevel([])})
    with pytest.raises(ValueError, match=r"shape \(2, 2\) stands in the levels 'a' and 'b'"):
        MultiFrequency({"a": OptimizerLevel([p]), "b": OptimizerLevel([p])})
    with pytest.raises(ValueError, match="'sum' or 'mean', not 'total'"):
        MultiFrequency({"a": OptimizerLevel([p])}, reduce="total")  # type: ignore[arg-type]
    saved = MultiFrequency({"a": OptimizerLevel([p], 3)}).state_dict()
    with pytest.raises(ValueError, match=r"levels \(name, period\) a=3, this one has a=4"):
        MultiFrequency({"a": OptimizerLevel([p], 4)}).load_state_dict(saved)
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = MultiFrequency({"table": OptimizerLevel(table.parameters(), 2)})
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradient"):
        optimizer.step()
