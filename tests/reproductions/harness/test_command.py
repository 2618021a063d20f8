"""The command line of all reproductions."""

from __future__ import annotations

from pathlib import Path

import pytest

from reproductions.__main__ import main
from reproductions.harness.rows import read_rows
from reproductions.parity import run as parity

SMALL = ["--presets", "hope_linear", "--trainings", "reset", "--seeds", "0", "--steps", "2", "--rates", "0.01"]


def test_names_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "parity             Parity of a bit string" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no reproduction 'party'; there are continuum_target, continuum_updates, "):
        main(["party"])


def test_a_run_is_kept_gone_on_with_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "TESTS", {4: 8, 8: 8, 12: 8})
    place = ["--folder", str(tmp_path / "run")]
    main(["parity", *SMALL, *place])
    rows = read_rows(tmp_path / "run" / "results.jsonl")
    assert [(row["preset"], row["steps"]) for row in rows] == [("hope_linear", 2)]
    assert rows[0]["made"]["command"] == "python -m reproductions parity " + " ".join(SMALL)
    assert "| `hope_linear` | reset |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has 1 finished rows; go on with --resume, or give another --folder"):
        main(["parity", *SMALL, *place])
    main(["parity", *SMALL, *place, "--resume"])
    assert read_rows(tmp_path / "run" / "results.jsonl") == rows
    (tmp_path / "run" / "report.md").unlink()
    main(["parity", "--report", *place])
    assert "| `hope_linear` | reset |" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["small_lm"], "give books of Project Gutenberg with --train"),
        (["figure8"], "--model, --flores, --kalamang, --second, --validation is needed"),
        (["figure11"], "--mnist DIR is needed for the part vit"),
        (["reading", "--methods", "cms_9"], "unknown method 'cms_9'"),
        (["figure6"], "--model PATH and either --csv FILE or --set NAME --data DIR are needed"),
    ],
)
def test_what_a_run_lacks_is_said(words: list[str], error: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=error):
        main([*words, "--folder", str(tmp_path)])
    assert not read_rows(tmp_path / "results.jsonl")
