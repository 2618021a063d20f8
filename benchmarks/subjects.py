"""The layers under test, all at width 256 with 4 heads, and the step that is timed: forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.flops import attention_flops, neural_memory_flops, titans_flops
from benchmarks.timing import Subject
from nestling import presets
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.layers.sequence import SequenceLayer
from nestling.models.modeling import build_mixer

WIDTH = 256
HEADS = 4
CHUNK = 64
CHECKPOINT_CHUNKS = 4  # balances one segment's activations against the 16 states kept between segments at T = 4,096
# Presets whose mixers differ, with what their mixer needs to have four heads of 64 (or its paper's equivalent) here.
# A Mamba-2 block has eight heads of 64 and the state size of the large presets.
MIXERS: dict[str, dict[str, Any]] = {
    "transformer": {"num_heads": HEADS},
    "linear_attention": {"num_heads": HEADS},
    "retnet": {"num_heads": HEADS},
    "deltanet": {"num_heads": HEADS},
    "gated_deltanet": {"num_heads": HEADS},
    "gated_deltaproduct": {"num_heads": HEADS},
    "comba": {"num_heads": HEADS},
    "kimi_delta": {"num_heads": HEADS},
    "rwkv7": {"num_heads": HEADS},
    "mamba2": {"num_heads": 2 * HEADS, "state_size": 64},
    "ttt_linear": {"num_heads": HEADS},
    "ttt_mlp": {"num_heads": HEADS},
    "titans_lmm": {"num_heads": HEADS},
    "titans_mac": {"num_heads": HEADS},
    "titans_mag": {"num_heads": HEADS},
    "titans_mal": {"num_heads": HEADS},
    "hope_linear": {"num_heads": HEADS},
    "hope": {"num_heads": HEADS},
}
LINEAR_FAMILY = ("linear_attention", "retnet", "deltanet", "gated_deltanet", "mamba2")
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


def neural_memory_config(chunk: int) -> NeuralMemoryConfig:
    """The neural memory of Titans: an MLP of depth 2 with momentum and retention."""
    return NeuralMemoryConfig(hidden_size=WIDTH, num_heads=HEADS, expansion=TITANS_EXPANSION, chunk_size=chunk)


def _config(**settings: Any) -> SelfModifyingConfig:
    return SelfModifyingConfig(hidden_size=WIDTH, num_heads=HEADS, **settings)


def attention_subject(time: int) -> Subject:
    """Forward and backward of the yardstick over `time` tokens."""
    layer = CausalAttention(WIDTH, HEADS)
    return Subject("attention", training_step(layer, time), time, attention_flops(WIDTH, time), layer)


def titans_subject(name: str, config: SelfModifyingConfig, time: int) -> Subject:
    """Forward and backward of one of our layers over `time` tokens."""
    layer = SelfModifyingTitans(config)
    return Subject(name, training_step(lambda x: layer(x)[0], time, layer), time, titans_flops(config, time))


def neural_memory_subject(name: str, chunk: int, time: int) -> Subject:
    """Forward and backward of our neural memory over `time` tokens."""
    config = neural_memory_config(chunk)
    layer = NeuralMemory(config)
    return Subject(name, training_step(lambda x: layer(x)[0], time, layer), time, neural_memory_flops(config, time))


def mixer_layer(preset: str) -> SequenceLayer:
    """The sequence mixer of a preset at the width of the benchmarks; the first is softmax attention with RoPE."""
    config = presets.PRESETS[preset](hidden_size=WIDTH, num_layers=1, **MIXERS[preset])
    return build_mixer(config.mixer_config(0))


def mixer_subject(preset: str, time: int) -> Subject:
    """Forward and backward of a preset's mixer over `time` tokens."""
    layer = mixer_layer(preset)
    return Subject(preset, training_step(lambda x: layer(x)[0], time, layer), time)


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
