"""The floating-point operations a layer cannot do without, forward and backward, counted from its equations.

Only matrix products count, a multiply-add as two operations; triangular products count the triangle alone. A backward
pass does two products for each one of the forward. An implementation does more than this: full squares in place of
triangles, elementwise work, recomputation. The share of peak therefore tells how far it is from the bound.
"""

from __future__ import annotations

from nestling.layers.self_modifying import DEEP, GATES, SelfModifyingConfig

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
    chunks = time / config.chunk_size
    return FORWARD_AND_BACKWARD * (projections + chunks * config.num_heads * _chunk_flops(config))


def _chunk_flops(config: SelfModifyingConfig) -> float:
    """One chunk of one head, forward.

    With C tokens, a weight of V x K and P stacked memories that learn (F that do not), per layer:
    forward at keys, and at values when targets are generated: 2 C K V each; forward at u for what is generated from it;
    gradient handed down from layers above 0: 2 C K V; Gram matrix and query match: C^2 K each (half of 2 C^2 K);
    solve: C^2 V; state update: 2 C K V; read of M_memory: 2 C K V + C^2 V.
    Momentum adds S x, S's update and S q (2 C K V each) and two triangular products.
    """
    c, head = config.chunk_size, config.hidden_size // config.num_heads
    names = (*(DEEP if "q" in config.adapt else DEEP[:3]), *(GATES if config.use_retention else GATES[:1]))
    learning = [n for n in names if n in config.adapt]
    generated = [n for n in names if n != "memory"]
    deep = sum(n in DEEP for n in learning)
    hidden = head if config.layers == 1 else head * config.expansion
    total = float(c**3) / 3 if config.momentum else 0.0  # D = A B, triangular
    for layer in range(config.layers):
        k = head if layer == 0 else hidden
        v = head if layer == config.layers - 1 else hidden
        rows = deep * v + (sum(n in GATES for n in learning) if layer == 0 else 0)
        grams = 1 if layer == 0 else deep
        generating = sum(n in DEEP for n in generated) * v + (sum(n in GATES for n in generated) if layer == 0 else 0)
        total += 2.0 * c * k * generating
        total += 2.0 * c * k * rows * (2 if config.self_targets else 1)
        total += 2.0 * c * k * rows if layer > 0 else 0.0
        total += _write_flops(config, c, k, rows, grams) + _read_flops(config, c, k, v)
    return total


def _write_flops(config: SelfModifyingConfig, c: int, k: int, rows: int, grams: int) -> float:
    """Solve and state update of one layer. Without erase or online gradients there is nothing to solve."""
    update = 2.0 * c * k * rows * (2 if config.momentum else 1)
    if not config.erase and config.gradient == "chunk":
        return update
    solve = grams * 1.0 * c * c * k + 1.0 * c * c * rows
    return update + solve + (2.0 * c * k * rows + 1.0 * c * c * rows if config.momentum else 0.0)


def _read_flops(config: SelfModifyingConfig, c: int, k: int, v: int) -> float:
    """M_memory at the queries."""
    from_weight = 2.0 * c * k * v
    if config.read == "chunk":
        return from_weight
    from_writes = 1.0 * c * c * k + 1.0 * c * c * v
    if not config.momentum:
        return from_weight + from_writes
    erased = 1.0 * c * c * v if config.erase else 0.0
    return 2 * from_weight + from_writes + erased
