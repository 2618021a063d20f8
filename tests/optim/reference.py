"""The equations, one parameter and one step at a time, written as in the paper and with nothing shared with
`nestling.optim`.

Each takes the parameter `w`, its gradient `g`, a dictionary that it keeps between steps (`t` counts them), the rate,
and what a `Call` tells of the layer; it returns the new parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Memory = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """What is known of a parameter's layer.

    Attributes:
        table: whether it is an embedding.
        x, dy: what a linear layer saw, row by row: inputs, and gradients of the mean loss at its outputs.
    """

    table: bool = False
    x: Tensor | None = None
    dy: Tensor | None = None


def _rows(g: Tensor) -> list[Tensor]:
    return [g.reshape(-1)] if g.dim() < 2 else [row.reshape(-1) for row in g]


def _matrix(g: Tensor) -> Tensor:
    return g.reshape(1, -1) if g.dim() < 2 else g.flatten(1)


def polar(x: Tensor, steps: int = 5) -> Tensor:
    """The singular values through Muon's quintic, by a singular value decomposition: no iteration on matrices."""
    if not x.numel():
        return x
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / max(float(x.norm()), 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def orthogonal(m: Tensor) -> Tensor:
    """0.2 sqrt(max(rows, cols)) times the factor, kernels flattened."""
    a = _matrix(m)
    return (0.2 * math.sqrt(max(a.shape)) * polar(a)).reshape(m.shape)


def momentum(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 47, P = I."""
    s["m"] = 0.9 * s.get("m", 0 * g) - lr * g
    return w + s["m"]


def adam(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Kingma and Ba 2014, Algorithm 1."""
    s["m"] = 0.9 * s.get("m", 0 * g) + 0.1 * g
    s["v"] = 0.999 * s.get("v", 0 * g) + 0.001 * g * g
    m, v = s["m"] / (1 - 0.9 ** s["t"]), s["v"] / (1 - 0.999 ** s["t"])
    return w - lr * m / (v.sqrt() + 1e-8)


def adam_inside(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 47 with Adam's diagonal for P."""
    s["v"] = 0.999 * s.get("v", 0 * g) + 0.001 * g * g
    p = 1 / ((s["v"] / (1 - 0.999 ** s["t"])).sqrt() + 1e-8)
    s["m"] = 0.9 * s.get("m", 0 * g) - lr * p * g
    return w + s["m"]


def adagrad_with_momentum(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 103 with P = sqrt(H), lambda = 0: H^(-1/2) M."""
    s["h"] = s.get("h", 0 * g) + g * g
    s["m"] = 0.9 * s.get("m", 0 * g) + g
    return w - lr * s["m"] / (s["h"].sqrt() + 1e-10)


def adamw_rest(w: Tensor, g: Tensor, s: Memory, lr: float) -> Tensor:
    """What vectors take beside a matrix step."""
    s["m"] = 0.9 * s.get("m", 0 * g) + 0.1 * g
    s["v"] = 0.95 * s.get("v", 0 * g) + 0.05 * g * g
    return w - lr * s["m"] / (1 - 0.9 ** s["t"]) / ((s["v"] / (1 - 0.95 ** s["t"])).sqrt() + 1e-8)


def orthogonal_momentum(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 42."""
    if g.dim() < 2 or call.table:
        return adamw_rest(w, g, s, lr)
    s["m"] = 0.9 * s.get("m", 0 * g) + g
    return w - lr * orthogonal(s["m"])


def sign(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """P = the sign."""
    return w - lr * g.sign()


def delta_momentum(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 49 for every row with the key of length 1: m (alpha I - k^T k) - lr g."""
    rows, olds = _rows(g), s.get("rows", [torch.zeros_like(r) for r in _rows(g)])
    news = []
    for row, old in zip(rows, olds, strict=True):
        k = row / row.norm() if row.norm() > 0 else row
        news.append(old @ (0.9 * torch.eye(len(k), dtype=k.dtype) - torch.outer(k, k)) - lr * row)
    s["rows"] = news
    return w + torch.stack(news).reshape(w.shape) if news and w.numel() else w


def delta_momentum_matrix(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 49 to the letter with g cut to Frobenius norm 1 in the factor."""
    a = _matrix(g)
    k = a / max(1.0, float(a.norm()))
    s["m"] = s.get("m", 0 * a) @ (0.9 * torch.eye(a.shape[1], dtype=a.dtype) - k.T @ k) - lr * a
    return w + s["m"].reshape(w.shape)


def _deep(w: Tensor, g: Tensor, s: Memory, objective: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """m(u) of Eq. 50 after one step of its own gradient descent, by autograd."""
    u = g.reshape(-1, 1) if g.dim() < 2 else g.flatten(1)
    if not u.numel():
        return g
    scale = u.square().mean().sqrt()
    u = u / scale
    if "b" not in s:
        drawn = torch.randn(32, u.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        s["b0"] = s["b"] = drawn.to(u) / math.sqrt(u.shape[1])
        s["a"] = u.new_zeros(u.shape[1], 32)
    a, b = s["a"].clone().requires_grad_(), s["b"].clone().requires_grad_()
    loss = torch.stack([objective(a @ torch.tanh(b @ row), row) for row in u]).mean() / 32
    da, db = torch.autograd.grad(loss, (a, b))
    s["a"] = 0.9 * s["a"] - da
    s["b"] = s["b0"] + 0.9 * (s["b"] - s["b0"]) - db
    return scale * torch.stack([row + s["a"] @ torch.tanh(s["b"] @ row) for row in u]).reshape(g.shape)


def deep_momentum(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 50 with the dot product."""
    return w - lr * _deep(w, g, s, lambda y, u: -(y @ u))


def deep_l2(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 52 with L2 regression and Newton-Schulz."""
    if g.dim() < 2 or call.table:
        return adamw_rest(w, g, s, lr)
    return w - lr * orthogonal(_deep(w, g, s, lambda y, u: 0.5 * (y - u).square().sum()))


def feature_momentum(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 51 with |g| p(g / |g|)."""
    a = _matrix(g)
    phi = (float(a.norm()) * polar(a, steps=1)).reshape(g.shape)
    s["m"] = 0.9 * s.get("m", 0 * g) - lr * phi
    return w + s["m"]


def delta_gradient_descent(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 56 for a mean over tokens: the normal equations by an inverse."""
    if call.x is None or call.dy is None:
        return w - lr * g
    n = len(call.x)
    eye = torch.eye(w.shape[1], dtype=w.dtype)
    surprises = -n * call.dy
    right = sum(torch.outer(u, x) for u, x in zip(surprises, call.x, strict=True)) / n + w / lr
    left = sum(torch.outer(x, x) for x in call.x) / n + eye / lr
    return right @ torch.linalg.inv(left)


def delta_step(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 57, averaged over tokens, with the mean squared length in lr'."""
    if call.x is None:
        return w - lr * g
    outer = sum(torch.outer(x, x) for x in call.x) / len(call.x)
    rate = lr / (1 + lr * float(sum(x @ x for x in call.x)) / len(call.x))
    return w @ (torch.eye(w.shape[1], dtype=w.dtype) - rate * outer) - rate * g


def generalized(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 59 with L2 and the squared distance: five steps down the gradient that is written out."""
    if call.x is None or call.dy is None:
        return w - lr * g
    n, start = len(call.x), w
    rate = lr / (1 + lr * float(call.x.square().sum()) / n)
    for _ in range(5):
        w = w - rate * ((w @ call.x.T + n * call.dy.T) @ call.x / n + (w - start) / lr)
    return w


def m3(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """The averaged form, with the gradients of a cycle kept in a list; frequency 3."""
    if g.dim() < 2 or call.table:
        return adamw_rest(w, g, s, lr)
    zero = torch.zeros_like(g)
    s["m1"] = 0.95 * s.get("m1", zero) + 0.05 * g
    s["v"] = 0.95 * s.get("v", zero) + 0.05 * g * g
    total = (orthogonal(s["m1"]) + 0.25 * s.get("o2", zero)) / 1.25
    divided = total / (s["v"].sqrt() + 0.1 * s["v"].mean().sqrt())
    s.setdefault("cycle", []).append(g)
    if len(s["cycle"]) == 3:
        s["m2"] = 0.9 * s.get("m2", zero) + 0.1 * torch.stack(s.pop("cycle")).mean(0)
        s["o2"] = orthogonal(s["m2"])
    return w - lr * divided * total.norm() / divided.norm()


def m3_algorithm(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Algorithm 1, line by line; frequency 3."""
    if g.dim() < 2 or call.table:
        return adamw_rest(w, g, s, lr)
    zero = torch.zeros_like(g)
    gradients = s.setdefault("gradients", [])
    if len(gradients) % 3 == 0:
        s["m2"] = s.get("m2", zero) + 0.9 * sum(gradients[-3:], zero)
        s["o2"] = polar(_matrix(s["m2"])).reshape(g.shape)
    gradients.append(g)
    s["m1"] = s.get("m1", zero) + 0.95 * g
    s["v"] = s.get("v", zero) + 0.95 * g * g
    o1 = polar(_matrix(s["m1"])).reshape(g.shape)
    return w - lr * (o1 + 0.25 * s["o2"]) / (s["v"].sqrt() + 1e-8)


def _short_first(m: Tensor) -> Tensor:
    a = _matrix(m)
    return a.T if a.shape[0] > a.shape[1] else a


def _as(y: Tensor, like: Tensor) -> Tensor:
    a = _matrix(like)
    return (y.T if a.shape[0] > a.shape[1] else y).reshape(like.shape)


def full_matrix_adagrad(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 111: H^(-1/2) g on the shorter side, by a singular value decomposition; vectors by the diagonal."""
    if g.dim() < 2 or call.table or not g.numel():
        s["h"] = s.get("h", 0 * g) + g * g
        return w - lr * g / (s["h"].sqrt() + 1e-10)
    a = _short_first(g)
    s["h"] = s.get("h", 0) + sum(torch.outer(column, column) for column in a.T)
    u, h, _ = torch.linalg.svd(s["h"])
    root = u @ torch.diag(torch.where(h > 1e-14 * h[0], 1 / h.sqrt(), 0)) @ u.T
    return w - lr * _as(root @ a, g)


def learned_preconditioner(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 41 on 1/2 mean |P g|^2 - log det P in the metric of P, and Eq. 47."""
    if g.dim() < 2 or call.table:
        return adamw_rest(w, g, s, lr)
    if not g.numel():
        return w
    a = _short_first(g)
    d, n = a.shape
    p = s.get("p", torch.eye(d, dtype=g.dtype) / a.square().mean().sqrt())
    c = sum(torch.outer(column, column) for column in a.T) / n
    c = c + 1e-4 * torch.trace(c) / d * torch.eye(d, dtype=g.dtype)
    # No entry of P g beyond 1 / sqrt(0.1) on average, and no step that turns an eigenvalue's sign.
    p = p * min(1.0, float(d / (0.1 * torch.trace(p @ c @ p)))) ** 0.5
    eigenvalues = torch.linalg.eigvalsh(p @ c @ p)
    step = 0.1 / max(1.0, 0.1 * float((eigenvalues**4).sum() ** 0.25))
    r = torch.eye(d, dtype=g.dtype) - step / 2 * (p @ c @ p - torch.eye(d, dtype=g.dtype))
    p = r @ p @ r
    s["p"] = p * min(1.0, 1 / math.sqrt(0.1 * float((p @ a).square().mean())))
    s["m"] = 0.9 * s.get("m", 0 * g) + 0.1 * _as(s["p"] @ a, g)
    return w - lr * s["m"]


def learned_map(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 41 on Eq. 43, by its gradient written out, and Eq. 42 with the map in Newton-Schulz's place."""
    if g.dim() < 2 or call.table:
        return adamw_rest(w, g, s, lr)
    if not g.numel():
        return w
    a = _short_first(g)
    d, n = a.shape
    eye = torch.eye(d, dtype=g.dtype)
    u = a / a.square().mean().sqrt()
    p = s.get("p", eye)
    y = p @ u
    slope = (y @ y.T / n - eye) @ y @ u.T / n
    step = 0.1 * slope / float((torch.linalg.eigvalsh(u @ u.T / n) ** 4).sum() ** 0.25)
    s["p"] = p - step * min(1.0, 0.1 * float(p.norm() / step.norm()))
    s["m"] = 0.9 * s.get("m", 0 * g) + g
    return w - lr * _as(s["p"] @ _short_first(s["m"]), g)


def learned_features(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 51 with c learned by Eq. 41 on Eq. 43, on singular values, T_k(x) = cos(k arccos x)."""
    if not g.numel():
        return w
    u, values, v = torch.linalg.svd(_matrix(g), full_matrices=False)
    r = (values**4).sum() ** 0.25
    basis = torch.stack([torch.cos(k * torch.arccos((values / r).clamp(max=1))) for k in (1, 3, 5)])
    c = s.get("c", torch.tensor([1.0, 0.0, 0.0], dtype=g.dtype)).requires_grad_()
    (slope,) = torch.autograd.grad(0.25 * ((c @ basis) ** 2 - 1).square().mean(), c)
    c = c.detach()
    s["c"] = c - 0.5 * slope / (basis.square().sum() / len(values) * (1 + 3 * c.abs().sum() ** 2))
    s["m"] = 0.9 * s.get("m", 0 * g) - lr * (u @ torch.diag(r * (s["c"] @ basis)) @ v).reshape(g.shape)
    return w + s["m"]


def generalized_momentum(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Definition 5 for the momentum with L2 and the squared distance to 0.9 times each of the last four: closed."""
    past = s.setdefault("past", [0 * g])
    near = 0.9 * torch.stack(past[-4:]).mean(0)
    rows = []
    for m, row in zip(_rows(near), _rows(g), strict=True):
        k = row / row.norm() if row.norm() > 0 else row
        rows.append(m + 0.5 * (row.norm() - m @ k) * k)
    past.append(torch.stack(rows).reshape(g.shape) if rows and g.numel() else g)
    return w - lr * past[-1]


def generalized_window(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 59 with L2 and the squared distance to each of the last three weights: five steps, written out."""
    past = s.setdefault("past", [])
    past.append(w)
    near = torch.stack(past[-3:]).mean(0)
    if call.x is None or call.dy is None:
        return near - lr * g
    n, w = len(call.x), near
    rate = lr / (1 + lr * float(call.x.square().sum()) / n)
    for _ in range(5):
        w = w - rate * ((w @ call.x.T + n * call.dy.T) @ call.x / n + (w - near) / lr)
    return w


def oja(w: Tensor, g: Tensor, s: Memory, lr: float, call: Call) -> Tensor:
    """Eq. 66-67 with u for the value, as the minimiser for a mean over tokens: the normal equations by an inverse."""
    if call.x is None or call.dy is None:
        return w - lr * g
    surprises = -len(call.x) * call.dy
    right = sum(torch.outer(u, x) for u, x in zip(surprises, call.x, strict=True)) / len(call.x) + w / lr
    left = sum(torch.outer(u, u) for u in surprises) / len(call.x) + torch.eye(len(w), dtype=w.dtype) / lr
    return torch.linalg.inv(left) @ right
