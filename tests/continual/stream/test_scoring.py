from __future__ import annotations

import pytest
import torch
from torch import nn

from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Gate, Level, Options
from nestling.continual.stream.chunks import Piece, batches
from nestling.continual.stream.scoring import Reader
from tests.continual.stream.stream_models import text, tiny_llama


def pieces() -> list[Piece]:
    """A document's beginning, one with context and gaps, one token after context, one without a target."""
    everything = torch.ones(9, dtype=torch.bool)
    gaps = torch.tensor([False, True, False, True, False])
    return [
        Piece(text(9), 0, everything),
        Piece(text(12, 1), 7, gaps),
        Piece(text(4, 2), 3, everything[:1]),
        Piece(text(1, 3), 0, everything[:1]),
    ]


class WithoutSelection(nn.Module):
    """A model that gives all logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("wrap", [lambda m: m, WithoutSelection])
def test_losses_of_a_padded_batch_are_those_of_each_piece(wrap) -> None:
    model = tiny_llama()
    expected = []
    for piece in pieces()[:3]:
        logits = model(input_ids=piece.ids[None]).logits[0]
        for i in range(max(1, piece.start), len(piece.ids)):
            if piece.scored[i - piece.start]:
                expected.append(nn.functional.cross_entropy(logits[i - 1], piece.ids[i]))
    reader = Reader(wrap(model))
    torch.testing.assert_close(reader.losses(pieces()[:3]), torch.stack(expected))
    torch.testing.assert_close(reader.scores(pieces()), torch.stack(expected).detach())
    assert reader.scores(pieces()[3:]).shape == (0,)


def test_batches_keep_to_the_budget_and_to_the_order() -> None:
    found = batches(pieces(), 24)
    assert [[len(p.ids) for p in batch] for batch in found] == [[9, 12], [4]]
    assert [len(batch) for batch in batches(pieces(), 1)] == [1, 1, 1]
    assert len(batches(pieces(), 36)) == 1


def test_whole_chunks_are_read_once_and_nothing_more() -> None:
    """Forward passes, their tokens, and the logits asked for."""
    model, calls = tiny_llama(), []
    learner = Learner(model, {"fast": Level(8, ("*mlp*",))}, lr=0.01, context=16)
    model.lm_head.register_forward_hook(lambda m, args, out: calls.append((torch.is_grad_enabled(), out.shape[1])))
    learner.observe(text(24))
    assert calls == [(True, 7), (True, 8), (True, 8)]
    calls.clear()
    learner.observe(text(3))
    learner.observe(text(5))
    assert calls == [(False, 3), (True, 8)]


def test_a_chunk_the_gate_leaves_out_costs_no_backward_pass() -> None:
    learner = Learner(tiny_llama(), {"fast": Level(8, ("*mlp*",))}, lr=0.01, context=16,
                      options=Options(gate=Gate(by="chunk", threshold=1e9)))  # fmt: skip
    backward = []
    learner.model.lm_head.register_full_backward_hook(lambda *_: backward.append(1))
    assert learner.observe(text(8)).updated == ("fast",)
    assert not backward
