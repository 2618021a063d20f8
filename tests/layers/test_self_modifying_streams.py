"""Self-modifying Titans on long hostile streams: everything stays finite, and the fast weights stay bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.layers.sequence import SequenceLayer
from nestling.memory.state import State

HIDDEN = 16
CALL = 4096

CONFIGS: dict[str, dict[str, Any]] = {
    "mlp momentum": {"momentum": True},
    "mlp no erase self chunk": {"erase": False, "self_chunk_size": 256},
    "matrix online": {"memory": "matrix", "gradient": "online"},
    "matrix dot momentum": {"memory": "matrix", "objective": "dot", "momentum": True},
}

# Biases and shares that training could reach: every rate at one of its ends, in the combinations that matter.
EXTREMES: dict[str, dict[str, float]] = {
    "high rate": {"eta_bias": 4.0},
    "highest rate": {"eta_bias": 20.0},
    "highest rate, forgets": {"eta_bias": 20.0, "alpha_bias": -30.0},
    "highest rate, keeps": {"eta_bias": 20.0, "alpha_bias": 30.0},
    "highest rate, large share": {"eta_bias": 20.0, "share": 10.0},
    "large share, hidden layers keep": {"eta_bias": 2.0, "share": 10.0, "hidden_erase": -10.0},
    "large share": {"share": 10.0},
}
EXTREME_CONFIGS: dict[str, dict[str, Any]] = {
    "matrix": {"memory": "matrix"},
    "matrix odd chunk momentum": {"memory": "matrix", "chunk_size": 5, "momentum": True},
    "matrix chunk 1": {"memory": "matrix", "chunk_size": 1},
    "matrix online": {"memory": "matrix", "gradient": "online"},
    "matrix no erase chunk 1 in 16": {"memory": "matrix", "erase": False, "chunk_size": 1, "self_chunk_size": 16},
    "mlp momentum": {"momentum": True},
    "mlp dot": {"objective": "dot"},
    "mlp online no erase": {"gradient": "online", "erase": False},
}


def make_layer(**settings: Any) -> SelfModifyingTitans:
    """A float32 layer at its first parameters."""
    torch.manual_seed(0)
    return SelfModifyingTitans(SelfModifyingConfig(**{"hidden_size": HIDDEN, "num_heads": 2} | settings))


def hostile(start: int, end: int) -> dict[str, Tensor]:
    """Tokens `start` to `end` of every hostile stream, `[tokens, hidden]`."""
    generator = torch.Generator().manual_seed(start)
    count = end - start
    noise = torch.randn(count, HIDDEN, generator=generator)
    words = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(99))
    slot = torch.arange(start, end)[:, None]
    sign = 1.0 - 2.0 * (slot % 2)
    return {
        "constant": words[0].expand(count, HIDDEN),
        "constant huge": 1e6 * words[0].expand(count, HIDDEN),
        "zeros": torch.zeros(count, HIDDEN),
        "alternating signs": sign * words[0],
        "alternating huge and tiny": words[1] * torch.where(slot % 2 == 0, 1e6, 1e-6),
        "random": noise,
        "random norms to 1e6": noise * 10.0 ** (10 * torch.rand(count, 1, generator=generator) - 4),
        "four words": words[torch.randint(0, 4, (count,), generator=generator)],
        "silence with spikes": torch.where(slot % 97 == 0, 1e4 * noise, 0.0),
    }


def largest(state: State) -> Tensor:
    """Largest entry of the fast weights and surprises, for every row."""
    tensors = [t for name, t in state.tensors() if name not in ("conv", "position")]
    return torch.stack([t.flatten(1).abs().amax(1) for t in tensors]).amax(0)


@torch.no_grad()
def stream(layer: SequenceLayer, tokens: int, call: int) -> Tensor:
    """Peaks `[calls, streams]` of `largest`; fails at the first value that is not finite."""
    state, peaks = None, []
    names = list(hostile(0, 1))
    for start in range(0, tokens, call):
        x = torch.stack(list(hostile(start, min(start + call, tokens)).values()))
        y, state = layer(x, state)
        peaks.append(largest(state))
        good = torch.isfinite(y.flatten(1).sum(1)) & torch.isfinite(peaks[-1])
        broken = [n for n, g in zip(names, good.tolist(), strict=True) if not g]
        assert not broken, f"not finite within {start + x.shape[1]} tokens: {broken}"
    assert state is not None and state.first_nonfinite() is None
    return torch.stack(peaks)


def assert_bounded(peaks: Tensor) -> None:
    """The last tenth is not above three times the first tenth, stream by stream."""
    tenth = max(len(peaks) // 10, 1)
    growth = peaks[-tenth:].amax(0) / peaks[:tenth].amax(0).clamp_min(1.0)
    report = {n: round(g, 2) for n, g in zip(hostile(0, 1), growth.tolist(), strict=True)}
    assert bool((growth <= 3).all()), f"the fast weights grow: {report}"


@pytest.mark.parametrize("name", CONFIGS)
def test_twenty_thousand_tokens(name: str) -> None:
    assert_bounded(stream(make_layer(**CONFIGS[name]), 20_000, 1000))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_million_tokens(name: str) -> None:
    assert_bounded(stream(make_layer(**CONFIGS[name]), 1_000_000, CALL))


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", EXTREME_CONFIGS)
def test_rates_at_their_ends_are_stable(name: str, extreme: str) -> None:
    """No value of a bias or a share makes a memory diverge; it would be exponential, so a generous bound finds it."""
    layer = make_layer(**{"chunk_size": 16} | EXTREME_CONFIGS[name])
    with torch.no_grad():
        for key, value in EXTREMES[extreme].items():
            parameter = getattr(layer, key)
            if parameter is not None:
                parameter.fill_(value)
    peaks = stream(layer, 400, 200)
    assert float(peaks.max()) < 200, f"fast weights reach {float(peaks.max()):.3g} in 400 tokens"


def test_dot_product_without_erase_grows_at_most_by_the_clip_a_token() -> None:
    """Linear attention has no fixed point: nothing pulls the memory back but the retention, which can be 1."""
    layer = make_layer(memory="matrix", objective="dot", erase=False, use_retention=False, chunk_size=16, clip=0.5)
    first = largest(layer.init_state(1))
    peaks = stream(layer, 4000, 400)
    tokens = torch.arange(400, 4001, 400)[:, None]
    assert bool((peaks <= first + 0.5 * tokens).all())


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_gradients_are_finite(name: str) -> None:
    layer = make_layer(**CONFIGS[name] | {"chunk_size": 16, "self_chunk_size": 32})
    x = torch.stack(list(hostile(0, 160).values())).requires_grad_()
    y, state = layer(x)
    (y.sum() + sum(t.square().sum() for t in state.main.running)).backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), key


@pytest.mark.parametrize("settings", [{}, {"gradient": "online", "erase": False}], ids=["momentum", "online"])
def test_gradients_are_finite_when_a_token_wipes_the_memory(settings: dict[str, Any]) -> None:
    """a and b near 0: products over a chunk run over the whole range of float32."""
    layer = make_layer(**{"momentum": not settings} | settings, chunk_size=64)
    with torch.no_grad():
        layer.alpha_bias.fill_(-400.0)
        if layer.momentum_proj is not None:
            layer.momentum_proj.bias.fill_(-100.0)
    x = torch.randn(2, 150, HIDDEN).requires_grad_()
    y, state = layer(x)
    (y.sum() + sum(t.square().sum() for t in state.main.running)).backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    for key, parameter in layer.named_parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), key


def test_enormous_inputs_do_not_overflow() -> None:
    """1e30 in, finite out, in value and gradient: the memories see directions only."""
    layer = make_layer(momentum=True, output_gate=False)
    x = (1e30 * torch.randn(2, 40, HIDDEN)).requires_grad_()
    y, state = layer(x)
    assert bool(torch.isfinite(y).all()) and state.first_nonfinite() is None
    y.sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
