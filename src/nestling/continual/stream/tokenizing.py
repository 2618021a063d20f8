"""Texts as tokens, by the tokenizer of a pre-trained model."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def own_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text by itself, a beginning token or nothing."""
    return [int(i) for i in tokenizer("").input_ids if i != tokenizer.eos_token_id]


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text alone: no special ones are added, and none is made of a text that reads like one."""
    return [int(i) for i in tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids]
