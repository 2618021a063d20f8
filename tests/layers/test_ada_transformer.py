"""The AdaTransformer: equal to its equations token by token, and without writes to a Transformer++ block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling import NestlingForCausalLM, presets
from nestling.layers.ada_transformer import AdaTransformer, AdaTransformerConfig, AdaTransformerState
from nestling.memory.state import State
from tests.layers.battery import close, gradients, noise, weigh
from tests.layers.test_self_modifying_streams import HIDDEN, hostile

WIDTH = 8
CASES = {
    "swiglu": {"intermediate_size": 12},
    "one matrix": {},
    "swiglu, window": {"intermediate_size": 5, "window": 3},
    "one chunk": {"intermediate_size": 12, "chunk_size": 64},
}


def make_layer(**settings: int) -> AdaTransformer:
    """A float64 layer whose parameters are all away from their first values."""
    torch.manual_seed(0)
    layer = AdaTransformer(AdaTransformerConfig(**{"hidden_size": WIDTH, "num_heads": 2, "chunk_size": 4} | settings))
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def reference(layer: AdaTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    """NL Eq. 69 with the norms and residuals of a Transformer, one token and one head at a time."""
    c, heads = layer.config, layer.attention
    n = norm(x, layer.attention_norm.weight, c.norm_eps)
    q, k, v = (n @ p.weight.mT for p in (heads.query, heads.key, heads.value))
    angle = torch.arange(x.shape[1])[:, None] * c.rope_theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)

    def turn(z: Tensor) -> Tensor:
        pairs = torch.complex(*z.unflatten(-1, (c.num_heads, 2, -1)).unbind(-2))
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([pairs.real, pairs.imag], -1)

    def phi(z: Tensor) -> Tensor:
        if layer.gate is None or layer.up is None:
            return z
        gate = z @ layer.gate.weight.mT
        return gate * torch.sigmoid(gate) * (z @ layer.up.weight.mT)

    turned, turned_keys, values = turn(q), turn(k), v.unflatten(-1, (c.num_heads, -1))
    weight = layer.down.expand(len(x), -1, -1)
    outputs = []
    for t in range(x.shape[1]):
        first = 0 if c.window is None else max(0, t + 1 - c.window)
        scores = torch.einsum("nhd,nshd->nhs", turned[:, t], turned_keys[:, first : t + 1]) / c.head_dim**0.5
        seen = torch.einsum("nhs,nshd->nhd", scores.softmax(-1), values[:, first : t + 1]).flatten(1)
        h = x[:, t] + seen @ heads.output.weight.mT
        key = phi(norm(k[:, t], layer.shared_key_norm.weight, c.norm_eps))
        key = key / (key.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        value = v[:, t] @ heads.output.weight.mT
        weight = weight + layer.log_rate.exp() * value[:, :, None] * key[:, None]
        outputs.append(h + (weight @ phi(norm(h, layer.memory_norm.weight, c.norm_eps))[..., None])[..., 0])
    return torch.stack(outputs, 1), weight


@pytest.mark.parametrize("case", CASES)
def test_equals_equation_69_token_by_token(case: str) -> None:
    layer, x = make_layer(**CASES[case]), noise(2, 11, WIDTH).requires_grad_()
    y, state = layer(x)
    assert isinstance(state, AdaTransformerState)
    wanted = reference(layer, x)
    close((y, state.weight), wanted)
    found, expected = (gradients(weigh(y) + weigh(w, 6), [x], layer) for y, w in ((y, state.weight), wanted))
    close(found, expected)
    assert all(bool(g.any()) for g in found), "something receives no gradient"


def test_without_writes_it_is_a_transformer() -> None:
    """The same logits as Transformer++ with the same weights, as its rate goes to zero."""
    shape = {"vocab_size": 61, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    theirs = NestlingForCausalLM(presets.transformer(**shape)).double()
    ours = NestlingForCausalLM(presets.ada_transformer(**shape)).double()
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            moved = name.replace("mixer_norm", "mixer.attention_norm").replace("channel_norm", "mixer.memory_norm")
            if ".mixer.attention_norm" not in moved:
                moved = moved.replace(".mixer.", ".mixer.attention.").replace("attention.memory_norm", "memory_norm")
            moved = moved.replace("channel.down.weight", "mixer.down").replace("channel.", "mixer.")
            own.pop(moved).copy_(parameter)
        for name, parameter in own.items():
            assert name.endswith(("shared_key_norm.weight", "log_rate")), name
            parameter.fill_(-1e9 if name.endswith("log_rate") else 1)
    ids = torch.randint(3, 61, (2, 20))
    close([ours(ids).logits], [theirs(ids).logits])


@torch.no_grad()
def test_a_hostile_stream_stays_finite() -> None:
    torch.manual_seed(0)
    layer = AdaTransformer(AdaTransformerConfig(HIDDEN, 2, intermediate_size=24, window=16))
    state: State | None = None
    for start in range(0, 12_000, 4000):
        y, state = layer(torch.stack(list(hostile(start, start + 4000).values())), state)
        assert bool(y.isfinite().all()) and state.first_nonfinite() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_kv_heads": 1}, "must be as wide as the layer: leave num_kv_heads and head_width None; got 1 and None"),
        ({"head_width": 6}, "got None and 6"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1; got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"inner_lr_scale": 0.0}, "inner_lr_scale must be positive; got 0.0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaTransformerConfig(**{"hidden_size": 8, "num_heads": 2} | settings)  # type: ignore[arg-type]


def test_the_feature_map_is_swiglus() -> None:
    """One token into an empty block: what is read is the MLP's answer and the write's."""
    layer = make_layer(intermediate_size=12)
    assert layer.gate is not None and layer.up is not None
    x = noise(1, 1, WIDTH)
    h = x + layer.attention.output(layer.attention.value(layer.attention_norm(x)))
    hidden = F.silu(layer.gate(layer.memory_norm(h))) * layer.up(layer.memory_norm(h))
    y, state = layer(x)
    close([y], [h + hidden @ state.weight[0].mT])
