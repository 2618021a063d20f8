"""The backbone and the causal language model, as the tools around transformers know them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nestling import NestlingForCausalLM
from nestling.models import ModelState, NestlingModel
from tests.models.conftest import small_model

Make = Callable[..., NestlingForCausalLM]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_checkpoint_serves_backbone_and_causal_model(ids: Tensor, tmp_path: Path, tied: bool) -> None:
    model = small_model("hope", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "causal")
    backbone, found = AutoModel.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert type(backbone) is NestlingModel
    assert found["missing_keys"] == set()
    assert found["unexpected_keys"] == (set() if tied else {"lm_head.weight"})
    out = backbone(ids)
    logits = model.lm_head(out.last_hidden_state * model.config.logit_scale)
    torch.testing.assert_close(logits, model(ids).logits)
    assert isinstance(out.past_key_values, ModelState)

    backbone.save_pretrained(tmp_path / "backbone")
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert found["missing_keys"] == (set() if tied else {"lm_head.weight"})
    assert (again.lm_head.weight is again.embed_tokens.weight) is tied
    if tied:
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_parameters_keep_their_names(make: Make) -> None:
    """Checkpoints, memories, optimizers' groups and device maps name them."""
    model = make(tie_word_embeddings=False)
    first = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert first == {"embed_tokens", "blocks", "norm", "lm_head"}
    assert [n for n, _ in model.base_model.named_parameters()] == [
        n for n, _ in model.named_parameters() if n != "lm_head.weight"
    ]


def test_the_base_model_is_the_models_own_backbone(ids: Tensor) -> None:
    model = small_model("hope").double()
    backbone = model.base_model
    assert type(backbone) is NestlingModel
    assert backbone.embed_tokens is model.embed_tokens
    assert backbone.blocks is model.blocks
    assert "base_model" not in dict(model.named_modules())
    hidden = backbone(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden * model.config.logit_scale), model(ids).logits)
    model.forward = lambda *args, **kwargs: pytest.fail("the backbone took the patched forward pass of its model")
    torch.testing.assert_close(model.base_model(ids).last_hidden_state, hidden)
    model.embed_tokens = nn.Embedding.from_pretrained(model.embed_tokens.weight * 2)
    assert model.base_model.embed_tokens is model.embed_tokens
    assert not model.eval().base_model.training
    assert model.train().base_model.training


def test_hidden_states_are_those_of_transformers(model: NestlingForCausalLM, ids: Tensor) -> None:
    """The embeddings, what every block but the last gives, and the last one after the norm."""
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    out = model(ids, output_hidden_states=True)
    expected = [model.embed_tokens(ids), *seen[:-1], model.norm(seen[-1])]
    assert len(out.hidden_states) == len(model.blocks) + 1
    torch.testing.assert_close(list(out.hidden_states), expected)
    backbone = model.base_model(ids, output_hidden_states=True)
    torch.testing.assert_close(backbone.hidden_states, out.hidden_states)
    torch.testing.assert_close(backbone.last_hidden_state, out.hidden_states[-1])
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(model.blocks) + 1


def test_hidden_states_of_a_padded_batch(model: NestlingForCausalLM, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(ids[1:2, 8:], output_hidden_states=True).hidden_states
    for a, b in zip(hidden, alone, strict=True):
        assert a.shape == (*ids.shape, model.config.hidden_size)
        torch.testing.assert_close(a[1, 8:], b[0])
        assert not a[1, :8].any()


def test_shift_labels_stand_where_they_are_meant(ids: Tensor) -> None:
    model = small_model("hope_linear").double()
    shifted = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), 1)
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted, num_items_in_batch=60).loss, expected)


def test_what_cannot_be_done_is_refused(ids: Tensor) -> None:
    model = small_model("hope")
    labels = ids.clone()
    labels[0, 3] = 61
    square = torch.ones(3, 1, 21, 21)
    for call, message in [
        (lambda: model(ids, output_attentions=True), "have no attention weights"),
        (lambda: model(ids, past_key_values=DynamicCache()), "past_key_values is a DynamicCache; .* a ModelState only"),
        (
            lambda: model(ids, attention_mask=square),
            r"attention_mask has shape \(3, 1, 21, 21\); it must be",
        ),
        (lambda: model(ids, attention_mask=ids), "attention_mask holds values other than 1"),
        (lambda: model(ids, labels=labels), "label 61 is outside the vocabulary of 61"),
        (lambda: model(ids + 61), r"outside the vocabulary of 61; .*model\.resize_token_embeddings"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
        with pytest.raises(ValueError, match=message):
            model.eval()
            call()
    for reads in (model, model.base_model):
        with pytest.raises(TypeError, match="has no argument position_bias"):
            reads(ids, position_bias=ids)
    assert model(ids, output_attentions=False).attentions is None


def test_transformers_takes_it_for_a_causal_language_model() -> None:
    """The Trainer decides by this list whether label smoothing shifts, and pipelines whether they know the model."""
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["nestling"] == NestlingForCausalLM.__name__
