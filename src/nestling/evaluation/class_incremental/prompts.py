"""How texts and labels are put to a language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from nestling.evaluation.class_incremental.label_trie import LabelTrie
from nestling.tasks.classification import LabelledText


class LabelPrompts:
    """`Text: ...<newline>Label:` as the question, ` label<newline>` as the answer; the newline ends every label.

    Args:
        tokenizer: of the model.
        labels: by class.
        max_tokens: a longer text is cut, so that a prompt has a bounded cost.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_tokens: int = 48) -> None:
        self.tokenizer, self.labels, self.max_tokens = tokenizer, tuple(labels), max_tokens
        self.before, self.after, self.end = (self._encode(part) for part in ("Text: ", "\nLabel:", "\n"))
        first, bos = next(iter(tokenizer("a")["input_ids"])), tokenizer.bos_token_id
        self.start = [first] if first == bos else []
        self.answers = [[*self._encode(" " + label), *self.end] for label in self.labels]

    def prompt(self, text: str) -> list[int]:
        """Tokens of the question about a text, without the beginning token that a tokenizer may add."""
        return [*self.before, *self._encode(text)[: self.max_tokens], *self.after]

    def question(self, text: str) -> list[int]:
        """A whole input: the beginning token, where the tokenizer adds one, and the prompt."""
        return [*self.start, *self.prompt(text)]

    def example(self, example: LabelledText) -> list[int]:
        """Question and answer."""
        return [*self.prompt(example.text), *self.answers[example.label]]

    def context(self, examples: Iterable[LabelledText]) -> list[int]:
        """The beginning token, where the tokenizer adds one, and examples one after the other."""
        return [*self.start, *(token for example in examples for token in self.example(example))]

    def trie(self, classes: Iterable[int]) -> LabelTrie:
        """The label trie of some classes."""
        return LabelTrie({c: self.answers[c] for c in classes})

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
