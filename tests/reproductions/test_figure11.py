"""The language models of figure 11."""

from __future__ import annotations

import pytest

from reproductions.figure11 import language
from reproductions.figure11.run import report


@pytest.mark.slow
def test_a_language_model_is_trained_and_judged() -> None:
    row = language.run("transformer adamw", 6e-3, 0, 2048, 2048)
    assert not row["diverged"] and 2 < row["test"] < 6
    parts = report([row | {"optimizer": "transformer adamw", "rate": 6e-3, "seed": 0}]).parts
    assert f"| `transformer adamw` | 0.006 | {row['test']:.4f} ({row['test']:.4f})" in parts["results"]
