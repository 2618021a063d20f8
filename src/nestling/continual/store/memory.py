"""What a model learned since it was trained: the differences to its base, and what learning needs to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from nestling.continual.store.adapters import Adapter, adapters_of
from nestling.continual.store.applying import put_in, put_in_for_a_while, take_out
from nestling.continual.store.memory_file import MemoryFileError, read_fields, write_fields
from nestling.continual.store.records import DocumentRecord, LowRank, tensors_of

__all__ = ["DocumentRecord", "LowRank", "Memory", "MemoryFileError"]


@dataclass
class Memory:
    """The learned difference to a base model.

    Attributes:
        fingerprint: of the base model, from `continual.store.fingerprint.base_fingerprint`.
        periods: update period of every level in tokens, fastest first.
        parameters: names of the base model's parameters in every level.
        differences: learned minus base by parameter name, float32, in the parameter's shape or `LowRank`. A parameter
            that has not changed may be left out.
        documents: what was learned from, in order.
        settings: the `Learner`'s settings and counters, JSON values only.
        tensors: what a `Learner` needs besides to go on exactly: optimizer states, gradient sums, tokens not yet
            learned from, the replay buffer, rehearsed text, the running mean. Empty in a memory that is only to be
            used.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from nestling.continual import Learner, Level, Memory
        >>> shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape))
        >>> with Learner(model, {"all": Level(8, ("*.mlp.*",))}, lr=0.01, context=16) as learner:
        ...     seen = learner.observe(torch.arange(24))
        ...     size = learner.memory().save("book.memory")
        >>> with Memory.load("book.memory").applied(model):  # its base weights again afterwards, to the last bit
        ...     logits = model(torch.tensor([[1, 2, 3]])).logits
    """

    fingerprint: str
    periods: dict[str, int]
    parameters: dict[str, list[str]]
    differences: dict[str, Tensor | LowRank]
    documents: list[DocumentRecord] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as held here and as written in float32."""
        held = [t for d in self.differences.values() for t in tensors_of(d)]
        return sum(t.numel() * t.element_size() for t in (*held, *self.tensors.values()))

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What it was taught, study by study, each with the scope in which it speaks; none where it speaks everywhere.

        Raises:
            ValueError: as `adapters_of`.
        """
        return adapters_of(self.settings, self.differences)

    @property
    def tokens(self) -> int:
        """Tokens learned from."""
        return sum(document.tokens for document in self.documents)

    def save(self, path: str | Path, dtype: str = "float32") -> int:
        """Write one file, atomically: a failure leaves an earlier file intact.

        Args:
            path: the file.
            dtype: of the differences in the file: "float32", or "float16" or "bfloat16" for half the size, with which
                learning cannot go on exactly. float16 is the finer of the two: each matrix has a scale of its own.

        Returns:
            the file's size in bytes.

        Raises:
            ValueError: an unknown dtype.
            MemoryFileError: a difference with NaN or infinity, settings that JSON cannot hold, or no such directory.
        """
        write_fields(path, vars(self), dtype)
        return Path(path).stat().st_size

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read one file that `save` wrote. `store.load_memory` reads directories of snapshots as well.

        Raises:
            MemoryFileError: no such file, damaged, or of another format.
        """
        return cls(**read_fields(Path(path))[0])

    def apply(self, model: nn.Module, *, keep_originals: bool = True) -> None:
        """Add what was learned to the model's parameters, in place; of a memory with adapters, beside them.

        A memory with adapters acts by forward hooks, so that `save_pretrained` writes the base model then.

        Args:
            model: the base model, any module with these parameters in the dtype it was learned in.
            keep_originals: keep a copy of the changed parameters, so that `remove` restores them bit for bit. Without
                it `remove` subtracts, which is exact to rounding.

        Raises:
            MemoryUseError: another base model, or a memory is applied already. Nothing has changed then.
        """
        put_in(model, self.fingerprint, self.differences, keep_originals=keep_originals, adapters=self.adapters)

    def remove(self, model: nn.Module) -> None:
        """Take out what `apply` added.

        Raises:
            MemoryUseError: this memory is not applied to the model.
        """
        take_out(model, self.differences)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with this memory for the length of a `with` block; afterwards it is as before, bit for bit.

        Raises:
            MemoryUseError: as `apply`.
        """
        with put_in_for_a_while(model, self.fingerprint, self.differences, self.adapters):
            yield model
