"""The examples of nested systems do what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from examples.levels import ada_transformer, hypernetwork, learned_optimizer, maml, momentum


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


@pytest.mark.parametrize("module", [ada_transformer, hypernetwork, learned_optimizer, maml, momentum])
def test_examples_are_short(module: object) -> None:
    with open(module.__file__, encoding="utf-8") as file:  # type: ignore[attr-defined]
        assert sum(bool(line.strip()) for line in file) < 80
