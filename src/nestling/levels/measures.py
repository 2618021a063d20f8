"""Measures of levels while they train: how far and how often they move, and whether their gradients look alike.

Levels have different parameters, so whether their gradients are alike depends on what is compared. Two measures,
between parameters of the same role and shape in both levels (`roles`):

- `gradient_cosine`: of the gradients as they are. Exact, and 1 for equal gradients; but two levels whose hidden units
  stand in another order, as after independent initialisation, have a cosine near 0 whatever they learn. It is a measure
  for levels that began as copies of each other (a pre-trained MLP cut into levels).
- `subspace_similarity`: of the directions of the residual stream that the gradients read from or write to, whatever
  each level's hidden units are: for gradients G of shape `[width, hidden]` the cosine of the matrices G G^T. 1 for
  gradients that differ by a rotation of hidden units, 0 for orthogonal columns. Directions that are spread evenly are
  alike by chance, so it comes with the value that gradients of the same singular values in random directions would
  have.

Gradients at the levels' outputs are not compared: in a chain with residuals they are one vector times the Jacobians of
the levels in between, which start near the identity, so they look alike by construction and say nothing of learning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestling.levels.assignment import REST
from nestling.optim import MultiFrequency

SAMPLE = 16
"""Numbers of every parameter that are compared to see whether a step has changed it."""

Gradients = Mapping[str, Tensor]


def roles(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Parameter names by role: the name with its last index into an `nn.ModuleList` as `*`.

    So the parameters of level N of a continuum memory have the roles `blocks.3.channel.levels.*.down`, the same for all
    N. A role that several of the names share has no counterpart in another level and is left out.
    """
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: dict[str, list[str]] = {}
    for name in names:
        ends = [m for m in re.finditer(r"\.(\d+)(?=\.)", name) if name[: m.start()] in lists]
        role = f"{name[: ends[-1].start()]}.*{name[ends[-1].end() :]}" if ends else name
        found.setdefault(role, []).append(name)
    return {role: members[0] for role, members in found.items() if len(members) == 1}


