"""Text classification as a stream of tasks of new classes: CLINC150, DBpedia-70, any CSV of text and label."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nestling.errors import UserError

Part = Literal["validation", "test"]


@dataclass(frozen=True)
class LabelledText:
    """A text and the number of its class."""

    text: str
    label: int


@dataclass(frozen=True)
class ClassificationSet:
    """Texts of named classes, split in three.

    Attributes:
        name: of the set.
        labels: what a model answers for each class, by its number; all different.
        train, validation, test: without texts in common.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[LabelledText, ...]
    validation: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]


@dataclass(frozen=True)
class ClassTask:
    """One task of a stream: the texts of some classes, in the order they are learned in.

    Attributes:
        classes: their numbers.
        train: what is learned from, each once.
        test: what is asked.
    """

    classes: tuple[int, ...]
    train: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]


def read_clinc150(path: str | Path) -> ClassificationSet:
    """CLINC150 (Larson et al. 2019): 150 intents with 100 training, 20 validation and 30 test texts each.

    The out-of-scope texts are left out. An intent's label is its name with spaces for underscores ("report lost card").
    Test and validation texts that are also training texts are left out.

    Args:
        path: data_full.json, or its folder.

    Raises:
        UserError: no such file, or one of another layout.
    """
    file = Path(path) / "data_full.json" if Path(path).is_dir() else Path(path)
    try:
        parts = json.loads(_read(file))
        rows = {part: [(str(text), str(name)) for text, name in parts[part]] for part in ("train", "val", "test")}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is not CLINC150's data_full.json (lists train, val and test of [text, intent]): {error!r}"
        ) from error
    return _numbered("clinc150", {name: name.replace("_", " ") for _, name in rows["train"]}, rows)


def read_dbpedia70(path: str | Path, seed: int = 0) -> ClassificationSet:
    """DBpedia's second-level classes from files without a head whose lines are `l1,l2,text`.

    All CSV files of a folder are pooled and split anew (see `split_rows`). A class's label is the second column: its
    name where the files hold names (underscores and inner capitals made spaces), else its number, "31", as a word: the
    numbers say nothing of what the class is about, so a model cannot know an answer before it has learned it.

    Args:
        path: the folder, or one file.
        seed: of the split.

    Raises:
        UserError: no such file, no line, or a line that has not three columns.
    """
    root = Path(path)
    files = sorted(root.glob("*.csv")) if root.is_dir() else [root]
    if not files:
        raise UserError(f"{root} has no CSV file; give DBpedia's folder or file of lines l1,l2,text")
    pairs = []
    for file in files:
        for number, row in _csv_rows(file):
            if len(row) != 3:
                raise UserError(f"{file}, line {number}: {len(row)} columns in place of l1,l2,text")
            pairs.append((row[2], row[1]))
    return _numbered("dbpedia70", {name: _spaced(name) for _, name in pairs}, split_rows(pairs, seed))


def read_csv(path: str | Path, seed: int = 0) -> ClassificationSet:
    """Any set with the columns text and label in its first line (others are passed over), split by `split_rows`.

    A label stands for itself, with underscores and inner capitals made spaces.

    Raises:
        UserError: no such file, no columns text and label, a line of another length, or fewer than two classes.
    """
    file = Path(path)
    rows = _csv_rows(file)
    _, head = next(rows, (0, []))
    if not {"text", "label"} <= set(head):
        raise UserError(f"{file} has no columns text and label: its first line is {','.join(head)[:80]!r}")
    pairs = []
    for number, row in rows:
        if len(row) != len(head):
            raise UserError(f"{file}, line {number}: {len(row)} columns where the first line has {len(head)}")
        pairs.append((row[head.index("text")], row[head.index("label")].strip()))
    return _numbered(file.stem, {name: _spaced(name) for _, name in pairs}, split_rows(pairs, seed))


