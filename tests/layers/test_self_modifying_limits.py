"""Self-modifying Titans at the ends of their settings: rules that must equal one another, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from tests.layers.reference_self_modifying import generate, initial_memories, normalize, project, rates
from tests.layers.test_self_modifying import MATRIX, MLP, assert_same, make_layer, run_layer, sample


def twin(layer: SelfModifyingTitans, **settings: Any) -> SelfModifyingTitans:
    """A layer of other settings with the same parameters, as far as it has them."""
    other = SelfModifyingTitans(dataclasses.replace(layer.config, **settings)).double()
    other.load_state_dict(layer.state_dict(), strict=False)
    return other


def test_a_frozen_matrix_memory_is_the_gated_delta_rule() -> None:
    """Matrix, memory only, no self targets, online L2, no erase: W <- a W - l (W k - v) k^T, in three lines."""
    layer = make_layer(
        **MATRIX, adapt=("memory",), self_targets=False, gradient="online", erase=False, chunk_size=8, clip=1e6
    )
    x = sample(2, 21, 8)
    u, b = project(layer, x)
    memories = initial_memories(layer, 2)
    weight = memories["memory"].running[0]
    outputs = []
    for t in range(21):
        made = generate(memories, {role: stream[:, t] for role, stream in u.items()})
        k, v = normalize(made["k"]), normalize(made["v"])
        gates = rates(layer, made["eta"], made["alpha"], b[:, t])
        a, lr = gates.a[..., None, None], gates.lr[0][..., None]
        error = (weight @ k[..., None])[..., 0] - v
        weight = a * weight - (lr * error)[..., None] * k[..., None, :]
        outputs.append((weight @ u["q"][:, t, :, :, None])[..., 0])
    y, state = layer(x)
    torch.testing.assert_close(state.main.running[0], weight, rtol=1e-9, atol=1e-11)
    o = torch.stack(outputs, 1)
    o = (o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.out_norm).flatten(-2)
    assert layer.gate_proj is not None
    wanted = layer.out_proj(o * torch.nn.functional.silu(layer.gate_proj(x)))
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("settings", [MATRIX, MLP, MLP | {"self_chunk_size": 8, "erase": False}], ids=str)
def test_momentum_that_fades_at_once_is_no_momentum(settings: dict[str, Any]) -> None:
    layer = make_layer(**settings, momentum=True)
    assert layer.momentum_proj is not None
    with torch.no_grad():
        layer.momentum_proj.weight.zero_()
        layer.momentum_proj.bias.fill_(-60.0)
    x = sample(2, 13, 8).requires_grad_()
    found, wanted = run_layer(layer, x, "running"), run_layer(twin(layer, momentum=False), x, "running")
    for name in ("momentum_proj.weight", "momentum_proj.bias"):
        assert found.pop(name).abs().max() < 1e-9
    assert_same(found, wanted)


def online_twin(layer: SelfModifyingTitans) -> SelfModifyingTitans:
    """The same layer with online gradients, `max_erase` scaled so that e and l are the same numbers."""
    _, b = project(layer, sample(1, 1, 8))
    eta, alpha = sample(1, 2, 1), sample(1, 2, 1, seed=2)
    other = twin(layer, gradient="online")
    ratio = rates(layer, eta, alpha, b[:, 0]).e[-1] / rates(other, eta, alpha, b[:, 0]).e[-1]
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    return twin(layer, gradient="online", max_erase=layer.config.max_erase * ratio[0, 0].item())


def test_chunks_of_one_token_are_online() -> None:
    """A matrix memory's gradient at a chunk of one is the gradient at the token before."""
    layer = make_layer(**MATRIX, chunk_size=1, max_erase=1.0, clip=1e6)
    with torch.no_grad():
        layer.share.fill_(-0.4)
    x = sample(2, 13, 8).requires_grad_()
    found, wanted = run_layer(online_twin(layer), x), run_layer(layer, x)
    # The shares enter e and l differently; every other gradient is that of the same function.
    del found["share"], wanted["share"]
    assert_same(found, wanted)


def test_online_gradients_do_not_depend_on_the_chunk() -> None:
    """With fixed keys and targets the chunk size of an online rule is a schedule, not a setting."""
    settings = MATRIX | {"adapt": ("memory",), "self_targets": False, "gradient": "online", "use_retention": True}
    layer = make_layer(**settings, chunk_size=1)
    x = sample(2, 32, 8).requires_grad_()
    wanted = run_layer(layer, x, "running")
    for size in (2, 7, 16, 32, 64):
        assert_same(run_layer(twin(layer, chunk_size=size), x, "running"), wanted)


def test_chunk_gradients_do_depend_on_the_chunk() -> None:
    """The counterpart of the test above: stale gradients are not silently online ones."""
    layer = make_layer(**MATRIX, adapt=("memory",), self_targets=False, chunk_size=1)
    x = sample(2, 32, 8)
    assert not torch.allclose(layer(x)[0], twin(layer, chunk_size=16)(x)[0], rtol=1e-3)


def test_equal_chunks_are_one_bank_or_two() -> None:
    """self_chunk_size equal to chunk_size is the same as leaving it out."""
    layer = make_layer(**MLP, momentum=True)
    x = sample(2, 13, 8).requires_grad_()
    assert_same(run_layer(twin(layer, self_chunk_size=4), x), run_layer(layer, x))


