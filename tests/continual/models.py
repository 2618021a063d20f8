"""Small models and texts for the tests of continual learning."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 50


def tiny_llama(seed: int = 1, dtype: torch.dtype = torch.float64, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama whose logits are of unit size, so that a difference anywhere shows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.normal_(std=p.shape[1] ** -0.5)
    return model.to(dtype)


def text(n: int, seed: int = 0) -> Tensor:
    """`n` random tokens."""
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def copy_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The parameters as they are."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
