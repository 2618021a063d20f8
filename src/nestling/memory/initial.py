"""Meta-learned first values of fast weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InitialWeights(nn.ParameterList):
    """Meta-learned first values of fast weights, one tensor a layer; a call gives them in a type.

    A call, as every module is used: hooks on it may have to fetch the values from elsewhere.
    """

    __call__ = nn.Module.__call__

    def forward(self, dtype: torch.dtype) -> list[Tensor]:
        """The values; gradients reach the parameters through them."""
        # One by one. A slice of the list would be new parameters, which cuts functional_call off from the gradient.
        return [weight.to(dtype) for weight in self]
