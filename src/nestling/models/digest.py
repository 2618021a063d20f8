"""A digest of the tokens that a state has read, so that it can tell whether a text begins with them.

A polynomial in the tokens, at two points modulo a prime: it goes on from where it stands, token by token or many at
once, and two different texts of a million tokens share one with a probability of at most 2e-7.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

PRIME = (1 << 31) - 1
"""Products of two residues fit int64."""
POINTS = (1_103_515_245, 1_664_525_033)


def empty_digest(rows: int, device: torch.device | str = "cpu") -> Int[Tensor, "N 2"]:
    """Of no tokens. int32, so that it stays on the device of the model when a state is moved."""
    return torch.zeros(rows, len(POINTS), dtype=torch.int32, device=device)


def extend_digest(
    digest: Int[Tensor, "N 2"], tokens: Int[Tensor, "N L"], lengths: Int[Tensor, " N"] | None
) -> Int[Tensor, "N 2"]:
    """The digest after more tokens.

    Args:
        digest: of what was read before.
        tokens: what is read now, in left-aligned rows.
        lengths: real tokens of every row; None when all have L.
    """
    time = tokens.shape[1]
    if time == 1 and lengths is None:  # a step of decoding, where every microsecond is met again
        point = _points(tokens.device)
        return ((digest.to(tokens.device, torch.int64) * point + tokens + 1) % PRIME).to(torch.int32)
    # Power k at 1 + k; power -1 stands for what follows a row's length and counts as 0.
    powers = F.pad(_powers(time + 1), (0, 0, 1, 0)).to(tokens.device)
    if lengths is None:
        following = torch.arange(time - 1, -1, -1, device=tokens.device).expand_as(tokens)
        count = torch.full((len(tokens),), time, device=tokens.device)
    else:
        count = lengths.to(tokens.device)
        following = (count[:, None] - 1 - torch.arange(time, device=tokens.device)).clamp_min(-1)
    terms = (tokens.to(torch.int64) + 1)[..., None] * powers[following + 1] % PRIME
    kept = digest.to(device=tokens.device, dtype=torch.int64) * powers[count + 1] % PRIME
    return ((kept + terms.sum(1)) % PRIME).to(torch.int32)


@cache
def _points(device: torch.device) -> Int[Tensor, " 2"]:
    return torch.tensor(POINTS, device=device)


def _powers(count: int) -> Int[Tensor, "count 2"]:
    """The first powers of both points, by doubling."""
    powers = torch.ones(1, len(POINTS), dtype=torch.int64, device="cpu")
    factor = torch.tensor(POINTS, device="cpu")
    while len(powers) < count:
        powers = torch.cat((powers, powers * factor % PRIME))
        factor = factor * factor % PRIME
    return powers[:count]
