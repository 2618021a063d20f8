"""What optimizers keep, found by experiment, against what is known of them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, Optimizer, RMSprop

from nestling.levels.probe import ProbeError, StateMemory, probe_optimizer
from tests.levels.optimizers import Rigid, TwoSpeeds


def found(make: Any, shape: tuple[int, ...] = (9, 5)) -> dict[str, StateMemory]:
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    optimizer: Optimizer = make([p])
    return {m.name: m for m in probe_optimizer(optimizer, optimizer.param_groups[0], p)}


def lines(memories: dict[str, StateMemory]) -> dict[str, Any]:
    return {n: (m.retention, m.write, m.degree) for n, m in memories.items()}


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (partial(SGD, lr=0.1), {}),
        (partial(SGD, lr=0.1, momentum=0.7, weight_decay=0.3), {"momentum_buffer": (0.7, 1, 1)}),
        (partial(SGD, lr=0.1, momentum=0.7, dampening=0.25), {"momentum_buffer": (0.7, 0.75, 1)}),
        (partial(SGD, lr=0.1, momentum=0.7, maximize=True), {"momentum_buffer": (0.7, -1, 1)}),
        (partial(Adam, betas=(0.8, 0.99)), {"exp_avg": (0.8, 0.2, 1), "exp_avg_sq": (0.99, 0.01, 2)}),
        (partial(AdamW, fused=True), {"exp_avg": (0.9, 0.1, 1), "exp_avg_sq": (0.999, 0.001, 2)}),
        (Adagrad, {"sum": (1, 1, 2)}),
        (Muon, {"momentum_buffer": (0.95, 0.05, 1)}),
    ],
)
def test_lines_of_known_optimizers(make: Any, wanted: dict[str, Any]) -> None:
    memories = found(make)
    assert lines(memories) == {n: pytest.approx(v) for n, v in wanted.items()}
    assert all(m.period == 1 and m.feeds_parameter and not m.feeds and m.like_parameter for m in memories.values())


def test_what_depends_on_what() -> None:
    memories = found(partial(Adam, amsgrad=True))
    assert memories["exp_avg_sq"].feeds == ("max_exp_avg_sq",) and not memories["exp_avg"].feeds
    assert memories["max_exp_avg_sq"].degree is None
    memories = found(partial(RMSprop, momentum=0.5))
    assert memories["square_avg"].feeds == ("momentum_buffer",)


def test_periods_and_chains() -> None:
    memories = found(TwoSpeeds)
    assert {n: m.period for n, m in memories.items()} == {"fast": 1, "slow": 5, "waiting": 1, "filtered": 1}
    assert lines(memories)["fast"] == pytest.approx((0.8, 0.2, 1))
    assert lines(memories)["slow"] == pytest.approx((0.5, -3.0, 1))
    assert memories["fast"].feeds == ("filtered",) and memories["waiting"].feeds == ("slow",)
    assert memories["filtered"].degree is None  # its write is the fast momentum's, not a line in this gradient
    assert {n for n, m in memories.items() if m.feeds_parameter} == {"fast", "slow", "waiting", "filtered"}
    assert found(partial(TwoSpeeds, period=37))["slow"].period == 37
    assert found(partial(TwoSpeeds, period=290))["slow"].period == 290
    assert found(partial(TwoSpeeds, period=500))["slow"].period is None  # too slow to be seen twice


def test_vectors_convolutions_and_a_rate_of_zero() -> None:
    for shape in ((7,), (2, 3, 3, 3)):
        assert set(found(Adam, shape)) == {"exp_avg", "exp_avg_sq"}
    assert found(partial(SGD, lr=0.0, momentum=0.9))["momentum_buffer"].feeds_parameter  # as in the first warm-up step


def test_nothing_real_is_touched() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = AdamW([p], lr=0.3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # it patches optimizer.step
    hooked: list[Any] = []
    optimizer.register_step_post_hook(lambda *a: hooked.append(a))
    p.grad = torch.ones(4, 4)
    optimizer.step()
    scheduler.step()
    hooked.clear()
    torch.manual_seed(3)
    before = copy.deepcopy((p.detach(), optimizer.state_dict(), torch.get_rng_state()))
    probe_optimizer(optimizer, optimizer.param_groups[0], p)
    after = (p.detach(), optimizer.state_dict(), torch.get_rng_state())
    assert torch.equal(before[0], after[0]) and str(before[1]) == str(after[1]) and torch.equal(before[2], after[2])
    assert not hooked and p.grad is not None


class Logging(SGD):
    """Keeps something outside its state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.log: list[int] = []

    def step(self, closure: Any = None) -> Any:
        self.log.append(len(self.log))
        torch.rand(3)
        return super().step(closure)


def test_what_an_optimizer_keeps_elsewhere_is_not_touched_either() -> None:
    p = nn.Parameter(torch.zeros(3, 3))
    optimizer = Logging([p])
    random = torch.get_rng_state()
    assert {m.name for m in probe_optimizer(optimizer, optimizer.param_groups[0], p)} == {"momentum_buffer"}
    assert optimizer.log == [] and torch.equal(random, torch.get_rng_state())


def test_an_optimizer_that_cannot_be_tried() -> None:
    with pytest.raises(ProbeError, match="RuntimeError: not my parameter"):
        found(Rigid)
