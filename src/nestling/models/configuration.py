"""The configuration of a model: a list of block specs, so that any mixer can stand beside any channel mixer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import GenerationConfig, PretrainedConfig

from nestling.layers.ada_transformer import AdaTransformerConfig
from nestling.layers.attention import AttentionConfig
from nestling.layers.continuum import ContinuumConfig
from nestling.layers.feed_forward import FeedForwardConfig, LeveledFeedForwardConfig, check_level_name
from nestling.layers.heads import NEW_FIELD
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.mamba2 import Mamba2Config
from nestling.layers.memory_caching_config import CACHEABLE, MemoryCachingConfig
from nestling.layers.neural_memory_config import (
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    NeuralMemoryConfig,
)
from nestling.layers.rwkv7 import RWKV7Config
from nestling.layers.self_modifying import SelfModifyingConfig
from nestling.layers.ttt_config import TTTConfig
from nestling.models.looping import check_loops

TitansConfig = NeuralMemoryConfig | MemoryAsContextConfig | MemoryAsGateConfig | MemoryAsLayerConfig
MixerConfig = (
    SelfModifyingConfig
    | AttentionConfig
    | LinearMemoryConfig
    | RWKV7Config
    | Mamba2Config
    | TTTConfig
    | TitansConfig
    | MemoryCachingConfig
)
ChannelConfig = FeedForwardConfig | ContinuumConfig | LeveledFeedForwardConfig

MIXERS: dict[str, type[MixerConfig]] = {
    "self_modifying": SelfModifyingConfig,
    "attention": AttentionConfig,
    "ada_transformer": AdaTransformerConfig,
    "linear_memory": LinearMemoryConfig,
    "rwkv7": RWKV7Config,
    "mamba2": Mamba2Config,
    "ttt": TTTConfig,
    "neural_memory": NeuralMemoryConfig,
    "memory_as_context": MemoryAsContextConfig,
    "memory_as_gate": MemoryAsGateConfig,
    "memory_as_layer": MemoryAsLayerConfig,
    "memory_caching": MemoryCachingConfig,
}
CHANNELS: dict[str, type[ChannelConfig]] = {
    "feed_forward": FeedForwardConfig,
    "continuum": ContinuumConfig,
    "leveled_feed_forward": LeveledFeedForwardConfig,
}

HOUSEKEEPING = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "torch_dtype",
        "torchscript",
    }
)
"""Keys that Hugging Face tools put into a config.json and that are no fields of `PretrainedConfig`."""

FIRST_OWN_LOGIT = 1.5
FIRST_LOGIT_DEVIATION = 0.5


class NestlingConfig(PretrainedConfig):
    """Configuration of `NestlingForCausalLM`. The functions of `nestling.presets` build the usual ones.

    Args:
        blocks: one spec per block, `{"mixer": {"kind": ..., ...}, "channel": {"kind": ..., ...}}`. The kinds of mixers
            are the keys of `MIXERS`, those of channels the keys of `CHANNELS` or None; the other keys are the fields
            of that layer's config class. `hidden_size` comes from the model, and defaults are filled in, so that a
            saved file does not depend on the defaults of a later release. `memory_caching` has the spec of another
            mixer as its `inner`.
        vocab_size: tokens; 259 is the byte tokenizer's (padding, begin, end, 256 bytes).
        hidden_size: width of the residual stream.
        tie_word_embeddings: use the embedding as the output projection.
        initializer_range: standard deviation of the embedding and the output projection at the start. The layers draw
            their own weights, by their fan-in.
        norm_eps: added to the mean square in every RMSNorm.
        logit_scale: factor on the logits. None keeps the loss at initialisation near ln(vocab_size) at every width:
            the final norm makes the output nearly parallel to a token's own tied embedding, whose logit would be
            `initializer_range * hidden_size`; it is scaled down to 1.5. Untied logits are kept to a standard
            deviation of 0.5.
        loss_chunk_size: tokens whose logits exist at the same time when labels are given; the backward pass computes
            them again, and the output then holds no logits unless `logits_to_keep` asks for some. None computes all
            logits at once and returns them.
        use_cache: return the state by default.
        pad_token_id: padding token.
        bos_token_id: first token of a document.
        eos_token_id: last token of a document; generation stops at it.
        levels: update periods, in tokens of the stream the model learns from, of the levels that the blocks'
            `leveled_feed_forward` channels name (NL Eq. 71); no two are equal, and they are kept fastest first. They
            change nothing in a forward pass: who trains the model updates the levels
            (`levels.assignment.stream_levels`).
        loops: how often the blocks run, unless a call says otherwise (`nestling.models.looping`).
        kwargs: the fields of `PretrainedConfig`.

    Raises:
        ValueError: `blocks` is missing, a kind is unknown, a spec is wrong, a size is out of range, or `levels` are not
            those of the blocks.
        TypeError: a field nobody knows.

    Examples:
        >>> from nestling import NestlingConfig
        >>> channel = {"kind": "feed_forward", "intermediate_size": 64}
        >>> memory = {"mixer": {"kind": "neural_memory", "num_heads": 2}, "channel": channel}
        >>> attention = {"mixer": {"kind": "attention", "num_heads": 2}, "channel": channel}
        >>> config = NestlingConfig(blocks=[memory, attention], hidden_size=32)
        >>> [block["mixer"]["kind"] for block in config.blocks]
        ['neural_memory', 'attention']
    """

    model_type = "nestling"
    has_no_defaults_at_init = True  # `blocks` must be given; transformers 5.17 builds a bare config to compare with
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the name and the type are Hugging Face's)
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it of every model that is not transformers' own

    def __init__(
        self,
        blocks: Sequence[Mapping[str, Any]] | None = None,
        vocab_size: int = 259,
        hidden_size: int = 128,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        norm_eps: float = 1e-6,
        logit_scale: float | None = None,
        loss_chunk_size: int | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        levels: Mapping[str, int] | None = None,
        loops: int = 1,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(kwargs)
        _check_positive(vocab_size=vocab_size, hidden_size=hidden_size, initializer_range=initializer_range)
        _check_positive(norm_eps=norm_eps, logit_scale=logit_scale, loss_chunk_size=loss_chunk_size)
        if not blocks:
            raise ValueError(
                "a NestlingConfig needs `blocks`, a list of at least one block spec; nestling.presets builds whole ones"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.blocks = [_complete_block(i, spec, hidden_size) for i, spec in enumerate(blocks)]
        self.levels = _complete_levels(levels, self.blocks)
        self.initializer_range = initializer_range
        self.norm_eps = norm_eps
        self.logit_scale = logit_scale or _logit_scale(hidden_size, initializer_range, tie_word_embeddings)
        self.loss_chunk_size = loss_chunk_size
        self.use_cache = use_cache
        self.loops = check_loops(loops)
        super().__init__(**kwargs)
        # After the base class, which in some releases sets these from its own keywords.
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks, under the name Hugging Face tools look for."""
        return len(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values. `loops` joined after the first release and is left out while it changes nothing."""
        values: dict[str, Any] = super().to_dict()
        if values.get("loops") == 1:
            del values["loops"]
        return values

    def mixer_config(self, block: int) -> MixerConfig:
        """The settings of one block's sequence mixer."""
        return _layer_config(f"blocks[{block}].mixer", self.blocks[block]["mixer"], MIXERS, self.hidden_size)

    def channel_config(self, block: int) -> ChannelConfig | None:
        """The settings of one block's channel mixer, None if the block has none."""
        spec = self.blocks[block]["channel"]
        return None if spec is None else _layer_config(f"blocks[{block}].channel", spec, CHANNELS, self.hidden_size)


def _complete_block(index: int, spec: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """The block spec with every field of its two layers, in JSON types."""
    where = f"blocks[{index}]"
    if not isinstance(spec, Mapping) or not {"mixer", "channel"} >= set(spec) >= {"mixer"}:
        found = sorted(spec) if isinstance(spec, Mapping) else type(spec).__name__
        raise ValueError(f"{where} must be a dict with the keys mixer and channel; got {found}")
    mixer, channel = spec["mixer"], spec.get("channel")
    return {
        "mixer": _complete_layer(f"{where}.mixer", mixer, MIXERS, hidden_size),
        "channel": None if channel is None else _complete_layer(f"{where}.channel", channel, CHANNELS, hidden_size),
    }


def _complete_layer(
    where: str, spec: Mapping[str, Any], kinds: Mapping[str, type[Any]], hidden_size: int
) -> dict[str, Any]:
    layer = _layer_config(where, spec, kinds, hidden_size)
    values = dataclasses.asdict(layer)
    del values["hidden_size"]
    if isinstance(layer, MemoryCachingConfig):
        values["inner"] = _complete_layer(f"{where}.inner", spec["inner"], CACHEABLE, hidden_size)
    for f in dataclasses.fields(layer):
        if f.metadata == NEW_FIELD and values[f.name] == f.default:
            del values[f.name]
    return {"kind": spec["kind"]} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def check_periods(levels: Mapping[str, int]) -> dict[str, int]:
    """Periods by level, fastest first, which is the order of their numbers.

    Raises:
        ValueError: no level, a name no level can have, a period that is no whole number from 1, or two equal ones.
    """
    if not isinstance(levels, Mapping) or not levels:
        raise ValueError(f"levels maps names to periods in tokens, as in {{'fast': 256, 'slow': 4096}}; got {levels!r}")
    for name, period in levels.items():
        check_level_name(name)
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ValueError(f"the period of level {name} is a number of tokens, 1 or more, not {period!r}")
    ordered = dict(sorted(levels.items(), key=lambda level: level[1]))
    for (fast, period), (slow, other) in itertools.pairwise(ordered.items()):
        if period == other:
            raise ValueError(
                f"the levels {fast} and {slow} both have period {period:,} and would be one level; give another period"
            )
    return ordered


def _complete_levels(levels: Mapping[str, int] | None, blocks: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """The checked periods, for exactly the levels that the blocks name."""
    channels = [block["channel"] or {} for block in blocks]
    named = {name for c in channels if c.get("kind") == "leveled_feed_forward" for name in c["levels"]}
    ordered = {} if levels is None else check_periods(levels)
    if set(ordered) != named:
        raise ValueError(
            f"levels gives periods to {', '.join(ordered) or 'no level'}, and the blocks name "
            f"{', '.join(sorted(named)) or 'no level'}; they must be the same"
        )
    return ordered or None


def _layer_config(where: str, spec: Mapping[str, Any], kinds: Mapping[str, type[Any]], hidden_size: int) -> Any:
    """The config object a layer spec stands for.

    Raises:
        ValueError: unknown kind or field, a missing field, or a value the layer refuses; the message says where.
    """
    kind = spec.get("kind") if isinstance(spec, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{where}: unknown kind {kind!r}; known kinds: {', '.join(kinds)}")
    fields = {f.name: f for f in dataclasses.fields(kinds[kind])}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "kind"}
    if unknown := sorted(given.keys() - fields.keys()):
        raise ValueError(f"{where}: {kind} has no field {', '.join(unknown)}; its fields: {', '.join(fields)}")
    if given.setdefault("hidden_size", hidden_size) != hidden_size:
        raise ValueError(f"{where}: hidden_size {given['hidden_size']} differs from the model's {hidden_size}")
    required = {name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - given.keys()):
        raise ValueError(f"{where}: {kind} needs {', '.join(missing)}")
    if kinds[kind] is MemoryCachingConfig:
        given["inner"] = _layer_config(f"{where}.inner", spec["inner"], CACHEABLE, hidden_size)
    try:
        return kinds[kind](**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _logit_scale(hidden_size: int, initializer_range: float, tied: bool) -> float:
    if tied:
        return min(1.0, FIRST_OWN_LOGIT / (initializer_range * hidden_size))
    return min(1.0, FIRST_LOGIT_DEVIATION / (initializer_range * hidden_size**0.5))


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive; got {value}")


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    """A misspelt field must not vanish among the attributes `PretrainedConfig` accepts."""
    known = set(vars(PretrainedConfig())) | set(vars(GenerationConfig())) | HOUSEKEEPING
    if unknown := sorted(k for k in kwargs if k not in known and not k.startswith("_")):
        raise TypeError(
            f"NestlingConfig has no field {', '.join(unknown)}; layer settings belong into `blocks`, and a preset's "
            "arguments into the call of the preset"
        )
