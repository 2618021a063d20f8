"""`NestlingForCausalLM`: the language model around the layers, under Hugging Face conventions.

B batch, T time, N rows of left-aligned real tokens (one per batch row, or one per packed document), L their length.
"""

from __future__ import annotations

import json
from typing import Any, assert_never, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestling.layers.attention import AttentionConfig, SoftmaxAttention
from nestling.layers.continuum import ContinuumConfig, ContinuumMemory
from nestling.layers.feed_forward import (
    FeedForward,
    FeedForwardConfig,
    LeveledFeedForward,
    LeveledFeedForwardConfig,
)
from nestling.layers.linear import LinearMemory, LinearMemoryConfig
from nestling.layers.mamba2 import Mamba2, Mamba2Config
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import (
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    NeuralMemoryConfig,
)
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.layers.sequence import Aligned, SequenceLayer, check_state
from nestling.layers.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from nestling.layers.ttt import TTTConfig, TTTLayer
from nestling.memory.state import State
from nestling.models.cache import BlockState, ModelState
from nestling.models.configuration import ChannelConfig, MixerConfig, NestlingConfig
from nestling.models.fingerprint import fingerprint
from nestling.ops.packing import Rows, find_rows

IGNORE = -100
"""The label Hugging Face models leave out of the loss."""


def build_mixer(config: MixerConfig) -> SequenceLayer:
    """The sequence mixer a config describes."""
    match config:
        case SelfModifyingConfig():
            return SelfModifyingTitans(config)
        case AttentionConfig():
            return SoftmaxAttention(config)
        case LinearMemoryConfig():
            return LinearMemory(config)
        case Mamba2Config():
            return Mamba2(config)
        case TTTConfig():
            return TTTLayer(config)
        case MemoryAsContextConfig():
            return MemoryAsContext(config)
        case MemoryAsGateConfig():
            return MemoryAsGate(config)
        case MemoryAsLayerConfig():
            return MemoryAsLayer(config)
        case NeuralMemoryConfig():
            return NeuralMemory(config)
        case _:
            assert_never(config)


def build_channel(config: ChannelConfig | None) -> FeedForward | LeveledFeedForward | ContinuumMemory | None:
    """The channel mixer a config describes."""
    match config:
        case None:
            return None
        case FeedForwardConfig():
            return FeedForward(config)
        case ContinuumConfig():
            return ContinuumMemory(config)
        case LeveledFeedForwardConfig():
            return LeveledFeedForward(config)
        case _:
            assert_never(config)


