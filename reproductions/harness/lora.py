"""LoRA by `peft`, as a baseline."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from nestling.errors import UserError


def add_lora(model: PreTrainedModel, rank: int, seed: int = 0) -> PreTrainedModel:
    """The model with low-rank updates in all linear layers but the head (Hu et al. 2021); only they need gradients.

    Args:
        model: is changed; it stays of its class.
        rank: of each; alpha is twice the rank.
        seed: of the random half of each update.

    Raises:
        UserError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("LoRA needs the peft package; install it with: pip install 'nestling[lora]'") from error
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    found = inject_adapter_in_model(config, model)
    assert isinstance(found, PreTrainedModel)
    return found.eval()
