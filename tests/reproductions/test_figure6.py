"""What the command of figure 6 refuses before it runs anything."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from nestling.training.tokenization import byte_tokenizer
from tests.llamas import random_llama

FOLDER = Path(__file__).resolve().parents[2] / "reproductions" / "figure6"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a run on a model of three layers and a set of three classes, with room for what it writes."""
    random_llama(layers=3).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [f"about {topic} number {n},{topic}" for topic in ("tides", "boats", "sand") for n in range(6)]
    (tmp_path / "set.csv").write_text("\n".join(["text,label", *rows]))
    places = ["--cache", str(tmp_path / "cache"), "--results", str(tmp_path / "results.jsonl")]
    return ["--csv", str(tmp_path / "set.csv"), "--model", str(tmp_path / "model"), *places]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The command; modules of its folder are forgotten again, since the folders share names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    try:
        runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def test_levels_need_a_block_each(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for more, error in (
        ([], "levels, levels_replay, levels_memory: 3 levels need at least 3 blocks, and 1 of the model's 3 layers"),
        (["--methods", "levels", "--blocks", "2"], "give --blocks 3 or more"),
        (["--blocks", "4"], "--blocks 4: the model has 3 layers"),
    ):
        with pytest.raises(SystemExit, match=error):
            run(monkeypatch, *arguments, *more)
    assert not (tmp_path / "results.jsonl").exists()
    small = ["--classes", "1", "--per-class", "2", "--test-per-class", "1", "--tune-tasks", "1", "--seeds", "0"]
    run(monkeypatch, *arguments, *small, "--methods", "nearest_mean")
    run(monkeypatch, *arguments, *small, "--methods", "levels", "--blocks", "3")
    assert '"levels"' in (tmp_path / "results.jsonl").read_text()
