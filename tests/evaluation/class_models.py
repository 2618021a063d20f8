"""A tiny random Llama, its tokenizer, and what is built on them."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestling.evaluation.label_prompts import LabelPrompts
from nestling.tasks.classification import ClassificationSet
from nestling.training.tokenization import byte_tokenizer


def tiny_llama(layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def byte_prompts(data: ClassificationSet) -> LabelPrompts:
    return LabelPrompts(byte_tokenizer(), data.labels, max_tokens=20)
