"""Tokenizers: bytes are bytes, everything survives a round trip through text and through a directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nestling.errors import UserError
from nestling.tasks.text import Document, embedded_corpus
from nestling.training.tokenization import (
    byte_tokenizer,
    count_bytes,
    encode_corpus,
    encode_document,
    encode_text,
    load_tokenizer,
    make_tokenizer,
    special_ids,
    train_bpe,
)

BYTES = byte_tokenizer()
ENGLISH = "".join(document.text for document in embedded_corpus()[:8])
BPE = train_bpe([ENGLISH], 300)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_bytes_are_offset_bytes_and_decode_to_the_text(text: str) -> None:
    ids = encode_text(BYTES, text)
    assert ids.tolist() == [b + 3 for b in text.encode()]
    slow = BYTES(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids.tolist() == slow  # the shortcut equals the tokenizer
    assert BYTES.decode(ids.tolist()) == text


def test_byte_vocabulary() -> None:
    assert len(BYTES) == 259
    assert (BYTES.pad_token_id, BYTES.bos_token_id, BYTES.eos_token_id) == (0, 1, 2)
    assert encode_document(BYTES, "a").tolist() == [1, ord("a") + 3, 2]
    assert sorted(special_ids(BYTES)) == [0, 1]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_special_tokens_in_a_text_are_text(tokenizer: object) -> None:
    ids = encode_text(tokenizer, "a<eos>b<pad>")  # type: ignore[arg-type]
    assert ids.min() > 2
    assert tokenizer.decode(ids.tolist()) == "a<eos>b<pad>"  # type: ignore[attr-defined]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_saved_tokenizer_loads_with_auto_tokenizer(tokenizer: object, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.get_vocab() == tokenizer.get_vocab()  # type: ignore[attr-defined]
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (0, 1, 2)
    text = "the cat \N{GREEK SMALL LETTER PI}"
    assert np.array_equal(encode_text(again, text), encode_text(tokenizer, text))  # type: ignore[arg-type]


def test_bpe_learns_merges_and_is_deterministic() -> None:
    assert len(BPE) == 300
    assert len(encode_text(BPE, ENGLISH)) < 0.8 * len(ENGLISH)
    assert BPE.decode(encode_text(BPE, ENGLISH).tolist()) == ENGLISH
    assert train_bpe([ENGLISH], 300).get_vocab() == BPE.get_vocab()


def test_long_text_is_cut_where_it_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_text(BPE, ENGLISH)
    monkeypatch.setattr("nestling.training.tokenization.PIECE", 10_000)
    assert np.array_equal(encode_text(BPE, ENGLISH), whole)
    assert BPE.decode(encode_text(BPE, "x" * 30_000).tolist()) == "x" * 30_000  # no line end to cut at


def test_corpus_and_its_bytes() -> None:
    documents = [Document("a", "pi \N{GREEK SMALL LETTER PI}"), Document("b", "z")]
    for tokenizer in (BYTES, BPE):
        ids = encode_corpus(tokenizer, documents)
        assert ids.dtype == np.int32
        assert [int(i) for i in ids if i < 3] == [1, 2, 1, 2]
        assert count_bytes(tokenizer, ids) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bpe:", "must be a vocabulary size"),
        ("bpe:many", "must be a vocabulary size"),
        ("bpe:100", "needs at least 259"),
        ("/no/such/tokenizer", "no tokenizer '/no/such/tokenizer'"),
    ],
)
def test_unknown_tokenizers_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_tokenizer(name, [ENGLISH])


def test_make_tokenizer_loads_a_directory(tmp_path: Path) -> None:
    BPE.save_pretrained(tmp_path)
    assert make_tokenizer(str(tmp_path), []).get_vocab() == BPE.get_vocab()
    assert load_tokenizer(tmp_path).eos_token_id == 2
