"""Presets with other settings of the mixer: one question each, or another size of the state."""

from __future__ import annotations

from typing import Any

Changes = dict[str, Any]

_TITANS: dict[str, Changes] = {
    "chunk 1": {"chunk_size": 1},
    "chunk 16": {"chunk_size": 16},
    "chunk 256": {"chunk_size": 256},
    "no momentum": {"momentum": False},
    "inner learning rate of 0.9": {"inner_lr_scale": 0.9},
    "no retention": {"use_retention": False},
    "no output gate": {"output_gate": False},
    "chunk gradients": {"gradient": "chunk"},
    "ascent in place of descent": {"gradient": "chunk", "ascend": True},
    "chunk 1, 2 inner steps": {"chunk_size": 1, "inner_steps": 2},
}
_HOPE: dict[str, Changes] = {
    "one stream for keys, values and rates": {"own_streams": False},
    "memories that start at random": {"identity": False},
    "gate without a bias": {"gate_bias": None},
    "erase and retention of all of W": {"anchored": False, "others_scale": None, "generation_gain": None},
    "one rate for all memories": {"others_scale": None, "generation_gain": None},
    "updates of the generators from the start": {"generation_gain": 1.0},
    "gradients at the chunk's start": {"gradient": "chunk", "share_of": "erase", "inner_lr_scale": None},
    "values of length 1": {"value_length": None},
    "rates that start at 1": {"eta_start": 0.0},
    "hidden layers written as fast as they are erased": {"hidden_lr_scale": None},
    "momentum": {"momentum": True},
    "generators learn once in four chunks": {"chunk_size": 16, "self_chunk_size": 64},
    "retentions that start shorter": {"retention_start": (0.0, 6.0)},
}
ABLATIONS: dict[str, tuple[str, Changes]] = {
    **{name: ("titans_lmm", changes) for name, changes in _TITANS.items()},
    **{name: ("hope", changes) for name, changes in _HOPE.items()},
}
"""By name: the preset, and what differs."""

SIZED: dict[str, tuple[str, Changes]] = {"gated_deltanet, keys of 88": ("gated_deltanet", {"key_dim": 88})}
"""Presets of another size, with a learning rate of their own: Gated DeltaNet with a state as large as Hope's."""
