"""From the settings of a run to its tokenizer, its training rows and its held-out text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from nestling.errors import UserError
from nestling.tasks.text import Document, embedded_corpus, hold_out, open_stream, read_documents
from nestling.training.config import TrainConfig
from nestling.training.layout import Layout, share_rows
from nestling.training.rows import ContiguousRows, Row, ShuffledRows, StreamedRows
from nestling.training.tokenization import count_bytes, encode_corpus, encode_document, load_tokenizer, make_tokenizer

HELD_OUT = 0.1
BPE_STREAM_DOCUMENTS = 2000  # documents of a streamed set that a BPE tokenizer is trained on


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    Attributes:
        tokenizer: made or loaded for the run.
        rows: the training rows, in order.
        valid: held-out tokens `[n]`, at most `eval_tokens`.
        valid_bytes: UTF-8 bytes of the text `valid` stands for.
        description: one line for people: where the text comes from and how it was split.
        digest: identity of the training tokens; a resumed run must find the same.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: Dataset[Row]
    valid: np.ndarray
    valid_bytes: int
    description: str
    digest: str


def prepare_data(config: TrainConfig, layout: Layout | None = None, tokenizer_dir: str | None = None) -> TrainingData:
    """Read, split, tokenize and lay out the text of a run.

    Args:
        config: a resolved configuration.
        layout: of the run; None is that of one process.
        tokenizer_dir: where a run that is resumed, or has an `init`, finds its tokenizer; None makes it from the
            settings.

    Raises:
        UserError: missing, empty, undecodable or too short data, or an unknown tokenizer.
    """
    layout = layout or share_rows(config)
    if config.streaming:
        return _prepare_stream(config, layout, tokenizer_dir)
    train, valid, description = _read_split(config)
    tokenizer = _tokenizer(config, tokenizer_dir, (document.text for document in train))
    tokens = encode_corpus(tokenizer, train)
    held_out = encode_corpus(tokenizer, valid)
    note = f"{description}; {len(tokens):,} tokens to train on, {len(held_out):,} to validate on"
    rows = _make_rows(config, tokens, layout)
    return _assemble(config, tokenizer, rows, held_out, note, hashlib.sha256(tokens.tobytes()).hexdigest()[:16])


def _read_split(config: TrainConfig) -> tuple[list[Document], list[Document], str]:
    """Training documents, validation documents, and a line that says how they were split."""
    for path in config.data:
        if not Path(path).exists():
            raise UserError(f"no file or directory at {path}; check the path (a set of the hub needs --streaming)")
    corpora = [read_documents(path) for path in config.data] or [embedded_corpus()]
    names = ", ".join(config.data) or "the embedded corpus (CPython's language reference, pydoc_data.topics)"
    if config.valid:
        valid = list(chain.from_iterable(read_documents(path) for path in config.valid))
        train = list(chain.from_iterable(corpora))
        return train, valid, f"{names}; validation on {', '.join(config.valid)}"
    halves = [hold_out(corpus, HELD_OUT) for corpus in corpora]
    train = list(chain.from_iterable(half[0] for half in halves))
    valid = list(chain.from_iterable(half[1] for half in halves))
    return train, valid, f"{names}; validation on the last {HELD_OUT:.0%} of each corpus, held out"


def _make_rows(config: TrainConfig, tokens: np.ndarray, layout: Layout) -> Dataset[Row]:
    assert config.steps is not None
    total = config.steps * layout.rows
    if config.carry_state:
        return ContiguousRows(tokens, config.sequence_length, layout.streams, total, config.seed, config.carry_tokens)
    return ShuffledRows(tokens, config.sequence_length, total, config.seed)


def _prepare_stream(config: TrainConfig, layout: Layout, tokenizer_dir: str | None) -> TrainingData:
    """A streamed set: its first documents are validation (unless --valid), the rest is trained on in its own order."""
    stream = open_stream(config.data[0], config.subset, config.split, config.column)
    name = f"{config.data[0]} ({config.split}, streamed)"
    if config.valid:
        valid, skip = [document for path in config.valid for document in read_documents(path)], 0
        note = f"{name}; validation on {', '.join(config.valid)}"
    else:
        valid = _first_documents(stream, config)
        skip = len(valid)
        note = f"{name}; validation on its first {skip} documents, held out"
    texts = (str(example[config.column]) for example in islice(stream, skip, skip + BPE_STREAM_DOCUMENTS))
    tokenizer = _tokenizer(config, tokenizer_dir, texts)

    def encode(example: dict[str, Any]) -> np.ndarray:
        return encode_document(tokenizer, str(example[config.column]))

    rows = StreamedRows(
        stream,
        encode,
        skip,
        config.sequence_length,
        layout.streams,
        config.carry_tokens,
        memory=4 * layout.turns + 8,
    )
    held_out = encode_corpus(tokenizer, valid)
    return _assemble(config, tokenizer, rows, held_out, note, digest=f"{name}:{config.subset}:{skip}")


def _first_documents(stream: Any, config: TrainConfig) -> list[Document]:
    """The first documents of a stream, as many as hold 4 bytes for each of `eval_tokens` (about a BPE token)."""
    documents: list[Document] = []
    size = 0
    for place, example in enumerate(stream):
        if size >= 4 * config.eval_tokens:
            return documents
        documents.append(Document(f"{config.data[0]}:{place}", str(example[config.column])))
        size += len(documents[-1].text.encode())
    raise UserError(
        f"the streamed set is too short to hold out {4 * config.eval_tokens} bytes for validation; lower --eval-tokens "
        "or give --valid PATH"
    )


def _tokenizer(config: TrainConfig, saved: str | None, texts: Iterable[str] | Iterator[str]) -> PreTrainedTokenizerBase:
    return make_tokenizer(config.tokenizer, texts) if saved is None else load_tokenizer(saved)


def _assemble(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset[Row],
    held_out: np.ndarray,
    description: str,
    digest: str,
) -> TrainingData:
    if len(held_out) < 2:
        raise UserError("the validation text is empty; give more text, or --valid PATH")
    valid = held_out[: config.eval_tokens]
    if len(valid) < len(held_out):
        description += f" (of which the first {len(valid):,} are read)"
    return TrainingData(tokenizer, rows, valid, count_bytes(tokenizer, valid), description, digest)
