"""Roles of parameters, and optimizers by name."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.optimizers import Float32Muon
from nestling import NestlingForCausalLM, presets
from nestling.optim import NAMES, build, matrix_groups
from nestling.optim.groups import decaying
from tests.optim.models import Network, batch, loss_of


def by_kind(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, str]:
    """Parameter name -> kind."""
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: group["kind"] for group in groups for p in group["params"]}


class Zoo(nn.Module):
    """One of each role."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.kernel = nn.Conv2d(2, 3, 2)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)
        self.stack = nn.Parameter(torch.zeros(2, 3, 5))
        self.filter = nn.Parameter(torch.zeros(4, 4))
        self.filter._no_weight_decay = True  # type: ignore[attr-defined]
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.table.weight
        self.classifier = nn.Linear(4, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_roles() -> None:
    """By owner and marks: the names play no part."""
    model = Zoo()
    groups = matrix_groups(model, 0.1, heads=[model.classifier])
    assert by_kind(groups, model) == {
        "table.weight": "elementwise",
        "hidden.weight": "matrices",
        "hidden.bias": "elementwise",
        "kernel.weight": "kernels",
        "kernel.bias": "elementwise",
        "depthwise.weight": "elementwise",
        "depthwise.bias": "elementwise",
        "stack": "matrices",
        "filter": "elementwise",
        "classifier.weight": "elementwise",
        "classifier.bias": "elementwise",
    }
    names = {p: n for n, p in model.named_parameters()}
    decayed = {names[p] for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {n for n in decaying(model) if not n.startswith("frozen")}
    assert by_kind(matrix_groups(model), model)["classifier.weight"] == "matrices"


@pytest.mark.parametrize("preset", ["hope", "transformer", "mamba2"])
def test_roles_of_our_models(preset: str) -> None:
    """Embedding and head are tables; every projection is a matrix; nothing is lost or taken twice."""
    model = NestlingForCausalLM(presets.PRESETS[preset](size="tiny", vocab_size=50, num_layers=2, hidden_size=32))
    groups = matrix_groups(model, 0.1)
    kinds = by_kind(groups, model)
    assert len([p for g in groups for p in g["params"]]) == len(list(model.parameters()))
    assert kinds["embed_tokens.weight" if "embed_tokens.weight" in kinds else "lm_head.weight"] == "elementwise"
    linear = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert linear and all(kinds[n] == "matrices" for n in linear if n in decaying(model))
    assert all(dict(model.named_parameters())[n].dim() >= 2 for n, kind in kinds.items() if kind != "elementwise")


@pytest.mark.parametrize("name", NAMES)
def test_by_name(name: str) -> None:
    """Every name trains, resumes from its state, and respects frozen parameters."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for seed in range(first, last):
            optimizer.zero_grad()
            loss_of(model, batch(seed)).backward()
            optimizer.step()

    model = Network()
    model.first.bias.requires_grad_(False)
    optimizer = build(name, model, lr=0.01, weight_decay=0.1)
    before = sum(loss_of(model, batch(1000 + i)).item() for i in range(4))
    train(model, optimizer, 0, 20)
    assert sum(loss_of(model, batch(1000 + i)).item() for i in range(4)) < before

    other = Network()
    other.first.bias.requires_grad_(False)
    other.load_state_dict(model.state_dict())
    resumed = build(name, other, lr=0.5, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, 20, 24)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_is_torchs() -> None:
    """Matrices take torch.optim.Muon's step and the rest AdamW's, as the two would alone; it takes no kernels."""
    model, other = Network(), Network()
    for network in (model, other):
        network.convolution.weight.requires_grad_(False)
    optimizer = build("muon", model, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))
    matrices = [other.first.weight, other.second.weight]
    ids = {id(p) for p in matrices}
    decayed = [p for p in other.parameters() if p.requires_grad and p.dim() > 1 and id(p) not in ids]
    rest = [p for p in other.parameters() if p.dim() < 2]
    alone = [
        Float32Muon(matrices, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(decayed, 0.02, betas=(0.8, 0.9), weight_decay=0.1),
        torch.optim.AdamW(rest, 0.02, betas=(0.8, 0.9), weight_decay=0.0),
    ]
    model.unused.requires_grad_(False)
    for seed in range(3):
        for m, optimizers in ((model, [optimizer]), (other, alone)):
            m.zero_grad()
            loss_of(m, batch(seed)).backward()
            for o in optimizers:
                o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4)  # a step moves by 2e-2


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="choose one of: adamw, deep_momentum"):
        build("adam", Network(), lr=0.1)


def test_a_name_without_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is made in its place."""
    module = importlib.import_module("nestling.optim.build")
    monkeypatch.setattr(module, "NAMES", (*NAMES, "forgotten"))
    with pytest.raises(NotImplementedError, match="'forgotten' is in NAMES and has no case"):
        build("forgotten", Network(), lr=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_train(name: str) -> None:
    with pytest.raises(ValueError, match="no parameter to train"):
        build(name, Network().requires_grad_(False), lr=0.1)
