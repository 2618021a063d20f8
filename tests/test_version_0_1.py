"""Files that version 0.1 wrote can still be read: `tests/version_0_1` holds them, and how they were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import nestling
from nestling.cli import main
from nestling.continual import Learner, MemoryStore, load_memory

FILES = Path(__file__).parent / "version_0_1"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy, since stores are locked and runs go on."""
    return Path(shutil.copytree(FILES, tmp_path / "files"))


@pytest.fixture
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FILES / "expected.json").read_text())
    return found


def stream(n: int, seed: int) -> torch.Tensor:
    """The tokens that `write_files.txt` drew."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (24,), generator=g).repeat(n // 24 + 1)[:n]
    noise = torch.rand(n, generator=g) < 0.1
    return torch.where(noise, torch.randint(3, 259, (n,), generator=g), ids)


def run(*arguments: str | Path) -> int:
    """The command's exit code."""
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["everything", "low_rank"])
def test_a_memory_goes_on_as_it_did(files: Path, expected: dict[str, Any], name: str) -> None:
    """Every option's state, optimizers and pending tokens: the next losses are those that version 0.1 found."""
    model = nestling.NestlingForCausalLM.from_pretrained(files / "model")
    store = MemoryStore(files / name)
    assert [s.note for s in store.index().snapshots] == ["the first", "the second"]
    learner = Learner.restore(model, store.load())
    assert learner.counters.tokens == 350 and learner.log.records[0].name == "a.txt"
    losses = learner.observe(stream(100, 2)).losses
    torch.testing.assert_close(losses, torch.tensor(expected[name]), rtol=0, atol=2e-3)


def test_a_memory_to_share_is_put_on_a_model(files: Path) -> None:
    """A file of a low rank in float16."""
    model = nestling.NestlingForCausalLM.from_pretrained(files / "model").eval()
    ids = stream(100, 0)[None]
    with torch.no_grad():
        before = float(model(ids, labels=ids).loss)
        with load_memory(files / "shared.safetensors").applied(model):
            after = float(model(ids, labels=ids).loss)
    assert after < before - 0.1


def test_a_run_that_was_killed_goes_on(files: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoint, optimizer with levels, data position and metrics."""
    monkeypatch.chdir(files)
    assert run("train", "--out", "run", "--resume") == 0
    rows = [json.loads(line) for line in (files / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 6]
    assert rows[-1]["val_loss"] == pytest.approx(expected["trained"], abs=1e-4)
    AutoModelForCausalLM.from_pretrained(files / "run")


def test_a_run_without_the_settings_of_its_model_is_named(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    (files / "run" / "checkpoint-4" / "config.json").unlink()
    assert run("train", "--out", "run", "--resume") == 2
    assert "no settings of a model in run/checkpoint-4" in capsys.readouterr().err


def test_a_state_is_read_with(
    files: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the flag's old name too."""
    monkeypatch.chdir(files)
    assert run("read", "run/checkpoint-4", "text.txt", "--memory", "state.memory") == 0
    said = capsys.readouterr().out
    assert float(said.split("mean loss")[1].split()[0]) == pytest.approx(expected["read"], abs=1e-3)
