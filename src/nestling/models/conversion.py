"""Ad-hoc level stacking: a pre-trained transformer becomes Hope-Attention, its MLPs the first CMS blocks (NL 7.3)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nestling.models.configuration import NestlingConfig, check_periods
from nestling.models.modeling import NestlingForCausalLM

Assignment = Literal["depth", "interleaved", "split"]
ASSIGNMENTS: tuple[str, ...] = get_args(Assignment)

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SUPPORTED = "Llama (SmolLM2 is one), Mistral, Qwen2 and Qwen3"
STRETCHED_ROPE = ("linear", "llama3")
"""Rotary kinds whose frequencies are fixed and whose attention is not rescaled."""

OUTSIDE = {"model.embed_tokens": "embed_tokens", "model.norm": "norm", "lm_head": "lm_head"}
INSIDE = {
    "input_layernorm": "mixer_norm",
    "self_attn.q_proj": "mixer.query",
    "self_attn.k_proj": "mixer.key",
    "self_attn.v_proj": "mixer.value",
    "self_attn.o_proj": "mixer.output",
    "self_attn.q_norm": "mixer.query_norm",
    "self_attn.k_norm": "mixer.key_norm",
    "post_attention_layernorm": "channel_norm",
}
NEURON_AXIS = {"mlp.gate_proj": ("gate", 0), "mlp.up_proj": ("up", 0), "mlp.down_proj": ("down", 1)}


def convert(model: PreTrainedModel, levels: Mapping[str, int], assignment: Assignment = "depth") -> NestlingForCausalLM:
    """The same function as a `NestlingForCausalLM` whose MLPs are levels with update periods.

    The logits equal the original's to rounding until a level is updated. With n blocks, H hidden neurons an MLP and
    the levels 0 to k - 1, fastest first:

        depth        block i has level floor((n - 1 - i) k / n): groups of neighbours, the top of the model fastest
        interleaved  block i has level i mod k
        split        every block has all of them; level j has the hidden neurons floor(j H / k) to
                     floor((j + 1) H / k) - 1 (NL Eq. 74 with weights one)

    In first trials on a small model the top-fastest order learned and kept more than the slow top.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3 for causal language modelling; unchanged. Its weights are copied, in their
            own type and on their own device. Dropout is not taken over: it matters in training only.
        levels: update period by name, in tokens; no two equal.
        assignment: see above.

    Raises:
        ValueError: another architecture, a setting of it that `NestlingForCausalLM` does not have, levels that cannot
            be, or more of them than there are blocks or neurons.
    """
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment is one of {', '.join(ASSIGNMENTS)}; got {assignment!r}")
    periods = check_periods(levels)
    check_convertible(model)
    source = model.config
    shares = assign_neurons(source.num_hidden_layers, source.intermediate_size, tuple(periods), assignment)
    config = _config(source, shares, periods)
    with torch.device("meta"):
        converted = NestlingForCausalLM(config)
    converted.load_state_dict(dict(_renamed(model.state_dict(), shares)), strict=True, assign=True)
    converted.tie_weights()
    if model.generation_config is not None:
        converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.train(model.training)


def assign_neurons(
    blocks: int, neurons: int, levels: Sequence[str], assignment: Assignment
) -> list[dict[str, tuple[int, int]]]:
    """For every block the hidden neurons of its levels, as `{level: (first, one after the last)}`; see `convert`.

    Raises:
        ValueError: a level would get nothing.
    """
    count = len(levels)
    places, what = (neurons, "hidden neurons") if assignment == "split" else (blocks, "blocks")
    if count > places:
        raise ValueError(f"{count} levels cannot share {places} {what}; give fewer levels")
    if assignment == "split":
        bounds = [j * neurons // count for j in range(count + 1)]
        return [dict(zip(levels, pairwise(bounds), strict=True)) for _ in range(blocks)]
    if assignment == "interleaved":
        return [{levels[i % count]: (0, neurons)} for i in range(blocks)]
    return [{levels[(blocks - 1 - i) * count // blocks]: (0, neurons)} for i in range(blocks)]


def check_convertible(model: PreTrainedModel) -> None:
    """Refuse what cannot become a `NestlingForCausalLM` with equal outputs.

    Raises:
        ValueError: the architecture, or the setting of its configuration, and what is supported.
    """
    c = model.config
    if isinstance(model, NestlingForCausalLM):
        raise ValueError("the model is nestling's already; give the pre-trained model it was made from")
    if FAMILIES.get(c.model_type) != type(model).__name__:
        raise ValueError(
            f"{type(model).__name__} (model type {c.model_type}) cannot be converted; supported are the causal "
            f"language models of {SUPPORTED}"
        )
    if getattr(model, "quantization_method", None) not in (None, "gguf"):  # GGUF weights are expanded on loading
        raise ValueError("the weights are quantized; give the model in float32, float16 or bfloat16, or as GGUF")
    if c.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {c.hidden_act!r} is not supported; the networks of the levels use silu")
    if getattr(c, "mlp_bias", False):
        raise ValueError("mlp_bias is not supported: a bias would belong to no hidden neuron, so to no level")
    kinds = set(getattr(c, "layer_types", None) or ()) if c.model_type.startswith("qwen") else set()
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types has {', '.join(sorted(unknown))}; supported are full and sliding attention")
    rope_settings(c)


def rope_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary fields of `AttentionConfig`: the base of the frequencies, or where that says too little the values.

    Raises:
        ValueError: a kind of rotary positions whose frequencies change with the text or that rescales the attention.
    """
    rope: dict[str, Any] = config.rope_parameters  # type: ignore[assignment]
    kind = rope.get("rope_type")
    if kind != "default" and kind not in STRETCHED_ROPE:
        raise ValueError(f"rope type {kind!r} is not supported; supported are default, {', '.join(STRETCHED_ROPE)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported: rotary positions turn all channels of a head")
    theta = {"rope_theta": float(rope["rope_theta"])}
    if kind == "default":
        return theta
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return theta | {"rope_frequencies": frequencies.tolist()}


