"""Scores of tokens that come a few at a time: those of the whole piece, at the cost of the new tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JambaConfig, JambaForCausalLM, PreTrainedModel

from nestling import NestlingForCausalLM, presets
from nestling.continual.learner import Learner
from nestling.continual.options import Level, Options
from nestling.continual.reading import Reader
from nestling.continual.scoring import Scorer
from tests.continual.stream_models import VOCABULARY, text, tiny_llama

SIZES = (1, 1, 3, 7, 2, 20, 1, 5)


def hope() -> PreTrainedModel:
    """A model whose cache is a state."""
    torch.manual_seed(0)
    return NestlingForCausalLM(presets.hope("tiny", vocab_size=VOCABULARY, hidden_size=32, num_layers=1)).double()


class WithoutCache(nn.Module):
    """A forward pass that takes no cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def learner_of(model: PreTrainedModel, chunk: int = 64) -> Learner:
    options = Options(cache_scores=True)
    return Learner(model, {"all": Level(chunk, ("*",))}, "sgd", lr=0.1, context=32, options=options)


def whole(model: nn.Module, ids: Tensor) -> Tensor:
    """Loss of every token but the first, by one forward pass."""
    with torch.no_grad():
        return F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")


def counted(model: nn.Module) -> list[int]:
    """The numbers of tokens the model is called with, from now on."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda m, a, kw: calls.append(kw["input_ids"].shape[1]), with_kwargs=True)
    return calls


@pytest.mark.parametrize("make", [tiny_llama, hope])
def test_calls_of_any_size_cost_their_tokens(make: Callable[[], PreTrainedModel]) -> None:
    model, ids = make(), text(16)
    expected, learner = whole(model, ids), learner_of(model)
    calls = counted(model)
    found = torch.cat([learner.observe(part).losses for part in ids.split([1, 1, 3, 7, 2, 2])])
    assert found[0].isnan() and calls == [2, 3, 7, 2, 2]  # the first token alone is nobody's target
    torch.testing.assert_close(found[1:].double(), expected, rtol=1e-5, atol=1e-6)


def test_across_pieces_documents_and_unscored_tokens() -> None:
    """Against a learner that forgets its cache before every call."""
    one, other = learner_of(tiny_llama()), learner_of(tiny_llama())
    ids = text(sum(SIZES))
    scored = torch.rand(len(ids), generator=torch.Generator().manual_seed(3)) > 0.3
    found: list[list[Tensor]] = [[], []]
    for turn, (part, asked) in enumerate(zip(ids.split(SIZES), scored.split(SIZES), strict=True)):
        other.scorer.forget()
        for learner, seen in zip((one, other), found, strict=True):
            seen.append(learner.observe(part, scored=asked).losses)
            if turn == 3:
                learner.end_document()
    torch.testing.assert_close(torch.cat(found[0]), torch.cat(found[1]), rtol=1e-5, atol=1e-6, equal_nan=True)


def change_weights(learner: Learner) -> None:
    with torch.no_grad():
        learner.model.get_input_embeddings().weight[:, 0] += 1


def take_off_and_on(learner: Learner) -> None:
    learner.detach()
    learner.apply()


def fail_once(learner: Learner) -> None:
    """An interrupt in the middle of a call, after some of the model has written to its cache."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    hook = learner.model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        learner.observe(text(4, 7))
    hook.remove()


@pytest.mark.parametrize("between", [change_weights, take_off_and_on, fail_once])
def test_what_comes_between_two_calls(between: Callable[[Learner], None]) -> None:
    model, ids = tiny_llama(), text(12)
    learner = learner_of(model)
    learner.observe(ids[:8])
    between(learner)
    found = learner.observe(ids[8:]).losses
    torch.testing.assert_close(found.double(), whole(model, ids)[7:], rtol=1e-5, atol=1e-6)


def test_after_a_step_nothing_is_kept() -> None:
    learner = learner_of(tiny_llama(), chunk=8)
    learner.observe(text(5))
    assert learner.scorer.kept is not None
    learner.observe(text(3, 1))
    assert learner.scorer.kept is None


def jamba() -> PreTrainedModel:
    """A model whose recurrent layers go on from a cache one token at a time only."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}
    state = {"num_key_value_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    return JambaForCausalLM(JambaConfig(vocab_size=VOCABULARY, **shape, **layers, **state))


def dynamic_rope() -> PreTrainedModel:
    """A model whose cached keys hold for one length only."""
    model = tiny_llama()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    return model


@pytest.mark.parametrize("make", [jamba, dynamic_rope])
def test_a_cache_that_would_be_wrong_is_not_kept(make: Callable[[], PreTrainedModel]) -> None:
    model, ids = make(), text(16)
    expected, learner = whole(model, ids), learner_of(model)
    found = torch.cat([learner.observe(part).losses for part in ids.split([2, 1, 3, 7, 3])])
    torch.testing.assert_close(found[1:].to(expected), expected, rtol=1e-4, atol=1e-5)
    assert learner.scorer.kept is None


def test_it_is_off_unless_asked_for() -> None:
    learner = Learner(tiny_llama(), {"all": Level(64, ("*",))}, lr=0.1, context=32)
    calls = counted(learner.model)
    for part in text(8).split(2):
        learner.observe(part)
    assert calls == [2, 4, 6, 8]


def test_a_model_that_takes_no_cache_is_read_anew() -> None:
    model = tiny_llama()
    learner, plain = learner_of(model), WithoutCache(model)
    learner.scorer = Scorer(Reader(plain), keep=True)
    calls = counted(plain)
    found = torch.cat([learner.observe(part).losses for part in text(8).split(2)])
    torch.testing.assert_close(found[1:].double(), whole(model, text(8)), rtol=1e-5, atol=1e-6)
    assert calls == [2, 4, 6, 8]
