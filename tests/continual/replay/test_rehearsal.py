"""The pre-trained model's own text, with which it keeps what it knew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from nestling.continual import Learner, Level, Options, Rehearsal
from nestling.continual.replay.rehearsal import ROWS, RehearsedText, write
from tests.continual.learner.reference_learner import ReferenceLevel, learn, momentum
from tests.continual.learner.test_learner import DOCUMENTS, TOP, agree, names, read
from tests.continual.stream.stream_models import copy_of, equal, text, tiny_llama


def test_rehearsal_as_the_reference() -> None:
    """KL(base || model) on the model's own text, which is written once, from the base weights."""
    model = tiny_llama()
    levels = {"fast": ReferenceLevel(names(model, "layers.1.mlp"), 6, momentum(0.01))}
    options = Options(rehearsal=Rehearsal(pieces=3, length=9, weight=0.7), seed=5)
    learner = Learner(model, {"fast": Level(6, (TOP,))}, "sgd", lr=0.01, context=12, options=options)
    written = write(learner, 3, 9, 5)
    drawn: list[list[int]] = []

    def rehearse(number: int) -> list[int]:
        drawn.append(learner.component(RehearsedText).piece(number - 1).ids.tolist())
        return drawn[-1]

    expected = learn(model, DOCUMENTS, levels, 12, 6, rehearse=rehearse, rehearsal_weight=0.7)
    assert all(row in written.tolist() for row in drawn)
    assert len({tuple(row) for row in drawn}) > 1
    before = torch.get_rng_state()
    learner.component(RehearsedText).ids = None
    agree(learner, read(learner, DOCUMENTS), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(learner.component(RehearsedText).ids, written)
    plain = tiny_llama()
    without = learn(plain, DOCUMENTS, levels, 12, 6)
    assert any(not torch.allclose(expected.weights[n], without.weights[n]) for n in levels["fast"].names)


def written_by(learner: Learner) -> Tensor | None:
    """The text that a learner's model wrote."""
    return rehearsed_by(learner).ids


def rehearsed_by(learner: Learner) -> RehearsedText:
    """The learner's component."""
    rehearsed = learner.component(RehearsedText)
    assert rehearsed is not None
    return rehearsed


def test_rehearsed_text_is_the_base_models_whatever_was_loaded() -> None:
    options = Options(rehearsal=Rehearsal(pieces=2, length=9))
    fresh = Learner(tiny_llama(), {"fast": Level(6, (TOP,))}, lr=0.3, context=12, options=options)
    fresh.observe(text(60))
    knowing = Learner(tiny_llama(), {"fast": Level(6, (TOP,))}, lr=0.3, context=12, options=options)
    knowing.load(replace(fresh.memory(), tensors={}))
    knowing.observe(text(6))
    assert torch.equal(written_by(knowing), written_by(fresh))


def test_writing_at_once_is_told_and_can_be_given_up() -> None:
    """The same text as with the first chunk; given up half way, model and random numbers are as before."""
    options = Options(rehearsal=Rehearsal(pieces=ROWS + 3, length=9))
    late, early = (
        Learner(tiny_llama(), {"fast": Level(6, (TOP,))}, lr=0.3, context=12, options=options) for _ in range(2)
    )
    late.observe(text(12))

    def give_up(done: int) -> None:
        if done > 9 * ROWS:
            raise KeyboardInterrupt

    weights, numbers = copy_of(early.model), torch.get_rng_state()
    settings = early.model.generation_config
    with pytest.raises(KeyboardInterrupt):
        rehearsed_by(early).write(give_up)
    assert written_by(early) is None and early.model.generation_config is settings
    assert equal(copy_of(early.model), weights) and torch.equal(torch.get_rng_state(), numbers)
    told: list[int] = []
    rehearsed_by(early).write(told.append)
    assert told == [n * ROWS for n in range(2, 10)] + [9 * ROWS + 3 * n for n in range(2, 10)]
    rehearsed_by(early).write(give_up)  # nothing to write any more
    early.observe(text(12))
    assert torch.equal(written_by(early), written_by(late))
    assert equal(copy_of(early.model), copy_of(late.model))
    early.detach()
    rehearsed_by(early).ids = None
    with pytest.raises(RuntimeError, match="detached"):
        rehearsed_by(early).write()


def test_the_models_text_does_not_follow_its_generation_settings() -> None:
    learner = Learner(tiny_llama(), {"fast": Level(8, (TOP,))}, lr=0.01, context=16)
    plain = write(learner, 3, 12, 0)
    made = GenerationConfig(temperature=0.05, top_p=0.5, repetition_penalty=3.0, eos_token_id=list(range(40)))
    learner.model.generation_config = made
    assert torch.equal(write(learner, 3, 12, 0), plain)
    assert learner.model.generation_config is made
    learner.model.config.bos_token_id = 10**6
    other = write(learner, 3, 12, 0)
    assert other.shape == (3, 12) and len(other[:, 0].unique()) > 1
