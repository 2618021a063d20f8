"""Self-modifying Titans token by token (NL Eq. 83-93), to be read beside the paper; the yardstick of the fast layer.

Every token is a loop step, every write is the rule of `nestling.ops.reference` on one weight, and every inner gradient
comes from `torch.autograd.grad` of `inner_loss`, differentiable itself so that outer gradients pass through the writes.
Only parameters are taken from the layer, none of its functions.

Where this goes beyond the letter of the paper, as the layer does:

- Gradients, keys, values, gates and targets come from the weights at the start of the memory's chunk (Eq. 90). A token
  reads its own weights unless `read="chunk"`.
- The clip bounds every coordinate of the gradient at every weight's output while it passes backwards, so a layer below
  receives the clipped gradient of the layer above. With `gradient="online"` the output weight's target is clipped
  instead, which keeps that gradient linear in the weight.
- Weights after the first have inputs h of any length; their rates are divided by max(1, |h|^2).
- In a layer of MLP memories the gates' memories move like first weights: chunk gradients, the first share.
- With `anchored` a weight is W_0 + F, and what the rule keeps, erases and adds to is F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.self_modifying import LENGTH_SPEED, SelfModifyingState, SelfModifyingTitans
from nestling.memory.bank import BankState, MemoryBank
from nestling.memory.objective import inner_loss
from nestling.memory.rule import Rule

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@dataclass
class Memory:
    """One memory of every row and head; a list entry per layer, `[N, H, out, in]`.

    `start` and `running` are whole weights; `base` is the W_0 to which they fade, or zeros.
    """

    start: list[Tensor]
    running: list[Tensor]
    surprise: list[Tensor]
    base: list[Tensor]
    chunk: int
    activation: Callable[[Tensor], Tensor]
    gain: Tensor | float = 1.0
    learns_whole: bool = False

    def generating(self) -> list[Tensor]:
        """W_0 + gain F at the chunk's start."""
        return [base + self.gain * (start - base) for base, start in zip(self.base, self.start, strict=True)]

    def learning(self) -> list[Tensor]:
        """The weights whose gradients are taken: of M_memory W_0 + F."""
        return self.start if self.learns_whole else self.generating()

    def __call__(self, weights: list[Tensor], x: Tensor) -> Tensor:
        """M(x) = W x, or x + W_L act(... act(W_1 x)) (Eq. 89), for x `[N, H, K]`."""
        return self.trace(weights, x)[2]

    def trace(self, weights: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Inputs and outputs of every weight, and M(x)."""
        inputs, outputs = [], []
        h = x
        for layer, weight in enumerate(weights):
            if layer > 0:
                h = self.activation(outputs[-1])
            inputs.append(h)
            outputs.append((weight @ h[..., None])[..., 0])
        return inputs, outputs, outputs[-1] + x if len(weights) > 1 else outputs[-1]


@dataclass
class Gates:
    """Rates of one token, `[N, H]`; `e` and `lr` per layer."""

    a: Tensor
    e: list[Tensor]
    lr: list[Tensor]
    b: Tensor

    def shared(self, layer: SelfModifyingTitans) -> Gates:
        """The rates of the memories other than M_memory."""
        if layer.others is None:
            return self
        share = torch.sigmoid(layer.others)
        fading = 1 - share * (self.e[-1] + self.lr[-1]) / 2
        return Gates(self.a * fading, [share * e for e in self.e], [share * lr for lr in self.lr], self.b)


def reference(layer: SelfModifyingTitans, x: Tensor) -> tuple[Tensor, dict[str, Memory]]:
    """The layer's output for rows `[N, T, hidden]` that start fresh, and all its memories after the last token."""
    c = layer.config
    memories = initial_memories(layer, len(x))
    u, b = project(layer, x)
    outputs = []
    for t in range(x.shape[1]):
        made = generate(memories, {role: stream[:, t] for role, stream in u.items()})
        q = u["q"][:, t] if "q" not in c.adapt else normalize(made["q"])
        k, v = normalize(made["k"]), normalize(made["v"])
        gates = rates(layer, made["eta"], made.get("alpha"), b[:, t])
        before = list(memories["memory"].running)
        for name, memory in memories.items():
            if name not in c.adapt:
                continue
            target = memory(memory.generating(), v) if c.self_targets else v
            if name == "memory" and layer.length is not None:
                target = torch.exp(LENGTH_SPEED * layer.length)[:, None] * target
            if name in ("eta", "alpha") and not c.self_targets:
                target = v.mean(-1, keepdim=True)
            is_gate_of_mlp = c.memory == "mlp" and name in ("eta", "alpha")
            own = gates if name == "memory" else gates.shared(layer)
            write(c, memory, k, target, own, online=c.gradient == "online" and not is_gate_of_mlp)
        memory = memories["memory"]
        at = memory.start if c.read == "chunk" else before if c.read_before else memory.running
        outputs.append(memory(at, q))
        for memory in memories.values():
            if (t + 1) % memory.chunk == 0:
                memory.start = list(memory.running)
    return finish(layer, x, torch.stack(outputs, dim=1)), memories


def project(layer: SelfModifyingTitans, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What each memory reads, by role, and q = x W_q, `[N, T, H, K]` after the causal convolution, SiLU and
    normalisation; b `[N, T, H]`.
    """
    c = layer.config
    streams = x @ layer.in_proj.weight.mT
    width = layer.conv.shape[1]
    mixed = torch.zeros_like(streams)
    for t in range(x.shape[1]):
        for back in range(min(width, t + 1)):
            mixed[:, t] = mixed[:, t] + layer.conv[:, width - 1 - back] * streams[:, t - back]
    parts = [normalize(p.unflatten(-1, (c.num_heads, -1))) for p in F.silu(mixed).split(c.hidden_size, -1)]
    if c.own_streams:
        q, k, v, gates = parts
    else:
        k = v = gates = parts[0]
        q = parts[-1]
    u = {"q": q, "k": k, "v": v, "eta": gates, "alpha": gates}
    if layer.momentum_proj is None:
        return u, x.new_zeros(*x.shape[:2], c.num_heads)
    return u, torch.sigmoid(layer.momentum_proj(x))


def normalize(x: Tensor) -> Tensor:
    """x / |x|, zero for a zero vector."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def generate(memories: dict[str, Memory], u: dict[str, Tensor]) -> dict[str, Tensor]:
    """k, v, eta, alpha (and q) of one token, each by its own memory (Eq. 83)."""
    return {name: m(m.generating(), u[name]) for name, m in memories.items() if name != "memory"}


def rates(layer: SelfModifyingTitans, eta: Tensor, alpha: Tensor | None, b: Tensor) -> Gates:
    """a_t, e_t, l_t of every layer and b_t in their stable ranges (the table in `SelfModifyingTitans`)."""
    c = layer.config
    size = (c.rate_stretch * (torch.sigmoid(eta[..., 0] + layer.eta_bias) - 0.5) + 0.5).clamp(0, 1)
    a = torch.ones_like(size)
    if alpha is not None:
        assert layer.alpha_bias is not None
        a = torch.sigmoid(alpha[..., 0] + layer.alpha_bias) ** (1 / 16)
    share = torch.sigmoid(layer.share)
    whole = a * c.max_erase * size
    if c.share_of == "rate":
        e, steps = (1 - share[-1]) * whole, [s * whole for s in share]
    elif c.gradient == "online" and c.objective == "l2":
        e = whole / (1 + share[-1]) if c.erase else torch.zeros_like(size)
        steps = [s * (e if c.erase else whole) for s in share]
        if not c.erase:
            steps[-1] = whole
    elif c.erase:
        full = c.max_erase * size
        e = a * full
        steps = [s * a * torch.minimum(full, 2 - full) for s in share]
    else:
        e = torch.zeros_like(size)
        reach = torch.ones_like(a) if c.objective == "dot" else (1 - a).clamp_min(1 / c.outer_chunk)
        steps = [s * size * reach for s in share]
    kept = 1 - b
    if c.online:
        e, whole = (t * (1 - b**2) / (1 + b - b**2) for t in (e, whole))
        kept, b = (1 - b) ** 2 / (1 + b), a * b
    before_last = [e] * (c.layers - 1)
    if layer.hidden_erase is not None:
        before_last = [h * (whole if c.share_of == "rate" else e) for h in torch.sigmoid(layer.hidden_erase)]
    return Gates(a, [*before_last, e], [step * kept for step in steps], b)


def write(rule: Rule, memory: Memory, k: Tensor, target: Tensor, gates: Gates, online: bool) -> None:
    """One token's write to every weight W = W_0 + F: S = b S - l grad;  F = a F - e (F x) x^T + S (Eq. 88)."""
    gradients, inputs = inner_gradients(rule, memory, memory.learning(), k, target)
    if online:
        gradients[-1] = online_gradient(rule, memory.running, inputs, k, target)
    for layer, (gradient, x) in enumerate(zip(gradients, inputs, strict=True)):
        power = 1.0 if layer == 0 else x.square().sum(-1).clamp_min(1.0)
        e, lr = ((rate / power)[..., None, None] for rate in (gates.e[layer], gates.lr[layer]))
        base, column = memory.base[layer], x[..., None]
        weight = memory.running[layer] - base
        surprise = gates.b[..., None, None] * memory.surprise[layer] - lr * gradient
        memory.surprise[layer] = surprise
        kept = gates.a[..., None, None] * weight - e * (weight @ column) @ column.mT
        memory.running[layer] = base + kept + surprise


def inner_gradients(
    rule: Rule, memory: Memory, weights: list[Tensor], k: Tensor, target: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """dL/dW of every weight for a fixed key and target, by autograd, and every weight's input."""
    # Views of the weights: keys and targets are made from the weights too, but the inner problem holds them fixed.
    views = [weight.view_as(weight) for weight in weights]
    inputs, outputs, y = memory.trace(views, k)
    hidden = outputs[:-1]
    hooks = [z.register_hook(lambda g: g.clamp(-rule.clip, rule.clip)) for z in (*hidden, y)]
    gradients = torch.autograd.grad(inner_loss(rule, y, target).sum(), views, create_graph=True)
    for hook in hooks:
        hook.remove()  # the outer gradient, which passes here later, is not clipped
    return list(gradients), inputs


def online_gradient(rule: Rule, running: list[Tensor], inputs: list[Tensor], k: Tensor, target: Tensor) -> Tensor:
    """dL/dW of the output weight at the running weight, the hidden activations and the key held fixed."""
    view = running[-1].view_as(running[-1])
    y = (view @ inputs[-1][..., None])[..., 0] + (k if len(running) > 1 else 0)
    clipped = target.clamp(-rule.clip, rule.clip)
    return torch.autograd.grad(inner_loss(rule, y, clipped).sum(), view, create_graph=True)[0]


def finish(layer: SelfModifyingTitans, x: Tensor, o: Tensor) -> Tensor:
    """Norm per head, gate and output projection of o `[N, T, H, V]`."""
    o = o * (o.square().mean(-1, keepdim=True) + layer.config.norm_eps).rsqrt() * layer.out_norm
    o = o.flatten(-2)
    if layer.gate_proj is not None:
        o = o * F.silu(layer.gate_proj(x))
    return layer.out_proj(o)


def initial_memories(layer: SelfModifyingTitans, batch: int) -> dict[str, Memory]:
    """All memories, adaptive or not, at their meta-learned weights."""
    c = layer.config
    state = layer.init_state(batch)
    found = state_memories(layer, state)
    if layer.fixed is not None:
        fixed = layer.fixed(batch, False, state.conv.dtype)
        found |= bank_memories(layer.fixed, fixed, c.outer_chunk)
    return found


def state_memories(layer: SelfModifyingTitans, state: SelfModifyingState) -> dict[str, Memory]:
    """The layer's state, taken apart by memory."""
    found = bank_memories(layer.main, state.main, layer.config.chunk_size)
    if layer.own is not None:
        assert state.own is not None
        found |= bank_memories(layer.own, state.own, layer.config.outer_chunk)
    for name, memory in found.items():
        memory.learns_whole = name == "memory"
        if layer.gain is not None:
            memory.gain = layer.gain[:, None, None]
    return found


def bank_memories(bank: MemoryBank, state: BankState, chunk: int) -> dict[str, Memory]:
    """The memories of a bank. The only place that knows how a bank stacks its weights."""

    def unstack(weights: list[Tensor]) -> dict[str, list[Tensor]]:
        sizes = [bank.hidden] * len(bank.deep) + [1] * len(bank.gates)
        found = {n: [w] for n, w in zip(bank.deep + bank.gates, weights[0].split(sizes, dim=-2), strict=True)}
        for weight in weights[1:]:
            for name, own in zip(bank.deep, weight.unbind(2), strict=True):
                found[name].append(own)
        return found

    first = bank.base(state.start[0].dtype)
    empty = [torch.zeros_like(w) for w in state.running]
    anchor = empty if first is None else [w.expand_as(e) for w, e in zip(first, empty, strict=True)]
    start, running = ([a + w for a, w in zip(anchor, own, strict=True)] for own in (state.start, state.running))
    start, running, base = unstack(start), unstack(running), unstack(anchor)
    surprise = unstack(empty if state.surprise is None else state.surprise)
    activation = ACTIVATIONS[bank.activation]
    return {n: Memory(start[n], running[n], surprise[n], base[n], chunk, activation) for n in start}
