from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Level, Options, Replay
from nestling.continual.replay.buffer import ReplayBuffer
from nestling.continual.stream.chunks import Piece, decode
from tests.continual.stream.stream_models import copy_of, text, tiny_llama

TOP, BOTTOM = "*layers.1.mlp.*", "*layers.0.mlp.*"


def taught(rank: int | None = None, replay: bool = True) -> Learner:
    """A learner whose fast level knows a short text by heart."""
    levels = {"fast": Level(8, (TOP,), rank=rank), "slow": Level(64, (BOTTOM,))}
    options = Options(replay=Replay(12, 1, 0.0) if replay else None)
    learner = Learner(tiny_llama(dtype=torch.float32), levels, lr=0.02, context=16, options=options)
    ids = text(24)
    for _ in range(6):
        learner.observe(ids)
        learner.end_document()
    return learner


@pytest.mark.parametrize("rank", [None, 4])
def test_what_the_fast_level_knew_goes_to_the_slow_one(rank: int | None) -> None:
    learner = taught(rank)
    seen = learner.consolidate(retention=0.0, steps=30, lr=0.01, rows=4)
    assert seen.applied
    assert (seen.fast, seen.slow) == (("fast",), ("slow",))
    assert seen.loss_before + 0.3 < seen.loss_forgotten
    assert seen.loss_after < seen.loss_forgotten - 0.3 * (seen.loss_forgotten - seen.loss_before)
    assert seen.divergence_after < 0.7 * seen.divergence_forgotten
    assert all(torch.equal(w, base) for w, base in learner.weights["fast"].anchored)
    assert (seen.pieces, seen.held_out) == (9, 3)
    learner.observe(text(16))


def test_decay_scales_the_fast_levels_difference_and_nothing_else() -> None:
    learner = taught()
    before = copy_of(learner.model)
    base = {n: learner.weights["fast"].other[n].clone() for n in learner.weights["fast"].parameters}
    seen = learner.consolidate(retention=0.25, steps=0)
    for name, p in learner.model.named_parameters():
        expected = base[name] + 0.25 * (before[name] - base[name]) if name in base else before[name]
        torch.testing.assert_close(p.detach(), expected)
    assert seen.loss_after == seen.loss_forgotten and seen.divergence_after == seen.divergence_forgotten
    assert learner.consolidate(retention=1.0, steps=0).divergence_after == pytest.approx(0, abs=1e-6)


def test_one_step_is_adamw_on_the_divergence() -> None:
    """By hand: two models, teacher and student, one piece."""
    learner = taught()
    buffer = learner.component(ReplayBuffer).pieces
    buffer.items = buffer.items[:1]
    item = buffer.items[0]
    piece = decode(item.tokens, item.metadata["start"])
    teacher, student = tiny_llama(dtype=torch.float32), tiny_llama(dtype=torch.float32)
    teacher.load_state_dict(learner.model.state_dict())
    student.load_state_dict(learner.model.state_dict())
    with torch.no_grad():
        for name, base in ((n, learner.weights["fast"].other[n]) for n in learner.weights["fast"].parameters):
            p = dict(student.named_parameters())[name]
            p.copy_(base + 0.5 * (p - base))
    slow = [p for n, p in student.named_parameters() if "layers.0.mlp" in n]
    optimizer = torch.optim.AdamW(slow, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0)
    places = torch.arange(max(piece.start, 1), len(piece.ids)) - 1
    p, q = (m(input_ids=piece.ids[None]).logits[0, places].log_softmax(-1) for m in (teacher, student))
    (p.exp() * (p - q)).sum(-1).mean().backward()
    optimizer.step()
    seen = learner.consolidate(retention=0.5, steps=1, lr=0.003)
    for name, value in student.named_parameters():
        torch.testing.assert_close(dict(learner.model.named_parameters())[name], value, rtol=1e-4, atol=1e-5)
    target = piece.ids[places + 1]
    p, q = p.detach(), q.detach()
    assert seen.loss_before == pytest.approx(float(F.nll_loss(p, target)), rel=1e-5)
    assert seen.loss_forgotten == pytest.approx(float(F.nll_loss(q, target)), rel=1e-5)
    assert seen.divergence_forgotten == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_without_a_buffer_the_model_makes_the_text() -> None:
    learner = taught(replay=False)
    state = torch.random.get_rng_state()
    seen = learner.consolidate(retention=0.0, steps=10, lr=0.01)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (seen.pieces, seen.held_out) == (6, 2)
    assert seen.divergence_after < seen.divergence_forgotten


def test_a_consolidation_that_fails_leaves_everything() -> None:
    learner = taught()
    before = copy_of(learner.model)
    assert not learner.consolidate(lr=1e30, steps=3).applied
    assert all(torch.equal(p, before[n]) for n, p in learner.model.named_parameters())
    calls = []

    def interrupt(*_):
        calls.append(0)
        if len(calls) > 9:
            raise KeyboardInterrupt

    handle = learner.model.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        learner.consolidate()
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in learner.model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fast": ["fast", "slow"]}, "only levels to forget"),
        ({"fast": []}, "only levels to learn"),
        ({"fast": ["top"]}, "fast names top"),
        ({"retention": 1.5}, "retention is in"),
        ({"held_out": 1.0}, "held_out"),
        ({"steps": -1}, "steps"),
        ({"rows": 0}, "rows"),
        ({"rows": 1.5}, "rows"),
        ({"lr": -1.0}, "lr is a number"),
        ({"lr": float("nan")}, "lr is a number"),
    ],
)
def test_arguments_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        taught(replay=False).consolidate(**arguments)


def test_pieces_are_encoded_whole() -> None:
    piece = Piece(torch.tensor([0, 5, 0, 7]), 2, torch.tensor([False, True]))
    found = decode(piece.encode(), 2)
    assert found.ids.tolist() == piece.ids.tolist() and found.scored.tolist() == [False, True]
    assert math.isclose(float(found.targets.sum()), 1)
