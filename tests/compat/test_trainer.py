"""The Trainer, collators and pipelines of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, pipeline

from nestling.training.tokenization import byte_tokenizer
from tests.compat.subjects import SUBJECTS, documents, subject
from tests.models.conftest import small_model


@pytest.mark.parametrize("name", SUBJECTS)
def test_label_smoothing_is_against_the_next_token(name: str, tmp_path: Path) -> None:
    """Documents packed by the collator; smoothed by next to nothing, the loss is the model's own."""
    batch = DataCollatorWithFlattening()([{"input_ids": row} for row in documents(9, 12, 7)])
    model = subject(name)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=1e-6, use_cpu=True, report_to=[])
    smoothed = Trainer(model, arguments).compute_loss(model, dict(batch))
    torch.testing.assert_close(smoothed, model(**batch).loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_trainer_trains_on_packed_documents(tmp_path: Path, checkpointing: bool) -> None:
    rows = [{"input_ids": row} for row in documents(9, 12, 7, 16)]
    model = small_model("hope", num_layers=1)
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.03}
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    arguments = TrainingArguments(tmp_path, gradient_checkpointing=checkpointing, **settings, **quiet)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening())
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.9 * losses[0]


def test_the_text_generation_pipeline() -> None:
    model = small_model("hope", vocab_size=259).eval()
    write = pipeline("text-generation", model=model, tokenizer=byte_tokenizer(), device="cpu")
    texts = write(["one", "another text"], batch_size=2, max_new_tokens=3, do_sample=False)
    assert [t[0]["generated_text"][:3] for t in texts] == ["one", "ano"]


def test_a_larger_vocabulary() -> None:
    """What the sentence about tokens outside the vocabulary tells to do."""
    model = subject("hope")
    ids = torch.tensor(documents(12))
    before = model(ids).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(model(ids).logits[..., :61], before)
    assert model(torch.tensor([[4, 69]]), labels=torch.tensor([[4, 69]])).loss.isfinite()
