"""The neural memory: equal to the equations token by token, and settings that must equal other rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.long_term_memory import LongTermMemory, LongTermState
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.layers.sequence import SequenceLayer
from nestling.ops.reference import token_rule
from tests.layers.battery import gradients, noise, weigh
from tests.layers.reference_titans import SlowMemory, slow_neural_memory

CASES: dict[str, dict[str, Any]] = {
    "depth 1": {"depth": 1},
    "depth 1 no momentum": {"depth": 1, "momentum": False},
    "depth 1 no retention": {"depth": 1, "use_retention": False},
    "depth 1 chunk rates": {"depth": 1, "rates": "chunk"},
    "depth 1 chunk 1": {"depth": 1, "chunk_size": 1},
    "depth 1 one chunk": {"depth": 1, "chunk_size": 64},
    "depth 1 dot": {"depth": 1, "objective": "dot"},
    "depth 1 online": {"depth": 1, "gradient": "online", "momentum": False},
    "depth 1 online erase": {"depth": 1, "gradient": "online", "momentum": False, "erase": True},
    "depth 1 online momentum": {"depth": 1, "gradient": "online", "max_erase": 2.0},
    "depth 1 online momentum erase": {"depth": 1, "gradient": "online", "erase": True},
    "depth 1 online momentum, no retention": {"depth": 1, "gradient": "online", "use_retention": False},
    "depth 1 online momentum, chunk rates, read before": {
        "depth": 1,
        "gradient": "online",
        "rates": "chunk",
        "read_before": True,
    },
    "depth 2 online momentum": {"gradient": "online", "max_erase": 2.0, "gate_bias": 1.0},
    "depth 2 online momentum erase": {"gradient": "online", "erase": True, "expansion": 2, "activation": "relu"},
    "depth 2 online": {"gradient": "online", "momentum": False},
    "depth 3 online momentum": {"depth": 3, "gradient": "online"},
    "depth 2 online dot momentum": {"gradient": "online", "objective": "dot"},
    "depth 1 read before": {"depth": 1, "read_before": True},
    "depth 2": {},
    "depth 2 persistent tokens": {"persistent_tokens": 3},
    "depth 1 online persistent tokens": {"depth": 1, "gradient": "online", "persistent_tokens": 6, "rates": "chunk"},
    "depth 2 no momentum": {"momentum": False, "activation": "gelu"},
    "depth 2 erase": {"erase": True, "max_erase": 2.0},
    "depth 2 chunk rates": {"rates": "chunk"},
    "depth 2 lp (Moneta)": {"objective": "lp", "momentum": False, "expansion": 2, "activation": "gelu"},
    "depth 2 huber (Yaad)": {"objective": "huber", "delta": 0.4, "momentum": False, "activation": "gelu"},
    "depth 2 dot (DLA)": {"objective": "dot", "momentum": False, "expansion": 2, "activation": "gelu"},
    "depth 1 window": {"depth": 1, "objective_window": 3},
    "depth 2 window (OmegaNet)": {"objective_window": 3, "momentum": False, "expansion": 2, "activation": "gelu"},
    "depth 2 window longer than a chunk": {"objective_window": 7},
    "depth 2 window longer than the text chunk rates": {"objective_window": 30, "rates": "chunk"},
    "depth 3 window read before": {"depth": 3, "objective_window": 2, "read_before": True},
    "depth 2 window chunk read": {"objective_window": 4, "read": "chunk", "objective": "huber", "delta": 0.4},
    "depth 2 window ascending": {"objective_window": 3, "ascend": True},
    "depth 2 clipped": {"clip": 0.2},
    "depth 2 chunk read": {"read": "chunk"},
    "depth 2 plain face": {"conv_size": 1, "output_gate": False, "inner_lr_scale": 0.7},
    "depth 3": {"depth": 3, "activation": "relu"},
    "depth 3 chunk rates no retention": {"depth": 3, "rates": "chunk", "use_retention": False},
    "depth 4": {"depth": 4, "expansion": 2},
    "depth 2 ascending": {"ascend": True},
    "depth 1 three steps": {"depth": 1, "inner_steps": 3, "chunk_size": 1},
    "depth 2 two steps": {"inner_steps": 2, "chunk_size": 1, "momentum": False},
}


def shake(layer: nn.Module) -> None:
    """Move every parameter away from its first value, so that no gradient is zero by luck."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def make_layer(**settings: Any) -> NeuralMemory:
    """A float64 layer."""
    torch.manual_seed(0)
    layer = NeuralMemory(NeuralMemoryConfig(**{"hidden_size": 8, "num_heads": 2, "chunk_size": 4} | settings)).double()
    shake(layer)
    return layer


