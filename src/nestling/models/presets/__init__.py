"""Configurations of the usual models by name, at four sizes with equal parameters."""

from __future__ import annotations

from collections.abc import Callable

from nestling.models.configuration import NestlingConfig
from nestling.models.presets.hope import hope, hope_attention, hope_linear, transformer
from nestling.models.presets.sizes import SIZES
from nestling.models.presets.titans import moneta, titans_lmm, titans_mac, titans_mag, titans_mal, yaad

PRESETS: dict[str, Callable[..., NestlingConfig]] = {
    "hope": hope,
    "hope_linear": hope_linear,
    "hope_attention": hope_attention,
    "transformer": transformer,
    "titans_lmm": titans_lmm,
    "titans_mac": titans_mac,
    "titans_mag": titans_mag,
    "titans_mal": titans_mal,
    "moneta": moneta,
    "yaad": yaad,
}

__all__ = [
    "PRESETS",
    "SIZES",
    "hope",
    "hope_attention",
    "hope_linear",
    "moneta",
    "titans_lmm",
    "titans_mac",
    "titans_mag",
    "titans_mal",
    "transformer",
    "yaad",
]
