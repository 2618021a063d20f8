"""What identifies a model: its parameters' names and shapes, and a sample of their values."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 256
DIGITS = 16


def fingerprint(model: nn.Module, description: str) -> str:
    """`DIGITS` hexadecimal digits of a description and of a model's parameters.

    Args:
        model: some 256 values of every parameter are looked at, at even distances.
        description: what else tells it from other models.
    """
    digest = hashlib.sha256(description.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)]
        digest.update(sample.to(device="cpu", dtype=torch.float64).numpy().tobytes())
    return digest.hexdigest()[:DIGITS]
