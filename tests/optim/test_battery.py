"""What every optimizer must do, whatever its equation; `subjects.py` lists them."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestling.errors import NonFiniteGradientError
from tests.optim.models import Network, Quadratic, Rosenbrock, batch, loss_of
from tests.optim.reference import Call
from tests.optim.subjects import SUBJECTS, Subject

everyone = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)


def train(model: nn.Module, optimizer: Optimizer, seeds: range, dtype: torch.dtype = torch.float64) -> float:
    """One step a seed; the last loss."""
    loss = torch.zeros(())
    for seed in seeds:
        optimizer.zero_grad()
        loss = loss_of(model, batch(seed, dtype=dtype))
        loss.backward()
        optimizer.step()
    return loss.item()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@everyone
def test_reference_over_100_steps(subject: Subject) -> None:
    """On a network with every kind of parameter the optimizer is its equation; nothing without a gradient moves."""
    model = Network()
    optimizer = subject.make(model, 0.01)
    copies = {p: p.detach().clone() for p in model.parameters()}
    memories: dict[Tensor, dict[str, Any]] = {p: {"t": 0} for p in copies}
    seen: dict[Tensor, tuple[Tensor, Tensor]] = {}
    for layer in (model.first, model.second):
        layer.register_forward_hook(_watch(seen))
    for seed in range(100):
        optimizer.zero_grad()
        loss_of(model, batch(seed)).backward()
        for p, w in copies.items():
            if p.grad is not None:
                memories[p]["t"] += 1
                call = Call(p is model.table.weight, *seen.get(p, (None, None)))
                copies[p] = subject.reference(w, p.grad.clone(), memories[p], 0.01, call)
        optimizer.step()
        # The next gradients come from the optimizer's weights, so small differences cannot feed on themselves.
        assert_same(weights(model), list(copies.values()), 1e-9)
    assert model.unused not in optimizer.state or not optimizer.state[model.unused]


def _watch(seen: dict[Tensor, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def hook(layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda dy: seen.update({layer.weight: (args[0].detach(), dy)}))

    return hook


@everyone
@pytest.mark.parametrize("problem", [Quadratic, Rosenbrock])
def test_goes_down(subject: Subject, problem: type[nn.Module]) -> None:
    """At least by half within 200 steps under a falling rate, and it never leaves."""
    model = problem()
    optimizer = subject.make(model, subject.toy)
    first = model().item()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=200)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        optimizer.step()
        scheduler.step()
        assert loss.item() < 5 * first
    assert model().item() < 0.5 * first


@everyone
def test_trains_a_network(subject: Subject) -> None:
    """A mean over fresh batches falls by a quarter at least."""
    model = Network()
    before = sum(loss_of(model, batch(1000 + i)).item() for i in range(5))
    train(model, subject.make(model, subject.lr), range(150))
    assert sum(loss_of(model, batch(1000 + i)).item() for i in range(5)) < 0.75 * before


@everyone
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit(subject: Subject, dtype: torch.dtype) -> None:
    """From a file read without pickled code, in a new model; state of bfloat16 parameters is float32 and stays so."""
    model = Network(dtype)
    optimizer = subject.make(model, 0.01)
    train(model, optimizer, range(5), dtype)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(5, 11), dtype)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Network(dtype)
    other.load_state_dict(saved["model"])
    resumed = subject.make(other, 0.5)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(5, 11), dtype)
    assert_same(weights(other), weights(model))
    assert {p.dtype for p in other.parameters()} == {dtype}
    floats = [v for s in resumed.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert {v.dtype for v in floats} <= {torch.float64 if dtype == torch.float64 else torch.float32}


@everyone
def test_half_precision_follows_single(subject: Subject) -> None:
    """From the same gradients the bfloat16 weights are float32's, rounded once a step."""
    whole, half = Network(torch.float32), Network(torch.bfloat16)
    half.load_state_dict(whole.state_dict())
    whole.load_state_dict(half.state_dict())
    optimizers = [subject.make(model, 0.01) for model in (whole, half)]
    loss_of(whole, batch(0, dtype=torch.float32)).backward()
    loss_of(half, batch(0, dtype=torch.bfloat16)).backward()
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        if a.grad is not None:
            b.grad = a.grad.bfloat16()
            a.grad = b.grad.float()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["weight_decay"] = 10.0
        optimizer.step()
    for a, b in zip(weights(whole), weights(half), strict=True):
        torch.testing.assert_close(b.float(), a, rtol=1 / 128, atol=1e-3)


