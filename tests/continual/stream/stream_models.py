"""Small models and texts for the tests of continual learning."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.llamas import random_llama

VOCABULARY = 50


def tiny_llama(seed: int = 1, dtype: torch.dtype = torch.float64, layers: int = 2) -> LlamaForCausalLM:
    """Fit for float64 references."""
    shape = {"width": 16, "intermediate": 24, "heads": 2, "embedding": 1.0}
    return random_llama(VOCABULARY, layers=layers, seed=seed, **shape).to(dtype)


def text(n: int, seed: int = 0) -> Tensor:
    """`n` random tokens."""
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def copy_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The parameters as they are."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """All parameters, to the last bit."""
    return all(torch.equal(value, b[name]) for name, value in a.items())
