"""Tokenizers: raw bytes, byte-pair encoding trained on the data, or any tokenizer of the Hugging Face hub.

All three are real Hugging Face tokenizers: they save with the model and `AutoTokenizer` loads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nestling.errors import UserError
from nestling.tasks.text import Document

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
BYTE_OFFSET = len(SPECIAL_TOKENS)
BYTE_VOCABULARY = {token: i for i, token in enumerate(SPECIAL_TOKENS.values())} | {
    symbol: byte + BYTE_OFFSET for byte, symbol in bytes_to_unicode().items()
}
PIECE = 1 << 20  # characters encoded in one call; bounds the memory of the tokenizer's offsets
LOOK_BACK = 1 << 14  # characters before the end of a piece in which a good place to cut is looked for
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte: `<pad>` 0, `<bos>` 1, `<eos>` 2, byte b is b + 3, so the vocabulary is 259."""
    tokenizer = Tokenizer(models.BPE(vocab=BYTE_VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (as GPT-2's) learned from `texts`; special tokens as in `byte_tokenizer`.

    Raises:
        UserError: a vocabulary that cannot hold the 256 bytes and the special tokens.
    """
    smallest = len(BYTE_VOCABULARY)
    if vocab_size < smallest:
        raise UserError(f"a BPE vocabulary of {vocab_size} is too small; it needs at least {smallest}, try bpe:4096")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def make_tokenizer(name: str, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer called `name`: `bytes`, `bpe:SIZE` (trained on `texts`), or a Hugging Face path or name.

    Raises:
        UserError: a malformed `bpe:SIZE`, or a tokenizer that cannot be loaded.
    """
    if name == "bytes":
        return byte_tokenizer()
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isdecimal():
            raise UserError(f"--tokenizer {name}: the part after bpe: must be a vocabulary size, as in bpe:4096")
        return train_bpe(texts, int(size))
    return load_tokenizer(name)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A saved tokenizer, from a directory or the hub.

    Raises:
        UserError: it cannot be loaded, or has neither a beginning nor an end token to part documents with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"no tokenizer {str(name)!r} ({reason}); use bytes, bpe:SIZE, a directory or a hub name"
        ) from error
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {str(name)!r} has neither a bos nor an eos token; documents cannot be parted with it"
        )
    return tokenizer


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """The tokens of `text` alone, without special tokens; `"<eos>"` in the text is seven bytes, not the end token."""
    if _is_bytes(tokenizer):  # 100 times faster than the merge loop, and the same by test
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) + BYTE_OFFSET
    pieces = [
        np.asarray(tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids, dtype=np.int32)
        for piece in _pieces(text)
    ]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """`<bos> text <eos>`; where the two are one token (GPT-2), or one is missing, it stands only in front."""
    first, last = start_token(tokenizer), tokenizer.eos_token_id
    tail = [] if last is None or last == first else [last]
    return np.concatenate([[first], encode_text(tokenizer, text), tail]).astype(np.int32)


def encode_corpus(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> np.ndarray:
    """All documents one after the other, each as `encode_document` gives it; int32 `[tokens]`."""
    return np.concatenate([encode_document(tokenizer, document.text) for document in documents])


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token a document begins with: bos, or eos where there is no bos."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert isinstance(first, int)  # load_tokenizer refuses a tokenizer with neither
    return first


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that are no part of a text, the end token excepted."""
    return [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]


def count_bytes(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text that `tokens` stand for; special tokens count nothing."""
    if _is_bytes(tokenizer):
        return int((np.asarray(tokens) >= BYTE_OFFSET).sum())
    return len(str(tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True)).encode("utf-8"))


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def _is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    return len(tokenizer) == len(BYTE_VOCABULARY) and tokenizer.get_vocab() == BYTE_VOCABULARY


def _pieces(text: str) -> Iterator[str]:
    """Cuts of about a million characters, after a single line end, where byte-level tokenizers part words anyway."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            ends = [match.end() for match in LINE_END.finditer(text, max(start, end - LOOK_BACK), end)]
            end = ends[-1] if ends else end
        yield text[start:end]
        start = end
