"""Loss over a text: the same tokens scored whatever the window, and nothing seen that should not be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nestling import NestlingForCausalLM, presets
from nestling.evaluation.language import (
    LossReport,
    evaluate_loss,
    loss_by_position,
    read_text,
    token_losses,
)

IDS = np.random.default_rng(0).integers(3, 259, 101)


@pytest.fixture(scope="module", params=["hope", "transformer"])
def model(request: pytest.FixtureRequest) -> NestlingForCausalLM:
    torch.manual_seed(1)
    preset = presets.PRESETS[request.param]
    return NestlingForCausalLM(preset(hidden_size=16, num_layers=2, num_heads=1))


def plain(model: NestlingForCausalLM, ids: np.ndarray) -> torch.Tensor:
    """One forward pass, no state given."""
    x = torch.as_tensor(ids)[None]
    with torch.no_grad():
        logits = model(input_ids=x[:, :-1]).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="none")


def test_carried_reading_equals_one_forward_pass(model: NestlingForCausalLM) -> None:
    for segment in (7, 33, 512):
        losses, state = token_losses(model, IDS, segment=segment)
        torch.testing.assert_close(losses, plain(model, IDS), atol=1e-5, rtol=1e-5)
        assert state.get_seq_length() == 100


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_reset_reading_equals_separate_texts(model: NestlingForCausalLM, batch_size: int) -> None:
    losses, _ = token_losses(model, IDS, reset_every=30, segment=8, batch_size=batch_size)
    expected = torch.cat([plain(model, IDS[s : s + 31]) for s in (0, 30, 60, 90)])
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_windows_start_from_the_given_state(model: NestlingForCausalLM) -> None:
    past, now = IDS[:40], IDS[40:]
    _, state = read_text(model, past)
    assert state.get_seq_length() == 40
    before = [t.clone() for _, t in state.tensors()]
    losses, _ = token_losses(model, now, state=state, reset_every=20, batch_size=2)
    expected = [plain(model, np.concatenate([past, now[s : s + 21]]))[40:] for s in (0, 20, 40)]
    torch.testing.assert_close(losses, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, state.tensors(), strict=True))


def test_evaluate_loss_is_the_mean(model: NestlingForCausalLM) -> None:
    model.train()
    carried = evaluate_loss(model, IDS, 16, carry=True, batch_size=1, n_bytes=100)
    assert carried.loss == pytest.approx(float(plain(model, IDS).mean()), abs=1e-5)
    assert (carried.tokens, carried.bytes) == (100, 100)
    assert model.training  # as it was found
    parts = evaluate_loss(model, IDS, 16, carry=True, batch_size=2)
    expected = torch.cat([plain(model, IDS[:51]), plain(model, IDS[50:])]).mean()
    assert parts.loss == pytest.approx(float(expected), abs=1e-5) and parts.bits_per_byte is None
    reset = evaluate_loss(model, IDS, 100)
    assert reset.loss == pytest.approx(carried.loss, abs=1e-5)


def test_report() -> None:
    report = LossReport(loss=math.log(8), tokens=100, bytes=300)
    assert report.perplexity == pytest.approx(8)
    assert report.bits_per_byte == pytest.approx(1.0)
    assert LossReport(1e6, 1).perplexity == math.inf


def test_loss_against_position() -> None:
    losses = torch.arange(10.0)
    assert [(b.start, b.stop, b.loss) for b in loss_by_position(losses, 3)] == [
        (0, 3, 1.0),
        (3, 7, 4.5),
        (7, 10, 8.0),
    ]
    folded = loss_by_position(losses, bins=2, window=4)  # windows 0-3, 4-7, 8-9
    assert [b.loss for b in folded] == [pytest.approx((0 + 1 + 4 + 5 + 8 + 9) / 6), pytest.approx((2 + 3 + 6 + 7) / 4)]
    assert len(loss_by_position(losses, bins=50)) == 10
    assert loss_by_position(torch.zeros(1))[0].perplexity == 1.0


def test_bad_arguments(model: NestlingForCausalLM) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        token_losses(model, IDS[:1])
    with pytest.raises(ValueError, match="must all be at least 1"):
        token_losses(model, IDS, reset_every=0)
    two = model(input_ids=torch.as_tensor(IDS[:8]).view(2, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has 2 rows"):
        token_losses(model, IDS, state=two)
    with pytest.raises(ValueError, match="no losses"):
        loss_by_position(torch.zeros(0))
