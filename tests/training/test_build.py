"""What is known of a model before it is trained."""

from __future__ import annotations

import pytest
import torch

from nestling import NestlingForCausalLM, presets
from nestling.training.build import say_untrained, state_grows, untrained_levels


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


HOPES = ("hope", "hope_attention", "hope_linear")


@pytest.mark.parametrize("carry", [False, True], ids=["alone", "carried"])
@pytest.mark.parametrize("preset", HOPES)
def test_which_levels_no_window_trains(preset: str, carry: bool) -> None:
    """As gradients say: rate and target of a level get none, in windows that begin afresh or with a detached state."""
    length, periods = 24, (8, 24, 36, 48, None)
    config = presets.PRESETS[preset](size="tiny", vocab_size=50, num_layers=1, hidden_size=32, periods=periods)
    torch.manual_seed(0)
    model, state = NestlingForCausalLM(config), None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(1.0)
    for window in torch.randint(3, 50, (6, 1, length + 1)):
        out = model(input_ids=window[:, :-1], shift_labels=window[:, 1:], past_key_values=state, use_cache=True)
        out.loss.backward()
        state = out.past_key_values.detach() if carry else None
    grads = {name: p.grad for name, p in model.blocks[0].channel.levels.named_parameters()}
    moved = {int(n[0]) for n, g in grads.items() if n[2:] in ("rate", "value.weight") and g is not None and g.any()}
    still = {i: p for i, p in enumerate(periods) if p is not None and i not in moved}
    assert untrained_levels(config, length, carry) == still == ({1: 24, 3: 48} if carry else {1: 24, 2: 36, 3: 48})


@pytest.mark.parametrize(("preset", "length"), [*((preset, 64) for preset in HOPES), ("transformer", 1)])
def test_levels_that_no_window_trains_are_named(preset: str, length: int) -> None:
    own = {} if preset == "transformer" else {"periods": (32, 64, 512)}
    said = say_untrained(presets.PRESETS[preset](size="tiny", **own), length, carry=False)
    if preset == "transformer":
        assert said is None
        return
    assert said == (
        "level 1 (period 64) and level 2 (period 512) of the continuum are never updated and read again within 64 "
        "tokens, so nothing trains what they write; give shorter periods (--set 'periods=[...]') or a longer "
        "--sequence-length"
    )
    one = say_untrained(presets.PRESETS[preset](size="tiny", periods=(32, 512)), length, carry=False)
    assert one is not None and "level 1 (period 512) of the continuum is never updated" in one
