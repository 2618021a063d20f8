"""What broke is named: the parameter, the carried state, the layer, or the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nestling import NestlingForCausalLM, presets
from nestling.training.divergence import DivergenceError, locate_nonfinite, locate_nonfinite_gradient

IDS = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> NestlingForCausalLM:
    return NestlingForCausalLM(presets.hope(hidden_size=16, num_layers=2, num_heads=1))


def test_a_broken_parameter_is_named(model: NestlingForCausalLM) -> None:
    with torch.no_grad():
        model.blocks[1].mixer_norm.weight[3] = torch.nan
    assert locate_nonfinite(model, IDS, None) == "parameter blocks.1.mixer_norm.weight holds NaN or infinity"


def test_a_broken_carried_state_is_named(model: NestlingForCausalLM) -> None:
    state = model(input_ids=IDS, use_cache=True).past_key_values.detach()
    name, tensor = next((n, t) for n, t in state.tensors() if n.startswith("layers.1") and t.is_floating_point())
    tensor[(0,) * tensor.dim()] = torch.inf
    assert locate_nonfinite(model, IDS, state) == f"the carried state {name} holds NaN or infinity"


def test_the_innermost_layer_that_breaks_first_is_named(
    model: NestlingForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = model.blocks[1].mixer.in_proj.forward
    monkeypatch.setattr(model.blocks[1].mixer.in_proj, "forward", lambda x: healthy(x) / 0.0)
    found = locate_nonfinite(model, IDS, None)
    assert found == "layer blocks.1.mixer.in_proj (Linear) gave NaN or infinity in its output"
    assert not any(module._forward_hooks for module in model.modules())  # the hooks are gone again


def test_a_state_that_breaks_is_named(model: NestlingForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    block = model.blocks[0]
    forward = block.forward

    def broken(*args: Any) -> Any:
        x, state = forward(*args)
        tensor = next(t for _, t in state.tensors() if t.is_floating_point())
        tensor[(0,) * tensor.dim()] = torch.nan
        return x, state

    monkeypatch.setattr(block, "forward", broken)
    found = locate_nonfinite(model, IDS, None)
    assert found.startswith("layer blocks.0 (Block) gave NaN or infinity in its state mixer.")


def test_gradients_and_the_message() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].weight.grad = torch.zeros(2, 2)
    assert locate_nonfinite_gradient(net) == "the gradient norm overflows"
    net[1].bias.grad = torch.full((2,), torch.nan)
    where = locate_nonfinite_gradient(net)
    assert where == "the gradient of 1.bias holds NaN or infinity"
    error = DivergenceError(7, where, "lower --lr")
    assert str(error) == f"training stopped at step 7: {where}; lower --lr" and error.step == 7
