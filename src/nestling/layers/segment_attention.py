"""Attention inside a segment, to persistent tokens, retrieved memory and the segment's tokens (Titans Eq. 22, 23).

N rows, L tokens of a call, H heads, D head width, C segment, P persistent tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nestling.layers.attention import AttentionConfig, AttentionHeads, attend_block
from nestling.ops.rotary import rotate, rotation


class SegmentAttention(AttentionHeads):
    """Attn(x_i; [p_1 .. p_P | h_1 .. h_i | x_1 .. x_i]) without the output projection, which its owner calls on what it
    makes of the answers.

    Args:
        config: of the heads; rotary positions count the concatenation.
        segment: C.
    """

    def __init__(self, config: AttentionConfig, segment: int) -> None:
        super().__init__(config)
        self.segment = segment

    def forward(
        self,
        x: Float[Tensor, "N L hidden"],
        h: Float[Tensor, "N L hidden"],
        persistent: Float[Tensor, "1 P hidden"],
        keys: Float[Tensor, "N 2 C H D"],
        values: Float[Tensor, "N 2 C H D"],
        first: int,
        valid: Bool[Tensor, "N 1 L"] | None,
    ) -> tuple[Float[Tensor, "N L hidden"], Float[Tensor, "N 2 C H D"], Float[Tensor, "N 2 C H D"]]:
        """Answers to tokens `first`.. of the segment, and the segment's keys and values with theirs.

        Rows agree in their slots, so one mask serves all: a slot before a row's first token of this call was filled by
        an earlier one, and a slot after its last is seen by slots without a token only.

        Args:
            x: the tokens.
            h: what the memory retrieved for them.
            persistent: p_1 .. p_P.
            keys: of the segment so far, rotated: retrieved memory first, then tokens.
            values: likewise.
            first: slot of the segment where `x` begins.
            valid: slots of `x` that hold a token; None when all do.
        """
        c, fixed = self.config, persistent.shape[1]
        time, end, retrieved = x.shape[1], first + x.shape[1], fixed + first

        # One table for all three, a row each: at a single token making it costs as much as a product.
        starts = torch.tensor([0, retrieved, retrieved + self.segment], device="cpu")
        cos, sin = rotation(c.head_dim, c.rope_theta, starts, max(time, fixed), x.device)
        turn_p, turn_h, turn_x = (
            (cos[i : i + 1, :count], sin[i : i + 1, :count]) for i, count in enumerate((fixed, time, time))
        )
        q = rotate(self.heads(x, self.query), *turn_x)
        k = torch.stack((rotate(self.heads(h, self.key), *turn_h), rotate(self.heads(x, self.key), *turn_x)), 1)
        v = torch.stack((self.heads(h, self.value), self.heads(x, self.value)), 1)
        keys, values = (_put(*pair, first, valid) for pair in ((keys, k), (values, v)))

        p_k = rotate(self.heads(persistent, self.key), *turn_p)
        p_v = self.heads(persistent, self.value)
        k, v = (
            torch.cat((p.to(q.dtype).expand(len(x), -1, -1, -1), t[:, :, :end].flatten(1, 2).to(q.dtype)), 1)
            for p, t in ((p_k, keys), (p_v, values))
        )
        causal = torch.ones(time, end, dtype=torch.bool, device=x.device).tril(first)
        mask = F.pad(torch.cat((causal, causal), 1), (fixed, 0), value=True)
        return attend_block(q, k, v, mask).flatten(-2), keys, values


def _put(buffer: Tensor, new: Tensor, first: int, valid: Tensor | None) -> Tensor:
    """`buffer` `[N, 2, C, H, D]` with `new` `[N, 2, L, H, D]` at slots `first`.., where `valid` `[N, 1, L]` is True."""
    end = first + new.shape[2]
    new = new.to(buffer.dtype)
    if valid is not None:
        new = torch.where(valid[..., None, None], new, buffer[:, :, first:end])
    return torch.cat((buffer[:, :, :first], new, buffer[:, :, end:]), 2)