def test_no_retention_is_retention_one() -> None:
    layer = make_layer(**MATRIX, adapt=("memory", "k", "v", "eta"))
    assert layer.alpha_bias is not None
    with torch.no_grad():
        layer.alpha_bias.fill_(60.0)
    other = twin(layer, use_retention=False)
    x = sample(2, 13, 8)
    torch.testing.assert_close(other(x)[0], layer(x)[0], rtol=1e-9, atol=1e-11)


def test_a_float32_layer_under_bf16_autocast_keeps_a_float32_state() -> None:
    layer = SelfModifyingTitans(SelfModifyingConfig(hidden_size=32, num_heads=2, chunk_size=8, momentum=True))
    x = torch.randn(2, 30, 32)
    y, state = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_state = layer(x)
        again, _ = layer(x, half_state)
    for name, tensor in half_state.tensors():
        assert tensor.dtype == (torch.int64 if name == "position" else torch.float32), name
    assert half.dtype == again.dtype == torch.bfloat16
    assert bool((half.float() - y).norm() < 0.05 * y.norm())
    pairs = zip(half_state.main.running, state.main.running, strict=True)
    assert all(bool((a - b).norm() < 0.05 * b.norm()) for a, b in pairs)
    half.float().square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key
        assert bool(torch.isfinite(parameter.grad).all()), key


def test_a_float64_layer_has_a_float64_state() -> None:
    layer = make_layer(**MLP, momentum=True)
    assert all(t.dtype in (torch.float64, torch.int64) for _, t in layer(sample(1, 3, 8))[1].tensors())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": 3}, "hidden_size 8 is not a multiple of num_heads 3"),
    ({"memory": "tensor"}, "memory is 'mlp' or 'matrix', not 'tensor'"),
    ({"depth": 1}, "an MLP memory has depth >= 2, not 1; use memory='matrix'"),
    ({"activation": "tanh"}, "activation is 'silu', 'gelu' or 'relu', not 'tanh'"),
    ({"adapt": ("memory", "value")}, r"adapt names \['value'\]; memories are memory, k, v, q, eta, alpha"),
    ({"adapt": ("k", "v")}, "adapt must name 'memory'"),
    ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ({"chunk_size": 4, "self_chunk_size": 6}, "self_chunk_size 6 is not a multiple of chunk_size 4"),
    ({"chunk_size": 4, "self_chunk_size": 2}, "self_chunk_size 2 is not a multiple of chunk_size 4"),
    ({"max_erase": 0.0}, r"max_erase is in \(0, 2\], not 0.0: beyond 2 the erase is no contraction"),
    ({"max_erase": 2.1}, r"max_erase is in \(0, 2\], not 2.1"),
    ({"inner_lr_scale": 0.0}, r"inner_lr_scale is in \(0, 1\), not 0.0"),
    ({"inner_lr_scale": 1.0}, r"inner_lr_scale is in \(0, 1\), not 1.0"),
    ({"conv_size": 0}, "conv_size"),
    ({"expansion": 0}, "expansion"),
    ({"checkpoint_chunks": 0}, "checkpoint_chunks"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"num_heads": 0}, "num_heads"),
    ({"chunk_size": 4, "self_chunk_size": 0}, "self_chunk_size"),
    ({"adapt": "memory"}, "adapt"),
    ({"value_length": 0.0}, "value_length is positive, or None for values of length 1; not 0.0"),
    ({"rate_stretch": 0.9}, "rate_stretch is at least 1, not 0.9"),
    ({"gate_scale": 0.0}, "gate_scale is positive, not 0.0"),
    ({"hidden_erase_scale": 1.0}, r"hidden_erase_scale is in \(0, 1\), not 1.0"),
    ({"hidden_lr_scale": 0.0}, r"hidden_lr_scale is in \(0, 1\), not 0.0"),
    ({"others_scale": 1.0, "anchored": True}, r"others_scale is in \(0, 1\)"),
    ({"others_scale": 0.1}, "others_scale needs anchored=True"),
    ({"generation_gain": 0.0}, "generation_gain needs anchored=True"),
    ({"retention_start": (0.0,)}, "retention_start is two logits"),
    ({"share_of": "key"}, "share_of is 'erase' or 'rate', not 'key'"),
    ({"share_of": "rate"}, "needs gradient='online', objective='l2' and erase=True"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_refuses_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfModifyingConfig(**{"hidden_size": 8, "num_heads": 2} | settings)


def test_starts_where_the_settings_say() -> None:
    layer = SelfModifyingTitans(SelfModifyingConfig(hidden_size=8, num_heads=2, value_length=1.5, eta_start=-1.1))
    scales = layer._scales(torch.float32)
    assert scales.value_length is not None
    torch.testing.assert_close(scales.value_length, torch.full((2,), 1.5))
    torch.testing.assert_close(scales.eta_bias, torch.full((2,), -1.1))


def test_config_survives_json() -> None:
    config = SelfModifyingConfig(hidden_size=8, num_heads=2, adapt=("memory", "k"), momentum=True)
    assert SelfModifyingConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_state_of_another_layer_is_refused() -> None:
    layer, other = make_layer(**MLP), make_layer(**MATRIX)
    x: Tensor = sample(1, 3, 8)
    with pytest.raises((TypeError, ValueError), match="state"):
        layer(x, other(x)[1].main)
