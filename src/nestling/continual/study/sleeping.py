"""Offline consolidation of what was studied ("sleep"): the adapters of many studies become one.

The paper names offline consolidation (NL section 1.1) and leaves it open. After *Language Models Need Sleep*
(arXiv:2606.03979) new ranks are opened, what the model with all of its adapters says is distilled into them, and the
old ones are cleared. What is read for that is exercises of the texts, where these are there, and text that the model
writes for itself. Left out is that paper's reinforcement learning of what to write: what is written here is kept where
it helps what is asked, to first order.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase

from nestling.continual.learner.earlier import open_adapter
from nestling.continual.learner.guards import LearningDivergedError
from nestling.continual.store.scope import Scope
from nestling.continual.store.texts import text_digest
from nestling.continual.stream.chunks import Piece, batches
from nestling.continual.stream.scoring import divergences, learning
from nestling.continual.study.dreams import beginnings, dream, helpful
from nestling.continual.study.lessons import within
from nestling.continual.study.preparing import lessons_for, own_text, preservation_of
from nestling.continual.study.settings import Study
from nestling.continual.study.studying import CLIP, PASS, RATE_OF_RANKS, warm_cosine
from nestling.settings import NO_FLAG, check, setting

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner

PANEL = "Sleep"
SLEEP = "sleep"
"""What stands in a learner's `studies` for a night among them."""
PROBES = 32
"""Exercises that decide which dreams are kept."""
HELD_OUT = 8
"""One piece in so many is measured on, and not learned from."""


@dataclass(frozen=True)
class Sleep:
    """How a memory sleeps.

    Attributes:
        rounds: through all that is read.
        exercises: read all exercises of the texts; without, their passages alone, as plain replay does.
        dreams: texts that the model writes of every passage before.
        length: tokens of each.
        lr: of AdamW, on the new factors.
        batch: pieces a step.
        preserve: as of `Study`.
        seed: of the order, and of what is written.
    """

    rounds: int = setting(6, help="Rounds through all that is read.", panel=PANEL, at_least=1)
    exercises: bool = setting(True, help="Read all exercises of the texts.", flag=NO_FLAG)
    dreams: int = setting(2, help="Texts that the model writes of every passage before.", panel=PANEL, at_least=0)
    length: int = setting(48, help="Tokens of each.", panel=PANEL, at_least=1)
    lr: float = setting(RATE_OF_RANKS, help="Learning rate.", flag="lr", panel=PANEL, above=0, below=math.inf)
    batch: int = setting(8, help="Pieces a step.", panel=PANEL, at_least=1)
    preserve: float = setting(
        1.0, help="Weight of what the model knew before.", panel=PANEL, at_least=0, below=math.inf
    )
    seed: int = setting(0, help="Of the order, and of what is written.", panel=PANEL, at_least=0)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        check(self)


@dataclass(frozen=True)
class Slept:
    """What a sleep came to, measured on pieces that were not learned from.

    Attributes:
        adapters: that there were; there is one now.
        exercises, dreams: pieces that were read; of the dreams those that help.
        left_out: exercises which the scope does not reach.
        dreamt: that were written.
        cleared: KL(before || model) a token without any adapter, nats: what there was to be kept.
        after: the same at the end: what of it was lost.
        steps, tokens: taken and read.
        seconds: what it took, preparation included.
    """

    adapters: int
    exercises: int
    left_out: int
    dreams: int
    dreamt: int
    cleared: float
    after: float
    steps: int
    tokens: int
    seconds: float


def sleep(
    learner: Learner,
    texts: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Sleep,
    on_step: Callable[[int, int], object] = lambda *_: None,
) -> Slept:
    """Make one adapter of all:

        mean KL(model with the old adapters || model with the new one) + preserve * changed share of the outputs

    by AdamW, on exercises of the texts and on what the model writes. The new adapter speaks where any of the old ones
    did. Whatever interrupts it leaves everything as it was.

    Args:
        learner: attached, of two adapters or more.
        texts: what was studied, by name, as far as it is there.
        tokenizer: of the learner's model.
        settings: how.
        on_step: told the step, from 1, and how many there are; what it raises ends the sleep.

    Raises:
        ValueError: fewer than two adapters, nothing to read, or dreams that are longer than the learner's context.
        LearningDivergedError: the weights are no longer finite.
        RuntimeError: the learner is detached.
    """
    began = time.monotonic()
    learner.check_at_work()
    if learner.scope is None or not learner.earlier.adapters:
        raise ValueError(
            "this memory has no two studies that could be made one: sleep joins the adapters of finished studies "
            "(levels that read are consolidated by Learner.consolidate)"
        )
    undo = open_adapter(learner)
    try:
        slept = _Night(learner, texts, tokenizer, settings).whole(on_step, began)
    except BaseException:
        learner.earlier.attach()
        undo()
        raise
    learner.earlier.replace(())
    learner.weights_replaced()
    learner.studies.append(
        {
            SLEEP: True,
            "digests": [text_digest(text) for text in texts.values()],
            "settings": asdict(settings),
            "steps": slept.steps,
            "finished": True,
            "records": len(learner.log.records),
            "added": 0,
        }
    )
    return slept


