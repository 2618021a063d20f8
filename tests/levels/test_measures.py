"""Measures of levels on cases whose answer is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from nestling import NestlingForCausalLM, presets
from nestling.levels.assignment import assign_levels, continuum_levels, multi_frequency
from nestling.levels.measures import (
    LevelMeter,
    gradient_cosine,
    roles,
    roles_by_depth,
    subspace_similarity,
)

WIDTH, HIDDEN = 12, 20


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def level(seed: int, rank: int = 3, directions: slice = slice(None)) -> dict[str, Tensor]:
    """Gradients of an MLP: low-rank, in some of the stream's directions only."""
    down, up = torch.zeros(WIDTH, HIDDEN), torch.zeros(HIDDEN, WIDTH)
    size = len(range(WIDTH)[directions])
    down[directions] = draw(seed, size, rank) @ draw(seed + 1, rank, HIDDEN)
    up[:, directions] = draw(seed + 2, HIDDEN, rank) @ draw(seed + 3, rank, size)
    return {"down": down, "up": up, "norm": torch.zeros(WIDTH)}


def test_equal_gradients_are_alike_and_opposite_ones_are_not() -> None:
    a = level(0)
    assert gradient_cosine(a, a) == pytest.approx(1)
    assert gradient_cosine(a, {n: 3 * g for n, g in a.items()}) == pytest.approx(1)
    assert gradient_cosine(a, {n: -g for n, g in a.items()}) == pytest.approx(-1)
    alike = subspace_similarity(a, {n: 3 * g for n, g in a.items()}, WIDTH)
    assert alike is not None and alike[0] == pytest.approx(1) and alike[1] < 0.7


def test_orthogonal_gradients() -> None:
    a, b = level(0, directions=slice(0, 6)), level(9, directions=slice(6, 12))
    assert gradient_cosine(a, b) == pytest.approx(0, abs=1e-7)
    alike = subspace_similarity(a, b, WIDTH)
    assert alike is not None and alike[0] == pytest.approx(0, abs=1e-7) and alike[1] > 0.1


def test_the_order_of_hidden_units_hides_likeness_from_the_cosine_only() -> None:
    a, turn = level(0), torch.linalg.qr(draw(5, HIDDEN, HIDDEN))[0]
    b = {"down": a["down"] @ turn, "up": turn.mT @ a["up"], "norm": a["norm"]}
    cosine, alike = gradient_cosine(a, b), subspace_similarity(a, b, WIDTH)
    assert cosine is not None and abs(cosine) < 0.4
    assert alike is not None and alike[0] == pytest.approx(1)


def test_chance_is_what_random_directions_give() -> None:
    """The mean over random rotations of one level's directions."""
    a, b = level(0), level(9)
    found, wanted = [], None
    for seed in range(300):
        turn = torch.linalg.qr(draw(100 + seed, WIDTH, WIDTH))[0]
        turned = {"down": turn @ b["down"], "up": b["up"] @ turn.mT}
        alike = subspace_similarity(a, turned, WIDTH)
        assert alike is not None
        found.append(alike[0])
        wanted = alike[1]
    assert sum(found) / len(found) == pytest.approx(wanted, rel=0.05)


def test_what_cannot_be_compared_is_none() -> None:
    a = level(0)
    assert gradient_cosine(a, {"down": torch.zeros(3, 3)}) is None
    assert gradient_cosine(a, {n: torch.zeros_like(g) for n, g in a.items()}) is None
    assert subspace_similarity({"norm": a["norm"]}, {"norm": a["norm"]}, WIDTH) is None
    tiny = {n: 1e-25 * g for n, g in a.items()}
    assert gradient_cosine(tiny, tiny) == pytest.approx(1)


def make_hope() -> NestlingForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    return NestlingForCausalLM(presets.hope(**sizes, periods=(8, 16, None)))


def test_roles_pair_the_levels_of_every_block() -> None:
    model = make_hope()
    levels = assign_levels(model, dict.fromkeys(continuum_levels(model), 1))
    a, b = (roles(model, levels[n]) for n in ("cms.0", "cms.1"))
    assert a["blocks.1.channel.levels.*.gate.weight"] == "blocks.1.channel.levels.0.gate.weight"
    assert set(a) == set(b) and len(a) == len(levels["cms.0"])
    both = roles(model, [*levels["cms.0"], *levels["cms.1"]])
    assert not both  # a role that a level has twice has no counterpart


