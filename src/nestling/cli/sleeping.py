"""What `nestling sleep` does."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.progress import Progress as Bar

from nestling.cli.console import quiet_libraries, say, stdout_console
from nestling.cli.learning import Stopped, interruptible
from nestling.cli.learning_report import LINE_SECONDS, print_place
from nestling.cli.loading import load_causal_lm
from nestling.continual.learner.guards import LearningDivergedError
from nestling.continual.learner.learner import Learner
from nestling.continual.store.memory import Memory
from nestling.continual.store.store import MemoryStore
from nestling.continual.store.texts import KeptTexts, read_key
from nestling.continual.study.sleeping import Sleep, Slept, sleep
from nestling.errors import UserError


def run(source: str, place: Path, settings: Sleep, *, key: Path | None, note: str) -> bool:
    """Consolidate a memory, and report; returns whether it was interrupted, which leaves it as it was.

    Raises:
        UserError: whatever the user can put right.
    """
    store, console = MemoryStore(place), stdout_console()
    store.index()  # before the lock, which would make the directory of a mistyped name
    kept = KeptTexts(place, None if key is None else read_key(key))
    quiet_libraries()
    with store.lock():
        saved = store.load()
        texts = _texts(saved, kept)
        model, tokenizer = load_causal_lm(source)
        try:
            learner = Learner.restore(model, saved)
            with (
                interruptible() as check,
                Bar(console=console, transient=True, disable=not console.is_terminal) as bar,
            ):
                task, told = bar.add_task("sleeping", total=None), 0.0

                def step(number: int, of: int) -> None:
                    nonlocal told
                    bar.update(task, completed=number, total=of)
                    if not console.is_terminal and time.monotonic() - told >= LINE_SECONDS:
                        print(f"step {number:,} of {of:,}", file=sys.stderr, flush=True)
                        told = time.monotonic()
                    check()

                slept = sleep(learner, texts, tokenizer, settings, step)
        except Stopped:
            say(console, f"interrupted: {place} is as it was")
            return True
        except (ValueError, LearningDivergedError) as error:
            raise UserError(str(error)) from error
        if store.head().autosave:  # which the next save would take the place of
            store.save(saved, store.head().note)
        snapshot = store.save(learner.memory(), note or f"slept: one adapter of {slept.adapters}")
    for line in _lines(slept, len(texts)):
        say(console, line)
    print_place(console, store, snapshot, learner, False)
    return False


def _texts(memory: Memory, kept: KeptTexts) -> dict[str, str]:
    """Those of its documents that were kept, by digest: one name may have had several texts."""
    there = set(kept.digests())
    return {r.digest: kept.read(r.digest) for r in memory.documents if r.digest in there}


def _lines(slept: Slept, texts: int) -> list[str]:
    """What was done, and what of it was lost."""
    count = "1 kept text" if texts == 1 else f"{texts} kept texts"
    read = f"{slept.exercises:,} exercises of {count} and {slept.dreams:,} of {slept.dreamt:,} texts of its own"
    rate = f"{slept.tokens:,} tokens in {slept.seconds:.1f} s"
    share = 1 - slept.after / slept.cleared if slept.cleared else 1.0
    left = f"; {slept.left_out:,} exercises have too few rare words" if slept.left_out else ""
    return [
        f"{slept.adapters} adapters became one, on {read}; {rate}{left}",
        f"without them the model says otherwise by {slept.cleared:.3f} nats a token, with the new one by "
        f"{slept.after:.3f}: {share:.0%} of the difference is kept, on pieces that were not learned from",
    ]
