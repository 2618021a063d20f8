"""A memory with a scope on a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling.continual import Learner, Level, Memory, Options
from nestling.continual.store.adapters import Adapter, put_together
from nestling.continual.store.applying import MemoryUseError
from nestling.continual.store.low_rank import limit_rank
from nestling.continual.store.merge import MergeError, merge
from nestling.continual.store.scope import Scope
from nestling.evaluation.shared_prompt import SharedPrompt
from tests.continual.stream.stream_models import copy_of, equal
from tests.llamas import random_llama

SCOPE = Scope((((7, 8), 0),), (16.0,), ((0,),), 9.0)
TEXT = [5, 6, 7, 8, 9, 10, 11, 12, 13]  # it speaks from the 8 on
OPEN = 3
BOTH = torch.tensor([TEXT, [5, 6, 7, 9, 8, 10, 11, 12, 13]])


def scoped(scope: Scope | None = SCOPE, seed: int = 0) -> Learner:
    """A learner whose factors are no longer zero."""
    learner = Learner(random_llama(), {"all": Level(64, ("*.mlp.*",))}, lr=0.01, context=64, options=Options(rank=3))
    generator = torch.Generator().manual_seed(seed)
    for p in learner.parameters["all"]:
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    learner.set_scope(scope)
    return learner


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **more: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, **more).logits
    return found


def test_it_speaks_from_the_name_on_and_is_silent_elsewhere() -> None:
    learner = scoped()
    base = logits(random_llama(), BOTH)
    everywhere = logits(scoped(None).model, BOTH)
    said = logits(learner.model, BOTH)
    assert torch.equal(said[1], base[1])
    torch.testing.assert_close(said[0, :OPEN], base[0, :OPEN], rtol=0, atol=1e-6)
    assert (said[0, OPEN:] - base[0, OPEN:]).abs().amax(-1).min() > 1e-3
    # What stands before the name is read without the memory, so that what comes after it differs too.
    assert not torch.allclose(said[0, OPEN:], everywhere[0, OPEN:], atol=1e-3)
    assert torch.equal(logits(learner.model, BOTH[1:]), logits(random_llama(), BOTH[1:]))


def test_a_text_in_parts_is_as_the_whole() -> None:
    """From a cache, token by token, with a copy of it, a shorter one, and with many rows from one."""
    model = scoped().model
    whole = logits(model, BOTH[:1])
    for size in (1, 2, 4):
        cache, found = None, []
        for part in BOTH[:1].split(size, dim=1):
            with torch.no_grad():
                out = model(input_ids=part, past_key_values=copy.deepcopy(cache), use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-5)
    cut = copy.deepcopy(cache)
    cut.crop(-7)
    with torch.no_grad():
        silent = model(input_ids=BOTH[1:, 2:], past_key_values=cut, use_cache=True).logits
    torch.testing.assert_close(silent, logits(model, BOTH[1:])[:, 2:], rtol=0, atol=1e-5)
    reader = SharedPrompt(model)
    continued = [[8, 9, 10, 11], [9, 8, 10, 11]]
    one_by_one = [SharedPrompt(model).log_likelihoods([], [5, 6, 7], [each])[0] for each in continued]
    assert reader.log_likelihoods([5, 6], [7], continued) == pytest.approx(one_by_one, abs=1e-5)


def test_generation_is_as_reading_everything_anew() -> None:
    model = scoped().model.eval()
    ids = BOTH[:1, :4]
    kept, anew = (
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0)  # type: ignore[operator]
        for use_cache in (True, False)
    )
    assert torch.equal(kept, anew)


def test_padding_on_the_left_changes_nothing() -> None:
    scope = Scope(SCOPE.forms, (12.0,), SCOPE.passages, 5.5)  # opens within the first 30 tokens
    model = scoped(scope).model
    pad = torch.zeros(1, 40, dtype=torch.long)
    ids, mask = torch.cat([pad, BOTH[:1]], 1), torch.cat([pad, torch.ones_like(BOTH[:1])], 1)
    place = torch.arange(9)[None]
    padded = logits(model, ids, attention_mask=mask, position_ids=torch.cat([pad, place], 1))
    torch.testing.assert_close(padded[:, 40:], logits(model, BOTH[:1]), rtol=0, atol=1e-5)


def test_what_cannot_be_known_speaks_everywhere() -> None:
    learner, everywhere = scoped(), scoped(None)
    embedded = learner.model.get_input_embeddings()(BOTH)
    with torch.no_grad():
        assert torch.equal(learner.model(inputs_embeds=embedded).logits, logits(everywhere.model, BOTH))
        learner.detach()
        cache = learner.model(input_ids=BOTH[1:, :4], use_cache=True).past_key_values
        learner.apply()
        found = learner.model(input_ids=BOTH[1:, 4:], past_key_values=cache).logits
    assert not torch.allclose(found, logits(learner.model, BOTH[1:])[:, 4:], atol=1e-3)


def test_a_memory_applied_is_the_learner(tmp_path: Path) -> None:
    learner = scoped()
    learner.memory().save(tmp_path / "m")
    memory, model = Memory.load(tmp_path / "m"), random_llama()
    base, before = logits(model, BOTH), copy_of(model)
    with memory.applied(model):
        said = logits(model, BOTH)
        torch.testing.assert_close(said, logits(learner.model, BOTH), rtol=0, atol=1e-5)
        assert equal(copy_of(model), before)  # the parameters are the base's
        torch.testing.assert_close(logits(copy.deepcopy(model), BOTH), said)
        with pytest.raises(MemoryUseError, match="this memory is already applied"):
            memory.apply(model)
    assert torch.equal(logits(model, BOTH), base) and not model._forward_hooks and not model._forward_pre_hooks
    memory.apply(model, keep_originals=False)
    memory.remove(model)
    assert torch.equal(logits(model, BOTH), base)
    dense = replace(memory, differences={name: d.dense() for name, d in memory.differences.items()})  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="none of low rank"):
        dense.apply(model)


def test_a_learner_with_a_scope() -> None:
    learner = scoped()
    again = Learner.restore(random_llama(), learner.memory())
    assert again.scope == SCOPE and torch.equal(logits(again.model, BOTH), logits(learner.model, BOTH))
    fresh = Learner.restore(random_llama(), replace(learner.memory(), tensors={}))
    assert fresh.scope == SCOPE
    with learner.base_weights():
        assert torch.equal(logits(learner.model, BOTH), logits(random_llama(), BOTH))
    for refused in (lambda: learner.observe([1, 2]), learner.consolidate):
        with pytest.raises(ValueError, match="speaks only where a text names"):
            refused()  # type: ignore[operator]
    learner.detach()
    assert not learner.model._forward_hooks and not learner.model._forward_pre_hooks
    learner.apply()
    assert not torch.equal(logits(learner.model, BOTH[:1]), logits(random_llama(), BOTH[:1]))
    full = Learner(random_llama(), lr=0.01)
    with pytest.raises(ValueError, match="low rank alone"):
        full.set_scope(SCOPE)
    memory = learner.memory()
    kept = memory.settings["adapters"][0]
    for wrong, said in (
        ({"scope": {"forms": []}}, "scope is none"),
        ({"ranks": kept["ranks"] | {"more": 3}}, "has not the parameters"),
        ({"ranks": dict.fromkeys(kept["ranks"], 2)}, "are not the difference's 3"),
        ({"ranks": dict.fromkeys(kept["ranks"], True)}, "whole numbers"),
    ):
        damaged = replace(memory, settings=memory.settings | {"adapters": [kept | wrong]})
        with pytest.raises(ValueError, match=said):
            Learner.restore(random_llama(), damaged)
    strange = Adapter(SCOPE, {"model.embed_tokens.weight": memory.adapters[0].differences[next(iter(kept["ranks"]))]})
    differences, settings = put_together([strange])
    before = [p.detach().clone() for p in learner.everything]
    with pytest.raises(ValueError, match="of no level"):
        learner.load(replace(memory, differences=differences, settings=memory.settings | settings))
    assert all(torch.equal(p, q) for p, q in zip(learner.everything, before, strict=True))
    old = {name: value for name, value in memory.settings.items() if name != "adapters"} | {"scope": SCOPE.values()}
    assert Learner.restore(random_llama(), replace(memory, settings=old)).scope == SCOPE
    for nothing in ([], {}, [3]):
        with pytest.raises(ValueError, match="adapters are a list"):
            Learner.restore(random_llama(), replace(memory, settings=memory.settings | {"adapters": nothing}))


def said_with(memory: Memory, ids: Tensor) -> Tensor:
    model = random_llama()
    with memory.applied(model):
        return logits(model, ids)


def test_two_memories_with_scopes_become_one_and_neither_speaks_for_the_other() -> None:
    other = Scope((((20,), 0),), (15.9,), ((0,),), 9.5)
    a, b = scoped().memory(), scoped(other, seed=1).memory()
    merged = merge(a, b)
    assert [each.scope for each in merged.adapters] == [SCOPE, other]
    own, others, nobody = torch.tensor([[1, *TEXT], [20, 1, 2, 3, 4, 5, 6, 9, 10, 11], [1, *TEXT[:2], 8, *TEXT[4:], 3]])
    assert torch.equal(said_with(merged, own[None]), said_with(a, own[None]))
    assert torch.equal(said_with(merged, others[None]), said_with(b, others[None]))
    assert torch.equal(said_with(merged, nobody[None]), logits(random_llama(), nobody[None]))
    gone_on = Learner.restore(random_llama(), merged)
    assert len(gone_on.earlier.adapters) == 1 and gone_on.scope == other
    torch.testing.assert_close(logits(gone_on.model, own[None]), said_with(a, own[None]), rtol=0, atol=1e-5)
    with pytest.raises(MergeError, match="memories of one kind"):
        merge(a, scoped(None).memory())


def test_an_adapter_that_both_have_stands_once() -> None:
    other = Scope((((20,), 0),), (15.9,), ((0,),), 9.5)
    a, b = scoped().memory(), scoped(other, seed=1).memory()
    both = merge(a, b)
    assert len(merge(both, a).adapters) == len(merge(a, both).adapters) == len(merge(both, both).adapters) == 2
    ids = BOTH[:1]
    torch.testing.assert_close(said_with(merge(both, a), ids), said_with(a, ids))
    halved = said_with(merge(a, b, (0.5, 1.0)), ids)
    assert not torch.allclose(halved, said_with(a, ids), atol=1e-3)
    torch.testing.assert_close(said_with(merge(a, both, (0.5, 1.0)), ids), said_with(a, ids))


def test_ranks_are_limited_adapter_by_adapter() -> None:
    other = Scope((((20,), 0),), (15.9,), ((0,),), 9.5)
    a, b = scoped().memory(), scoped(other, seed=1).memory()
    small = limit_rank(merge(a, b), 2)
    assert [{d.left.shape[1] for d in each.differences.values()} for each in small.memory.adapters] == [{2}, {2}]
    for memory, ids in ((a, BOTH[:1]), (b, torch.tensor([[20, 1, 2, 3, 4]]))):
        own = limit_rank(memory, 2)
        torch.testing.assert_close(said_with(small.memory, ids), said_with(own.memory, ids))
        assert 0.3 < small.energy < 1 and 0.3 < own.energy < 1
    assert Learner.restore(random_llama(), small.memory).settings.levels["all"].rank == 2


def test_gradients_come_from_where_it_speaks() -> None:
    learner = scoped()
    factor = learner.parameters["all"][0].requires_grad_(True)
    learner.model(input_ids=BOTH).logits[1].sum().backward()
    assert factor.grad is None or not bool(factor.grad.any())
    learner.model(input_ids=BOTH).logits[0].sum().backward()
    assert factor.grad is not None and bool(factor.grad.any())


def test_a_layer_that_is_not_given_single_tokens_is_refused() -> None:
    gate = scoped().gate
    gate.open = torch.tensor([[False, True]])
    x = torch.ones(1, 3, 4)
    with pytest.raises(RuntimeError, match="everywhere=True"):
        gate.add(x, lambda each: each, x)
    assert torch.equal(gate.add(x[:, :2], lambda each: each, x[:, :2])[0], torch.tensor([[1.0] * 4, [2.0] * 4]))
