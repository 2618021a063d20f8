"""Configurations of the usual models by name, at four sizes with equal parameters."""

from __future__ import annotations

from collections.abc import Callable

from nestling.models.configuration import NestlingConfig
from nestling.models.presets.adaptive import ada_transformer, linear_attention_pp
from nestling.models.presets.atlas import dla, omeganet
from nestling.models.presets.delta import comba, gated_deltaproduct, kimi_delta, rwkv7
from nestling.models.presets.hope import hope, hope_attention, hope_linear, transformer
from nestling.models.presets.linear import deltanet, gated_deltanet, linear_attention, mamba2, retnet, samba
from nestling.models.presets.memory_caching import memory_caching, with_memory_caching
from nestling.models.presets.sizes import SIZES
from nestling.models.presets.titans import memora, moneta, titans_lmm, titans_mac, titans_mag, titans_mal, yaad
from nestling.models.presets.ttt import ttt_linear, ttt_mlp

PRESETS: dict[str, Callable[..., NestlingConfig]] = {
    "hope": hope,
    "hope_linear": hope_linear,
    "hope_attention": hope_attention,
    "transformer": transformer,
    "ada_transformer": ada_transformer,
    "linear_attention": linear_attention,
    "linear_attention_pp": linear_attention_pp,
    "retnet": retnet,
    "deltanet": deltanet,
    "gated_deltanet": gated_deltanet,
    "gated_deltaproduct": gated_deltaproduct,
    "comba": comba,
    "kimi_delta": kimi_delta,
    "rwkv7": rwkv7,
    "mamba2": mamba2,
    "samba": samba,
    "ttt_linear": ttt_linear,
    "ttt_mlp": ttt_mlp,
    "titans_lmm": titans_lmm,
    "titans_mac": titans_mac,
    "titans_mag": titans_mag,
    "titans_mal": titans_mal,
    "moneta": moneta,
    "yaad": yaad,
    "memory_caching": memory_caching,
    "memora": memora,
    "dla": dla,
    "omeganet": omeganet,
}

__all__ = [
    "PRESETS",
    "SIZES",
    "ada_transformer",
    "comba",
    "deltanet",
    "dla",
    "gated_deltanet",
    "gated_deltaproduct",
    "hope",
    "hope_attention",
    "hope_linear",
    "kimi_delta",
    "linear_attention",
    "linear_attention_pp",
    "mamba2",
    "memora",
    "memory_caching",
    "moneta",
    "omeganet",
    "retnet",
    "rwkv7",
    "samba",
    "titans_lmm",
    "titans_mac",
    "titans_mag",
    "titans_mal",
    "transformer",
    "ttt_linear",
    "ttt_mlp",
    "with_memory_caching",
    "yaad",
]
