"""The paper map names functions and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import code_links
import pytest

ROOT = Path(__file__).resolve().parents[2]
MAP = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in MAP.splitlines() if line.startswith("| ")]
EQUATIONS = [row for row in ROWS if len(row) == 4 and row[0] not in ("equation", "---")]


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: f"{row[0]}: {row[1]}"[:60])
def test_functions_exist(row: list[str]) -> None:
    """`file: function` names a file, and what it defines; a plain name after it is in the same file."""
    found = code_links.references(row[2])
    assert found or "`" not in row[2], f"no span of {row[2]!r} names a file"
    _resolve(found)


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: f"{row[0]}: {row[1]}"[:60])
def test_tests_exist(row: list[str]) -> None:
    """Tests are files, folders, or files of the folder named before."""
    folder = ROOT
    for span in re.findall(r"`([^`]*(?:tests/|test_)[^`]*)`", row[3]):
        path = ROOT / span if span.startswith("tests/") else folder / span
        assert path.exists(), f"{span} does not exist"
        folder = path.parent


def test_files_of_the_deviations_exist() -> None:
    """Any code span that names a file in the text below the table."""
    for line in MAP.splitlines():
        if not line.startswith("|"):
            _resolve(code_links.references(line))


def test_links_lead_to_the_reference() -> None:
    """Public functions are linked themselves, private ones by what holds them."""
    text = "| x | y | `ops/reference.py: token_rule`, `layers/self_modifying.py: _generate` | |"
    linked = code_links.link(text, ROOT)
    assert "[`ops/reference.py: token_rule`][nestling.ops.reference.token_rule]" in linked
    assert "][nestling.layers.self_modifying" in linked and "_generate]" not in linked


def _resolve(found: list[code_links.Reference]) -> None:
    for reference in found:
        path = code_links.locate(reference.file, ROOT)
        assert path is not None, f"{reference.file} does not exist"
        if reference.name:
            assert code_links.defines(path, reference.name), f"{reference.file} does not define {reference.name}"
