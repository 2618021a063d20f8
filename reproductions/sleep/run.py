"""Sleep: the adapters of several studies made one, and what of their knowledge is left.

    python -m reproductions sleep --model PATH --wikitext FILE --book FILE [--people 12] [--studies 2]

Invented worlds (`nestling.tasks.knowledge`) are studied one after the other into one memory, each an adapter. Then the
memory sleeps, with exercises of the texts and with what the model writes for itself, or without the one or the other.
Against it stand a study of all texts together, for as many steps as the sleep took, and the memory as it was.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.continual import Learner, Memory, Options, Rehearsal
from nestling.continual.learn_documents import frozen_loss
from nestling.continual.study.preparing import SHAPE
from nestling.continual.study.settings import Study
from nestling.continual.study.sleeping import Sleep, sleep
from nestling.continual.study.studying import Events, Step
from nestling.evaluation.choices import encode
from nestling.evaluation.knowledge import ask_knowledge, knowledge_scores
from nestling.tasks.knowledge import World, ask_world, make_world
from nestling.tasks.text import read_documents, strip_gutenberg
from nestling.training.tokenization import byte_tokenizer
from reproductions.harness.command import Reproduction
from reproductions.harness.machine import add_machine_arguments
from reproductions.harness.pretrained import given_model
from reproductions.harness.rows import Row, Rows
from reproductions.harness.tiny import tiny_llama
from reproductions.sleep.report import ARMS, make_report

ATTRIBUTES = ("town", "job", "pet", "craft")
KINDS = ("same words", "paraphrase", "question", "reversed", "two hops")
RANK = 16
READ = 4096
"""Tokens of a text that is foreseen."""
SLEEPS = {
    "sleep": Sleep(),
    "without dreams": Sleep(dreams=0),
    "dreams alone": Sleep(dreams=8),
    "replay": Sleep(dreams=0, exercises=False),
}


@dataclass(frozen=True)
class Setting:
    """What all arms share.

    Attributes:
        model: pre-trained; what learns is a copy.
        tokenizer: its own.
        name: of the model.
        texts: foreseen to see what was known before, by name.
        people: of every world.
        studies: worlds.
        work: where memories are kept meanwhile.
        rounds: of a study.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    texts: Mapping[str, Tensor]
    people: int
    studies: int
    work: Path
    rounds: int = Study.rounds


class Experiment:
    """All arms.

    Args:
        setting: of all.
        rows: finished ones.
    """

    def __init__(self, setting: Setting, rows: Rows) -> None:
        self.setting, self.rows = setting, rows

    def arm(self, arm: str, seed: int) -> Row:
        """One way to go on from the studies of a seed."""
        given = self.setting
        key = {"model": given.name, "arm": arm, "seed": seed, "people": given.people, "studies": given.studies}
        return self.rows.get(key, lambda: self._made(arm, seed))

    def worlds(self, seed: int) -> list[World]:
        """Those that are studied."""
        given = self.setting
        seeds = [given.studies * seed + number for number in range(given.studies)]
        return [make_world(given.people, attributes=ATTRIBUTES, seed=each) for each in seeds]

    def _made(self, arm: str, seed: int) -> Row:
        worlds, row = self.worlds(seed), Row()
        if arm == "study of all":
            steps = self.arm("sleep", seed)["steps"]
            learner = self._learner(seed)
            self._study(learner, _texts(*worlds), seed, steps)
        else:
            learner = Learner.restore(copy.deepcopy(self.setting.model), self._studied(seed))
            if arm in SLEEPS:
                texts = {} if arm == "dreams alone" else _texts(*worlds)
                slept = sleep(learner, texts, self.setting.tokenizer, SLEEPS[arm])
                row |= {"steps": slept.steps, "tokens": slept.tokens, "seconds": round(slept.seconds, 1)}
                row |= {"cleared": slept.cleared, "after": slept.after, "dreams": [slept.dreams, slept.dreamt]}
        row |= {"bytes": learner.memory().nbytes, "worlds": [self._asked(learner, world) for world in worlds]}
        row["losses"] = {name: frozen_loss(learner.model, ids) for name, ids in self.setting.texts.items()}
        known = ", ".join(f"{world['question']:.2f}" for world in row["worlds"])
        print(f"{arm}, seed {seed}: questions of each study {known}", flush=True)
        return row

    def _studied(self, seed: int) -> Memory:
        """What the studies of a seed made."""
        given = self.setting
        place = given.work / f"studied-{seed}-{given.people}-{given.studies}.memory"
        if not place.is_file():
            given.work.mkdir(parents=True, exist_ok=True)
            learner = self._learner(seed)
            for world in self.worlds(seed):
                self._study(learner, _texts(world), seed)
            learner.memory().save(place)
        return Memory.load(place)

    def _learner(self, seed: int) -> Learner:
        options = Options(rank=RANK, seed=seed, rehearsal=Rehearsal(*SHAPE, weight=0.0))
        return Learner(copy.deepcopy(self.setting.model), lr=1e-3, options=options)

    def _study(self, learner: Learner, texts: Mapping[str, str], seed: int, steps: int | None = None) -> None:
        """To its end, or for so many steps."""
        taken = 0

        def count(_: Step) -> None:
            nonlocal taken
            taken += 1
            if taken == steps:
                raise _Enough

        settings = Study(seed=seed, rounds=self.setting.rounds)
        with suppress(_Enough):
            learner.study(texts, self.setting.tokenizer, settings, Events(step=count))

    def _asked(self, learner: Learner, world: World) -> dict[str, float]:
        found = knowledge_scores(ask_knowledge(learner.model, self.setting.tokenizer, ask_world(world, KINDS)))
        return {kind: scores.accuracy for kind, scores in found.items()}


class _Enough(Exception):
    """As many steps as the sleep took."""


def _texts(*worlds: World) -> dict[str, str]:
    return {f"{n}/{d.name}": d.text for n, world in enumerate(worlds) for d in world.documents}


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every arm and seed.

    Raises:
        SystemExit: no model.
    """
    model, tokenizer = given_model(args)
    texts: dict[str, Tensor] = {}
    readers: dict[str, Callable[[str], str]] = {"WikiText": str, "book": strip_gutenberg}
    for name, path in (("WikiText", args.wikitext), ("book", args.book)):
        if path is not None:
            text = readers[name](read_documents(path)[0].text)[: 8 * READ]
            texts[name] = Tensor(encode(tokenizer, text)[:READ]).long()
    given = Setting(model, tokenizer, Path(args.model).name, texts, args.people, args.studies, args.folder / "work")
    made = Experiment(given, rows)
    for seed in args.seeds:
        for arm in args.arms:
            made.arm(arm, seed)


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Every arm on a tiny random model and two worlds of two people."""
    given = Setting(tiny_llama(1), byte_tokenizer(), "tiny", {}, 2, 2, args.folder / "work", rounds=1)
    made = Experiment(given, rows)
    for arm in ARMS:
        made.arm(arm, 0)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the worlds, the arms."""
    parser.add_argument("--model", help="Hugging Face folder or name, or a GGUF file")
    parser.add_argument("--people", type=int, default=12, help="of every world")
    parser.add_argument("--studies", type=int, default=2, help="worlds, studied one after the other")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--book", type=Path, help="another text that was known before")
    add_machine_arguments(parser)


REPRODUCTION = Reproduction(run, make_report, quick, arguments)
