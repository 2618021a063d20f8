"""Shared prompts against whole ones, and what counts as an answer."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from nestling import NestlingForCausalLM, presets
from nestling.evaluation.choices import log_likelihoods
from nestling.evaluation.knowledge import Answer, absence_auroc, ask_knowledge, knowledge_scores, refuses
from nestling.evaluation.shared_prompt import SharedPrompt
from nestling.tasks.knowledge import NOT_TOLD, KnowledgeQuestion, ask_world, make_world
from nestling.training.tokenization import byte_tokenizer
from tests.llamas import random_llama
from tests.talkers import answering

AFTER = [[5], [6, 7, 8], [9, 10], [6, 7, 200]]


class Cacheless(torch.nn.Module):
    """A model that returns logits alone."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object) -> object:
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        out.past_key_values = None
        return out


def hope() -> PreTrainedModel:
    torch.manual_seed(0)
    model = NestlingForCausalLM(presets.hope_linear("tiny", hidden_size=32, num_layers=2, num_heads=2)).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    return model


@pytest.mark.parametrize("model", [random_llama(), hope(), Cacheless(random_llama())], ids=["llama", "hope", "none"])
def test_what_is_shared_changes_no_score(model: PreTrainedModel) -> None:
    """Heads that come again, change and are empty; continuations of several lengths."""
    head, other, rest = list(range(20, 95)), list(range(30, 60)), [100, 101, 102]
    reader = SharedPrompt(model)
    for start, end in ((head, rest), (head, [7]), (other, rest), ([], rest), (head, rest)):
        found = reader.log_likelihoods(start, end, AFTER)
        whole = [value for value, _ in log_likelihoods(model, [(start + end, after) for after in AFTER])]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(whole), rtol=1e-4, atol=1e-4)


def test_own_words_are_the_likeliest_after_the_shared_beginning_too() -> None:
    model, head, rest = random_llama(), list(range(20, 60)), [100, 101]
    ids = torch.tensor([head + rest])
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, ids.shape[1] :
        ]
    reader = SharedPrompt(model)
    for _ in range(2):  # the second time from the kept beginning
        assert reader.write(head, rest, 6, ()) == whole.tolist()
    assert reader.write([], head + rest, 6, ()) == whole.tolist()


@pytest.mark.parametrize(("rest", "after"), [([], AFTER), ([1], []), ([1], [[2], []])])
def test_missing_tokens_are_refused(rest: list[int], after: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="needs"):
        SharedPrompt(random_llama()).log_likelihoods([], rest, after)


def question(prompt: str, choices: tuple[str, ...], gold: int = 0) -> KnowledgeQuestion:
    return KnowledgeQuestion("question", "town", "Ada", prompt, choices, gold, ("a",))


def test_questions_are_put_as_a_conversation_where_wanted() -> None:
    """The model says "good day" after an answer's beginning alone, and "good" after hello."""
    model, tokenizer = answering()
    asked = question("hello ?", ("again", "good day", "day"), 1)
    (answer,) = ask_knowledge(model, tokenizer, [asked], chat=True, words=5)
    assert answer.right and answer.normalised and answer.said and answer.text == "good day"
    (wrong,) = ask_knowledge(model, tokenizer, [question("hello ?", ("again", "good"))], chat=True, words=5)
    assert not wrong.right and wrong.rank == 2 and wrong.said is False
    with pytest.raises(ValueError, match="no chat template"):
        ask_knowledge(model, byte_tokenizer(), [asked], chat=True)


