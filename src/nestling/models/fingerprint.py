"""What identifies a model: its parameters' names and shapes, and a sample of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

SAMPLES = 256
DIGITS = 16


def fingerprint(model: nn.Module, description: str, tied: Collection[str] = ()) -> str:
    """`DIGITS` hexadecimal digits of a description and of a model's parameters.

    Args:
        model: some 256 values of every parameter are looked at, at even distances.
        description: what else tells it from other models.
        tied: names of parameters that are others under a second name. Offloaded they are tensors of their own.
    """
    digest = hashlib.sha256(description.encode())
    samples = dict(_samples(model))
    for name, parameter in sorted((n, p) for n, p in model.named_parameters() if n not in tied):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(samples[name].to(device="cpu", dtype=torch.float64).numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _samples(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Values of every parameter by name; hooks fetch those that are offloaded."""
    for path, module in model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(recurse=False):
                flat = parameter.detach().reshape(-1)
                yield f"{path}.{name}" if path else name, flat[:: max(1, flat.numel() // SAMPLES)]
