"""Configurations of the usual models by name, at four sizes with equal parameters."""

from __future__ import annotations

from collections.abc import Callable

from nestling.models.configuration import NestlingConfig
from nestling.models.presets.hope import hope, hope_attention, hope_linear, transformer
from nestling.models.presets.sizes import SIZES
from nestling.models.presets.ttt import ttt_linear, ttt_mlp

PRESETS: dict[str, Callable[..., NestlingConfig]] = {
    "hope": hope,
    "hope_linear": hope_linear,
    "hope_attention": hope_attention,
    "transformer": transformer,
    "ttt_linear": ttt_linear,
    "ttt_mlp": ttt_mlp,
}

__all__ = ["PRESETS", "SIZES", "hope", "hope_attention", "hope_linear", "transformer", "ttt_linear", "ttt_mlp"]