def bank_tensors(state: LongTermState) -> list[Tensor]:
    """Start and running weights, and surprises."""
    return [*state.bank.start, *state.bank.running, *(state.bank.surprise or ())]


def assert_equals_reference(
    layer: SequenceLayer, slow: SlowMemory, x: Tensor, y: Tensor, expected: Tensor, state: LongTermState
) -> None:
    """Outputs, memories after the last token, and gradients of the input and of every parameter through both."""
    depth = layer.config.depth  # type: ignore[union-attr]
    count = 3 * depth if state.bank.surprise is not None else 2 * depth
    found = [t if i % depth == 0 else t.squeeze(2) for i, t in enumerate(bank_tensors(state))]
    wanted = [*slow.memory.start, *slow.memory.running, *slow.memory.surprise][:count]
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    scalars = [
        weigh(out) + sum((weigh(t) for t in rest), torch.zeros(())) for out, rest in ((y, found), (expected, wanted))
    ]
    for a, b in zip(*(gradients(s, [x], layer) for s in scalars), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_equations_token_by_token(name: str) -> None:
    layer = make_layer(**CASES[name])
    x = noise(2, 11, 8).requires_grad_()
    slow = SlowMemory(layer.memory, 2)
    expected = slow_neural_memory(layer, x, slow)
    y, state = layer(x)
    assert_equals_reference(layer, slow, x, y, expected, state)


@pytest.mark.parametrize("name", ["depth 1", "depth 2 chunk rates", "depth 2 window (OmegaNet)", "depth 4"])
def test_everything_that_is_learned_receives_a_gradient(name: str) -> None:
    layer = make_layer(**CASES[name])
    weigh(layer(noise(2, 20, 8))[0]).backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), key


