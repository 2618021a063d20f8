"""Deep momentum: what its memory does, bounds, cost of its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nestling.optim import DeepMomentum, FeatureMomentum, PreconditionedMomentum
from nestling.optim.preconditioners import AdaGradDiagonal, AdamDiagonal


def steps(w: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The changes of `w`."""
    changes = []
    for g in gradients:
        before = w.detach().clone()
        w.grad = g
        optimizer.step()
        changes.append(w.detach() - before)
    return changes


def test_strengthens_what_it_has_seen() -> None:
    """A direction that comes again and again takes longer steps, a new one does not; opposite gradients count too."""
    key, other = torch.eye(8, dtype=torch.float64)[:2]
    w = nn.Parameter(torch.zeros(1, 8, dtype=torch.float64))
    optimizer = DeepMomentum([w], 1.0, width=512)
    lengths = [c.norm().item() for c in steps(w, optimizer, [sign * key[None] for sign in (1.0, -1.0) * 10])]
    assert lengths[-1] > 1.5 * lengths[0]
    assert lengths[-1] < 12
    unseen = steps(w, optimizer, [other[None]])[0].norm().item()
    assert unseen < 0.7 * lengths[-1]


@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_memory_is_bounded_for_any_gradients(objective: str) -> None:
    """Constant, huge, tiny, alternating: the step stays within a fixed multiple of the gradient."""
    torch.manual_seed(0)
    for scale in (1e-20, 1.0, 1e15):
        w = nn.Parameter(torch.zeros(16, 12, dtype=torch.float64))
        optimizer = DeepMomentum([w], 1.0, objective=objective)  # type: ignore[arg-type]
        constant = torch.randn(16, 12, dtype=torch.float64) * scale
        changes = steps(w, optimizer, [constant if i % 3 else -constant for i in range(400)])
        assert max(c.norm() for c in changes) < 40 * constant.norm()


def test_state_is_small_and_seeded() -> None:
    """12 width / rows bytes a parameter in float32, and no draw from the global generator."""
    w = nn.Parameter(torch.zeros(1024, 64))
    before = torch.get_rng_state()
    optimizer = DeepMomentum([w], seed=3)
    steps(w, optimizer, [torch.ones_like(w)])
    assert torch.equal(torch.get_rng_state(), before)
    size = sum(v.numel() * 4 for v in optimizer.state[w].values() if isinstance(v, torch.Tensor))
    assert size / w.numel() == pytest.approx(12 * 32 / 1024)


def test_settings_are_checked() -> None:
    w = nn.Parameter(torch.zeros(2, 2))
    for wrong in ({"momentum": 1.0}, {"inner_lr": -1.0}, {"width": 0}, {"objective": "l1"}):
        with pytest.raises(ValueError):
            DeepMomentum([w], **wrong)
    with pytest.raises(ValueError, match="average=True"):
        PreconditionedMomentum([w], bias_correction=True)
    with pytest.raises(ValueError, match="share one second moment"):
        PreconditionedMomentum([w], preconditioner=AdamDiagonal(), output=AdaGradDiagonal())
    with pytest.raises(ValueError, match="keep the shape"):
        optimizer = FeatureMomentum([w], features=lambda g: g.flatten())
        steps(w, optimizer, [torch.ones_like(w)])
