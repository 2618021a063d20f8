"""What a pre-trained model must be to become a `NestlingForCausalLM` with equal outputs.

The model itself is asked, not its configuration alone: users prune, resize, untie and patch models, and files hold what
their configuration denies.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SUPPORTED = "Llama (SmolLM2 is one), Mistral, Qwen2 and Qwen3"
STRETCHED_ROPE = ("linear", "llama3")
"""Rotary kinds whose frequencies are fixed and whose attention is not rescaled."""


def check_convertible(model: PreTrainedModel) -> None:
    """Refuse what cannot become a `NestlingForCausalLM` with equal outputs.

    Raises:
        ValueError: the architecture, or the setting of its configuration, and what is supported.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a {type(model).__name__} cannot be converted; give the transformers model itself")
    c = model.config
    if c.model_type == "nestling":
        raise ValueError("the model is nestling's already; give the pre-trained model it was made from")
    if FAMILIES.get(c.model_type) != type(model).__name__:
        raise ValueError(
            f"{type(model).__name__} (model type {c.model_type}) cannot be converted; supported are the causal "
            f"language models of {SUPPORTED}"
        )
    if getattr(model, "quantization_method", None) not in (None, "gguf"):  # GGUF weights are expanded on loading
        raise ValueError("the weights are quantized; give the model in float32, float16 or bfloat16, or as GGUF")
    places = sorted({str(p.device) for p in model.parameters()})
    if len(places) > 1 or places == ["meta"]:
        raise ValueError(
            f"the weights are on {', '.join(places)}, where meta means offloaded; load the whole model on one device"
        )
    _check_settings(c)
    _check_modules(model)
    rope_settings(model)


def rope_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The rotary fields of `AttentionConfig`: the base of the frequencies, or where that says too little the values.

    Raises:
        ValueError: a kind of rotary positions whose frequencies change with the text, that rescales the attention, or
            that turns only some of the channels.
    """
    rope: dict[str, Any] = model.config.rope_parameters  # type: ignore[assignment]
    kind = rope.get("rope_type")
    fixed = kind == "longrope" and list(rope["short_factor"]) == list(rope["long_factor"])
    if kind != "default" and kind not in STRETCHED_ROPE and not fixed:
        raise ValueError(f"rope type {kind!r} is not supported; supported are default, {', '.join(STRETCHED_ROPE)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported: rotary positions turn all channels of a head")
    held = cast(Any, model).model.rotary_emb
    if held.attention_scaling != 1.0:
        raise ValueError(f"rotary positions that scale the attention, by {held.attention_scaling}, are not supported")
    said = type(held)(model.config).inv_freq
    frequencies = _frequencies(held.inv_freq, said)
    if 2 * len(frequencies) != _head_width(model):
        raise ValueError("rotary positions that turn only some channels of a head are not supported")
    theta = {"rope_theta": float(rope["rope_theta"])}
    if kind == "default" and frequencies is said:
        return theta
    return theta | {"rope_frequencies": frequencies.tolist()}


def has_own_head(model: PreTrainedModel) -> bool:
    """Whether the output projection has values of its own, whatever the configuration says."""
    embedding, head = (cast(Any, m).weight for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    if head is embedding:
        return False
    return not model.config.tie_word_embeddings or head.shape != embedding.shape or not torch.equal(head, embedding)


def _frequencies(held: Tensor, said: Tensor) -> Tensor:
    """Those that the model holds, or those of its configuration where the model's are the same but for rounding: a
    model in half precision has rounded them with its weights."""
    held = held.detach().to("cpu", torch.float32)
    close = held.shape == said.shape and torch.allclose(held, said, rtol=1e-5, atol=0)
    rounded = held.shape == said.shape and any(
        torch.equal(held, said.to(half).float()) for half in (torch.float16, torch.bfloat16)
    )
    return said if close or rounded else held


def _check_settings(c: PretrainedConfig) -> None:
    if c.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {c.hidden_act!r} is not supported; the networks of the levels use silu")
    if getattr(c, "mlp_bias", False):
        raise ValueError("mlp_bias is not supported: a bias would belong to no hidden neuron, so to no level")
    kinds = set(getattr(c, "layer_types", None) or ()) if c.model_type.startswith("qwen") else set()
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types has {', '.join(sorted(unknown))}; supported are full and sliding attention")


def _check_modules(model: PreTrainedModel) -> None:
    """The parts that the configuration speaks of, as they are."""
    c, inner = model.config, cast(Any, model).model
    if len(inner.layers) != c.num_hidden_layers:
        raise ValueError(
            f"the model has {len(inner.layers)} layers, and its configuration says {c.num_hidden_layers}; correct "
            "config.num_hidden_layers"
        )
    rows = {len(cast(nn.Embedding, m).weight) for m in (inner.embed_tokens, cast(Any, model).lm_head)}
    if rows != {c.vocab_size}:
        raise ValueError(
            f"embedding and output projection have {' and '.join(map(str, sorted(rows)))} rows, and the configuration "
            f"says {c.vocab_size}; use model.resize_token_embeddings"
        )
    scale = _head_width(model) ** -0.5
    for name, module in model.named_modules():
        epsilon = getattr(module, "variance_epsilon", None)
        if epsilon is not None and epsilon != c.rms_norm_eps:
            raise ValueError(f"{name} adds {epsilon} in its norm, and the configuration says {c.rms_norm_eps}")
        scaling = getattr(module, "scaling", None) if name.endswith("self_attn") else None
        if scaling is not None and abs(scaling / scale - 1.0) > 1e-6:
            raise ValueError(f"{name} scales its scores by {scaling}; supported is 1 / sqrt(width of a head), {scale}")
        activation = getattr(module, "act_fn", None) if name.endswith("mlp") else None
        if activation is not None and not _is_silu(activation):
            raise ValueError(f"{name} has another activation than silu, which is not supported")


def _is_silu(activation: Any) -> bool:
    x = torch.linspace(-3, 3, 7)
    return torch.allclose(activation(x), nn.functional.silu(x))


def _head_width(model: PreTrainedModel) -> int:
    return int(cast(Any, model).model.layers[0].self_attn.head_dim)
