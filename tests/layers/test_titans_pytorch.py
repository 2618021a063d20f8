"""The inner update against `titans-pytorch`, an implementation that nobody here wrote.

Its conventions, and how they are matched. Its loss is a mean over channels: its step is 2 / D of ours. Its forgetting
and momentum belong to a chunk (a mean over its tokens), its learning rate to a token, and a surprise is taken at the
weights of the last "batch": its chunks of 1 in batches of b are our chunks of b with rates per token. Its MLP has no
residual: ours is M(k) = k + f(k), so it gets the value k + v. Our rates are divided by max(1, |h|^2) behind hidden
layers: hidden activations stay shorter than 1 here. Its queries read a memory one token older: reads are not compared.
"""

from __future__ import annotations

import pytest
import torch

from nestling.memory.bank import BankState, MemoryBank
from nestling.memory.lesson import Rates
from nestling.memory.rule import Rule
from nestling.ops.chunk_step import ChunkDecay
from tests.layers.battery import noise

titans = pytest.importorskip("titans_pytorch")
WIDTH, TIME, CHUNK = 6, 12, 4


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("momentum", [True, False])
def test_the_inner_update_is_that_of_titans_pytorch(depth: int, momentum: bool) -> None:
    torch.manual_seed(0)
    model = titans.MemoryMLP(WIDTH, depth, expansion_factor=2.0)
    other = titans.NeuralMemory(
        WIDTH, chunk_size=1, batch_size=CHUNK, model=model, momentum=momentum, pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
    ).double()  # fmt: skip
    x = 0.3 * noise(1, TIME, WIDTH)
    _, state = other(x)
    # Weights before the first token and after every one, [1, 1 + T, in, out] for each layer.
    wanted = [t[0, 1:].mT for t in state.updates.values()]
    momenta = [t[0, 0] for t in state.states[1].values()] if momentum else []

    bank = MemoryBank(("memory",), (), 1, WIDTH, depth, 2, "gelu").double()
    rule = Rule(erase=False, momentum=momentum, clip=1e6)
    k, v = other.to_keys(x)[:, None], other.to_values(x)[:, None]
    value = v if depth == 1 else v + k
    rate = torch.sigmoid(other.to_adaptive_step(x))[:, None] * 2 / WIDTH
    log_a = torch.nn.functional.logsigmoid(-other.to_decay_factor(x))[None, ..., 0]
    log_b = torch.nn.functional.logsigmoid(other.to_momentum(x))[0][None, ..., 0] if momentum else None
    first = [w.mT[None, None] for w in model.weights]
    weights = [w if i == 0 else w[:, :, None] for i, w in enumerate(first)]
    own = BankState(weights, list(weights), [torch.zeros_like(w) for w in weights] if momentum else None)
    for at in range(0, TIME, CHUNK):
        before = own
        for end in range(at + 1, at + CHUNK + 1):
            t = slice(at, end)
            decay = ChunkDecay(log_a[..., t], None if log_b is None else log_b[..., t])
            lesson = bank.lesson(rule, before.start, k[:, :, t], value[:, :, t], self_targets=False)
            assert all(bool((h.norm(dim=-1) < 1).all()) for h in lesson.inputs[1:])
            _, own = bank.update(rule, before, lesson, Rates(None, [rate[..., t]] * depth, decay), fresh=True)
            for layer in range(depth):
                found = own.running[layer].flatten(0, -3)[0]
                torch.testing.assert_close(found, wanted[layer][end - 1], rtol=1e-9, atol=1e-11)
        own = BankState(list(own.running), own.running, own.surprise)
    for layer, s in enumerate(momenta):
        assert own.surprise is not None
        torch.testing.assert_close(own.surprise[layer].flatten(0, -3)[0], s.mT, rtol=1e-9, atol=1e-11)
