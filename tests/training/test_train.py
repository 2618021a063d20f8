"""Whole runs: what they leave behind, that they learn, that they resume exactly, and how they fail."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from nestling import presets
from nestling.errors import UserError
from nestling.evaluation.language import evaluate_loss
from nestling.training import DivergenceError, NestlingTrainer, TrainConfig, train
from nestling.training.build import build_model
from nestling.training.checkpoint import checkpoints
from nestling.training.corpus import prepare_data
from nestling.training.layout import share_rows
from nestling.training.records import read_metrics
from nestling.training.rows import collate
from nestling.training.trainer import training_arguments

Make = Callable[..., TrainConfig]


class Interrupted(Exception):
    """Stands for the moment a process dies."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, micro_step: int) -> None:
    """Make the run stop in the middle of the given micro-batch, after its backward pass."""
    count = 0
    original = NestlingTrainer.training_step

    def step(self: NestlingTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        loss = original(self, *args, **kwargs)
        if count == micro_step:
            raise Interrupted
        return loss

    monkeypatch.setattr(NestlingTrainer, "training_step", step)


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def without_speed(out: str | Path) -> list[dict[str, Any]]:
    records = read_metrics(Path(out) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records]


@pytest.mark.parametrize("preset", sorted(presets.PRESETS))
def test_every_preset_trains(tiny_config: Make, preset: str) -> None:
    """By its name, two steps, and the saved model answers."""
    wide = {"hidden_size": 32, "num_layers": 1}
    out = train(tiny_config(preset=preset, overrides=wide, steps=2, batch_size=2, sample_tokens=0, eval_tokens=64)).out
    losses = [r["loss"] for r in read_metrics(Path(out) / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_a_run_leaves_a_model_and_its_record(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config(tensorboard=True, sample_prompt="The ")
    text = StringIO()
    result = train(config, console=Console(file=text, width=200))
    model = AutoModelForCausalLM.from_pretrained(config.out)
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    data = prepare_data(config.resolved())
    again = evaluate_loss(model, data.valid, config.sequence_length, n_bytes=data.valid_bytes)
    assert again == pytest.approx(result.validation) or abs(again.loss - result.validation.loss) < 1e-6
    assert model.config.use_cache and tokenizer.eos_token_id == model.config.eos_token_id == 2
    assert result.sample.startswith("The ")
    assert (result.steps, result.tokens) == (8, 8 * 4 * 32)

    records = without_speed(config.out)
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == list(range(1, 9))
    assert set(training[0]) == {"step", "tokens", "loss", "lr", "grad_norm"}
    assert [r["step"] for r in records if "val_loss" in r] == [4, 8]
    assert records[-1]["val_loss"] == result.validation.loss
    assert records[-1]["bits_per_byte"] == pytest.approx(result.validation.loss / 0.6931472, rel=0.01)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert [p.name for p in checkpoints(config.out)] == ["checkpoint-6", "checkpoint-8"]
    assert "last 10% of each corpus, held out" in text.getvalue()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 8
    for checkpoint in checkpoints(config.out):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    assert train(config, resume=True).validation == result.validation  # finished: nothing is trained again


def test_training_learns(tiny_config: Make) -> None:
    result = train(tiny_config(steps=40, learning_rate=1e-2, eval_every=40, save_every=40, log_every=20))
    first, last = [r["loss"] for r in read_metrics(result.out / "metrics.jsonl") if "loss" in r]
    assert last < first - 0.5
    assert result.validation.loss < 4.5  # ln(259) is 5.56


def test_optimizer_settings(tiny_config: Make) -> None:
    config = tiny_config(steps=10, warmup_steps=4, learning_rate=2e-3, min_lr_ratio=0.25, sample_tokens=0)
    train(config)
    rates = [r["lr"] for r in read_metrics(Path(config.out) / "metrics.jsonl") if "loss" in r]
    assert rates[:5] == pytest.approx([0, 5e-4, 1e-3, 1.5e-3, 2e-3])
    assert all(a > b for a, b in pairwise(rates[4:])) and rates[-1] > 5e-4
    saved = torch.load(checkpoints(config.out)[-1] / "optimizer.pt", weights_only=True)
    decaying, plain = saved["param_groups"]
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decaying["betas"] == (0.9, 0.95)
    model = AutoModelForCausalLM.from_pretrained(config.out)
    dimensions = [p.dim() for p in model.parameters()]
    assert len(decaying["params"]) == sum(d >= 2 for d in dimensions)
    assert len(plain["params"]) == sum(d < 2 for d in dimensions) > 0


def test_accumulated_batches_equal_one_large_batch(tiny_config: Make, tmp_path: Path) -> None:
    large = train(tiny_config(batch_size=4, out=str(tmp_path / "a")))
    small = train(tiny_config(batch_size=2, gradient_accumulation=2, out=str(tmp_path / "b")))
    for a, b in zip(without_speed(large.out), without_speed(small.out), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_carried_state_is_the_state_of_the_text_before(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of almost 0, step k's loss is that of tokens 32k to 32k + 31 read after all before them."""
    config = tiny_config(
        preset="hope", carry_state=True, learning_rate=1e-12, weight_decay=0.0, gradient_accumulation=2, steps=3
    )
    train(config)
    losses = [r["loss"] for r in without_speed(config.out) if "loss" in r]
    data = prepare_data(config.resolved())
    model = build_model(config, data.tokenizer)
    batches = [[data.rows[4 * micro + row] for row in range(4)] for micro in range(6)]
    ids = torch.stack([torch.cat([b[row]["input_ids"] for b in batches]) for row in range(4)])
    targets = torch.stack([torch.cat([b[row]["targets"] for b in batches]) for row in range(4)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        parts = [float(next_token_loss(x, y)) for x, y in zip(logits.split(32, 1), targets.split(32, 1), strict=True)]
        fresh = float(next_token_loss(model(input_ids=ids[:, -32:]).logits, targets[:, -32:]))
    expected = [(parts[2 * k] + parts[2 * k + 1]) / 2 for k in range(3)]
    assert losses == pytest.approx(expected, abs=2e-5)
    assert abs(fresh - parts[-1]) > 1e-4  # reading without the past would have been noticed


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "hope", "carry_state": True, "gradient_accumulation": 2},
        {"carry_state": True, "carry_tokens": 96},
        {"log_every": 5, "precision": "bf16"},
    ],
    ids=["hope-carried-accumulated", "attention-carried", "bf16-uneven-logs"],
)
def test_an_interrupted_run_resumes_exactly(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole = tiny_config(out=str(tmp_path / "whole"), **changes)
    train(whole)
    config = replace(whole, out=str(tmp_path / "cut"))
    per_step = config.gradient_accumulation
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 2 * per_step)  # before the first checkpoint
        train(config)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 5 * per_step)
        train(config, resume=True)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "los')  # killed while writing
    resumed = train(config, resume=True)
    assert without_speed(config.out) == without_speed(whole.out)
    weights = [(Path(c.out) / "model.safetensors").read_bytes() for c in (whole, config)]
    assert weights[0] == weights[1]
    assert resumed.steps == 8


def test_products_have_the_precision_asked_for_while_training_only(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    loss = NestlingTrainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.add(torch.get_float32_matmul_precision())
        return loss(*args, **kwargs)

    monkeypatch.setattr(NestlingTrainer, "compute_loss", watched)
    train(tiny_config(matmul_precision="medium", steps=1, sample_tokens=0))
    assert seen == {"medium"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_streamed_set_resumes_exactly(tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    corpus = tmp_path / "set"
    corpus.mkdir()
    lines = [json.dumps({"text": f"Document {i}. " + "word " * (i % 40)}) for i in range(90)]
    (corpus / "train.jsonl").write_text("\n".join(lines))
    changes: dict[str, Any] = {"streaming": True, "data": (str(corpus),), "eval_tokens": 100, "carry_state": True}
    changes |= {"preset": "hope", "gradient_accumulation": 2, "sample_tokens": 0}
    whole = train(tiny_config(out=str(tmp_path / "whole"), **changes))
    config = tiny_config(out=str(tmp_path / "cut"), **changes)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 11)
        train(config)
    train(config, resume=True)
    assert without_speed(config.out) == without_speed(whole.out)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_killed_before_its_model_was_saved_is_finished(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    from nestling.training import run

    changes: dict[str, Any] = {}
    if streaming:
        pytest.importorskip("datasets")
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_text(
            "\n".join(json.dumps({"text": f"line {i} " * 9}) for i in range(90))
        )
        changes = {"streaming": True, "data": (str(tmp_path / "set"),), "eval_tokens": 100}
    whole = train(tiny_config(out=str(tmp_path / "whole"), **changes))
    config = tiny_config(**changes)

    def die(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(run, "_save_model", die)
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()
    assert train(config, resume=True).train_loss == whole.train_loss
    assert without_speed(config.out) == without_speed(whole.out)
    weights = [(Path(c) / "model.safetensors").read_bytes() for c in (whole.out, config.out)]
    assert weights[0] == weights[1]


def test_the_loss_is_the_mean_over_all_targets_also_in_chunks(tiny_config: Make) -> None:
    config = tiny_config().resolved()
    data = prepare_data(config)
    model = build_model(config, data.tokenizer)
    batch = collate([data.rows[i] for i in range(4)])
    with torch.no_grad():
        expected = next_token_loss(model(input_ids=batch["input_ids"]).logits, batch["targets"])
    losses = []
    for chunk in (None, 16):
        model.config.loss_chunk_size = chunk
        trainer = NestlingTrainer(
            model, training_arguments(config, share_rows(config)), data.rows, data.tokenizer, share_rows(config)
        )
        losses.append(float(trainer.compute_loss(model, batch).detach()))
    assert losses == pytest.approx([float(expected)] * 2, abs=1e-6)


def test_a_large_vocabulary_is_trained_in_chunks_and_saved_without(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestling.training.build.LARGE_VOCABULARY", 100)
    result = train(tiny_config(steps=2, sample_tokens=0))
    assert json.loads((checkpoints(result.out)[-1] / "config.json").read_text())["loss_chunk_size"] == 2048
    assert AutoModelForCausalLM.from_pretrained(result.out).config.loss_chunk_size is None


def test_other_settings_or_other_data_cannot_be_resumed(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some text to train on\n" * 60)
    config = tiny_config(data=(str(tmp_path / "a.txt"),))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 4)
        train(config)
    with pytest.raises(UserError, match=r"already holds a run; continue it with --resume"):
        train(config)
    with pytest.raises(UserError, match=r"other settings \(batch_size: 4 -> 2\)"):
        train(replace(config, batch_size=2), resume=True)
    (tmp_path / "a.txt").write_text("some other text to train on\n" * 60)
    with pytest.raises(UserError, match=r"training data of .* has changed"):
        train(config, resume=True)


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_goes_on_later(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_config(out=str(tmp_path / "whole")))
    config = tiny_config()
    original = NestlingTrainer._save_rng_state

    def full(self: NestlingTrainer, directory: str) -> None:
        if self.state.global_step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, directory)

    with monkeypatch.context() as patch:
        patch.setattr(NestlingTrainer, "_save_rng_state", full)
        with pytest.raises(UserError, match=r"step 6 could not be written \(.*No space left.*checkpoint-3 is intact"):
            train(config)
    assert [p.name for p in checkpoints(config.out)] == ["checkpoint-3"]
    assert not (tmp_path / "run" / ".saving").exists()
    train(config, resume=True)
    assert without_speed(config.out) == without_speed(whole.out)


def test_a_loss_that_breaks_stops_the_run(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(preset="hope")
    original = NestlingTrainer.training_step

    def poison(self: NestlingTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            with torch.no_grad():
                self.net.blocks[0].mixer.in_proj.weight[0, 0] = torch.nan
        return original(self, *args, **kwargs)

    monkeypatch.setattr(NestlingTrainer, "training_step", poison)
    with pytest.raises(DivergenceError) as caught:
        train(config)
    message = str(caught.value)
    assert "stopped at step 5: the loss is nan: parameter blocks.0.mixer.in_proj.weight holds NaN" in message
    assert "checkpoint-3; start a new run with a lower --lr (now 0.003)" in message
    assert [p.name for p in checkpoints(config.out)] == ["checkpoint-3"]


def test_a_gradient_or_a_step_that_breaks_stops_the_run(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DivergenceError, match=r"stopped at step \d+: .*(NaN|infinity)"):
        train(tiny_config(learning_rate=1e30, warmup_steps=0))
    healthy = NestlingTrainer.compute_loss

    def broken(*args: Any, **kwargs: Any) -> Any:  # 0, but its derivative is not finite
        return (healthy(*args, **kwargs) * 0.0).sqrt()

    monkeypatch.setattr(NestlingTrainer, "compute_loss", broken)
    with pytest.raises(DivergenceError, match=r"stopped at step 1: the gradient of embed_tokens\.weight holds NaN"):
        train(tiny_config(out=tiny_config().out + "2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "hopeless"}, "unknown preset 'hopeless'; choose one of: hope, "),
        ({"size": "huge"}, "unknown size 'huge'; choose one of: tiny, 340m"),
        ({"overrides": {"hiden_size": 3}}, "has no setting hiden_size; its settings: .*hidden_size"),
        ({"overrides": {"vocab_size": 3}}, "follows the tokenizer"),
        ({"overrides": {"hidden_size": 16, "num_heads": 3}}, "preset transformer at size tiny: "),
        ({"carry_state": True}, "grows with every token.*--carry-tokens N"),
        ({"data": ("/no/such/file",)}, "no file or directory at /no/such/file"),
        ({"valid": ("/no/such/file",)}, "no file or directory at /no/such/file"),
        ({"sequence_length": 10**6}, "shorter than one sequence"),
        ({"tokenizer": "bpe:x"}, "vocabulary size"),
    ],
)
def test_bad_input_writes_nothing(tiny_config: Make, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny_config(**changes))
    assert list(tmp_path.iterdir()) == []


def test_directories_that_cannot_be_used(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; give a directory"):
        train(tiny_config(out=str(tmp_path / "file")))
    with pytest.raises(UserError, match="is not empty; choose a new"):
        train(tiny_config(out=str(tmp_path)))
    with pytest.raises(UserError, match="no run to resume"):
        train(tiny_config(), resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_explicit_validation_text_and_bpe(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("All human beings are born free and equal in dignity and rights.\n" * 5)
    config = tiny_config(tokenizer="bpe:300", valid=(str(tmp_path / "valid.txt"),), steps=2, sample_tokens=0)
    result = train(config)
    data = prepare_data(config.resolved())
    assert len(data.tokenizer) == 300
    assert data.valid_bytes == (tmp_path / "valid.txt").stat().st_size or len(data.valid) == config.eval_tokens
    bits = result.validation.loss * result.validation.tokens / 0.69314718 / data.valid_bytes
    assert result.validation.bits_per_byte == pytest.approx(bits)
