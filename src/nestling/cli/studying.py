"""What `nestling study` does."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TaskID
from transformers import PreTrainedModel

from nestling.cli.console import quiet_libraries, say, stdout_console
from nestling.cli.learning import Stopped, interruptible, kept_texts, read_given, restored_or_new, some_names
from nestling.cli.learning_report import LINE_SECONDS, print_place
from nestling.cli.loading import load_causal_lm
from nestling.continual.learner.guards import LearningDivergedError
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.levels import resolve
from nestling.continual.learner.options import Options, Settings
from nestling.continual.replay.rehearsal import Rehearsal
from nestling.continual.store.adapters import about
from nestling.continual.store.memory import Memory
from nestling.continual.store.store import MemoryStore
from nestling.continual.study.preparing import SHAPE
from nestling.continual.study.settings import Study
from nestling.continual.study.studying import Events, Step, Studied
from nestling.errors import UserError

RANK = 16
"""Of a new memory: 12 MB for 135M parameters."""
LR = 1e-3
"""Of `nestling learn` on a memory that was begun here: factors take larger steps than weights."""


class TimeUp(Exception):
    """The minutes are over."""


@dataclass
class Watch:
    """Shows a study while it goes on, and ends it.

    Attributes:
        console: where to.
        bar: of the terminal.
        check: raises `Stopped` when it is time to stop.
        end: when the minutes are over, by `time.monotonic`; None is never.
        save: what was learned so far.
        told: when a line was written last, where there is no terminal.
        last: the last step; None before the first.
    """

    console: Console
    bar: Bar
    check: Callable[[], None]
    end: float | None
    save: Callable[[], object]
    told: float = 0.0
    last: Step | None = None
    task: TaskID | None = None

    @property
    def events(self) -> Events:
        """What calls this."""
        return Events(self.step, self.round, self.writing)

    def step(self, step: Step) -> None:
        """Show it; the first of a round begins a bar."""
        if self.last is None or step.round != self.last.round:
            self._begin("", step.exercises + step.left)
        self.last = step
        said = f"round {step.round} of {step.of}, known {step.known:.0%}"
        self.bar.update(self._task, advance=step.exercises, description=said)
        self._line(f"{said}, loss {step.loss:.3f}, {step.left:,} exercises of this round to come")
        self._stop_in_time()

    def round(self, studied: Studied) -> None:
        """Save."""
        self.save()

    def writing(self, tokens: int) -> None:
        """Show how much the model has written."""
        if self.task is None:
            self._begin("the model writes what it knows", SHAPE[0] * SHAPE[1])
        self.bar.update(self._task, completed=tokens)
        self._line(f"{tokens:,} tokens written of what the model knows")
        self._stop_in_time()

    @property
    def _task(self) -> TaskID:
        assert self.task is not None
        return self.task

    def _begin(self, description: str, total: int) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(description, total=total)

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if not self.console.is_terminal and now - self.told >= LINE_SECONDS:
            print(text, file=sys.stderr, flush=True)
            self.told = now

    def _stop_in_time(self) -> None:
        self.check()
        if self.end is not None and time.monotonic() >= self.end:
            raise TimeUp


def run(
    source: str,
    paths: Sequence[str],
    place: Path,
    settings: Study,
    *,
    minutes: float | None,
    rank: int | None,
    keep_texts: bool,
    key: Path | None,
    note: str,
) -> bool:
    """Study texts into a memory, and report; returns whether it was interrupted.

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
        learner = _learner(model, saved, rank)
        if kept is not None:
            for document in documents:
                kept.keep(document.text)
        stopped, result = False, None
        with (
            interruptible() as check,
            warnings.catch_warnings(),
            Bar(console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            warnings.simplefilter("ignore")
            end = None if minutes is None else time.monotonic() + 60 * minutes
            watch = Watch(console, bar, check, end, lambda: store.save(learner.memory(), "not finished", autosave=True))
            try:
                result = learner.study({d.name: d.text for d in documents}, tokenizer, settings, watch.events)
            except Stopped:
                stopped = True
            except TimeUp:
                pass
            except (ValueError, LearningDivergedError) as error:
                raise UserError(str(error)) from error
        snapshot = None
        if watch.last is not None:
            snapshot = store.save(
                learner.memory(), note or f"studied {some_names([d.name for d in documents])}", autosave=stopped
            )
    if watch.last is not None:
        _report(console, len(documents), watch.last, result)
        _report_scope(console, learner)
    print_place(console, store, snapshot, learner, stopped)
    return stopped


def _learner(model: PreTrainedModel, saved: Memory | None, rank: int | None) -> Learner:
    """That of a memory, or a new one.

    Raises:
        UserError: settings that do not fit the model, a memory of another model, or of another rank than given.
    """

    def settings() -> Settings:
        own = RANK if rank is None else rank
        # What is preserved is rehearsed text that stays with the memory; with ranks it is read once and has no weight.
        rehearsal = Rehearsal(*SHAPE, weight=0.0) if own else Rehearsal(*SHAPE)
        options = Options(rank=own or None, rehearsal=rehearsal)
        return Settings(resolve(model, None), lr=LR if own else Settings.lr, options=options)

    learner = restored_or_new(model, saved, settings)
    ranks = {level.rank or learner.settings.options.rank or 0 for level in learner.settings.levels.values()}
    if rank is not None and ranks != {rank}:
        own = " and ".join(str(each or "none") for each in sorted(ranks))
        raise UserError(
            f"--rank {rank}: this memory was begun with {own}, and goes on with that; leave the option out, or begin "
            "another memory"
        )
    return learner


def _report_scope(console: Console, learner: Learner) -> None:
    """Where the memory speaks."""
    if learner.scope is None:
        say(console, "the memory speaks everywhere")
    else:
        named = about([*(each.scope for each in learner.earlier.adapters), learner.scope])
        say(console, f"the memory speaks from where a text names {named}; elsewhere the model is as before")


def _report(console: Console, documents: int, last: Step, result: Studied | None) -> None:
    """What is known now."""
    count = "1 document" if documents == 1 else f"{documents} documents"
    if result is None:
        say(console, f"{count}: known {last.known:.0%} of the exercises made of them, in round {last.round}")
        return
    known = " -> ".join(f"{share:.0%}" for share in result.known)
    say(console, f"{count}, {result.exercises:,} exercises made of them; known after each round: {known}")
    if result.left_out:
        say(console, f"{result.left_out:,} more have too few rare words to be told from other text, and were left out")
    rate = f"{result.tokens / max(result.seconds, 1e-9):,.1f} tokens/s"
    say(console, f"{result.tokens:,} tokens in {result.seconds:.1f} s, {rate}, what is preserved included")
    if not math.isnan(result.changed):
        say(console, f"share of the layers' outputs on other text that is changed, summed: {result.changed:.3f}")
