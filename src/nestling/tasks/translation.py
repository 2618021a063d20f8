"""Sentence pairs for translation: readers, a seeded split, and pairs as text that a language model learns from."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nestling.errors import UserError

SENTENCE, TRANSLATION = "Primary_Text", "Translated_Text"
SEPARATOR = " ="


@dataclass(frozen=True)
class Pair:
    """A sentence and its English translation."""

    source: str
    english: str

    @property
    def prompt(self) -> str:
        """What is given when a translation is asked for: the sentence and ` =`."""
        return self.source + SEPARATOR

    @property
    def answer(self) -> str:
        """What goes on from there, with its line end, which is where an answer stops."""
        return f" {self.english}\n"


def read_cldf_pairs(path: str | Path) -> list[Pair]:
    """The examples of a dictionary in CLDF (Cross-Linguistic Data Formats) whose `Translated_Text` is English.

    White space is made single; examples that lack one of the two sentences, and repeated ones, are left out.

    Args:
        path: of `examples.csv`.

    Raises:
        UserError: no such file, a file without the two columns, or one without a pair.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {SENTENCE, TRANSLATION} <= set(reader.fieldnames or ()):
                raise UserError(f"{path} has no columns {SENTENCE} and {TRANSLATION}; give a dictionary's examples")
            rows = [(row[SENTENCE] or "", row[TRANSLATION] or "") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error})") from error
    return _pairs(rows, path)


def read_aligned_pairs(source: Sequence[str | Path], english: Sequence[str | Path]) -> list[Pair]:
    """Line n of the source files with line n of the English ones, as FLORES has them.

    Raises:
        UserError: a file that cannot be read, or different numbers of lines.
    """
    rows: list[tuple[str, str]] = []
    for one, other in zip(source, english, strict=True):
        try:
            left, right = (Path(p).read_text(encoding="utf-8").splitlines() for p in (one, other))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {one} and {other} ({error})") from error
        if len(left) != len(right):
            raise UserError(
                f"{one} has {len(left)} lines and {other} {len(right)}; line n of both must belong together"
            )
        rows += zip(left, right, strict=True)
    return _pairs(rows, ", ".join(map(str, source)))


def split_pairs(pairs: Sequence[Pair], test: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, test): the last `test` pairs of a seeded order, and of the others those with neither sentence in them.

    Raises:
        ValueError: fewer than `test` + 1 pairs.
    """
    if not 1 <= test < len(pairs):
        raise ValueError(f"test is a number of pairs from 1 to {len(pairs) - 1}, not {test}")
    order = list(pairs)
    random.Random(seed).shuffle(order)
    held = order[-test:]
    sources, answers = {p.source for p in held}, {p.english for p in held}
    return [p for p in order[:-test] if p.source not in sources and p.english not in answers], held


def as_text(pairs: Sequence[Pair]) -> str:
    """One line a pair, `sentence = translation`."""
    return "".join(pair.prompt + pair.answer for pair in pairs)


def _pairs(rows: Sequence[tuple[str, str]], where: str | Path) -> list[Pair]:
    clean = [(" ".join(a.split()), " ".join(b.split())) for a, b in rows]
    found = list(dict.fromkeys(Pair(a, b) for a, b in clean if a and b))
    if not found:
        raise UserError(f"{where} holds no sentence with a translation")
    return found
