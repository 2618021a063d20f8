"""The layers under test, all at width 256 with 4 heads, and the step that is timed: forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.flops import attention_flops, titans_flops
from benchmarks.timing import Subject
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans

WIDTH = 256
HEADS = 4
CHUNK = 64
CHECKPOINT_CHUNKS = 4  # balances one segment's activations against the 16 states kept between segments at T = 4,096
TITANS_EXPANSION = 4  # the default of titans-pytorch, given to our memory too


class CausalAttention(nn.Module):
    """The yardstick: causal softmax attention with its four projections and nothing else, the fastest it can be."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, width]` to the same shape."""
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


def matrix_config(checkpoint: bool = False, compiled: bool = False) -> SelfModifyingConfig:
    """Self-modifying Titans with matrix memories."""
    stride = CHECKPOINT_CHUNKS if checkpoint else None
    return _config(memory="matrix", chunk_size=CHUNK, checkpoint_chunks=stride, compile_chunks=compiled)


def mlp_config(checkpoint: bool = False, compiled: bool = False) -> SelfModifyingConfig:
    """Self-modifying Titans with MLP memories and momentum."""
    stride = CHECKPOINT_CHUNKS if checkpoint else None
    return _config(memory="mlp", momentum=True, chunk_size=CHUNK, checkpoint_chunks=stride, compile_chunks=compiled)


def titans_config(chunk: int) -> SelfModifyingConfig:
    """One Titans neural memory: only `memory` learns in context, targets are v_t, no delta erase, momentum."""
    return _config(
        memory="mlp",
        expansion=TITANS_EXPANSION,
        momentum=True,
        erase=False,
        adapt=("memory",),
        self_targets=False,
        chunk_size=chunk,
    )


def _config(**settings: Any) -> SelfModifyingConfig:
    return SelfModifyingConfig(hidden_size=WIDTH, num_heads=HEADS, **settings)


def attention_subject(time: int) -> Subject:
    """Forward and backward of the yardstick over `time` tokens."""
    layer = CausalAttention(WIDTH, HEADS)
    return Subject("attention", training_step(layer, time), time, attention_flops(WIDTH, time))


def titans_subject(name: str, config: SelfModifyingConfig, time: int) -> Subject:
    """Forward and backward of one of our layers over `time` tokens."""
    layer = SelfModifyingTitans(config)
    return Subject(name, training_step(lambda x: layer(x)[0], time, layer), time, titans_flops(config, time))


def public_subject(name: str, chunk: int, time: int, gradient_chunk: int | None = None) -> Subject:
    """Forward and backward of titans-pytorch's NeuralMemory, whose memory changes every `chunk` tokens.

    Args:
        name: as the table shows it.
        chunk: its `batch_size`, the tokens whose gradients are taken at the same memory.
        time: sequence length.
        gradient_chunk: its `chunk_size`, the tokens that share one averaged gradient, rates and one read weight. None
            is `chunk`, its cheapest setting; 1 gives every token its own, which is what our layer does.

    Raises:
        ImportError: titans-pytorch is not installed (`pip install -e '.[bench]'`).
    """
    from titans_pytorch import NeuralMemory

    memory = NeuralMemory(
        dim=WIDTH,
        dim_head=WIDTH // HEADS,
        heads=HEADS,
        batch_size=chunk,
        chunk_size=gradient_chunk or chunk,
        momentum=True,
        default_model_kwargs={"depth": 2, "expansion_factor": float(TITANS_EXPANSION)},
    )
    return Subject(name, training_step(lambda x: memory(x)[0], time, memory), time)


def training_step(run: Callable[[Tensor], Tensor], time: int, module: nn.Module | None = None) -> Callable[[], None]:
    """A function that runs forward and backward once on a fixed input, input gradient included.

    Args:
        run: the forward pass, `[1, T, width]` to the same shape.
        time: T.
        module: whose gradients to clear between steps; None when `run` is the module.
    """
    owner = module if module is not None else run
    assert isinstance(owner, nn.Module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, time, WIDTH, generator=generator, requires_grad=True)
    upstream = torch.randn(1, time, WIDTH, generator=generator)

    def step() -> None:
        owner.zero_grad(set_to_none=True)
        x.grad = None
        run(x).backward(upstream)

    return step
