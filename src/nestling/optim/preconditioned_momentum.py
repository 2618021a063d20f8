"""Momentum as a memory of mapped gradients (NL Eq. 46-47), and a map on its output (NL Eq. 42, 52)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nestling.optim.base import Group, MemoryOptimizer, OnNonfinite, check_range, shared_settings
from nestling.optim.elementwise import accumulate, adamw_settings
from nestling.optim.full_matrix import AdaGradMatrix
from nestling.optim.learned_preconditioner import LearnedMap, Whitening
from nestling.optim.memories import Memories
from nestling.optim.preconditioners import AdaGradDiagonal, AdamDiagonal, Map, as_preconditioner, needs_matrices

# By the names of what they keep: two of one line would share it.
_SHARING = ((AdamDiagonal, AdaGradDiagonal, AdaGradMatrix), (Whitening,), (LearnedMap,))


class PreconditionedMomentum(MemoryOptimizer):
    """m <- momentum m + P g; W <- W - lr S(m). NL Eq. 47 with P, Eq. 42 and 52 with the output map S.

    Special cases, each tested: P = S = identity is `torch.optim.SGD` with momentum; `output=AdamDiagonal(),
    average=True, bias_correction=True` is Adam (with `weight_decay` AdamW); `output=AdaGradDiagonal(), momentum=0` is
    AdaGrad, and `output=AdaGradMatrix(), momentum=0` full-matrix AdaGrad (Eq. 106-111);
    `output=NewtonSchulz(adjust="original"), average=True, nesterov=True` is `torch.optim.Muon`. `Whitening` and
    `LearnedMap` are preconditioners that learn by gradient descent on an objective of their own (Eq. 39-41). Where
    Adam's diagonal stands matters: the appendix (Eq. 103-105) divides the momentum by it, so it belongs to `output`; as
    `preconditioner` every gradient keeps the diagonal of its own step.

    Shapes: identity, diagonals and `AdaGradMatrix` take any (0-d, empty, embeddings, kernels). With `NewtonSchulz`,
    `Whitening` or `LearnedMap` in either place, groups are read by their `kind` (see `nestling.optim.matrices`) and
    what is no matrix takes AdamW's step. Sparse gradients and complex parameters are refused.

    State per parameter: one tensor, 4 bytes, and one more with a diagonal; a matrix of the shorter side's size
    with `AdaGradMatrix`, `Whitening` and `LearnedMap`; two under AdamW's step. float32 for half-precision parameters.

    Examples:
        >>> import torch
        >>> from nestling.optim import PreconditionedMomentum
        >>> from nestling.optim.preconditioners import AdamDiagonal
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> adam = PreconditionedMomentum([w], lr=0.1, output=AdamDiagonal(), average=True, bias_correction=True)
        >>> w.square().sum().backward()
        >>> adam.step()
        >>> w.detach()
        tensor([0.9000, 0.9000, 0.9000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        preconditioner: Map = None,
        output: Map = None,
        average: bool = False,
        bias_correction: bool = False,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool = True,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        """Args:
            params: parameters or groups.
            lr: step size. The default suits the maps with entries of about 1 (Adam's, Newton-Schulz); plain momentum
                takes more.
            momentum: kept fraction of m (the paper's alpha).
            preconditioner: P: an object with `apply`, a function of one tensor, or None for the identity.
            output: S, the same.
            average: m <- momentum m + (1 - momentum) P g, an exponential mean in place of a sum.
            bias_correction: divide that mean by 1 - momentum^t.
            nesterov: S sees momentum m + P g (or the mean of both) in place of m.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.
            adamw_betas, adamw_eps: of the AdamW step beside maps of matrices.

        Raises:
            ValueError: a setting outside its range, or `bias_correction` without `average`, or two diagonals.
        """
        check_range("momentum", momentum, 0.0, 1.0, open_end=average)
        if bias_correction and not average:
            raise ValueError("bias_correction corrects a mean; give average=True with it")
        if any(isinstance(preconditioner, some) and isinstance(output, some) for some in _SHARING):
            raise ValueError(
                f"give {type(output).__name__} as preconditioner or as output, and nothing of its kind as the other: "
                "they would share one second moment, or one learned map"
            )
        self.preconditioner, self.output = as_preconditioner(preconditioner), as_preconditioner(output)
        self.adamw_for_rest = needs_matrices(self.preconditioner, self.output)
        defaults = {
            **shared_settings(lr, weight_decay, maximize, foreach, on_nonfinite),
            "momentum": momentum,
            "average": average,
            "bias_correction": bias_correction,
            "nesterov": nesterov,
            "kind": "auto",
            **adamw_settings(adamw_betas, adamw_eps),
        }
        super().__init__(params, defaults)

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        kept = group["momentum"]
        values = self._values(gradients, memories)
        if kept == 0:
            outputs = values
        else:
            momenta = memories.tensors("momentum")
            accumulate(momenta, values, kept, group["average"])
            outputs = momenta
        if kept and group["nesterov"]:
            if group["average"]:
                outputs = list(torch._foreach_lerp(values, momenta, kept))
            else:
                outputs = list(torch._foreach_add(values, momenta, alpha=kept))
        if group["bias_correction"]:
            outputs = list(torch._foreach_div(outputs, [1 - kept**t for t in memories.steps]))
        return outputs if self.output is None else self.output.apply(outputs, gradients, memories)

    def _values(self, gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """P g."""
        if self.preconditioner is None:
            return gradients
        return self.preconditioner.apply(gradients, gradients, memories)
