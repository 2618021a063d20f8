"""The pictures of docs/ are what their scripts draw."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("script", sorted(DOCS.glob("draw_*.py")), ids=lambda path: path.stem)
def test_pictures_are_drawn_by_their_scripts(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of a script, or of what it shows, is drawn again."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr(module, "HERE", tmp_path)
    module.main()
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert drawn
    for picture in drawn:
        committed = (DOCS / "pictures" / picture.name).read_text(encoding="utf-8")
        assert picture.read_text(encoding="utf-8") == committed, f"draw {picture.name} again: python docs/{script.name}"