def roles_by_depth(levels: Mapping[str, Sequence[str]], blocks: int) -> dict[str, dict[str, str]]:
    """Parameter names by role for levels that are groups of blocks (`models.convert` by depth).

    Of every level `blocks` blocks, spread evenly over it, are the counterparts of the other levels' blocks at the same
    place. Their hidden units have nothing to do with each other: `subspace_similarity` means something between them,
    `gradient_cosine` does not.

    Args:
        levels: names of every level's parameters, `blocks.3.channel.levels.fast.gate.weight`.
        blocks: compared in every level, or as many as the smallest level has.
    """
    kinds: dict[str, dict[str, list[str]]] = {}
    for level, names in levels.items():
        kinds[level] = {}
        for name in sorted(names, key=lambda n: [int(part) if part.isdigit() else 0 for part in n.split(".")]):
            kinds[level].setdefault(".".join(name.split(".")[-2:]), []).append(name)
    count = min([blocks, *(len(members) for own in kinds.values() for members in own.values())])
    return {
        level: {
            f"{kind} {i + 1} of {count}": members[(2 * i + 1) * len(members) // (2 * count)]
            for kind, members in own.items()
            for i in range(count)
        }
        for level, own in kinds.items()
    }


def gradient_cosine(a: Gradients, b: Gradients) -> float | None:
    """Cosine between two levels' gradients, over the roles that both have with equal shapes, joined to one vector.

    None without such a role, or where a gradient is zero.
    """
    product, square_a, square_b = 0.0, 0.0, 0.0
    for x, y in _pairs(a, b):
        product += float((x * y).sum())
        square_a += float(x.square().sum())
        square_b += float(y.square().sum())
    return _ratio(product, square_a * square_b)


def subspace_similarity(a: Gradients, b: Gradients, width: int | None = None) -> tuple[float, float] | None:
    """How alike the directions of the residual stream are, and how alike they would be by chance, both in [0, 1].

    Args:
        a, b: gradients of two levels, by role; matrices count.
        width: of the residual stream: the axis of this length is compared, of two such the first. None compares the
            first axis, the outputs of a linear layer.

    Returns:
        The cosine between the levels' G G^T, joined over the roles, and its expected value under a random rotation of
        one of the two; None as in `gradient_cosine`.
    """
    product, chance, square_a, square_b = 0.0, 0.0, 0.0, 0.0
    for x, y in _pairs(a, b):
        if x.dim() != 2:
            continue
        if width is not None and x.shape[0] != width and x.shape[1] == width:
            x, y = x.mT, y.mT
        gram_x, gram_y = x @ x.mT, y @ y.mT
        product += float((gram_x * gram_y).sum())
        chance += float(gram_x.trace() * gram_y.trace()) / len(gram_x)
        square_a += float(gram_x.square().sum())
        square_b += float(gram_y.square().sum())
    found, random = _ratio(product, square_a * square_b), _ratio(chance, square_a * square_b)
    return None if found is None or random is None else (found, random)


def _pairs(a: Gradients, b: Gradients) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the same role, in float64: squares of squares of small gradients leave float32."""
    return [(a[r].double(), b[r].double()) for r in a if r in b and a[r].shape == b[r].shape]


def _ratio(product: float, squares: float) -> float | None:
    return product / math.sqrt(squares) if squares > 0 else None


class LevelMeter:
    """Measures a model's levels from step to step; `before_step` and `after_step` go around the optimizer's step.

    It keeps a copy of the first weights on the CPU, and of a level's weights for the moment of the steps it measures.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Mapping[str, Sequence[str]],
        counterparts: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """A meter that has seen nothing.

        Args:
            model: with its first weights.
            levels: names of every level's parameters (`levels.assignment.assign_levels`).
            counterparts: for every level which parameter has which role; None takes `roles`. See `roles_by_depth`.
        """
        parameters = dict(model.named_parameters())
        self.levels = {level: {n: parameters[n] for n in names} for level, names in levels.items()}
        self.roles = counterparts or {level: roles(model, names) for level, names in levels.items()}
        self.width: int | None = getattr(getattr(model, "config", None), "hidden_size", None)
        self.first = {level: [p.detach().cpu().clone() for p in own.values()] for level, own in self.levels.items()}
        self.steps = 0
        self.changes = dict.fromkeys(self.levels, 0)
        self.update_norm: dict[str, float] = {}
        self._samples: dict[str, Tensor] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._measured: dict[str, float] = {}

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, record: bool) -> None:
        """Look at the gradients, as the optimizer will get them, and remember what it may change.

        Args:
            optimizer: about to step.
            record: `measure` will be called after this step.
        """
        self._samples = {level: self._sample(level) for level in self.levels}
        due = _due(optimizer)
        for level, own in self.levels.items():
            # A slow level's update is measured whenever it comes, since a record may never fall on one.
            period, steps = due.get(level, (1, True))
            if steps and (record or period > 1):
                self._before[level] = [p.detach().clone() for p in own.values()]
        if record:
            self._measured = self._gradients()

    @torch.no_grad()
    def after_step(self) -> None:
        """Count the levels that changed."""
        self.steps += 1
        for level, sample in self._samples.items():
            self.changes[level] += not torch.equal(sample, self._sample(level))
        for level, before in self._before.items():
            pairs = zip(self.levels[level].values(), before, strict=True)
            self.update_norm[level] = _norm([p - b for p, b in pairs])
        self._before = {}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The record of the last step, `LEVEL/MEASURE` and `LEVEL~LEVEL/MEASURE`.

        - grad_norm: of the step's gradient, after clipping.
        - update_norm: length of the level's latest update.
        - effective_period: steps over steps that changed the level, since the run began.
        - distance, relative_distance: from the first weights; over the length of those.
        - cosine, subspace, subspace_chance: see the module. What does not exist is left out.
        """
        found = dict(self._measured)
        for level, own in self.levels.items():
            if level in self.update_norm:
                found[f"{level}/update_norm"] = self.update_norm[level]
            if self.changes[level]:
                found[f"{level}/effective_period"] = self.steps / self.changes[level]
            pairs = list(zip(own.values(), self.first[level], strict=True))
            distance, size = _norm([p - f.to(p.device) for p, f in pairs]), _norm([f for _, f in pairs])
            found |= {f"{level}/distance": distance, f"{level}/relative_distance": distance / max(size, 1e-30)}
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON values: what cannot be computed again from the weights."""
        return {"steps": self.steps, "changes": self.changes, "update_norm": self.update_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.steps, self.changes, self.update_norm = state["steps"], dict(state["changes"]), dict(state["update_norm"])

    def _gradients(self) -> dict[str, float]:
        found: dict[str, float] = {}
        by_role: dict[str, dict[str, Tensor]] = {}
        for level, own in self.levels.items():
            gradients = {n: p.grad for n, p in own.items() if p.grad is not None}
            if gradients:
                found[f"{level}/grad_norm"] = _norm(list(gradients.values()))
            by_role[level] = {role: gradients[n] for role, n in self.roles[level].items() if n in gradients}
        for a, b in combinations([level for level in self.levels if level != REST], 2):
            cosine = gradient_cosine(by_role[a], by_role[b])
            if cosine is not None:
                found[f"{a}~{b}/cosine"] = cosine
            alike = subspace_similarity(by_role[a], by_role[b], self.width)
            if alike is not None:
                found |= {f"{a}~{b}/subspace": alike[0], f"{a}~{b}/subspace_chance": alike[1]}
        return found

    def _sample(self, level: str) -> Tensor:
        """A few numbers of every parameter of a level."""
        parts = [p.detach().reshape(-1) for p in self.levels[level].values()]
        return torch.cat([t[:: max(1, t.numel() // SAMPLE)].float() for t in parts])


def _due(optimizer: Optimizer) -> dict[str, tuple[int, bool]]:
    """Period of every level of a `MultiFrequency`, and whether the coming step updates it."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not isinstance(inner, MultiFrequency):
        return {}
    return {level.name: (level.period, level.elapsed + 1 == level.period) for level in inner.levels}


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(nn.utils.get_total_norm([t.float() for t in tensors]))
