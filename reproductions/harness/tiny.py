"""Models that a quick run can afford."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(layers: int, device: str = "cpu") -> LlamaForCausalLM:
    """A random Llama of width 32 over the vocabulary of `byte_tokenizer`, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.to(device)  # type: ignore[arg-type]
    return model
