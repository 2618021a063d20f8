"""What a model knows of an invented world: questions answered by likelihood and in its own words."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.continual.stream.tokenizing import own_beginning
from nestling.evaluation.choices import encode
from nestling.evaluation.sampling import MARK, end_tokens
from nestling.evaluation.shared_prompt import Ids, SharedPrompt
from nestling.tasks.knowledge import NOT_TOLD, KnowledgeQuestion

Context = Callable[[KnowledgeQuestion], str]
"""The text that a question is asked after; empty for a closed book."""

_REFUSALS = re.compile(
    r"(?:\bnot|n't)(?: \w+ly)? (?:been )?(?:told|mentioned|stated|specified|given|provided|known(?! for))\b"
    r"|\bnever (?:told|said|mentioned)\b"
    r"|(?:\b(?:do|does|did|can)(?: not|n't)|\bcannot)(?: \w+ly)? (?:know|say|tell|mention|state|specify"
    r"|provide|have (?:any |enough )?information)\b"
    r"|\bno (?:information|mention|idea)\b|\bunknown\b|\bunsure\b|\bnot sure\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """What a model made of a question.

    Attributes:
        question: the question.
        scores: log-likelihood of every choice, nats.
        lengths: tokens of every choice.
        refusal: log-likelihood of `NOT_TOLD`; None where the prompt is no question.
        text: its own words, up to the end of the line; None where it was not asked for them, or the prompt is no
            question.
    """

    question: KnowledgeQuestion
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    refusal: float | None
    text: str | None

    @property
    def right(self) -> bool:
        """Whether the right choice has the highest log-likelihood."""
        return self.rank == 1

    @property
    def rank(self) -> int:
        """1 plus the choices that are likelier than the right one, or as likely."""
        own = self.scores[self.question.gold]
        return sum(score >= own for score in self.scores)

    @property
    def normalised(self) -> bool:
        """Whether the right choice has the highest log-likelihood per token, so that a long one is not at a loss."""
        each = [score / length for score, length in zip(self.scores, self.lengths, strict=True)]
        return sum(score >= each[self.question.gold] for score in each) == 1

    @property
    def reluctance(self) -> float:
        """How much likelier `NOT_TOLD` is than any answer of the world, nats; NaN where the prompt is no question."""
        answers = [s for s, choice in zip(self.scores, self.question.choices, strict=True) if choice != NOT_TOLD]
        return float("nan") if self.refusal is None else self.refusal - max(answers)

    @property
    def said(self) -> bool | None:
        """Whether its own words have the answer, or of an absence say so; None where there are none."""
        if self.text is None:
            return None
        return refuses(self.text) if self.question.answer == NOT_TOLD else _says(self.text, self.question.answer)


@dataclass(frozen=True)
class KnowledgeScores:
    """Of the questions of one kind.

    Attributes:
        accuracy: fraction whose right choice is the likeliest.
        normalised: likewise per token. Of absences see `absence_auroc`.
        rank: mean place of the right choice.
        said: fraction answered rightly in the model's own words, NaN where none were asked for.
        items: questions.
    """

    accuracy: float
    normalised: float
    rank: float
    said: float
    items: int


def refuses(text: str) -> bool:
    """Whether a text says that it does not know."""
    return _REFUSALS.search(text.replace("’", "'")) is not None


def ask_knowledge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[KnowledgeQuestion],
    context: Context = lambda _: "",
    *,
    chat: bool = False,
    words: int = 0,
) -> list[Answer]:
    """Ask a model.

    A prompt that is a question stands as `Question: ...` and `Answer:` on a line each, or as a turn of a conversation;
    another one is gone on with. The context stands before it, with an empty line between.

    Args:
        model: any causal language model of transformers.
        tokenizer: its own.
        questions: any.
        context: what is to be read before each. Questions that follow each other with the same one read it once.
        chat: put questions with the tokenizer's chat template.
        words: tokens of its own words that are asked for, after questions only; 0 is none.

    Raises:
        ValueError: `chat` without a chat template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template; ask with chat=False")
    reader, found = SharedPrompt(model), []
    stop = end_tokens(model, tokenizer)
    was_training = model.training
    model.eval()
    try:
        for question in questions:
            head, rest, space = _prompt(tokenizer, question, context(question), chat)
            asked = [*question.choices, NOT_TOLD] if question.asks else question.choices
            choices = [_continued(tokenizer, rest, space + choice) for choice in asked]
            scores = reader.log_likelihoods(head, encode(tokenizer, rest), choices)
            refusal, text = (scores.pop(), "") if question.asks else (None, None)
            if words and question.asks:
                written = reader.write(head, encode(tokenizer, rest), words, stop)
                text = str(tokenizer.decode(written)).strip().split("\n")[0]
            lengths = tuple(map(len, choices[: len(scores)]))
            found.append(Answer(question, tuple(scores), lengths, refusal, text if words else None))
    finally:
        model.train(was_training)
    return found


