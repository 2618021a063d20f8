"""The models that every tool is tried on: a small one of every preset, and converted ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from nestling import NestlingForCausalLM
from nestling.models import convert
from tests.models.conftest import REPRESENTATIVE, SMALL, small_model
from tests.models.pretrained import pretrained

VOCABULARY = 61


def converted(family: str) -> NestlingForCausalLM:
    """A random model of a family with two levels."""
    return convert(pretrained(family), {"fast": 64, "slow": 512})


SUBJECTS: dict[str, Callable[[], NestlingForCausalLM]] = {
    **{preset: partial(small_model, preset) for preset in SMALL},
    "converted llama": partial(converted, "llama"),
    "converted qwen3": partial(converted, "qwen3"),
}
FEW = (*REPRESENTATIVE, "converted llama")
"""For what takes long, or does not depend on a model's layers."""


def subject(name: str) -> NestlingForCausalLM:
    """In eval mode; the same weights at every call."""
    return SUBJECTS[name]().eval()


def documents(*lengths: int) -> list[list[int]]:
    """Random token ids that every subject knows, without its special tokens."""
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(4, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


def batch(rows: int, length: int) -> torch.Tensor:
    """Rows of random token ids."""
    return torch.tensor(documents(*[length] * rows))
