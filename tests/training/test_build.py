"""What is known of a model before it is trained."""

from __future__ import annotations

import pytest
import torch

from nestling import NestlingForCausalLM, presets
from nestling.training.build import state_grows


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_which_states_grow(preset: str) -> None:
    """As they do: measured past every window and segment of the small models."""
    config = presets.PRESETS[preset](size="tiny", vocab_size=50, num_layers=3, hidden_size=32)
    model = NestlingForCausalLM(config).eval()
    sizes, state = [], None
    with torch.no_grad():
        for _ in range(3):
            state = model(torch.ones(1, 256, dtype=torch.long), past_key_values=state, use_cache=True).past_key_values
            sizes.append(state.nbytes)
    assert state_grows(config) == (sizes[2] > sizes[1])
