"""Checkpoints exist whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nestling.training import checkpoint as module
from nestling.training.checkpoint import (
    checkpoint_step,
    checkpoints,
    clear_leftovers,
    last_checkpoint,
    move_files,
    prune,
    remove_tree,
    staged_directory,
    staging_path,
    write_json,
)


def make(out: Path, *steps: int) -> None:
    for step in steps:
        with staged_directory(out / f"checkpoint-{step}") as staging:
            (staging / "weights").write_text(str(step))


def test_order_is_numeric_and_strangers_are_passed_over(tmp_path: Path) -> None:
    make(tmp_path, 100, 20, 3)
    (tmp_path / "checkpoint-old").mkdir()
    assert [checkpoint_step(p) for p in checkpoints(tmp_path)] == [3, 20, 100]
    prune(tmp_path, 2)
    assert [checkpoint_step(p) for p in checkpoints(tmp_path)] == [20, 100]
    assert last_checkpoint(tmp_path / "nothing") is None
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint_step(tmp_path)


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_checkpoint_and_no_trace(tmp_path: Path, error: BaseException) -> None:
    make(tmp_path, 5)
    for target in ("checkpoint-5", "checkpoint-6"):
        with pytest.raises(type(error)), staged_directory(tmp_path / target) as staging:
            (staging / "weights").write_text("half")
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    assert (tmp_path / "checkpoint-5" / "weights").read_text() == "5"


def test_a_process_killed_while_writing_or_deleting_leaves_only_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 5, 6)
    half = staging_path(tmp_path / "checkpoint-7")
    half.mkdir(parents=True)
    (half / "weights").write_text("half")
    monkeypatch.setattr(module.shutil, "rmtree", lambda *a, **k: None)  # the kill comes before the files are gone
    remove_tree(tmp_path / "checkpoint-5")
    monkeypatch.undo()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-6"]
    clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-6"]


def test_rewriting_replaces(tmp_path: Path) -> None:
    make(tmp_path, 5)
    with staged_directory(tmp_path / "checkpoint-5") as staging:
        (staging / "weights").write_text("new")
    assert (tmp_path / "checkpoint-5" / "weights").read_text() == "new"
    move_files(tmp_path / "checkpoint-5", tmp_path)
    assert (tmp_path / "weights").read_text() == "new"


def test_json_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"x": 1})

    def fail(handle: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
