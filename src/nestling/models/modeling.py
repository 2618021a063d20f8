"""`NestlingModel`: embeddings, blocks and norm around the layers, under Hugging Face conventions.

B batch, T time, N rows of left-aligned real tokens (one per batch row, or one per packed document), L their length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack, assert_never, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from nestling.layers.ada_transformer import AdaTransformer, AdaTransformerConfig
from nestling.layers.attention import AttentionConfig, SoftmaxAttention
from nestling.layers.continuum import ContinuumConfig, ContinuumMemory
from nestling.layers.feed_forward import (
    FeedForward,
    FeedForwardConfig,
    LeveledFeedForward,
    LeveledFeedForwardConfig,
)
from nestling.layers.linear import LinearMemory
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.mamba2 import Mamba2, Mamba2Config
from nestling.layers.memory_caching import MemoryCaching
from nestling.layers.memory_caching_config import MemoryCachingConfig
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import (
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    NeuralMemoryConfig,
)
from nestling.layers.rwkv7 import RWKV7, RWKV7Config
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.layers.sequence import Aligned, SequenceLayer
from nestling.layers.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from nestling.layers.ttt import TTTConfig, TTTLayer
from nestling.memory.state import State
from nestling.models.arguments import check_state_kind, check_tokens
from nestling.models.cache import BlockState, ModelState
from nestling.models.configuration import ChannelConfig, MixerConfig, NestlingConfig
from nestling.models.digest import empty_digest, extend_digest
from nestling.models.distributed import take_part
from nestling.models.documents import Packing, find_documents
from nestling.models.fingerprint import fingerprint
from nestling.models.looping import check_loops, inject, loops_to_run
from nestling.models.quantized import leave_odd_sizes_unpacked
from nestling.ops.packing import Rows


def build_mixer(config: MixerConfig) -> SequenceLayer:
    """The sequence mixer a config describes."""
    match config:
        case SelfModifyingConfig():
            return SelfModifyingTitans(config)
        case AdaTransformerConfig():
            return AdaTransformer(config)
        case AttentionConfig():
            return SoftmaxAttention(config)
        case LinearMemoryConfig():
            return LinearMemory(config)
        case RWKV7Config():
            return RWKV7(config)
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
        case MemoryCachingConfig():
            return MemoryCaching(config)
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

    A feed-forward network is normalised and added here; a `ContinuumMemory` does that itself, once per level, and so
    does an `AdaTransformer`, a whole block in place of the mixer.
    """

    def __init__(self, config: NestlingConfig, index: int) -> None:
        super().__init__()
        whole = isinstance(config.mixer_config(index), AdaTransformerConfig)
        self.mixer_norm = None if whole else nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
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
        before = None if state is None else state.mixer
        if self.mixer_norm is None:
            x, mixer_state = self.mixer(x, before, rows=rows)
        else:
            y, mixer_state = self.mixer(self.mixer_norm(x), before, rows=rows)
            x = x + y
        channel_state: State | None = None
        match self.channel:
            case FeedForward() | LeveledFeedForward():
                assert self.channel_norm is not None
                x = x + self.channel(self.channel_norm(x))
            case ContinuumMemory():
                x, channel_state = self.channel(x, None if state is None else state.channel, rows=rows)
        return x, BlockState(mixer_state, channel_state)


@dataclass(frozen=True)
class Reading:
    """What a forward pass of the backbone found.

    Attributes:
        hidden: `[B, T, hidden]`, normalised.
        past_key_values: the new state if it is to be kept. A `ModelState` stands in for transformers' `Cache`.
        hidden_states: if wanted, what goes into every block (of every loop), and `hidden`.
        rows: what the layers ran over, see `find_documents`.
    """

    hidden: Float[Tensor, "B T hidden"]
    past_key_values: Any
    hidden_states: tuple[Tensor, ...] | None
    rows: Rows | None


