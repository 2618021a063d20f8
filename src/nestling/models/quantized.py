"""What loading in 4 bits leaves for a model to settle."""

from __future__ import annotations

from torch import nn

CPU_OUTPUTS = 32
"""Outputs that bitsandbytes packs together for its fast product on CPUs."""


def leave_odd_sizes_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes' fast product on CPUs away from the layers that it has no form for.

    It takes outputs in blocks of `CPU_OUTPUTS` and inputs in blocks of those that share a scale, and stops at any other
    number with an assertion. Gates have one output per head. Such layers take the ordinary product, with the same 4-bit
    weights.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and isinstance(module, nn.Linear):
            share = getattr(next(module.parameters()), "blocksize", 64)
            if module.out_features % CPU_OUTPUTS or module.in_features % share:
                vars(module)["support_avx512bf16_for_cpu"] = False