def test_a_sentence_is_gone_on_with_and_the_context_stands_before() -> None:
    model, tokenizer = random_llama(), byte_tokenizer()
    asked = [question("Ada lives in", (" x", "yz")), question("Where?", ("x", "yz"))]
    answers = ask_knowledge(model, tokenizer, asked, lambda q: "Ada is." if q is asked[0] else "")
    prompts = ["Ada is.\n\nAda lives in", "Question: Where?\nAnswer:"]
    for answer, prompt in zip(answers, prompts, strict=True):
        pairs = [([b + 3 for b in prompt.encode()], [b + 3 for b in f" {c}".encode()]) for c in answer.question.choices]
        whole = [value for value, _ in log_likelihoods(model, pairs)]
        torch.testing.assert_close(torch.tensor(answer.scores), torch.tensor(whole), rtol=1e-4, atol=1e-4)
        assert answer.lengths == tuple(len(after) for _, after in pairs) and answer.text is None and answer.said is None
    assert not model.training


def test_told_and_untold_are_told_apart_by_how_reluctant_the_answer_is() -> None:
    """By hand: reluctances 3 and 1 of absences, 2, 1 and -4 of what was told: 4 1/2 of 6 pairs are in order."""

    def answer(kind: str, reluctance: float, relation: str = "town") -> Answer:
        absent = kind == "absence"
        choices = ("a", NOT_TOLD) if absent else ("a", "b")
        asked = KnowledgeQuestion(kind, relation, "Ada", "?", choices, int(absent), ())
        scores = (-5.0, reluctance - 5) if absent else (-9.0, -5.0)
        return Answer(asked, scores, (1, 1), reluctance - 5, None)

    found = [answer("absence", x) for x in (3.0, 1.0)] + [answer("question", x) for x in (2.0, 1.0, -4.0)]
    assert [a.reluctance for a in found] == [3, 1, 2, 1, -4]
    assert absence_auroc(found) == pytest.approx((3 + 1.5) / 6)
    assert absence_auroc([*found, answer("update", 9.0)]) == absence_auroc(found)
    assert absence_auroc([*found, answer("absence", -9.0, "birthday")]) == absence_auroc(found)
    assert math.isnan(absence_auroc(found[:2]))


def test_a_tie_is_no_knowledge() -> None:
    """A model that finds all choices equally likely knows none of them."""
    answer = Answer(question("?", ("a", "b", "c")), (-1.0, -1.0, -2.0), (1, 1, 1), None, None)
    assert not answer.right and not answer.normalised and answer.rank == 2


def test_a_long_answer_is_not_at_a_loss_per_token() -> None:
    answer = Answer(question("?", ("long", "short")), (-3.0, -2.0), (3, 1), None, None)
    assert not answer.right and answer.normalised


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Ada keeps a Grey Parrot.", "a grey parrot", True),
        ("She has the grey parrots", "a grey parrot", False),
        ("Ironstow, of course", "Ironstow", True),
        ("Ironstowe", "Ironstow", False),
        ("I was never told that.", NOT_TOLD, True),
        ("The text does not mention it.", NOT_TOLD, True),
        ("It is not mentioned.", NOT_TOLD, True),
        ("In Ironstow, not far from here.", NOT_TOLD, False),
        ("It isn't mentioned.", NOT_TOLD, True),
        ("I wasn’t told.", NOT_TOLD, True),
        ("It is not explicitly mentioned in the text.", NOT_TOLD, True),
        ("The text does not specify it.", NOT_TOLD, True),
        ("I have no idea.", NOT_TOLD, True),
        ("It is not known for its wine but for its lace.", NOT_TOLD, False),
    ],
)
def test_what_counts_as_saying_it(text: str, answer: str, right: bool) -> None:
    assert Answer(question("?", (answer, "x")), (0.0, -1.0), (1, 1), None, text).said is right
    assert refuses(text) is (answer == NOT_TOLD and right)


def test_scores_are_by_kind() -> None:
    asked = ask_world(make_world(3, seed=1), ["same words", "question"])
    answers = [
        Answer(q, tuple(float(i == q.gold) for i in range(len(q.choices))), (1,) * len(q.choices), None, None)
        for q in asked
    ]
    found = knowledge_scores(answers)
    assert list(found) == ["same words", "question", "all"] and found["all"].items == len(asked)
    assert all(scores.accuracy == scores.normalised == scores.rank == 1 for scores in found.values())
    assert knowledge_scores([]) == {}
