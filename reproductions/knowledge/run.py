"""What a model knows of documents that it has read: closed book, with them before its eyes, or having learned them.

    python -m reproductions knowledge --model PATH --wikitext FILE --lambada FILE [--people 40] [--arms ARM ...]

The documents are of an invented world (`nestling.tasks.knowledge`), another one for every seed, so that nobody can have
known it. Every kind of question is put by likelihood among ten answers of the same world, and questions are also
answered in the model's own words. What was known before is WikiText's loss and LAMBADA's last words.

`--dictionary ENTRIES SENSES`, `--book FILE` and `--stories FILE` are real texts in place of the world: word meanings of
a language that the model does not know, sentences of a book up to a name, stories of bAbI.

Another user's questions are those of another world: what was read must not answer them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.continual.learn_documents import frozen_loss
from nestling.continual.stream.scoring import read_frozen
from nestling.evaluation.choices import ask_last_words, encode
from nestling.evaluation.knowledge import absence_auroc, ask_knowledge, knowledge_scores
from nestling.tasks.knowledge import (
    KnowledgeQuestion,
    Material,
    ask_world,
    dictionary_material,
    make_world,
    name_material,
    story_material,
)
from nestling.tasks.text import Document, read_documents, strip_gutenberg
from nestling.training.tokenization import byte_tokenizer
from reproductions.harness.command import Reproduction
from reproductions.harness.machine import add_machine_arguments
from reproductions.harness.pretrained import given_model
from reproductions.harness.rows import Row, Rows
from reproductions.harness.tiny import tiny_llama
from reproductions.knowledge.arms import ARMS, Arm, Taught, before, teach
from reproductions.knowledge.report import make_report
from reproductions.reading.experiment import Judges, make_judges

SEEDS = (0, 1, 2)
OTHER = 1000
"""Added to a seed: the world of another user."""
CHANGES = 20
WORDS = 12
"""Tokens of an answer in the model's own words."""


