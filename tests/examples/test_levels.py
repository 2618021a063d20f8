"""The examples of nested systems do what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from examples.levels import (
    ada_transformer,
    attention,
    hypernetwork,
    learned_optimizer,
    maml,
    momentum,
    nested_continuum,
    self_modifying,
)
from nestling.layers.attention import AttentionConfig, SoftmaxAttention
from nestling.layers.continuum import ContinuumConfig, ContinuumMemory
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.levels import NestedSystem
from tests.layers import reference_self_modifying
from tests.layers.battery import close, gradients, noise, weigh


@pytest.mark.parametrize("kept", [0.0, 0.9])
def test_two_levels_are_gradient_descent_with_momentum(kept: float) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(2))
    system, optimizer = momentum.two_levels(ours, 0.05, kept), SGD([theirs], lr=0.05, momentum=kept)
    assert [{c.name for c in level.components} for level in system.levels] == [{"momentum"}, {"weights"}]
    for _ in range(30):
        batch = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
        system.step(batch)
        optimizer.zero_grad()
        momentum.loss(theirs, batch).backward()
        optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_maml_learns_to_learn(capsys: pytest.CaptureFixture[str]) -> None:
    errors = maml.main(steps=50)
    assert sum(errors[-10:]) < 0.5 * sum(errors[:3]) / 3 * 10
    output = capsys.readouterr().out
    assert "initialisation" in output and "1 / item" in output


def test_maml_differentiates_through_its_steps() -> None:
    """The first weights' gradient against finite differences of the error after the steps."""
    torch.manual_seed(0)
    network = nn.Linear(1, 1).double()
    system = maml.make_system(network)
    waves = tuple(t.double() for t in maml.draw_waves(3))
    slow = system.runner.flows[0][0]  # type: ignore[union-attr]

    def error() -> torch.Tensor:
        return slow.objective(waves, system.runner.solve(waves))  # type: ignore[union-attr]

    (gradient,) = torch.autograd.grad(error(), network.weight)
    values = []
    for change in (-1e-5, 1e-5):
        with torch.no_grad():
            network.weight.add_(change)
        values.append(float(error().detach()))
        with torch.no_grad():
            network.weight.sub_(change)
    assert float(gradient) == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-6)


def test_a_hypernetwork_answers_for_tasks_it_has_not_seen() -> None:
    errors = hypernetwork.main(steps=120)
    assert sum(errors[-10:]) / 10 < 0.05 * errors[0]


def test_a_learned_rule_beats_every_fixed_rate() -> None:
    fixed, learned = learned_optimizer.main(steps=60)
    assert learned < fixed


def test_the_ada_transformer_adapts_in_context() -> None:
    errors = ada_transformer.main(steps=120)
    assert errors["AdaTransformer"] < errors["Transformer"] - 0.05


def test_the_ada_transformers_memory_is_equation_21() -> None:
    torch.manual_seed(0)
    block = ada_transformer.Block()
    system = ada_transformer.make_system(block, adaptive=True)
    assert [str(level.frequency) for level in system.levels] == ["1 / token", "1 / step"]
    tokens, answer = ada_transformer.draw(4)
    solved = system.runner.solve((tokens, answer))["W"]["W"]  # type: ignore[union-attr]
    weight = block.memory.expand(4, -1, -1)
    for token in tokens.unbind(1):
        weight = weight + block.value(token)[:, :, None] * block.key(token)[:, None] / ada_transformer.PAIRS
    torch.testing.assert_close(solved, weight)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_the_solution_of_a_regression(window: int | None) -> None:
    """Equal to the layer, and the objective's gradient at every solution is zero (NL Eq. 62, 63)."""
    torch.manual_seed(0)
    layer = SoftmaxAttention(AttentionConfig(8, 2, window=window)).double()
    system, x = attention.make_system(layer), noise(2, 9, 8)
    assert [str(level.frequency) for level in system.levels] == ["∞", "1 / step"]
    assert system.levels[0].components[0].kind == "attention" and not system.notes
    solved = system.runner.solve(x)  # type: ignore[union-attr]
    close([attention.answer(layer, solved)], [layer(x)[0]])
    problem = system.runner.inside[0]  # type: ignore[union-attr]
    for item, solution in zip(problem.context(x), solved["attention"], strict=True):
        memory = solution.detach().requires_grad_()
        (slope,) = torch.autograd.grad(problem.objective(item, {"attention": memory}), memory)
        assert float(slope.abs().max()) < 1e-12