@everyone
def test_accumulated_gradients_are_one_batch(subject: Subject) -> None:
    """Four backward passes of a quarter each, then a step."""
    one, parts = Network(), Network()
    together, apart = subject.make(one, 0.01), subject.make(parts, 0.01)
    for step in range(4):
        pieces = [batch(10 * step + i, size=4) for i in range(4)]
        together.zero_grad()
        loss_of(one, tuple(torch.cat(p) for p in zip(*pieces, strict=True))).backward()  # type: ignore[arg-type]
        together.step()
        apart.zero_grad()
        for piece in pieces:
            (loss_of(parts, piece) / 4).backward()
        apart.step()
    assert_same(weights(parts), weights(one), 1e-9)


@everyone
def test_one_at_a_time_is_all_together(subject: Subject) -> None:
    """`foreach` changes the schedule and not the result."""
    models = [Network(), Network()]
    for model, foreach in zip(models, (True, False), strict=True):
        train(model, subject.make(model, 0.01, foreach=foreach), range(8))
    assert_same(weights(models[0]), weights(models[1]), 1e-10)


@everyone
def test_maximize_is_the_negated_loss(subject: Subject) -> None:
    """Up the loss = down its negative."""
    models = [Network(), Network()]
    for model, sign in zip(models, (1.0, -1.0), strict=True):
        optimizer = subject.make(model, 0.01, maximize=sign > 0)
        for seed in range(5):
            optimizer.zero_grad()
            (sign * loss_of(model, batch(seed))).backward()
            optimizer.step()
    assert_same(weights(models[0]), weights(models[1]), 1e-12)


@everyone
def test_weight_decay_is_decoupled(subject: Subject) -> None:
    """One step with it is the step without it less lr * weight_decay * W; the state does not see it."""
    models = [Network(), Network()]
    start = weights(models[0])
    for model, decay in zip(models, (0.0, 0.5), strict=True):
        optimizer = subject.make(model, 0.01)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay
        train(model, optimizer, range(1))
    moved = [p.grad is not None for p in models[0].parameters()]
    wanted = [w - 0.01 * 0.5 * s * m for w, s, m in zip(weights(models[0]), start, moved, strict=True)]
    assert_same(weights(models[1]), wanted, 1e-12)


@everyone
def test_schedulers_and_groups_set_the_rate(subject: Subject) -> None:
    """A rate of 0 leaves the weights, and a tensor rate works as a number."""
    model, other = Network(), Network()
    optimizer = subject.make(model, 0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.0)
    with_tensor = subject.make(other, torch.tensor(0.01, dtype=torch.float64))
    for seed in range(4):
        before = weights(model)
        train(model, optimizer, range(seed, seed + 1))
        if seed < 2:
            train(other, with_tensor, range(seed, seed + 1))
        scheduler.step()
        changed = any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert changed == (seed < 2)
    assert_same(weights(other), weights(model), 1e-12)


