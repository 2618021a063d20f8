"""`nestling study`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nestling.cli import main, sleeping, studying
from nestling.cli.learning import Stopped
from nestling.continual.store.store import MemoryStore, load_memory
from nestling.continual.store.texts import text_digest
from nestling.training.tokenization import byte_tokenizer
from tests.continual.models import assert_same
from tests.continual.study.test_forgetting import untimed
from tests.llamas import random_llama
from tests.test_cli import fails
from tests.test_cli_memory import out

QUICK = ("--rounds", "2", "--lr", "1e-2", "--rank", "3")
TEXTS = {"vera": "Vera Sorborg lives here. She keeps an owl.\n", "emil": "Emil Morby works as a judge.\n"}
TEXTS |= {"ada": "Ada Hale plays the harp.\n", "more": "Greta Sund mends nets.\n"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and two texts; what is preserved is short."""
    random_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studying, "SHAPE", (4, 12))
    return tmp_path


def study(capsys: pytest.CaptureFixture[str], *more: str, memory: str = "memory") -> str:
    return " ".join(out(capsys, "study", "model", *QUICK, *more, "--memory", memory).split())


def test_a_memory_is_studied_and_used(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = study(capsys, "vera.txt", "emil.txt")
    assert "2 documents, 15 exercises made of them; known after each round: 0% -> 0%" in said
    assert re.search(r"[\d,]+ tokens in [\d.]+ s, [\d,.]+ tokens/s", said)
    assert re.search(r"outputs on other text that is changed, summed: [\d.]+", said)
    assert "memory of 0 tokens" not in said and "snapshot 3" in said
    memory = load_memory("memory")
    assert [Path(d.name).name for d in memory.documents] == ["vera.txt", "emil.txt"]
    assert all(d.finished for d in memory.documents)
    study(capsys, "vera.txt", "--rounds", "9", "--lr", "0.05", "--preserve", "0")
    told = [out(capsys, "generate", "model", "--prompt", "Vera", "--max-new-tokens", "5", "--temperature", "0", *more)
            for more in ((), ("--memory", "memory"))]  # fmt: skip
    assert told[0] != told[1]
    listed = out(capsys, "memory", "show", "memory")
    assert "studied vera.txt" in " ".join(listed.split())


def test_it_goes_on_from_a_memory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(capsys, "vera.txt")
    said = study(capsys, "emil.txt")
    memory = load_memory("memory")
    assert len(memory.settings["studies"]) == len(memory.adapters) == 2
    assert "of its 2 passages" in out(capsys, "memory", "show", "memory") and "in 2 adapters" in said
    out(capsys, "memory", "merge", "memory", "memory", "both")
    assert len(load_memory("both").adapters) == 2
    assert "learned already, skipped" in out(capsys, "learn", "model", "vera.txt", "--memory", "memory")


def test_it_is_told_where_a_memory_speaks(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = study(capsys, "vera.txt")
    assert "the memory speaks from where a text names one of its 1 passages by some of" in said
    assert "speaks from where a text names" in out(capsys, "memory", "show", "memory")
    said = fails(capsys, "learn", "model", "emil.txt", "--memory", "memory")
    assert "memory was studied, and speaks only where a text names what it was taught" in said
    said = fails(capsys, "study", "model", "emil.txt", "--memory", "memory", "--everywhere")
    assert "this memory has a scope" in said
    assert "the memory speaks everywhere" in study(capsys, "vera.txt", "--everywhere", memory="other")
    assert "learned" in out(capsys, "learn", "model", "emil.txt", "--memory", "other")


def test_another_rank_than_the_memorys_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(capsys, "vera.txt")
    said = fails(capsys, "study", "model", "emil.txt", "--memory", "memory", "--rank", "4")
    assert "--rank 4: this memory was begun with 3, and goes on with that" in said
    out(capsys, "study", "model", "emil.txt", "--memory", "memory", "--rounds", "1")  # leaves it out


def test_what_was_studied_is_forgotten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(capsys, "vera.txt", "emil.txt", "--keep-texts")
    study(capsys, "emil.txt", memory="never")
    said = " ".join(out(capsys, "memory", "forget", "memory", "vera.txt", "--model", "model").split())
    assert "memory has forgotten vera.txt; studied 1 document again from nothing" in said
    assert_same(untimed(load_memory("memory")), untimed(load_memory("never")))


def test_full_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = study(capsys, "vera.txt", "--rank", "0")
    assert "other text" not in said
    assert all(isinstance(d, torch.Tensor) for d in load_memory("memory").differences.values())


def test_minutes_end_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = study(capsys, "vera.txt", "--minutes", "0")
    assert "in round" not in said and not (place / "memory" / "memory.json").exists()
    said = study(capsys, "vera.txt", "--minutes", "1000")
    assert "known after each round" in said


def test_an_interrupted_study_is_kept(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def step(self: studying.Watch, made: object) -> None:
        self.last = made  # type: ignore[assignment]
        steps.append(made)
        if len(steps) == 2:
            raise studying.Stopped

    with monkeypatch.context() as broken:
        broken.setattr(studying.Watch, "step", step)
        assert main(["study", "model", "vera.txt", "--memory", "memory", *QUICK]) == 130
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err
    assert not load_memory("memory").documents[0].finished
    study(capsys, "vera.txt")
    assert load_memory("memory").documents[-1].finished and len(MemoryStore("memory").index().snapshots) == 1


def test_what_is_wrong_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no file or directory at nowhere" in fails(capsys, "study", "model", "nowhere", "--memory", "memory")
    (place / "empty.txt").write_text(" \n")
    assert "holds no text" in fails(capsys, "study", "model", "empty.txt", "--memory", "memory")
    said = fails(capsys, "study", "model", "vera.txt", "--memory", "memory", "--rank", "40")
    assert "rank=40 is more than" in said
    assert "rounds" in fails(capsys, "study", "model", "vera.txt", "--memory", "memory", "--rounds", "0")
    assert not (place / "memory").exists()


def test_studies_are_slept_over(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no two studies" in fails_after(capsys, "vera.txt", "--keep-texts")
    study(capsys, "emil.txt")
    said = " ".join(out(capsys, "sleep", "model", "--memory", "memory", "--rounds", "2", "--length", "8").split())
    assert re.search(r"2 adapters became one, on \d+ exercises of 2 kept texts and \d of 4 texts of its own", said)
    assert re.search(r"otherwise by [\d.]+ nats a token, with the new one by [\d.]+: \d+% of the difference", said)
    memory = load_memory("memory")
    assert len(memory.adapters) == 1 and MemoryStore(Path("memory")).head().note == "slept: one adapter of 2"
    monkeypatch.setattr(sleeping, "sleep", stopped)
    study(capsys, "ada.txt")
    before = load_memory("memory")
    assert main(["sleep", "model", "--memory", "memory"]) == 130
    assert "memory is as it was" in capsys.readouterr().out
    assert_same(load_memory("memory"), before)
    assert "no memory at nowhere" in fails(capsys, "sleep", "model", "--memory", "nowhere")


def stopped(*_: object) -> None:
    raise Stopped


def fails_after(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What sleep says after one study."""
    study(capsys, *more)
    return fails(capsys, "sleep", "model", "--memory", "memory")


def test_a_document_is_forgotten_through_sleep(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    night = ("--rounds", "2", "--length", "8")
    for memory, texts in (("memory", ("vera.txt", "emil.txt", "ada.txt")), ("never", ("vera.txt", "ada.txt"))):
        for text in texts:
            study(capsys, text, "--keep-texts", memory=memory)
        out(capsys, "sleep", "model", "--memory", memory, *night)
        study(capsys, "more.txt", "--keep-texts", memory=memory)
    said = " ".join(out(capsys, "memory", "forget", "memory", "emil.txt", "--model", "model").split())
    assert "studied 2 documents again from snapshot 3, and slept again" in said
    assert_same(untimed(load_memory("memory")), untimed(load_memory("never")))
    out(capsys, "memory", "forget", "memory", "vera.txt", "ada.txt", "--model", "model")
    study(capsys, "more.txt", memory="alone")
    assert_same(untimed(load_memory("memory")), untimed(load_memory("alone")))


def test_a_study_that_was_stopped_can_be_slept_over_and_that_undone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(capsys, "vera.txt")
    study(capsys, "emil.txt", "--minutes", "0")
    MemoryStore(Path("memory")).save(load_memory("memory"), "begun", autosave=True)
    study(capsys, "emil.txt", "--rounds", "1")
    store = MemoryStore(Path("memory"))
    store.save(load_memory("memory"), "begun", autosave=True)
    before = store.head().number
    out(capsys, "sleep", "model", "--memory", "memory", "--rounds", "1", "--length", "8", "--dreams", "1")
    numbers = [snapshot.number for snapshot in store.index().snapshots]
    assert store.head().parent in numbers and store.head().parent is not None and store.head().parent >= before
    out(capsys, "memory", "rollback", "memory")
    assert len(load_memory("memory").adapters) == 2


def test_texts_of_one_name_are_forgotten_one_by_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    night = ("--rounds", "1", "--length", "8", "--dreams", "1")
    note = place / "note.txt"
    for memory, texts in (
        ("memory", (TEXTS["vera"], TEXTS["ada"], TEXTS["emil"])),
        ("never", (TEXTS["vera"], TEXTS["ada"])),
    ):
        for text in texts:
            note.write_text(text)
            study(capsys, "note.txt", "--keep-texts", memory=memory)
        out(capsys, "sleep", "model", "--memory", memory, *night)
    out(capsys, "memory", "forget", "memory", text_digest(TEXTS["emil"])[:12], "--model", "model")
    assert_same(untimed(load_memory("memory")), untimed(load_memory("never")))


def test_nothing_is_left_to_sleep_over(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(capsys, "vera.txt")
    study(capsys, "ada.txt", "--keep-texts")
    out(capsys, "sleep", "model", "--memory", "memory", "--rounds", "1", "--dreams", "0")
    out(capsys, "memory", "forget", "memory", "ada.txt", "--model", "model")
    study(capsys, "vera.txt", memory="never")
    assert_same(untimed(load_memory("memory")), untimed(load_memory("never")))


def test_in_a_merged_memory_nothing_is_forgotten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(capsys, "vera.txt", memory="one")
    study(capsys, "emil.txt", memory="two")
    out(capsys, "memory", "merge", "one", "two", "both")
    said = " ".join(
        fails(capsys, "memory", "forget", "both", "vera.txt", "--model", "model", "--text", "emil.txt").split()
    )
    assert "began with an exported or merged memory" in said
    assert len(load_memory("both").adapters) == 2


def test_a_damaged_adapter_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(capsys, "vera.txt")
    memory = load_memory("memory")
    memory.settings["adapters"] = 5
    memory.save("damaged")
    for command in (("show", "damaged"), ("export", "damaged", "small", "--rank", "1")):
        assert "adapters are a list" in fails(capsys, "memory", *command)
