"""Titans on long hostile streams: everything stays finite, and the fast weights stay bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.long_term_memory import LongTermState
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import MemoryAsContextConfig, MemoryAsGateConfig, NeuralMemoryConfig
from nestling.layers.rates import Gates, Scales, chunk_rates
from nestling.layers.sequence import SequenceLayer
from nestling.layers.titans import MemoryAsContext, MemoryAsGate
from nestling.memory.state import State
from nestling.ops.chunk_rule import chunk_scan
from nestling.ops.native import RateRule
from tests.layers.test_self_modifying_streams import CALL, HIDDEN, assert_bounded, hostile

BASE: dict[str, Any] = {"hidden_size": HIDDEN, "num_heads": 2}
LAYERS: dict[str, Callable[[], SequenceLayer]] = {
    "lmm": lambda: NeuralMemory(NeuralMemoryConfig(**BASE)),
    "lmm depth 1 chunk rates": lambda: NeuralMemory(NeuralMemoryConfig(**BASE, depth=1, rates="chunk", chunk_size=16)),
    "lmm depth 4": lambda: NeuralMemory(NeuralMemoryConfig(**BASE, depth=4)),
    "lmm online": lambda: NeuralMemory(NeuralMemoryConfig(**BASE, gradient="online", max_erase=2.0)),
    "lmm depth 1 online": lambda: NeuralMemory(
        NeuralMemoryConfig(**BASE, depth=1, gradient="online", max_erase=2.0, erase=True, use_retention=False)
    ),
    "moneta": lambda: NeuralMemory(
        NeuralMemoryConfig(**BASE, objective="lp", momentum=False, expansion=4, activation="gelu")
    ),
    "dla": lambda: NeuralMemory(
        NeuralMemoryConfig(**BASE, objective="dot", momentum=False, expansion=4, activation="gelu")
    ),
    "omeganet": lambda: NeuralMemory(NeuralMemoryConfig(**BASE, objective_window=8, momentum=False)),
    "memora": lambda: NeuralMemory(
        NeuralMemoryConfig(**BASE, divergence="kl", momentum=False, expansion=4, activation="gelu")
    ),
    "yaad without retention": lambda: NeuralMemory(
        NeuralMemoryConfig(**BASE, objective="huber", momentum=False, use_retention=False)
    ),
    "mac": lambda: MemoryAsContext(MemoryAsContextConfig(**BASE)),
    "mag": lambda: MemoryAsGate(MemoryAsGateConfig(**BASE)),
}
LONG = ("lmm", "lmm online", "lmm depth 1 chunk rates", "yaad without retention", "mac")

# Biases and shares that training could reach: every rate at one of its ends, in the combinations that matter.
EXTREMES: dict[str, dict[str, float]] = {
    "highest rate": {"theta": 20.0},
    "highest rate and share": {"theta": 20.0, "share": 10.0},
    "highest rate and share, forgets": {"theta": 20.0, "share": 10.0, "alpha": -60.0},
    "highest rate and share, keeps": {"theta": 20.0, "share": 10.0, "alpha": 60.0},
    "highest rate and share, long momentum": {"theta": 20.0, "share": 10.0, "alpha": 60.0, "eta": 4.0, "beta": 4.0},
    "large share, longest momentum": {"share": 10.0, "eta": 20.0, "beta": 20.0},
}
EXTREME_CONFIGS: dict[str, dict[str, Any]] = {
    "depth 1": {"depth": 1},
    "depth 1 chunk 1": {"depth": 1, "chunk_size": 1},
    "depth 1 odd chunk chunk rates": {"depth": 1, "chunk_size": 5, "rates": "chunk"},
    "depth 1 erase": {"depth": 1, "erase": True, "max_erase": 2.0},
    "depth 2": {},
    "depth 2 lp": {"objective": "lp"},
    "depth 2 dot": {"objective": "dot"},
    "depth 2 window": {"objective_window": 4},
    "depth 4": {"depth": 4},
    "depth 1 online": {"depth": 1, "gradient": "online", "max_erase": 2.0},
    "depth 1 online erase": {"depth": 1, "gradient": "online", "erase": True, "max_erase": 2.0},
    "depth 2 online": {"gradient": "online", "max_erase": 2.0},
    "depth 1 three steps": {"depth": 1, "chunk_size": 1, "inner_steps": 3, "momentum": False},
}


def long_term(state: State) -> LongTermState:
    """The memory's part of a layer's state."""
    found = state if isinstance(state, LongTermState) else state.memory  # type: ignore[attr-defined]
    assert isinstance(found, LongTermState)
    return found


@torch.no_grad()
def stream(layer: SequenceLayer, tokens: int, call: int) -> Tensor:
    """Largest entry of fast weights and surprises, `[calls, streams]`; fails at the first value that is not finite."""
    state, peaks = None, []
    for start in range(0, tokens, call):
        x = torch.stack(list(hostile(start, min(start + call, tokens)).values()))
        y, state = layer(x, state)
        held = [t for _, t in long_term(state).bank.tensors()]
        peaks.append(torch.stack([t.flatten(1).abs().amax(1) for t in held]).amax(0))
        good = torch.isfinite(y.flatten(1).sum(1)) & torch.isfinite(peaks[-1])
        broken = [n for n, g in zip(hostile(0, 1), good.tolist(), strict=True) if not g]
        assert not broken, f"not finite within {start + x.shape[1]} tokens: {broken}"
        assert state.first_nonfinite() is None
    return torch.stack(peaks)


def assert_linear(layer: NeuralMemory, peaks: Tensor, call: int) -> None:
    """No token adds more than the clip times the share to an entry.

    That is all that holds with the dot product: its writes do not shrink with what the memory holds, so that only the
    retention limits their sum, and a head may keep nearly everything. Those of hidden layers grow with the layers
    above, up to the clip.
    """
    first = max(float(w.detach().abs().max()) for w in layer.memory.bank.initial)
    written = layer.config.clip * float(torch.sigmoid(layer.memory.share.detach()).max())
    most = first + written * call * torch.arange(1, len(peaks) + 1)
    assert bool((peaks.amax(1) <= most).all()), f"{peaks.amax(1).tolist()}, but at most {most.tolist()}"


@pytest.mark.parametrize("name", LAYERS)
def test_ten_thousand_tokens(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    peaks = stream(layer, 10_000, 1000)
    if isinstance(layer, NeuralMemory) and layer.config.objective == "dot":
        assert_linear(layer, peaks, 1000)
    else:
        assert_bounded(peaks)


@pytest.mark.parametrize("beta", [-4.0, 0.0, 3.0])
@pytest.mark.parametrize("retention", [True, False])
def test_online_momentum_forgets_a_wrong_start_under_hostile_keys(beta: float, retention: bool) -> None:
    """1e5 tokens at the highest rate, few keys in an order made to excite: an error never grows in the norm of the
    bound, and a memory in float32 stays where its values are."""
    torch.manual_seed(0)
    tokens, width = 100_000, 4
    words = F.normalize(torch.randn(3, width), dim=-1)
    words[1] = F.normalize(words[0] + 0.3 * words[1], dim=0)
    order = torch.cat([torch.arange(tokens // 2) // 7 % 2, torch.randint(0, 3, (tokens // 2,))])
    share = torch.sigmoid(torch.tensor(beta))
    alpha = torch.full((1, 1, tokens), 2.0) + 4 * torch.randn(1, 1, tokens) if retention else None
    rates = chunk_rates(
        RateRule("online", 2.0, 1.0, online_only=True),
        Gates(40.0 * (torch.rand(1, 1, tokens) < 0.7) - 20.0, alpha, share.log().expand(1, 1, tokens), None),
        Scales(torch.zeros(1), torch.zeros(1) if retention else None, torch.ones(1, 1), None),
    )
    keys, values = words[order][None, None], torch.randn(3, width)[order][None, None]
    found = chunk_scan(
        keys, -values, keys, weight=100 * torch.randn(1, 1, width, width), chunk_size=64, online=True,
        log_retention=rates.decay.log_retention, log_momentum=rates.decay.log_momentum, inner_lr=rates.inner_lr[-1],
    )  # fmt: skip
    assert all(t is not None and bool(torch.isfinite(t).all()) for t in found)
    assert float(found[0][..., -1000:, :].abs().max()) < 200


def test_ascent_stays_finite() -> None:
    """A memory that climbs its loss grows, but no token writes without bound and it forgets."""
    torch.manual_seed(0)
    assert float(stream(NeuralMemory(NeuralMemoryConfig(**BASE, ascend=True)), 10_000, 1000).max()) < 1e4


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_million_tokens(name: str) -> None:
    torch.manual_seed(0)
    assert_bounded(stream(LAYERS[name](), 1_000_000, CALL))


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", EXTREME_CONFIGS)
def test_rates_at_their_ends_are_stable(name: str, extreme: str) -> None:
    """No bias or share makes a memory diverge; it would be exponential, so a generous bound finds it."""
    torch.manual_seed(0)
    layer = NeuralMemory(NeuralMemoryConfig(**BASE | {"chunk_size": 16} | EXTREME_CONFIGS[name]))
    with torch.no_grad():
        for key, value in EXTREMES[extreme].items():
            held = getattr(layer.memory, key, None)
            if held is not None:
                held.fill_(value)
            elif key in layer.config.gates:
                layer.memory.rate_bias[layer.config.gates.index(key)] = value
    peaks = stream(layer, 400, 200)
    if layer.config.objective == "dot":
        assert_linear(layer, peaks, 200)
        return
    assert float(peaks.max()) < 200, f"fast weights reach {float(peaks.max()):.3g} in 400 tokens"


@pytest.mark.parametrize("name", LAYERS)
def test_float32_gradients_are_finite(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.stack(list(hostile(0, 160).values()))
    if not isinstance(layer, NeuralMemory):
        # As a block would: scores of 10^12 leave torch's attention no digits for its backward pass.
        x = F.rms_norm(x, (HIDDEN,))
    x.requires_grad_()
    y, state = layer(x)
    (y.sum() + sum(t.square().sum() for t in long_term(state).bank.running)).backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), key


def test_enormous_inputs_do_not_overflow() -> None:
    """1e30 in, finite out, in value and gradient: the memory sees directions, and values of bounded length."""
    torch.manual_seed(0)
    layer = NeuralMemory(NeuralMemoryConfig(**BASE, output_gate=False, objective="lp", p=4.0))
    x = (1e30 * torch.randn(2, 40, HIDDEN)).requires_grad_()
    y, state = layer(x)
    assert bool(torch.isfinite(y).all()) and state.first_nonfinite() is None
    y.sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
