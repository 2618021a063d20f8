from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nestling import NestlingForCausalLM, presets
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.observation import Observation
from nestling.continual.learner.options import Gate, Level, Options, Rehearsal, Replay, UpdateLimit
from nestling.continual.replay.reservoir import Reservoir
from nestling.continual.store.memory import DocumentRecord
from nestling.levels.assignment import stream_levels
from nestling.models import convert
from tests.continual.learner.reference_learner import ReferenceLevel, adam, learn, momentum, rows_of
from tests.continual.stream.stream_models import copy_of, text, tiny_llama

TOP, BOTTOM = "*layers.1.mlp.*", "*layers.0.mlp.*"
DOCUMENTS = [text(n, seed).tolist() for seed, n in enumerate((21, 1, 2, 5, 40, 13))]


def names(model: nn.Module, part: str) -> list[str]:
    return [n for n, _ in model.named_parameters() if part in n]


def read(learner: Learner, documents: Sequence[Sequence[int]], size: int | None = None) -> Observation:
    """All documents in calls of `size` tokens; the observations of all calls as one."""
    losses, updated, notes = [], [], []
    for document in documents:
        step = size or len(document)
        for at in range(0, len(document), step):
            seen = learner.observe(document[at : at + step])
            losses.append(seen.losses)
            updated += seen.updated
            notes += seen.notes
        learner.end_document()
    return Observation(torch.cat(losses), tuple(updated), tuple(notes))


def agree(learner: Learner, seen: Observation, expected, tolerance: float = 1e-9) -> None:
    """Losses, weights and updates are the reference's."""
    torch.testing.assert_close(seen.losses, torch.tensor(expected.losses), rtol=1e-6, atol=1e-6, equal_nan=True)
    agree_on_weights(learner, expected.weights, tolerance)
    assert seen.updated == tuple(name for _, name in expected.updates)
    assert not seen.notes


