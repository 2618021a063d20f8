"""`nestling learn --keep-texts`, `nestling memory forget` and `nestling memory key`."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from nestling.cli import main, memory_tables
from nestling.continual.store.snapshots import Snapshot
from nestling.continual.store.store import MemoryStore, load_memory
from nestling.continual.store.texts import KeptTexts, make_key, read_key, text_digest
from nestling.training.tokenization import byte_tokenizer
from tests.continual.models import assert_same
from tests.continual.study.test_forgetting import untimed
from tests.llamas import random_llama
from tests.test_cli import fails
from tests.test_cli_memory import out

NAMES = ("one", "two", "three")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and three texts."""
    random_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for i, name in enumerate(NAMES):
        (tmp_path / f"{name}.txt").write_text(f"This is the text of {name}, and no other.\n" * (8 + i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def learn(capsys: pytest.CaptureFixture[str], memory: str, *more: str) -> str:
    texts = [word for word in more if not word.startswith("--")]
    flags = [word for word in more if word.startswith("--")]
    options = ["--memory", memory, "--levels", "*.mlp.*=64", "--quick", "--lr", "1e-2", *flags]
    return out(capsys, "learn", "model", *texts, *options)


def forget(capsys: pytest.CaptureFixture[str], memory: str, *more: str) -> str:
    return " ".join(out(capsys, "memory", "forget", memory, *more, "--model", "model").split())


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_text_is_forgotten_as_if_it_had_never_been_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        learn(capsys, "memory", f"{name}.txt", "--keep-texts")
    for name in ("one", "three"):
        learn(capsys, "never", f"{name}.txt")
    kept = KeptTexts(place / "memory")
    assert kept.digests() == {text_digest((place / f"{name}.txt").read_text()) for name in NAMES}
    for name in NAMES:  # only what is kept beside the memory is used
        (place / f"{name}.txt").unlink()
    said = forget(capsys, "memory", "two.txt")
    assert "memory has forgotten two.txt; read 1 document again from snapshot 1, 410 tokens" in said
    assert "deleted snapshots 2, 3, where it had been read, and its text" in said and "snapshot 4" in said
    before, without, now = map(float, re.findall(r"\b\d+\.\d{4}\b", said))
    assert before < now < without  # the other texts are like it
    assert_same(untimed(load_memory("memory")), untimed(load_memory("never")))
    assert len(kept.digests()) == 2 and b"text of two" not in all_bytes(place / "memory")
    learn_again = fails(capsys, "memory", "forget", "memory", "two.txt", "--model", "model")
    assert "memory has read no document two.txt; it has read one.txt, three.txt" in learn_again


def test_what_an_interrupted_one_leaves_is_deleted_by_the_next(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when memory.json is written and before anything is deleted; and what other deaths leave."""
    for name in NAMES[:2]:
        learn(capsys, "memory", f"{name}.txt", "--keep-texts")
    texts = place / "memory" / "texts"
    (texts / f".{'a' * 64}.txt.12345678.tmp").write_text("the text of two, half written")
    (place / "memory" / "snapshot-0001.found").write_text("left")

    swept, sweep = [], MemoryStore._sweep

    def die(self: MemoryStore, known: list[Snapshot]) -> None:
        swept.append(known)
        if len(swept) == 2:  # the first is before anything is written
            raise KeyboardInterrupt
        sweep(self, known)

    with monkeypatch.context() as broken:
        broken.setattr(MemoryStore, "_sweep", die)
        with pytest.raises(KeyboardInterrupt):
            store = MemoryStore(place / "memory")
            store.supersede(store.load(1), "forgot a document", 1, {2})
    assert b"text of two" in all_bytes(place / "memory") and len(list((place / "memory").glob("snapshot-*"))) == 4
    again = fails(capsys, "memory", "forget", "memory", "two.txt", "--model", "model")
    assert "has read no document two.txt" in again
    assert b"text of two" not in all_bytes(place / "memory")
    assert sorted(p.name for p in (place / "memory").glob("snapshot-*")) == [
        "snapshot-0001.safetensors",
        "snapshot-0003.safetensors",
    ]


def test_a_folder_of_texts_of_somebody_else_is_no_memory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine" / "texts").mkdir(parents=True)
    (place / "mine" / "texts" / "letter.txt").write_text("dear")
    said = fails(capsys, "learn", "model", "one.txt", "--memory", "mine")
    assert "a directory without memory.json" in said


def test_prune_and_fork_keep_the_texts_that_were_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES[:2]:
        learn(capsys, "memory", f"{name}.txt", "--keep-texts")
    out(capsys, "memory", "fork", "memory", "early", "--at", "1")
    assert len(KeptTexts(place / "early").digests()) == 1
    out(capsys, "memory", "rollback", "memory")
    out(capsys, "memory", "prune", "memory", "--keep", "1")
    assert KeptTexts(place / "memory").digests() == KeptTexts(place / "early").digests()


def test_losses_are_read_with_the_memorys_context(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may have no more positions than that."""
    for name in NAMES[:2]:
        learn(capsys, "memory", f"{name}.txt", "--keep-texts", "--context=32")
    contexts: list[int] = []

    def measure(model: object, ids: object, context: int = 512, *_: object) -> float:
        contexts.append(context)
        return 1.0

    monkeypatch.setattr(memory_tables, "frozen_loss", measure)
    assert "loss in nats" in forget(capsys, "memory", "two.txt") and contexts == [32] * 3


def test_a_memory_that_keeps_texts_goes_on_to(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn(capsys, "memory", "one.txt", "--keep-texts")
    learn(capsys, "memory", "two.txt")
    assert len(KeptTexts(place / "memory").digests()) == 2
    mode = (place / "memory" / "texts").glob("*")
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in mode)
    out(capsys, "memory", "fork", "memory", "other")
    assert KeptTexts(place / "other").digests() == KeptTexts(place / "memory").digests()
    assert "forgotten one.txt" in forget(capsys, "other", "one.txt")
    assert len(KeptTexts(place / "memory").digests()) == 2


def test_without_the_texts_it_says_what_can_be_done(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        learn(capsys, "memory", f"{name}.txt")
    index = MemoryStore(place / "memory").index()
    said = fails(capsys, "memory", "forget", "memory", "two.txt", "--model", "model")
    assert "three.txt: read after what is to be forgotten" in said and "--text" in said
    assert "nestling memory rollback memory --to 1" in said
    first = fails(capsys, "memory", "forget", "memory", "one.txt", "--model", "model")
    assert "two.txt, three.txt: read after" in first and "begin another memory" in first
    assert MemoryStore(place / "memory").index() == index
    assert "loss in nats" not in forget(capsys, "memory", "two.txt", "--text", "three.txt", "--measure", "0")
    last = forget(capsys, "memory", "three.txt")  # nothing came after it, so nothing is needed
    assert "nothing had come after it" in last and "loss in nats" not in last
    assert [d.name for d in load_memory("memory").documents] == ["one.txt"]


def test_texts_are_encrypted_where_wanted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "key: a new key" in out(capsys, "memory", "key", "key")
    assert stat.S_IMODE((place / "key").stat().st_mode) == 0o600
    assert "already something at key" in fails(capsys, "memory", "key", "key")
    learn(capsys, "memory", "one.txt", "--keep-texts", "--key=key")
    for arguments in (["learn", "model", "two.txt", "--memory", "memory"],):
        assert "keeps its texts encrypted: give --key" in fails(capsys, *arguments)
    learn(capsys, "memory", "two.txt", "--key=key")
    assert KeptTexts(place / "memory").sealed() and b"text of" not in all_bytes(place / "memory" / "texts")
    arguments = ["memory", "forget", "memory", "one.txt", "--model", "model"]
    assert "is encrypted; give its key" in fails(capsys, *arguments)
    make_key(place / "other")
    assert "encrypted with another key" in fails(capsys, *arguments, "--key", "other")
    (place / "none").write_text("no key")
    assert "none holds no key" in fails(capsys, *arguments, "--key", "none")
    assert "no key can be read" in fails(capsys, *arguments, "--key", "nowhere")
    assert "forgotten one.txt" in forget(capsys, "memory", "one.txt", "--key", "key")
    learn(capsys, "never", "two.txt")
    assert_same(untimed(load_memory("memory")), untimed(load_memory("never")))
    assert "give --keep-texts as well" in fails(
        capsys, "learn", "model", "one.txt", "--memory", "never", "--key", "key"
    )


def test_bad_input_is_told_and_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn(capsys, "memory", "one.txt", "--keep-texts")
    learn(capsys, "memory", "two.txt")
    index = MemoryStore(place / "memory").index()
    model = ["--model", "model"]
    assert "no memory at nowhere" in fails(capsys, "memory", "forget", "nowhere", "one.txt", *model)
    assert not (place / "nowhere").exists()
    assert "has read no document x" in fails(capsys, "memory", "forget", "memory", "x", *model)
    random_llama(seed=5).save_pretrained(place / "other")
    byte_tokenizer().save_pretrained(place / "other")
    assert "another model" in fails(capsys, "memory", "forget", "memory", "one.txt", "--model", "other")
    text = KeptTexts(place / "memory").folder / f"{text_digest((place / 'two.txt').read_text())}.txt"
    text.write_text("something else")
    assert "is not the text that was kept there" in fails(capsys, "memory", "forget", "memory", "one.txt", *model)
    assert MemoryStore(place / "memory").index() == index
    text.unlink()
    text.symlink_to(place / "two.txt")
    assert "does not hold the text" in fails(capsys, "memory", "forget", "memory", "one.txt", *model)


def test_keys_and_kept_texts(tmp_path: Path) -> None:
    """Halves of characters are kept; a text is written once; plain beside encrypted is refused."""
    odd = "half \udce9 of a character"
    make_key(tmp_path / "key")
    key = read_key(tmp_path / "key")
    for kept in (KeptTexts(tmp_path / "plain"), KeptTexts(tmp_path / "sealed", key)):
        kept.keep(odd)
        kept.keep(odd)
        assert kept.digests() == {text_digest(odd)} and kept.read(text_digest(odd)) == odd
        kept.remove(text_digest(odd))
        kept.remove(text_digest(odd))
        assert not kept.digests() and kept.exists()
    KeptTexts(tmp_path / "sealed", key).keep("a")
    with pytest.raises(ValueError, match="this one would not be; give their key"):
        KeptTexts(tmp_path / "sealed").keep("b")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "texts").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="not a link or a file"):
        KeptTexts(tmp_path / "linked")


def test_help_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "forget" in shown and "key" in shown
