"""The closed form of a chunk equals the rule token by token, with every gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.ops.chunk_rule import (
    chunk_advance,
    chunk_read,
    chunk_scan,
    chunk_writes,
    decay_products,
    solve_unit_lower,
)
from nestling.ops.reference import token_rule

WIDTH_IN, WIDTH_OUT = 5, 3
FLAGS = ("momentum", "erase", "online", "before")
MODES = [
    pytest.param(*on, id=" ".join(itertools.compress(FLAGS, on)) or "plain")
    for on in itertools.product((False, True), repeat=4)
]


def make_inputs(
    time: int, momentum: bool, erase: bool, batch: tuple[int, ...] = (2, 2), seed: int = 0
) -> dict[str, Tensor]:
    """Leaves of the rule in float64; the rates as raw logits (see `rule_rates`)."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, dtype=torch.float64, generator=generator).requires_grad_()

    leaves = {"x": noise(time, WIDTH_IN), "g": noise(time, WIDTH_OUT), "q": noise(time, WIDTH_IN)}
    leaves |= {"weight": noise(WIDTH_OUT, WIDTH_IN), "retention": noise(time), "inner_lr": noise(time)}
    if erase:
        leaves["erase"] = noise(time)
    if momentum:
        leaves |= {"momentum": noise(time), "surprise": noise(WIDTH_OUT, WIDTH_IN)}
    return leaves


