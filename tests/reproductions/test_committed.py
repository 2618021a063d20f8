"""What is committed of every reproduction: one form, generated from the rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reproductions.harness import command
from reproductions.harness.report import PROVENANCE, filled, provenance
from reproductions.harness.rows import NAME, read_rows

WORDS = 800
"""Of RESULTS.md without its provenance, tables and all."""


@pytest.fixture(params=command.names())
def folder(request: pytest.FixtureRequest) -> Path:
    return command.ROOT / request.param


def test_texts_and_pictures_are_those_of_the_rows(folder: Path) -> None:
    rows = read_rows(folder / NAME)
    report = command.load(folder.name).report(rows)
    parts = report.parts | {PROVENANCE: provenance(rows)}
    for name in ("RESULTS.md", "notes.md"):
        text = (folder / name).read_text(encoding="utf-8")
        assert filled(text, parts) == text, f"python -m reproductions {folder.name} --report writes {name} anew"
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", "".join(p.read_text() for p in folder.glob("*.md"))))
    assert {path.name for path in folder.glob("*.svg")} == set(report.pictures) == shown


def test_results_have_one_form(folder: Path) -> None:
    text = (folder / "RESULTS.md").read_text(encoding="utf-8")
    wanted = ["# ", "**Question.** ", "**Answer.** ", "<!-- begin results -->", "## Limits", "[notes.md](notes.md)"]
    places = [text.index(part) for part in [*wanted, "## Provenance", "<!-- begin provenance -->"]]
    assert places == sorted(places)
    words = len(text[: text.index("## Provenance")].split())
    assert words <= WORDS, f"{words} words; details go to notes.md"


def test_every_row_says_what_made_it(folder: Path) -> None:
    for row in read_rows(folder / NAME):
        assert row["made"].keys() >= {"commit", "command"}, row