def test_gradcheck_of_the_whole_layer() -> None:
    layer = make_layer(hidden_size=4, chunk_size=2, conv_size=2, rates="chunk")
    names = [n for n, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y, state = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return (y, *bank_tensors(state))

    assert torch.autograd.gradcheck(run, (noise(1, 5, 4).requires_grad_(), *values), fast_mode=True)


def projections(memory: LongTermMemory, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[N, H, T, D]` without a convolution."""
    streams = F.silu(x @ memory.in_proj.weight.mT * memory.conv[:, 0])
    q, k, v = (s.unflatten(-1, (memory.config.num_heads, -1)).transpose(1, 2) for s in streams.chunk(3, -1))
    v = v / v.square().mean(-1, keepdim=True).sqrt().clamp_min(1.0)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def test_depth_1_without_momentum_in_chunks_of_1_is_the_gated_delta_rule() -> None:
    """Titans appendix C: W <- a W - l (W k - v) k^T, read after the write."""
    layer = make_layer(depth=1, momentum=False, chunk_size=1, conv_size=1, output_gate=False, clip=1e6)
    memory, x = layer.memory, noise(2, 21, 8)
    q, k, v = projections(memory, x)
    logits = (x @ memory.rate_proj.weight.mT).unflatten(-1, (2, 2)) + memory.rate_bias
    theta, alpha = logits.permute(2, 0, 3, 1)
    rate = torch.sigmoid(theta) * torch.sigmoid(memory.share[0])[:, None]
    weight = memory.bank.initial[0].expand(2, -1, -1, -1)
    y, last, _ = token_rule(
        k, -v, q, weight=weight, retention=torch.sigmoid(alpha) ** (1 / 16), inner_lr=rate, online=True
    )
    found, state = layer(x)
    torch.testing.assert_close(state.bank.running[0], last, rtol=1e-9, atol=1e-11)
    o = (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * memory.norm).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(found, layer.out_proj(o), rtol=1e-9, atol=1e-11)


def unit_streams(rows: int, time: int) -> Tensor:
    """x `[rows, time, 8]` for which silu(x) has length 1 in each of two heads."""
    wanted = F.normalize(noise(rows, time, 2, 4).abs() + 0.1, dim=-1).flatten(-2)
    x = wanted.clone()
    for _ in range(60):
        gate = torch.sigmoid(x)
        x = x - (x * gate - wanted) / (gate * (1 + x * (1 - gate)))
    torch.testing.assert_close(F.silu(x), wanted)
    return x


@pytest.mark.parametrize("kind", ["matrix", "mlp"])
def test_self_modifying_titans_with_nothing_adaptive_and_no_erase_are_titans(kind: str) -> None:
    """Fixed memories for k and v that are the identity, constant rates, a momentum that depends on the token."""
    depth = 1 if kind == "matrix" else 2
    own = make_layer(depth=depth, conv_size=1)
    config = SelfModifyingConfig(
        hidden_size=8, num_heads=2, memory=kind, adapt=("memory",), self_targets=False, erase=False, momentum=True,
        chunk_size=4, conv_size=1,
    )  # fmt: skip
    other = SelfModifyingTitans(config).double()
    eye = torch.eye(8, dtype=torch.float64)
    flip = eye.flip(0).unflatten(0, (2, 4)).flip(0).flatten(0, 1)  # reverses the channels of each head
    memory = own.memory
    assert other.fixed is not None and other.momentum_proj is not None and other.alpha_bias is not None
    assert own.gate_proj is not None and other.gate_proj is not None
    with torch.no_grad():
        memory.conv.fill_(1.0)
        other.conv.fill_(1.0)
        memory.in_proj.weight.copy_(torch.cat([flip, eye, eye]))
        other.in_proj.weight.copy_(torch.cat([eye, flip]))
        for i, weight in enumerate(other.fixed.initial):
            weight.zero_()
            if i == 0 and kind == "matrix":
                weight[:, :8] = torch.eye(4).repeat(2, 1)
        theta, alpha, eta = memory.rate_proj.weight.unflatten(0, (3, 2))
        theta.zero_()
        alpha.zero_()
        other.eta_bias.copy_(memory.rate_bias[0])
        other.alpha_bias.copy_(memory.rate_bias[1])
        other.momentum_proj.weight.copy_(eta)
        other.momentum_proj.bias.copy_(memory.rate_bias[2])
        other.share.copy_(memory.share)
        for a, b in zip(other.main.initial, memory.bank.initial, strict=True):
            a.copy_(b)
        other.out_norm.copy_(memory.norm)
        other.out_proj.weight.copy_(own.out_proj.weight)
        other.gate_proj.weight.copy_(own.gate_proj.weight)
    x = unit_streams(2, 13)
    y, state = own(x)
    expected, wanted = other(x)
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-9)
    for a, b in zip(state.bank.running, wanted.main.running, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_retrieving_is_reading_before_the_write_and_changes_nothing(depth: int) -> None:
    layer = make_layer(depth=depth, read_before=True)
    _, state = layer(noise(2, 6, 8))
    kept = [t.clone() for _, t in state.tensors()]
    x = noise(2, 5, 8, seed=3)
    found = layer.retrieve(x, state)
    assert all(torch.equal(a, b) for a, (_, b) in zip(kept, state.tensors(), strict=True))
    torch.testing.assert_close(found[:, :1], layer(x[:, :1], state)[0])
    slow = SlowMemory(layer.memory, 2)
    slow_neural_memory(layer, noise(2, 6, 8), slow)
    slow.query_streams = [s[:, :8] for s in slow.streams]
    for t in range(5):
        m = slow.answer(slow.memory.running, slow.query(x[:, t]))
        wanted = layer.out_proj(m * F.silu(layer.gate_proj(x[:, t])))  # type: ignore[misc]
        torch.testing.assert_close(found[:, t], wanted, rtol=1e-9, atol=1e-11)


def test_first_values() -> None:
    settings = {"num_heads": 4, "retention_start": (2.0, 8.0), "first_momentum": 0.2, "gate_bias": 1.5}
    layer = NeuralMemory(NeuralMemoryConfig(hidden_size=32, **settings))
    memory = layer.memory
    alpha, eta = (memory.rate_bias[memory.config.gates.index(n)] for n in ("alpha", "eta"))
    assert alpha.tolist() == pytest.approx([2.0, 4.0, 6.0, 8.0])
    assert torch.sigmoid(eta).tolist() == pytest.approx([0.2] * 4)
    assert layer.gate_proj is not None and layer.gate_proj.bias.tolist() == [1.5] * 32
    assert float(layer.gate_proj.weight.abs().max()) <= 0.1 / 32**0.5
    memory = NeuralMemory(NeuralMemoryConfig(hidden_size=32, gradient="online", **settings)).memory
    assert memory.beta is not None and torch.sigmoid(memory.beta).tolist() == pytest.approx([0.2] * 4)


def test_chunk_rates_hold_those_of_the_first_token() -> None:
    """Other inputs to the rates inside a chunk change nothing; at its first token they do."""
    layer = make_layer(rates="chunk")
    logits: list[Tensor] = []
    layer.memory.rate_proj.register_forward_hook(lambda m, i, o: logits.append(o) or o)
    x = noise(1, 8, 8)
    y, _ = layer(x)
    for token, matters in ((0, True), (1, False), (3, False), (4, True), (7, False)):
        change = torch.zeros(1, 8, logits[0].shape[-1], dtype=torch.float64)
        change[:, token] = 1.0
        hook = layer.memory.rate_proj.register_forward_hook(lambda m, i, o, c=change: o + c)
        other, _ = layer(x)
        hook.remove()
        assert torch.allclose(y, other) != matters, token


def test_autocast_keeps_a_float32_state() -> None:
    layer = NeuralMemory(NeuralMemoryConfig(hidden_size=32, num_heads=2, chunk_size=8, rates="chunk"))
    x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    y, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half, state = layer(x)
    for name, tensor in state.tensors():
        assert tensor.dtype == (torch.int64 if name == "position" else torch.float32), name
    assert half.dtype == torch.bfloat16
    assert bool((half.float() - y).norm() < 0.05 * y.norm())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": 3}, "hidden_size 8 is not a multiple of num_heads 3"),
    ({"depth": 5}, "depth is 1, 2, 3 or 4, not 5"),
    ({"depth": 0}, "depth is 1, 2, 3 or 4, not 0"),
    ({"activation": "tanh"}, "activation is 'silu', 'gelu' or 'relu', not 'tanh'"),
    ({"rates": "layer"}, "rates is 'token' or 'chunk', not 'layer'"),
    ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ({"max_erase": 2.5}, r"max_erase is in \(0, 2\], not 2.5"),
    ({"inner_lr_scale": 1.0}, r"inner_lr_scale is in \(0, 1\), not 1.0"),
    ({"first_momentum": 0.0}, r"first_momentum is in \(0, 1\), not 0.0"),
    ({"retention_start": (1.0,)}, r"retention_start is two logits, first head and last, not \(1.0,\)"),
    ({"persistent_tokens": -1}, "persistent_tokens must be at least 0, not -1"),
    ({"inner_steps": 2}, "inner_steps=2 needs chunk_size=1, not 64"),
    ({"inner_steps": 2, "chunk_size": 1, "read_before": True}, "has no meaning with more"),
    ({"ascend": True, "erase": True}, "ascend needs chunk gradients, no erase, and retention"),
    ({"ascend": True, "use_retention": False}, "ascend needs chunk gradients, no erase, and retention"),
    ({"objective_window": 0}, "objective_window must be at least 1"),
    ({"objective_window": 2, "erase": True}, "objective_window=2 needs chunk gradients"),
    ({"objective_window": 2, "momentum": False, "gradient": "online"}, "objective_window=2 needs chunk gradients"),
    ({"gradient": "online", "momentum": False, "objective": "lp"}, "needs objective 'l2' or 'dot'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_refuses_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralMemoryConfig(**{"hidden_size": 8, "num_heads": 2} | settings)


def test_a_state_of_another_layer_is_refused() -> None:
    other = SelfModifyingTitans(SelfModifyingConfig(hidden_size=8, num_heads=2)).double()
    x = noise(1, 3, 8)
    with pytest.raises(TypeError, match="continues from a LongTermState"):
        make_layer()(x, other(x)[1])
