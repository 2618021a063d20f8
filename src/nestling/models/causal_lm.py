"""`NestlingForCausalLM`: the language model, its loss, and what `generate` asks of it.

B batch, T time.
"""

from __future__ import annotations

from typing import Any, Unpack, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestling.models.arguments import check_tokens
from nestling.models.cache import ModelState
from nestling.models.configuration import NestlingConfig
from nestling.models.continuation import check_plain_positions, repeat_rows, tokens_to_read
from nestling.models.documents import Packing
from nestling.models.modeling import NestlingModel, NestlingPreTrainedModel, Reading
from nestling.ops.packing import Rows

IGNORE = -100
"""The label Hugging Face models leave out of the loss."""


class NestlingForCausalLM(NestlingPreTrainedModel, GenerationMixin):
    """A causal language model whose blocks may learn while they read.

    What was read is in `past_key_values`, a `ModelState`. It does not hold the text it comes from, and a
    fast weight cannot be cropped to an earlier token, so a state continues with new tokens only: with
    `past_key_values`, `input_ids` holds the tokens that come next. `generate` also takes all tokens from the start, as
    for other models of transformers, and reads those that the state has not read (`continuation.tokens_to_read`).
    train() and eval() compute the same.

    Examples:
        >>> import torch
        >>> from nestling import NestlingForCausalLM, presets
        >>> model = NestlingForCausalLM(presets.hope(hidden_size=32, num_layers=1, num_heads=2))
        >>> ids = torch.randint(3, 259, (2, 40))
        >>> out = model(ids, labels=ids, use_cache=True)
        >>> out.loss.backward()  # through the memory's own learning
        >>> more = model(ids, past_key_values=out.past_key_values.detach())  # goes on where that ended
        >>> more.logits.shape
        torch.Size([2, 40, 259])
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 (Hugging Face's name and type)
    accepts_loss_kwargs = True

    def __init__(self, config: NestlingConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def base_model(self) -> NestlingModel:
        """The backbone, with this model's own embeddings, blocks and norm: `base_model(ids).last_hidden_state`.

        It is made anew at every access, so that it holds whatever adapters put in a module's place: put hooks and
        attributes on this model or its parts, since on the view they are lost.
        """
        backbone = NestlingModel.__new__(NestlingModel)
        PreTrainedModel.__init__(backbone, self.config)
        for name, module in self.named_children():
            if name != "lm_head":
                backbone.add_module(name, module)
        for name in ("training", "gradient_checkpointing", "_gradient_checkpointing_func", "_made_on_meta"):
            if hasattr(self, name):
                setattr(backbone, name, getattr(self, name))
        return backbone

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        past_key_values: ModelState | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Float[Tensor, "B T hidden"] | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        shift_labels: Int[Tensor, "B T"] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        loops: int | None = None,
        **packing: Unpack[Packing],
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: tokens.
            attention_mask: see `NestlingModel.forward`; padding does not enter the loss.
            labels: `[B, T]`, unshifted (usually `input_ids`); -100 leaves a token out. The first token of every row and
                of every packed document is nobody's target.
            past_key_values: state of an earlier call, one row per row of the input, or per packed document.
            use_cache: return the new state; `config.use_cache` if None.
            position_ids: see `NestlingModel.forward`.
            logits_to_keep: compute logits for the last so many tokens only (or for the given positions); 0 for all.
            inputs_embeds: embeddings to use in place of `input_ids`.
            return_dict: False returns a plain tuple of what is not None.
            output_attentions: refused when True.
            output_hidden_states: see `NestlingModel.forward`.
            shift_labels: every token's target where it stands, -100 for none; `labels` are not looked at then, as in
                other models of transformers.
            num_items_in_batch: divide the summed loss by this and not by the targets of this batch, as gradient
                accumulation needs it.
            loops: how often the blocks run, see `NestlingModel.forward`; `generate` takes it too.
            packing: boundaries of packed documents, see `Packing`.

        Returns:
            loss (float32, nats per target), logits `[B, T or kept, vocab]`, past_key_values, hidden_states. The logits
            of a masked token are 0. With `config.loss_chunk_size` and labels, logits are None unless `logits_to_keep`
            asks for them.

        Raises:
            ValueError: as `NestlingModel.forward`; labels of another shape, or outside the vocabulary (on the CPU).
            TypeError: an argument nobody knows.
        """
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        read = self._read(*given, use_cache, output_attentions, output_hidden_states, loops, packing)
        targets = self._targets(labels, shift_labels, read)
        loss, logits = self._predict(read.hidden, targets, logits_to_keep, num_items_in_batch)
        found: dict[str, Any] = {"loss": loss, "logits": logits, "past_key_values": read.past_key_values}
        out = CausalLMOutputWithPast(**found, hidden_states=cast(Any, read.hidden_states))
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`.

        Its caller takes `input_ids` of the first step to start with the text a cache has read, unless the mask is
        longer, and cuts that away by its length; here the state says whether they do. A state of fewer rows is
        repeated for the beams or returned sequences of each row.
        """
        if is_first_iteration:
            check_plain_positions(position_ids, attention_mask)
            if past_key_values is not None:
                past_key_values = repeat_rows(past_key_values, len(input_ids))
                if next_sequence_length is not None and inputs_embeds is None:
                    attention_mask = tokens_to_read(input_ids, attention_mask, past_key_values)
            next_sequence_length = None
        return super().prepare_inputs_for_generation(  # type: ignore[misc] # its `self` is a protocol for the whole model
            cast(torch.LongTensor, input_ids),
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _prefill(self, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """The first step of `generate`, which would cut `input_ids` into pieces by the length of a cache."""
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size is not possible: read the prompt in pieces, each with the state (past_key_values) "
                "of the one before, and generate from the last"
            )
        return super()._prefill(input_ids, generation_config, *args, **kwargs)  # type: ignore[misc] # as above

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `generate` starts without a cache, and the first forward pass makes the state."""
        return False

    def _targets(self, labels: Tensor | None, shift_labels: Tensor | None, read: Reading) -> Tensor | None:
        """Every slot's target, -100 where there is none."""
        given = labels if shift_labels is None else shift_labels
        if given is None:
            return None
        shape = tuple(read.hidden.shape[:2])
        if tuple(given.shape) != shape:
            raise ValueError(f"labels have shape {tuple(given.shape)}; the input has (batch, time) = {shape}")
        check_tokens(given.masked_fill(given == IGNORE, 0), self.config.vocab_size, "label")
        return next_token_labels(given, read.rows) if shift_labels is None else given

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


def next_token_labels(labels: Int[Tensor, "B T"], rows: Rows | None) -> Int[Tensor, "B T"]:
    """For every slot the label of the next token of its own row or document, -100 where there is none."""
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
