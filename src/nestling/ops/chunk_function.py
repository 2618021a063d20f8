"""The closed form of `ops.chunk_rule` as one autograd function with its backward written by hand.

Autograd over the composed form spends most of its time on small elementwise kernels, on zero-fills for slices and on
memory it keeps; this function keeps the inputs and three products, and works in place.

Shapes: a layer of M memories in H heads, inputs `[N, H, M, C, K]`, weights `[N, H, M, V, K]`, rates `[N, H, M, C]`,
decay products `[N, H, C, C]` and `[N, H, C]`. A query reads the first `rows` outputs of the first memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nestling.ops.chunk_rule import Decay


def chunk_update(
    x: Tensor,
    step: Tensor,
    erase: Tensor | None,
    decay: Decay,
    weight: Tensor,
    surprise: Tensor | None = None,
    recalled: Tensor | None = None,
    q: Tensor | None = None,
    rows: int = 0,
    read_before: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`chunk_writes`, `chunk_read` and `chunk_advance` of one chunk.

    Args:
        x: `[N, H, M, C, K]` inputs of the weights.
        step: `[N, H, M, C, V]` l_t g_t.
        erase: `[N, H, M, C]` e_t, or None.
        decay: products of the chunk, without a memory dimension.
        weight: `[N, H, M, V, K]` W_0.
        surprise: S_0, exactly when `decay` has momentum.
        recalled: X W_0^T if at hand.
        q: `[N, H, C, K]` queries of the first memory's first `rows` outputs, or None.
        rows: see q.
        read_before: read W_{t-1} in place of W_t.

    Returns:
        y `[N, H, C, rows]` (None without q), W_C, S_C (None without momentum).
    """
    y, weight, surprise = _ChunkUpdate.apply(
        x, step, erase, weight, surprise, recalled, q, decay.inner, decay.start, decay.inner_momentum,
        decay.start_momentum, decay.last_momentum, decay.last_start_momentum, rows, read_before,
    )  # fmt: skip
    return y, weight, surprise


def _strict(decay: Tensor, gram: Tensor) -> Tensor:
    """sh(decay) * gram; the shift makes it strictly lower triangular."""
    out = torch.empty_like(gram)
    torch.mul(decay.unsqueeze(2)[..., :-1, :], gram[..., 1:, :], out=out[..., 1:, :])
    out[..., 0, :] = 0
    return out


def _shifted(decay: Tensor, first: float) -> Tensor:
    """sh(.) of the last dimension, with a memory and a value dimension added."""
    return torch.nn.functional.pad(decay[..., :-1], (1, 0), value=first)[:, :, None, :, None]


