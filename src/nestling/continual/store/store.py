"""A memory on disk that grows: a directory of snapshots, of which one is the head.

    PATH/memory.json                 names the head, and every snapshot's parent, time, note and size
    PATH/snapshot-0001.safetensors   one file of `memory_file` each, never changed once written

A save writes the snapshot, flushes it, and then replaces memory.json in one step, so whatever moment a process dies at,
the head is a whole memory. Going back moves the head; nothing is lost until `prune`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from nestling.continual.store.memory import Memory
from nestling.continual.store.memory_file import MemoryFileError, is_memory_file, read_fields, write_fields
from nestling.continual.store.snapshots import INDEX, NAME, Index, Snapshot, read_index, snapshot_name, write_index
from nestling.continual.store.texts import FOLDER, KeptTexts

LOCK = ".lock"
PATIENCE = 10.0  # seconds; reading and writing an index takes milliseconds, so a longer wait is for a learner
TRIES = 8  # of a reader, while a writer replaces what it wants to read


class MemoryStore:
    """A directory of snapshots of one memory.

    Readers need no lock: snapshots never change and memory.json is replaced in one step. A reader whose snapshot is
    replaced between the two reads memory.json again. Writers hold `lock`.

    Attributes:
        path: the directory.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from nestling.continual import Learner, Level, MemoryStore
        >>> shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape))
        >>> learner = Learner(model, {"all": Level(8, ("*.mlp.*",))}, lr=0.01, context=16)
        >>> store = MemoryStore("book")
        >>> for chapter in torch.arange(48).split(24):
        ...     seen = learner.observe(chapter)
        ...     with store.lock():
        ...         saved = store.save(learner.memory())
        >>> store.index().head
        2
    """

    def __init__(self, path: str | Path) -> None:
        """Name a store; nothing is read or made until it is used.

        Raises:
            MemoryFileError: `path` is a file, or a directory of something else.
        """
        self.path = Path(path)
        if self.path.is_file() and not is_memory_file(self.path):
            raise MemoryFileError(f"{path} is a file and no memory; a memory is a directory, so give another path")
        if self.path.is_file():
            raise MemoryFileError(
                f"{path} is a single memory file, which is only read; to go on from it, make a directory of it with: "
                f"nestling memory fork {path} DIR"
            )
        if self.path.is_dir() and not self.exists() and self._holds_something_else():
            raise MemoryFileError(
                f"{path} is a directory without {INDEX}, so not a memory, or one that lost it; give another path, or "
                f"restore {INDEX}"
            )
        self._lock = FileLock(self.path / LOCK)

    def exists(self) -> bool:
        """Whether anything has been saved."""
        return (self.path / INDEX).exists()

    def index(self) -> Index:
        """The head and all snapshots.

        Raises:
            MemoryFileError: nothing saved here, or a damaged or hostile memory.json.
        """
        return read_index(self.path)

    def head(self) -> Snapshot:
        """The snapshot that learning goes on from.

        Raises:
            MemoryFileError: nothing saved here.
        """
        return self._chosen(None)

    def load(self, number: int | None = None) -> Memory:
        """The memory of a snapshot; the head's where no number is given.

        Raises:
            MemoryFileError: no such snapshot, or a file that is not what memory.json says.
        """
        return self.read(number)[1]

    def read(self, number: int | None = None) -> tuple[Snapshot, Memory]:
        """A snapshot, the head where no number is given, and the memory in it, which belong together.

        Raises:
            MemoryFileError: as `load`.
        """
        snapshot = self._chosen(number)
        for _ in range(TRIES - 1):
            try:
                return snapshot, self._content(snapshot)
            except MemoryFileError:
                # Only a writer that has replaced the snapshot meanwhile is a reason to try again.
                before, snapshot = snapshot, self._chosen(number)
                if snapshot == before:
                    raise
        return snapshot, self._content(snapshot)

    @contextmanager
    def lock(self, patience: float = PATIENCE) -> Iterator[None]:
        """Keep other writers out; a process that holds it may take it again. The system frees it when a process dies.

        A directory that is made for the lock goes again with it when nothing was saved.

        Raises:
            MemoryFileError: another process has it for longer than `patience` seconds, or no directory can be made.
        """
        try:
            made = self._acquire(patience)
        except Timeout as error:
            raise MemoryFileError(
                f"{self.path} is being written by another process; wait for it, or fork the memory"
            ) from error
        except OSError as error:
            raise MemoryFileError(f"{self.path} cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            if made:
                self._remove_unused(made)
            self._lock.release()

    def save(self, memory: Memory, note: str = "", *, autosave: bool = False) -> Snapshot:
        """Write a snapshot and make it the head.

        Args:
            memory: what to save.
            note: one line for people.
            autosave: the next save takes the place of this one, so that saving often does not fill the disk.

        Raises:
            MemoryFileError: another writer, a full disk, or values that no file can hold; the head is as before.
        """
        return self._add(lambda file: write_fields(file, vars(memory)), memory, note, autosave)

    def adopt(self, file: Path, digest: str, memory: Memory, note: str) -> Snapshot:
        """Take over a file with this checksum, `memory` being what is in it; linked, not copied, where possible."""

        def link(target: Path) -> str:
            target.unlink(missing_ok=True)
            try:
                os.link(file.resolve(), target)  # of a symbolic link's file, not of the symbolic link
                if read_fields(target)[1] == digest:
                    return digest
            except (OSError, MemoryFileError):
                pass  # no links can be made here, or another process has replaced the file since it was read
            return write_fields(target, vars(memory))

        return self._add(link, memory, note, False)

    def supersede(self, memory: Memory, note: str, parent: int | None, gone: Collection[int]) -> Snapshot:
        """Write a snapshot that goes on from `parent` (None: from nothing), make it the head, and delete others.

        Raises:
            MemoryFileError: as `save`; nothing is deleted then.
        """

        def after(index: Index) -> tuple[int | None, list[Snapshot]]:
            kept = [s for s in index.snapshots if s.number not in gone]
            numbers = {s.number for s in kept}
            return parent, [s if s.parent in numbers else replace(s, parent=None) for s in kept]

        return self._add(lambda file: write_fields(file, vars(memory)), memory, note, False, after)

    def rollback(self, to: int | None = None) -> Snapshot:
        """Make an earlier (or later) snapshot the head; None goes to the head's parent. Deletes nothing.

        Raises:
            MemoryFileError: no such snapshot, or the head is the first.
        """
        self.index()  # before the lock, which would make the directory of a mistyped name
        with self.lock():
            index = self.index()
            number = index.snapshot(index.head, self.path).parent if to is None else to
            if number is None:
                raise MemoryFileError(f"snapshot {index.head} of {self.path} is the first; there is none before it")
            snapshot = index.snapshot(number, self.path)
            self.load(number)
            write_index(self.path, replace(index, head=number))
        return snapshot

    def tidy(self) -> None:
        """Delete what no snapshot needs: files that memory.json does not name, and kept texts that none has read.

        Raises:
            MemoryFileError: another writer, or a snapshot that cannot be read; no text is deleted then.
        """
        self.index()
        with self.lock():
            index = self.index()
            self._sweep(index.snapshots)
            for found in self.path.glob("snapshot-*.found"):
                found.unlink(missing_ok=True)
            kept = KeptTexts(self.path)
            if kept.exists():
                kept.keep_only({r.digest for s in index.snapshots for r in self.load(s.number).documents})

    def prune(self, keep: int) -> list[Snapshot]:
        """Delete all but the head and the `keep - 1` snapshots before it; returns what was deleted.

        Raises:
            MemoryFileError: fewer than one to keep, or another writer.
        """
        if keep < 1:
            raise MemoryFileError(f"--keep {keep}: the head is always kept, so give 1 or more")
        self.index()
        with self.lock():
            index = self.index()
            kept = {s.number for s in index.line()[:keep]}
            gone = [s for s in index.snapshots if s.number not in kept]
            left = [s for s in index.snapshots if s.number in kept]
            left = [s if s.parent in kept else replace(s, parent=None) for s in left]
            write_index(self.path, Index(index.head, left))
            self.tidy()
        return gone

    def _add(
        self,
        write: Callable[[Path], str],
        memory: Memory,
        note: str,
        autosave: bool,
        place: Callable[[Index], tuple[int | None, list[Snapshot]]] | None = None,
    ) -> Snapshot:
        """Write a snapshot and make it the head; `place` gives its parent and the others that stay."""
        with self.lock():
            index = self.index() if self.exists() else Index(0, [])
            if not self.exists() and (first := self.path / snapshot_name(1)).exists():
                first.replace(first.with_suffix(".found"))  # of a process that died, or all that is left of a memory
            self._sweep(index.snapshots)
            parent, kept = (place or self._after_head)(index)
            number = max((s.number for s in index.snapshots), default=0) + 1
            file = self.path / snapshot_name(number)
            digest = write(file)
            snapshot = Snapshot(
                number=number,
                parent=parent,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                note=note,
                documents=len(memory.documents),
                tokens=memory.tokens,
                bytes=file.stat().st_size,
                sha256=digest,
                autosave=autosave,
            )
            write_index(self.path, Index(number, [*kept, snapshot]))
            self._sweep([*kept, snapshot])
        return snapshot

    def _after_head(self, index: Index) -> tuple[int | None, list[Snapshot]]:
        """The head as parent, and all snapshots; an autosave's parent, and all but the autosave."""
        parent, kept = index.head or None, list(index.snapshots)
        if parent is not None and index.snapshot(parent, self.path).autosave:
            replaced = index.snapshot(parent, self.path)
            kept = [s for s in kept if s.number != parent]
            kept = [replace(s, parent=replaced.parent) if s.parent == parent else s for s in kept]
            parent = replaced.parent
        return parent, kept

    def _sweep(self, known: list[Snapshot]) -> None:
        """Delete the snapshots that memory.json does not name: pruned, replaced, or left by a killed process."""
        names = {snapshot_name(s.number) for s in known}
        for file in self.path.glob("snapshot-*.safetensors"):
            if NAME.fullmatch(file.name) and file.name not in names:
                file.unlink(missing_ok=True)
        for scratch in (*self.path.glob(".snapshot-*.tmp"), *self.path.glob(f".{INDEX}.*.tmp")):
            scratch.unlink(missing_ok=True)

    def _acquire(self, patience: float) -> list[Path]:
        """Take the lock; returns the directories that were made for it, innermost first."""
        for attempt in range(TRIES):
            made = [place for place in (self.path, *self.path.parents) if not place.exists()]
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=patience)
                break
            except FileNotFoundError:  # its last holder had made the directory for nothing, and removed it
                if attempt == TRIES - 1:
                    raise
            except BaseException:
                _remove_empty(made)
                raise
        return made

    def _remove_unused(self, made: list[Path]) -> None:
        """Remove directories that were made, innermost first, where they hold nothing but the lock."""
        try:
            if any(p.name != LOCK for p in self.path.iterdir()):
                return
            (self.path / LOCK).unlink(missing_ok=True)  # still held: who waits for it finds that it is gone
        except OSError:
            return  # gone already, or a system that deletes no open file
        _remove_empty(made)

    def _chosen(self, number: int | None) -> Snapshot:
        index = self.index()
        return index.snapshot(index.head if number is None else number, self.path)

    def _content(self, snapshot: Snapshot) -> Memory:
        fields, digest = read_fields(self._file(snapshot))
        if digest != snapshot.sha256:
            raise MemoryFileError(f"{self._file(snapshot)} is not the file that {INDEX} names; restore it from a copy")
        return Memory(**fields)

    def _file(self, snapshot: Snapshot) -> Path:
        file = self.path / snapshot_name(snapshot.number)
        if file.is_symlink():
            raise MemoryFileError(f"{file} is a symbolic link; a snapshot must be a file of its own")
        if not file.exists():
            raise MemoryFileError(
                f"{file} is gone, and {INDEX} names it; restore it from a copy, or go to another snapshot with "
                "nestling memory rollback --to N"
            )
        return file

    def _holds_something_else(self) -> bool:
        """Not only what a process leaves that died before its first memory.json: texts, and a snapshot at most."""
        names = (p.name for p in self.path.iterdir())
        if not KeptTexts(self.path).is_own():
            return True
        return any(n not in (LOCK, FOLDER, snapshot_name(1)) and not n.endswith((".tmp", ".found")) for n in names)


