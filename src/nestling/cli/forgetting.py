"""What `nestling memory forget` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor
from transformers import PreTrainedModel

from nestling.cli.console import quiet_libraries, say, stdout_console
from nestling.cli.loading import document_tokens, load_causal_lm
from nestling.cli.memory_tables import Measured, print_losses
from nestling.continual.learn_documents import Progress, Text
from nestling.continual.learner.guards import LearningDivergedError
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import settings_from
from nestling.continual.store.records import DocumentRecord
from nestling.continual.store.store import MemoryStore
from nestling.continual.store.texts import KeptTexts, read_key, text_digest
from nestling.continual.study.forgetting import (
    Forgetting,
    Session,
    Studying,
    learn_again,
    missing_texts,
    plan_forgetting,
    refuse_without,
    save_forgotten,
)
from nestling.continual.study.settings import Study
from nestling.continual.study.sleeping import Sleep
from nestling.errors import UserError
from nestling.tasks.text import read_documents


def run(place: Path, names: Sequence[str], source: str, files: Sequence[str], key: Path | None, measure: int) -> None:
    """Forget documents, and report. Whatever fails or interrupts it before the end leaves the memory as it was.

    Raises:
        UserError: whatever the user can put right.
    """
    store, console = MemoryStore(place), stdout_console()
    store.index()  # before the lock, which would make the directory of a mistyped name
    kept = KeptTexts(place, None if key is None else read_key(key))
    given = {text_digest(d.text): d.text for file in files for d in read_documents(file)}
    with store.lock():
        store.tidy()  # what an earlier one that was interrupted at its end has left
        plan = plan_forgetting(store, names)
        if missing := missing_texts(plan, {*kept.digests(), *given}):
            raise refuse_without(store, plan, missing)
        for digest in plan.needs:  # a text that cannot be read is found before the work
            given[digest] = given.get(digest) or kept.read(digest)
        quiet_libraries()
        model, tokenizer = load_causal_lm(source)

        def tokens(text: str) -> Tensor:
            return document_tokens(source, model, tokenizer, text)

        texts = {} if not measure else _asked(plan, kept, given, lambda text: tokens(text)[:measure])
        measured = Measured(model, texts, settings_from(plan.memory.settings["learner"]).context)
        try:
            losses = measured.losses({"before": plan.memory, "without any memory": None})
            studying = Studying(tokenizer, given.__getitem__)
            learner = _learned_again(console, store, plan, model, lambda digest: tokens(given[digest]), studying)
        except (ValueError, LearningDivergedError) as error:
            raise UserError(str(error)) from error
        losses |= measured.losses({"now": None})  # with the learner on the model
        snapshot = save_forgotten(store, plan, learner)
        store.tidy()
    _report(console, store, plan)
    if texts:
        print_losses(console, measured, losses)
    size = f"snapshot {snapshot.number} ({snapshot.bytes:,} bytes)"
    say(console, f"memory of {snapshot.tokens:,} tokens in {place}, {size}")


def _asked(
    plan: Forgetting, kept: KeptTexts, given: dict[str, str], tokens: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """What is forgotten, by name, as far as its text is at hand."""
    found: dict[str, Tensor] = {}
    for record in plan.documents:
        if record.digest in given or record.digest in kept.digests():
            found[record.name] = tokens(given.get(record.digest) or kept.read(record.digest))
    return found


def _learned_again(
    console: Console,
    store: MemoryStore,
    plan: Forgetting,
    model: PreTrainedModel,
    tokens: Callable[[str], Tensor],
    studying: Studying,
) -> Learner:
    """With a bar; `tokens` gives those of a digest."""
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading again", total=plan.tokens)

        def step(progress: Progress) -> None:
            bar.update(task, advance=progress.tokens)

        def text(record: DocumentRecord) -> Text:
            return Text(record.name, record.digest, tokens(record.digest))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tokens that are not learned from, as they were not the first time
            return learn_again(model, store, plan, text, step, studying)


def _report(console: Console, store: MemoryStore, plan: Forgetting) -> None:
    names = ", ".join(dict.fromkeys(Path(record.name).name for record in plan.documents))
    begin = "from nothing" if plan.begin is None else f"from snapshot {plan.begin.number}"
    parts = []
    if read := {part.document.digest for part in plan.parts}:
        parts.append(f"read {_documents(len(read))} again {begin}, {plan.tokens:,} tokens")
    sessions = [each for each in plan.again if isinstance(each, Session)]
    if studied := {digest for each in sessions if isinstance(each.settings, Study) for digest in each.names}:
        parts.append(f"studied {_documents(len(studied))} again" + ("" if parts else f" {begin}"))
    if any(isinstance(each.settings, Sleep) for each in sessions):
        parts.append("slept again" + ("" if parts else f" {begin}"))
    done = ", and ".join(parts) or "nothing had come after it"
    say(console, f"{store.path} has forgotten {names}; {done}")
    numbers = ", ".join(map(str, plan.gone))
    say(console, f"deleted snapshot{'s' * (len(plan.gone) > 1)} {numbers}, where it had been read, and its text")


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count} documents"
