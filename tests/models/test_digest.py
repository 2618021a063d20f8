"""By its digest a state knows the tokens again that it has read."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestling.models.digest import POINTS, PRIME, empty_digest, extend_digest
from tests.models.conftest import small_model


def literal(tokens: list[int]) -> list[int]:
    """One token after the other, in whole numbers."""
    digest = [0] * len(POINTS)
    for token in tokens:
        digest = [(d * point + token + 1) % PRIME for d, point in zip(digest, POINTS, strict=True)]
    return digest


def of(*rows: list[int]) -> Tensor:
    return extend_digest(empty_digest(len(rows)), torch.tensor(rows), None)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=40), st.integers(0, 40))
def test_any_split_gives_the_literal_digest(tokens: list[int], cut: int) -> None:
    digest = empty_digest(1)
    for part in (tokens[:cut], tokens[cut:]):
        if part:
            digest = extend_digest(digest, torch.tensor([part]), None)
    assert digest.tolist() == [literal(tokens)]
    assert digest.dtype == torch.int32


def test_what_follows_a_rows_length_does_not_count() -> None:
    tokens = torch.tensor([[5, 6, 7], [5, 6, 9], [8, 8, 8]])
    digest = extend_digest(of([1], [1], [2]), tokens, torch.tensor([2, 2, 0]))
    assert digest.tolist() == [literal([1, 5, 6]), literal([1, 5, 6]), literal([2])]


def test_order_length_and_zeros_count() -> None:
    found = [tuple(of(row)[0].tolist()) for row in ([1, 2], [2, 1], [0], [0, 0], [1], [1, 0])]
    assert len(set(found)) == len(found)


def test_a_models_state_holds_the_digest_of_its_rows() -> None:
    model = small_model("hope")
    ids = torch.randint(3, 61, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    state = model(ids[:, :7], attention_mask=mask[:, :7]).past_key_values
    state = model(ids[:, 7:], past_key_values=state).past_key_values
    assert state.digest.tolist() == [literal(ids[0].tolist()), literal(ids[1, 5:].tolist())]
    assert model.init_state(2).digest.tolist() == [[0, 0]] * 2
    unknown = model(inputs_embeds=model.embed_tokens(ids)).past_key_values
    assert unknown.digest is None
    assert model(ids, past_key_values=unknown).past_key_values.digest is None
