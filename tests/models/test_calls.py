"""Every part of a model is used by a call of its module, so that what hangs on the call takes effect: hooks, adapters,
low-rank factors, rules that need a layer's inputs. Offloading is in `test_offloading`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nestling import NestlingForCausalLM
from nestling.continual import Learner, Level, Options
from nestling.models.cache import ModelState
from nestling.optim import DeltaGradientDescent, GeneralizedGradientDescent
from tests.models.conftest import small_model

Make = Callable[..., NestlingForCausalLM]

BESIDE = {"attention.key": 2, "attention.value": 2}  # of persistent tokens and of tokens
SEVERAL: dict[str, dict[str, int]] = {
    # Of what the attention says and of what a value alone would; of queries and of keys.
    "ada_transformer": {"attention.output": 2, "gate": 2, "up": 2},
    "titans_mag": BESIDE,
    "titans_mal": BESIDE,
    "titans_mac": {
        "memory": 2,  # it is asked with the token and written with what the attention says
        "memory.in_proj": 2,
        "attention.key": 3,  # of persistent tokens, of retrieved memory and of tokens
        "attention.value": 3,
    },
}
"""Calls of a mixer's parts where they are several (of one segment)."""


def with_parameters(model: NestlingForCausalLM) -> list[str]:
    """Every module that has parameters or parts that have, the model itself and plain lists of modules left out."""
    lists = (nn.ModuleList, nn.ModuleDict)
    found = ((name, module) for name, module in model.named_modules() if name and not isinstance(module, lists))
    return [name for name, module in found if next(module.parameters(), None) is not None]


def calls(model: NestlingForCausalLM, ids: Tensor, state: ModelState | None = None) -> tuple[Counter[str], ModelState]:
    """How often the forward hook of every module with parameters fires in a pass over `ids`, and the state after it."""
    fired: Counter[str] = Counter()
    modules = dict(model.named_modules())
    names = with_parameters(model)
    handles = [modules[n].register_forward_hook(lambda *_, n=n: fired.update([n])) for n in names]
    with torch.no_grad():
        after = model(ids, past_key_values=state).past_key_values
    for handle in handles:
        handle.remove()
    return fired, after


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All but the head, which may share its weight with the embedding."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def reached(model: NestlingForCausalLM, ids: Tensor) -> list[str]:
    """Linear layers whose weight gets a gradient. In a short text that leaves out the rate of a slow level."""
    model(ids, labels=ids).loss.backward()
    return [n for n, m in linear_layers(model).items() if m.weight.grad is not None and bool(m.weight.grad.any())]


def test_forward_hooks_fire(model: NestlingForCausalLM, preset: str, ids: Tensor) -> None:
    """On every module with parameters; once where the state is there, so that no fast weights have to begin."""
    fired, state = calls(model, ids[:, :5])
    assert set(fired) == set(with_parameters(model))
    fired, _ = calls(model, ids[:, 5:7], state)  # inside a chunk, a segment
    begin = [n for n in with_parameters(model) if n.endswith(".initial") or n.split(".")[-1] in ("bank", "main", "own")]
    # Weights W_0 + F need their W_0 in every call.
    begin = [
        n for n in begin if not (n.endswith(".main.initial") and model.get_submodule(n[: -len(".initial")]).anchored)
    ]
    several = SEVERAL.get(preset, {})
    wanted = {n: several.get(n.split(".mixer.")[-1], 1) for n in with_parameters(model) if n not in begin}
    assert fired == Counter(wanted)


def test_low_rank_memory_is_what_was_learned(preset: str, ids: Tensor) -> None:
    """Put on the base model, a memory of ranks on all linear layers computes what the attached learner computed."""
    model = small_model(preset, tie_word_embeddings=False)
    names = tuple(f"{name}.weight" for name in linear_layers(model))
    with torch.no_grad():
        base = model(ids).logits
    learner = Learner(model, {"all": Level(16, names)}, lr=1e-2, context=16, options=Options(rank=1))
    learner.observe(ids.flatten())
    with torch.no_grad():
        live = model(ids).logits
    memory = learner.memory()
    learner.detach()
    with memory.applied(model), torch.no_grad():
        applied = model(ids).logits
    moved = (live - base).abs().max()
    assert moved > 1e-3
    assert (live - applied).abs().max() < 1e-2 * moved


def test_lora_trains_and_merges(make: Make, ids: Tensor) -> None:
    """Every adapter gets a gradient where its layer's weight does, and the merged model is the trained one."""
    peft = pytest.importorskip("peft")
    made = make(tie_word_embeddings=False)
    layers = reached(made, ids)
    model = peft.get_peft_model(make(tie_word_embeddings=False), peft.LoraConfig(r=2, target_modules=layers))
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert len(adapters) == len(layers)
    for name, parameter in adapters.items():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for parameter in adapters.values():
            parameter.normal_(std=0.1)
        live = model(input_ids=ids).logits
        merged = model.merge_and_unload()(ids).logits
    moved = (live - before).abs().max()
    assert moved > 1e-2
    assert (live - merged).abs().max() < 1e-3 * moved


def test_generalized_gradient_descent_sees_every_token(model: NestlingForCausalLM, ids: Tensor) -> None:
    """Of every linear layer the recorded inputs and output gradients make the whole gradient of its weight."""
    optimizer = GeneralizedGradientDescent(model.parameters(), lr=0.1, model=model)
    for name in reached(model, ids):
        weight = model.get_submodule(name).weight
        seen = optimizer.layers.of(weight)
        assert seen is not None, name
        made = torch.cat(seen.output_gradients).mT @ torch.cat(seen.inputs)
        torch.testing.assert_close(made, weight.grad, rtol=1e-8, atol=1e-12)


def test_delta_gradient_descent_sees_every_layer(model: NestlingForCausalLM, ids: Tensor) -> None:
    """No linear layer that learns is left to plain gradient descent."""
    optimizer = DeltaGradientDescent(model.parameters(), lr=0.1, model=model)
    for name in reached(model, ids):
        assert optimizer.layers.of(model.get_submodule(name).weight) is not None, name
