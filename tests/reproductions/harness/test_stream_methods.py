from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from nestling.continual.learner.options import Replay
from nestling.continual.stream.scoring import read_frozen
from reproductions.harness.level_records import levels_alike
from reproductions.harness.stream_methods import (
    ABLATIONS,
    METHODS,
    StreamModel,
    method_of,
    period_names,
)
from tests.llamas import random_llama

LEARNING = [name for name, method in METHODS.items() if method.learned != "nothing"]
SIZES = {"chunk": 8, "context": 16, "long": 32}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return random_llama(layers=4)


def text(n: int) -> Tensor:
    return torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(5))


def by_hand(model: LlamaForCausalLM, ids: Tensor, context: int, piece: int) -> Tensor:
    losses = [torch.full((1,), math.nan)]
    for start in range(0, len(ids), piece):
        first = max(0, start - (context - piece))
        window = ids[first : start + piece]
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0, :-1]
        every = F.cross_entropy(logits, window[1:], reduction="none")
        losses.append(every[max(0, start - first - 1) :])
    return torch.cat(losses)


@pytest.mark.parametrize(("context", "piece"), [(16, None), (12, 4), (64, None), (20, 13)])
def test_frozen_reading_by_hand(base: LlamaForCausalLM, context: int, piece: int | None) -> None:
    ids = text(45)
    expected = by_hand(base, ids, context, piece or context // 2)
    torch.testing.assert_close(read_frozen(base, ids, context, piece), expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*METHODS, *(f"cms_2+{option}" for option in ABLATIONS)])
def test_at_rate_zero_every_method_is_the_frozen_model(base: LlamaForCausalLM, name: str) -> None:
    before = {key: value.clone() for key, value in base.state_dict().items()}
    reader = StreamModel(base, method_of(name), 0.0, **SIZES)
    ids, context = text(40), {"frozen_long": 32, "frozen_longest": 512}.get(name, 16)
    losses = reader.read(ids)
    near = 0.2 if "bfloat16" in name else 1e-3
    torch.testing.assert_close(losses, read_frozen(base, ids, context), equal_nan=True, rtol=1e-3, atol=near)
    assert reader.score(ids) == pytest.approx(float(read_frozen(base, ids, context)[1:].mean()), abs=1e-3)
    reader.close()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize(("name", "slow"), [("cms_2", 5e-4), ("cms_2+even", 1e-3), ("cms_2+rising", 2e-3)])
def test_rates_of_the_slow_level(base: LlamaForCausalLM, name: str, slow: float) -> None:
    reader = StreamModel(base, method_of(name), 1e-3, **SIZES)
    assert reader.learner is not None
    rates = {group["level"]: group["lr"] for group in reader.learner.optimizer.param_groups}
    assert rates == {"level_1": 1e-3, "level_2": pytest.approx(slow)}


@pytest.mark.parametrize("name", LEARNING)
def test_what_learns(base: LlamaForCausalLM, name: str) -> None:
    reader = StreamModel(base, method_of(name), 1e-2, **SIZES)
    before = {key: p.detach().clone() for key, p in reader.model.named_parameters()}
    reader.read(text(8))
    changed = {key for key, p in reader.model.named_parameters() if not torch.equal(p, before[key])}
    blocks = {"one_level": "0123", "cms_2": "23", "cms_3": "23", "cms_4": "3"}
    if name == "full":
        assert changed == set(before)
    elif name == "lora":
        # The first step moves the factors that begin as zero.
        assert changed == {key for key in before if "lora_B" in key} and len(changed) == 4 * 7
    else:
        own = tuple(f"blocks.{i}.channel.levels.level_1." for i in blocks[name])
        assert changed == {key for key in before if key.startswith(own)}
    reader.read(text(8))
    assert reader.score(text(8)) < read_frozen(base, text(8), 16)[1:].mean() - 0.05
    reader.close()


def test_unscored_tokens_are_not_learned_from(base: LlamaForCausalLM) -> None:
    ids, scored = text(16), torch.arange(16) % 3 == 0
    for name in ("frozen", "one_level"):
        reader = StreamModel(base, method_of(name), 1e-2, **SIZES)
        losses = reader.read(ids, scored)
        assert torch.equal(losses.isfinite(), scored & (torch.arange(16) > 0))
        reader.close()
    reader = StreamModel(base, method_of("one_level"), 1e-2, **SIZES)
    reader.read(ids, torch.zeros(16, dtype=torch.bool))
    assert reader.score(ids) == pytest.approx(float(read_frozen(base, ids, 16)[1:].mean()), abs=1e-5)
    reader.close()


def test_periods_and_options() -> None:
    assert period_names(3, 256) == {"level_1": 256, "level_2": 1024, "level_3": 4096}
    assert method_of("cms_3+retention").options.retention == 0.98
    assert method_of("cms_3+sleep").sleep is not None and method_of("cms_3").sleep is None
    several = method_of("cms_2+even+split+projection+retention")
    assert several.rate_exponent == 0.0 and several.assignment == "split"
    assert several.options.replay == Replay(weight=0.0, projection=True) and several.options.retention == 0.98
    for name in ("cms_9", "lora+replay", "cms_2+nothing", "frozen+gate", "cms_2+even+nothing", "cms_2+"):
        with pytest.raises(ValueError, match="unknown method"):
            method_of(name)


def test_sleep_comes_after_every_text(base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = StreamModel(base, method_of("cms_2+sleep"), 1e-3, **SIZES)
    assert reader.learner is not None
    slept = []
    monkeypatch.setattr(reader.learner, "consolidate", lambda **given: slept.append(given))
    reader.read(text(20))
    reader.read(text(20))
    assert slept == [{"retention": 0.5, "steps": 10, "rows": 2}] * 2
    reader.close()


def test_the_levels_measures(base: LlamaForCausalLM) -> None:
    reader = StreamModel(base, method_of("cms_2"), 1e-2, measure_every=2, **SIZES)
    names = reader.model.config.levels
    before = {key: p.detach().clone() for key, p in reader.model.named_parameters()}
    reader.read(text(24))
    assert [record["step"] for record in reader.records] == [1, 3]
    last = reader.records[-1]
    moved = [p - before[key] for key, p in reader.model.named_parameters() if ".level_1." in key]
    distance = math.sqrt(sum(float(m.square().sum()) for m in moved))
    assert last["level_1/distance"] == pytest.approx(distance, rel=1e-4)
    assert last["level_2/distance"] == 0 and list(names) == ["level_1", "level_2"]
    assert 0 < last["level_1~level_2/subspace_chance"] < last["level_1~level_2/subspace"] <= 1
    mean = sum(r["level_1~level_2/subspace"] for r in reader.records) / 2
    found = levels_alike(reader.records)
    assert found["level_1~level_2/subspace"] == pytest.approx(mean)
    assert not [key for key in found if "cosine" in key]
    reader.close()
    plain = StreamModel(base, method_of("cms_2"), 1e-2, **SIZES)
    plain.read(text(24))
    assert not plain.records
    plain.close()


def test_a_text_knows_nothing_of_the_one_before(base: LlamaForCausalLM) -> None:
    reader = StreamModel(base, method_of("cms_2"), 0.0, **SIZES)
    reader.read(text(24).flip(0))
    losses = reader.read(text(24))
    torch.testing.assert_close(losses, read_frozen(base, text(24), 16), equal_nan=True, rtol=1e-3, atol=1e-3)
    reader.close()