@everyone
def test_a_closure_is_called_with_gradients(subject: Subject) -> None:
    """Its loss comes back, and the step is the usual one."""
    model, other = Network(), Network()
    optimizer = subject.make(model, 0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == train(other, subject.make(other, 0.01), range(1))
    assert_same(weights(model), weights(other))


@everyone
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite(subject: Subject, bad: float) -> None:
    """Raise or skip; weights and state stay as they were, also of the other groups, and training goes on."""
    model = Network()
    for on_nonfinite in ("raise", "skip"):
        optimizer = subject.make(model, 0.01, on_nonfinite=on_nonfinite)
        train(model, optimizer, range(2))
        before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
        loss_of(model, batch(5)).backward()
        assert model.second.bias.grad is not None
        model.second.bias.grad[1] = bad
        if on_nonfinite == "raise":
            with pytest.raises(NonFiniteGradientError, match="nothing was updated"):
                optimizer.step()
        else:
            optimizer.step()
        assert_same(weights(model), before)
        _assert_equal(optimizer.state_dict()["state"], state)
        train(model, optimizer, range(1))
        assert any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def _assert_equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            _assert_equal(found[key], wanted[key])
    else:
        assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted


@everyone
def test_zero_gradients_leave_everything_finite(subject: Subject) -> None:
    """Dead units, unused rows: a first step with gradients of zero, then ordinary ones."""
    model = Network()
    optimizer = subject.make(model, 0.01)
    before = weights(model)
    (0.0 * loss_of(model, batch(0))).backward()
    optimizer.step()
    assert_same(weights(model), before)
    train(model, optimizer, range(3))
    assert all(w.isfinite().all() for w in weights(model))


@everyone
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-12])
def test_tiny_gradients(subject: Subject, scale: float) -> None:
    """In float32 squares of tiny gradients underflow; the weights stay finite, and small gradients move them little."""
    model = Network(torch.float32)
    optimizer = subject.make(model, 1e-3)
    before = weights(model)
    for seed in range(4):
        optimizer.zero_grad()
        (scale * loss_of(model, batch(seed, dtype=torch.float32))).backward()
        optimizer.step()
    changes = [(a - b).abs().max().item() for a, b in zip(weights(model), before, strict=True) if a.numel()]
    assert all(math.isfinite(c) for c in changes)
    if subject.name != "M3, algorithm":  # whose first steps are one over a gradient long
        assert max(changes) < 0.05


@everyone
def test_refusals(subject: Subject) -> None:
    """Complex parameters, sparse gradients and impossible settings are refused in words."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3, sparse=True)

    model = Sparse()
    optimizer = subject.make(model, 0.01)
    model.table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()
    with pytest.raises(ValueError, match="complex"):
        subject.make(Network().to(torch.complex64), 0.01)
    with pytest.raises(ValueError, match="lr must be in"):
        subject.make(Network(), -1.0)
    with pytest.raises(ValueError, match="on_nonfinite must be"):
        subject.make(Network(), 0.01, on_nonfinite="ignore")


@everyone
@pytest.mark.parametrize(("width", "out"), [(0, 3), (3, 0), (1, 1)])
def test_layers_without_units(subject: Subject, width: int, out: int) -> None:
    """Weights of no rows or no columns, and a batch of no rows."""
    model = nn.Sequential(nn.Linear(5, width), nn.Linear(width, out)).double()
    optimizer = subject.make(model, 0.01)
    for rows in (4, 0, 4):
        optimizer.zero_grad()
        model(torch.ones(rows, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@everyone
@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_rates_that_are_not_finite(subject: Subject, rate: float) -> None:
    """Set by a scheduler, say: nothing moves."""
    model = Network()
    optimizer = subject.make(model, 0.01)
    loss_of(model, batch(0)).backward()
    before = weights(model)
    optimizer.param_groups[-1]["lr"] = rate
    with pytest.raises(ValueError, match="a group has the learning rate"):
        optimizer.step()
    assert_same(weights(model), before)


@everyone
def test_a_group_that_is_refused_is_not_there(subject: Subject) -> None:
    model = Network()
    optimizer = subject.make(model, 0.01)
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="lr must be in"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0})
    assert len(optimizer.param_groups) == groups
    train(model, optimizer, range(1))


@everyone
def test_is_a_torch_optimizer(subject: Subject) -> None:
    """Groups may be added later, hooks run, and an optimizer can be copied with its state."""
    model = Network()
    optimizer = subject.make(model, 0.01)
    extra = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("stepped"))
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert calls == ["stepped"] and not torch.equal(extra, torch.ones_like(extra))
    assert repr(optimizer).startswith(type(optimizer).__name__)
