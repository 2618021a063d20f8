"""A small random model over bytes."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def byte_llama(layers: int = 2) -> LlamaForCausalLM:
    """Of 259 tokens, with logits far enough apart that a slip shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=0.4 if "embed" in name else p.shape[1] ** -0.5)
    return model
