"""Every sequence layer keeps the state contract. A new layer is one line in `LAYERS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from nestling.layers.ada_transformer import AdaTransformer, AdaTransformerConfig
from nestling.layers.attention import AttentionConfig, SoftmaxAttention
from nestling.layers.continuum import ContinuumConfig, ContinuumMemory
from nestling.layers.linear import LinearMemory
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.mamba2 import Mamba2, Mamba2Config
from nestling.layers.memory_caching import MemoryCaching
from nestling.layers.memory_caching_config import CacheableConfig, MemoryCachingConfig
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import (
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    NeuralMemoryConfig,
)
from nestling.layers.rwkv7 import RWKV7, RWKV7Config
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.layers.sequence import SequenceLayer
from nestling.layers.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from nestling.layers.ttt import TTTConfig, TTTLayer
from tests.layers.battery import CHECKS, IMPLIED
from tests.layers.reference_linear import ROWS

HIDDEN = 8
self_modifying = partial(SelfModifyingConfig, hidden_size=HIDDEN, num_heads=2, chunk_size=4)
ada_transformer = partial(AdaTransformerConfig, hidden_size=HIDDEN, num_heads=2, chunk_size=4)
HOPE: dict[str, Any] = {
    "gradient": "online",
    "share_of": "rate",
    "own_streams": True,
    "anchored": True,
    "others_scale": 0.3,
    "gate_bias": 1.0,
    "value_length": 1.4,
}
ttt = partial(TTTConfig, hidden_size=HIDDEN, num_heads=2, chunk_size=4)
continuum = partial(ContinuumConfig, hidden_size=HIDDEN, intermediate_size=12)
linear = partial(LinearMemoryConfig, hidden_size=HIDDEN, num_heads=2, chunk_size=4)
mamba2 = partial(Mamba2Config, hidden_size=HIDDEN, num_heads=2, state_size=6, chunk_size=4)
lmm = partial(NeuralMemoryConfig, hidden_size=HIDDEN, num_heads=2, chunk_size=4)
mac = partial(MemoryAsContextConfig, hidden_size=HIDDEN, num_heads=2, chunk_size=4, persistent_tokens=2)
mag = partial(MemoryAsGateConfig, hidden_size=HIDDEN, num_heads=2, chunk_size=4, window=5, persistent_tokens=3)
mal = partial(MemoryAsLayerConfig, hidden_size=HIDDEN, num_heads=2, chunk_size=4, window=5, persistent_tokens=2)


def caching(inner: CacheableConfig, **settings: Any) -> MemoryCaching:
    """Segments of five tokens, which end inside the chunks of four."""
    return MemoryCaching(MemoryCachingConfig(hidden_size=HIDDEN, inner=inner, segment_size=5, **settings))


LAYERS: dict[str, Callable[[], SequenceLayer]] = {
    "titans matrix": lambda: SelfModifyingTitans(self_modifying(memory="matrix")),
    "titans matrix online self chunk": lambda: SelfModifyingTitans(
        self_modifying(memory="matrix", gradient="online", self_chunk_size=8)
    ),
    "titans mlp momentum": lambda: SelfModifyingTitans(self_modifying(momentum=True)),
    "titans mlp momentum self chunk": lambda: SelfModifyingTitans(self_modifying(momentum=True, self_chunk_size=8)),
    "titans mlp online momentum": lambda: SelfModifyingTitans(self_modifying(gradient="online", momentum=True)),
    "titans mlp no erase read before": lambda: SelfModifyingTitans(self_modifying(erase=False, read_before=True)),
    "titans mlp chunk read adaptive q": lambda: SelfModifyingTitans(
        self_modifying(read="chunk", adapt=("memory", "k", "q"), momentum=True)
    ),
    "titans depth 3 checkpointed": lambda: SelfModifyingTitans(
        self_modifying(depth=3, gradient="online", checkpoint_chunks=2, conv_size=1)
    ),
    "hope matrix": lambda: SelfModifyingTitans(self_modifying(memory="matrix", **HOPE)),
    "hope mlp self chunk": lambda: SelfModifyingTitans(self_modifying(self_chunk_size=8, **HOPE)),
    "attention": lambda: SoftmaxAttention(AttentionConfig(HIDDEN, 2, num_kv_heads=1)),
    "attention window": lambda: SoftmaxAttention(AttentionConfig(HIDDEN, 2, window=5)),
    "attention biases wide heads": lambda: SoftmaxAttention(
        AttentionConfig(HIDDEN, 2, head_width=6, bias=True, output_bias=True)
    ),
    "attention norms frequencies window": lambda: SoftmaxAttention(
        AttentionConfig(HIDDEN, 2, num_kv_heads=1, window=5, qk_norm_eps=1e-3, rope_frequencies=(0.7, 0.01))
    ),
    "ada transformer": lambda: AdaTransformer(ada_transformer(intermediate_size=12)),
    "ada transformer linear window": lambda: AdaTransformer(ada_transformer(window=5)),
    "ttt linear": lambda: TTTLayer(ttt()),
    "ttt linear mean plain": lambda: TTTLayer(ttt(step="mean", conv_size=1, output_gate=False)),
    "ttt mlp": lambda: TTTLayer(ttt(inner="mlp", conv_size=1)),
    "ttt mlp mean": lambda: TTTLayer(ttt(inner="mlp", step="mean", expansion=2)),
    "continuum": lambda: ContinuumMemory(continuum(periods=(3, 8, None))),
    "continuum erase value": lambda: ContinuumMemory(continuum(periods=(4, 8), erase=True, target="value")),
    "continuum nested": lambda: ContinuumMemory(continuum(periods=(2, 8, None), variant="nested")),
    "continuum headwise": lambda: ContinuumMemory(
        continuum(periods=(2, 5, None), variant="headwise", target="reconstruction")
    ),
    "linear attention": lambda: LinearMemory(linear(**ROWS["linear attention"])),
    "linear attention pp": lambda: LinearMemory(linear(**ROWS["linear attention pp"])),
    "retnet": lambda: LinearMemory(linear(**ROWS["retnet"])),
    "deltanet": lambda: LinearMemory(linear(**ROWS["deltanet"])),
    "gated deltanet": lambda: LinearMemory(linear(**ROWS["gated deltanet"])),
    "gated deltaproduct": lambda: LinearMemory(linear(**ROWS["gated deltaproduct"])),
    "comba": lambda: LinearMemory(linear(**ROWS["comba"])),
    "kimi delta": lambda: LinearMemory(linear(**ROWS["kimi delta"])),
    "kimi delta three writes": lambda: LinearMemory(
        linear(**ROWS["kimi delta"] | {"writes_per_token": 3, "state_feedback": True})
    ),
    "gated linear attention": lambda: LinearMemory(linear(retention="channel", erase=False, conv_size=1)),
    "rwkv7": lambda: RWKV7(RWKV7Config(HIDDEN, 2, decay_rank=3, gate_rank=5, chunk_size=4)),
    "mamba2": lambda: Mamba2(mamba2()),
    "mamba2 groups": lambda: Mamba2(mamba2(num_heads=4, num_groups=2)),
    "lmm depth 1": lambda: NeuralMemory(lmm(depth=1)),
    "lmm depth 2 chunk rates": lambda: NeuralMemory(lmm(rates="chunk")),
    "lmm depth 3 erase checkpointed": lambda: NeuralMemory(lmm(depth=3, erase=True, checkpoint_chunks=2, conv_size=1)),
    "lmm depth 1 online momentum": lambda: NeuralMemory(lmm(depth=1, gradient="online", max_erase=2.0)),
    "lmm online momentum checkpointed": lambda: NeuralMemory(lmm(gradient="online", checkpoint_chunks=2)),
    "lmm online persistent tokens": lambda: NeuralMemory(lmm(gradient="online", persistent_tokens=3)),
    "lmm two steps": lambda: NeuralMemory(lmm(inner_steps=2, chunk_size=1)),
    "lmm ascending": lambda: NeuralMemory(lmm(ascend=True, momentum=False)),
    "lmm huber chunk read": lambda: NeuralMemory(lmm(objective="huber", momentum=False, read="chunk")),
    "lmm window": lambda: NeuralMemory(lmm(objective_window=3)),
    "lmm window longer than a chunk": lambda: NeuralMemory(
        lmm(objective_window=7, momentum=False, rates="chunk", checkpoint_chunks=1)
    ),
    "memora": lambda: NeuralMemory(lmm(divergence="kl", momentum=False, expansion=2)),
    "memora momentum long chunk": lambda: NeuralMemory(lmm(divergence="kl", chunk_size=12, rates="chunk")),
    "memora chunk read": lambda: NeuralMemory(lmm(divergence="kl", read="chunk", checkpoint_chunks=2)),
    "mac": lambda: MemoryAsContext(mac(segment_size=4)),
    "mac two chunks a segment": lambda: MemoryAsContext(mac(segment_size=8, rates="chunk", checkpoint_chunks=1)),
    "mag": lambda: MemoryAsGate(mag()),
    "mag window": lambda: MemoryAsGate(mag(objective_window=3)),
    "mal": lambda: MemoryAsLayer(mal(depth=1, rates="chunk")),
    "caching deltanet gated": lambda: caching(linear(**ROWS["deltanet"])),
    "caching retnet residual checkpoints": lambda: caching(linear(**ROWS["retnet"]), variant="residual", restart=False),
    "caching linear attention sparse": lambda: caching(linear(**ROWS["linear attention"]), variant="sparse", top_k=1),
    "caching lmm soup": lambda: caching(lmm(), variant="soup"),
    "caching titans soup": lambda: caching(self_modifying(), variant="soup"),
    "caching lmm gated checkpoints": lambda: caching(lmm(rates="chunk", checkpoint_chunks=2), restart=False),
}


def _cases() -> list[Any]:
    """Every layer with every check; what others imply fast for the first layer of a class alone."""
    cases, seen = [], set()
    for layer, make in LAYERS.items():
        kind = type(make())
        for check in CHECKS:
            marks = [pytest.mark.slow] if kind in seen and check in IMPLIED else []
            cases.append(pytest.param(layer, check, id=f"{layer}-{check}", marks=marks))
        seen.add(kind)
    return cases


@pytest.mark.parametrize(("layer", "check"), _cases())
def test_contract(layer: str, check: str) -> None:
    made = LAYERS[layer]().double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    CHECKS[check](made, HIDDEN)
