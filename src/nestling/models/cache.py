"""The state of a whole model: what Hugging Face calls `past_key_values`, and what a user saves as a state."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from jaxtyping import Int
from torch import Tensor

from nestling.memory.state import State, StateFileError

if TYPE_CHECKING:
    from nestling.models.modeling import NestlingPreTrainedModel


@dataclass
class BlockState(State):
    """The states of one block's two layers; `channel` is None where the channel mixer keeps nothing."""

    mixer: State
    channel: State | None = None


@dataclass
class ModelState(State):
    """One state per block, and the tokens every row has read.

    A forward pass never changes a state it is given, so one state can be continued in several ways. The methods below
    `load` are the part of `transformers.Cache` that `generate` calls.

    Attributes:
        position: tokens read so far by every row, int64 on the CPU.
        layers: a `BlockState` per block.
        digest: of the tokens read (`nestling.models.digest`), by which `generate` knows them again. None where they are
            not known: after `inputs_embeds`, and in files of version 0.1.

    Examples:
        >>> import torch
        >>> from nestling import NestlingForCausalLM, presets
        >>> from nestling.models import ModelState
        >>> model = NestlingForCausalLM(presets.hope_linear(hidden_size=32, num_layers=1, num_heads=2))
        >>> state = model(torch.randint(3, 259, (1, 40)), use_cache=True).past_key_values.detach()
        >>> state.save("read.state", model)
        >>> two = ModelState.load("read.state", model).select([0, 0])  # one row for each way to go on
        >>> model(torch.tensor([[5], [6]]), past_key_values=two).logits.shape
        torch.Size([2, 1, 259])
    """

    position: Int[Tensor, " N"]
    layers: list[BlockState]
    digest: Int[Tensor, "N 2"] | None = None
    further_loops: list[list[BlockState]] | None = None

    is_compileable: ClassVar[bool] = False
    may_lack: ClassVar[frozenset[str]] = frozenset({"digest"})

    @property
    def loops(self) -> int:
        """How often the blocks ran over what this state has read."""
        return 1 + len(self.further_loops or ())

    def loop(self, index: int) -> list[BlockState]:
        """The states of one loop's blocks, counted from 0."""
        return self.layers if index == 0 else (self.further_loops or [])[index - 1]

    def like_file(self, names: Collection[str]) -> Self:
        """See `State.like_file`. The loops of a model have states of one shape, and a file has as many as it names."""
        loops = {name.split(".")[1] for name in names if name.startswith("further_loops.")}
        return replace(super().like_file(names), further_loops=[self.layers for _ in loops] or None)

    def save(self, path: str | Path, model: NestlingPreTrainedModel) -> None:
        """Write the state as safetensors with the fingerprint of `model`; an earlier file survives a failure.

        Raises:
            ValueError: the state holds NaN or infinity, or is not of this model's shape.
        """
        if broken := self.first_nonfinite():
            raise ValueError(f"the state is not saved: {broken} holds NaN or infinity")
        if len(self.layers) != len(model.blocks):
            raise ValueError(
                f"the state has {len(self.layers)} blocks and the model {len(model.blocks)}; save it with its own model"
            )
        self.write_file(path, model.fingerprint())

    @classmethod
    def load(cls, path: str | Path, model: NestlingPreTrainedModel) -> Self:
        """Read a state that `save` wrote with this very model; it keeps the file's number of rows and of loops.

        Raises:
            FileNotFoundError: no such file.
            StateFileError: not a state file, damaged, from another model, or of another shape.
        """
        with torch.no_grad():
            template = cls(**vars(model.init_state(1, loops=1)))
        state = template.read_file(path, model.fingerprint())
        if bool((state.position < 0).any()):
            raise StateFileError(f"{path}: position {state.position.tolist()} is negative; the file is damaged")
        return state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read by the row that has read most. All layers agree, so `layer_idx` changes nothing."""
        return int(self.position.max()) if len(self.position) else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i continue row `beam_idx[i]`, in place: that is how `generate` calls it between two beam steps."""
        chosen = self.select(beam_idx)
        self.position, self.layers, self.digest = chosen.position, chosen.layers, chosen.digest
        self.further_loops = chosen.further_loops
