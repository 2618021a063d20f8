"""The continuum memory at the ends of its settings: a plain MLP, hostile input, precision, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling.layers.attention import AttentionConfig, SoftmaxAttention
from nestling.layers.continuum import ContinuumConfig, ContinuumLevel, ContinuumMemory, ContinuumState, LevelState
from nestling.layers.feed_forward import FeedForward, FeedForwardConfig
from nestling.ops.reference import token_rule
from tests.layers.battery import noise
from tests.layers.test_continuum import HIDDEN, VARIANTS, fast_levels, make_layer


def twin(layer: ContinuumMemory, **settings: Any) -> ContinuumMemory:
    """A layer of other settings with the same parameters, as far as it has them."""
    other = ContinuumMemory(dataclasses.replace(layer.config, **settings)).double()
    other.load_state_dict(layer.state_dict(), strict=False)
    return other


def first_level(layer: ContinuumMemory) -> ContinuumLevel:
    """The level that reads the layer's input."""
    part = layer.levels[0]
    assert isinstance(part, ContinuumLevel)
    return part


def set_scalar(layer: ContinuumMemory, name: str, value: float) -> None:
    """Set `rate` or `transfer` of every level that has one."""
    with torch.no_grad():
        for part in layer.levels:
            parameter = getattr(part, name)
            if parameter is not None:
                parameter.fill_(value)


def plain_chain(layer: ContinuumMemory, x: Tensor) -> Tensor:
    """The residual SwiGLU networks of all levels with ordinary weights."""
    total = x
    for i, part in enumerate(layer.levels):
        assert isinstance(part, ContinuumLevel)
        network = FeedForward(FeedForwardConfig(layer.config.hidden_size, layer.config.intermediate_size)).double()
        weights = {"gate.weight": part.gate.weight, "up.weight": part.up.weight, "down.weight": part.down}
        network.load_state_dict(weights)
        y = network(part.norm(x))
        if layer.weights is None:
            x = total = x + y
        else:
            total = total + layer.weights[i] * y
    return total


@pytest.mark.parametrize("variant", VARIANTS)
def test_levels_that_never_update_are_feed_forward_networks(variant: str) -> None:
    layer = make_layer(variant=variant, periods=(None, None, None))
    x = noise(2, 13, HIDDEN)
    y, state = layer(x)
    torch.testing.assert_close(y, plain_chain(layer, x))
    assert state.levels == [None, None, None]
    assert not any("rate" in name or "value" in name for name, _ in layer.named_parameters())


