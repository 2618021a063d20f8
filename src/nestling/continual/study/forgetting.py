"""Forgetting a document exactly: the memory that results is, bit for bit, the one that never read it.

Nothing is subtracted. The last snapshot from before the document is taken up again, and what was read after it is read
again without it, in the same order. Replay buffers, running means, optimizer states and the spike guard come out as if
the document had never been there, since they are made anew. On the same machine, with the same threads and software,
that is the same to the last bit; on another one to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.continual.learn_documents import Progress, Text, learn_text
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import settings_from
from nestling.continual.store.fingerprint import base_fingerprint
from nestling.continual.store.memory import Memory
from nestling.continual.store.records import DocumentRecord
from nestling.continual.store.resume import check_model, studies_of
from nestling.continual.store.snapshots import Snapshot
from nestling.continual.store.store import MemoryStore
from nestling.continual.study.settings import Study
from nestling.continual.study.sleeping import SLEEP, Sleep, sleep
from nestling.continual.study.studying import Events, Step
from nestling.errors import UserError

SHORTEST_DIGEST = 8


@dataclass(frozen=True)
class Part:
    """Tokens of a document that are read again.

    Attributes:
        document: its record in the memory that knew the other one.
        start, stop: from this token of its text to the one before that.
    """

    document: DocumentRecord
    start: int
    stop: int


@dataclass(frozen=True)
class Studying:
    """What studies are done again with.

    Attributes:
        tokenizer: of the model.
        text: of a digest.
    """

    tokenizer: PreTrainedTokenizerBase
    text: Callable[[str], str]


@dataclass(frozen=True)
class Session:
    """A study, or a sleep, that is done again without some of its texts.

    Attributes:
        names: of its other texts, by digest, in order.
        settings: how it was done.
        most: steps at most, where it was ended early; None is to its own end.
    """

    names: dict[str, str]
    settings: Study | Sleep
    most: int | None


@dataclass(frozen=True)
class Forgetting:
    """What forgetting some documents takes.

    Attributes:
        memory: the head, which has read them.
        documents: records of what is forgotten.
        begin: the snapshot it starts from, which has read none of them; None is a fresh beginning.
        again: what is read and studied again, in order.
        gone: numbers of the snapshots that have read one of them, and are deleted.
    """

    memory: Memory
    documents: tuple[DocumentRecord, ...]
    begin: Snapshot | None
    again: tuple[Part | Session, ...]
    gone: tuple[int, ...]

    @property
    def digests(self) -> set[str]:
        """Of what is forgotten."""
        return {record.digest for record in self.documents}

    @property
    def records(self) -> list[DocumentRecord]:
        """Of what stays. Where a document was left for one that is forgotten, and gone on with after it, it is one."""
        found: list[DocumentRecord] = []
        studied = _studied(studies_of(self.memory.settings))
        left: DocumentRecord | None = None
        for i, record in enumerate(self.memory.documents):
            if record.digest in self.digests:
                continue
            if i in studied or left is None or (left.name, left.digest) != (record.name, record.digest):
                found.append(record)
            left = None if record.finished or i in studied else record
        return found

    @property
    def parts(self) -> list[Part]:
        """What is read again."""
        return [each for each in self.again if isinstance(each, Part)]

    @property
    def needs(self) -> dict[str, str]:
        """Names of the texts that are read or studied again, by digest."""
        found: dict[str, str] = {}
        for each in self.again:
            found |= {each.document.digest: each.document.name} if isinstance(each, Part) else each.names
        return found

    @property
    def tokens(self) -> int:
        """That are read again."""
        return sum(part.stop - part.start for part in self.parts)


def plan_forgetting(store: MemoryStore, wanted: Sequence[str]) -> Forgetting:
    """What it takes to forget documents of the head.

    Args:
        store: the memory.
        wanted: names of documents, in full or without their folders, or the first 8 or more digits of their digests. A
            text that was read under several names is forgotten under all.

    Raises:
        UserError: a document that the memory has not read; one that several texts are meant by; or a memory in which
            more happened than that documents were read: merged, consolidated, or taught tokens of no document.
    """
    head, memory = store.read()
    index = store.index()
    others = {s.number: store.load(s.number).documents for s in index.snapshots if s.number != head.number}
    known = others | {head.number: memory.documents}
    everything = [*memory.documents, *(record for records in others.values() for record in records)]
    digests = {_digest(everything, name, store.path) for name in wanted}
    if "learner" not in memory.settings:
        raise UserError(
            f"{store.path} does not say how it was learned (a merged or exported memory does not), so nothing in it "
            "can be forgotten exactly; forget in the memories that it was made of"
        )
    gone = tuple(number for number, records in known.items() if any(r.digest in digests for r in records))
    begin = next((s for s in index.headed_by(head).line() if s.number not in gone), None)
    before = Memory("", {}, {}, {}) if begin is None else store.load(begin.number)
    counts = [memory.settings.get("counters", {}).get(name, -1) for name in ("consolidations", "adopted")]
    if -1 in counts and begin != head:
        raise UserError(
            f"{store.path} was begun with version 0.2, which does not say whether a memory was consolidated or merged, "
            "so nothing in it can be forgotten exactly; " + _rollback(store.path, begin)
        )
    if begin is None and _count(memory, "adopted"):
        raise UserError(
            f"{store.path} began with an exported or merged memory that had read that, and how is not known here; "
            "forget in the memories that it was made of"
        )
    if _count(before, "consolidations") != _count(memory, "consolidations"):
        raise UserError(
            f"{store.path} was consolidated after it had read that, which cannot be done again in the same way; "
            + _rollback(store.path, begin)
        )
    records = tuple(dict.fromkeys(record for record in everything if record.digest in digests))
    return Forgetting(memory, records, begin, _again(memory, before, digests, store.path), gone)


def learn_again(
    model: PreTrainedModel,
    store: MemoryStore,
    plan: Forgetting,
    texts: Callable[[DocumentRecord], Text],
    on_step: Callable[[Progress], None] = lambda _: None,
    studied: Studying | None = None,
) -> Learner:
    """The learner that never read what is forgotten; nothing is written.

    Args:
        model: with its base weights.
        store: the memory.
        plan: of `plan_forgetting`.
        texts: the text of a record, as tokens.
        on_step: called after every step of reading; what it raises ends it.
        studied: what studies are done again with; None where the plan has none.

    Raises:
        UserError: a text that is shorter than what was read of it.
        ValueError: another model than the memory's.
    """
    check_model(plan.memory, base_fingerprint(model))
    learner = Learner.of(model, settings_from(plan.memory.settings["learner"]))
    if plan.begin is not None:
        learner.load(store.load(plan.begin.number))
    for part in plan.again:
        if isinstance(part, Session):
            assert studied is not None
            _study_again(learner, part, studied)
            continue
        text = texts(part.document)
        if len(text.ids) < part.stop or (part.document.finished and len(text.ids) != part.stop):
            raise UserError(
                f"{part.document.name} has {len(text.ids):,} tokens, and {part.stop:,} were read of it: this model's "
                "tokenizer is not the one it was read with"
            )
        stop = None if part.document.finished else part.stop
        learn_text(learner, text, part.start, None, stop=stop, on_step=on_step)
    when = [record.started for record in plan.records]
    learner.log.records = [replace(r, started=t) for r, t in zip(learner.log.records, when, strict=True)]
    return learner


def save_forgotten(store: MemoryStore, plan: Forgetting, learner: Learner, note: str = "") -> Snapshot:
    """Make that the head, and delete every snapshot that has read what is forgotten; its name goes too."""
    count = len(plan.digests)
    begin = None if plan.begin is None else plan.begin.number
    said = note or ("forgot a document" if count == 1 else f"forgot {count} documents")
    return store.supersede(learner.memory(), said, begin, plan.gone)


def missing_texts(plan: Forgetting, kept: set[str]) -> list[str]:
    """Names of the documents that must be read again, and whose texts are not there."""
    return list(dict.fromkeys(name for digest, name in plan.needs.items() if digest not in kept))


def refuse_without(store: MemoryStore, plan: Forgetting, names: Sequence[str]) -> UserError:
    """What to say where texts are missing."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return UserError(
        f"{shown}: read after what is to be forgotten, and the text is not kept beside {store.path}; give it with "
        "--text, or " + _rollback(store.path, plan.begin)
    )


