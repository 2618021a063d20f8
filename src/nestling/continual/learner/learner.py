"""A pre-trained model that goes on learning from the stream of tokens it reads (NL Eq. 71, sections 7.1 and 7.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.continual.component import LearnerComponent, components_of, undone_on_error
from nestling.continual.learner import consolidation
from nestling.continual.learner.average import RunningMean
from nestling.continual.learner.chunk_learning import learn_chunk, score_chunk
from nestling.continual.learner.earlier import EarlierAdapters
from nestling.continual.learner.guards import SpikeGuard
from nestling.continual.learner.levels import make_optimizer, make_weights, resolve
from nestling.continual.learner.observation import Counters, Observation
from nestling.continual.learner.options import Factory, Level, Options, Settings, settings_from
from nestling.continual.learner.weights import LowRankWeights, OnModel, taken_off
from nestling.continual.store import resume
from nestling.continual.store.applying import COPIED, LEARNER, check_free
from nestling.continual.store.fingerprint import base_fingerprint
from nestling.continual.store.memory import Memory
from nestling.continual.store.scope import Scope
from nestling.continual.store.scope_gate import ScopeGate
from nestling.continual.stream.chunks import Stream, check_tokens
from nestling.continual.stream.documents import Document, DocumentLog
from nestling.continual.stream.scoring import Reader, check_context, learning, own_modes
from nestling.continual.study.settings import Study
from nestling.continual.study.studying import Events, Studied, study

C = TypeVar("C", bound=LearnerComponent)


class Learner:
    """Learns from a stream of tokens, level by level: every level by the mean gradient of its own period's tokens.

    The stream is cut into chunks of the fastest level's period, or of `options.chunk`, inside which the weights stand
    still. A chunk is read in pieces of at most `options.piece` tokens, each with up to `context - piece` earlier tokens
    of its document, and its gradient is that of the mean loss over all its targets. Tokens are scored when they come;
    those of a chunk that is not full wait for the rest and are then read again, with gradients. So losses, weights and
    updates do not depend on how tokens are divided into calls (to rounding), and a call that brings whole chunks reads
    each once.

    While attached, the model has the learned weights, for `generate` too. A model takes one learner at a time;
    `detach` gives it its base weights back, to the last bit, and `with learner:` attaches for a while. A caller's
    `no_grad`, `inference_mode` or `autocast` changes nothing. docs/continual.md has the costs.

    Args:
        model: any causal language model of transformers, with its base weights.
        levels: see `nestling.continual.learner.levels.resolve`; None takes the model's own levels, or where it has none
            all its MLPs, as `nestling learn` does. Parameters of no level stay as they are.
        optimizer: a name of `nestling.optim.NAMES`, or what makes an optimizer from a list of parameters (its rate is
            its own), for the levels that name none.
        lr: rate of the fastest level; 1e-4 is where to start with AdamW (see `nestling.optim.build` for the others).
        rate_exponent: a level's rate is lr * (period / fastest period)^rate_exponent; below 0 slow levels move less.
        context: tokens that a piece is read with at most, its own included.
        options: everything else.

    Raises:
        ValueError: settings that do not fit the model or each other, or a model that another learner is on.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from nestling.continual import Learner
        >>> shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> learner = Learner(LlamaForCausalLM(LlamaConfig(vocab_size=99, **shape)), lr=1e-3)
        >>> len(learner.observe([1, 2, 3] * 100).updated)  # one level, after its first 256 tokens
        1
    """

    @own_modes()
    def __init__(
        self,
        model: PreTrainedModel,
        levels: Mapping[str, Level | int] | None = None,
        optimizer: str | Factory = "adamw",
        *,
        lr: float,
        rate_exponent: float = -0.5,
        context: int = 512,
        options: Options | None = None,
    ) -> None:
        check_free(model, None)
        options = options or Options()
        self.model = model
        self.settings = Settings(resolve(model, levels), optimizer, lr, rate_exponent, context, options)
        self.stream = Stream(self.settings.chunk, options.piece or max(1, context // 2), context)
        check_context(model, context)
        self.fingerprint = base_fingerprint(model)
        self.reader = Reader(model, options.bfloat16)
        self.gate = ScopeGate()
        self.weights = make_weights(model, self.settings, self.gate)
        self.earlier = EarlierAdapters(model, self.gate.beside)
        self.on_model: list[OnModel] = [*self.weights.values(), self.earlier]
        self.components: dict[str, LearnerComponent] = {}
        self.parameters = {name: weights.learned for name, weights in self.weights.items()}
        self.vocabulary = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
        try:
            self.start_afresh()
        except BaseException:
            for weights in self.weights.values():
                weights.detach()
            raise
        self.attached = True
        setattr(model, LEARNER, self)

    @own_modes()
    def start_afresh(self) -> None:
        """Forget all but the weights: optimizers, pending tokens, replay, gate, guard, documents and counters."""
        self._check_live()
        options = self.settings.options
        self.components = {name: kind(value, self) for name, (kind, value) in components_of(options).items()}
        apart = [name for name, component in self.components.items() if component.reads_apart]
        with learning(self.model, self.everything):
            self.optimizer = make_optimizer(self.settings, self.weights, apart)
        self.stream = Stream(self.stream.chunk, self.stream.size, self.stream.context)
        self.guard = SpikeGuard(options.spike, options.patience, math.log(self.vocabulary))
        self.log = DocumentLog()
        self.counters = Counters()
        self.studies: list[dict[str, Any]] = []
        self.refused = 0

    @own_modes()
    def observe(
        self,
        tokens: Int[Tensor, " n"] | Sequence[int],
        *,
        document: Document | None = None,
        scored: Bool[Tensor, " n"] | Sequence[bool] | None = None,
    ) -> Observation:
        """Score tokens, then learn from them.

        Args:
            tokens: the next ones of the stream, any number.
            document: which document they belong to; another one than before ends that one. None goes on with the
                present document.
            scored: which of them are targets, for example the answers alone; None is all. The others are read only,
                but count for the periods.

        Returns:
            the losses before learning, and what was updated. A chunk whose loss or gradient is not finite, or whose
            loss is a spike, is not learned from: weights, optimizers and periods are then as before it, its tokens are
            counted as skipped, a note says so, and a `LearningWarning` is given.

        Raises:
            ValueError: tokens that are no whole numbers or not in the vocabulary, `scored` of another length, or a
                memory with a scope; nothing has changed then.
            LearningDivergedError: the weights themselves are no longer finite.
            RuntimeError: the learner is detached.

        What interrupts a call (Ctrl-C, no memory left) leaves it as before the present chunk, unless it comes while the
        levels step: then go on from the last saved memory.
        """
        self.check_at_work()
        self._check_everywhere()
        ids, targets = check_tokens(tokens, scored, self.vocabulary)
        if not len(ids):
            return Observation(torch.empty(0), notes=("no tokens: nothing was learned",))
        if not self.log.is_present(document):
            self.log.end(finished=False)
            self.stream.end_document()
            self.log.begin(document)
        losses = torch.full((len(ids),), math.nan, dtype=torch.float32)
        updated: list[str] = []
        notes: list[str] = []
        done = 0
        while done < len(ids):
            part = slice(done, done + min(self.stream.room, len(ids) - done))
            new = part.stop - part.start
            with self.stream.undone_on_error(), undone_on_error(self.components.values()):
                self.stream.add(ids[part], targets[part])
                full = not self.stream.room
                losses[part] = learn_chunk(self, new, updated, notes) if full else score_chunk(self, new)
            self.log.add(losses[part])
            self.counters.tokens += new
            done = part.stop
        return Observation(losses, tuple(updated), tuple(notes))

    @own_modes()
    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the running mean of its weights (`Options.average`) for a `with` block, as a memory gives it;
        with the weights as they are where there is no such mean.

        Raises:
            RuntimeError: the learner is detached, or the mean is on the model already.
        """
        self.check_at_work()
        average = self.component(RunningMean)
        with nullcontext() if average is None else average.in_place():
            yield

    def base_weights(self) -> AbstractContextManager[None]:
        """The model as it was before it learned, for a `with` block."""
        return taken_off(self.on_model[::-1])  # they come back in their order, on which a sum depends

    def end_document(self) -> None:
        """The present document is finished: what comes next has nothing before it. Pending tokens stay pending."""
        self.log.end(finished=True)
        self.stream.end_document()

    @own_modes()
    def apply(self) -> None:
        """Attach: give the model what was learned.

        Raises:
            ValueError: another learner is attached to the model.
        """
        if self.attached:
            return
        check_free(self.model, self)
        for weights in self.on_model:
            weights.attach()
        self.attached = True
        self.set_scope(self.scope)
        setattr(self.model, LEARNER, self)

    @own_modes()
    def detach(self) -> None:
        """Give the model its base weights back, to the last bit; what was learned stays here."""
        if not self.attached:
            return
        self._check_live()
        for weights in self.on_model:
            weights.detach()
        self.gate.detach()
        self.attached = False
        delattr(self.model, LEARNER)

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        """A copy of the model has no learner, but knows that it was copied from one that had."""
        if id(self.model) in memo:
            return COPIED
        raise TypeError("a learner is not copied; take its memory() and Learner.restore it on another base model")

    def __enter__(self) -> Self:
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @own_modes()
    def consolidate(
        self,
        *,
        fast: Sequence[str] | None = None,
        retention: float = 0.5,
        steps: int = 20,
        lr: float | None = None,
        rows: int = 2,
        held_out: float = 0.25,
        seed: int = 0,
    ) -> consolidation.Consolidation:
        """Sleep: the slower levels learn to say what the model says now, and the fast ones forget. A running mean
        begins anew from what the weights are then.

        See `nestling.continual.learner.consolidation.consolidate`.
        """
        self.check_at_work()
        self._check_everywhere()
        done = consolidation.consolidate(
            self, fast=fast, retention=retention, steps=steps, lr=lr, rows=rows, held_out=held_out, seed=seed
        )
        if self.counters.consolidations >= 0:
            self.counters.consolidations += done.applied
        return done

    @own_modes()
    def study(
        self,
        texts: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        settings: Study | None = None,
        events: Events | None = None,
    ) -> Studied:
        """Learn texts, by name, until questions made of them are answered; see
        `nestling.continual.study.studying.study`."""
        return study(self, texts, tokenizer, settings or Study(), events or Events())

    @own_modes()
    def memory(self) -> Memory:
        """What was learned, and all that is needed to go on exactly from here.

        Taken inside a block of `averaged` it is for use only: the running mean, and nothing to go on with.
        """
        return resume.to_memory(self)

    @own_modes()
    def load(self, memory: Memory) -> None:
        """Go on where `memory` was taken. A memory without `tensors` gives its differences only: a fresh start of
        optimizers and counters from what it knows.

        Raises:
            ValueError: a memory of another base model, of other levels, or one that does not fit together.
        """
        self._check_live()
        resume.load(self, memory)

    @classmethod
    def of(cls, model: PreTrainedModel, made: Settings) -> Self:
        """The learner with these settings.

        Raises:
            ValueError: as of `Learner` itself.
        """
        more = {"lr": made.lr, "rate_exponent": made.rate_exponent}
        return cls(model, made.levels, made.optimizer, context=made.context, options=made.options, **more)

    @classmethod
    def restore(cls, model: PreTrainedModel, memory: Memory) -> Learner:
        """The learner that `memory` was taken of.

        Args:
            model: with its base weights.
            memory: of a learner whose optimizers were all named.

        Raises:
            ValueError: as `load`, or an optimizer that was a function.
        """
        if "learner" not in memory.settings:
            raise ValueError("this memory has no learner's settings: make a Learner and call its load")
        check_free(model, None)
        resume.check_model(memory, base_fingerprint(model))
        learner = cls.of(model, settings_from(memory.settings["learner"]))
        try:
            learner.load(memory)
        except BaseException:
            learner.detach()
            raise
        return learner

    def check_at_work(self) -> None:
        """Raises RuntimeError where the learner is detached, or the running mean is on the model."""
        if not self.attached:
            raise RuntimeError("this learner is detached from its model; call apply() first, or use `with learner:`")
        self._check_live()

    def _check_live(self) -> None:
        if self.shows_average:
            raise RuntimeError("the running mean is on the model; leave the block of averaged() first")

    @property
    def shows_average(self) -> bool:
        """Whether the model has the running mean, inside a block of `averaged`."""
        return (average := self.component(RunningMean)) is not None and average.read

    @property
    def mean_periods(self) -> dict[str, float]:
        """Tokens between two updates of every level, on average where it is adaptive; NaN before its first one."""
        return {level.name: level.mean_period * self.stream.chunk for level in self.optimizer.levels}

    @property
    def scope(self) -> Scope | None:
        """Where speaks what is learned now; None is everywhere. What was studied earlier has its own, `earlier`."""
        return self.gate.scope

    def set_scope(self, scope: Scope | None) -> None:
        """Speak from now on where a text names something of this; None is everywhere. Raises as `check_scope`."""
        self.check_scope(scope)
        self.gate.scope = scope
        if scope is None:
            self.gate.detach()
        elif self.attached:
            self.gate.attach(self.model)

    def check_scope(self, scope: Scope | None) -> None:
        """Raises ValueError for a scope, and a level of full weights, which act everywhere."""
        if scope is not None and not all(isinstance(each, LowRankWeights) for each in self.weights.values()):
            raise ValueError("a memory with a scope has levels of low rank alone")

    def _check_everywhere(self) -> None:
        if self.scope is not None:
            raise ValueError(
                "this learner's memory was studied, and speaks only where a text names what it was taught: what is "
                "read elsewhere would not be learned; study the text, or read it into another memory"
            )

    def component(self, kind: type[C]) -> C | None:
        """The one of this kind, if the options ask for it."""
        return next((each for each in self.components.values() if isinstance(each, kind)), None)

    @property
    def everything(self) -> list[Tensor]:
        """All learned tensors."""
        return [p for own in self.parameters.values() for p in own]

    def weights_replaced(self) -> None:
        """The learned weights are others than before, not by learning from a chunk."""
        for component in self.components.values():
            component.replaced()
