"""PEFT by its ordinary recipes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from tests.compat.subjects import FEW, SUBJECTS, batch, subject
from tests.models.conftest import with_gains


@pytest.mark.parametrize("name", SUBJECTS)
def test_lora_learns_everywhere_generates_and_merges(name: str) -> None:
    ids = batch(2, 21)
    expected = with_gains(subject(name))(ids, labels=ids).loss
    model = get_peft_model(
        with_gains(subject(name)), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    out = model(input_ids=ids, labels=ids, output_hidden_states=True)
    torch.testing.assert_close(out.loss, expected)
    assert len(out.hidden_states) == len(model.get_base_model().blocks) + 1
    out.loss.backward()
    adapters = {k: p for k, p in model.named_parameters() if "lora_B" in k}
    assert adapters
    assert not [k for k, p in adapters.items() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        for p in adapters.values():
            p.normal_(std=0.1)
        adapted = model(input_ids=ids).logits
        assert not torch.allclose(adapted, out.logits)
        hidden = model.get_base_model().base_model(ids).last_hidden_state
        torch.testing.assert_close(hidden, model(input_ids=ids, output_hidden_states=True).hidden_states[-1])
        if name in FEW:
            options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            written = [model.generate(input_ids=ids, use_cache=use, **options) for use in (True, False)]
            assert torch.equal(*written)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, adapted, rtol=1e-3, atol=1e-3)


def test_prompt_tuning_learns_and_generates() -> None:
    ids = batch(2, 21)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_attention_heads": 2}
    model = get_peft_model(subject("hope"), PromptTuningConfig(**settings))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).shape[1] > 21


def test_prefix_tuning_is_refused() -> None:
    """It brings keys and values, and a memory's state is something else."""
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_attention_heads": 2}
    model = get_peft_model(subject("hope"), PrefixTuningConfig(**settings))
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache; this model goes on from a ModelState"):
        model(input_ids=batch(2, 21))
