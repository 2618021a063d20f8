"""Runs that begin with a converted model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nestling.errors import UserError
from nestling.levels.assignment import steps_of, stream_levels
from nestling.models import convert
from nestling.training import TrainConfig, train
from nestling.training.checkpoint import last_checkpoint
from tests.models.pretrained import pretrained, save_pretrained, tiny_tokenizer
from tests.training.test_train import Interrupted, interrupt_at, without_speed

LEVELS = {"fast": 32, "mid": 70, "slow": 120}


@pytest.fixture
def initial(tmp_path: Path) -> Path:
    converted = convert(pretrained("llama"), LEVELS, "split")
    converted.save_pretrained(tmp_path / "initial")
    tiny_tokenizer().save_pretrained(tmp_path / "initial")
    return tmp_path / "initial"


@pytest.fixture
def config(initial: Path, tmp_path: Path) -> TrainConfig:
    """Steps of 32 tokens: the levels' periods are 1, 2 (of 2.19) and 4 (of 3.75) steps."""
    return TrainConfig(
        out=str(tmp_path / "run"),
        init=str(initial),
        sequence_length=16,
        batch_size=2,
        steps=8,
        log_every=1,
        save_every=1,
        keep_checkpoints=20,
        eval_every=8,
        eval_tokens=100,
        sample_tokens=3,
        tensorboard=False,
        device="cpu",
        weight_decay=0.0,
    )


def test_levels_change_at_their_own_tokens(config: TrainConfig, initial: Path) -> None:
    text = StringIO()
    result = train(config, console=Console(file=text, width=400))
    assert f"from {initial}: " in text.getvalue() and "(its own)" in text.getvalue()
    assert "mid: 6,528 parameters every 2 steps; slow: 6,528 parameters every 4 steps; rest: " in text.getvalue()
    saved = json.loads((result.out / "train_config.json").read_text())["config"]
    assert saved["levels"] == "fast=1,mid=2,slow=4" and saved["learning_rate"] == 1e-4
    weights = [load_file(initial / "model.safetensors")]
    weights += [load_file(result.out / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 9)]
    for level, period in (("fast", 1), ("mid", 2), ("slow", 4)):
        name = f"blocks.1.channel.levels.{level}.down.weight"
        moved = [s for s in range(1, 9) if not torch.equal(weights[s - 1][name], weights[s][name])]
        assert moved == [step for step in range(1, 9) if step % period == 0], level
    assert AutoTokenizer.from_pretrained(result.out).chat_template == tiny_tokenizer().chat_template


def test_without_a_rate_nothing_changes(config: TrainConfig, initial: Path) -> None:
    result = train(replace(config, learning_rate=1e-30, steps=4))
    before, after = load_file(initial / "model.safetensors"), load_file(result.out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-25)


def test_an_interrupted_run_resumes_exactly_and_without_its_beginning(
    config: TrainConfig, initial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(replace(config, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 4)
        train(config)
    assert last_checkpoint(config.out) is not None
    shutil.rmtree(initial)
    train(replace(config, levels="fast=1,mid=2,slow=4"), resume=True)
    assert without_speed(config.out) == without_speed(whole.out)
    assert (Path(config.out) / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_steps_of_rounds_and_refuses() -> None:
    assert steps_of({"a": 100, "c": 174, "d": 176}, 50) == {"a": 2, "c": 3, "d": 4}
    with pytest.raises(
        UserError, match="level fast is updated every 256 tokens, and an optimizer step has 2,048; make"
    ):
        steps_of({"fast": 256, "slow": 4096}, 2048)
    with pytest.raises(UserError, match="or give periods in steps: --levels fast=1,slow=16"):
        steps_of({"fast": 256, "slow": 4096}, 2048)
    with pytest.raises(UserError, match="the levels a and b would both be updated every 2 steps"):
        steps_of({"a": 100, "b": 110}, 50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "transformer"}, "--init brings its own architecture; leave --preset out"),
        ({"size": "340m"}, "leave --size out"),
        ({"overrides": {"window": 3}}, "leave --set out"),
        ({"tokenizer": "bpe:400"}, "--init brings its own tokenizer"),
        ({"batch_size": 4}, "level fast is updated every 32 tokens, and an optimizer step has 64"),
        ({"levels": "fats=2"}, "fats fits no parameter of this model; it has the levels fast, mid, slow and"),
        ({"carry_state": True}, "--carry-state needs --carry-tokens N$"),
    ],
)
def test_settings_that_do_not_fit_write_nothing(
    config: TrainConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(replace(config, **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_what_is_no_nestling_model_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="holds a llama model, not a nestling one"):
        train(replace(config, init=str(tmp_path / "llama")))
    with pytest.raises(UserError, match=r"no model to begin with in .*nowhere"):
        train(replace(config, init=str(tmp_path / "nowhere"), levels="fast=1"))


def test_levels_given_in_steps_take_precedence(config: TrainConfig, initial: Path) -> None:
    result = train(replace(config, levels="slow=3", level_rate_exponent=-0.5, steps=3, batch_size=4))
    before, after = (load_file(Path(d) / "model.safetensors") for d in (initial, result.out / "checkpoint-2"))
    slow = stream_levels(convert(pretrained("llama"), LEVELS, "split"))["slow"]
    assert all(torch.equal(before[n], after[n]) for n in slow)
    assert not torch.equal(before[slow[0].replace("slow", "fast")], after[slow[0].replace("slow", "fast")])