class _Night:
    """What is read and how it is judged. The learner's own adapter is new, the others are earlier ones."""

    def __init__(
        self, learner: Learner, texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, settings: Sleep
    ) -> None:
        self.learner, self.settings = learner, settings
        scopes = [each.scope for each in learner.earlier.adapters]
        self.scope: Scope = reduce(Scope.joined, scopes)
        self.rng = random.Random(f"sleep {settings.seed}")
        self.adapters = len(scopes)
        lessons = lessons_for(learner, Study(), list(texts.values()), tokenizer) if texts else []
        inside = within(lessons, self.scope)
        self.left_out = len(lessons) - len(inside)
        self.lessons = [lesson.piece for lesson in inside if settings.exercises or lesson.exercise.kind == "passage"]
        starts = beginnings(lessons, learner.earlier, tokenizer) * settings.dreams
        longest = max(map(len, starts), default=0) + settings.length
        if starts and longest > learner.settings.context:
            raise ValueError(
                f"dreams of {longest} tokens with their beginnings do not fit a context of {learner.settings.context}; "
                "give a shorter length"
            )
        with self._before():
            self.dreamt = dream(learner, starts, settings.length, settings.seed, self.scope)
        if not self.lessons and not self.dreamt:
            raise ValueError("nothing was studied that could be read again, and nothing was written")
        own = own_text(learner, Study(preserve=settings.preserve), lambda _: None)
        self.preserved = preservation_of(learner, Study(preserve=settings.preserve), own)

    def whole(self, on_step: Callable[[int, int], object], began: float) -> Slept:
        """The sleep; what there is to say of it."""
        learner = self.learner
        learner.set_scope(self.scope)
        learner.earlier.detach()
        with nullcontext() if self.preserved is None else self.preserved.coordinates():
            parameters = learner.everything
            with learning(learner.model, parameters):
                probes = self.rng.sample(self.lessons, min(PROBES, len(self.lessons)))
                kept = helpful(self.dreamt, probes, self._loss, parameters)
                pieces = [*self.lessons, *kept]
                self.rng.shuffle(pieces)
                apart = min(max(1, len(pieces) // HELD_OUT), len(pieces) - 1)
                held, read = pieces[:apart] or pieces, pieces[apart:]
                cleared = self._measured(held)
                steps, tokens = self._learn(read, parameters, on_step)
            after = self._measured(held)
        if not all(math.isfinite(x) for x in (cleared, after)):
            raise LearningDivergedError("the new weights are not finite; sleep at a lower rate (--lr)")
        counts = (self.adapters, len(self.lessons), self.left_out, len(kept), len(self.dreamt))
        return Slept(*counts, cleared, after, steps, tokens, time.monotonic() - began)

    def _learn(
        self, pieces: Sequence[Piece], parameters: Sequence[Tensor], on_step: Callable[[int, int], object]
    ) -> tuple[int, int]:
        settings, order = self.settings, list(pieces)
        optimizer = AdamW(parameters, lr=settings.lr, betas=self.learner.settings.options.betas, weight_decay=0.0)
        a_round = math.ceil(len(order) / settings.batch)
        steps, tokens = settings.rounds * a_round, 0
        for step in range(steps):
            if step % a_round == 0:
                self.rng.shuffle(order)
            place = step % a_round * settings.batch
            chosen = sorted(order[place : place + settings.batch], key=lambda piece: len(piece.ids))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * warm_cosine(step / steps)
            optimizer.zero_grad()
            total = sum(int(piece.targets.sum()) for piece in chosen)
            for batch in batches(chosen, PASS):
                (self._divergences(batch).sum() / total).backward()
            if self.preserved is not None:
                (settings.preserve * self.preserved.changed()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            tokens += sum(len(piece.ids) for piece in chosen)
            on_step(step + 1, steps)
        return steps, tokens

    def _divergences(self, pieces: Sequence[Piece]) -> Tensor:
        with self._before(), torch.no_grad():
            said = self.learner.reader.logits(pieces)
        return divergences(said, self.learner.reader.logits(pieces))

    def _loss(self, pieces: Sequence[Piece]) -> Tensor:
        return torch.cat([self._divergences(batch) for batch in batches(pieces, PASS)]).mean()

    @torch.no_grad()
    def _measured(self, pieces: Sequence[Piece]) -> float:
        return float(self._loss(pieces))

    @contextmanager
    def _before(self) -> Iterator[None]:
        """The model with its old adapters, and without the new one and its gate."""
        learner = self.learner
        for weights in learner.weights.values():
            weights.detach()
        learner.gate.detach()
        learner.earlier.attach()
        try:
            yield
        finally:
            learner.earlier.detach()
            learner.gate.attach(learner.model)
            for weights in learner.weights.values():
                weights.attach()
