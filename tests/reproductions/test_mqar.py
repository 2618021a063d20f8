"""Which trainings the recall report shows, and what its two settings are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestling.tasks.associative_recall import IGNORE
from reproductions.__main__ import main
from reproductions.mqar import run as mqar
from reproductions.mqar.settings import SETTINGS


def training(rate: float, steps: int, seed: int, accuracy: float, ablation: str | None = None) -> dict[str, Any]:
    row = {"preset": "hope", "ablation": ablation, "rate": rate, "steps": steps, "seed": seed, "diverged": False}
    return row | {"validation": [accuracy] * 3, "test": [accuracy] * 3, "state_bytes": [1024] * 3}


@pytest.mark.parametrize("steps", [100, 300])
def test_rates_are_those_of_the_short_trainings(steps: int) -> None:
    rows = [training(0.003, 100, 0, 0.2), training(0.01, 100, 0, 0.4)]
    if steps == 300:  # at the other rate it would have been better
        rows += [training(0.003, 300, 0, 0.9), training(0.01, 300, 0, 0.5), training(0.01, 300, 1, 0.7)]
        rows += [training(0.01, 300, 0, 0.6, "momentum")]
    parts = mqar.report(rows).parts
    assert "0.003" not in parts["results"] + parts["results_seeds"]
    assert ("0.600 (0.500, 0.700), 1 KiB" if steps == 300 else "0.400 (0.400), 1 KiB") in parts["results_seeds"]
    assert ("| 1 KiB | 0.600 (0.500) |" if steps == 300 else "| 1 KiB | 0.400 (0.400) |") in parts["results"]
    assert ("| momentum | 0.01 | 0.600 (0.600), 1 KiB" in parts["hope"]) == (steps == 300)
    # at the ablation's seeds
    assert ("| nothing | 0.01 | 0.500 (0.500), 1 KiB" in parts["hope"]) == (steps == 300)
    assert parts["titans_lmm"] == "Nothing finished yet."


def test_ablations_may_be_shorter_than_what_is_reported() -> None:
    """Each beside the preset's training of the same length."""
    rows = [training(0.01, 100, 0, 0.4), training(0.01, 300, 0, 0.9), training(0.01, 100, 0, 0.2, "momentum")]
    parts = mqar.report(rows).parts
    assert "| `hope` | 0.01 | 0.900 (0.900), 1 KiB" in parts["results_seeds"]
    assert "| nothing | 0.01 | 0.400 (0.400), 1 KiB" in parts["hope"]
    assert "| momentum | 0.01 | 0.200 (0.200), 1 KiB" in parts["hope"]


def test_rows_of_two_settings_do_not_meet() -> None:
    """Neither in a table nor in the choice of a rate; rows of before there were two are of the small one."""
    rows = [training(0.003, 100, 0, 0.9), training(0.01, 100, 0, 0.8), training(0.003, 300, 0, 1.0)]
    other = [training(0.01, 50, 0, 0.4), training(0.003, 50, 0, 0.1), training(0.01, 500, 0, 0.5)]
    other = [row | {"setting": "authors"} | {name: [row[name][0]] * 5 for name in LISTS} for row in other]
    parts = mqar.report(rows + other).parts
    assert "| `hope` | 0.003 | 1 KiB | 1.000 (1.000) |" in parts["results"] and "0.5" not in parts["results"]
    assert "| `hope` | 0.01 | 1 KiB | 0.500 (0.500) |" in parts["authors"] and "64 pairs in 256" in parts["authors"]
    assert mqar.report(rows).parts["results"] == parts["results"]


LISTS = ("validation", "test", "state_bytes")


def test_the_authors_tasks_have_no_filler_that_looks_like_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    setting = SETTINGS["authors"]
    assert [(task.length, task.pairs) for task in setting.train] == [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
    for task in (*setting.train, *setting.test.values()):
        tokens, _ = task.sample(3, torch.Generator().manual_seed(0))
        assert task.vocab_size == 8192 and (tokens != 0).sum(-1).tolist() == [3 * task.pairs] * 3
    main(["mqar", "--setting", "authors", "--quick"])
    assert "| 64 pairs in 256 |" in capsys.readouterr().out


def test_only_the_asked_places_are_answered() -> None:
    model = mqar.build("hope_linear", 0)
    tokens, answers = SETTINGS["small"].train[0].sample(2, torch.Generator().manual_seed(0))
    asked = answers != IGNORE
    found = mqar.logits_at(model, tokens, asked)
    torch.testing.assert_close(found, model(tokens, use_cache=False).logits[asked])


@pytest.mark.parametrize("change", list(mqar.ABLATIONS))
def test_an_ablation_changes_its_preset(change: str) -> None:
    preset = mqar.ABLATIONS[change][0]
    assert mqar.build(preset, 0, change).config.blocks != mqar.build(preset, 0).config.blocks


def test_gated_deltanet_is_also_measured_with_a_state_as_large_as_hopes() -> None:
    task = SETTINGS["small"].test["32 pairs in 128"]
    hope, large = (mqar.state_bytes(mqar.build(name, 0), task) for name in ("hope", "gated_deltanet, keys of 88"))
    assert abs(large / hope - 1) < 0.05
