"""Translation into English by a language model that has examples before it: chrF of greedy answers, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestling.errors import UserError
from nestling.models import ModelState, NestlingForCausalLM
from nestling.tasks.translation import Pair

LABEL_IGNORED = -100


@dataclass(frozen=True)
class TranslationScores:
    """How well sentences were translated.

    Attributes:
        chrf: of the greedy answers, 0 to 100 (chrF2 of sacrebleu, over the corpus); None where none were asked for.
        loss: nats a token of the right answers, line end included.
        answers: as given.
        examples: pairs that stood before every question.
    """

    chrf: float | None
    loss: float
    answers: tuple[str, ...]
    examples: int


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as one stream of tokens.

    Attributes:
        ids: `[n]`.
        answers: `[n]`, which of them are of the English side.
        ends: where every pair ends.
    """

    ids: Int[Tensor, " n"]
    answers: Bool[Tensor, " n"]
    ends: tuple[int, ...]

    def last(self, tokens: int) -> tuple[Int[Tensor, " m"], int]:
        """The last whole pairs that `tokens` tokens hold, and how many they are."""
        borders = [0, *self.ends]
        first = next(i for i, start in enumerate(borders) if self.ends[-1] - start <= max(0, tokens))
        return self.ids[borders[first] :], len(borders) - 1 - first


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], tokens: int | None = None) -> EncodedPairs:
    """`sentence = translation` lines, prompt and answer encoded apart, as they are when a translation is asked for.

    Args:
        tokenizer: of the model.
        pairs: in order.
        tokens: as many pairs from the first as so many tokens hold; None takes all.

    Raises:
        ValueError: not one pair fits.
    """
    ids: list[int] = []
    answers: list[bool] = []
    ends: list[int] = []
    for pair in pairs:
        prompt, answer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (pair.prompt, pair.answer))
        if tokens is not None and len(ids) + len(prompt) + len(answer) > tokens:
            break
        ids += [*prompt, *answer]
        answers += [False] * len(prompt) + [True] * len(answer)
        ends.append(len(ids))
    if not ends:
        raise ValueError(f"no pair fits {tokens} tokens")
    return EncodedPairs(torch.tensor(ids), torch.tensor(answers), tuple(ends))


@torch.no_grad()
def score_translations(
    model: NestlingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    examples: EncodedPairs,
    *,
    context: int,
    max_tokens: int = 96,
    batch_size: int = 8,
    generate: bool = True,
) -> TranslationScores:
    """Ask for the translations of `pairs`, each with the last examples that fit before it.

    The examples are read once, and every question goes on from the state after them.

    Args:
        model: with a state that can be continued several times; any Llama-like model is one after `models.convert`.
        tokenizer: its own.
        pairs: questions and right answers, one or more.
        examples: the last whole ones that leave room for the longest question and answer stand before every question.
        context: tokens of examples, question and answer together.
        max_tokens: of an answer, which ends before that at a line end.
        batch_size: questions answered side by side.
        generate: False measures the loss only.

    Raises:
        ValueError: no pairs.
        UserError: sacrebleu is not installed.
    """
    if not pairs:
        raise ValueError("no pairs to translate were given")
    asked = [encode_pairs(tokenizer, [pair]) for pair in pairs]
    longest = max(len(one.ids) for one in asked)
    questions = [one.ids[~one.answers] for one in asked]
    longest = max(longest, max_tokens + max(len(q) for q in questions))
    prefix, count = examples.last(context - longest)
    was_training = model.training
    model.eval()
    try:
        state = None
        if len(prefix):
            state = model(input_ids=prefix[None].to(model.device), use_cache=True, logits_to_keep=1).past_key_values
        loss = _answer_loss(model, asked, state, batch_size)
        answers: list[str] = []
        if generate:
            order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
            found: dict[int, str] = {}
            for at in range(0, len(order), batch_size):
                own = order[at : at + batch_size]
                texts = _answer(model, tokenizer, [questions[i] for i in own], state, max_tokens)
                found |= dict(zip(own, texts, strict=True))
            answers = [found[i] for i in range(len(questions))]
    finally:
        model.train(was_training)
    score = chrf(answers, [pair.english for pair in pairs]) if generate else None
    return TranslationScores(score, loss, tuple(answers), count)


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 over a corpus, 0 to 100, as sacrebleu counts it.

    Raises:
        UserError: sacrebleu is not installed.
    """
    try:
        from sacrebleu import corpus_chrf
    except ImportError as error:
        raise UserError("chrF needs the package sacrebleu; install it with: pip install sacrebleu") from error
    return float(corpus_chrf(list(answers), [list(references)]).score)


def _answer_loss(
    model: NestlingForCausalLM, asked: Sequence[EncodedPairs], state: ModelState | None, batch_size: int
) -> float:
    total, count = 0.0, 0
    ordered = sorted(asked, key=lambda one: len(one.ids))
    for at in range(0, len(ordered), batch_size):
        rows = ordered[at : at + batch_size]
        width = max(len(row.ids) for row in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), LABEL_IGNORED)
        for i, row in enumerate(rows):
            n = len(row.ids)
            ids[i, :n], mask[i, :n] = row.ids, 1
            labels[i, :n] = row.ids.where(row.answers, LABEL_IGNORED)
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=_rows(state, len(rows)),
            use_cache=False,
        ).logits[:, :-1]
        targets = labels[:, 1:].to(logits.device).flatten()
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum"))
        count += int((targets != LABEL_IGNORED).sum())
    return total / count


def _answer(
    model: NestlingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Tensor],
    state: ModelState | None,
    max_tokens: int,
) -> list[str]:
    """Greedy answers to the first line end."""
    width = max(len(q) for q in questions)
    ids, mask = (
        torch.zeros(len(questions), width, dtype=torch.long),
        torch.zeros(len(questions), width, dtype=torch.long),
    )
    for row, question in enumerate(questions):
        ids[row, width - len(question) :], mask[row, width - len(question) :] = question, 1
    stops = sorted(_line_ends(tokenizer))
    out = model.generate(  # type: ignore[misc]  # its `self` is a protocol for the whole model
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=_rows(state, len(questions)),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    assert isinstance(out, Tensor)
    texts = tokenizer.batch_decode(out[:, width:].tolist(), skip_special_tokens=True)
    return [text.split("\n")[0].strip() for text in texts]


@cache
def _line_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a line or the text."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    ends = {i for i, text in enumerate(texts) if "\n" in text}
    return frozenset(ends | ({tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()))


def _rows(state: ModelState | None, count: int) -> ModelState | None:
    return None if state is None else state.select([0] * count)
