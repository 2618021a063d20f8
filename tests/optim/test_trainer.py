"""Hugging Face's Trainer takes the optimizers by name, by instance and by class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from nestling.optim import M3, DeltaMomentum, TrainerFactory, build


class Rows(Dataset[dict[str, Tensor]]):
    """Points of a linear map."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": x.flip(0)}


class Model(nn.Module):
    """Two linear layers and their loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        torch.manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss first, as the Trainer wants it."""
        return {"loss": (self.second(self.first(x)) - labels).square().mean()}


def trainer(out: Path, model: Model, steps: int, **how: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(), **how)


WAYS: dict[str, Callable[[Model], dict[str, Any]]] = {
    "by name, M3": lambda m: {"optimizer_cls_and_kwargs": (TrainerFactory, {"name": "m3", "lr": 0.01})},
    "by name, hooks": lambda m: {
        "optimizer_cls_and_kwargs": (TrainerFactory, {"name": "delta_gradient_descent", "lr": 0.1})
    },
    "by class": lambda m: {"optimizer_cls_and_kwargs": (DeltaMomentum, {"lr": 0.1})},
    "M3 by class": lambda m: {"optimizer_cls_and_kwargs": (M3, {"lr": 0.01})},
    "by instance": lambda m: {"optimizers": (build("deep_momentum", m, lr=0.05), None)},
    "muon by instance": lambda m: {"optimizers": (build("muon", m, lr=0.01), None)},
}


@pytest.mark.parametrize("way", WAYS)
def test_trains_and_resumes(way: str, tmp_path: Path) -> None:
    """Four steps = two, a checkpoint, and two."""
    whole, parts = Model(), Model()
    first = sum(whole(**{k: v[None] for k, v in Rows()[i].items()})["loss"].item() for i in range(32))
    trainer(tmp_path / "a", whole, 4, **WAYS[way](whole)).train()
    assert sum(whole(**{k: v[None] for k, v in Rows()[i].items()})["loss"].item() for i in range(32)) < first
    trainer(tmp_path / "b", parts, 2, **WAYS[way](parts)).train()
    resumed = Model()
    checkpoint = str(tmp_path / "b" / "checkpoint-2")
    trainer(tmp_path / "b", resumed, 4, **WAYS[way](resumed)).train(resume_from_checkpoint=checkpoint)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
