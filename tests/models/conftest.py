from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from nestling import NestlingConfig, NestlingForCausalLM, presets

SMALL: dict[str, dict[str, Any]] = {
    "hope": {"chunk_size": 4, "periods": (4, 8, None)},
    "hope_linear": {"chunk_size": 4, "periods": (4, 8, None), "momentum": True},
    "hope_attention": {"periods": (4, 8, None), "num_kv_heads": 1, "window": 9},
    "transformer": {},
    "ada_transformer": {"chunk_size": 4, "window": 9},
    "linear_attention": {"chunk_size": 4},
    "linear_attention_pp": {"chunk_size": 4},
    "retnet": {"chunk_size": 4},
    "deltanet": {"chunk_size": 4, "allow_neg_eigval": True},
    "gated_deltanet": {"chunk_size": 4},
    "gated_deltaproduct": {"chunk_size": 4},
    "comba": {"chunk_size": 4},
    "kimi_delta": {"chunk_size": 4},
    "rwkv7": {"chunk_size": 4},
    "mamba2": {"chunk_size": 4, "state_size": 6, "num_groups": 2},
    "samba": {"chunk_size": 4, "state_size": 6, "window": 9, "num_kv_heads": 1},
    "ttt_linear": {"chunk_size": 4},
    "ttt_mlp": {"chunk_size": 4, "step": "mean"},
    "titans_lmm": {"chunk_size": 4},
    "titans_mac": {"segment_size": 8, "chunk_size": 4, "persistent_tokens": 2},
    "titans_mag": {"chunk_size": 4, "window": 9, "persistent_tokens": 2},
    "titans_mal": {"chunk_size": 4, "window": 9, "persistent_tokens": 3},
    "moneta": {"chunk_size": 4},
    "yaad": {"chunk_size": 4},
    "memory_caching": {"chunk_size": 4, "segment_size": 8},
    "memora": {"chunk_size": 4},
    "dla": {"chunk_size": 4},
    "omeganet": {"chunk_size": 4, "objective_window": 3},
}
"""A small model of every preset; a new preset adds one line and runs through all tests of this folder."""


def small_config(preset: str, **overrides: Any) -> NestlingConfig:
    settings = {"vocab_size": 61, "hidden_size": 16, "num_layers": 2, "num_heads": 2} | SMALL[preset] | overrides
    return presets.PRESETS[preset]("tiny", **settings)


REPRESENTATIVE = ("hope", "samba", "titans_mac", "memory_caching")
"""Fast weights inside a chunk and a period; keys and values beside a recurrence; segments; a state that grows."""


def _cases(*, few: bool = False, looped: bool = False) -> pytest.MarkDecorator:
    """Every preset, all but `REPRESENTATIVE` marked slow with `few`; with `looped` once and with blocks that run twice,
    the latter fast for `REPRESENTATIVE` alone.
    """
    cases = []
    for loops in (1, 2) if looped else (1,):
        for name in SMALL:
            marks = [pytest.mark.slow] if (few or loops > 1) and name not in REPRESENTATIVE else []
            values, said = ([name, loops], f"{name}-{('once', 'looped')[loops - 1]}") if looped else ([name], name)
            cases.append(pytest.param(*values, id=said, marks=marks))
    return pytest.mark.parametrize(["preset", "loops"] if looped else ["preset"], cases, indirect=True)


LOOPED = _cases(looped=True)
"""For tests of what holds whether the blocks run once or several times."""
FEW = _cases(few=True)
"""For tests of code that does not depend on a model's layers: what it does with several of them is enough."""
FEW_LOOPED = _cases(few=True, looped=True)


@pytest.fixture(params=SMALL)
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


def small_model(preset: str, **overrides: Any) -> NestlingForCausalLM:
    """A model with large embeddings, so that a difference anywhere shows in the logits."""
    torch.manual_seed(1)
    model = NestlingForCausalLM(small_config(preset, **overrides))
    nn.init.normal_(model.embed_tokens.weight)
    if not model.config.tie_word_embeddings:
        nn.init.normal_(model.lm_head.weight)
    return model


@pytest.fixture
def loops(request: pytest.FixtureRequest) -> int:
    """How often the blocks run: once, but in tests that are `LOOPED`."""
    return getattr(request, "param", 1)


@pytest.fixture
def make(preset: str, loops: int) -> Callable[..., NestlingForCausalLM]:
    """Makes small models of the preset."""
    return partial(small_model, preset, loops=loops)


@pytest.fixture
def all_models() -> dict[str, NestlingForCausalLM]:
    """A small model of every preset at once, and some again with blocks that run twice."""
    once = {name: small_model(name) for name in SMALL}
    return once | {f"{name} twice": small_model(name, loops=2) for name in REPRESENTATIVE}


@pytest.fixture
def model(make: Callable[..., NestlingForCausalLM]) -> NestlingForCausalLM:
    """In float64, with an output projection of its own: tied logits of random weights just repeat the last token."""
    return make(tie_word_embeddings=False).double()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (3, 21), generator=torch.Generator().manual_seed(2))


def with_gains(model: NestlingForCausalLM) -> NestlingForCausalLM:
    """The model with gains that start at zero, and hide what is behind them from the gradient, away from it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-1] == "gain":
                parameter.fill_(0.5)
    return model