def agree_on_weights(learner: Learner, weights: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, p in learner.model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("context", "piece"), [(16, None), (12, 4), (9, 8), (20, 3)])
def test_two_levels_as_the_reference(optimizer: str, context: int, piece: int | None) -> None:
    model = tiny_llama()
    update = {"adamw": adam, "sgd": momentum}[optimizer]
    levels = {
        "fast": ReferenceLevel(names(model, "layers.1.mlp"), 8, update(0.01)),
        "slow": ReferenceLevel(names(model, "layers.0.mlp"), 24, update(0.01 * 3**-0.5)),
    }
    expected = learn(model, DOCUMENTS, levels, context, min(8, piece or context // 2))
    learner = Learner(
        model,
        {"slow": Level(24, (BOTTOM,)), "fast": Level(8, (TOP,))},
        optimizer,
        lr=0.01,
        context=context,
        options=Options(piece=piece),
    )
    agree(learner, read(learner, DOCUMENTS), expected)
    assert learner.counters.tokens == sum(map(len, DOCUMENTS))


@pytest.mark.parametrize("rate_exponent", [0.0, 0.5])
def test_rates_periods_and_own_optimizers(rate_exponent: float) -> None:
    model = tiny_llama()
    levels = {
        "a": ReferenceLevel(["model.layers.1.mlp.up_proj.weight"], 4, adam(0.02)),
        "b": ReferenceLevel(names(model, "layernorm"), 12, momentum(0.03)),
        "c": ReferenceLevel(names(model, "embed"), 16, adam(0.02 * 4**rate_exponent)),
        "d": ReferenceLevel(names(model, "layers.0.mlp"), 16, lambda w, g, s: -0.1 * g),
    }
    expected = learn(model, DOCUMENTS, levels, 10, 4)
    learner = Learner(
        model,
        {
            "a": Level(4, ("model.layers.1.mlp.up_proj.weight",)),
            "b": Level(12, ("*layernorm*",), lr=0.03, optimizer="sgd"),
            "c": Level(16, ("*embed*",)),
            "d": Level(16, (BOTTOM,), optimizer=partial(torch.optim.SGD, lr=0.1)),
        },
        lr=0.02,
        rate_exponent=rate_exponent,
        context=10,
    )
    agree(learner, read(learner, DOCUMENTS), expected)


def test_retention_and_limit_as_the_reference() -> None:
    model = tiny_llama()
    levels = {
        "fast": ReferenceLevel(names(model, "layers.1.mlp"), 8, adam(0.02), kept=0.7),
        "slow": ReferenceLevel(names(model, "layers.0.mlp"), 16, adam(0.02 * 2**-0.5), kept=0.9, relative=0.004),
    }
    expected = learn(model, DOCUMENTS, levels, 16, 8)
    learner = Learner(
        model,
        {"fast": Level(8, (TOP,)), "slow": Level(16, (BOTTOM,))},
        lr=0.02,
        context=16,
        options=Options(retention={"fast": 0.7, "slow": 0.9}, limit={"slow": UpdateLimit(relative=0.004)}),
    )
    agree(learner, read(learner, DOCUMENTS), expected)


@pytest.mark.parametrize("by", ["token", "chunk"])
@pytest.mark.parametrize("batch_tokens", [1, 2048])
def test_surprise_gate_as_the_reference(by: str, batch_tokens: int) -> None:
    """Learned from: what is above the median of all before, and above a threshold."""

    def passes(losses: Tensor, earlier: list[float]) -> Tensor:
        history = chunks if by == "chunk" else sorted(earlier)
        bound = max(2.5, sorted(history)[int(0.5 * (len(history) - 1))]) if history else 2.5
        chunks.append(float(losses.mean()))
        return losses > bound if by == "token" else (losses.mean() > bound).expand(len(losses))

    chunks: list[float] = []
    documents = [text(90).tolist()]
    model = tiny_llama()
    # Gradient descent without momentum, since a chunk that is left out makes no step at all.
    levels = {"fast": ReferenceLevel(names(model, "layers.1.mlp"), 6, lambda w, g, s: -0.05 * g)}
    expected = learn(model, documents, levels, 6, 3, passes=passes)
    learner = Learner(
        model,
        {"fast": Level(6, (TOP,), optimizer=partial(torch.optim.SGD, lr=0.05))},
        lr=1.0,
        context=6,
        options=Options(gate=Gate(by=by, quantile=0.5, threshold=2.5), batch_tokens=batch_tokens),
    )
    agree(learner, read(learner, documents), expected)


@pytest.mark.parametrize(("projection", "weight"), [(False, 0.5), (True, 0.5), (True, 0.0)])
@pytest.mark.parametrize("batch_tokens", [1, 2048])
@pytest.mark.parametrize("teacher", [None, "average"])
def test_replay_and_projection_as_the_reference(projection: bool, weight: float, batch_tokens: int, teacher) -> None:
    # The same text again and again would never be in conflict.
    documents = [text(60).tolist(), [7, 8] * 20]
    model = tiny_llama()
    buffer = Reservoir(3, seed=0)
    chunks = [
        [(before + tokens, len(before)) for before, tokens in pieces if before or len(tokens) > 1]
        for pieces in rows_of(documents, 6, 3, 6)
    ]

    def replay(number: int) -> tuple[list[int], list[int]] | None:
        """What a buffer of three pieces holds of the chunks before."""
        for row, start in [] if number < 2 else chunks[number - 2]:
            buffer.add(torch.tensor(row), {"start": start})
        if number < 2:
            return None
        item = buffer.sample(1)[0]
        start = item.metadata["start"]
        return item.tokens[:start].tolist(), item.tokens[start:].tolist()

    levels = {
        "fast": ReferenceLevel(names(model, "layers.1.mlp"), 6, adam(0.01)),
        "slow": ReferenceLevel(names(model, "layers.0.mlp"), 12, momentum(0.01 * 2**-0.5)),
    }
    arguments = {"replay": replay, "replay_weight": weight, "projection": projection, "taught": teacher is not None}
    expected = learn(model, documents, levels, 6, 3, mean_rate=6 / 21, **arguments)
    learner = Learner(
        model,
        {"fast": Level(6, (TOP,)), "slow": Level(12, (BOTTOM,), optimizer="sgd")},
        lr=0.01,
        context=6,
        options=Options(replay=Replay(3, 1, weight, projection, teacher), batch_tokens=batch_tokens, average=21),
    )
    agree(learner, read(learner, documents), expected)
    with learner.averaged():
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected.mean[name], rtol=1e-9, atol=1e-9, msg=name)
    agree_on_weights(learner, expected.weights)


def test_low_rank_factors_as_the_reference() -> None:
    """The reference learns factors that stand in a model of its own, with the base frozen."""
    model = tiny_llama()
    learner = Learner(model, {"fast": Level(8, (TOP,), rank=2)}, lr=0.01, context=16, options=Options(retention=0.8))
    factors = {n: (f.left.weight.detach().clone(), f.right.weight.detach().clone())
               for n, f in learner.weights["fast"].factors.items()}  # fmt: skip
    learner.detach()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ParameterList([left for left, _ in factors.values()])
            self.right = nn.ParameterList([right for _, right in factors.values()])

        def forward(self, **inputs):
            changed = copy_of(model)
            for name, left, right in zip(factors, self.left, self.right, strict=True):
                changed[name] = changed[name] + left @ right
            return torch.func.functional_call(model, changed, (), inputs)

    levels = {"left": ReferenceLevel([f"left.{i}" for i in range(3)], 8, adam(0.01), kept=0.8),
              "right": ReferenceLevel([f"right.{i}" for i in range(3)], 8, adam(0.01))}  # fmt: skip
    expected = learn(Wrapped(), DOCUMENTS, levels, 16, 8)
    base = copy_of(model)
    with learner:
        seen = read(learner, DOCUMENTS)
    torch.testing.assert_close(seen.losses, torch.tensor(expected.losses), rtol=1e-6, atol=1e-6, equal_nan=True)
    for index, found in enumerate(learner.weights["fast"].factors.values()):
        torch.testing.assert_close(found.left.weight.detach(), expected.weights[f"left.{index}"])
        torch.testing.assert_close(found.right.weight.detach(), expected.weights[f"right.{index}"])
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    for name, difference in learner.memory().differences.items():
        i = list(factors).index(name)
        torch.testing.assert_close(difference.left.double(), expected.weights[f"left.{i}"], rtol=1e-6, atol=1e-7)


def test_only_scored_tokens_are_learned_from() -> None:
    """A chunk's gradient is that of its scored tokens alone, and the others still count for the period."""
    model, ids = tiny_llama(), text(16)
    scored = torch.arange(16) % 3 == 1
    learner = Learner(model, {"all": Level(8, ("*",), optimizer=partial(torch.optim.SGD, lr=0.1))}, lr=1, context=16)
    before = copy_of(model)
    seen = learner.observe(ids[:8], scored=scored[:8])
    assert seen.updated == ("all",)
    assert seen.losses.isnan().tolist() == (~scored[:8]).tolist()
    reference = tiny_llama()
    logits = reference(input_ids=ids[None, :8]).logits[0, :-1]
    nn.functional.cross_entropy(logits[scored[1:8]], ids[1:8][scored[1:8]]).backward()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), before[name] - 0.1 * p.grad)
    silent = copy_of(model)
    assert learner.observe(ids[8:], scored=[False] * 8).updated == ("all",)
    assert all(torch.equal(p, silent[n]) for n, p in model.named_parameters())


