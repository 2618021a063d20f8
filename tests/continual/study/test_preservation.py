"""What a low-rank difference may not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nestling.continual.learner.weights import LowRankWeights
from nestling.continual.study import preservation
from nestling.continual.study.preservation import Preservation, input_moments
from tests.continual.stream.stream_models import VOCABULARY, tiny_llama

TEXT = torch.randint(VOCABULARY, (11, 9), generator=torch.Generator().manual_seed(3))


def factors_of(model: nn.Module, seed: int = 0) -> LowRankWeights:
    names = [name for name, _ in model.named_parameters() if ".mlp." in name]
    weights = LowRankWeights(model, names, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    for each in weights.factors.values():
        each.left.weight.data = 0.1 * torch.randn(each.left.weight.shape, generator=generator, dtype=torch.float64)
    return weights


def inputs_of(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """Of every layer, one text at a time."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0][0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for row in TEXT:
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


@pytest.mark.parametrize("block", [2048, 7])
def test_the_moments_are_those_of_all_tokens(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preservation, "BLOCK", block)
    model = tiny_llama()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".mlp." in name}
    found = input_moments(model, layers, TEXT)
    assert found["model.layers.0.mlp.gate_proj"] is found["model.layers.0.mlp.up_proj"]
    for name, x in inputs_of(model, layers).items():
        parts = x.split(block, dim=1)
        assert len(found[name]) == len(parts)
        for a, part in zip(found[name], parts, strict=True):
            torch.testing.assert_close(a, part.T @ part / TEXT.numel())


def test_the_change_is_the_equation() -> None:
    """tr(D (C + l I) D^T) / tr(W C W^T) summed over the layers, each matrix multiplied out."""
    model = tiny_llama()
    weights = factors_of(model)
    weights.detach()
    preserved = Preservation(model, [weights], TEXT)
    seen = inputs_of(model, weights.layers)
    expected = 0.0
    for name, each in weights.factors.items():
        c = seen[name].T @ seen[name] / TEXT.numel()
        w = weights.layers[name].weight.detach()
        size = float(torch.trace(w @ c @ w.T))
        c = c + preservation.FLOOR * c.diagonal().median() * torch.eye(len(c), dtype=torch.float64)
        difference = (each.left.weight @ each.right.weight).detach()
        expected += float(torch.trace(difference @ c @ difference.T)) / size
    with preserved.coordinates():
        assert float(preserved.changed().detach()) == pytest.approx(expected, rel=1e-9)


def test_in_white_coordinates_the_layers_are_the_same_and_so_they_are_afterwards() -> None:
    model = tiny_llama()
    weights = factors_of(model)
    before = {name: each.right.weight.detach().clone() for name, each in weights.factors.items()}
    kept = [id(p) for p in weights.learned]
    with torch.no_grad():
        said = model(input_ids=TEXT).logits
        weights.detach()
        preserved = Preservation(model, [weights], TEXT)
        weights.attach()
        with preserved.coordinates():
            torch.testing.assert_close(model(input_ids=TEXT).logits, said)
            assert [id(p) for p in weights.learned] == kept  # what optimizers hold
            white = weights.learned[0]
            assert not torch.allclose(white, next(iter(before.values())))
    for name, each in weights.factors.items():
        assert isinstance(each.right.weight, nn.Parameter) and not hasattr(each.right, "parametrizations")
        torch.testing.assert_close(each.right.weight.detach(), before[name])
    assert [id(p) for p in weights.learned] == kept
