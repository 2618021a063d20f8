"""Copies of optimizers by `copy` or `pickle`, with their model or alone, go on as the original and apart from it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nestling.optim import (
    NAMES,
    DeltaGradientDescent,
    GeneralizedGradientDescent,
    MultiFrequency,
    OjaGradientDescent,
    OptimizerLevel,
    build,
)
from tests.optim.models import Network, batch, loss_of
from tests.optim.subjects import SUBJECTS

Make = Callable[[nn.Module], Optimizer]
WATCHING = (DeltaGradientDescent, GeneralizedGradientDescent, OjaGradientDescent)


def levels(model: Network, make: Callable[[nn.Module, list[Tensor]], Optimizer]) -> MultiFrequency:
    """Two levels; copies are made inside the slow one's period."""
    slow = [*model.second.parameters(), *model.convolution.parameters(), model.gain]
    ids = {id(p) for p in slow}
    fast = [p for p in model.parameters() if id(p) not in ids]
    return MultiFrequency(
        {"fast": OptimizerLevel(fast), "slow": OptimizerLevel(slow, 3)}, optimizer=lambda p: make(model, p)
    )


def by_name(name: str, model: nn.Module, only: list[Tensor] | None = None) -> Optimizer:
    return build(name, model, lr=0.01, weight_decay=0.1, only=only)


NAMED: dict[str, Make] = {name: partial(by_name, name) for name in NAMES}
LEVELS: dict[str, Make] = {
    f"levels of {name}": lambda model, name=name: levels(model, partial(by_name, name)) for name in NAMES
}
OPTIONS: dict[str, Make] = {subject.name: lambda model, make=subject.make: make(model, 0.01) for subject in SUBJECTS}
everyone = pytest.mark.parametrize("make", (NAMED | LEVELS).values(), ids=NAMED | LEVELS)


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> list[Tensor]:
    for seed in range(first, last):
        optimizer.zero_grad()
        loss_of(model, batch(seed)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def by_torch(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


WAYS = [
    pytest.param(make, way, id=f"{name}, {way.__name__}")
    for name, make in (NAMED | LEVELS | OPTIONS).items()
    for way in (copy.deepcopy, by_pickle if name in NAMED else by_torch)
    if way is copy.deepcopy or name != "momentum, sign"  # whose map is a lambda
]


@pytest.mark.parametrize(("make", "way"), WAYS)
def test_a_pair_goes_on_as_the_original(make: Make, way: Callable[[Any], Any]) -> None:
    """Whichever comes first in the pair."""
    model = Network()
    optimizer = make(model)
    train(model, optimizer, 0, 4)
    model2, optimizer2 = way((model, optimizer))
    kept = [p.detach().clone() for p in model.parameters()]
    found = train(model2, optimizer2, 4, 8)
    same([p.detach() for p in model.parameters()], kept)
    same(train(model, optimizer, 4, 8), found)
    # A copy of the copy, whose original is gone.
    del model, optimizer
    gc.collect()
    optimizer3, model3 = way((optimizer2, model2))
    same(train(model3, optimizer3, 8, 11), train(model2, optimizer2, 8, 11))


@pytest.mark.parametrize("make", LEVELS.values(), ids=LEVELS)
def test_a_copy_between_backward_and_step_has_no_gradient(make: Make) -> None:
    """As torch's: parameters are copied without theirs, and so are the records that belong to them."""
    model = Network()
    optimizer = make(model)
    train(model, optimizer, 0, 2)
    loss_of(model, batch(2)).backward()
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    assert all(p.grad is None for p in model2.parameters())
    plain, again = copy.deepcopy((model, optimizer))
    same(train(model2, optimizer2, 5, 8), train(plain, again, 5, 8))
    optimizer.step()
    train(model, optimizer, 5, 8)


@everyone
def test_schedulers_and_hooks_stay_with_the_original(make: Make) -> None:
    """A scheduler puts a `step` of its own on an optimizer, and nobody wants the copy to step the original."""
    model = Network()
    optimizer = make(model)
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda stepped, *_: calls.append(stepped))
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 0, 2)
    scheduler.step()
    model2, optimizer2 = by_pickle((model, optimizer))
    calls.clear()
    found = train(model2, optimizer2, 2, 5)
    assert not calls
    same(train(model, optimizer, 2, 5), found)
    model3, optimizer3 = by_pickle((model2, optimizer2))
    same(train(model3, optimizer3, 5, 7), train(model2, optimizer2, 5, 7))
    both = copy.deepcopy((model, optimizer, scheduler))
    assert both[2].optimizer is both[1]
    both[2].step()
    assert both[1].param_groups[0]["lr"] == 0.5 * optimizer.param_groups[0]["lr"]