EVERYTHING = Options(
    retention=0.95,
    limit=UpdateLimit(relative=0.01, absolute=0.5),
    gate=Gate(quantile=0.2),
    replay=Replay(4, 2, 0.5, projection=True, teacher="average"),
    average=20,
    rehearsal=Rehearsal(2, 5),
    piece=3,
)


def everything(options: Options = EVERYTHING, dtype: torch.dtype = torch.float64) -> Learner:
    """A learner with every option, low-rank and full levels."""
    levels = {
        "fast": Level(6, (TOP,)),
        "mid": Level(12, ("*q_proj*", "*o_proj*"), rank=2),
        "slow": Level(18, (BOTTOM,)),
    }
    return Learner(tiny_llama(dtype=dtype), levels, lr=0.01, context=7, options=options)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.booleans())
def test_any_split_into_calls_is_one_call(sizes: list[int], ends: bool) -> None:
    ids, documents = text(50), [26, 50] if ends else [50]
    runs = []
    for given_sizes in ([50], sizes):
        learner, losses, updated, at, cuts = everything(), [], [], 0, list(given_sizes)
        while at < 50:
            end = min(at + (cuts.pop(0) if cuts else 50), next(d for d in documents if d > at))
            seen = learner.observe(ids[at:end])
            losses.append(seen.losses)
            updated += seen.updated
            at = end
            if at in documents[:-1]:
                learner.end_document()
        runs.append((torch.cat(losses), updated, learner.memory(), copy_of(learner.model)))
    (losses, updated, memory, weights), (other_losses, other_updated, other_memory, other_weights) = runs
    torch.testing.assert_close(losses, other_losses, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert updated == other_updated
    for name, p in weights.items():
        torch.testing.assert_close(p, other_weights[name], rtol=1e-9, atol=1e-9)
    assert memory.tensors.keys() == other_memory.tensors.keys()
    assert memory.settings["counters"] == other_memory.settings["counters"]


def test_the_model_is_left_as_it_was_but_for_what_was_learned() -> None:
    """Flags, modes, gradients, dropout: and scores do not depend on the mode."""
    model = tiny_llama()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    model.lm_head.eval()
    model.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    before = copy_of(model)
    learner = Learner(model, {"fast": Level(8, (TOP,))}, lr=0.01, context=16)
    losses = learner.observe(text(8)).losses
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(names(model, "layers.1.mlp"))
    plain = Learner(tiny_llama(), {"fast": Level(8, (TOP,))}, lr=0.01, context=16)
    torch.testing.assert_close(losses, plain.observe(text(8)).losses, equal_nan=True)


def test_documents_are_recorded() -> None:
    learner = Learner(tiny_llama(), {"fast": Level(8, (TOP,))}, lr=0.01, context=16)
    first, second = (DocumentRecord(name, name * 3, 0, False, 0.0, "") for name in "ab")
    losses = [learner.observe(text(5), document=first).losses, learner.observe(text(7, 1)).losses]
    learner.end_document()
    learner.observe(text(3), document=second)
    learner.observe(text(3), document=first)
    learner.end_document()
    learner.observe(text(3))
    learner.end_document()
    learner.observe(text(3))
    found = learner.memory().documents
    assert [(d.name, d.digest, d.tokens, d.finished) for d in found] == [
        ("a", "aaa", 12, True),
        ("b", "bbb", 3, False),
        ("a", "aaa", 3, True),
        ("", "", 6, False),
    ]
    assert math.isclose(found[0].loss, float(torch.cat(losses)[1:].mean()), rel_tol=1e-6)


@pytest.mark.parametrize("preset", ["hope_attention", "transformer", "gated_deltanet"])
def test_a_nestling_model_learns_as_the_reference(preset: str) -> None:
    torch.manual_seed(3)
    periods = {"periods": (4, None)} if preset == "hope_attention" else {}
    config = presets.PRESETS[preset]("tiny", vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, **periods)
    model = NestlingForCausalLM(config).double()
    own = [n for n, p in model.named_parameters() if n.startswith("blocks.1") and p.dim() > 1]
    expected = learn(model, DOCUMENTS, {"top": ReferenceLevel(own, 8, adam(0.01))}, 16, 8)
    learner = Learner(model, {"top": Level(8, tuple(own))}, lr=0.01, context=16)
    agree(learner, read(learner, DOCUMENTS), expected, tolerance=1e-7)


def test_bfloat16_forward_keeps_float32_weights() -> None:
    runs = []
    for bfloat16 in (False, True):
        model = tiny_llama(dtype=torch.float32)
        learner = Learner(model, {"fast": Level(8, (TOP,))}, lr=1e-3, context=16, options=Options(bfloat16=bfloat16))
        runs.append((read(learner, DOCUMENTS).losses.nan_to_num(), learner))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        state = learner.optimizer.state_dict()["state"]
        assert all(t.dtype == torch.float32 for values in state.values() for t in values.values())
    difference = (runs[0][0] - runs[1][0]).abs()
    assert 0 < difference.max() < 0.3


def test_it_learns() -> None:
    """A text that repeats is known better at its second reading; without learning it is not."""
    ids = text(96).tolist()
    means = {}
    for lr in (0.0, 0.02):
        learner = Learner(tiny_llama(dtype=torch.float32), {"all": Level(8, ("*mlp*",))}, lr=lr, context=16)
        for _ in range(4):
            means[lr] = float(learner.observe(ids).losses.nanmean())
            learner.end_document()
    assert means[0.02] < means[0.0] - 0.5


@pytest.mark.parametrize("assignment", ["depth", "split"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_converted_models_own_levels(assignment: str, rank: int | None) -> None:
    """Levels by name from the model itself; the first losses are the original's."""
    original = tiny_llama()
    model = convert(original, {"fast": 8, "slow": 24}, assignment)
    learner = Learner(model, lr=0.01, context=16, options=Options(rank=rank))
    assert [level.period for level in learner.settings.levels.values()] == [8, 24]
    base = copy_of(model)
    seen = read(learner, DOCUMENTS)
    quiet = Learner(original, {"all": Level(8, (TOP,))}, lr=0.0, context=16).observe(DOCUMENTS[0][:8])
    torch.testing.assert_close(seen.losses[:8], quiet.losses, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert seen.updated[:4] == ("fast", "fast", "fast", "slow")
    if rank is None:
        levels = {
            "fast": ReferenceLevel(stream_levels(model)["fast"], 8, adam(0.01)),
            "slow": ReferenceLevel(stream_levels(model)["slow"], 24, adam(0.01 * 3**-0.5)),
        }
        learner.detach()
        expected = learn(model, DOCUMENTS, levels, 16, 8)
        learner.apply()
        agree(learner, seen, expected, tolerance=1e-7)
    learner.detach()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
