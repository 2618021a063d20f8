"""A model's own hidden states as features of texts, kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from nestling.continual.store.fingerprint import base_fingerprint
from nestling.evaluation.class_incremental.label_trie import pad_left
from nestling.evaluation.class_incremental.prompts import LabelPrompts


class TextFeatures:
    """Hidden states of a model that reads the question about a text: means over the text's own tokens after chosen
    blocks, side by side.

    What stands before the text in the prompt takes the part of the attention sink, whose state is large and says
    nothing, and is left out of the mean.

    They are those of the model as it was when they were asked for first: what is known is not computed again. A method
    that trains the blocks below one of `layers` calls `prepare` for all texts, and sets `frozen`, before it begins.

    Args:
        model: whose `hidden_states` are read; 0 is the embedding, i the output of block i.
        prompts: of the model.
        layers: which ones; negative ones count from the end.
        folder: where features are kept between runs, one file for each model and choice; None keeps nothing.

    Attributes:
        width: of the features.
        frozen: whether a text that is not known is refused.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: LabelPrompts, layers: Sequence[int] = (-1,), folder: Path | None = None
    ) -> None:
        self.model, self.prompts = model, prompts
        depth = int(model.config.num_hidden_layers) + 1
        self.layers = [layer % depth for layer in layers]
        self.width = int(model.config.hidden_size) * len(self.layers)
        self.frozen = False
        self.known: dict[str, Tensor] = {}
        self.path: Path | None = None
        if folder is not None:
            precision = torch.get_float32_matmul_precision()
            choice = "-".join(map(str, [*self.layers, prompts.max_tokens, model.device.type, precision]))
            self.path = folder / f"features-{base_fingerprint(model)}-{choice}.safetensors"
            if self.path.exists():
                self.known = load_file(self.path)

    def prepare(self, texts: Sequence[str], batch: int = 16) -> None:
        """Compute what is not known yet, and write the file.

        Raises:
            ValueError: a text is not known and `frozen` is set.
        """
        missing = sorted({text for text in texts if _key(text) not in self.known}, key=len)
        if not missing:
            return
        if self.frozen:
            raise ValueError(
                f"{len(missing)} texts have no features, and the model may have changed: prepare them first"
            )
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            self.known |= dict(zip(map(_key, part), self._run(part), strict=True))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(f".{os.getpid()}.part")
            save_file(self.known, unfinished)
            unfinished.replace(self.path)

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "n width"]:
        """The features, float32."""
        self.prepare(texts)
        return torch.stack([self.known[_key(text)] for text in texts])

    @torch.no_grad()
    def _run(self, texts: Sequence[str]) -> list[Tensor]:
        rows = [self.prompts.question(text) for text in texts]
        tokens, mask = (x.to(self.model.device) for x in pad_left(rows, 0))
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        )
        states = torch.cat([out.hidden_states[layer].float() for layer in self.layers], -1).cpu()
        before, after = len(self.prompts.start) + len(self.prompts.before), len(self.prompts.after)
        own = [state[-len(row) + before : -after] for row, state in zip(rows, states, strict=True)]
        return [part.mean(0) if len(part) else state[-1] for part, state in zip(own, states, strict=True)]


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
