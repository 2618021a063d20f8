"""A tiny random Llama, its tokenizer, and what is built on them."""

from __future__ import annotations

from transformers import LlamaForCausalLM

from nestling.evaluation.class_incremental.prompts import LabelPrompts
from nestling.tasks.classification import ClassificationSet
from nestling.training.tokenization import byte_tokenizer
from tests.llamas import random_llama


def tiny_llama(layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    return random_llama(layers=layers, intermediate=64, seed=seed)


def byte_prompts(data: ClassificationSet) -> LabelPrompts:
    return LabelPrompts(byte_tokenizer(), data.labels, max_tokens=20)
