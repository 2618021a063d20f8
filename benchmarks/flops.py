"""The floating-point operations a layer cannot do without, forward and backward, counted from its equations.

Only matrix products count, a multiply-add as two operations; triangular products count the triangle alone. A backward
pass does two products for each one of the forward. An implementation does more than this: full squares in place of
triangles, elementwise work, recomputation. The share of peak therefore tells how far it is from the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.self_modifying import DEEP, GATES, SelfModifyingConfig
from nestling.memory.rule import Rule

FORWARD_AND_BACKWARD = 3.0


def attention_flops(width: int, time: int) -> float:
    """Causal attention with its projections, batch 1.

    Projections: 4 products of T x width x width. Scores and weighted sum: 2 products over the T^2 / 2 causal pairs.
    """
    projections = 4 * 2.0 * time * width * width
    pairs = time * time / 2
    return FORWARD_AND_BACKWARD * (projections + 2 * 2.0 * pairs * width)


def titans_flops(config: SelfModifyingConfig, time: int) -> float:
    """`SelfModifyingTitans`, batch 1, one chunk size for all memories.

    Projections: one or two input streams, the output gate, the output.

    Raises:
        ValueError: a separate `self_chunk_size`, for which this count does not hold.
    """
    if config.outer_chunk != config.chunk_size:
        raise ValueError("the count holds for self_chunk_size equal to chunk_size")
    streams = 1 if "q" in config.adapt else 2
    dense = streams + 1 + config.output_gate
    projections = dense * 2.0 * time * config.hidden_size**2
    head = config.hidden_size // config.num_heads
    names = (*(DEEP if "q" in config.adapt else DEEP[:3]), *(GATES if config.use_retention else GATES[:1]))
    learning, read = [n for n in names if n in config.adapt], [n for n in names if n != "memory"]
    chunk = _Chunk(
        rule=config,
        tokens=config.chunk_size,
        layers=config.layers,
        head=head,
        hidden=head if config.layers == 1 else head * config.expansion,
        deep=sum(n in DEEP for n in learning),
        gates=sum(n in GATES for n in learning),
        read_deep=sum(n in DEEP for n in read),
        read_gates=sum(n in GATES for n in read),
        self_targets=config.self_targets,
    )
    return FORWARD_AND_BACKWARD * (projections + time / config.chunk_size * config.num_heads * chunk.flops())


def neural_memory_flops(config: NeuralMemoryConfig, time: int) -> float:
    """`NeuralMemory`, batch 1. Projections: query, key, value, the output gate, the output."""
    projections = (4 + config.output_gate) * 2.0 * time * config.hidden_size**2
    hidden = config.head_dim if config.depth == 1 else config.head_dim * config.expansion
    chunk = _Chunk(config, config.chunk_size, config.depth, config.head_dim, hidden, deep=1)
    return FORWARD_AND_BACKWARD * (projections + time / config.chunk_size * config.num_heads * chunk.flops())


@dataclass(frozen=True)
class _Chunk:
    """One chunk of one head: C tokens, `deep` memories and `gates` that learn, and those that are read for tokens.

    `self_targets`: values go through the memories too.
    """

    rule: Rule
    tokens: int
    layers: int
    head: int
    hidden: int
    deep: int
    gates: int = 0
    read_deep: int = 0
    read_gates: int = 0
    self_targets: bool = False

    def flops(self) -> float:
        """Forward.

        With a weight of V x K, per layer: forward at keys, and at values when targets are generated: 2 C K V each;
        forward at u for what is generated from it; gradient handed down from layers above 0: 2 C K V; Gram matrix and
        query match: C^2 K each (half of 2 C^2 K); solve: C^2 V; state update: 2 C K V; read of the main memory:
        2 C K V + C^2 V. Momentum adds S x, S's update and S q (2 C K V each) and two triangular products.
        """
        c = self.tokens
        total = float(c**3) / 3 if self.rule.momentum else 0.0  # D = A B, triangular
        for layer in range(self.layers):
            k = self.head if layer == 0 else self.hidden
            v = self.head if layer == self.layers - 1 else self.hidden
            rows = self.deep * v + (self.gates if layer == 0 else 0)
            grams = 1 if layer == 0 else self.deep
            total += 2.0 * c * k * (self.read_deep * v + (self.read_gates if layer == 0 else 0))
            total += 2.0 * c * k * rows * (2 if self.self_targets else 1)
            total += 2.0 * c * k * rows if layer > 0 else 0.0
            total += _write_flops(self.rule, c, k, rows, grams) + _read_flops(self.rule, c, k, v)
        return total


def _write_flops(config: Rule, c: int, k: int, rows: int, grams: int) -> float:
    """Solve and state update of one layer. Without erase or online gradients there is nothing to solve."""
    update = 2.0 * c * k * rows * (2 if config.momentum else 1)
    if not config.erase and config.gradient == "chunk":
        return update
    solve = grams * 1.0 * c * c * k + 1.0 * c * c * rows
    return update + solve + (2.0 * c * k * rows + 1.0 * c * c * rows if config.momentum else 0.0)


def _read_flops(config: Rule, c: int, k: int, v: int) -> float:
    """M_memory at the queries."""
    from_weight = 2.0 * c * k * v
    if config.read == "chunk":
        return from_weight
    from_writes = 1.0 * c * c * k + 1.0 * c * c * v
    if not config.momentum:
        return from_weight + from_writes
    erased = 1.0 * c * c * v if config.erase else 0.0
    return 2 * from_weight + from_writes + erased
