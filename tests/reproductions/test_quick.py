"""Every reproduction runs, on a few steps, and its report says what it made."""

from __future__ import annotations

import pytest

from reproductions.__main__ import main
from reproductions.harness import command

SHOWN = {
    "continuum_target": "`value`: a learned projection of the token itself",
    "continuum_updates": "| `hope_attention` | all: the same with momentum and retention |",
    "figure4": "| Eq. 49 to the letter | 0 (0)",
    "figure6": "| `levels_memory` | none |",
    "figure8": "language 1, chrF: alone, sequence",
    "figure11": "| `m3` | 0.002 |",
    "figure12": "`delta_momentum`",
    "knowledge": "| lora, 10 passes |",
    "looped_depth": "| `transformer` | looped |",
    "memory_caching": "| keys of 4, residual | 8 |",
    "mqar": "| 4 pairs in 32 |",
    "orthogonal_tasks": "| orthogonal | delta momentum |",
    "overwrite": "| preset | learning rate | 4 pairs |",
    "parity": "| `hope` | carry |",
    "reading": "`cms_3+sleep`",
    "small_lm": "| transformer | ",
    "update_frequency": "| one level | ratio 1 |",
    "sleep": "| without dreams |",
}


def test_every_reproduction_is_tested() -> None:
    assert sorted(SHOWN) == command.names()


@pytest.mark.parametrize("name", list(SHOWN))
def test_quick(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = command.ROOT / name
    committed = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    main([name, "--quick"])
    out = capsys.readouterr().out
    assert SHOWN[name] in out and "[results.jsonl](results.jsonl)" in out
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == committed
