"""Several continuations of one prompt, and many prompts that begin alike, without reading what they share twice."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling.evaluation.choices import log_likelihoods
from nestling.evaluation.sampling import continue_text

Ids = list[int]


class SharedPrompt:
    """Reads prompts of a model, each once, and keeps the beginning that the next ones share.

    Of a model that returns no `past_key_values` everything is read for every continuation.

    Args:
        model: any causal language model of transformers, in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._head: tuple[Ids, Any] = ([], None)

    @torch.no_grad()
    def log_likelihoods(self, head: Ids, rest: Ids, continuations: Sequence[Ids]) -> list[float]:
        """Nats of every continuation of head + rest.

        Args:
            head: what the prompt shares with the next one; it may be empty.
            rest: of the prompt, at least one token.
            continuations: at least one token each.

        Raises:
            ValueError: tokens missing.
        """
        if not rest or not continuations or not all(continuations):
            raise ValueError("a prompt needs a token after what it shares, and every continuation needs one")
        logits, cache = self._read([rest], self._after(head), last=True)
        if cache is None:
            return [said for said, _ in log_likelihoods(self.model, [(head + rest, after) for after in continuations])]
        first = logits[0, -1].log_softmax(-1)
        found = [float(first[after[0]]) for after in continuations]
        further = [i for i, after in enumerate(continuations) if len(after) > 1]
        if further:
            cache.reorder_cache(torch.zeros(len(further), dtype=torch.long, device=self._device))
            # The last token of a continuation is not read: nothing follows it. Padding stands right, where no real
            # token sees it.
            longest = max(len(continuations[i]) for i in further) - 1
            rows = [continuations[i][:-1] + [0] * (longest + 1 - len(continuations[i])) for i in further]
            said = self._read(rows, cache)[0].log_softmax(-1)
            for row, i in enumerate(further):
                after = torch.tensor(continuations[i][1:], device=self._device)
                found[i] += float(said[row, : len(after)].gather(1, after[:, None]).sum())
        return found

    def write(self, head: Ids, rest: Ids, tokens: int, stop: Collection[int]) -> Ids:
        """The most likely continuation of head + rest, token by token.

        Args:
            head: as of `log_likelihoods`.
            rest: likewise.
            tokens: at most.
            stop: tokens that end it, and are left out.
        """
        state = self._after(head)
        prompt = head + rest if state is None else rest
        return continue_text(self.model, prompt, tokens, state=state, temperature=0.0, stop=stop)[0]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _after(self, head: Ids) -> Any:
        """A cache of the model's after the head, for one use."""
        if not head:
            return None
        if self._head[0] != head:
            self._head = head, self._read([head], None, last=True)[1]
        return copy.deepcopy(self._head[1])

    @torch.no_grad()
    def _read(self, rows: Sequence[Ids], cache: Any, last: bool = False) -> tuple[Tensor, Any]:
        """Logits, of the last place alone if that is enough, and the cache after the rows."""
        ids = torch.tensor(rows, device=self._device)
        keep = {"logits_to_keep": 1} if last and self._selects else {}
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
        logits: Tensor = out.logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), getattr(out, "past_key_values", None)