class NestlingPreTrainedModel(PreTrainedModel):
    """What the backbone and the causal language model share: parameters, their first values, and reading.

    Both name their parameters alike (`embed_tokens`, `blocks.0`, `norm`), so a checkpoint of one is one of the other,
    the head apart.
    """

    config_class = NestlingConfig
    config: NestlingConfig
    _no_split_modules = ["Block"]  # noqa: RUF012 (Hugging Face's name and type)
    _is_stateful = True
    supports_gradient_checkpointing = True

    def __init__(self, config: NestlingConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(len(config.blocks)))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self._made_on_meta = self.embed_tokens.weight.is_meta

    @classmethod
    def from_pretrained(cls, *arguments: Any, **settings: Any) -> Any:
        """Load a checkpoint, as `PreTrainedModel.from_pretrained` does; quantized models are made ready for CPUs."""
        found = super().from_pretrained(*arguments, **settings)
        leave_odd_sizes_unpacked(found[0] if isinstance(found, tuple) else found)
        return found

    def init_state(self, batch_size: int, loops: int | None = None) -> ModelState:
        """The state before the first token, of as many loops as the configuration says unless `loops` says it."""
        position = torch.zeros(batch_size, dtype=torch.int64, device="cpu")
        # An offloaded embedding has no device; its hooks take the tokens from the CPU to where it will be.
        there = "cpu" if self.device.type == "meta" else self.device
        like = self.embed_tokens(torch.empty(1, 0, dtype=torch.int64, device=there))
        run = range(self.config.loops if loops is None else check_loops(loops))
        first, *further = [[cast(Block, block).init_state(batch_size, like) for block in self.blocks] for _ in run]
        return ModelState(position, first, empty_digest(batch_size, like.device), further or None)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify this model: its architecture and a sample of every parameter's values.

        A state only means something to the weights that wrote it, so training a model further changes its fingerprint.
        """
        architecture = {k: getattr(self.config, k) for k in ("vocab_size", "hidden_size", "blocks", "norm_eps")}
        architecture |= {} if self.config.loops == 1 else {"loops": self.config.loops}
        return fingerprint(self, json.dumps(architecture, sort_keys=True), self.all_tied_weights_keys)

    def _read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: ModelState | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        loops: int | None,
        packing: Packing,
    ) -> Reading:
        """Run the backbone; the arguments are those of `NestlingModel.forward`."""
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions=True is not possible: memories have no attention weights, and the attention layers "
                "do not keep theirs; leave it False"
            )
        state = check_state_kind(past_key_values)
        run = loops_to_run(loops, self.config.loops, len(self.blocks), state)
        x = self._embed(input_ids, inputs_embeds)
        rows = find_documents((x.shape[0], x.shape[1]), attention_mask, position_ids, state, packing)
        keep_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_state = self.config.use_cache if use_cache is None else use_cache
        hidden, new = self._run_blocks(x if rows is None else rows.pack(x), run, state, rows, bool(keep_hidden))
        if keep_state and inputs_embeds is None and input_ids is not None:
            new.digest = _next_digest(state, input_ids, rows)
        hidden = [h if rows is None else rows.unpack(h) for h in hidden]
        return Reading(hidden[-1], new if keep_state else None, tuple(hidden) if keep_hidden else None, rows)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        layout = "(batch, time)" if inputs_embeds is None else "(batch, time, hidden)"
        if given.dim() != layout.count(",") + 1 or given.shape[1] == 0:
            raise ValueError(f"the input must be {layout} with at least one token; got shape {tuple(given.shape)}")
        if inputs_embeds is not None:
            return inputs_embeds
        check_tokens(given, self.config.vocab_size, "token")
        return self.embed_tokens(given)

    def _run_blocks(
        self, embedded: Tensor, loops: int, state: ModelState | None, rows: Rows | None, keep_hidden: bool
    ) -> tuple[list[Tensor], ModelState]:
        """What goes into every block if wanted, then the normalised output of the last, and the new state."""
        states: list[list[BlockState]] = []
        hidden: list[Tensor] = []
        lengths = None if rows is None else rows.lengths
        remember = not (self.gradient_checkpointing and torch.is_grad_enabled())
        x = embedded
        for loop in range(loops):
            x = x if loop == 0 else inject(x, embedded)
            before: Sequence[BlockState | None] = [None] * len(self.blocks) if state is None else state.loop(loop)
            states.append([])
            for block, past in zip(self.blocks, before, strict=True):
                if keep_hidden:
                    hidden.append(x)
                arguments = (block, x, past, Aligned(lengths))
                x, new = run_block(*arguments) if remember else self._gradient_checkpointing_func(run_block, *arguments)
                states[-1].append(new)
        read = torch.zeros(len(x), dtype=torch.int64, device="cpu") if state is None else state.position
        position = read + (x.shape[1] if lengths is None else lengths)
        return [*hidden, self.norm(x)], ModelState(position, states[0], further_loops=states[1:] or None)

    def _init_weights(self, module: nn.Module) -> None:
        """Called without gradients for every module with parameters of its own.

        Layers draw their weights when they are made. Only a model made on the meta device, to be loaded, has weights to
        draw here: those its checkpoint lacks.
        """
        if isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            nn.init.normal_(cast(Tensor, module.weight), std=self.config.initializer_range)
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


class NestlingModel(NestlingPreTrainedModel):
    """The backbone: embeddings, blocks and the last norm, without a head. `AutoModel` gives it.

    Examples:
        >>> import torch
        >>> from transformers import AutoModel
        >>> from nestling import NestlingForCausalLM, presets
        >>> NestlingForCausalLM(presets.hope(hidden_size=32, num_layers=1, num_heads=2)).save_pretrained("saved")
        >>> backbone = AutoModel.from_pretrained("saved")
        >>> backbone(torch.randint(3, 259, (2, 10))).last_hidden_state.shape
        torch.Size([2, 10, 32])
    """

    def __init__(self, config: NestlingConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ModelState | None = None,
        inputs_embeds: Float[Tensor, "B T hidden"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loops: int | None = None,
        **packing: Unpack[Packing],
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the backbone.

        Args:
            input_ids: tokens.
            attention_mask: `[B, T]` or longer (then its last T columns count, the others belong to the state); 1 for
                real tokens, 0 for padding. Padding may stand left or right, and never writes to a memory.
            position_ids: `[T]`, `[1, T]` or `[B, T]`; needed for nothing. Where they restart at 0 a document begins, as
                transformers' `DataCollatorWithFlattening` says it.
            past_key_values: state of an earlier call, one row per row of the input, or per packed document.
            inputs_embeds: embeddings to use in place of `input_ids`.
            use_cache: return the new state; `config.use_cache` if None.
            output_attentions: refused when True; no layer keeps attention weights.
            output_hidden_states: return what goes into every block, in the order in which they run (the embeddings
                first), and the normalised output of the last; `config.output_hidden_states` if None.
            return_dict: False returns a plain tuple of what is not None.
            loops: how often the blocks run (`nestling.models.looping`). None takes the number of the state that the
                call goes on from, which is the only one possible, and `config.loops` without one.
            packing: boundaries of packed documents, see `Packing`.

        Returns:
            last_hidden_state `[B, T, hidden]`, 0 for masked tokens; past_key_values; hidden_states.

        Raises:
            ValueError: no tokens, a token outside the vocabulary (checked for tensors on the CPU only; a GPU would have
                to wait), arguments that do not fit each other, or what the model cannot do.
            TypeError: an argument nobody knows.
        """
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        read = self._read(*given, use_cache, output_attentions, output_hidden_states, loops, packing)
        out = BaseModelOutputWithPast(
            last_hidden_state=cast(torch.FloatTensor, read.hidden),
            past_key_values=read.past_key_values,
            hidden_states=cast(Any, read.hidden_states),
        )
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


def run_block(block: nn.Module, x: Tensor, state: BlockState | None, rows: Aligned) -> tuple[Tensor, BlockState]:
    """One block, all of whose parameters are part of the graph (see `take_part`)."""
    y, new = block(x, state, rows)
    return take_part(y, block), new


def _next_digest(state: ModelState | None, input_ids: Tensor, rows: Rows | None) -> Tensor | None:
    tokens, lengths = (input_ids, None) if rows is None else (rows.pack(input_ids), rows.lengths)
    before = empty_digest(len(tokens)) if state is None else state.digest
    return None if before is None else extend_digest(before, tokens, lengths)