class Block(nn.Module):
    """`x + mixer(norm(x))`, then the channel mixer on the result.

    A feed-forward network is normalised and added here; a `ContinuumMemory` does that itself, once per level.
    """

    def __init__(self, config: NestlingConfig, index: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = build_mixer(config.mixer_config(index))
        self.channel = build_channel(config.channel_config(index))
        plain = isinstance(self.channel, FeedForward | LeveledFeedForward)
        self.channel_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if plain else None

    def init_state(self, batch_size: int, like: Tensor | None = None) -> BlockState:
        """The state before the first token; see `SequenceLayer.init_state`."""
        channel = self.channel.init_state(batch_size, like) if isinstance(self.channel, SequenceLayer) else None
        return BlockState(self.mixer.init_state(batch_size, like), channel)

    def forward(
        self, x: Float[Tensor, "N L hidden"], state: BlockState | None, rows: Aligned
    ) -> tuple[Float[Tensor, "N L hidden"], BlockState]:
        """Run the block over left-aligned rows."""
        y, mixer_state = self.mixer(self.mixer_norm(x), None if state is None else state.mixer, rows=rows)
        x = x + y
        channel_state: State | None = None
        match self.channel:
            case FeedForward() | LeveledFeedForward():
                assert self.channel_norm is not None
                x = x + self.channel(self.channel_norm(x))
            case ContinuumMemory():
                x, channel_state = self.channel(x, None if state is None else state.channel, rows=rows)
        return x, BlockState(mixer_state, channel_state)


class NestlingForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose blocks may learn while they read.

    The memory of what was read is `past_key_values`, a `ModelState`. It does not hold the text it comes from, and a
    fast weight cannot be cropped to an earlier token, so a state continues with new tokens only: with
    `past_key_values`, `input_ids` holds the tokens that come next, in `generate` too. train() and eval() compute the
    same.
    """

    config_class = NestlingConfig
    config: NestlingConfig
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 (Hugging Face's name and type)
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True

    def __init__(self, config: NestlingConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(len(config.blocks)))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self._made_on_meta = self.embed_tokens.weight.is_meta
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        past_key_values: ModelState | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Float[Tensor, "B T hidden"] | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: tokens.
            attention_mask: `[B, T]` or longer (then its last T columns count, the others belong to the state); non-zero
                for real tokens. Padding may stand left or right, and neither writes to a memory nor enters the loss.
            labels: `[B, T]`, unshifted (usually `input_ids`); -100 leaves a token out. The first token of every row and
                of every packed document is nobody's target.
            past_key_values: state of an earlier call, one row per row of the input (per document with `cu_seqlens`).
            use_cache: return the new state; `config.use_cache` if None.
            cu_seqlens: `[N + 1]` boundaries of documents packed in a batch of one row.
            logits_to_keep: compute logits for the last so many tokens only (or for the given positions); 0 for all.
            inputs_embeds: embeddings to use in place of `input_ids`.
            return_dict: False returns a plain tuple of what is not None.
            num_items_in_batch: divide the summed loss by this and not by the targets of this batch, as gradient
                accumulation needs it.

        Returns:
            loss (float32, nats per target), logits `[B, T or kept, vocab]`, past_key_values. The logits of a masked
            token are 0. With `config.loss_chunk_size` and labels, logits are None unless `logits_to_keep` asks for
            them.

        Raises:
            ValueError: no tokens, a token outside the vocabulary (checked for tensors on the CPU only; a GPU would have
                to wait), or arguments that do not fit each other.
        """
        x = self._embed(input_ids, inputs_embeds)
        shape = (x.shape[0], x.shape[1])
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, -shape[1] :]
        rows = find_rows(shape, attention_mask, cu_seqlens)
        check_state(past_key_values, shape[0] if rows is None else len(rows.lengths))
        if rows is not None:
            x = rows.pack(x)
        x, state = self._run_blocks(x, past_key_values, None if rows is None else rows.lengths)
        hidden = self.norm(x) if rows is None else rows.unpack(self.norm(x))
        targets = None if labels is None else next_token_labels(labels, shape, rows)
        loss, logits = self._predict(hidden, targets, logits_to_keep, num_items_in_batch)
        keep_state = self.config.use_cache if use_cache is None else use_cache
        # A ModelState stands in for transformers' Cache.
        found: dict[str, Any] = {"loss": loss, "logits": logits, "past_key_values": state if keep_state else None}
        out = CausalLMOutputWithPast(**found)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return out if wants_dict else out.to_tuple()

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token."""
        position = torch.zeros(batch_size, dtype=torch.int64, device="cpu")
        return ModelState(position, [cast(Block, block).init_state(batch_size) for block in self.blocks])

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify this model: its architecture and a sample of every parameter's values.

        A state only means something to the weights that wrote it, so training a model further changes its fingerprint.
        """
        architecture = {k: getattr(self.config, k) for k in ("vocab_size", "hidden_size", "blocks", "norm_eps")}
        return fingerprint(self, json.dumps(architecture, sort_keys=True))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`.

        Its caller takes `input_ids` of the first step to start with the text a cache has read and cuts that away; ours
        does not hold it. A state of fewer rows is repeated for the beams or returned sequences of each row.
        """
        if is_first_iteration:
            next_sequence_length = None
            if past_key_values is not None and past_key_values.batch_size != len(input_ids):
                past_key_values = _repeat_rows(past_key_values, len(input_ids))
        return super().prepare_inputs_for_generation(  # type: ignore[misc] # its `self` is a protocol for the whole model
            cast(torch.LongTensor, input_ids),
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `generate` starts without a cache, and the first forward pass makes the state."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Called without gradients for every module with parameters of its own.

        Layers draw their weights when they are made. Only a model made on the meta device, to be loaded, has weights to
        draw here: those its checkpoint lacks.
        """
        if isinstance(module, nn.Embedding) or module is self.lm_head:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif self._made_on_meta and module is self.norm:
            nn.init.ones_(self.norm.weight)
        elif self._made_on_meta:
            self._redraw(module)

    def _redraw(self, module: nn.Module) -> None:
        """Take the weights of a block's part that no checkpoint set from a new block."""
        for index, block in enumerate(self.blocks):
            for path, part in block.named_modules():
                if part is module:
                    drawn = dict(Block(self.config, index).get_submodule(path).named_parameters(recurse=False))
                    for name, parameter in module.named_parameters(recurse=False):
                        if not getattr(parameter, "_is_hf_initialized", False):
                            parameter.copy_(drawn[name])

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        layout = "(batch, time)" if inputs_embeds is None else "(batch, time, hidden)"
        if given.dim() != layout.count(",") + 1 or given.shape[1] == 0:
            raise ValueError(f"the input must be {layout} with at least one token; got shape {tuple(given.shape)}")
        if inputs_embeds is not None:
            return inputs_embeds
        if given.device.type == "cpu":
            outside = given[(given < 0) | (given >= self.config.vocab_size)]
            if outside.numel():
                raise ValueError(f"token {int(outside[0])} is outside the vocabulary of {self.config.vocab_size}")
        return self.embed_tokens(given)

    def _run_blocks(self, x: Tensor, state: ModelState | None, lengths: Tensor | None) -> tuple[Tensor, ModelState]:
        layers: list[BlockState] = []
        remember = not (self.gradient_checkpointing and torch.is_grad_enabled())
        time, rows = x.shape[1], Aligned(lengths)
        for i, block in enumerate(self.blocks):
            past = None if state is None else state.layers[i]
            x, new = block(x, past, rows) if remember else self._gradient_checkpointing_func(block, x, past, rows)
            layers.append(new)
        before = torch.zeros(len(x), dtype=torch.int64, device="cpu") if state is None else state.position
        return x, ModelState(before + (time if lengths is None else lengths), layers)

    def _predict(
        self, hidden: Tensor, targets: Tensor | None, logits_to_keep: int | Tensor, count: int | Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss and logits, either None when not asked for."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        everything = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if targets is None:
            return None, self._head(hidden[:, kept])
        chunk = self.config.loss_chunk_size
        if chunk is None:
            logits = self._head(hidden)
            total = _summed_loss(logits.flatten(0, 1), targets.flatten())
            return _mean_loss(total, targets, count), logits[:, kept]
        parts = zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
        losses = [checkpoint(self._chunk_loss, h, t, use_reentrant=False) for h, t in parts]
        loss = _mean_loss(torch.stack(losses).sum(), targets, count)
        return loss, None if everything else self._head(hidden[:, kept])

    def _head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden * self.config.logit_scale)

    def _chunk_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return _summed_loss(self._head(hidden), targets)


def next_token_labels(labels: Tensor, shape: tuple[int, int], rows: Rows | None) -> Int[Tensor, "B T"]:
    """For every slot the label of the next token of its own row or document, -100 where there is none."""
    if tuple(labels.shape) != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; the input has (batch, time) = {shape}")
    if rows is None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    # Packing and unpacking fill with zeros, so -100 is moved there and back.
    following = F.pad(rows.pack(labels - IGNORE)[:, 1:], (0, 1))
    return rows.unpack(following) + IGNORE


def _summed_loss(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.to(logits.device), ignore_index=IGNORE, reduction="sum")


def _mean_loss(total: Tensor, targets: Tensor, count: int | Tensor | None) -> Tensor:
    """Per target; a batch without any target has loss 0, so that it disturbs no average."""
    if count is None:
        count = (targets != IGNORE).sum().clamp_min(1)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _repeat_rows(state: ModelState, rows: int) -> ModelState:
    """Every row several times in succession, as `generate` repeats its inputs."""
    if rows % state.batch_size:
        raise ValueError(f"the state has {state.batch_size} rows and the input {rows}; select the rows to continue")
    return state.select(torch.arange(state.batch_size).repeat_interleave(rows // state.batch_size))
