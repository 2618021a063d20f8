"""Multiple choice and last words by likelihood, as common test harnesses count them (lm-eval's acc, acc_norm)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.continual.stream.chunks import Piece, batches
from nestling.continual.stream.scoring import Reader, target_ids
from nestling.errors import UserError

Ids = list[int]


@dataclass(frozen=True)
class Question:
    """Texts of which one is right.

    Attributes:
        prompts: what stands before each choice; mostly the same text.
        choices: continuations without the space before them.
        gold: index of the right one.
    """

    prompts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class ChoiceScores:
    """How a model does.

    Attributes:
        accuracy: fraction whose right choice has the highest log-likelihood.
        normalised: likewise per character of the choice (lm-eval's `acc_norm`).
        items: questions asked.
    """

    accuracy: float
    normalised: float
    items: int


@dataclass(frozen=True)
class LastWordScores:
    """How a model does at last words.

    Attributes:
        accuracy: fraction whose every token is the most likely one.
        loss: nats a word.
        items: texts asked.
    """

    accuracy: float
    loss: float
    items: int


def read_questions(path: str | Path, items: int | None = None) -> list[Question]:
    """The first `items` questions of a file of JSON lines, with the prompts of lm-eval's tasks.

    By their fields: `query`, `choices` and `gold` or `label` (HellaSwag, prepared); `question` or `question_stem`,
    `choices` with `text` and `label`, `answerKey` (ARC, OpenBookQA); `goal`, `sol1`, `sol2` (PIQA); `context`,
    `question`, `answerA` to `answerC` (Social IQa, whose labels begin at 1); `sentence`, `option1`, `option2`
    (WinoGrande: the same end after either word).

    Raises:
        UserError: a file that cannot be read, or a line with other fields.
    """
    return [_question(row, f"{path}, line {number}") for number, row in enumerate(_lines(path, items), 1)]


def read_last_words(path: str | Path, items: int | None = None) -> list[tuple[str, str]]:
    """(text before, last word) of the first `items` texts of LAMBADA (JSON lines with `text`).

    Raises:
        UserError: a file that cannot be read, or a line without a text of two words.
    """
    found = []
    for number, row in enumerate(_lines(path, items), 1):
        before, space, word = str(row.get("text", "")).rstrip().rpartition(" ")
        if not before or not space or not word:
            raise UserError(f"{path}, line {number}: no `text` of two words or more")
        found.append((before, word))
    return found


def ask_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch_tokens: int = 2048
) -> ChoiceScores:
    """Accuracy on multiple-choice questions; ties count for the first choice.

    Args:
        model: any causal language model.
        tokenizer: its own.
        questions: one or more.
        batch_tokens: of a forward pass, padding included. A matter of memory and speed.
    """
    _some(questions, "questions")
    texts = [(p, f" {c}") for q in questions for p, c in zip(q.prompts, q.choices, strict=True)]
    found = log_likelihoods(model, [encode_pair(tokenizer, p, c) for p, c in texts], batch_tokens)
    right = normalised = at = 0
    for question in questions:
        own = [value for value, _ in found[at : at + len(question.choices)]]
        at += len(own)
        scaled = [value / max(1, len(choice)) for value, choice in zip(own, question.choices, strict=True)]
        right += own.index(max(own)) == question.gold
        normalised += scaled.index(max(scaled)) == question.gold
    return ChoiceScores(right / len(questions), normalised / len(questions), len(questions))


def ask_last_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    batch_tokens: int = 2048,
) -> LastWordScores:
    """Accuracy and loss on last words (LAMBADA); arguments as of `ask_questions`."""
    _some(texts, "texts")
    found = log_likelihoods(model, [encode_pair(tokenizer, a, f" {b}") for a, b in texts], batch_tokens)
    loss = -sum(value for value, _ in found) / len(found)
    return LastWordScores(sum(greedy for _, greedy in found) / len(found), loss, len(found))


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> tuple[Ids, Ids]:
    """Tokens of a prompt and of what follows, encoded together, cut where the prompt alone would end.

    Without a prompt the end-of-text token stands in its place.
    """
    if not prompt:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [int(start)], encode(tokenizer, continuation)
    before, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + continuation)
    return whole[: len(before)], whole[len(before) :]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, pairs: Sequence[tuple[Ids, Ids]], batch_tokens: int = 2048
) -> list[tuple[float, bool]]:
    """For (prompt, continuation): log-likelihood of the continuation in nats, and whether it is the greedy one.

    Pairs of like length are read together, right-padded.

    Raises:
        ValueError: a prompt or a continuation without tokens.
    """
    if empty := [i for i, (before, after) in enumerate(pairs) if not before or not after]:
        raise ValueError(f"pair {empty[0]} has no tokens in its prompt or its continuation")
    pieces = [
        Piece(torch.tensor([*before, *after]), len(before), torch.ones(len(after), dtype=torch.bool))
        for before, after in pairs
    ]
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i].ids))
    reader = Reader(model)
    found: dict[int, tuple[float, bool]] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in batches([pieces[i] for i in order], batch_tokens):
            own = order[len(found) : len(found) + len(batch)]
            logits = reader.logits(batch)
            targets = target_ids(batch).to(logits.device)
            said = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].double().cpu()
            greedy = (logits.argmax(-1) == targets).cpu()
            sizes = [int(piece.targets.sum()) for piece in batch]
            for index, values, hits in zip(own, said.split(sizes), greedy.split(sizes), strict=True):
                found[index] = float(values.sum()), bool(hits.all())
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(pieces))]


def _question(row: dict[str, Any], where: str) -> Question:
    try:
        if "goal" in row:
            return _same(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))
        if "sentence" in row:
            before, after = row["sentence"].split("_")
            prompts = (before + row["option1"], before + row["option2"])
            return Question(prompts, (after.strip(),) * 2, int(row["answer"]) - 1)
        if "answerA" in row:
            choices = [row["answerA"], row["answerB"], row["answerC"]]
            return _same(f"Q: {row['context']} {row['question']}\nA:", choices, int(row["label"]) - 1)
        if "answerKey" in row:
            prompt = row["question_stem"] if "question_stem" in row else f"Question: {row['question']}\nAnswer:"
            return _same(prompt, row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))
        return _same(row["query"], row["choices"], int(row["gold"] if "gold" in row else row["label"]))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{where} is no question of a known form ({type(error).__name__}: {error})") from error


def _same(prompt: str, choices: Sequence[str], gold: int) -> Question:
    if not 0 <= gold < len(choices):
        raise ValueError(f"answer {gold} of {len(choices)}")
    return Question((prompt,) * len(choices), tuple(choices), gold)


def _lines(path: str | Path, items: int | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if items is not None and len(found) == items:
                    break
                found.append(json.loads(line))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}, line {len(found) + 1} ({error})") from error
    return found


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """Tokens of a text, and no special ones."""
    ids: Ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    return ids


def _some(items: Sequence[object], what: str) -> None:
    if not items:
        raise ValueError(f"no {what} were given")