@pytest.mark.parametrize("erase", [False, True], ids=["plain", "erase"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_period_longer_than_the_text_is_a_feed_forward_network(variant: str, erase: bool) -> None:
    layer = make_layer(variant=variant, periods=(14, 28), erase=erase)
    x = noise(2, 13, HIDDEN)
    y, levels = fast_levels(layer, x)
    torch.testing.assert_close(y, plain_chain(layer, x))
    for part, level in zip(layer.levels, levels, strict=True):
        assert torch.equal(level.start, part.down.expand_as(level.start))
        assert not torch.equal(level.running, level.start)
    assert not torch.allclose(layer(noise(2, 15, HIDDEN))[0][:, 14:], plain_chain(layer, noise(2, 15, HIDDEN))[:, 14:])


@pytest.mark.parametrize("erase", [False, True], ids=["plain", "erase"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rate_zero_is_a_feed_forward_network(variant: str, erase: bool) -> None:
    layer = make_layer(variant=variant, periods=VARIANTS[variant], erase=erase)
    x = noise(2, 21, HIDDEN)
    assert not torch.allclose(layer(x)[0], plain_chain(layer, x))
    set_scalar(layer, "rate", -math.inf)
    torch.testing.assert_close(layer(x)[0], plain_chain(layer, x), rtol=1e-12, atol=1e-12)


def test_nested_without_transfer_starts_every_context_from_the_first_weights() -> None:
    layer = make_layer(periods=(2, 6, None), variant="nested", target="value")
    set_scalar(layer, "transfer", -math.inf)
    x = noise(2, 18, HIDDEN)
    first = twin(layer, periods=(2,))
    state = None
    for context in x.split(6, 1):
        _, state = layer(context, state)
        level = state.levels[0]
        assert isinstance(level, LevelState) and level.initial is not None
        for weight in (level.start, level.running, level.initial):
            assert torch.equal(weight, first_level(layer).down.expand_as(weight))
    slow = make_layer(periods=(6, None), target="value")
    slow.levels[0].load_state_dict(layer.levels[1].state_dict())
    slow.levels[1].load_state_dict(layer.levels[2].state_dict())
    wanted = torch.cat([first(context)[0] for context in x.split(6, 1)], 1)
    torch.testing.assert_close(layer(x)[0], slow(wanted)[0])


def test_nested_with_full_transfer_is_sequential() -> None:
    layer = make_layer(periods=(2, 4, 8, None), variant="nested")
    x = noise(2, 21, HIDDEN)
    assert not torch.allclose(layer(x)[0], twin(layer, variant="sequential")(x)[0])
    set_scalar(layer, "transfer", math.inf)
    torch.testing.assert_close(layer(x)[0], twin(layer, variant="sequential")(x)[0], rtol=1e-12, atol=1e-12)


def test_one_level_is_the_same_in_every_variant() -> None:
    layer = make_layer(periods=(3,))
    x = noise(2, 21, HIDDEN)
    torch.testing.assert_close(twin(layer, variant="nested")(x)[0], layer(x)[0], rtol=0, atol=0)
    torch.testing.assert_close(twin(layer, variant="headwise")(x)[0], layer(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("erase", [False, True], ids=["plain", "erase"])
def test_period_one_is_the_delta_rule(erase: bool) -> None:
    """W <- W (I - e h h^T) - l (W h - v) h^T with l = r / max(1, |h|^2), read before the write."""
    layer = make_layer(periods=(1,), target="value", erase=erase)
    part = first_level(layer)
    assert part.value is not None and part.rate is not None
    x = noise(2, 19, HIDDEN)
    u = part.norm(x)
    h = nn.functional.silu(part.gate(u)) * part.up(u)
    power = h.square().sum(-1)
    assert bool((power < 1).any()) and bool((power > 1).any()), "both branches of the normalisation are wanted"
    rate = torch.sigmoid(part.rate) / power.clamp_min(1)
    weight = part.down.expand(2, -1, -1)
    y, final, _ = token_rule(
        h, -part.value(u), h, weight=weight, inner_lr=rate, erase=rate if erase else None, online=True, read_before=True
    )
    found, levels = fast_levels(layer, x)
    torch.testing.assert_close(found, x + y)
    torch.testing.assert_close(levels[0].running, final)


def hostile(time: int) -> Tensor:
    """float32 rows of width `HIDDEN`, each made to break a recurrence in its own way."""
    g = torch.Generator().manual_seed(1)
    text = torch.randn(time, HIDDEN, generator=g).clamp(-3, 3)
    scale = 10.0 ** torch.randint(-38, 38, (time, 1), generator=g).float()
    angle = torch.arange(time) * (math.pi / 64)
    streams = {
        "zeros": torch.zeros(time, HIDDEN),
        "constant": text[:1].expand(time, -1),
        "huge": text * 1e37,
        "tiny": text * 1e-38,
        "any size": (text * scale).where(torch.rand(time, 1, generator=g) < 0.9, 0.0),
        "one feature": nn.functional.one_hot(torch.arange(time) // 7 % HIDDEN, HIDDEN) * 1e4,
        "turning": torch.stack([angle.cos(), angle.sin(), torch.ones(time), *[torch.zeros(time)] * (HIDDEN - 3)], -1),
    }
    return torch.stack(list(streams.values()))


HOSTILE_LAYERS: dict[str, dict[str, Any]] = {
    "sequential": {"periods": (64, 256, None)},
    "sequential erase": {"periods": (64, 256), "erase": True, "target": "value"},
    "nested erase": {"periods": (32, 64, 256), "variant": "nested", "erase": True},
    "headwise": {"periods": (16, 1000), "variant": "headwise", "target": "reconstruction"},
}


def hostile_layer(**settings: Any) -> ContinuumMemory:
    """A float32 layer at the highest rates, whose key is the first two features where the third is not 0."""
    layer = make_layer(**settings).float()
    set_scalar(layer, "rate", 30.0)
    with torch.no_grad():
        for part in layer.levels:
            assert isinstance(part, ContinuumLevel)
            part.gate.weight[:, 2] += 3.0
            part.up.weight[2:] *= 0.01
            part.up.weight[:2] = torch.eye(2, HIDDEN)
    return layer


def weight_norms(state: ContinuumState) -> Tensor:
    """`[weights, N]` norms of all fast weights."""
    levels = [level for level in state.levels if level is not None]
    weights = [w for level in levels for w in (level.start, level.running, level.initial) if w is not None]
    return torch.stack([w.flatten(1).norm(dim=1) for w in weights])


def read_hostile(layer: ContinuumMemory, x: Tensor, repeats: int) -> None:
    """Everything stays finite, what the layer adds stays bounded, and no fast weight grows faster than time.

    Weights may grow for long: keys that are nearly dependent have a large least-squares solution, found slowly.
    """
    norms, state = [], layer.init_state(len(x))
    moderate = x.abs().amax((1, 2)) < 1e5  # elsewhere y - x is rounding
    with torch.no_grad():
        for _ in range(repeats):
            y, state = layer(x, state)
            assert state.first_nonfinite() is None
            assert bool(torch.isfinite(y).all())
            assert bool(((y - x)[moderate].norm(dim=-1) < 100).all()), "what the layer adds grew"
            norms.append(weight_norms(state))
    first, second = (torch.stack(half).amax(0) for half in (norms[: repeats // 2], norms[repeats // 2 :]))
    assert bool((second <= 2.2 * first).all()), "a fast weight grows faster than time"


@pytest.mark.parametrize("settings", HOSTILE_LAYERS)
def test_stays_bounded_on_hostile_input(settings: str) -> None:
    read_hostile(hostile_layer(**HOSTILE_LAYERS[settings]), hostile(5_000), 4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", HOSTILE_LAYERS)
def test_stays_bounded_for_a_million_tokens(settings: str) -> None:
    read_hostile(hostile_layer(**HOSTILE_LAYERS[settings]), hostile(10_000), 100)


@pytest.mark.parametrize("erase", [False, True], ids=["plain", "erase"])
def test_no_keys_stretch_the_weights_over_a_period(erase: bool) -> None:
    """Without targets no period makes a row of W longer; gradient ascent on the input looks for one that does."""
    layer = make_layer(hidden_size=3, intermediate_size=2, periods=(12,), target="value", erase=erase)
    set_scalar(layer, "rate", 30.0)
    part = first_level(layer)
    assert part.value is not None
    with torch.no_grad():
        part.value.weight.zero_()
        part.gate.weight.copy_(torch.tensor([[0.0, 0.0, 2.0]] * 2))
        part.up.weight.copy_(torch.eye(2, 3))
    angle = torch.arange(12).double()[:, None] * torch.tensor([0.05, 0.26, 0.5, 1.05]).double()
    x = torch.stack([angle.cos(), angle.sin(), torch.ones_like(angle)], -1).transpose(0, 1).clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.03)
    before = torch.linalg.vector_norm(part.down.detach(), dim=-1)
    for _ in range(60):
        _, levels = fast_levels(layer, x)
        after = torch.linalg.vector_norm(levels[0].start, dim=-1)
        assert bool((after <= before + 1e-12).all()), f"a row grew by {(after / before).max():.3f}"
        optimizer.zero_grad()
        (-after.sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("erase", [False, True], ids=["plain", "erase"])
@pytest.mark.parametrize("target", ["next", "value", "reconstruction"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_keeps_a_float32_state(variant: str, target: str, erase: bool) -> None:
    """A bfloat16 model, and a float32 model under autocast, train and carry a float32 state."""
    settings = {"hidden_size": 32, "intermediate_size": 64, "variant": variant, "periods": VARIANTS[variant]}
    exact = ContinuumMemory(ContinuumConfig(**settings, target=target, erase=erase))
    half = ContinuumMemory(exact.config)
    half.load_state_dict(exact.state_dict())
    half = half.to(torch.bfloat16)
    x = torch.randn(2, 30, 32)
    y, _ = exact(x)
    found = [half(x.bfloat16(), mask=torch.ones(2, 30))]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(exact(x))
        exact(x, found[1][1], mask=torch.arange(30)[None] < torch.tensor([[30], [7]]))
    for z, state in found:
        for name, tensor in state.tensors():
            assert tensor.dtype == (torch.int64 if name == "position" else torch.float32), name
        assert bool((z.float() - y).norm() < 0.05 * (y - x).norm())
        z.float().square().sum().backward()
    for layer in (half, exact):
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name


def test_a_default_device_leaves_counters_on_the_cpu() -> None:
    layer = make_layer(periods=(2, 4, None), variant="nested")
    x = noise(2, 7, HIDDEN)
    with torch.device("meta"):
        y, state = layer(x)
        z, _ = layer(x, state)
    assert state.position.device.type == "cpu"
    torch.testing.assert_close(torch.cat([y, z], 1), layer(torch.cat([x, x], 1))[0])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, "hidden_size must be at least 1; got 0"),
    ({"intermediate_size": -3}, "intermediate_size must be at least 1; got -3"),
    ({"periods": ()}, "periods is empty"),
    ({"periods": 16}, r"periods is a tuple with one entry a level, for example \(64, None\), not 16"),
    ({"periods": "16"}, "not '16'"),
    ({"periods": (4, 0)}, r"tokens >= 1, or None for a level that never updates; got \(4, 0\)"),
    ({"periods": (4, 2.5)}, r"tokens >= 1.*got \(4, 2.5\)"),
    ({"variant": "parallel"}, "variant is 'sequential', 'nested' or 'headwise', not 'parallel'"),
    ({"target": "previous"}, "target is 'next', 'value' or 'reconstruction', not 'previous'"),
    ({"inner_lr_scale": 0.0}, r"inner_lr_scale is in \(0, 1\), not 0.0"),
    ({"inner_lr_scale": 1.0}, r"inner_lr_scale is in \(0, 1\), not 1.0"),
    ({"inner_lr_scale": math.nan}, r"inner_lr_scale is in \(0, 1\), not nan"),
    ({"variant": "nested", "periods": (4, 6)}, "6 is no multiple of 4"),
    ({"variant": "nested", "periods": (8, 4)}, "4 is no multiple of 8"),
    ({"variant": "nested", "periods": (None, 4)}, "fastest first; 4 is no multiple of None"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_refuses_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuumConfig(**{"hidden_size": 8, "intermediate_size": 12} | settings)


def test_config_survives_json() -> None:
    config = ContinuumConfig(hidden_size=8, intermediate_size=12, periods=(2, 4, None), variant="nested", erase=True)
    assert ContinuumConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert ContinuumMemory(config).levels[1].period == 4


def test_a_state_of_another_layer_is_refused() -> None:
    layer, other = make_layer(), SoftmaxAttention(AttentionConfig(HIDDEN, 2)).double()
    x = noise(1, 3, HIDDEN)
    with pytest.raises(TypeError, match="continues from a ContinuumState, not from AttentionState"):
        layer(x, other(x)[1])
    with pytest.raises(ValueError, match="the state has 2 rows and the input 1"):
        layer(x, layer.init_state(2))


def test_reset_parameters_restores_the_first_rates() -> None:
    layer = make_layer(periods=(2, 4), variant="nested", inner_lr_scale=0.2)
    part = first_level(layer)
    part.reset_parameters()
    assert part.rate is not None and part.transfer is not None
    torch.testing.assert_close(torch.sigmoid(part.rate).item(), 0.2)
    assert part.transfer.item() == 0.0
    heads = make_layer(variant="headwise", periods=(2, None))
    heads.reset_parameters()
    assert heads.weights is not None and heads.weights.tolist() == [0.5, 0.5]
