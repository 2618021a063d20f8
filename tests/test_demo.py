"""The demo, from the plan to the page, on a budget of seconds."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nestling.demo import plan, stages
from nestling.demo.__main__ import run
from nestling.demo.settings import DemoSettings
from nestling.demo.unseen import ENOUGH, unseen_text
from nestling.errors import UserError
from nestling.evaluation.language import token_losses
from nestling.tasks.text import Document, embedded_corpus


def settings_in(out: Path) -> DemoSettings:
    """A demo of four training steps."""
    return DemoSettings(
        out=out,
        tokens=512,
        sequence_length=64,
        batch_size=2,
        carry_tokens=128,
        validate=257,
        read=300,
        continuation=130,
        sample=8,
        bins=4,
    )


@pytest.mark.parametrize("rates", [(4000.0, 1000.0), (9000.0, 3000.0)])
def test_the_budget_fits_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: tuple[float, float]) -> None:
    """The plan's estimate stays within the minutes, and uses them when the token limit allows."""
    speeds = iter(rates)
    monkeypatch.setattr(plan, "_training_rate", lambda model, settings: next(speeds))
    found = plan.make_plan(DemoSettings(out=tmp_path, tokens=10**9))
    assert 0.97 * 480 < found.seconds <= 480
    assert found.tokens % DemoSettings(out=tmp_path).tokens_per_step == 0


def test_a_slow_machine_is_told_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the fewest tokens the estimate exceeds the limit instead of the training becoming pointless."""
    monkeypatch.setattr(plan, "_training_rate", lambda model, settings: 100.0)
    found = plan.make_plan(DemoSettings(out=tmp_path))
    assert found.tokens > plan.FEWEST_TOKENS - DemoSettings(out=tmp_path).tokens_per_step
    assert found.seconds > 480


def test_both_models_get_equal_parameters_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2%; and the two runs differ in nothing but the model."""
    monkeypatch.setattr(plan, "_training_rate", lambda model, settings: 1000.0)
    settings = DemoSettings(out=tmp_path)
    found = plan.make_plan(settings)
    hope, transformer = found.parameters["hope"], found.parameters["transformer"]
    assert abs(hope - transformer) < 0.02 * transformer
    configs = [plan.training_config(settings, name, found.tokens).to_dict() for name in ("hope", "transformer")]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"out", "preset", "overrides"}


def test_the_unseen_text_is_long_and_unseen() -> None:
    """None of its longer paragraphs stands in the training corpus."""
    text = unseen_text().text
    assert len(text) >= ENOUGH > DemoSettings.read + DemoSettings.continuation
    corpus = " ".join(" ".join(document.text.split()) for document in embedded_corpus())
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    assert not [p for p in paragraphs if len(p) > 80 and p in corpus]


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    """A directory that the demo did not make is refused, not deleted."""
    (tmp_path / "hope").mkdir()
    (tmp_path / "hope" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run of the demo"):
        stages.clear_output(settings_in(tmp_path))
    assert (tmp_path / "hope" / "thesis.txt").exists()


def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages run; the new process continues exactly where this one stopped; the page needs no network."""
    settings = settings_in(tmp_path / "out")
    monkeypatch.setattr(plan, "_training_rate", lambda model, settings: 1e6)
    kept: dict[str, object] = {}
    real = stages.remember

    def remember(settings: DemoSettings, trained: dict, reading: stages.Reading, console: Console) -> stages.Recall:
        kept.update(reading=reading, model=trained["hope"].model, recall=real(settings, trained, reading, console))
        recall = kept["recall"]
        assert isinstance(recall, stages.Recall)
        return recall

    monkeypatch.setattr(stages, "remember", remember)
    console = Console(width=110, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    run(settings, console)

    reading, recall = kept["reading"], kept["recall"]
    assert isinstance(reading, stages.Reading) and isinstance(recall, stages.Recall)
    assert recall.process != os.getpid() and recall.position == settings.read
    here, _ = token_losses(kept["model"], torch.tensor(reading.ids[settings.read :]), state=reading.state)
    torch.testing.assert_close(recall.losses["state"], here, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(recall.losses["state"], recall.losses["nothing"], atol=1e-4)
    assert {len(losses) for losses in recall.losses.values()} == {settings.continuation}

    shown = console.export_text()
    assert "Validation loss" in shown and "loss against position" in shown and str(recall.process) in shown
    page = settings.report_file.read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r"(src|href)=.?(https?:|//)", page)


def test_a_failed_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words reach the user."""
    settings = settings_in(tmp_path)
    monkeypatch.setattr(stages.sys, "executable", "/bin/false")

    class State:
        """Stands in for a state."""

        def save(self, path: Path, model: object) -> None:
            """Write nothing."""

    class Run:
        """Stands in for a trained model."""

        model = None

    ids = list(range(settings.read + settings.continuation + 1))
    reading = stages.Reading(Document("text", ""), ids, {}, State())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the new process failed"):
        stages.remember(settings, {"hope": Run()}, reading, Console(quiet=True))  # type: ignore[dict-item]
