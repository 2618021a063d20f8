"""What the command of figure 6 refuses before it runs anything, and how it chooses settings."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from nestling.training.tokenization import byte_tokenizer
from reproductions.__main__ import main
from reproductions.figure6 import run as figure6
from tests.llamas import random_llama


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a run on a model of three layers and a set of three classes, with room for what it writes."""
    random_llama(layers=3).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [f"about {topic} number {n},{topic}" for topic in ("tides", "boats", "sand") for n in range(6)]
    (tmp_path / "set.csv").write_text("\n".join(["text,label", *rows]))
    places = ["--cache", str(tmp_path / "cache"), "--folder", str(tmp_path)]
    return ["--csv", str(tmp_path / "set.csv"), "--model", str(tmp_path / "model"), *places]


def test_levels_need_a_block_each(arguments: list[str], tmp_path: Path) -> None:
    for more, error in (
        ([], "levels, levels_replay, levels_memory: 3 levels need at least 3 blocks, and 1 of the model's 3 layers"),
        (["--methods", "levels", "--blocks", "2"], "give --blocks 3 or more"),
        (["--blocks", "4"], "--blocks 4: the model has 3 layers"),
    ):
        with pytest.raises(SystemExit, match=error):
            main(["figure6", *arguments, *more])
    assert not (tmp_path / "results.jsonl").exists()
    small = ["--classes", "1", "--per-class", "2", "--test-per-class", "1", "--tune-tasks", "1", "--seeds", "0"]
    main(["figure6", *arguments, *small, "--methods", "nearest_mean"])
    main(["figure6", *arguments, *small, "--resume", "--methods", "levels", "--blocks", "3"])
    assert '"levels"' in (tmp_path / "results.jsonl").read_text()


@pytest.mark.parametrize(
    ("method", "best", "tried"),
    [
        ("replay_small", {"lr": 3e-5}, 3),
        ("replay_small", {"lr": 1e-3}, 6),
        ("replay_small", {"lr": 1e-6}, 6),
        ("ewc", {"lr": 1e-4, "strength": 1e7}, 12),
        ("ewc", {"lr": 3e-4, "strength": 1e5}, 12),
        ("external_learner", {"shrinkage": 0.95}, 6),
        ("external_learner", {"shrinkage": 0.01}, 8),
        ("frozen_memory", {"weight": 1000.0, "ridge": 300.0}, 6),
        ("nearest_mean", {}, 0),
    ],
)
def test_a_grid_grows_until_the_best_is_inside(method: str, best: dict[str, float], tried: int) -> None:
    """Accuracy falls with the distance from the best, so the choice is that; the number of settings tried is counted by
    hand: one beyond the best in each direction that grows, and no value again."""
    asked = []

    def measure(method: str, options: dict[str, float], part: str, seed: int) -> dict[str, float]:
        assert part == "validation"
        asked.append(tuple(options.values()))
        away = sum(abs(math.log10(options[name] / value)) for name, value in best.items())
        return {"final": round(-away, 6), "average": 0.0}

    chosen = figure6.Experiment.chosen(SimpleNamespace(run=measure), method)
    assert chosen == pytest.approx(best)
    assert len(set(asked)) == tried


def test_settings_that_are_as_good_do_not_make_the_grid_grow() -> None:
    """Of equals the first stands; beside it, one value beyond each edge is asked for and no more."""
    asked = []

    def measure(method: str, options: dict[str, float], part: str, seed: int) -> dict[str, float]:
        asked.append(options["lr"])
        return {"final": 0.5, "average": 0.5}

    assert figure6.Experiment.chosen(SimpleNamespace(run=measure), "replay_small") == {"lr": 1e-5}
    assert sorted(set(asked)) == [3e-6, 1e-5, 3e-5, 1e-4]
