"""Reports between markers."""

from __future__ import annotations

from pathlib import Path

import pytest

from reproductions.harness.report import Report, filled, provenance, table, write

ROW = {"seed": 0, "loss": 1.0}
MADE = {"commit": "abc1234", "machine": "Abacus", "threads": 2, "torch": "2.13.0+cpu", "command": "python -m x"}


def test_parts_go_between_their_markers() -> None:
    text = "# A\n\n<!-- begin results -->\nold\n<!-- end results -->\n\nMine.\n"
    once = filled(text, {"results": "| new |", "more": "unused"})
    assert once == "# A\n\n<!-- begin results -->\n\n| new |\n\n<!-- end results -->\n\nMine.\n"
    assert filled(once, {"results": "| new |"}) == once


@pytest.mark.parametrize("text", ["<!-- begin results -->", 2 * "<!-- begin results -->\n<!-- end results -->\n"])
def test_broken_markers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not there once each"):
        filled(text, {"results": ""})


def test_a_marker_without_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is generated for <!-- begin other -->; there are results"):
        filled("<!-- begin other --><!-- end other -->", {"results": ""})


def test_provenance_is_that_of_the_rows() -> None:
    rows = [ROW | {"made": MADE}, ROW | {"seed": 1, "made": MADE}, ROW | {"hardware": "H100, high"}, {"loss": 2}]
    assert provenance(rows).splitlines() == [
        "4 rows in [results.jsonl](results.jsonl):",
        "",
        "- 2 rows, seeds 0, 1: commit `abc1234`; Abacus, 2 threads, torch 2.13.0",
        "- 1 row, seed 0: commit not recorded; H100, high",
        "- 1 row: commit not recorded; machine not recorded",
        "",
        "Made by",
        "",
        "    python -m x",
    ]
    assert provenance([]) == "Nothing finished yet."


def test_a_folder_without_texts_gets_a_report(tmp_path: Path) -> None:
    report = Report({"results": table(["a", "b"], [["1", "2"]])}, {"picture.svg": lambda: "<svg/>"})
    written = write(tmp_path, report, [])
    assert [path.name for path in written] == ["picture.svg", "report.md"]
    assert written[1].read_text() == "| a | b |\n| --- | --- |\n| 1 | 2 |\n\nNothing finished yet.\n"
    (tmp_path / "notes.md").write_text("<!-- begin results --><!-- end results -->")
    assert [path.name for path in write(tmp_path, report, [])] == ["picture.svg", "notes.md"]