def rule_rates(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of the rule: x normalised, a and b in (0, 1), e in (0, 2)."""
    rates = dict(leaves)
    rates["x"] = leaves["x"] / leaves["x"].norm(dim=-1, keepdim=True)
    rates["inner_lr"] = 0.5 * torch.sigmoid(leaves["inner_lr"])
    for name, top in (("retention", 1.0), ("momentum", 1.0), ("erase", 1.4)):
        if name in leaves:
            rates[name] = top * torch.sigmoid(leaves[name])
    return rates


def scan(leaves: dict[str, Tensor], **settings: Any) -> list[Tensor]:
    """`chunk_scan` on the leaves; the results that are not None."""
    rates = rule_rates(leaves)
    for name in ("retention", "momentum"):
        if name in rates:
            rates[f"log_{name}"] = rates.pop(name).log()
    x, g, q = (rates.pop(n) for n in ("x", "g", "q"))
    return [t for t in chunk_scan(x, g, q, **rates, **settings) if t is not None]


def slow(leaves: dict[str, Tensor], **settings: Any) -> list[Tensor]:
    """`token_rule` on the leaves; the results that are not None."""
    rates = rule_rates(leaves)
    x, g, q = (rates.pop(n) for n in ("x", "g", "q"))
    return [t for t in token_rule(x, g, q, **rates, **settings) if t is not None]


def weigh(tensors: list[Tensor]) -> Tensor:
    """A scalar that depends on every entry."""
    generator = torch.Generator().manual_seed(9)
    return sum(((t * torch.randn(t.shape, dtype=t.dtype, generator=generator)).sum() for t in tensors), torch.zeros(()))


def assert_equal_with_gradients(found: list[Tensor], wanted: list[Tensor], leaves: dict[str, Tensor]) -> None:
    """Equal values, and equal gradients of every leaf."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    inputs = list(leaves.values())
    ours = torch.autograd.grad(weigh(found), inputs, retain_graph=True)
    pairs = zip(leaves, ours, torch.autograd.grad(weigh(wanted), inputs), strict=True)
    for name, a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_token_rule_by_hand() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    rates = {"retention": 0.5, "erase": 0.25, "inner_lr": 0.1, "momentum": 0.8}
    y, weight, surprise = token_rule(
        2 * one, 3 * one, 5 * one, weight=4 * one, surprise=6 * one, **{n: r * one[0] for n, r in rates.items()}
    )
    after = 0.8 * 6 - 0.1 * 3 * 2  # S = b S - l g x
    assert surprise is not None and surprise.item() == pytest.approx(after)
    assert weight.item() == pytest.approx(0.5 * 4 - 0.25 * (4 * 2) * 2 + after)  # W = a W - e (W x) x + S
    assert y.item() == pytest.approx(5 * weight.item())


def test_token_rule_online_takes_the_gradient_at_the_token_before() -> None:
    x = torch.eye(2, dtype=torch.float64)[[0, 0]]
    target = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    y, _, _ = token_rule(x, -target, x, weight=zero, inner_lr=half, online=True)
    assert y[:, 0].tolist() == [0.5, 0.75]
    y, _, _ = token_rule(x, -target, x, weight=zero, inner_lr=half, online=True, read_before=True)
    assert y[:, 0].tolist() == [0.0, 0.5]


@pytest.mark.parametrize("schedule", [None, "parallel", "sequential"])
@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize(("momentum", "erase", "online", "before"), MODES)
def test_scan_equals_the_reference(
    momentum: bool, erase: bool, online: bool, before: bool, size: int, schedule: str
) -> None:
    leaves = make_inputs(21, momentum, erase)
    settings = {"online": online, "read_before": before}
    found = scan(leaves, chunk_size=size, schedule=schedule, **settings)
    assert_equal_with_gradients(found, slow(leaves, **settings), leaves)


@pytest.mark.parametrize("schedule", [None, "parallel", "sequential"])
@pytest.mark.parametrize(("time", "size"), [(1, 8), (7, 8), (8, 8), (9, 8), (16, 8), (17, 16)])
@pytest.mark.parametrize(("momentum", "online"), [(False, False), (True, False), (True, True)])
def test_scan_at_the_edges_of_a_chunk(time: int, size: int, schedule: str, momentum: bool, online: bool) -> None:
    leaves = make_inputs(time, momentum, True, batch=())
    found = scan(leaves, chunk_size=size, schedule=schedule, online=online)
    assert_equal_with_gradients(found, slow(leaves, online=online), leaves)


@pytest.mark.parametrize("schedule", [None, "parallel", "sequential"])
def test_online_momentum_goes_on_from_its_state(schedule: str) -> None:
    """Any cut of a sequence gives the same outputs and states: the chunk size of an online rule is a schedule."""
    leaves = make_inputs(23, True, True)
    whole = scan(leaves, chunk_size=8, schedule=schedule, online=True)
    tokenwise = [n for n in leaves if n not in ("weight", "surprise")]
    outputs, carried = [], {n: leaves[n] for n in ("weight", "surprise")}
    for start, end in itertools.pairwise((0, 1, 9, 12, 23)):
        part = {n: leaves[n][:, :, start:end] for n in tokenwise} | carried
        y, *last = scan(part, chunk_size=5, schedule=schedule, online=True)
        outputs.append(y)
        carried = dict(zip(("weight", "surprise"), last, strict=True))
    assert_equal_with_gradients([torch.cat(outputs, -2), *carried.values()], whole, leaves)


@pytest.mark.parametrize("schedule", [None, "parallel", "sequential"])
@pytest.mark.parametrize("momentum", [False, True])
def test_scan_defaults_are_the_reference_defaults(momentum: bool, schedule: str) -> None:
    leaves = make_inputs(11, momentum, False)
    for name in ("retention", "inner_lr", "surprise"):
        leaves.pop(name, None)
    x, g, q, weight = (leaves[n] for n in ("x", "g", "q", "weight"))
    b = torch.sigmoid(leaves["momentum"]) if momentum else None
    log_b = None if b is None else b.log()
    found = chunk_scan(x, g, q, weight=weight, chunk_size=4, log_momentum=log_b, schedule=schedule)
    wanted = token_rule(x, g, q, weight=weight, momentum=b)
    assert_equal_with_gradients([t for t in found if t is not None], [t for t in wanted if t is not None], leaves)


@pytest.mark.parametrize("schedule", [None, "parallel", "sequential"])
def test_scan_can_forget_everything(schedule: str) -> None:
    """a = b = 0 (log -inf in the limit) wipes the past and stays finite in value and gradient."""
    leaves = make_inputs(12, True, True)
    rates = rule_rates(leaves)
    log_a, log_b = (rates[n].log().detach() for n in ("retention", "momentum"))
    log_a[..., 6], log_b[..., 6] = -800.0, -800.0
    log_a.requires_grad_(), log_b.requires_grad_()
    args = {n: rates[n] for n in ("x", "g", "q", "weight", "surprise", "erase", "inner_lr")}
    found = chunk_scan(**args, log_retention=log_a, log_momentum=log_b, chunk_size=8, schedule=schedule)
    wanted = token_rule(**args, retention=log_a.exp(), momentum=log_b.exp())
    everything = leaves | {"log_a": log_a, "log_b": log_b}
    del everything["retention"], everything["momentum"]
    assert_equal_with_gradients([t for t in found if t is not None], [t for t in wanted if t is not None], everything)


def test_scan_refuses() -> None:
    leaves = make_inputs(4, True, False)
    with pytest.raises(ValueError, match="schedule is 'parallel', 'sequential' or None, not 'both'"):
        scan(make_inputs(4, False, False), chunk_size=2, schedule="both")
    with pytest.raises(ValueError, match="a surprise needs log_momentum"):
        scan({n: t for n, t in leaves.items() if n != "momentum"}, chunk_size=2)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_tokens_that_are_not_there_change_nothing(momentum: bool, before: bool, erase: bool, online: bool) -> None:
    """`valid` False anywhere in a chunk = a chunk without those tokens, whatever their x, g, a and b hold."""
    leaves = make_inputs(9, momentum, erase)
    rates = rule_rates(leaves)
    valid = torch.tensor([False, True, True, False, False, True, True, True, False])

    def chunk(keep: Tensor, mask: Tensor | None) -> list[Tensor]:
        x, g, q, a, lr = (rates[n][:, :, keep] for n in ("x", "g", "q", "retention", "inner_lr"))
        present = torch.ones(()) if mask is None else mask
        b = rates["momentum"][:, :, keep].log() if momentum else None
        decay = decay_products(a.log(), b, mask)
        strength = rates["erase"][:, :, keep] * present if erase else None
        w, s = rates["weight"], rates.get("surprise")
        step, follows = (lr * present)[..., None] * g, lr * present if online else None
        writes = chunk_writes(x, step, strength, decay, w, s, online_lr=follows)
        y = chunk_read(q, writes, decay, w, s, before)
        after = chunk_advance(writes, decay, w, s)
        return [y if mask is None else y[..., mask, :], *(t for t in after if t is not None)]

    found = chunk(torch.ones_like(valid).nonzero()[:, 0], valid)
    assert_equal_with_gradients(found, chunk(valid.nonzero()[:, 0], None), leaves)


def test_decay_products_are_products() -> None:
    a, b = (torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    valid = torch.tensor([True, False, True, True, False, True])
    decay = decay_products(a.log(), b.log(), valid)
    assert decay.inner_momentum is not None and decay.start_momentum is not None
    assert decay.last_momentum is not None and decay.last_start_momentum is not None

    one, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def product(rate: Tensor, s: int, t: int) -> Tensor:
        return torch.stack([rate[:, r] for r in range(s, t + 1) if valid[r]] or [one]).prod(0)

    for t in range(6):
        torch.testing.assert_close(decay.start[:, t], product(a, 0, t))
        torch.testing.assert_close(decay.last_momentum[:, t], product(b, t + 1, 5))
        joint = sum(product(a, r + 1, t) * product(b, 0, r) for r in range(t + 1) if valid[r])
        torch.testing.assert_close(decay.start_momentum[:, t], joint + zero)
        for s in range(6):
            torch.testing.assert_close(decay.inner[:, t, s], product(a, s + 1, t) if s <= t else zero)
            both = [product(a, r + 1, t) * product(b, s + 1, r) for r in range(s, t + 1) if valid[r]]
            torch.testing.assert_close(decay.inner_momentum[:, t, s], torch.stack([zero, *both]).sum(0))
    torch.testing.assert_close(decay.last_start_momentum, product(b, 0, 5))


def test_decay_products_of_a_long_chunk_stay_accurate() -> None:
    """Logarithms: 512 retentions of 1e-3 underflow as products, their neighbours must not."""
    decay = decay_products(torch.full((512,), math.log(1e-3)))
    assert bool(torch.isfinite(decay.inner).all())
    torch.testing.assert_close(decay.inner.diagonal(-1), torch.full((511,), 1e-3), rtol=1e-3, atol=0)
    assert decay.inner.diagonal().tolist() == [1.0] * 512


def test_decay_broadcasts_a_new_dimension() -> None:
    decay = decay_products(torch.rand(2, 3, 4).log(), torch.rand(2, 3, 4).log())
    wide = decay.unsqueeze(-1)
    for name in ("inner", "start", "inner_momentum", "start_momentum", "last_momentum", "last_start_momentum"):
        assert torch.equal(getattr(wide, name), getattr(decay, name).unsqueeze(2)), name
    plain = decay_products(torch.rand(2, 3, 4).log()).unsqueeze(-1)
    assert plain.inner.shape == (2, 3, 1, 4, 4) and plain.inner_momentum is None


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_solve_reads_only_below_the_diagonal(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    full = torch.randn(2, size, size, dtype=torch.float64, generator=generator) / size
    right = torch.randn(2, size, 3, dtype=torch.float64, generator=generator)
    wanted = torch.linalg.solve(torch.eye(size, dtype=torch.float64) + full.tril(-1), right)
    torch.testing.assert_close(solve_unit_lower(full, right), wanted)


@pytest.mark.parametrize("schedule", [None, "parallel", "sequential"])
@pytest.mark.parametrize(
    ("momentum", "erase", "online"),
    [(True, True, False), (False, True, True), (True, False, False), (True, True, True), (True, False, True)],
)
def test_gradcheck(momentum: bool, erase: bool, online: bool, schedule: str) -> None:
    leaves = make_inputs(5, momentum, erase, batch=())
    names, tensors = list(leaves), tuple(leaves.values())

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(scan(dict(zip(names, values, strict=True)), chunk_size=2, online=online, schedule=schedule))

    # In a random direction where the schedule is given: None takes one of them.
    assert torch.autograd.gradcheck(run, tensors, fast_mode=schedule is not None)


@pytest.mark.parametrize("schedule", [None, "parallel", "sequential"])
@pytest.mark.parametrize("online", [False, True])
def test_float32_is_close_to_float64(schedule: str, online: bool) -> None:
    """A contraction does not amplify rounding, also over many chunks."""
    leaves = make_inputs(300, True, True)
    single = {n: t.detach().float() for n, t in leaves.items()}
    found = scan(single, chunk_size=64, schedule=schedule, online=online)
    for a, b in zip(found, slow(leaves, online=online), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