class Experiment:
    """All arms on one model.

    Args:
        model: pre-trained; what learns is a copy.
        tokenizer: its own.
        name: of the model, for the results.
        judges: of what was known before.
        rows: finished ones.
        people: of the invented world.
        items: questions of a real text.
        chat: put questions as a conversation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        judges: Judges,
        rows: Rows,
        people: int,
        items: int,
        chat: bool,
    ) -> None:
        self.model, self.tokenizer, self.name, self.judges, self.rows = model, tokenizer, name, judges, rows
        self.people, self.items, self.chat = people, items, chat
        self.last: tuple[object, Taught] | None = None

    def world(self, arm: str, seed: int) -> Row:
        """An arm on the world of a seed."""
        world = make_world(self.people, changes=min(CHANGES, self.people // 2), seed=seed)
        other = make_world(self.people, seed=seed + OTHER)
        strange = ask_world(other, ["question"])
        material = Material(world.documents, tuple(ask_world(world)))
        return self.measured(arm, "world", f"{self.people} people", seed, material, strange)

    def measured(
        self,
        arm: str,
        source: str,
        name: str,
        seed: int,
        material: Material,
        strange: Sequence[KnowledgeQuestion] = (),
    ) -> Row:
        """An arm on documents, asked about them and, where there are such, questions of nobody's concern."""
        key = {"model": self.name, "source": source, "name": name, "arm": arm, "seed": seed, "chat": self.chat}

        def make() -> Row:
            row = self._asked(ARMS[arm], self._taught(ARMS[arm], material, seed), material, strange)
            about = ", ".join(f"{kind} {own['accuracy']:.2f}" for kind, own in row["kinds"].items())
            print(f"{source} {name}, {arm}, seed {seed}: {about} in {row['seconds']:.0f} s", flush=True)
            return row

        return self.rows.get(key, make)

    def _taught(self, arm: Arm, material: Material, seed: int) -> Taught:
        """The last one, where only what stands before a question is another."""
        way = (arm.learned, arm.passes, material.documents, seed)
        if self.last is None or self.last[0] != way:
            self.last = (way, teach(arm, self.model, self.tokenizer, material.documents, seed))
        return self.last[1]

    def _asked(self, arm: Arm, found: Taught, material: Material, strange: Sequence[KnowledgeQuestion]) -> Row:
        ask = {"chat": self.chat, "words": WORDS}
        context, kept = before(arm, material.documents)
        answers = ask_knowledge(found.model, self.tokenizer, material.questions, context, **ask)
        row: Row = {"kinds": {kind: asdict(own) for kind, own in knowledge_scores(answers).items()}}
        auroc = absence_auroc(answers)
        row["absence_auroc"] = None if math.isnan(auroc) else auroc
        if strange:
            others = ask_knowledge(found.model, self.tokenizer, strange, context, chat=self.chat)
            row["other user"] = knowledge_scores(others)["all"].accuracy
        row |= self._losses(found.model, material.documents) | self._judged(found.model)
        tokens = sum(len(encode(self.tokenizer, document.text)) for document in material.documents)
        return row | {"bytes": found.nbytes + kept, "seconds": round(found.seconds, 1), "tokens": tokens}

    def _losses(self, model: PreTrainedModel, documents: Sequence[Document]) -> Row:
        """Of the documents' tokens, each document by itself and at most its first 2,048 tokens."""
        ids = [torch.tensor(encode(self.tokenizer, document.text)[:2048]) for document in documents]
        found = torch.cat([read_frozen(model, own)[1:] for own in ids if len(own) > 1])
        return {"mean_loss": float(found.mean()), "median_loss": float(found.median())}

    def _judged(self, model: PreTrainedModel) -> Row:
        row: Row = {}
        if self.judges.wikitext is not None:
            row["wikitext"] = frozen_loss(model, self.judges.wikitext)
        if self.judges.lambada:
            row["lambada"] = asdict(ask_last_words(model, self.tokenizer, self.judges.lambada))
        return row


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every arm on every source and seed.

    Raises:
        SystemExit: no model.
    """
    model, tokenizer = given_model(args)
    judges = make_judges(tokenizer, args.wikitext, args.lambada, (), args.wikitext_tokens, args.lambada_items)
    made = Experiment(model, tokenizer, Path(args.model).name, judges, rows, args.people, args.items, args.chat)
    sources = real_sources(args)
    for seed in args.seeds:
        for arm in args.arms:
            for source, name, material in sources:
                made.measured(arm, source, name, seed, material)
            if not sources:
                made.world(arm, seed)


def real_sources(args: argparse.Namespace) -> list[tuple[str, str, Material]]:
    """The real texts that were named: kind, name, documents with their questions."""
    found = []
    if args.dictionary:
        entries, senses = args.dictionary
        found.append(("dictionary", args.language, dictionary_material(entries, senses, args.language, args.items)))
    if args.book:
        book = read_documents(args.book)[0]
        text = strip_gutenberg(book.text)[: args.characters]
        found.append(("book", args.book.stem, name_material(Document(args.book.stem, text), args.items)))
    if args.stories:
        found.append(("stories", args.stories.stem, story_material(args.stories, args.items)))
    return found


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Every arm on a tiny random model and a world of three people."""
    model, tokenizer = tiny_llama(1), byte_tokenizer()
    made = Experiment(model, tokenizer, "tiny", Judges(), rows, 3, 4, False)
    for arm in ARMS:
        made.world(arm, 0)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The model, what is read, how it is read."""
    parser.add_argument("--model", help="Hugging Face folder or name, or a GGUF file")
    parser.add_argument("--people", type=int, default=40, help="of the invented world")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--chat", action="store_true", help="put questions as a conversation")
    parser.add_argument("--dictionary", nargs=2, type=Path, metavar="FILE", help="entries and senses, CLDF")
    parser.add_argument("--language", default="Kalamang", help="of --dictionary")
    parser.add_argument("--book", type=Path)
    parser.add_argument("--characters", type=int, default=60_000, help="read of --book")
    parser.add_argument("--stories", type=Path, help="a file of bAbI")
    parser.add_argument("--items", type=int, default=100, help="questions of a real text")
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--wikitext-tokens", type=int, default=4096)
    parser.add_argument("--lambada", type=Path)
    parser.add_argument("--lambada-items", type=int, default=100)
    add_machine_arguments(parser)


REPRODUCTION = Reproduction(run, make_report, quick, arguments)
