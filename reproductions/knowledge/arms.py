"""Ways to have read a set of documents before being asked about them."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Options
from nestling.continual.store.records import DocumentRecord
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import Reader
from nestling.continual.stream.tokenizing import own_beginning
from nestling.continual.study.settings import Study
from nestling.continual.study.sleeping import Sleep, sleep
from nestling.evaluation.choices import encode
from nestling.evaluation.knowledge import Context
from nestling.tasks.knowledge import KnowledgeQuestion
from nestling.tasks.text import Document
from reproductions.harness.lora import add_lora

NEAREST = 3
"""Passages that are put before a question."""
RANK = 16
Named = tuple[str, Tensor]
"""A document: its name, its tokens."""


@dataclass(frozen=True)
class Arm:
    """One way.

    Attributes:
        before: what stands before a question: "nothing", "everything" or the "nearest" documents.
        learned: what learns: "nothing", a `Learner` ("levels", of low rank "rank", with exercises "study", in two
            studies that it sleeps over "sleep"), or peft's "lora".
        passes: over the documents.
    """

    before: Literal["nothing", "everything", "nearest"] = "nothing"
    learned: Literal["nothing", "levels", "rank", "lora", "study", "sleep"] = "nothing"
    passes: int = 1


ARMS = {
    "frozen": Arm(),
    "context": Arm("everything"),
    "retrieval": Arm("nearest"),
    "learn": Arm(learned="levels"),
    "learn, 10 passes": Arm(learned="levels", passes=10),
    "learn, rank 16, 10 passes": Arm(learned="rank", passes=10),
    "lora, 10 passes": Arm(learned="lora", passes=10),
    "study": Arm(learned="study"),
    "study and retrieval": Arm("nearest", learned="study"),
    "two studies and sleep": Arm(learned="sleep"),
}
RATES = {"levels": 3e-4, "rank": 1e-3, "lora": 1e-3}
"""Of what learns, not tuned."""


@dataclass(frozen=True)
class Taught:
    """What learning documents made of a model.

    Attributes:
        model: to be asked.
        nbytes: of what is kept of them.
        seconds: that it took.
    """

    model: PreTrainedModel
    nbytes: int
    seconds: float


def teach(
    arm: Arm,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    seed: int,
) -> Taught:
    """Have a copy of the model learn documents.

    Args:
        arm: how; what stands before a question is not looked at.
        base: unchanged.
        tokenizer: its own.
        documents: in order.
        seed: of what is drawn.
    """
    start = time.perf_counter()
    model, nbytes = base, 0
    if arm.learned in ("study", "sleep"):
        model = copy.deepcopy(base)
        nbytes = _by_study(model, tokenizer, documents, seed, arm.learned == "sleep")
    elif arm.learned != "nothing":
        model = copy.deepcopy(base)
        texts = [(d.name, torch.tensor(own_beginning(tokenizer) + encode(tokenizer, d.text))) for d in documents]
        passes = [_ordered(texts, number, seed) for number in range(arm.passes)]
        nbytes = _by_lora(model, passes, seed) if arm.learned == "lora" else _by_learner(arm, model, passes, seed)
    return Taught(model.eval(), nbytes, time.perf_counter() - start)


def before(arm: Arm, documents: Sequence[Document]) -> tuple[Context, int]:
    """What stands before each question, and the bytes that are kept for it."""
    kept = sum(len(document.text.encode()) for document in documents)
    if arm.before == "nearest":
        return nearest(documents), kept
    return (_all_of(documents), kept) if arm.before == "everything" else (_nothing, 0)


def nearest(documents: Sequence[Document], count: int = NEAREST) -> Context:
    """The documents most like a question by their words (TF-IDF, cosine), most like it last, where it is read last."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    known = vectorizer.fit_transform([document.text for document in documents])

    def context(question: KnowledgeQuestion) -> str:
        likeness = (known @ vectorizer.transform([question.prompt]).T).toarray()[:, 0]
        best = sorted(range(len(documents)), key=lambda i: likeness[i])[-count:]
        return "\n\n".join(documents[i].text for i in best)

    return context


def _nothing(_: KnowledgeQuestion) -> str:
    return ""


def _all_of(documents: Sequence[Document]) -> Context:
    text = "\n\n".join(document.text for document in documents)
    return lambda _: text


def _by_learner(arm: Arm, model: PreTrainedModel, passes: Sequence[Sequence[Named]], seed: int) -> int:
    """As `nestling learn` does, document by document."""
    options = Options(seed=seed, rank=RANK if arm.learned == "rank" else None)
    learner = Learner(model, lr=RATES[arm.learned], options=options)
    for name, ids in (document for documents in passes for document in documents):
        learner.observe(ids, document=DocumentRecord(name, "", 0, False, 0.0, ""))
        learner.end_document()
    return learner.memory().nbytes


def _by_study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], seed: int, sleeps: bool
) -> int:
    """As `nestling study` does; one half of the documents after the other, and `nestling sleep`, where it sleeps."""
    learner = Learner(model, lr=RATES["rank"], options=Options(seed=seed, rank=RANK))
    half = len(documents) // 2 if sleeps else 0
    for part in filter(None, (documents[:half], documents[half:])):
        learner.study({d.name: d.text for d in part}, tokenizer, Study(seed=seed))
    if sleeps:
        sleep(learner, {d.name: d.text for d in documents}, tokenizer, Sleep(seed=seed))
    return learner.memory().nbytes


def _by_lora(model: PreTrainedModel, passes: Sequence[Sequence[Named]], seed: int) -> int:
    """Eight documents a step, AdamW."""
    add_lora(model, RANK, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, reader = torch.optim.AdamW(parameters, lr=RATES["lora"], betas=(0.9, 0.95)), Reader(model)
    for documents in passes:
        pieces = [Piece(ids, 0, torch.ones(len(ids), dtype=torch.bool)) for _, ids in documents]
        for begin in range(0, len(pieces), 8):
            reader.losses(pieces[begin : begin + 8]).mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return sum(p.numel() * p.element_size() for p in parameters)


def _ordered(documents: Sequence[Named], number: int, seed: int) -> list[Named]:
    """As they are in the first pass, in another order in each later one."""
    if number == 0:
        return list(documents)
    generator = torch.Generator().manual_seed(1000 * seed + number)
    return [documents[i] for i in torch.randperm(len(documents), generator=generator).tolist()]
