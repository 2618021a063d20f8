"""Every part of a model is used by a call of its module, so that what hangs on the call takes effect: hooks, adapters,
low-rank factors, quantized products, offloading."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from nestling import NestlingForCausalLM


def calls(model: NestlingForCausalLM, names: list[str], ids: Tensor) -> Counter[str]:
    """How often forward hooks fire in a pass over `ids`, by name of the module."""
    fired: Counter[str] = Counter()
    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_hook(lambda *_, n=n: fired.update([n])) for n in names]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return fired


def test_blocks_call_their_mixers_and_channels(model: NestlingForCausalLM, ids: Tensor) -> None:
    """Once a pass each."""
    parts = [f"blocks.{i}.{name}" for i, block in enumerate(model.blocks) for name, _ in block.named_children()]
    assert calls(model, parts, ids) == Counter(parts)