def step(model: NestlingForCausalLM, seed: int) -> None:
    ids = torch.randint(0, 20, (2, 24), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()


def test_a_meter_measures_what_the_steps_did() -> None:
    model = make_hope()
    periods = {"cms.0": 1, "cms.1": 3, "cms.2": 3}
    optimizer = multi_frequency(model, periods, lambda only: SGD(only, lr=0.1))
    meter = LevelMeter(model, assign_levels(model, periods))
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = after = first
    for t in range(1, 8):
        optimizer.zero_grad()
        step(model, t)
        meter.before_step(optimizer, record=t == 7)
        old = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        meter.after_step()
        if t == 6:
            before, after = old, {n: p.detach().clone() for n, p in model.named_parameters()}
    found = meter.measure()
    now = dict(model.named_parameters())
    slow = [n for n in now if ".levels.1." in n]

    def length(a: Any, b: Any, names: list[str]) -> float:
        return float(torch.cat([(a[n] - b[n]).detach().flatten() for n in names]).norm())

    assert found["cms.1/update_norm"] == pytest.approx(length(after, before, slow), rel=1e-5)
    assert found["cms.1/distance"] == pytest.approx(length(now, first, slow), rel=1e-5)
    gradients = torch.cat([now[n].grad.flatten() for n in slow if now[n].grad is not None])
    assert found["cms.1/grad_norm"] == pytest.approx(float(gradients.norm()), rel=1e-5)
    periods_found = [found[f"{name}/effective_period"] for name in ("cms.0", "cms.1", "rest")]
    assert periods_found == [1.0, 3.5, 1.0]

    again = LevelMeter(make_hope(), assign_levels(model, periods))
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert again.measure()["cms.1/effective_period"] == 3.5


def test_levels_that_are_copies_have_a_cosine_of_one() -> None:
    """A headwise continuum: all levels read the same input, and equal weights have equal gradients."""
    torch.manual_seed(0)
    config = presets.hope_attention(
        hidden_size=16, num_layers=1, num_heads=2, vocab_size=20, variant="headwise", periods=(None, None)
    )
    model = NestlingForCausalLM(config)
    one, two = model.blocks[0].channel.levels
    two.load_state_dict(one.state_dict())
    optimizer = AdamW(model.parameters())
    meter = LevelMeter(model, assign_levels(model, {"cms.0": 1, "cms.1": 1}))
    step(model, 0)
    meter.before_step(optimizer, record=True)
    assert meter.measure()["cms.0~cms.1/cosine"] == pytest.approx(1, abs=1e-6)
    model.zero_grad()
    nn.init.normal_(two.down)
    nn.init.normal_(two.gate.weight)
    step(model, 0)
    meter.before_step(optimizer, record=True)
    found = meter.measure()
    assert abs(found["cms.0~cms.1/cosine"]) < 0.3 and found["cms.0~cms.1/subspace"] > found["cms.0~cms.1/cosine"]


def test_roles_of_levels_that_are_groups_of_blocks() -> None:
    def names(level: str, blocks: range) -> list[str]:
        return [f"blocks.{i}.channel.levels.{level}.{kind}.weight" for i in reversed(blocks) for kind in ("down", "up")]

    levels = {"fast": names("fast", range(8, 12)), "slow": names("slow", range(8))}
    found = roles_by_depth(levels, 2)
    assert found["fast"] == {
        f"{kind}.weight {place} of 2": f"blocks.{block}.channel.levels.fast.{kind}.weight"
        for kind in ("down", "up")
        for place, block in ((1, 9), (2, 11))
    }
    assert [found["slow"][f"down.weight {i} of 2"].split(".")[1] for i in (1, 2)] == ["2", "6"]
    few = roles_by_depth(levels, 100)
    assert set(few["fast"]) == set(few["slow"]) and len(few["fast"]) == 8
    meter = LevelMeter(nn.Linear(2, 2), {"all": ["weight"]}, {"all": {"a role": "weight"}})
    assert meter.roles == {"all": {"a role": "weight"}}
