"""Ways to have read documents, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nestling.training.tokenization import byte_tokenizer
from reproductions.harness.rows import NAME, Rows
from reproductions.harness.tiny import tiny_llama
from reproductions.knowledge import run as knowledge
from reproductions.knowledge.arms import Taught
from reproductions.reading.experiment import Judges


def test_what_was_learned_is_asked_with_and_without_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, taught = tiny_llama(1), []

    def teach(arm: Any, *_: object) -> Taught:
        taught.append(arm.learned)
        return Taught(model, 100, 1.0)

    monkeypatch.setattr(knowledge, "teach", teach)
    made = knowledge.Experiment(model, byte_tokenizer(), "tiny", Judges(), Rows(tmp_path / NAME), 2, 4, False)
    alone, both = made.world("study", 0), made.world("study and retrieval", 0)
    assert taught == ["study"] and alone["bytes"] == 100
    assert both["bytes"] > 100 and both["kinds"] != alone["kinds"]
    made.world("study", 1)
    made.world("frozen", 1)
    assert taught == ["study", "study", "nothing"]
