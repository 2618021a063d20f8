from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nestling.continual.learner import levels as module
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.levels import resolve
from nestling.continual.learner.options import Level, Options, UpdateLimit
from nestling.levels.assignment import continuum_levels
from nestling.models import NestlingForCausalLM, presets
from tests.continual.stream.stream_models import tiny_llama

TOP, BOTTOM = "*layers.1.mlp.*", "*layers.0.mlp.*"


def test_patterns_and_names_first_come_fastest_first() -> None:
    model = tiny_llama()
    found = resolve(
        model, {"slow": Level(16, ("model.norm.weight", BOTTOM)), "fast": Level(8, ("*norm*",)), "*mlp*": 32}
    )
    assert list(found) == ["fast", "slow", "*mlp*"]
    assert set(found["slow"].parameters) == {n for n, _ in model.named_parameters() if "layers.0.mlp" in n} | {
        "model.norm.weight"
    }
    assert all("norm" in n and n != "model.norm.weight" for n in found["fast"].parameters)
    assert found["*mlp*"] == Level(32, tuple(n for n, _ in model.named_parameters() if "layers.1.mlp" in n))


def test_a_models_own_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    mlp = {i: [n for n, _ in model.named_parameters() if f"layers.{i}.mlp" in n] for i in (0, 1)}
    model.config.levels = {"fast": 8, "slow": 16}
    monkeypatch.setattr(module, "stream_levels", lambda model: {"fast": mlp[1], "slow": mlp[0]})
    monkeypatch.setattr(module, "named_levels", lambda model: {"fast": set(mlp[1]), "slow": set(mlp[0])})
    assert resolve(model, None) == {"fast": Level(8, tuple(mlp[1])), "slow": Level(16, tuple(mlp[0]))}
    assert resolve(model, {"slow": 4}) == {"slow": Level(4, tuple(mlp[0]))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": {}}, "no levels are given"),
        ({"levels": ["a"]}, "levels are given by name"),
        ({"levels": {"a": "8"}}, "level 'a' is a Level or a period in tokens, not '8'"),
        (
            {"levels": {"a": Level(8, ("nothing.*",))}},
            r"nothing\.\* fits no parameter; the model has the parameters .*model\.layers\.\*\.mlp\.up_proj\.weight",
        ),
        ({"levels": {"a": Level(8, (TOP,)), "b": Level(8, (TOP,))}}, "an earlier level has taken every parameter of"),
        ({"levels": {"a": Level(8, (TOP,)), "b": Level(12, (BOTTOM,))}}, "no multiple of the fastest, 8"),
        ({"levels": {"a": Level(8, (TOP,))}, "optimizer": "adam"}, "unknown optimizer"),
        ({"levels": {"a": Level(8, ("*norm*",), rank=2)}}, "weights of nn.Linear"),
        ({"levels": {"a": Level(8, (TOP,), rank=17)}}, "is more than"),
        ({"levels": {"a": Level(8, (TOP,))}, "context": 8, "options": Options(piece=8)}, "do not fit a context"),
        ({"levels": {"a": Level(8, (TOP,))}, "options": Options(retention={"b": 0.5})}, "retention names b"),
        ({"levels": {"a": Level(8, (TOP,))}, "options": Options(limit={"b": UpdateLimit(1.0)})}, "limit names b"),
        ({"levels": {"a": Level(8, (TOP,))}, "rate_exponent": 500.0}, "rate_exponent is 500"),
        ({"levels": {"a": Level(8, (TOP,))}, "lr": float("inf")}, "lr is inf, but must be at least 0 and finite"),
        ({"levels": {"a": Level(8, (TOP,))}, "lr": "x"}, "lr is x, but must be a number"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_free(arguments, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        Learner(model, **{"lr": 0.1, **arguments})
    assert not any(m._forward_hooks for m in model.modules())
    Learner(model, {"a": Level(8, (TOP,))}, lr=0.1)


def test_a_context_beyond_learned_positions_is_refused() -> None:
    shape = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    levels = {"a": Level(8, ("*.mlp.*",))}
    with pytest.raises(ValueError, match="a context of 33 tokens is more than the model's 32 positions"):
        Learner(GPT2LMHeadModel(GPT2Config(**shape)), levels, lr=0.1, context=33)
    Learner(GPT2LMHeadModel(GPT2Config(**shape)), levels, lr=0.1, context=32)
    rotary = tiny_llama()
    Learner(rotary, levels, lr=0.1, context=2 * rotary.config.max_position_embeddings)


@pytest.mark.parametrize("options", [Options(), Options(rank=2)])
def test_weights_in_which_small_steps_are_lost_are_refused(options: Options) -> None:
    with pytest.raises(ValueError, match="is bfloat16, in which small steps are lost: load the model with dtype=torch"):
        Learner(tiny_llama(dtype=torch.bfloat16), {"a": Level(8, (TOP,))}, lr=0.1, options=options)


def test_levels_of_the_librarys_own_models() -> None:
    """A continuum memory's levels by their own names."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    model = NestlingForCausalLM(presets.hope(**sizes, periods=(8, 16, None)))
    found = resolve(model, {"cms.0": 8, "cms.1": 16})
    assert {name: set(level.parameters) for name, level in found.items()} == {
        name: names for name, names in continuum_levels(model).items() if name in ("cms.0", "cms.1")
    }
