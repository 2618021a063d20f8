from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling import NestlingForCausalLM, presets
from nestling.models import ModelState
from tests.models.conftest import LOOPED, with_gains

Make = Callable[..., NestlingForCausalLM]


def assert_same_state(a: ModelState, b: ModelState) -> None:
    for (name, left), (_, right) in zip(a.tensors(), b.tensors(), strict=True):
        torch.testing.assert_close(left, right, msg=lambda m, name=name: f"{name}: {m}")


def gradients(model: NestlingForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    names, leaves = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_at_initialisation_is_ln_vocabulary(preset: str, tied: bool) -> None:
    model = NestlingForCausalLM(presets.PRESETS[preset]("tiny", tie_word_embeddings=tied))
    ids = torch.randint(3, 259, (2, 96))
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
        repeated = float(model(ids[:, :1].expand(2, 96), labels=ids).loss)
    assert loss == pytest.approx(math.log(259), rel=0.05)
    assert repeated == pytest.approx(math.log(259), rel=0.05)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_at_initialisation_at_a_large_width(tied: bool) -> None:
    config = presets.transformer("1.3b", num_layers=1, vocab_size=259, intermediate_size=64, tie_word_embeddings=tied)
    ids = torch.randint(3, 259, (1, 64))
    with torch.no_grad():
        loss = float(NestlingForCausalLM(config)(ids, labels=ids).loss)
    assert loss == pytest.approx(math.log(259), rel=0.05)


@LOOPED
def test_every_parameter_gets_a_gradient(make: Make, ids: Tensor) -> None:
    model = with_gains(make())
    for name, gradient in gradients(model, model(ids, labels=ids).loss).items():
        assert bool(torch.isfinite(gradient).all()), name
        assert float(gradient.abs().max()) > 0, name


def test_train_equals_eval(make: Make, ids: Tensor) -> None:
    model = make()
    with torch.no_grad():
        trained, evaluated = model.train()(ids).logits, model.eval()(ids).logits
    assert torch.equal(trained, evaluated)


@LOOPED
@pytest.mark.parametrize("sizes", [[1] * 21, [5, 8, 8], [3, 17, 1]], ids=str)
def test_one_call_equals_any_split(model: NestlingForCausalLM, ids: Tensor, sizes: list[int]) -> None:
    with torch.no_grad():
        whole = model(ids)
        state, logits = None, []
        for part in ids.split(sizes, 1):
            out = model(part, past_key_values=state)
            state = out.past_key_values
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits)
    assert_same_state(state, whole.past_key_values)
    assert state.position.tolist() == [21] * 3


@LOOPED
def test_init_state_is_the_state_before_the_first_token(model: NestlingForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        a, b = model(ids), model(ids, past_key_values=model.init_state(3))
    torch.testing.assert_close(a.logits, b.logits)
    assert_same_state(a.past_key_values, b.past_key_values)


@LOOPED
def test_causal_and_rows_apart(model: NestlingForCausalLM, ids: Tensor) -> None:
    other = ids.clone()
    other[0, 10:] = (other[0, 10:] + 7) % 61
    with torch.no_grad():
        a, b = model(ids).logits, model(other).logits
    torch.testing.assert_close(a[0, :10], b[0, :10])
    torch.testing.assert_close(a[1:], b[1:])
    assert not torch.allclose(a[0, 10], b[0, 10])


@LOOPED
def test_padded_equals_unpadded(model: NestlingForCausalLM, ids: Tensor) -> None:
    lengths, time = (21, 6, 13), ids.shape[1]
    texts = [row[None, :n] for row, n in zip(ids, lengths, strict=True)]
    alone = [model(text, labels=text) for text in texts]
    terms = [out.loss * (n - 1) for out, n in zip(alone, lengths, strict=True)]
    loss = sum(terms, torch.zeros(())) / (sum(lengths) - 3)
    wanted = gradients(model, loss)
    for side in ("left", "right", "holes"):
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, n in enumerate(lengths):
            slots = {"left": range(time - n, time), "right": range(n), "holes": torch.randperm(time)[:n].tolist()}[side]
            mask[row, list(slots)] = True
            padded[row, mask[row]] = texts[row][0]
        out = model(padded, attention_mask=mask.long(), labels=padded)
        for row, expected in enumerate(alone):
            torch.testing.assert_close(
                out.logits[row, mask[row]], expected.logits[0], msg=lambda m, s=side: f"{s}: {m}"
            )
        assert out.past_key_values.position.tolist() == list(lengths)
        torch.testing.assert_close(out.loss, loss)
        assert_same_gradients(gradients(model, out.loss), wanted)


@LOOPED
def test_packed_documents_equal_separate_ones(model: NestlingForCausalLM, ids: Tensor) -> None:
    bounds = [0, 9, 10, 21]
    row = ids[:1]
    packed = model(row, cu_seqlens=torch.tensor(bounds), labels=row)
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for a, b in itertools.pairwise(bounds):
        alone = model(row[:, a:b], labels=row[:, a:b])
        torch.testing.assert_close(packed.logits[:, a:b], alone.logits)
        total, targets = total + alone.loss * (b - a - 1), targets + b - a - 1
    torch.testing.assert_close(packed.loss, total / targets)
    assert_same_gradients(gradients(model, packed.loss), gradients(model, total / targets))
    assert packed.past_key_values.position.tolist() == [9, 1, 11]
    again = model(row, cu_seqlens=torch.tensor(bounds), past_key_values=packed.past_key_values)
    alone = model(torch.cat((row[:, :9], row[:, :9]), 1))
    torch.testing.assert_close(again.logits[:, :9], alone.logits[:, 9:])


def test_loss_is_the_shifted_cross_entropy(model: NestlingForCausalLM, ids: Tensor) -> None:
    labels = ids.clone()
    labels[0, 4:9] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(out.loss, expected / (3 * 20 - 5))
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, expected / 7)
    assert model(ids, labels=torch.full_like(ids, -100)).loss.item() == 0


