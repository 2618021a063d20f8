"""What `nestling learn` does."""

from __future__ import annotations

import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bar
from transformers import PreTrainedModel

from nestling.cli.console import cell, quiet_libraries, say, stdout_console
from nestling.cli.flags import Flags, flag_values
from nestling.cli.learning_report import Outcome, ProgressLines, mean, print_outcomes, print_periods, print_place
from nestling.cli.loading import document_tokens, load_causal_lm
from nestling.continual.learn_documents import (
    Autosave,
    Progress,
    Text,
    frozen_loss,
    learn_text,
    tokens_read,
)
from nestling.continual.learner.guards import LearningDivergedError
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.levels import resolve
from nestling.continual.learner.options import Settings, settings_from
from nestling.continual.replay.rehearsal import RehearsedText
from nestling.continual.store.memory import Memory
from nestling.continual.store.snapshots import Snapshot
from nestling.continual.store.store import MemoryStore
from nestling.continual.store.texts import KeptTexts, read_key, text_digest
from nestling.errors import UserError
from nestling.levels.assignment import parse_levels
from nestling.tasks.text import Document, read_documents


class Stopped(Exception):
    """Ctrl-C was pressed, and this is a good place to stop."""


@dataclass
class Session:
    """One run of `nestling learn` at work.

    Attributes:
        learner, autosave, console: what it works with.
        measure: tokens of each document that are read before and after; 0 for none.
        check: raises `Stopped` when it is time to stop.
        lines: of progress, where the console is no terminal and shows no bar.
        keep: told the digest of every text before it is learned from.
        outcomes: a line for every document begun.
        seconds: spent on learning, saves included; what is read before and after, and what is written, left out.
    """

    learner: Learner
    autosave: Autosave
    console: Console
    measure: int
    check: Callable[..., None]
    lines: ProgressLines | None
    keep: Callable[[str], None] = lambda _: None
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    def prepare(self) -> None:
        """Have the model write what it will rehearse, if there is anything to write."""
        written = self.learner.component(RehearsedText)
        if written is None or written.ids is not None:
            return
        say(self.console, "the model first writes {} pieces of {} tokens to rehearse".format(*written.shape))
        total, began = math.prod(written.shape), time.monotonic()
        with Bar(console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("writing", total=total)

            def step(done: int) -> None:
                if self.lines is not None:
                    self.lines.writing(done, total)
                bar.update(task, completed=done)
                self.check()

            written.write(step)
        seconds = time.monotonic() - began
        say(self.console, f"{total:,} tokens written in {seconds:.1f} s")
        if self.lines is not None:
            self.lines.leave_out(seconds)

    def learn(self, text: Text) -> None:
        """Learn from one document, from where it was left."""
        start = tokens_read(self.learner.log.records, text.digest)
        if start is None:
            say(self.console, f"{text.name}: learned already, skipped")
            return
        self.keep(text.digest)
        outcome = Outcome(text.name, start, self.measure)
        self.outcomes.append(outcome)
        if start:
            say(self.console, f"{text.name}: going on after {start:,} of {len(text.ids):,} tokens")
        if self.measure:
            with self.learner.base_weights():
                outcome.before = self._frozen(text)
        with Bar(console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(cell(Path(text.name).name), total=len(text.ids), completed=start)

            def step(progress: Progress) -> None:
                outcome.add(progress)
                if self.lines is not None:
                    self.lines.add(progress)
                for line in progress.notes:
                    say(self.console, f"{text.name}: {line}")
                bar.update(task, advance=progress.tokens, description=f"loss {mean(progress.losses):.3f}")
                self.check()

            began = time.monotonic()
            try:
                learn_text(self.learner, text, start, self.autosave, on_step=step)
            finally:
                self.seconds += time.monotonic() - began
        if self.measure:
            outcome.after = self._frozen(text)

    def _frozen(self, text: Text) -> float:
        began = time.monotonic()
        ids, context = text.ids[: self.measure], self.learner.settings.context
        loss = frozen_loss(self.learner.model, ids, context, self.check)
        if self.lines is not None:
            self.lines.leave_out(time.monotonic() - began)
        return loss


def run(
    source: str,
    paths: Sequence[str],
    place: Path,
    settings: Flags[Settings],
    *,
    save_tokens: int | None,
    save_seconds: float,
    measure: int,
    note: str,
    keep_texts: bool = False,
    key: Path | None = None,
) -> bool:
    """Learn from texts into a memory, and report; returns whether it was interrupted.

    The model is loaded even where all texts are learned already: what it is, and whether the memory and the options fit
    it, is in its weights only, and a mistake must not pass because there is nothing to do.

    Raises:
        UserError: whatever the user can put right; a memory that exists is then as it was last saved.
    """
    store, console = MemoryStore(place), stdout_console()
    documents = [document for path in paths for document in read_given(path, place)]
    kept = kept_texts(place, keep_texts, key)
    quiet_libraries()
    with store.lock():
        saved = store.load() if store.exists() else None
        model, tokenizer = load_causal_lm(source)
        learner = make_learner(model, saved, settings)
        if not any(tokens_read(learner.log.records, text_digest(d.text)) is not None for d in documents):
            for document in documents:
                say(console, f"{document.name}: learned already, skipped")
            return False
        if learner.scope is not None:
            raise UserError(
                f"{place} was studied, and speaks only where a text names what it was taught: what is read elsewhere "
                "would not be learned; use nestling study, or learn into another memory"
            )
        texts = [
            Text(d.name, text_digest(d.text), document_tokens(source, model, tokenizer, d.text)) for d in documents
        ]
        autosave = Autosave(store, save_tokens, save_seconds)
        with interruptible() as check, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the learner's are printed as notes
            lines = None if console.is_terminal else ProgressLines(_to_learn(learner, texts))
            session = Session(learner, autosave, console, measure, check, lines)
            if kept is not None:
                by_digest = {text_digest(d.text): d.text for d in documents}
                session.keep = lambda digest: kept.keep(by_digest[digest])
            stopped = _until_stopped(session, texts)
            snapshot = _save(session, note, stopped)
    if session.outcomes:
        print_outcomes(console, session.outcomes, session.measure, session.seconds)
        print_periods(console, learner)
    print_place(console, store, snapshot, learner, stopped)
    return stopped


def kept_texts(place: Path, keep: bool, key: Path | None) -> KeptTexts | None:
    """Where texts are kept: if that is wanted, and in a memory that has begun to.

    Raises:
        UserError: a key and nothing to keep, or texts that are encrypted and no key.
    """
    kept = KeptTexts(place, None if key is None else read_key(key))
    if key is None and kept.sealed():
        raise UserError(f"{place} keeps its texts encrypted: give --key FILE")
    if keep or kept.exists():
        return kept
    if key is not None:
        raise UserError("--key encrypts the texts that are kept: give --keep-texts as well")
    return None


def make_learner(model: PreTrainedModel, saved: Memory | None, settings: Flags[Settings]) -> Learner:
    """A new learner, or that of a memory.

    Raises:
        UserError: settings that do not fit the model, or contradict the memory's.
    """
    if saved is not None and "learner" in saved.settings:
        _check_given(settings, saved)
    return restored_or_new(model, saved, lambda: _settings(model, settings))


def restored_or_new(model: PreTrainedModel, saved: Memory | None, settings: Callable[[], Settings]) -> Learner:
    """That of a memory; a new one where there is none, or one that does not say how it was learned.

    Raises:
        UserError: settings that do not fit the model, or a memory of another model.
    """
    try:
        if saved is not None and "learner" in saved.settings:
            return Learner.restore(model, saved)
        learner = Learner.of(model, settings())
        if saved is not None:
            learner.load(saved)
    except ValueError as error:
        raise UserError(str(error)) from error
    return learner


def _settings(model: PreTrainedModel, flags: Flags[Settings]) -> Settings:
    """Of a new learner. A running mean is asked for to teach what is replayed."""
    spec = flags.values["levels"]
    made = flags.make(levels=resolve(model, None if spec is None else dict(parse_levels(spec, unit="tokens"))))
    options = made.options
    if options.average is None:
        return made
    if options.replay is None:
        raise UserError("--teacher teaches what --replay keeps: give both")
    return replace(made, options=replace(options, replay=replace(options.replay, teacher="average")))


@contextmanager
def interruptible() -> Iterator[Callable[..., None]]:
    """A function that raises `Stopped` once Ctrl-C was pressed; a second Ctrl-C interrupts at once."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def check(*_: object) -> None:
        if pressed:
            raise Stopped

    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def read_given(path: str, memory: Path) -> list[Document]:
    """Of a file or directory (but the memory's own, which may be inside), or of standard input."""
    if path != "-":
        return read_documents(path, leave_out=memory)
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8; convert it, for example with iconv -t UTF-8") from error
    if not text.strip():
        raise UserError("standard input holds no text")
    return [Document("standard input", text)]


def _to_learn(learner: Learner, texts: Sequence[Text]) -> int:
    """Tokens of all texts that were not learned from before; of texts that are equal, those of one."""
    left = {text.digest: (tokens_read(learner.log.records, text.digest), len(text.ids)) for text in texts}
    return sum(length - read for read, length in left.values() if read is not None)


def _until_stopped(session: Session, texts: Sequence[Text]) -> bool:
    try:
        session.prepare()
        for text in texts:
            session.learn(text)
    except LearningDivergedError as error:
        place = session.autosave.store.path
        raise UserError(f"{error}; {place} is as it was last saved: begin another with a lower --lr") from error
    except Stopped:
        return True
    return False


def _save(session: Session, note: str, stopped: bool) -> Snapshot | None:
    """The snapshot that holds everything; None where nothing has been learned yet."""
    store = session.autosave.store
    if stopped:
        session.autosave.save(session.learner)
        return store.head() if store.exists() else None
    return store.save(session.learner.memory(), note or f"learned {some_names([o.name for o in session.outcomes])}")


def some_names(names: Sequence[str]) -> str:
    """The first three of some documents, without their folders."""
    return ", ".join(Path(name).name for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _check_given(settings: Flags[Settings], saved: Memory) -> None:
    """Options on the command line that a memory's own settings contradict.

    Raises:
        UserError: naming the first.
    """
    own = settings_from(saved.settings["learner"])
    values = flag_values(own) | {"levels": {name: level.period for name, level in own.levels.items()}}
    ranks = {own.options.rank if level.rank is None else level.rank for level in own.levels.values()}
    values["options.rank"] = next(iter(ranks)) if len(ranks) == 1 else values["options.rank"]
    for name in sorted(settings.given):
        wanted = settings.values[name]
        if name == "levels":
            wanted = parse_levels(wanted, unit="tokens")
        if wanted != values[name]:
            raise UserError(
                f"{settings.option(name)} {wanted}: this memory was begun with {values[name]}, and goes on with "
                "that; leave the option out, or begin another memory"
            )
