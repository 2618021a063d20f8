"""Equal tokens and equal time of the small language models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from nestling.training import NestlingTrainer
from reproductions.harness.rows import NAME, Row, Rows
from reproductions.small_lm import run as small_lm
from reproductions.small_lm import training
from reproductions.small_lm.speed import shares

STEP = training.LENGTH * training.BATCH


def trained(preset: str, tokens: int, rate: float, loss: float, seed: int = 0, part: str = "validation") -> Row:
    return {"part": part, "preset": preset, "rate": rate, "seed": seed, "tokens": tokens, "loss": loss} | {
        "parameters": 10
    }


def speed(preset: str, tokens: int) -> Row:
    found = {"part": "speed", "preset": preset, "reference": "transformer", "reference_tokens": 2048}
    return found | {"tokens": tokens, "step_ms": 5.0, "share": tokens / 2048}


def test_a_training_of_a_share_stands_at_equal_time_alone() -> None:
    rows = [trained("transformer", 2048, 0.1, 2.0), trained("hope", 2048, 0.1, 1.5), trained("hope", 1024, 0.1, 1.75)]
    parts = small_lm.report([*rows, speed("transformer", 2048), speed("hope", 1024)]).parts
    assert "| hope | 10 | 0.1 | 1.5000 (1.5000 to 1.5000) |  |" in parts["results"] and "1.75" not in parts["results"]
    assert "| transformer | 5 | 2,048 | 0.1 | 2.0000 (2.0000 to 2.0000) |  |" in parts["time"]
    assert "| hope | 5 | 1,024 | 0.1 | 1.7500 (1.7500 to 1.7500) |  |" in parts["time"] and "1.5" not in parts["time"]


def test_budgets_have_tables_of_their_own_and_the_rate_that_read_the_test() -> None:
    """A lower validation loss of one seed at another rate is no second choice."""
    rows = [trained("hope", 2048, rate, loss) for rate, loss in ((0.1, 2.5), (0.2, 2.0))]
    rows += [trained("hope", 4096, 0.1, 1.0), trained("hope", 4096, 0.2, 1.5, 1)]
    rows += [trained("hope", 4096, 0.2, 1.25, 1, "test")]
    parts = small_lm.report(rows).parts
    assert parts["results"].startswith("2,048 bytes:") and "4,096 bytes:" in parts["results"]
    assert "| hope | 10 | 0.2 | 1.5000 (1.5000 to 1.5000) | 1.2500 (1.2500 to 1.2500) |" in parts["results"]
    assert "2,048 bytes) | lr 0.1 | lr 0.2 |" in parts["grid"]


@pytest.fixture
def experiment(tmp_path: Path) -> small_lm.Experiment:
    args = argparse.Namespace(folder=tmp_path, presets=["transformer", "hope"], equal_time=None, seeds=[0, 1])
    training.quicken(args)
    args.tokens, args.tune_tokens, args.rates, args.rounds = 4 * STEP - 1, STEP, [0.1, 0.2], 1
    return small_lm.Experiment(args, Rows(tmp_path / NAME))


def test_equal_time_is_a_share_of_the_tokens(experiment: small_lm.Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment.budgets() == {"transformer": 4 * STEP, "hope": 4 * STEP}
    monkeypatch.setattr(
        small_lm, "shares", lambda names, *_: {n: {"share": 0.6 if n == "hope" else 1.0, "step_ms": 1} for n in names}
    )
    experiment.args.equal_time = "transformer"
    assert experiment.budgets() == {"transformer": 4 * STEP, "hope": 3 * STEP}  # 2.4 steps
    monkeypatch.setattr(small_lm, "shares", None)  # what is measured once is not measured again
    assert experiment.budgets() == {"transformer": 4 * STEP, "hope": 3 * STEP}


def test_rates_are_chosen_by_the_short_trainings(
    experiment: small_lm.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def validation(preset: str, rate: float, seed: int, tokens: int) -> float:
        asked.append((rate, seed, tokens))
        return abs(rate - 0.2)

    monkeypatch.setattr(experiment, "validation", validation)
    monkeypatch.setattr(experiment, "tested", lambda *given: asked.append(("test", *given[1:])))
    experiment.preset("hope", 4 * STEP)
    assert asked[:3] == [(0.1, 0, STEP), (0.2, 0, STEP), (0.4, 0, STEP)]
    first, second = ((0.2, seed, 4 * STEP) for seed in (0, 1))
    assert asked[3:] == [first, ("test", *first), second, ("test", *second)]


def test_a_slower_model_has_a_smaller_share() -> None:
    found = shares(["transformer", "hope"], "transformer", training.TINY_SHAPE, 3)
    assert found["transformer"]["share"] == 1 and 0 < found["hope"]["share"] < 1


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("the river ran past the mill and on to the sea.\n" * 150, encoding="utf-8")
    book = [str(tmp_path / "book.txt")]
    made = training.Training("transformer", 1e-2, 0, 4 * STEP, shape=training.TINY_SHAPE)
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    whole = made.run(tmp_path / "whole", book, book, apart=False)
    steps: list[int] = []
    step = NestlingTrainer.training_step

    def interrupted(self: NestlingTrainer, *args: Any, **named: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **named)

    monkeypatch.setattr(NestlingTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.run(tmp_path / "parts", book, book, apart=False)
    parts = made.run(tmp_path / "parts", book, book, apart=False)
    assert steps == [0, 1, 2, 3, 2, 3] and parts["validation"] == whole["validation"]
