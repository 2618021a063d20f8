"""Models that say known words: the next word depends on the last one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ANSWERS = ["<begin>", "<end_of_text>", "<end_of_turn>", "<user>", "<answer>", "hello", "good", "day", "again"]
SENTENCE = ["<unk>", "<s>", "</s>", "▁The", "▁capital", "▁is", "▁Paris", "▁of", "▁course"]
CHAT = "<user> {% for m in messages %}{{ m['content'] }} <end_of_turn> {% endfor %}<answer>"


def talker(words: Sequence[str], follows: Mapping[str, str], **special: int) -> LlamaForCausalLM:
    """A Llama that says `follows[word]` after each word, greedily or not."""
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **size, **special)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(words), 32))
        model.lm_head.weight.zero_()
        for word, after in follows.items():
            model.lm_head.weight[words.index(after), words.index(word)] = 90.0
    return model


def answering() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Answers "good day <end_of_turn>", and would say "again again ..." after that."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(ANSWERS)}, unk_token="hello"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<begin>",
        eos_token="<end_of_text>",
        additional_special_tokens=["<end_of_turn>", "<user>", "<answer>"],
    )
    tokenizer.chat_template = CHAT
    follows = {"<answer>": "good", "hello": "good", "good": "day", "day": "<end_of_turn>"}
    follows |= {"<end_of_turn>": "again", "again": "again"}
    return talker(ANSWERS, follows, bos_token_id=0, eos_token_id=1), tokenizer


def sentence() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Says the words of `SENTENCE` in order, with a tokenizer that takes a space for the next word's first letter."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SENTENCE)}, unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    words.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    order = [*SENTENCE[3:], "</s>"]
    return talker(SENTENCE, dict(pairwise(order)), bos_token_id=1, eos_token_id=2), tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer with a few words, and bytes for every other character, as Llama 2's."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁so", "a", *(f"<0x{i:02X}>" for i in range(256))]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