class _ChunkUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, step, erase, weight, surprise, recalled, q, a, a0, d, d0, b_last, b0_last, rows, before):  # type: ignore[no-untyped-def]
        has_recalled = recalled is not None
        system = erased = steps_in = kept = None
        if erase is not None:
            e = erase.unsqueeze(-1)
            gram = x @ x.mT
            system = _strict(a, gram)
            if d is not None:
                steps_in = _strict(d, gram)
            del gram
            if recalled is None:
                recalled = x @ weight.mT
            kept = recalled * _shifted(a0, 1.0)
            if d is None:
                right = torch.addcmul(step, kept, e)
            else:
                kept.addcmul_(x @ surprise.mT, _shifted(d0, 0.0)).sub_(steps_in @ step)
                right = kept * e
            erased = torch.linalg.solve_triangular(system * e, right, upper=False, unitriangular=True)
        writes = _pairs(a, d, step, erased)

        y = match = None
        if q is not None:
            x0, w0 = x[:, :, 0], weight[:, :, 0, :rows]
            match = q @ x0.mT
            y = (q @ w0.mT) * _start(a0, before, 1.0)
            if d is not None:
                y.addcmul_(q @ surprise[:, :, 0, :rows].mT, _start(d0, before, 0.0))
            for factor, z in writes:
                y -= _read_factor(factor, match, before) @ z[:, :, 0, :, :rows]

        new = weight * a0[:, :, None, -1, None, None]
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for factor, z in writes:
            total = torch.addcmul(total, z, _last(factor))
        pushed = after = None
        if d is not None:
            new.addcmul_(surprise, d0[:, :, None, -1, None, None])
            pushed = step * b_last[:, :, None, :, None]
            after = (surprise * b0_last[:, :, None, None, None]).sub_(pushed.mT @ x)
        new -= total.mT @ x
        ctx.save_for_backward(
            x, step, erase, weight, surprise, recalled, q, a, a0, d, d0, b_last, b0_last, system, steps_in, kept, erased,
            match, total, pushed,
        )  # fmt: skip
        ctx.rows, ctx.before, ctx.has_recalled = rows, before, has_recalled
        ctx.set_materialize_grads(False)
        return y, new, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy, gw, gs):  # type: ignore[no-untyped-def]
        (
            x, step, erase, weight, surprise, recalled, q, a, a0, d, d0, b_last, b0_last, system, steps_in, kept, erased,
            match, total, pushed,
        ) = ctx.saved_tensors  # fmt: skip
        rows, before = ctx.rows, ctx.before
        writes = _pairs(a, d, step, erased)
        grad_z = [None] * len(writes)
        grad_f = [torch.zeros_like(factor) for factor, _ in writes]
        ga0 = torch.zeros_like(a0)
        gd0 = gbl = gb0 = None
        if d is not None:
            gd0, gbl, gb0 = torch.zeros_like(d0), torch.zeros_like(b_last), torch.zeros_like(b0_last)
        gx = gweight = gsurprise = gq = grecalled = gerase = None

        if gw is not None:
            gtotal = (x @ gw.mT).neg_()
            gx = (total @ gw).neg_()
            gweight = gw * a0[:, :, None, -1, None, None]
            ga0[..., -1] += (gw * weight).sum((2, 3, 4))
            if d is not None:
                gsurprise = gw * d0[:, :, None, -1, None, None]
                gd0[..., -1] += (gw * surprise).sum((2, 3, 4))
            for i, (factor, z) in enumerate(writes):
                grad_z[i] = gtotal * _last(factor)
                grad_f[i][..., -1, :] += (gtotal * z).sum((2, 4))
        if gs is not None:
            gpushed = (x @ gs.mT).neg_()
            gx = _add(gx, (pushed @ gs).neg_())
            gsurprise = _add(gsurprise, gs * b0_last[:, :, None, None, None])
            gb0 += (gs * surprise).sum((2, 3, 4))
            gbl += (gpushed * step).sum((2, 4))
            gpushed *= b_last[:, :, None, :, None]
            grad_z[0] = _add(grad_z[0], gpushed)
        if gx is None:
            gx = torch.zeros_like(x)
        grad_z = [torch.zeros_like(z) if g is None else g for g, (_, z) in zip(grad_z, writes, strict=True)]
        gweight = torch.zeros_like(weight) if gweight is None else gweight
        if d is not None and gsurprise is None:
            gsurprise = torch.zeros_like(surprise)

        if gy is not None:
            x0, w0 = x[:, :, 0], weight[:, :, 0, :rows]
            gmatch = torch.zeros_like(match)
            for i, (factor, z) in enumerate(writes):
                grad_z[i][:, :, 0, :, :rows] -= _read_factor(factor, match, before).mT @ gy
                pair = gy @ z[:, :, 0, :, :rows].mT
                to_match = _read_factor(factor, pair, before)
                gmatch -= to_match
                pair *= match
                if before:
                    grad_f[i][..., :-1, :] -= pair[..., 1:, :]
                else:
                    grad_f[i] -= pair
            gq = gmatch @ x0
            gx[:, :, 0] += gmatch.mT @ q
            _start_grad(ga0, (gy * (q @ w0.mT)).sum(-1), before)
            gread = gy * _start(a0, before, 1.0)
            gq += gread @ w0
            gweight[:, :, 0, :rows] += gread.mT @ q
            if d is not None:
                s0 = surprise[:, :, 0, :rows]
                _start_grad(gd0, (gy * (q @ s0.mT)).sum(-1), before)
                gread = gy * _start(d0, before, 0.0)
                gq += gread @ s0
                gsurprise[:, :, 0, :rows] += gread.mT @ q

        if erase is not None:
            e = erase.unsqueeze(-1)
            grhs = torch.linalg.solve_triangular((system * e).mT, grad_z[-1], upper=True, unitriangular=True)
            gsystem = (grhs @ erased.mT).neg_()
            gerase = (gsystem * system).sum(-1)
            gsystem *= e
            if d is None:
                grad_z[-1] = grhs
            gerase += (grhs * kept).sum(-1)
            gkept = grhs * e
            ga0[..., :-1] += (gkept * recalled).sum(-1)[..., 1:].sum(2)
            if d is not None:
                gsteps = (gkept @ step.mT).neg_()
                grad_z[0] -= steps_in.mT @ gkept
                gd0[..., :-1] += (gkept * (x @ surprise.mT)).sum(-1)[..., 1:].sum(2)
                gsx = gkept * _shifted(d0, 0.0)
                gx += gsx @ surprise
                gsurprise += gsx.mT @ x
            gkept *= _shifted(a0, 1.0)
            if ctx.has_recalled:
                grecalled = gkept
            else:
                gx += gkept @ weight
                gweight += gkept.mT @ x
            gram = x @ x.mT
            grad_f[-1][..., :-1, :] += (gsystem * gram).sum(2)[..., 1:, :]
            ggram = _strict(a, gsystem)
            if d is not None:
                grad_f[0][..., :-1, :] += gram.mul_(gsteps).sum(2)[..., 1:, :]
                ggram += _strict(d, gsteps)
            gx += (ggram + ggram.mT) @ x

        ga = grad_f[-1] if (d is None or erase is not None) else None
        gd = grad_f[0] if d is not None else None
        return gx, grad_z[0], gerase, gweight, gsurprise, grecalled, gq, ga, ga0, gd, gd0, gbl, gb0, None, None


def _pairs(a: Tensor, d: Tensor | None, step: Tensor, erased: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(decay factor, what is written): the steps first when momentum keeps them apart, what is erased last."""
    if d is None:
        return [(a, step if erased is None else erased)]
    return [(d, step)] if erased is None else [(d, step), (a, erased)]


def _last(factor: Tensor) -> Tensor:
    return factor[:, :, None, -1, :, None]


def _start(start: Tensor, before: bool, first: float) -> Tensor:
    return torch.nn.functional.pad(start[..., :-1], (1, 0), value=first).unsqueeze(-1) if before else start.unsqueeze(-1)


def _start_grad(grad: Tensor, rows: Tensor, before: bool) -> None:
    if before:
        grad[..., :-1] += rows[..., 1:]
    else:
        grad += rows


def _read_factor(factor: Tensor, match: Tensor, before: bool) -> Tensor:
    if not before:
        return factor * match
    return _strict(factor, match.unsqueeze(2)).squeeze(2)


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
