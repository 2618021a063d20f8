"""TRL's trainers; the documents are read apart, packed or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nestling import NestlingForCausalLM
from nestling.training.tokenization import byte_tokenizer
from tests.compat.subjects import FEW, documents, subject

pytestmark = pytest.mark.slow
QUIET = {
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def separate_loss(name: str, rows: list[list[int]]) -> float:
    """Mean over all next tokens of all documents, each read on its own."""
    model, losses = subject(name), []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row])).logits[0, :-1]
            losses.append(F.cross_entropy(logits, torch.tensor(row[1:]), reduction="none"))
    return float(torch.cat(losses).mean())


def copies(a: NestlingForCausalLM, b: NestlingForCausalLM) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"gradient_checkpointing": False}], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_supervised_fine_tuning(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra compat")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = documents(9, 10, 11, 12)
    still = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4, "max_length": 64}
    model = subject(name)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(str(tmp_path), **still, **QUIET, **options),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    loss = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert loss == pytest.approx(separate_loss(name, rows), rel=1e-4)
    assert copies(model, subject(name))


@pytest.mark.parametrize("name", FEW)
def test_direct_preference_optimization(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra compat")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = subject(name), byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "model")  # the frozen reference is loaded from where the model is
    model = type(model).from_pretrained(tmp_path / "model")
    texts = [{"prompt": "one and", "chosen": " one is two", "rejected": " three"}] * 4
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 64}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path / "out"), **settings, **QUIET),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the model is its own reference still
    assert losses[-1] < losses[0] - 0.01
