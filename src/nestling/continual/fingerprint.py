"""Which model a memory belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 256


def base_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a model's class, its parameters' names and shapes, and a sample of their values.

    Take it before anything is learned: a learned weight changes it.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)]
        digest.update(sample.to(device="cpu", dtype=torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]
