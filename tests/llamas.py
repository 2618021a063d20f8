"""Small random Llamas."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(
    vocabulary: int = 259,
    *,
    layers: int = 2,
    width: int = 32,
    intermediate: int = 48,
    heads: int = 4,
    seed: int = 0,
    embedding: float = 0.4,
) -> LlamaForCausalLM:
    """With grouped queries and tied embeddings; logits far enough apart that a slip anywhere shows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=embedding if "embed" in name else p.shape[1] ** -0.5)
    return model
