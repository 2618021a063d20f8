"""Snapshots: what is saved is there, whatever moment a process dies at, and nothing is lost until it is pruned."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling.continual.store import store as store_module
from nestling.continual.store.memory import Memory, MemoryFileError
from nestling.continual.store.memory_file import read_fields
from nestling.continual.store.store import MemoryStore, fork, load_memory
from nestling.memory import checked_file
from tests.continual.models import assert_same, make_memory
from tests.llamas import random_llama


@pytest.fixture(scope="module")
def memories() -> list[Memory]:
    """Four of one model."""
    model = random_llama()
    return [make_memory(model, seed) for seed in range(4)]


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    """An empty one."""
    return MemoryStore(tmp_path / "memory")


def files(store: MemoryStore) -> list[str]:
    """All but the lock."""
    return sorted(p.name for p in store.path.iterdir() if p.name != ".lock")


def test_save_load_roll_back_and_branch(store: MemoryStore, memories: list[Memory]) -> None:
    assert not store.exists()
    for number, memory in enumerate(memories[:3], 1):
        snapshot = store.save(memory, f"note {number}")
        assert (snapshot.number, snapshot.parent) == (number, number - 1 or None)
        assert snapshot.bytes == (store.path / f"snapshot-000{number}.safetensors").stat().st_size
        assert (snapshot.tokens, snapshot.documents, snapshot.note) == (127, 2, f"note {number}")
    assert_same(store.load(), memories[2])
    assert_same(load_memory(store.path, 1), memories[0])
    assert store.rollback().number == 2
    assert_same(store.load(), memories[1])
    assert store.rollback(1).number == 1
    with pytest.raises(MemoryFileError, match="is the first"):
        store.rollback()
    with pytest.raises(MemoryFileError, match="has no snapshot 9; it has 1, 2, 3"):
        store.rollback(9)
    assert store.save(memories[3]).parent == 1
    assert [s.number for s in store.index().line()] == [4, 1]
    assert len(files(store)) == 5
    assert_same(store.load(3), memories[2])
    assert [s.number for s in store.prune(1)] == [1, 2, 3]
    assert files(store) == ["memory.json", "snapshot-0004.safetensors"]
    assert_same(store.load(), memories[3])
    assert store.head().parent is None
    with pytest.raises(MemoryFileError, match="--keep 0"):
        store.prune(0)


def test_a_rollback_to_a_damaged_snapshot_is_refused(store: MemoryStore, memories: list[Memory]) -> None:
    store.save(memories[0])
    store.save(memories[1])
    (store.path / "snapshot-0001.safetensors").write_bytes(b"nothing")
    with pytest.raises(MemoryFileError):
        store.rollback()
    assert store.head().number == 2


def test_an_autosave_is_replaced(store: MemoryStore, memories: list[Memory]) -> None:
    store.save(memories[0])
    for memory in memories[1:3]:
        store.save(memory, autosave=True)
        assert_same(store.load(), memory)
        assert len(files(store)) == 3
    snapshot = store.save(memories[3])
    assert snapshot.parent == 1 and len(files(store)) == 3
    store.save(memories[0])
    assert len(files(store)) == 4


@pytest.mark.parametrize("autosave", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", range(6))
def test_whatever_step_of_a_save_fails_the_head_is_whole(
    store: MemoryStore,
    memories: list[Memory],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    error: BaseException,
    autosave: bool,
) -> None:
    """Each flush and rename of both writes fails in turn; then the process goes on, or another one does."""
    store.save(memories[0], autosave=autosave)
    calls = 0

    def failing(real: Any) -> Any:
        def run(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 == call:
                raise error
            return real(*args, **more)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(checked_file.os, "fsync", failing(os.fsync))
        patch.setattr(checked_file.os, "replace", failing(os.replace))
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else MemoryFileError):
            store.save(memories[1])
    assert calls == call + 1
    later = MemoryStore(store.path)
    # The last flush comes after the rename: the new head is there already.
    assert_same(later.load(), memories[1] if call == 5 else memories[0])
    later.save(memories[2])
    assert_same(later.load(), memories[2])
    assert not [name for name in files(later) if name.endswith(".tmp")]
    assert len([name for name in files(later) if name.startswith("snapshot")]) == len(later.index().snapshots)


def test_a_crash_before_the_first_index_leaves_a_place_to_begin(store: MemoryStore, memories: list[Memory]) -> None:
    store.save(memories[0])
    (store.path / "memory.json").unlink()
    (store.path / ".snapshot-0002.safetensors.abc.tmp").write_bytes(b"half")
    again = MemoryStore(store.path)
    with pytest.raises(MemoryFileError, match="no memory at"):
        again.load()
    again.save(memories[1])
    # What may be all that is left of a memory is kept under another name.
    assert files(again) == ["memory.json", "snapshot-0001.found", "snapshot-0001.safetensors"]
    assert_same(again.load(), memories[1])
    assert_same(Memory(**read_fields(again.path / "snapshot-0001.found")[0]), memories[0])


def test_a_memory_that_lost_its_index_is_not_overwritten(store: MemoryStore, memories: list[Memory]) -> None:
    for memory in memories[:2]:
        store.save(memory)
    before = sorted(p.name for p in store.path.glob("snapshot-*"))
    (store.path / "memory.json").unlink()
    with pytest.raises(MemoryFileError, match="lost it"):
        MemoryStore(store.path).save(memories[0])
    assert sorted(p.name for p in store.path.glob("snapshot-*")) == before


def test_a_mistyped_name_makes_no_directory(tmp_path: Path) -> None:
    for change in (lambda store: store.rollback(), lambda store: store.prune(1)):
        with pytest.raises(MemoryFileError, match="no memory at"):
            change(MemoryStore(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_only_its_own_snapshots_are_swept(store: MemoryStore, memories: list[Memory]) -> None:
    store.save(memories[0])
    copy = store.path / "snapshot-0001-good.safetensors"
    copy.write_bytes(b"a user's")
    store.save(memories[1], note="of caf\udce9.txt")
    assert copy.exists()
    assert MemoryStore(store.path).head().note == "of caf\udce9.txt"


class Writer:
    """Stands in for `read_fields` and saves before every read, `times` times: what another process may do."""

    def __init__(self, store: MemoryStore, memories: list[Memory], times: int, autosave: bool) -> None:
        self.store, self.memories, self.left, self.autosave = store, memories, times, autosave

    def __call__(self, file: Path) -> tuple[dict[str, Any], str]:
        if self.left:
            self.left -= 1
            self.store.save(self.memories[self.left], autosave=self.autosave)
        return read_fields(file)


@pytest.mark.parametrize("times", [1, 3])
def test_a_reader_finds_the_new_head_where_an_autosave_replaces_the_old(
    store: MemoryStore, memories: list[Memory], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: int
) -> None:
    store.save(memories[3], autosave=True)
    monkeypatch.setattr(store_module, "read_fields", Writer(store, memories, times, True))
    assert_same(MemoryStore(store.path).load(), memories[0])
    monkeypatch.setattr(store_module, "read_fields", Writer(store, memories, times, True))
    assert_same(fork(store.path, tmp_path / "fork").load(), memories[0])


def test_a_fork_is_of_the_head_that_was_read(
    store: MemoryStore, memories: list[Memory], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another process saves in between: file, checksum and records are of one snapshot."""
    store.save(memories[3])
    monkeypatch.setattr(store_module, "read_fields", Writer(store, memories, 1, False))
    forked = fork(store.path, tmp_path / "fork")
    assert_same(forked.load(), memories[3])
    assert forked.head().sha256 == store.index().snapshots[0].sha256


