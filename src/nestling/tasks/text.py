"""Readers of text: files, directories, the corpus that ships with Python, and streamed sets of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.errors import UserError

GUTENBERG_START = re.compile(r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.*\*\*\*$", re.MULTILINE)
GUTENBERG_END = re.compile(r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """One text with the name it is reported under (a file path, or a topic)."""

    name: str
    text: str


def read_documents(path: str | Path, *, leave_out: Path | None = None) -> list[Document]:
    """The text of a file, or of every file below a directory in sorted order, one document per file.

    Hidden files, empty files and the directories of memories (`continual.store`) are passed over; a byte order mark is
    dropped, nothing else is changed.

    Args:
        path: the file or directory.
        leave_out: a directory below it that is not read, whatever it holds.

    Raises:
        UserError: nothing at `path`, no text in it, or a file that is not UTF-8.
    """
    root = Path(path)
    if root.is_dir():
        files = _files(root, leave_out)
    elif root.exists():
        files = [root]
    else:
        raise UserError(f"no file or directory at {path}; check the path")
    documents = [Document(str(file), text) for file in files if (text := _read_utf8(file))]
    if not any(document.text.strip() for document in documents):
        raise UserError(f"{path} holds no text; give a UTF-8 text file, or a directory of them")
    return documents


def embedded_corpus() -> list[Document]:
    """CPython's language reference as shipped in `pydoc_data.topics`: about 370 kB of English, no download.

    The topics quote each other at length. Paragraphs that repeat an earlier one are left out, so that a text held out
    for validation is not also in the training part. The text follows the Python version.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        fresh = []
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            documents.append(Document(f"pydoc:{name}", "\n\n".join(fresh).strip("\n") + "\n"))
    return documents


def hold_out(documents: Sequence[Document], fraction: float = 0.1) -> tuple[list[Document], list[Document]]:
    """Split one corpus into (training, validation): the last `fraction` of its characters, contiguous, is held out.

    A document that straddles the border is cut there, at the nearest line end before it when there is one.

    Raises:
        UserError: a corpus too short to leave text on both sides.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, not {fraction}")
    border = round(sum(len(d.text) for d in documents) * (1.0 - fraction))
    train: list[Document] = []
    valid: list[Document] = []
    for document in documents:
        cut = min(max(border, 0), len(document.text))
        border -= len(document.text)
        if 0 < cut < len(document.text):
            cut = document.text.rfind("\n", 0, cut) + 1 or cut
        if document.text[:cut]:
            train.append(Document(document.name, document.text[:cut]))
        if document.text[cut:]:
            valid.append(Document(document.name, document.text[cut:]))
    if not train or not valid:
        name = documents[0].name if documents else "the corpus"
        raise UserError(
            f"{name} is too short to hold out {fraction:.0%} for validation; give more text, or --valid PATH"
        )
    return train, valid


def strip_gutenberg(text: str) -> str:
    """A book of Project Gutenberg without the lines before and after it; any other text as it is."""
    start, end = GUTENBERG_START.search(text), GUTENBERG_END.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip() + "\n"


def open_stream(name: str, subset: str | None, split: str, column: str) -> Any:
    """A streamed set of the hub (or a local directory in a format `datasets` reads) as `datasets.IterableDataset`.

    Its rows are dictionaries whose `column` holds text. It can be left and re-entered: `state_dict` and
    `load_state_dict` give the exact position.

    Raises:
        UserError: the set, subset, split or column does not exist, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "--streaming needs the datasets package; install it with: pip install 'nestling[data]'"
        ) from error

    try:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)
        first = next(iter(stream), None)
    except Exception as error:  # the hub client and every format reader raise errors of their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot stream {name!r}, split {split!r}: {reason}; check the name and the network") from error
    if first is None:
        raise UserError(f"the set {name!r}, split {split!r}, is empty; choose another split with --split")
    if not isinstance(first.get(column), str):
        texts = [key for key, value in first.items() if isinstance(value, str)]
        raise UserError(f"{name!r} has no text column {column!r}; choose with --column one of: {', '.join(texts)}")
    return stream


def _files(root: Path, leave_out: Path | None) -> list[Path]:
    """Sorted, those of memories left out."""
    from nestling.continual.store.snapshots import (  # brings the learner; most texts need none
        INDEX,
        is_memory_directory,
    )

    found = [f for f in sorted(root.rglob("*")) if f.is_file() and not _hidden(f.relative_to(root))]
    closed = {f.parent for f in found if f.name == INDEX and is_memory_directory(f.parent)}
    if leave_out is not None and leave_out.resolve().is_relative_to(root.resolve()):
        closed.add(root / leave_out.resolve().relative_to(root.resolve()))
    return [f for f in found if closed.isdisjoint(f.parents)]


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read_utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}); convert it, for "
            "example with iconv -t UTF-8, or name the files to read"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}; check its permissions") from error
