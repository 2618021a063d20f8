"""Memory Caching: equal to the equations token by token, and settings that must equal other layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from nestling.layers.linear import LinearMemory
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.memory_caching import MemoryCaching
from nestling.layers.memory_caching_config import VARIANTS, CacheableConfig, MemoryCachingConfig
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.self_modifying import SelfModifyingConfig
from nestling.layers.sequence import Aligned
from nestling.memory.kept import KeptMemories
from tests.layers.battery import close, gradients, noise, weigh
from tests.layers.reference_linear import ROWS
from tests.layers.reference_memory_caching import reference

HIDDEN, TIME, SEGMENT = 8, 23, 6


def linear(row: str) -> LinearMemoryConfig:
    return LinearMemoryConfig(hidden_size=HIDDEN, num_heads=2, chunk_size=4, **ROWS[row])


def neural(**settings: Any) -> NeuralMemoryConfig:
    return NeuralMemoryConfig(hidden_size=HIDDEN, num_heads=2, chunk_size=4, **settings)


def self_modifying(**settings: Any) -> SelfModifyingConfig:
    return SelfModifyingConfig(hidden_size=HIDDEN, num_heads=2, chunk_size=4, conv_size=1, **settings)


INNER: dict[str, CacheableConfig] = {
    "linear attention": linear("linear attention"),
    "retnet": linear("retnet"),
    "deltanet": linear("deltanet"),
    "gated deltanet": linear("gated deltanet"),
    "lmm depth 1": neural(depth=1),
    "lmm depth 2": neural(expansion=2),
    "lmm depth 2 chunk rates": neural(rates="chunk", momentum=False, activation="gelu"),
    "lmm depth 3 erase": neural(depth=3, erase=True),
    "lmm read before": neural(read_before=True),
    "self-modifying mlp": self_modifying(momentum=True, anchored=True, own_streams=True),
    "self-modifying matrix two chunks": self_modifying(memory="matrix", gradient="online", self_chunk_size=8),
    "lmm window": neural(objective_window=3),
    "lmm two steps": NeuralMemoryConfig(hidden_size=HIDDEN, num_heads=2, chunk_size=1, inner_steps=2),
}


def make(inner: CacheableConfig, segment_size: int = SEGMENT, **settings: Any) -> MemoryCaching:
    """A float64 layer whose parameters are all away from their first values."""
    torch.manual_seed(3)
    layer = MemoryCaching(
        MemoryCachingConfig(hidden_size=HIDDEN, inner=inner, segment_size=segment_size, **settings)
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("inner", INNER)
def test_equals_the_equations(inner: str, variant: str) -> None:
    """Independent segments and checkpoints in turn, so that every layer and every variant sees both."""
    restart = (list(INNER).index(inner) + VARIANTS.index(variant)) % 2 == 0
    layer = make(INNER[inner], variant=variant, restart=restart)
    x = noise(2, TIME, HIDDEN).requires_grad_()
    y, wanted = layer(x)[0], reference(layer, x)
    close([y], [wanted])
    close(gradients(weigh(y), [x], layer), gradients(weigh(wanted), [x], layer))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("inner", ["deltanet", "lmm depth 2"])
def test_one_segment_is_the_inner_layer_alone(inner: str, variant: str) -> None:
    layer, x = make(INNER[inner], segment_size=TIME, variant=variant), noise(2, TIME, HIDDEN)
    close([layer(x)[0]], [layer.inner(x)[0]])


def test_the_sum_of_independent_matrices_is_one_matrix() -> None:
    """Linear memories that restart and are summed are the memory of the whole text (the paper's Eq. 13)."""
    for row in ("linear attention", "retnet"):
        inner = replace(linear(row), retention="none")
        layer, x = make(inner, variant="residual"), noise(2, TIME, HIDDEN)
        close([layer(x)[0]], [layer.inner(x)[0]])


def test_a_soup_of_matrices_is_their_gated_sum() -> None:
    """By linearity; of deeper memories it is not (the paper's section 3.3)."""
    x = noise(2, TIME, HIDDEN)
    for name, same in {"gated deltanet": True, "lmm depth 1": True, "lmm depth 2": False}.items():
        soup, gated = (make(INNER[name], variant=variant)(x)[0] for variant in ("soup", "gated"))
        assert torch.allclose(soup, gated, rtol=1e-9, atol=1e-12) == same, name


def test_sparse_selection_of_all_is_gated() -> None:
    x = noise(2, TIME, HIDDEN)
    gated = make(INNER["deltanet"])(x)[0]
    close([make(INNER["deltanet"], variant="sparse", top_k=3)(x)[0]], [gated])
    fewer = make(INNER["deltanet"], variant="sparse", top_k=1)(x)[0]
    close([fewer[:, : 2 * SEGMENT]], [gated[:, : 2 * SEGMENT]])  # with one memory kept there is nothing to select
    assert not torch.allclose(fewer[:, 2 * SEGMENT :], gated[:, 2 * SEGMENT :])


def test_sparse_selection_reads_what_it_selects_alone() -> None:
    """While it writes token by token, no more than `top_k` memories of a head are read."""
    read: list[int] = []

    class Watched(LinearMemory):
        def run_with_kept(self, x: Any, state: Any, lengths: Any, kept: KeptMemories | None) -> Any:
            read.append(0 if kept is None else kept.weights[0].shape[1])
            return super().run_with_kept(x, state, lengths, kept)

    layer = make(replace(linear("deltanet"), num_heads=1), variant="sparse", top_k=2, segment_size=2)
    layer.inner = Watched(layer.config.inside).double()  # type: ignore[arg-type]
    state = layer(noise(1, 12, HIDDEN))[1]
    del read[:]
    for token in noise(1, 4, HIDDEN, seed=1).split(1, 1):
        state = layer(token, state)[1]
    assert max(read) == 2 and state.kept[0].shape[1] == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize("inner", ["deltanet", "lmm depth 2"])
def test_the_state_grows_by_a_memory_a_segment(inner: str) -> None:
    layer = make(INNER[inner])
    sizes = [layer(noise(1, SEGMENT * n + 1, HIDDEN))[1].nbytes for n in range(4)]
    grown = {b - a for a, b in pairwise(sizes)}
    memory = sum(w.nbytes for w in layer.inner.memory_of(layer.inner.init_state(1)))
    assert grown == {memory + 8 * layer.config.num_heads * layer.config.gate_width}
    (described,) = layer.describe_memories()
    assert described.growth == -(-grown.pop() // (8 * SEGMENT))


def test_a_restarted_memory_forgets_and_the_kept_one_does_not() -> None:
    """After a segment's end the inner state is the first one, the convolution's tail apart."""
    for name in ("deltanet", "lmm depth 2"):
        layer = make(INNER[name])
        with torch.no_grad():
            _, state = layer(noise(2, SEGMENT, HIDDEN))
            first = layer.init_state(2)
        found = [(n, a, b) for (n, a), (_, b) in zip(state.memory.tensors(), first.memory.tensors(), strict=True)]  # type: ignore[attr-defined]
        assert [n for n, a, b in found if not torch.equal(a, b)] == ["conv"]
        assert bool(state.kept[0].any())  # type: ignore[attr-defined]


def test_recomputing_segments_changes_nothing() -> None:
    x = noise(2, TIME, HIDDEN).requires_grad_()
    found = []
    for chunks in (None, 1, 3):
        layer = make(replace(neural(), checkpoint_chunks=chunks))
        assert layer.inner.config.checkpoint_chunks is None  # type: ignore[union-attr]
        found.append([layer(x)[0], *gradients(weigh(layer(x)[0]), [x], layer)])
    close(found[1], found[0])
    close(found[2], found[0])


def test_hooks_of_the_inner_layer_see_every_segment() -> None:
    layer, seen = make(INNER["deltanet"]), []
    layer.inner.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    with torch.no_grad():
        layer(noise(1, TIME, HIDDEN))
    assert [n for n in seen if n] == [SEGMENT, SEGMENT, SEGMENT, TIME - 3 * SEGMENT]


def test_what_cannot_be_kept_is_refused() -> None:
    for settings, message in (
        ({"inner": "deltanet"}, "inner is one of linear_memory, neural_memory, self_modifying"),
        ({"inner": replace(linear("deltanet"), hidden_size=16)}, "hidden_size is 8 and the inner layer's 16"),
        ({"segment_size": 0}, "segment_size must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"variant": "mean"}, "variant is one of 'residual', 'gated', 'soup', 'sparse', not 'mean'"),
        ({"inner": self_modifying(adapt=("memory", "k", "q"))}, "needs the inner adapt without 'q'"),
        ({"inner": neural(divergence="kl")}, "its state is the logarithms of its weights"),
        ({"variant": "soup", "inner": neural(read="chunk")}, "needs the inner read='token'"),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryCachingConfig(**{"hidden_size": HIDDEN, "inner": linear("deltanet")} | settings)
    layer = make(INNER["deltanet"])
    inner: nn.Module = layer.inner
    with pytest.raises(
        TypeError, match="memory caching continues from a MemoryCachingState, not from LinearMemoryState"
    ):
        layer(noise(1, 3, HIDDEN), inner(noise(1, 3, HIDDEN), rows=Aligned())[1])