def _config(
    c: PretrainedConfig, shares: Sequence[Mapping[str, tuple[int, int]]], periods: dict[str, int]
) -> NestlingConfig:
    biased = c.model_type == "qwen2" or getattr(c, "attention_bias", False)
    mixer = {
        "kind": "attention",
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "head_width": getattr(c, "head_dim", None),
        "bias": biased,
        "output_bias": biased and c.model_type != "qwen2",
        "qk_norm_eps": c.rms_norm_eps if c.model_type == "qwen3" else None,
    } | rope_settings(c)
    blocks = [
        {
            "mixer": mixer | {"window": _window(c, i)},
            "channel": {
                "kind": "leveled_feed_forward",
                "levels": list(share),
                "neurons": [end - start for start, end in share.values()],
            },
        }
        for i, share in enumerate(shares)
    ]
    return NestlingConfig(
        blocks=blocks,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        tie_word_embeddings=c.tie_word_embeddings,
        initializer_range=c.initializer_range,
        norm_eps=c.rms_norm_eps,
        logit_scale=1.0,
        pad_token_id=c.pad_token_id,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
        levels=periods,
    )


def _window(c: PretrainedConfig, block: int) -> int | None:
    """Mistral has one window everywhere, Qwen where `layer_types` says so, Llama has none."""
    everywhere = c.model_type == "mistral"
    here = c.model_type.startswith("qwen") and c.layer_types[block] == "sliding_attention"
    return c.sliding_window if everywhere or here else None


def _renamed(
    weights: Mapping[str, Tensor], shares: Sequence[Mapping[str, tuple[int, int]]]
) -> Iterator[tuple[str, Tensor]]:
    """Copies of all weights under this package's names, the MLPs parted into their levels."""
    for key, weight in weights.items():
        module, _, kind = key.rpartition(".")
        if module in OUTSIDE:
            yield f"{OUTSIDE[module]}.{kind}", weight.detach().clone()
            continue
        _, _, index, part = [*module.split(".", 3), "", "", ""][:4]
        if part not in INSIDE and part not in NEURON_AXIS:
            raise ValueError(f"the model holds {key}, which is no part of its architecture; merge adapters first")
        if part in INSIDE:
            yield f"blocks.{index}.{INSIDE[part]}.{kind}", weight.detach().clone()
            continue
        name, axis = NEURON_AXIS[part]
        for level, (start, end) in shares[int(index)].items():
            own = weight.detach().narrow(axis, start, end - start)
            yield (
                f"blocks.{index}.channel.levels.{level}.{name}.{kind}",
                own.clone(memory_format=torch.contiguous_format),
            )