def knowledge_scores(answers: Iterable[Answer]) -> dict[str, KnowledgeScores]:
    """By kind, in the order in which the kinds come, and "all"."""
    kinds: dict[str, list[Answer]] = {}
    for answer in answers:
        kinds.setdefault(answer.question.kind, []).append(answer)
    if kinds:
        kinds["all"] = [answer for own in kinds.values() for answer in own]
    return {kind: _scores(own) for kind, own in kinds.items()}


def absence_auroc(answers: Iterable[Answer]) -> float:
    """How well a model tells what it was told from what it was not, 1/2 at chance (area under the ROC curve).

    The probability that it is more reluctant to answer (`Answer.reluctance`) a question about somebody whom no document
    names than one of the kind "question" about the same relation; ties count half. Only pairs of one relation are
    compared: how likely the answers of another one are by themselves would decide. Which of the two, an answer or
    `NOT_TOLD`, is likelier says little for the same reason: that is good English, and invented names are not.

    Returns:
        NaN where there is no such pair.
    """
    kinds: dict[str, list[Answer]] = {"absence": [], "question": []}
    for answer in answers:
        kinds.get(answer.question.kind, []).append(answer)
    found = [
        (absent.reluctance, told.reluctance)
        for absent in kinds["absence"]
        for told in kinds["question"]
        if absent.question.relation == told.question.relation
    ]
    pairs = [(a > b) + (a == b) / 2 for a, b in found]
    return statistics.mean(pairs) if pairs else float("nan")


def _scores(answers: Sequence[Answer]) -> KnowledgeScores:
    said = [answer.said for answer in answers if answer.said is not None]
    return KnowledgeScores(
        accuracy=statistics.mean(answer.right for answer in answers),
        normalised=statistics.mean(answer.normalised for answer in answers),
        rank=statistics.mean(answer.rank for answer in answers),
        said=statistics.mean(said) if said else float("nan"),
        items=len(answers),
    )


def _prompt(
    tokenizer: PreTrainedTokenizerBase, question: KnowledgeQuestion, context: str, chat: bool
) -> tuple[Ids, str, str]:
    """Tokens up to the end of the context, the rest, and what stands between the prompt and an answer."""
    before = f"{context}\n\n" if context else ""
    if not (chat and question.asks):
        prompt = f"Question: {question.prompt}\nAnswer:" if question.asks else question.prompt
        return own_beginning(tokenizer) + encode(tokenizer, before), prompt, " "
    turn = [{"role": "user", "content": before + MARK}]
    whole = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    head, _, end = whole.rpartition(MARK)
    return encode(tokenizer, head), question.prompt + end, ""


def _continued(tokenizer: PreTrainedTokenizerBase, prompt: str, after: str) -> Ids:
    """Tokens of what follows a prompt, encoded with it, where the prompt's own are the same then."""
    before, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + after)
    return whole[len(before) :] if whole[: len(before)] == before else encode(tokenizer, after)


def _says(text: str, answer: str) -> bool:
    """Whether the words of the answer, its article apart, stand in the text."""
    core = re.sub(r"^(?:an?|the) ", "", answer.strip())
    return re.search(rf"(?<!\w){re.escape(core)}(?!\w)", text, re.IGNORECASE) is not None
