"""What a GGUF file says beside its weights: transformers reads sizes and weights, and leaves out what stands here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

FAMILIES = ("llama", "qwen2", "qwen3")
"""Architectures, by the file's names, of which everything is either carried or refused. Of others the stretching of
their rotary positions is refused, which transformers drops."""

READ_BY_TRANSFORMERS = ("gpt-oss",)
"""Architectures whose stretched positions transformers reads."""

CARRIED = frozenset(
    {
        "context_length",
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scale_linear",
    }
)
WITHOUT_MEANING = frozenset(
    {"tensor_data_layout", "attention.causal", "rope.scaling.original_context_length", "rope.scaling.finetuned"}
)
"""Of how the file was made, or of kinds of stretching that are refused by their own names."""

FACTORS = "rope_freqs.weight"
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GGUFHeader:
    """The head of a GGUF file.

    Attributes:
        architecture: its name for the kind of model.
        values: of the architecture, without its name in front: `rope.freq_base` and others.
        tensors: names of all.
        factors: what every rotary frequency is divided by; None where the file has no such tensor.
    """

    architecture: str
    values: Mapping[str, Any]
    tensors: tuple[str, ...]
    factors: tuple[float, ...] | None

    @property
    def linear(self) -> float:
        """Factor by which all positions are stretched alike; 1 for none."""
        factor = self.values.get("rope.scaling.factor") or self.values.get("rope.scale_linear") or 1.0
        return 1.0 if self.values.get("rope.scaling.type") == "none" else float(factor)

    @property
    def stretched(self) -> bool:
        """Whether the frequencies are others than those of `rope.freq_base`."""
        return self.linear != 1.0 or any(f != 1.0 for f in self.factors or ())


def read_header(path: str | Path) -> GGUFHeader:
    """Read it; the weights are left alone.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: or another error of that package, for a damaged file.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(path))
    architecture = str(reader.fields["general.architecture"].contents())
    own = {name: field for name, field in reader.fields.items() if name.startswith(f"{architecture}.")}
    values = {name.removeprefix(f"{architecture}."): field.contents() for name, field in own.items()}
    factors = next((tuple(map(float, t.data.tolist())) for t in reader.tensors if t.name == FACTORS), None)
    return GGUFHeader(architecture, values, tuple(str(t.name) for t in reader.tensors), factors)


def check_header(header: GGUFHeader) -> None:
    """Refuse what would be lost in loading.

    Raises:
        ValueError: naming it.
    """
    kind = header.values.get("rope.scaling.type", "none" if header.linear == 1.0 else "linear")
    if header.architecture in READ_BY_TRANSFORMERS:
        return
    if long := sorted(t for t in header.tensors if t.startswith("rope_factors")):
        raise ValueError(f"it has rotary positions of two kinds ({long[0]}), which are not supported")
    if kind not in ("none", "linear"):
        raise ValueError(f"its rotary positions are stretched by {kind!r}; supported are linear and {FACTORS}")
    if header.architecture not in FAMILIES:
        if header.stretched:
            raise ValueError(f"its rotary positions are stretched, which is not supported for {header.architecture}")
        return
    for name, value in header.values.items():
        unused = not value or (name == "rope.scaling.attn_factor" and value == 1.0)
        if name not in CARRIED | WITHOUT_MEANING and not unused:
            raise ValueError(f"it says {header.architecture}.{name} = {value}, which is not supported")
    named = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    widths = {int(header.values[name]) for name in named if header.values.get(name)}
    if len(widths) > 1:
        raise ValueError(
            f"keys, values and rotary positions have different widths ({', '.join(map(str, sorted(widths)))} channels "
            "of a head), which is not supported"
        )


def complete(config: PretrainedConfig, header: GGUFHeader) -> PretrainedConfig:
    """Put into a configuration of `FAMILIES` what transformers left out; the others are left alone.

    Factors of single frequencies become `longrope` with the same factors for short and long texts, the one kind of
    transformers that takes any.

    Raises:
        ValueError: a window for which the architecture has no setting.
    """
    if header.architecture not in FAMILIES:
        return config
    window = header.values.get("attention.sliding_window") or None
    if config.model_type == "mistral":
        config.sliding_window = window
    elif window is not None and window < config.max_position_embeddings:
        raise ValueError(f"it has a window of {window} tokens, which is not supported for {header.architecture}")
    width = header.values.get("attention.key_length")
    if width and width != (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads):
        config.head_dim = int(width)
    if any(name.endswith("attn_q.bias") for name in header.tensors) and hasattr(config, "attention_bias"):
        config.attention_bias = True
    if header.stretched:
        config.rope_parameters = _stretched(config, header)
    return config


def unused_tensors(header: GGUFHeader, held: Collection[str]) -> list[str]:
    """Tensors of a file of `FAMILIES` that have no place among the weights `held`."""
    if header.architecture not in FAMILIES:
        return []
    return [name for name in header.tensors if name != FACTORS and _renamed(name) not in held]


def _stretched(config: PretrainedConfig, header: GGUFHeader) -> dict[str, Any]:
    rope: dict[str, Any] = config.rope_parameters  # type: ignore[assignment]  # a dict in this version
    base = {"rope_theta": float(rope["rope_theta"])}
    if header.factors is None:
        return base | {"rope_type": "linear", "factor": header.linear}
    factors = [f * header.linear for f in header.factors]
    long = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    return base | long | {"original_max_position_embeddings": config.max_position_embeddings}


def _renamed(tensor: str) -> str:
    """transformers' name of a tensor; empty where it has none."""
    module, _, kind = tensor.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if block is None:
        return f"{OUTSIDE[module]}.{kind}" if module in OUTSIDE else ""
    part = INSIDE.get(block[2])
    return f"model.layers.{block[1]}.{part}.{kind}" if part else ""
