"""Ad-hoc level stacking: a pre-trained transformer becomes Hope-Attention, its MLPs the first CMS blocks (NL 7.3)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from nestling.models.causal_lm import NestlingForCausalLM
from nestling.models.configuration import NestlingConfig, check_periods
from nestling.models.convertible import check_convertible, has_own_head, rope_settings

Assignment = Literal["depth", "interleaved", "split"]
ASSIGNMENTS: tuple[str, ...] = get_args(Assignment)

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


class ConversionWarning(UserWarning):
    """Something of a pre-trained model that was taken over and that its owner should know."""


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
        ValueError: another architecture, something in it that `NestlingForCausalLM` does not have, levels that cannot
            be, or more of them than there are blocks or neurons.

    Warns:
        ConversionWarning: the model holds something else than its configuration says, and that was taken.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from nestling.models import convert
        >>> shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        >>> llama = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape)).eval()
        >>> model = convert(llama, {"fast": 256, "slow": 1024})
        >>> ids = torch.randint(100, (1, 20))
        >>> torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=1e-4)
        >>> model.config.levels
        {'fast': 256, 'slow': 1024}
    """
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment is one of {', '.join(ASSIGNMENTS)}; got {assignment!r}")
    periods = check_periods(levels)
    check_convertible(model)
    source = model.config
    shares = assign_neurons(source.num_hidden_layers, source.intermediate_size, tuple(periods), assignment)
    config = _config(model, shares, periods)
    if source.tie_word_embeddings and not config.tie_word_embeddings:
        warnings.warn(
            "the model's output projection differs from its embedding, though its configuration says that they are "
            "tied (tie_word_embeddings); it is kept, and the converted model is not tied",
            ConversionWarning,
            stacklevel=2,
        )
    with torch.inference_mode(False):  # what is made under inference_mode could never be trained
        converted = _with_weights(config, _renamed(model.state_dict(), shares))
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


def _with_weights(config: NestlingConfig, weights: Iterator[tuple[str, Tensor]]) -> NestlingForCausalLM:
    with torch.device("meta"):
        made = NestlingForCausalLM(config)
    try:
        made.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the model's weights are not those of its configuration ({reason})") from error
    made.tie_weights()
    return made


def _config(
    model: PreTrainedModel, shares: Sequence[Mapping[str, tuple[int, int]]], periods: dict[str, int]
) -> NestlingConfig:
    c, attention = model.config, cast(Any, model).model.layers[0].self_attn
    mixer = {
        "kind": "attention",
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "head_width": getattr(c, "head_dim", None),
        "bias": attention.q_proj.bias is not None,
        "output_bias": attention.o_proj.bias is not None,
        "qk_norm_eps": c.rms_norm_eps if c.model_type == "qwen3" else None,
    } | rope_settings(model)
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
        tie_word_embeddings=not has_own_head(model),
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
