"""Momentum over a higher-order feature map of the gradient (NL Eq. 51)."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from nestling.optim.base import OnNonfinite
from nestling.optim.memories import Memories
from nestling.optim.preconditioned_momentum import PreconditionedMomentum
from nestling.optim.preconditioners import Map, SpectralFeatures, as_preconditioner, needs_matrices


class FeatureMomentum(PreconditionedMomentum):
    """m <- momentum m + P phi(g); W <- W - lr m (NL Eq. 51).

    The paper leaves phi open. W + m needs m in W's shape, so phi keeps the shape; the default, `SpectralFeatures()`, is
    an odd polynomial of the gradient as a matrix. `features=LearnedFeatures()` learns it through an objective of its
    own, as the paper allows. `features=lambda g: g` gives momentum.

    Shapes: the default takes matrices, stacks, kernels as `[out, in * size]`, and vectors as one row; 0-d and empty
    tensors too. With `NewtonSchulz`, `Whitening` or `LearnedMap` as features or preconditioner, what is no matrix takes
    AdamW's step. Sparse gradients and complex parameters are refused. State per parameter: one tensor, 4 bytes (float32
    for half-precision parameters), more if phi or P keeps some.

    Examples:
        >>> import torch
        >>> from nestling.optim import FeatureMomentum
        >>> layer = torch.nn.Linear(8, 4)
        >>> optimizer = FeatureMomentum(layer.parameters(), lr=0.01)
        >>> layer(torch.randn(5, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        *,
        features: Map = SpectralFeatures(),  # noqa: B008 (frozen)
        preconditioner: Map = None,
        weight_decay: float = 0.0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool = True,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        """Args:
            params: parameters or groups.
            lr: step size, in the units of SGD with momentum.
            momentum: kept fraction of m (the paper's alpha).
            features: phi: an object with `apply`, a function of one tensor that keeps the shape, or None for the
                identity.
            preconditioner: P, the same.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.
            adamw_betas, adamw_eps: of the AdamW step beside Newton-Schulz.

        Raises:
            ValueError: a setting outside its range.
        """
        super().__init__(
            params,
            lr,
            momentum,
            preconditioner=preconditioner,
            weight_decay=weight_decay,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            maximize=maximize,
            foreach=foreach,
            on_nonfinite=on_nonfinite,
        )
        self.features = as_preconditioner(features)
        self.adamw_for_rest = self.adamw_for_rest or needs_matrices(self.features)

    def _values(self, gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        mapped = gradients if self.features is None else self.features.apply(gradients, gradients, memories)
        return mapped if self.preconditioner is None else self.preconditioner.apply(mapped, mapped, memories)
