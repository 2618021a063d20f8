"""What a low-rank difference may not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.continual.learner.weights import LowRankWeights
from nestling.continual.study import preservation
from nestling.continual.study.preservation import Preservation, moments
from tests.continual.stream.stream_models import VOCABULARY, tiny_llama

TEXT = torch.randint(VOCABULARY, (11, 9), generator=torch.Generator().manual_seed(3))


def factors_of(model: nn.Module, seed: int = 0) -> LowRankWeights:
    names = [name for name, _ in model.named_parameters() if ".mlp." in name]
    weights = LowRankWeights(model, names, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    for each in weights.factors.values():
        each.left.weight.data = 0.1 * torch.randn(each.left.weight.shape, generator=generator, dtype=torch.float64)
    return weights


def passes(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs of every layer, and gradients of the text's log-likelihood by its outputs, one text at a time."""
    seen: dict[str, list[list[Tensor]]] = {name: [[], []] for name in layers}
    for p in model.parameters():
        p.requires_grad_(True)
    for row in TEXT:
        outputs = {}

        def hook(name: str, inputs: tuple[Tensor, ...], output: Tensor, outputs: dict[str, Tensor] = outputs) -> None:
            seen[name][0].append(inputs[0][0].detach())
            outputs[name] = output

        handles = [
            layer.register_forward_hook(lambda _, inputs, output, name=name: hook(name, inputs, output))
            for name, layer in layers.items()
        ]
        logits = model(input_ids=row[None]).logits[0]
        said = F.cross_entropy(logits[:-1], row[1:], reduction="sum")
        for name, gradient in zip(outputs, torch.autograd.grad(said, list(outputs.values())), strict=True):
            seen[name][1].append(gradient[0])
        for handle in handles:
            handle.remove()
    return {name: (torch.cat(both[0]), torch.cat(both[1])) for name, both in seen.items()}


@pytest.mark.parametrize("block", [2048, 7])
def test_the_moments_are_those_of_all_tokens(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preservation, "BLOCK", block)
    model = tiny_llama()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".mlp." in name}
    inputs, gradients = moments(model, layers, TEXT)
    assert inputs["model.layers.0.mlp.gate_proj"] is inputs["model.layers.0.mlp.up_proj"]
    assert not any(p.grad is not None for p in model.parameters())
    for name, (x, g) in passes(model, layers).items():
        for found, values in ((inputs[name], x), (gradients[name], g)):
            parts = values.split(block, dim=1)
            assert len(found) == len(parts)
            for a, part in zip(found, parts, strict=True):
                torch.testing.assert_close(a, part.T @ part / TEXT.numel())


def test_the_divergence_is_the_equation() -> None:
    """1/2 tr(G D (C + l I) D^T) summed over the layers, each matrix multiplied out."""
    model = tiny_llama()
    weights = factors_of(model)
    weights.detach()
    preserved = Preservation(model, [weights], TEXT)
    seen = passes(model, weights.layers)
    expected = 0.0
    for name, each in weights.factors.items():
        x, g = seen[name]
        c, curved = x.T @ x / TEXT.numel(), g.T @ g / TEXT.numel()
        c = c + preservation.FLOOR * c.diagonal().median() * torch.eye(len(c), dtype=torch.float64)
        difference = each.left.weight @ each.right.weight
        expected += 0.5 * float(torch.trace(curved @ difference @ c @ difference.T).detach())
    with preserved.coordinates():
        assert float(preserved.divergence()) == pytest.approx(expected, rel=1e-9)


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


def test_a_small_difference_of_one_layer_costs_about_what_it_says() -> None:
    """Against KL(base || model) itself, on text that is sampled from the model."""
    model = tiny_llama()
    text = torch.randint(VOCABULARY, (400, 1), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    text = model.generate(text, do_sample=True, top_k=0, max_new_tokens=15, eos_token_id=None)
    weights = LowRankWeights(model, ["model.layers.1.mlp.down_proj.weight"], 3, 0)
    (only,) = weights.factors.values()
    only.left.weight.data = 0.02 * torch.randn(only.left.weight.shape, dtype=torch.float64)
    with torch.no_grad():
        says = model(input_ids=text).logits.log_softmax(-1)
        weights.detach()
        said = model(input_ids=text).logits.log_softmax(-1)
    preserved = Preservation(model, [weights], text)
    with preserved.coordinates():
        told = float(preserved.divergence().detach())
    true = float(F.kl_div(says, said, log_target=True, reduction="none").sum(-1).mean())
    assert 0.4 < told / true < 2.5 and true < 0.05
