from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nestling.continual.component import Bounds, strictest
from nestling.continual.learner.gate import SurpriseGate
from nestling.continual.learner.guards import LearningDivergedError, LearningWarning, SpikeGuard
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Gate, Level, Options, Replay
from tests.continual.stream.stream_models import copy_of, text, tiny_llama

TOP, BOTTOM = "*layers.1.mlp.*", "*layers.0.mlp.*"


def two_levels(options: Options | None = None) -> Learner:
    levels = {"fast": Level(8, (TOP,)), "slow": Level(24, (BOTTOM,))}
    return Learner(tiny_llama(dtype=torch.float32), levels, lr=0.01, context=16, options=options)


@contextmanager
def broken(learner: Learner, where: str) -> Iterator[None]:
    """The model gives NaN losses, infinite gradients, or losses a hundred times what they are."""

    def spoil(module, arguments, output):
        if where == "loss":
            return output * math.nan
        if where == "spike":
            return output * 100
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    handle = learner.model.lm_head.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights, optimizer states and counters of levels, without the stream's own bookkeeping."""
    memory = learner.memory()
    kept = {n: t for n, t in memory.tensors.items() if not n.startswith(("pieces", "history"))}
    elapsed = torch.tensor([level.elapsed for level in learner.optimizer.levels])
    return kept | copy_of(learner.model) | {"elapsed": elapsed, "chunks": torch.tensor(learner.counters.chunks)}


@pytest.mark.parametrize("where", ["loss", "gradient", "spike"])
@pytest.mark.parametrize("size", [8, 3])
def test_a_bad_chunk_changes_nothing_but_the_count_of_skipped_tokens(where: str, size: int) -> None:
    learner = two_levels(Options(replay=Replay(8), gate=Gate(quantile=0.1), spike=5.0))
    ids = text(80)
    learner.observe(ids[:32])
    before = state(learner)
    with broken(learner, where), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = [learner.observe(ids[32:40][at : at + size]) for at in range(0, 8, size)]
    after = state(learner)
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert learner.counters.skipped == 8
    assert learner.counters.tokens == 40
    notes = [note for s in seen for note in s.notes]
    assert len(notes) == 1 and notes[0].startswith("8 tokens were not learned from")
    assert [w.category for w in caught] == [LearningWarning]
    assert "src/nestling" not in caught[0].filename, (
        "the caller's line is named, or that of the check of shapes around it"
    )
    assert not any(s.updated for s in seen)
    assert learner.observe(ids[40:48]).updated == ("fast",)
    assert learner.observe(ids[48:56]).updated == ("fast", "slow")
    assert math.isfinite(learner.log.records[-1].loss)


def test_weights_that_are_not_finite_end_learning() -> None:
    learner = two_levels()
    learner.observe(text(16))
    with torch.no_grad():
        learner.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    for _ in range(2):
        with pytest.raises(LearningDivergedError, match="last saved memory"):
            learner.observe(text(8))


@pytest.mark.parametrize("replay", [None, Replay(4)])
def test_an_interrupted_call_is_as_if_it_had_not_been(replay: Replay | None) -> None:
    learner, other = two_levels(Options(replay=replay)), two_levels(Options(replay=replay))
    ids = text(40)
    for each in (learner, other):
        each.observe(ids[:13])

    def interrupt(*_):
        raise KeyboardInterrupt

    for n in (2, 3, 9):
        handle = learner.model.model.norm.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            learner.observe(ids[13 : 13 + n])
        handle.remove()
    assert all(p.requires_grad and p.grad is None for p in learner.model.parameters())
    a, b = learner.observe(ids[13:]), other.observe(ids[13:])
    assert torch.equal(a.losses, b.losses) and a.updated == b.updated
    assert all(torch.equal(t, state(other)[n]) for n, t in state(learner).items())


@pytest.mark.any_shapes
def test_empty_and_absurd_input() -> None:
    learner = two_levels()
    learner.observe(text(5))
    before = state(learner)
    seen = learner.observe([])
    assert len(seen.losses) == 0 and seen.notes == ("no tokens: nothing was learned",)
    with pytest.raises(ValueError, match="token 50 at 2 is not in the vocabulary of 50"):
        learner.observe([1, 2, 50])
    with pytest.raises(ValueError, match="token -1 at 0"):
        learner.observe([-1, 2])
    with pytest.raises(ValueError, match=r"shape \[n\]"):
        learner.observe(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="whole numbers"):
        learner.observe(torch.ones(3))
    for wrong in (None, {1, 2}, "abc", [[1], [2, 3]], [10**30]):
        with pytest.raises(ValueError, match="tensors or sequences"):
            learner.observe(wrong)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="scored has shape"):
        learner.observe([1, 2, 3], scored=[True])
    assert learner.stream.filled == 5
    assert all(torch.equal(t, state(learner)[n]) for n, t in before.items())


def test_spikes_against_a_running_mean() -> None:
    guard = SpikeGuard(10.0, 2, 4.0)
    assert guard.refusal(50.0) is None, "nothing to compare with yet"
    guard.accept(1.0)
    guard.accept(2.0)
    assert guard.mean == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    assert guard.refusal(10.9) is None
    assert "10 times" in (guard.refusal(11.1) or "")
    guard.accept(1.1)
    assert "10 times" in (guard.refusal(11.1) or "")
    assert "starts anew" in (guard.refusal(12.0) or "")
    assert guard.refusal(12.0) is None
    guard.accept(0.01)
    assert guard.refusal(3.9) is None, "not worse than a guess"
    assert guard.refusal(math.nan) and guard.refusal(math.inf)
    assert SpikeGuard(None, 1, 0.0).refusal(1e9) is None


def test_gates_bounds() -> None:
    def gate_of(settings: Gate) -> SurpriseGate:
        gate = two_levels(Options(gate=settings)).component(SurpriseGate)
        assert gate is not None
        return gate

    gate = gate_of(Gate(quantile=0.5, threshold=1.0, window=4))
    assert gate.bounds() == Bounds(token=1.0)
    gate.learned([], torch.tensor([9.0, 5.0, 2.0, 3.0, 4.0]))
    assert gate.bounds() == Bounds(token=3.0), "of the last four"
    chunks = gate_of(Gate(by="chunk", quantile=1.0))
    assert chunks.bounds() == Bounds()
    chunks.learned([], torch.tensor([1.0, 3.0]))
    assert chunks.bounds() == Bounds(chunk=2.0)
    assert strictest([gate.bounds(), chunks.bounds(), Bounds(token=1.0)]) == Bounds(3.0, 2.0)
