"""Banks of memories: first weights and activations. The rest of a bank is tested against the layer's reference."""

from __future__ import annotations

import math

import pytest
import torch

from nestling.memory.activation import activate
from nestling.memory.bank import MemoryBank


@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_activations_and_their_slopes(name: str) -> None:
    z = torch.linspace(-4, 4, 41, dtype=torch.float64)[torch.arange(41) != 20].requires_grad_()
    h, slope = activate(name, z)
    wanted = getattr(torch.nn.functional, name)(z)
    torch.testing.assert_close(h, wanted)
    torch.testing.assert_close(slope, torch.autograd.grad(wanted.sum(), z)[0])
    (found,) = torch.autograd.grad(h.sum(), z, retain_graph=True)
    torch.testing.assert_close(found, slope.detach())
    assert torch.autograd.gradcheck(lambda t: activate(name, t)[1], (z,))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_outputs_start_at_unit_variance(depth: int) -> None:
    """For inputs of length 1: matrix outputs of length about 1, gate logits of variance about 1, MLPs near identity."""
    width = 32
    bank = MemoryBank(("memory", "k"), ("eta", "alpha"), 8, width, depth, 2, "silu")
    x = torch.nn.functional.normalize(torch.randn(1, 8, 64, width), dim=-1)
    weights = bank(1, False, torch.float32).start
    made = {n: t.detach() for n, t in bank.read(weights, {"memory": x, "k": x, "gates": x}).items()}
    assert made["k"].shape == (1, 8, 64, width) and made["eta"].shape == (1, 8, 64)
    for gate in ("eta", "alpha"):
        assert 0.7 < float(made[gate].std()) < 1.4
    if depth == 1:
        assert 0.8 < float(made["k"].norm(dim=-1).mean()) < 1.2
    else:
        cosine = torch.nn.functional.cosine_similarity(made["k"], x, dim=-1)
        assert float(cosine.mean()) > 0.3


@pytest.mark.parametrize("depth", [1, 2])
def test_reading_some_memories_is_reading_all(depth: int) -> None:
    bank = MemoryBank(("memory", "k", "v"), ("eta",), 2, 4, depth, 1, "gelu").double()
    weights = bank(3, False, torch.float64).start
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    everything = bank.read(weights, dict.fromkeys(("memory", "k", "v", "gates"), x))
    some = bank.read(weights, dict.fromkeys(("k", "v", "gates"), x))
    assert list(some) == ["k", "v", "eta"]
    for name, tensor in some.items():
        torch.testing.assert_close(tensor, everything[name])


@pytest.mark.parametrize("momentum", [False, True])
def test_initial_state(momentum: bool) -> None:
    bank = MemoryBank(("memory",), ("eta",), 2, 4, 2, 3, "silu")
    state = bank(5, momentum, torch.float32)
    assert all(t.shape[0] == 5 for _, t in state.tensors())
    assert (state.surprise is not None) == momentum
    assert all(not bool(s.any()) for s in state.surprise or [])
    # The first weights of MLPs and gates are stored small and used at sqrt(width) times that.
    torch.testing.assert_close(state.start[0][0], bank.initial[0] * math.sqrt(4))
    torch.testing.assert_close(state.start[1][4], bank.initial[1])
    assert all(torch.equal(a, b) for a, b in zip(state.start, state.running, strict=True))
    sum(t.sum() for t in state.running).backward()
    assert all(p.grad is not None for p in bank.parameters())


@pytest.mark.parametrize("depth", [1, 2])
def test_a_gate_scale_leaves_the_first_fast_weights_and_lengthens_the_optimizers_steps(depth: int) -> None:
    banks = []
    for scale in (1.0, 16.0):
        torch.manual_seed(0)
        banks.append(MemoryBank(("memory", "k"), ("eta",), 2, 4, depth, 3, "silu", gate_scale=scale).double())
    states = [bank(2, False, torch.float64) for bank in banks]
    for plain, scaled in zip(states[0].start, states[1].start, strict=True):
        torch.testing.assert_close(plain, scaled)
    for state in states:
        sum(t.square().sum() for t in state.start).backward()
    plain, scaled = (bank.initial[0].grad for bank in banks)
    torch.testing.assert_close(scaled[:, -1], 16 * plain[:, -1])
    torch.testing.assert_close(scaled[:, :-1], plain[:, :-1])
    torch.testing.assert_close(banks[0].initial[0][:, -1], 16 * banks[1].initial[0][:, -1])