@everyone
def test_an_optimizer_copied_alone_has_parameters_of_its_own(make: Make) -> None:
    model = Network()
    optimizer = make(model)
    train(model, optimizer, 0, 4)
    kept = [p.detach().clone() for p in model.parameters()]
    alone = copy.deepcopy(optimizer)
    for group in alone.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    for _ in range(3):
        alone.step()
    same([p.detach() for p in model.parameters()], kept)
    assert repr(alone) == repr(optimizer) or isinstance(alone, MultiFrequency)


@pytest.mark.parametrize("kind", WATCHING)
@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle, by_torch])
def test_a_model_that_is_watched_can_be_copied_alone(kind: Any, way: Callable[[Any], Any]) -> None:
    """The copy's passes tell the original's optimizer nothing, and it can have an optimizer of its own."""
    model = Network()
    optimizer = kind(model.parameters(), lr=0.01, model=model)
    train(model, optimizer, 0, 2)
    twin = way(model)
    loss_of(twin, batch(2)).backward()
    assert not optimizer.layers.seen
    own = kind(twin.parameters(), lr=0.01, model=twin)
    same(train(twin, own, 2, 5), train(model, optimizer, 2, 5))
    again = way(twin)  # hooks that do nothing are copied too
    same(train(again, kind(again.parameters(), lr=0.01, model=again), 5, 7), train(twin, own, 5, 7))


@pytest.mark.parametrize("kind", WATCHING)
def test_watching_ends_with_the_optimizer(kind: Any) -> None:
    """Closed or forgotten, it keeps no records and costs nothing; a closed copy leaves its original at work."""
    model = Network()
    optimizer = kind(model.parameters(), lr=0.01, model=model)
    layers = optimizer.layers
    twin, other = copy.deepcopy((model, optimizer))
    other.close()
    loss_of(twin, batch(0)).backward()
    assert not other.layers.seen
    loss_of(model, batch(0)).backward()
    assert len(layers.seen) == 2
    optimizer.close()
    assert not layers.seen and not any(m._forward_hooks for m in model.modules())
    optimizer = kind(model.parameters(), lr=0.01, model=model)
    seen = optimizer.layers.seen
    del optimizer
    gc.collect()
    loss_of(model, batch(0)).backward()
    assert not seen


@pytest.mark.parametrize("kind", WATCHING)
def test_a_refused_setting_leaves_no_hooks(kind: Any) -> None:
    model = Network()
    with pytest.raises(ValueError, match="lr must be in"):
        kind(model.parameters(), lr=-1.0, model=model)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", WATCHING)
def test_only_own_layers_are_recorded(kind: Any) -> None:
    """A level's optimizer keeps nothing of the other levels' layers; a group that is added brings its own."""
    model = Network()
    optimizer = kind(model.first.parameters(), lr=0.01, model=model)
    loss_of(model, batch(0)).backward()
    assert list(optimizer.layers.seen) == [model.first.weight]
    optimizer.step()
    optimizer.add_param_group({"params": list(model.second.parameters())})
    twin, other = copy.deepcopy((model, optimizer))
    for net, stepping in ((model, optimizer), (twin, other)):
        net.zero_grad()
        loss_of(net, batch(1)).backward()
        assert set(stepping.layers.seen) == {net.first.weight, net.second.weight}
