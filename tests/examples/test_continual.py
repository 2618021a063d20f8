"""The examples of continual learning, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from examples import learn_a_book, one_memory_per_user
from nestling.continual.store.store import load_memory
from nestling.models.pretrained import load_pretrained
from nestling.training.tokenization import byte_tokenizer
from tests.continual.models import assert_same
from tests.llamas import random_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny Llama that reads bytes."""
    path = tmp_path_factory.mktemp("model")
    random_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def test_learn_a_book(model: str, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("The tide was out, and the boats lay on the sand.\n" * 60)
    losses = learn_a_book.main(model, str(book), str(tmp_path / "memory"), lr=3e-3, context=128, piece=700)
    assert losses["after"] < losses["while"] < losses["before"] - 0.1
    assert losses["again"] == pytest.approx(losses["after"], abs=1e-5)
    memory = load_memory(tmp_path / "memory")
    assert list(memory.periods.items()) == [("fast", 256), ("slow", 1024)]
    assert [(d.name, d.finished) for d in memory.documents] == [(str(book), True)]


def test_two_users_two_memories_no_leak(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ann's memory is bit for bit that of a server Ben never came to, though they took turns on one model."""
    seen: list[PreTrainedModel] = []

    def remembered(source: str) -> object:
        found = load_pretrained(source)
        seen.append(found[0])
        return found

    monkeypatch.setattr(one_memory_per_user, "load_pretrained", remembered)
    both = one_memory_per_user.main(model, str(tmp_path / "both"), lr=3e-3)
    for user, text in one_memory_per_user.SAYS.items():
        alone = one_memory_per_user.main(model, str(tmp_path / f"only {user}"), lr=3e-3, says={user: text})
        together, apart = (load_memory(tmp_path / place / user) for place in ("both", f"only {user}"))
        for memory in (together, apart):
            memory.documents = []  # they say when it was
        assert_same(together, apart)
        assert alone[user, user] == both[user, user]
    assert both["ann", "ann"] < both["ben", "ann"] - 0.1 and both["ben", "ben"] < both["ann", "ben"] - 0.1
    fresh = dict(load_pretrained(model)[0].named_parameters())
    assert all(torch.equal(p, fresh[name]) for used in seen for name, p in used.named_parameters())