def test_loss_in_chunks_is_the_same_and_keeps_no_logits(model: NestlingForCausalLM, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole = model(ids, labels=ids, attention_mask=mask)
    model.config.loss_chunk_size = 10
    parts = model(ids, labels=ids, attention_mask=mask)
    torch.testing.assert_close(parts.loss, whole.loss)
    assert_same_gradients(gradients(model, parts.loss), gradients(model, whole.loss))
    assert parts.logits is None
    torch.testing.assert_close(model(ids, labels=ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_logits_to_keep(model: NestlingForCausalLM, ids: Tensor) -> None:
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])
    with_loss = model(ids, labels=ids, logits_to_keep=3)
    torch.testing.assert_close(with_loss.logits, full[:, -3:])
    torch.testing.assert_close(with_loss.loss, model(ids, labels=ids).loss)


@LOOPED
def test_gradient_checkpointing_changes_nothing(model: NestlingForCausalLM, ids: Tensor) -> None:
    def run() -> tuple[Tensor, dict[str, Tensor]]:
        first = model(ids[:, :10], labels=ids[:, :10])
        second = model(ids[:, 10:], labels=ids[:, 10:], past_key_values=first.past_key_values)
        loss = first.loss + second.loss
        return loss, gradients(model, loss)

    model.train()
    loss, expected = run()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the older name warns
    calls = []
    recompute = model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda *args: (calls.append(args), recompute(*args))[1]
    again, found = run()
    assert len(calls) == 2 * model.config.loops * len(model.blocks)
    torch.testing.assert_close(again, loss)
    assert_same_gradients(found, expected)


@LOOPED
def test_inputs_embeds_and_plain_tuples(model: NestlingForCausalLM, ids: Tensor) -> None:
    out = model(ids, labels=ids)
    torch.testing.assert_close(model(inputs_embeds=model.embed_tokens(ids)).logits, out.logits)
    loss, logits, state = model(ids, labels=ids, return_dict=False)
    torch.testing.assert_close((loss, logits), (out.loss, out.logits))
    assert isinstance(state, ModelState)
    assert len(model(ids, use_cache=False, return_dict=False)) == 1


@LOOPED
def test_autocast_stays_close(make: Make, ids: Tensor) -> None:
    model = make()
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact, rtol=0.05, atol=0.05)
    assert out.past_key_values.first_nonfinite() is None
    out.loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_half_precision_weights_run(make: Make, ids: Tensor) -> None:
    model = make().bfloat16()
    out = model(ids, labels=ids)
    again = model(ids, past_key_values=out.past_key_values)
    assert bool(torch.isfinite(out.loss))
    assert bool(torch.isfinite(again.logits).all())


@LOOPED
def test_states_are_independent(model: NestlingForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        state = model(ids).past_key_values
        kept, fork = state.clone(), state.select([1, 1, 2])
        model(ids, past_key_values=state)
        for _, tensor in fork.tensors():
            tensor.zero_()
        assert_same_state(state, kept)
        a = model(ids[1:2], past_key_values=kept.select([1])).logits
        b = model(ids, past_key_values=kept).logits
    torch.testing.assert_close(a, b[1:2])


@pytest.mark.any_shapes
def test_bad_inputs_are_refused(model: NestlingForCausalLM, ids: Tensor) -> None:
    state = model.init_state(2)
    for call, message in [
        (lambda: model(), "exactly one of input_ids and inputs_embeds"),
        (lambda: model(ids, inputs_embeds=model.embed_tokens(ids)), "exactly one"),
        (lambda: model(ids[:, :0]), "at least one token"),
        (lambda: model(ids[0]), r"must be \(batch, time\)"),
        (lambda: model(ids + 61), "outside the vocabulary of 61"),
        (lambda: model(ids, labels=ids[:, 1:]), "labels have shape"),
        (lambda: model(ids, attention_mask=torch.ones(3, 4)), "mask has shape"),
        (lambda: model(ids, past_key_values=state), "state has 2 rows and the input 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@LOOPED
def test_fingerprint_follows_the_weights(make: Make) -> None:
    model, same = make(), make()
    assert model.fingerprint() == same.fingerprint()
    assert len(model.fingerprint()) == 16
    with torch.no_grad():
        next(model.blocks[1].mixer.parameters()).mul_(1.01)
    assert model.fingerprint() != same.fingerprint()
    assert make(num_layers=1).fingerprint() != same.fingerprint()
