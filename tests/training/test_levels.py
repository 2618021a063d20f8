"""Runs whose levels update at different frequencies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nestling.errors import UserError
from nestling.training import NestlingTrainer, TrainConfig, train
from nestling.training.checkpoint import checkpoint_step, last_checkpoint
from tests.training.test_train import Interrupted, interrupt_at, without_speed

Make = Callable[..., TrainConfig]
LEVELS = "cms.0=1,cms.1=3,cms.2=5"


def weights_after(out: str | Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / f"checkpoint-{step}" / "model.safetensors")


def test_levels_change_at_their_own_steps(tiny_config: Make) -> None:
    config = tiny_config(preset="hope", levels=LEVELS, save_every=1, keep_checkpoints=20, gradient_accumulation=2)
    text = StringIO()
    train(config, console=Console(file=text, width=400))
    assert "levels cms.0: 673 parameters every step; cms.1: 673 parameters every 3 steps; cms.2: " in text.getvalue()
    assert "rest: 7,576 parameters every step" in text.getvalue()
    weights = [weights_after(config.out, step) for step in range(1, 9)]
    for part, period in (("levels.0.down", 1), ("levels.1.down", 3), ("levels.2.down", 5), ("mixer.in_proj", 1)):
        name = next(n for n in weights[0] if part in n)
        moved = [s for s in range(2, 9) if not torch.equal(weights[s - 2][name], weights[s - 1][name])]
        assert moved == [step for step in range(2, 9) if step % period == 0], part
    saved = json.loads((Path(config.out) / "train_config.json").read_text())
    assert saved["config"]["levels"] == LEVELS


def test_period_one_everywhere_is_a_run_without_levels(tiny_config: Make, tmp_path: Path) -> None:
    plain = train(tiny_config(preset="hope", out=str(tmp_path / "a")))
    levels = train(tiny_config(preset="hope", out=str(tmp_path / "b"), levels="cms.1=1,*.down=1"))
    assert without_speed(levels.out) == without_speed(plain.out)


def test_gradients_are_clipped_before_they_are_summed(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over a period is at most period * grad_clip, however large the gradients."""
    norms: list[float] = []
    original = NestlingTrainer._save_checkpoint

    def look(self: NestlingTrainer, *args: Any) -> None:
        slow = self.optimizer.optimizer.levels[0]  # under accelerate's wrapper
        total = [self.optimizer.optimizer.state[p]["accumulated"] for p in slow.parameters]
        norms.append(float(torch.nn.utils.get_total_norm(total)))
        original(self, *args)

    monkeypatch.setattr(NestlingTrainer, "_save_checkpoint", look)
    train(tiny_config(levels="*=100", grad_clip=1e-3, steps=6, save_every=1))
    assert norms[0] == pytest.approx(1e-3, rel=1e-2)
    assert norms[0] < norms[-1] <= 6e-3


def test_rates_of_levels_scale_and_follow_the_schedule(tiny_config: Make) -> None:
    config = tiny_config(preset="hope", levels="cms.2=4", level_rate_exponent=-0.5, steps=6, save_every=3)
    train(config)
    saved = torch.load(Path(config.out) / "checkpoint-3" / "optimizer.pt", weights_only=True)
    rates = {(g["level"], g["lr"]) for g in saved["param_groups"]}
    slow, rest = (next(lr for level, lr in rates if level == name) for name in ("cms.2", "rest"))
    assert slow == pytest.approx(rest / 2) and rest < 3e-3


@pytest.mark.parametrize("stop", [5, 7])
def test_an_interrupted_run_resumes_exactly(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    changes: dict[str, Any] = {"preset": "hope", "levels": LEVELS, "gradient_accumulation": 2, "save_every": stop - 1}
    changes |= {"measure_levels": True, "log_every": 2}
    whole = train(tiny_config(out=str(tmp_path / "whole"), **changes))
    config = tiny_config(out=str(tmp_path / "cut"), **changes)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 2 * stop)
        train(config)
    kept = last_checkpoint(config.out)
    assert kept is not None and checkpoint_step(kept) == stop - 1
    train(config, resume=True)
    assert without_speed(config.out) == without_speed(whole.out)
    assert (Path(config.out) / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_other_levels_cannot_be_resumed(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(preset="hope", levels=LEVELS)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 4)
        train(config)
    with pytest.raises(UserError, match=r"other settings \(levels: cms.0=1,cms.1=3,cms.2=5 -> cms.0=2\)"):
        train(replace(config, levels="cms.0=2"), resume=True)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ("cms.0", "'cms.0' is no NAME=PERIOD; write for example"),
        ("cms.0=1,,cms.1=2", "'' is no NAME=PERIOD"),
        ("cms.0=0", "the period of cms.0 is a number of steps, 1 or more, not '0'"),
        ("cms.0=1.5", "the period of cms.0 is a number of steps, 1 or more, not '1.5'"),
        ("cms.0=²", "the period of cms.0"),
        ("cms.0=1,cms.0=2", "cms.0 is given twice"),
        ("cms.3=2", "cms.3 fits no parameter of this model; it has the levels cms.0, cms.1, cms.2 and the parameters"),
        ("lm_head.*=2", r"fits no parameter of this model"),
        ("blocks.*=2,cms.0=4", "every parameter of cms.0 belongs to a level named before it; name it first"),
    ],
)
def test_bad_levels_write_nothing(tiny_config: Make, tmp_path: Path, levels: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny_config(preset="hope", levels=levels))
    assert list(tmp_path.iterdir()) == []


def test_an_exponent_without_levels_is_refused(tiny_config: Make) -> None:
    with pytest.raises(UserError, match="has no effect without --levels"):
        tiny_config(level_rate_exponent=-0.5)


def test_levels_are_measured_as_they_train(tiny_config: Make) -> None:
    config = tiny_config(preset="hope", levels=LEVELS, measure_levels=True, tensorboard=True, log_every=4)
    train(config)
    records = [r for r in without_speed(config.out) if "cms.0/distance" in r]
    assert [r["step"] for r in records] == [4, 8]
    periods = [(r["cms.0/effective_period"], r["cms.1/effective_period"]) for r in records]
    assert periods == [(1.0, 4.0), (1.0, 4.0)]  # 4 steps and a change at 3, 8 steps and changes at 3 and 6
    last = records[-1]
    assert {"cms.1/update_norm", "cms.0/grad_norm", "cms.0~cms.1/cosine", "cms.0~cms.1/subspace"} <= set(last)
    assert last["cms.2/effective_period"] == 8.0 and "cms.2/effective_period" not in records[0]
    assert 0 < last["cms.1/distance"] < last["cms.0/distance"] and "rest/grad_norm" in last
    assert not any("rest~" in name or "~rest" in name for name in last)
    events = EventAccumulator(str(Path(config.out) / "tensorboard"))
    events.Reload()
    assert "levels/cms.0~cms.1/cosine" in events.Tags()["scalars"]


def test_measuring_changes_no_training_and_needs_no_levels(tiny_config: Make, tmp_path: Path) -> None:
    plain = train(tiny_config(preset="hope", out=str(tmp_path / "a")))
    measured = train(tiny_config(preset="hope", out=str(tmp_path / "b"), measure_levels=True))
    records = without_speed(measured.out)
    assert [r for r in records if "cms.0/distance" not in r] == without_speed(plain.out)
    assert records[0]["step"] == 1 and "cms.1/grad_norm" in records[1]
