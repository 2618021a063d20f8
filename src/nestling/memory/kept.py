"""Memories kept at the ends of segments, which answer beside the running one (Memory Caching, arXiv:2602.24281).

N rows, S kept memories, H heads, L tokens, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.memory.activation import ACTIVATIONS


@dataclass(frozen=True)
class KeptMemories:
    """Kept memories, and how much each of them says to every token.

    Attributes:
        weights: of one memory a head, layer by layer, each `[N, S, H, out, in]`; M(x) = W x for one layer, else
            x + W_L act(... act(W_1 x)).
        shares: of the S kept memories, then of the running one, in what every token hears.
        soup: average the weights and read once, in place of averaging the answers. For one layer both are the same.
    """

    weights: list[Tensor]
    shares: Float[Tensor, "N H L heard"]
    soup: bool = False

    @property
    def mixes_layers(self) -> bool:
        """Whether the average has to be taken layer by layer, between the running memory's layers."""
        return self.soup and len(self.weights) > 1

    def combine(
        self, q: Float[Tensor, "N H L K"], o: Float[Tensor, "N H L V"], activation: str = ""
    ) -> Float[Tensor, "N H L V"]:
        """What the kept memories answer to the queries, together with the running memory's answers `o`.

        Args:
            q: queries.
            o: answers of the running memory.
            activation: of a memory of several layers, one of `memory.activation.ACTIVATIONS`.
        """
        x = q.unsqueeze(1)
        for layer, weight in enumerate(self.weights):
            x = (ACTIVATIONS[activation](x) if layer else x) @ weight.mT
        return self._weigh(x if len(self.weights) == 1 else x + q.unsqueeze(1), o)

    def mix(
        self, layer: int, x: Float[Tensor, "N H L inputs"], z: Float[Tensor, "N H L outputs"]
    ) -> Float[Tensor, "N H L outputs"]:
        """W x for one layer of the average of all weights, from z = W x of the running memory alone.

        A token's average weight is never made: W x is linear in W, so it is the average of the products.
        """
        return self._weigh(x.unsqueeze(1) @ self.weights[layer].mT, z)

    def _weigh(self, kept: Float[Tensor, "N S H L V"], own: Float[Tensor, "N H L V"]) -> Float[Tensor, "N H L V"]:
        shares = self.shares.to(own.dtype)
        return torch.einsum("nshlv,nhls->nhlv", kept, shares[..., :-1]) + own * shares[..., -1:]