def test_projections_learn_through_the_solutions() -> None:
    first, last = attention.main(steps=60)
    assert last < 0.8 * first


def test_memories_that_interact_are_self_modifying_titans() -> None:
    """The fast weights after every token, the answers, and the gradients of the first weights."""
    torch.manual_seed(0)
    config = SelfModifyingConfig(
        hidden_size=8,
        num_heads=2,
        memory="matrix",
        chunk_size=1,
        adapt=("memory", "k", "v"),
        use_retention=False,
        clip=100,
        conv_size=1,
        output_gate=False,
    )
    layer = SelfModifyingTitans(config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = noise(2, 7, 8)
    streams, none = reference_self_modifying.project(layer, x)
    u, q = streams["k"], streams["q"]  # without streams of their own all memories read the same
    memories = reference_self_modifying.initial_memories(layer, 2)

    def items(tokens: torch.Tensor) -> list[self_modifying.Item]:
        found = []
        for t in range(tokens.shape[1]):
            eta = memories["eta"](memories["eta"].start, tokens[:, t])
            gates = reference_self_modifying.rates(layer, eta, None, none[:, t])
            found.append((tokens[:, t], gates.e[0], gates.lr[0]))
        return found

    first = {n: lambda _, n=n: memories[n].start[0] for n in ("memory", "k", "v")}
    system = NestedSystem.define("", self_modifying.make_memories(first, items))
    assert [str(level.frequency) for level in system.levels] == ["1 / token"]
    solved = system.runner.solve(u)  # type: ignore[union-attr]
    answers = torch.stack([self_modifying.recall(w, q[:, t]) for t, w in enumerate(solved["memory"][1:])], 1)
    mine = reference_self_modifying.finish(layer, x, answers)
    y, state = layer(x)
    last = reference_self_modifying.state_memories(layer, state)
    close([mine], [y])
    close(
        [solved["memory"][-1]["W"], solved["k"]["W"], solved["v"]["W"]],
        [last[n].running[0] for n in ("memory", "k", "v")],
    )
    close(gradients(weigh(mine), [], layer), gradients(weigh(y), [], layer))


def test_self_modifying_memories_learn() -> None:
    first, last = self_modifying.main(steps=30)
    assert last < first


@pytest.mark.parametrize("tokens", [16, 19])
def test_the_nested_continuum_is_three_levels_of_problems(tokens: int) -> None:
    """Values and gradients; the levels restart from what those above them have learned."""
    torch.manual_seed(0)
    layer = ContinuumMemory(
        ContinuumConfig(hidden_size=8, intermediate_size=6, periods=(2, 4, 8), variant="nested")
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    system, x = nested_continuum.make_system(layer), noise(2, tokens, 8)
    assert [(str(s.frequency), {c.name for c in s.components}) for s in system.levels] == [
        ("1 / 2 tokens", {"level 0"}),
        ("1 / 4 tokens", {"start 0", "level 1"}),
        ("1 / 8 tokens", {"start 1", "level 2"}),
    ]
    solved = system.runner.solve(x)  # type: ignore[union-attr]
    mine = torch.stack([nested_continuum.read(layer, solved, 3, token) for token in enumerate(x.unbind(1))], 1)
    y = layer(x)[0]
    close([mine], [y])
    close(gradients(weigh(mine), [], layer), gradients(weigh(y), [], layer))
    assert nested_continuum.main() < 1e-12


MODULES = [
    ada_transformer,
    attention,
    hypernetwork,
    learned_optimizer,
    maml,
    momentum,
    nested_continuum,
    self_modifying,
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_are_short(module: object) -> None:
    with open(module.__file__, encoding="utf-8") as file:  # type: ignore[attr-defined]
        assert sum(bool(line.strip()) for line in file) < 80