def load_memory(path: str | Path, number: int | None = None) -> Memory:
    """The memory at a path: the head (or another snapshot) of a directory, or a single file.

    Raises:
        MemoryFileError: nothing there, damaged, or a snapshot number with a single file.
    """
    return _found(Path(path), number)[2]


def fork(source: str | Path, target: str | Path, number: int | None = None) -> MemoryStore:
    """Begin a new memory with what another holds; the two then go on apart.

    Raises:
        MemoryFileError: no memory at `source`, or something at `target` already.
    """
    file, digest, memory = _found(Path(source), number)
    place = Path(target)
    if place.exists():
        raise MemoryFileError(f"there is already something at {target}; give a new path")
    store = MemoryStore(place)
    with store.lock():
        if store.exists():  # another process was faster
            raise MemoryFileError(f"there is already something at {target}; give a new path")
        try:
            store.adopt(file, digest, memory, f"fork of {source}" + ("" if number is None else f", snapshot {number}"))
            if Path(source).is_dir():
                KeptTexts(Path(source)).copy_to(place, {record.digest for record in memory.documents})
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    return store


def _remove_empty(places: Sequence[Path]) -> None:
    """Remove directories, innermost first, as far as they are empty."""
    with suppress(OSError):
        for place in places:
            place.rmdir()


def _found(path: Path, number: int | None) -> tuple[Path, str, Memory]:
    """The file, its checksum and the memory in it."""
    if path.is_dir():
        snapshot, memory = MemoryStore(path).read(number)
        return path / snapshot_name(snapshot.number), snapshot.sha256, memory
    if number is not None:
        raise MemoryFileError(f"{path} is a single file and has no snapshot {number}")
    fields, digest = read_fields(path)
    return path, digest, Memory(**fields)
