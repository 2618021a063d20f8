"""The commands of the reproductions run, on a few steps."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "reproductions"


@pytest.mark.parametrize(
    ("folder", "shown"),
    [
        ("figure4", "Eq. 49 to the letter"),
        ("orthogonal_tasks", "forgotten"),
        ("figure11", "m3: training loss"),
        ("figure12", "delta_momentum"),
        ("mqar", "after 2 steps"),
        ("figure6", "test seed 0 levels_memory"),
        ("reading", "`cms_3+sleep`"),
        ("figure8", "language 1, chrF: alone, sequence"),
    ],
)
def test_quick(folder: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["reproductions", folder, "--quick"])
    committed = {file: file.read_bytes() for file in (ROOT / folder).iterdir() if file.is_file()}
    runpy.run_module("reproductions", run_name="__main__")
    assert shown in capsys.readouterr().out
    assert {file: file.read_bytes() for file in (ROOT / folder).iterdir() if file.is_file()} == committed
