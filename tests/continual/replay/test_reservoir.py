"""The replay buffer: a uniform sample, the same after saving, and nothing odd is taken."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from nestling.continual.replay.reservoir import Reservoir


def filled(capacity: int, count: int, seed: int = 0) -> Reservoir:
    made = Reservoir(capacity, seed)
    for i in range(count):
        made.add(torch.arange(i, i + 1 + i % 3), {"label": i})
    return made


def labels(reservoir: Reservoir) -> list[int]:
    return [item.metadata["label"] for item in reservoir.items]


def test_keeps_everything_until_it_is_full() -> None:
    reservoir = filled(5, 5)
    assert labels(reservoir) == [0, 1, 2, 3, 4] and reservoir.seen == 5
    assert [item.tokens.tolist() for item in reservoir.items][:3] == [[0], [1, 2], [2, 3, 4]]


def test_every_item_is_equally_likely_to_stay() -> None:
    capacity, count, trials = 5, 20, 2000
    kept = torch.zeros(count)
    for seed in range(trials):
        kept[labels(filled(capacity, count, seed))] += 1
    # Binomial(2000, 1/4): 500 with a standard deviation of 19.4; five of them over 20 items.
    assert (kept - trials * capacity / count).abs().max() < 97
    assert kept.sum() == trials * capacity


def test_add_says_whether_it_was_kept() -> None:
    reservoir, kept = Reservoir(3, 4), []
    for i in range(30):
        if reservoir.add(torch.tensor([i]), {"label": i}):
            kept.append(i)
        assert (i in labels(reservoir)) == (i in kept[-1:])
    assert 3 < len(kept) < 30


def test_samples_without_repeats_and_uniformly() -> None:
    reservoir = filled(6, 6)
    counts = torch.zeros(6)
    for _ in range(1200):
        drawn = [item.metadata["label"] for item in reservoir.sample(2)]
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    assert (counts - 400).abs().max() < 82  # five standard deviations
    assert sorted(i.metadata["label"] for i in reservoir.sample(9)) == list(range(6))
    assert reservoir.sample(0) == [] and Reservoir(2).sample(3) == []


def test_the_seed_decides() -> None:
    assert labels(filled(4, 50, 1)) == labels(filled(4, 50, 1)) != labels(filled(4, 50, 2))


@pytest.mark.parametrize("cut", [0, 2, 4, 17])
def test_goes_on_exactly_after_saving(cut: int) -> None:
    whole, first = Reservoir(4, 3), Reservoir(4, 3)
    for i in range(40):
        if i == cut:
            tensors, values = first.state()
            first = Reservoir.load(tensors, json.loads(json.dumps(values)))
        for reservoir in (whole, first):
            reservoir.add(torch.arange(i + 1), {"label": i})
        assert labels(whole) == labels(first)
        assert [x.metadata for x in whole.sample(2)] == [x.metadata for x in first.sample(2)]
    for a, b in zip(whole.items, first.items, strict=True):
        torch.testing.assert_close(a.tokens, b.tokens, rtol=0, atol=0)


def test_an_item_is_a_copy() -> None:
    tokens, metadata = torch.tensor([1, 2]), {"label": 1}
    reservoir = Reservoir(1)
    reservoir.add(tokens, metadata)
    tokens[0] = 9
    metadata["label"] = 9
    assert reservoir.items[0].tokens.tolist() == [1, 2] and reservoir.items[0].metadata == {"label": 1}


@pytest.mark.parametrize("tokens", [torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64), torch.empty(0).long(), [1]])
def test_refuses_what_is_no_sequence_of_tokens(tokens: Any) -> None:
    with pytest.raises(ValueError, match="int64 of shape"):
        Reservoir(2).add(tokens)


def test_refuses_arguments_out_of_range() -> None:
    for capacity in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="capacity"):
            Reservoir(capacity)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed"):
        Reservoir(1, -1)
    with pytest.raises(ValueError, match="metadata"):
        Reservoir(1).add(torch.tensor([1]), {"label": 0.5})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="0 or more"):
        Reservoir(1).sample(-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([1, 1])}, "do not cut"),
        ({"lengths": torch.tensor([7, -1])}, "do not cut"),
        ({"tokens": torch.zeros(3)}, "int64"),
        ({"seen": -1}, "seen"),
        ({"seen": 1}, "does not hold"),
        ({"capacity": 0}, "capacity"),
        ({"metadata": []}, "metadata"),
        ({"metadata": [1, 2]}, "metadata"),
        ({"draws": None}, "draws"),
    ],
)
def test_refuses_a_damaged_state(change: dict[str, Any], message: str) -> None:
    tensors, values = filled(2, 9).state()
    damaged: dict[str, Any] = tensors | values | change
    with pytest.raises(ValueError, match=message):
        Reservoir.load(damaged, damaged)


def test_says_what_a_state_lacks() -> None:
    tensors, values = filled(2, 9).state()
    with pytest.raises(ValueError, match="lacks lengths, draws"):
        Reservoir.load(
            {"tokens": tensors["tokens"]}, {name: value for name, value in values.items() if name != "draws"}
        )
