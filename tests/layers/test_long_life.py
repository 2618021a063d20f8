"""What self-modifying Titans are after a long text: keys that point where they pointed, rates that see their tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling import NestlingForCausalLM, presets
from nestling.layers.self_modifying import SelfModifyingState, SelfModifyingTitans, roles

PRESETS = {"hope": presets.hope, "hope_linear": presets.hope_linear}


def make(name: str) -> NestlingForCausalLM:
    """An untrained model whose other memories use all that they learn, which a preset's begin without."""
    torch.manual_seed(0)
    config = PRESETS[name]("tiny")
    for block in config.blocks:
        block["mixer"]["generation_gain"] = 1.0
    return NestlingForCausalLM(config).eval()


WORDS = (
    *("the", "a", "of", "and", "to", "in", "that", "it", "was", "he", "for", "on", "with", "his", "her", "is", "be"),
    *("at", "not", "by", "this", "had", "from", "but", "they", "she", "which"),
)


def text(length: int) -> Tensor:
    """Bytes of sentences of common words."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(WORDS), (length,), generator=draw).tolist()
    line = " ".join(WORDS[i] + ("." if i % 7 == 0 else "") for i in chosen)
    return torch.tensor([list(line.encode()[:length])])


def generated(layer: SelfModifyingTitans, state: SelfModifyingState, x: Tensor) -> dict[str, Tensor]:
    """What the memories of the state make of fixed tokens: k and v `[N, H, L, K]`, logits `[N, H, L]`."""
    tokens = layer._tokens(layer.in_proj(x))
    scales = layer._scales(x.dtype)
    weights = layer.main.whole(state.main.start, layer.main.base(x.dtype), scales.gain)
    return layer.main.read(weights, {r: tokens[f"u_{r}"] for r in roles(layer.main)}, unit=True)


def assert_alive(layer: SelfModifyingTitans, before: SelfModifyingState, after: SelfModifyingState) -> None:
    """Keys and values point where they pointed, logits differ between tokens as they did."""
    probe = torch.randn(1, 256, layer.config.hidden_size, generator=torch.Generator().manual_seed(1))
    first, last = (generated(layer, state, probe) for state in (before, after))
    for name in ("k", "v"):
        assert float(F.cosine_similarity(first[name], last[name], dim=-1).mean(-1).min()) > 0.9, name
    for name in ("eta", "alpha"):
        assert bool((last[name].std(-1) > 0.5 * first[name].std(-1)).all()), name
    start, end = (layer(probe, state)[0].square().mean().sqrt() for state in (before, after))
    assert 1 / 3 < float(end / start) < 3


@pytest.mark.parametrize("tokens", [6400, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_after_random_input(name: str, tokens: int) -> None:
    layer = make(name).base_model.blocks[0].mixer
    assert isinstance(layer, SelfModifyingTitans)
    x = torch.randn(1, tokens, layer.config.hidden_size)
    before = layer.first_state(x[:, :0])
    _, after = layer(x)
    assert isinstance(after, SelfModifyingState)
    assert_alive(layer, before, after)


@pytest.mark.parametrize("tokens", [3200, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_after_text(name: str, tokens: int) -> None:
    """In a whole model that has not been trained: every layer's memories."""
    model = make(name)
    layers = [block.mixer for block in model.base_model.blocks]
    before = [layer.first_state(torch.zeros(1, 0, layer.config.hidden_size)) for layer in layers]
    state = model(text(tokens), use_cache=True, logits_to_keep=1).past_key_values
    for layer, first, last in zip(layers, before, [block.mixer for block in state.layers], strict=True):
        assert_alive(layer, first, last)