def _count(memory: Memory, name: str) -> int:
    """Of the learner's counters; 0 where the memory has none."""
    counters = memory.settings.get("counters")
    value = counters.get(name, 0) if isinstance(counters, dict) else 0
    return value if isinstance(value, int) else 0


def _rollback(path: Path, begin: Snapshot | None) -> str:
    if begin is None:
        return f"begin another memory: {path} has no snapshot from before that document"
    return (
        "go back to before that document, which loses what came after it too, with: "
        f"nestling memory rollback {path} --to {begin.number}"
    )


def _digest(records: Sequence[DocumentRecord], name: str, path: Path) -> str:
    exact = {r.digest for r in records if name in (r.name, Path(r.name).name)}
    found = exact or {r.digest for r in records if len(name) >= SHORTEST_DIGEST and r.digest.startswith(name)}
    found.discard("")
    if not found:
        have = ", ".join(dict.fromkeys(Path(r.name).name for r in records if r.digest)) or "none"
        raise UserError(f"{path} has read no document {name}; it has read {have[:400]}")
    if len(found) > 1:
        digits = ", ".join(sorted(digest[:12] for digest in found))
        raise UserError(f"{name} names {len(found)} texts that {path} has read; say which by its digest: {digits}")
    return found.pop()


def _again(memory: Memory, before: Memory, digests: set[str], path: Path) -> tuple[Part | Session, ...]:
    """What came after `before`, without some documents. The last of `before` may have gone on."""
    try:
        sessions = studies_of(memory.settings)[len(studies_of(before.settings)) :]
        how = [_settings(each) for each in sessions]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not say how it was studied: {error}") from error
    by_study = _studied(sessions)
    names = {record.digest: record.name for record in memory.documents}
    found: list[tuple[float, Part | Session]] = []
    for each, settings in zip(sessions, how, strict=True):
        left = {digest: names.get(digest, digest) for digest in each["digests"] if digest not in digests}
        most = None if each["finished"] else each["steps"]
        if left or isinstance(settings, Sleep):
            found.append((each["records"] - 0.5, Session(left, settings, most)))
    read: dict[str, int] = {}
    for i, record in enumerate(memory.documents):
        first = read.get(record.digest, 0)
        # A text that was finished is begun anew where it comes again.
        read[record.digest] = 0 if record.finished else first + record.tokens
        done = before.documents[i].tokens if i < len(before.documents) else 0
        skipped = record.digest in digests or (done == record.tokens and i < len(before.documents))
        if skipped or i in by_study:
            continue
        if not record.digest:
            raise UserError(
                f"{path} was taught {record.tokens:,} tokens of no document after its last snapshot from before what "
                "is to be forgotten, and they cannot be read again"
            )
        found.append((i, Part(record, first + done, first + record.tokens)))
    return tuple(part for _, part in sorted(found, key=lambda pair: pair[0]))


def _settings(session: Mapping[str, Any]) -> Study | Sleep:
    """How it was done. Earlier studies had no scope and asked for no kinds."""
    if session.get(SLEEP):
        return Sleep(**session["settings"])
    return Study(**({"everywhere": True, "kinds": 0} | session["settings"]))


def _studied(sessions: Sequence[Mapping[str, Any]]) -> set[int]:
    """Which records came of studies."""
    return {i for each in sessions for i in range(each["records"], each["records"] + each["added"])}


class _Enough(Exception):
    """As many steps as the study had that is done again."""


def _study_again(learner: Learner, session: Session, studied: Studying) -> None:
    taken = 0

    def step(_: Step) -> None:
        nonlocal taken
        taken += 1
        if taken == session.most:
            raise _Enough

    if isinstance(session.settings, Sleep):
        own = {digest: studied.text(digest) for digest in session.names}
        with suppress(ValueError):  # it would have been refused, and changed nothing: one adapter, or nothing to read
            sleep(learner, own, studied.tokenizer, session.settings)
        return
    texts = {name: studied.text(digest) for digest, name in session.names.items()}
    with suppress(_Enough):
        learner.study(texts, studied.tokenizer, session.settings, Events(step=step))
