"""Draw the systems of docs/levels.md into docs/pictures.

python docs/draw_levels.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from nestling import NestlingForCausalLM, presets
from nestling.levels import NestedSystem, inspect
from nestling.levels.assignment import multi_frequency
from nestling.optim import build

HERE = Path(__file__).parent
ROW = 512
"""Tokens that a row of Hope's training reads in a step."""


def mlp() -> NestedSystem:
    """Gradient descent with momentum: the two levels of NL Eq. 10 to 13."""
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    return inspect(model, SGD(model.parameters(), lr=0.1, momentum=0.9))


def llama() -> NestedSystem:
    """A transformer of somebody else's."""
    sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return inspect(model, AdamW(model.parameters(), lr=3e-4))


def hope() -> NestedSystem:
    """Hope, with the levels of its continuum at three frequencies."""
    model = NestlingForCausalLM(presets.hope(size="tiny"))
    optimizer = multi_frequency(model, {"cms.0": 1, "cms.1": 8, "cms.2": 64}, partial(build, "adamw", model, lr=3e-3))
    return inspect(model, optimizer, tokens_per_step=ROW)


def main() -> None:
    """All pictures."""
    torch.manual_seed(0)
    for make in (mlp, llama, hope):
        make().plot(HERE / "pictures" / f"levels_{make.__name__}.svg")


if __name__ == "__main__":
    main()