def test_a_snapshot_that_is_missing_for_good_is_an_error(store: MemoryStore, memories: list[Memory]) -> None:
    store.save(memories[0])
    (store.path / "snapshot-0001.safetensors").unlink()
    with pytest.raises(MemoryFileError, match=r"snapshot-0001.safetensors is gone, and memory\.json names it"):
        store.load()


def test_a_fork_of_a_linked_file_has_a_file_of_its_own(memories: list[Memory], tmp_path: Path) -> None:
    memories[0].save(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert_same(fork(tmp_path / "link", tmp_path / "fork").load(), memories[0])


HOLD = """
import sys
from nestling.continual.store.store import MemoryStore
with MemoryStore(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_directory_made_for_nothing_is_removed(tmp_path: Path, memories: list[Memory]) -> None:
    """With the directories above it that were made too; what was there, or holds anything, stays."""
    (tmp_path / "there").mkdir()
    for place in ("new", "a/b/new", "there", "there/new"):
        with pytest.raises(ZeroDivisionError), MemoryStore(tmp_path / place).lock():
            raise ZeroDivisionError
    broken = replace(memories[1], differences={"a": torch.tensor([torch.inf])})
    with pytest.raises(MemoryFileError):
        MemoryStore(tmp_path / "new").save(broken)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".lock", "there"]
    store = MemoryStore(tmp_path / "new")
    with pytest.raises(MemoryFileError), store.lock():
        store.save(memories[0])
        store.save(broken)
    assert_same(store.load(), memories[0])


def test_who_waits_for_a_directory_that_is_removed_makes_it_again(store: MemoryStore, memories: list[Memory]) -> None:
    other = MemoryStore(store.path)
    failures: list[BaseException] = []

    def save() -> None:
        try:
            other.save(memories[0])
        except BaseException as error:
            failures.append(error)

    waiting = threading.Thread(target=save)
    with store.lock():
        waiting.start()
        time.sleep(0.2)
    waiting.join()
    assert not failures
    assert_same(store.load(), memories[0])


def test_two_writers_do_not_interleave(store: MemoryStore, memories: list[Memory]) -> None:
    store.save(memories[0])
    command = [sys.executable, "-c", HOLD, str(store.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(MemoryFileError, match="being written by another process"), store.lock(patience=0.05):
            pass
        assert_same(store.load(), memories[0])  # reading needs no lock
        other.kill()
        other.wait()
    with store.lock():  # the system frees the lock of a killed process
        store.save(memories[1])  # and its holder may take it again


def test_forks_go_on_apart(
    store: MemoryStore, memories: list[Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(memories[0])
    store.save(memories[1])
    linked = fork(store.path, tmp_path / "b")
    assert_same(linked.load(), memories[1])
    linked.save(memories[2])
    linked.prune(1)
    assert_same(store.load(), memories[1])
    assert_same(fork(store.path, tmp_path / "c", 1).load(), memories[0])
    memories[3].save(tmp_path / "file")
    assert_same(load_memory(tmp_path / "file"), memories[3])

    def no_links(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(store_module.os, "link", no_links)
    assert_same(fork(tmp_path / "file", tmp_path / "d").load(), memories[3])
    with pytest.raises(MemoryFileError, match="already something at"):
        fork(store.path, tmp_path / "b")
    with pytest.raises(MemoryFileError, match="has no snapshot 3"):
        load_memory(tmp_path / "d", 3)
    with pytest.raises(MemoryFileError, match="single file and has no snapshot"):
        load_memory(tmp_path / "file", 1)


def test_places_that_are_no_memory(tmp_path: Path, memories: list[Memory]) -> None:
    memories[0].save(tmp_path / "file")
    with pytest.raises(MemoryFileError, match="single memory file"):
        MemoryStore(tmp_path / "file")
    (tmp_path / "text").write_text("Once upon a time.")
    with pytest.raises(MemoryFileError, match="a file and no memory"):
        MemoryStore(tmp_path / "text")
    with pytest.raises(MemoryFileError, match=r"a directory without memory\.json"):
        MemoryStore(tmp_path)
    with pytest.raises(MemoryFileError, match="no memory file at"):
        load_memory(tmp_path / "nowhere")
    (tmp_path / "file2").write_text("x")
    with pytest.raises(MemoryFileError, match="cannot be written"):
        MemoryStore(tmp_path / "file2" / "inside").save(memories[0])


def test_a_memory_that_cannot_be_written_leaves_the_head(store: MemoryStore, memories: list[Memory]) -> None:
    store.save(memories[0])
    broken = replace(memories[1], differences={"a": torch.tensor([torch.inf])})
    with pytest.raises(MemoryFileError, match="holds NaN or infinity"):
        store.save(broken)
    assert json.loads((store.path / "memory.json").read_text())["head"] == 1
    assert_same(store.load(), memories[0])