def split_rows(pairs: Iterable[tuple[str, str]], seed: int) -> dict[str, list[tuple[str, str]]]:
    """Own split of a set that has none: of every class a fifth for the test and a fifth for validation.

    A class of n different texts gives max(1, n // 5) to the test and, from three texts on, as many to validation.
    Classes of one text are left out, and so is every repetition of a text.

    Args:
        pairs: text and label.
        seed: of the shuffle before the cut.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for text, label in pairs:
        if text not in seen:
            texts[label].append(text)
        seen.add(text)
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for label, own in sorted(texts.items()):
        if len(own) < 2:
            continue
        random.Random(f"split {seed} {label}").shuffle(own)
        fifth = max(1, len(own) // 5)
        validation = fifth if len(own) > 2 else 0
        cuts = {"test": own[:fifth], "val": own[fifth : fifth + validation], "train": own[fifth + validation :]}
        for part, chosen in cuts.items():
            parts[part].extend((text, label) for text in chosen)
    return parts


def class_tasks(
    data: ClassificationSet,
    size: int,
    seed: int,
    *,
    part: Part = "test",
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> list[ClassTask]:
    """Cut the classes into tasks of `size`, the last one taking what remains.

    The order of the classes and the choice of the texts depend on the seed and on the part, so that settings chosen
    with `part="validation"` were chosen on another order and on other questions. A class that has no text to ask in
    that part is left out.

    Args:
        data: the set.
        size: classes in a task.
        seed: of the order of classes, the choice of texts, and the order of texts inside a task.
        part: which texts are asked.
        train_limit, test_limit: texts of a class; None takes all.

    Raises:
        ValueError: a size or limit below 1, or a set without a class that can be learned and asked.
    """
    for name, value in (("size", size), ("train_limit", train_limit), ("test_limit", test_limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    generator = random.Random(f"{part} {seed}")
    train, asked = _by_class(data.train), _by_class(data.test if part == "test" else data.validation)
    classes = sorted(set(train) & set(asked))
    if not classes:
        raise ValueError(f"{data.name} has no class with both training and {part} texts")
    generator.shuffle(classes)
    tasks = []
    for start in range(0, len(classes), size):
        own = tuple(classes[start : start + size])
        learn = [x for c in own for x in _some(train[c], train_limit, generator)]
        ask = [x for c in own for x in _some(asked[c], test_limit, generator)]
        generator.shuffle(learn)
        tasks.append(ClassTask(own, tuple(learn), tuple(ask)))
    return tasks


def joined(tasks: Sequence[ClassTask], seed: int = 0) -> list[ClassTask]:
    """All tasks as one, its texts shuffled: what joint training, the upper bound, learns from."""
    train = [x for task in tasks for x in task.train]
    random.Random(f"joined {seed}").shuffle(train)
    classes = tuple(c for task in tasks for c in task.classes)
    return [ClassTask(classes, tuple(train), tuple(x for task in tasks for x in task.test))]


def synthetic_set(classes: int = 8, texts: int = 20, seed: int = 0) -> ClassificationSet:
    """Texts of three words, two of them of the five words that only their class has; for tests and quick runs."""
    generator = random.Random(f"synthetic {seed}")
    names = ["red", "blue", "green", "black", "white", "pink", "gold", "grey", "brown", "lime", "teal", "plum"]
    if not 2 <= classes <= len(names):
        raise ValueError(f"classes lies between 2 and {len(names)}, not {classes}")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=4)) for _ in range(5 * classes + 5)]
    pairs = []
    for c in range(classes):
        for _ in range(texts):
            chosen = [*generator.sample(words[5 * c : 5 * c + 5], 2), generator.choice(words[-5:])]
            pairs.append((" ".join(generator.sample(chosen, 3)), names[c]))
    return _numbered("synthetic", {name: name for name in names[:classes]}, split_rows(pairs, seed))


def _numbered(name: str, spoken: dict[str, str], rows: dict[str, list[tuple[str, str]]]) -> ClassificationSet:
    """Classes get their numbers in alphabetical order."""
    order = {label: i for i, label in enumerate(sorted({label for _, label in rows["train"]}))}
    labels = tuple(spoken[label] for label in order)
    if len(order) < 2:
        raise UserError(f"{name} has {len(order)} classes with two texts or more; at least two are needed")
    if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise UserError(f"{name} has labels that are empty, or that differ in underscores or capitals only")
    known = {text for text, _ in rows["train"]}
    parts = {
        part: tuple(
            LabelledText(t, order[c]) for t, c in rows[part] if c in order and (part == "train" or t not in known)
        )
        for part in ("train", "val", "test")
    }
    return ClassificationSet(name, labels, parts["train"], parts["val"], parts["test"])


def _spaced(label: str) -> str:
    """ "SportsTeam_member" as "Sports Team member"; a run of capitals stays one word."""
    text = label.replace("_", " ")
    return "".join(" " + c if i and c.isupper() and text[i - 1].islower() else c for i, c in enumerate(text))


def _by_class(rows: Iterable[LabelledText]) -> dict[int, list[LabelledText]]:
    found: dict[int, list[LabelledText]] = defaultdict(list)
    for row in rows:
        found[row.label].append(row)
    return found


def _some(rows: list[LabelledText], limit: int | None, generator: random.Random) -> list[LabelledText]:
    return rows if limit is None else generator.sample(rows, min(limit, len(rows)))


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(_read(file), newline=""), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}; it is no CSV file with quoted texts") from error


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
