"""What callers bring: any gradient mode, copies, wrapped and frozen models, weights that cannot be learned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling import NestlingForCausalLM, presets
from nestling.continual import Learner, Level, Options
from nestling.continual.learner.levels import resolve
from nestling.models import convert
from tests.llamas import random_llama

IDS = torch.randint(3, 259, (160,), generator=torch.Generator().manual_seed(0))
MODES = [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]


def learner(model: Any, rank: int | None = None) -> Learner:
    """Two levels of the MLPs."""
    levels = {"top": Level(32, ("*.1.mlp.*",)), "bottom": Level(64, ("*.0.mlp.*",))}
    return Learner(model, levels, lr=1e-2, context=64, options=Options(rank=rank))


def learned(worker: Learner) -> list[Tensor]:
    """Values of all its levels."""
    return [v.clone() for weights in worker.weights.values() for v in weights.values]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("mode", MODES)
def test_learning_does_not_depend_on_the_callers_gradient_mode(
    mode: Callable[[], AbstractContextManager[Any]], rank: int | None
) -> None:
    """Wherever the mode changes: around the making, some calls, consolidation, a memory's restoring."""
    plain = learner(random_llama(), rank)
    seen = [plain.observe(part).losses for part in IDS.split(50)]
    plain.consolidate(steps=2)
    model, third_model = random_llama(), random_llama()
    with mode():
        other = learner(model, rank)
        first = other.observe(IDS[:50].clone()).losses
    second = other.observe(IDS[50:100]).losses
    with mode():
        third = [other.observe(part.clone()).losses for part in IDS[100:].split(50)]
        other.consolidate(steps=2)
        again = Learner.restore(third_model, other.memory())
        other.detach()
        other.apply()
    torch.testing.assert_close(torch.cat([first, second, *third]), torch.cat(seen), equal_nan=True)
    torch.testing.assert_close(learned(other), learned(plain))
    for worker in (plain, again):
        worker.observe(IDS)
    torch.testing.assert_close(learned(again), learned(plain))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_copy_of_a_model_with_a_learner_says_what_to_do(rank: int | None) -> None:
    model = random_llama()
    worker = learner(model, rank)
    worker.observe(IDS[:64])
    twin = copy.deepcopy(model)
    before = twin(IDS[None]).logits
    torch.testing.assert_close(before, model(IDS[None]).logits)
    with pytest.raises(ValueError, match=r"a copy of a model with a learner attached.*learner\.detach\(\), copy"):
        learner(twin)
    with pytest.raises(ValueError, match="call the learner's detach"):
        worker.memory().apply(twin)
    worker.observe(IDS)
    assert worker.attached and torch.equal(twin(IDS[None]).logits, before)  # learns no more with the original
    worker.detach()
    free = copy.deepcopy(model)
    torch.testing.assert_close(free(IDS[None]).logits, random_llama()(IDS[None]).logits)
    other = learner(free)
    worker.apply()
    assert other.observe(IDS).updated and worker.attached
    with pytest.raises(TypeError, match=r"a learner is not copied; take its memory\(\)"):
        copy.deepcopy(worker)


def test_a_wrapped_model_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"a DataParallel stands around the model; give the model itself, its \.module"
    ):
        learner(nn.DataParallel(random_llama()))
    with pytest.raises(ValueError, match=r"a OptimizedModule stands around the model; .* its \._orig_mod"):
        learner(torch.compile(random_llama()))
    learner(random_llama())


def test_weights_that_cannot_be_learned_are_named() -> None:
    def refused(change: Callable[[nn.Linear], None], message: str) -> None:
        model = random_llama()
        change(model.model.layers[1].mlp.up_proj)
        with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.up_proj\.weight {message}"):
            learner(model)

    def quantize(layer: nn.Linear) -> None:
        layer.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)

    def make_in_inference_mode(layer: nn.Linear) -> None:
        with torch.inference_mode():
            layer.weight = nn.Parameter(torch.zeros(48, 32))

    memory = learner(random_llama()).memory()
    for change in (lambda layer: layer.to("meta"), make_in_inference_mode):
        model = random_llama()
        change(model.model.layers[1].mlp.up_proj)
        with pytest.raises(ValueError, match=r"up_proj\.weight (is offloaded|was made under torch\.inference_mode)"):
            memory.apply(model)
    refused(quantize, "is uint8, a quantized weight, which cannot be learned")
    refused(lambda layer: layer.to("meta"), "is offloaded, so its values are not at hand")
    refused(lambda layer: layer.half(), "is float16, in which small steps are lost")
    refused(make_in_inference_mode, r"was made under torch\.inference_mode")


def test_a_frozen_model_in_train_mode_learns_and_stays_so() -> None:
    plain, model = learner(random_llama()), random_llama().train().requires_grad_(False)
    frozen = learner(model)
    for worker in (plain, frozen):
        worker.observe(IDS)
    torch.testing.assert_close(learned(frozen), learned(plain))
    assert model.training and not any(p.requires_grad for p in model.parameters())


def test_without_levels_all_mlps_learn_or_the_models_own_levels() -> None:
    model = random_llama()
    mlps = tuple(n for n, _ in model.named_parameters() if ".mlp." in n)
    assert Learner(model, lr=1e-3).settings.levels == {"*.mlp.*": Level(256, mlps)}
    own = NestlingForCausalLM(presets.transformer(hidden_size=16, num_layers=1, num_heads=1))
    channels = tuple(n for n, _ in own.named_parameters() if ".channel." in n)
    assert channels and resolve(own, None) == {"*.channel.*": Level(256, channels)}
    assert {n: level.period for n, level in resolve(convert(random_llama(), {"a": 8, "b": 32}), None).items()} == {
        "a": 8,
        "b": 32,
    }
