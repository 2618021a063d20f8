"""Results of version 0.1 are read as rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reproductions.__main__ import main
from reproductions.harness.command import load
from reproductions.harness.rows import read_rows

SETTING = {"lr": 0.1, "momentum": 0.9}
VALLEY = {
    "converged": 1, "converged_one_setting": 1, "one_setting": SETTING, "median_steps": 7.0, "ahead": 0.0,
    "behind": 0.0, "median_ratio": 1.0, "faster_by_tenth": 0, "slower_by_tenth": 0, "settings_that_converge": 0.25,
}  # fmt: skip
STEP = {"ms": 2.0, "over_adamw": 1.0, "over_muon": 0.5, "range": [0.4, 0.6]}
TASKS = {"lr": 0.1, "momentum": 0.5, "edge": False, "first_task": [1.0] * 9, "momenta": [0.5, 0.9]}
# The documents as version 0.1 wrote them, cut to one row, and a line of the report that is made of each.
OLD: dict[str, tuple[Any, str]] = {
    "figure4": (
        {"steps": 2000, "near": 0.01, "rates": [0.1], "momenta": [0.9], "methods": {"momentum": VALLEY},
         "functions": [{"k": 1.0, "alpha": 0.0, "omega": 1.0, "momentum": {"steps": 7.0} | SETTING},
                       {"k": 3.0, "alpha": 0.0, "omega": 1.0, "momentum": None}]},
        "| momentum | 1 (1) | 7 | 1.00 | 0 / 0 | 25% | 0% / 0% |",
    ),
    "figure12": (
        {"threads": 2, "torch": "2.13.0", "processor": "A", "rows": [{"parameters": 2410176, "rounds": 5}
         | dict.fromkeys(("adamw", "muon", "adamuon", "m3", "delta_momentum"), STEP)]},
        "| 2,410,176 | 2.0 ms (0.50) |",
    ),
    "orthogonal_tasks": (
        [{"optimizer": "Adam", "setting": "orthogonal"} | TASKS
         | {f"{key}{more}": 0.001 for key in ("learned", "final", "forgotten") for more in ("", "_spread")}],
        "| orthogonal | Adam | 0.1, 0.5 | 1.00 ± 1.00 |",
    ),
    "parity": (
        {"torch": "2.13.0", "threads": 1, "learning_rate": 0.01, "rows": 32, "runs": [
         {"preset": "hope", "training": "carry", "seed": 0, "steps": 600, "loss": 0.0,
          "accuracy": {"40": 1.0, "160": 0.75, "640": 0.5}}]},
        "| `hope` | carry | 0.01 | 1.0000 (1.0000) | 0.7500 (0.7500) | 0.5000 (0.5000) |  |  | 40 |",
    ),
    "small_lm": (
        {"commit": "abc1234", "machine": "x86_64", "threads": 1, "sequence_length": 512, "batch_size": 2,
         "train": ["a.txt"], "valid": "b.txt", "test": "c.txt", "best": {"hope": 0.012}, "runs": [
          {"run": "hope-lr0.012-seed0", "preset": "hope", "rate": 0.012, "seed": 0, "validation": 1.5,
           "parameters": 2401860, "tokens": 400384, "test": 1.25}]},
        "| hope | 2,401,860 | 0.012 | 1.5000 (1.5000 to 1.5000) | 1.2500 (1.2500 to 1.2500) |",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OLD))
def test_a_document_becomes_rows_that_the_report_reads(name: str, tmp_path: Path) -> None:
    document, line = OLD[name]
    (tmp_path / "results.json").write_text(json.dumps(document))
    main(["--convert", str(tmp_path / "results.json")])
    rows = read_rows(tmp_path / "results.jsonl")
    assert line in load(name).report(rows).parts["results"]
    assert (tmp_path / "results.json").exists()


def test_lines_of_another_file_are_added(tmp_path: Path) -> None:
    """Version 0.1 kept figure 11's language models in a file of their own."""
    row = {"optimizer": "hope m3", "rate": 0.048, "seed": 0, "diverged": False, "validation": 1.8, "test": 1.5}
    (tmp_path / "results.jsonl").write_text('{"optimizer": "m3"}\n')
    (tmp_path / "language.jsonl").write_text(json.dumps(row | {"seconds": 9.0}) + "\n")
    main(["--convert", str(tmp_path / "language.jsonl")])
    rows = read_rows(tmp_path / "results.jsonl")
    assert rows[0] == {"optimizer": "m3"}
    assert "| `hope m3` | 0.048 | 1.5000 (1.5000) | 9 |" in load("figure11").report(rows[1:]).parts["results"]


def test_other_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"a": 1}')
    with pytest.raises(SystemExit, match=r"this is no results\.json of version 0\.1"):
        main(["--convert", str(tmp_path / "results.json")])
    with pytest.raises(SystemExit, match="no file at"):
        main(["--convert", str(tmp_path / "none.json")])
