"""Memories of classes over fixed features that store no examples: class means, and an associative memory."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ClassMeans:
    """Class means and one covariance of all classes, both updated exactly example by example.

    `euclidean` is the nearest class mean. `mahalanobis` measures distances with the shared covariance S of the examples
    around the means of their classes, as InCA's external learner does (Momeni et al. 2025):

        score(x, c) = -(x - mu_c)^T ((1 - shrinkage) S + shrinkage tr(S)/d I)^-1 (x - mu_c)

    Kept are d numbers for a class and d^2 in all.

    Args:
        width: d, of the features.
        metric: the distance.
        shrinkage: 0 to 1, needed while there are fewer examples than dimensions. 0.1 was not tuned.

    Raises:
        ValueError: shrinkage out of range.
    """

    def __init__(
        self, width: int, metric: Literal["euclidean", "mahalanobis"] = "mahalanobis", shrinkage: float = 0.1
    ) -> None:
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage lies between 0 and 1, not {shrinkage}")
        self.metric, self.shrinkage = metric, shrinkage
        self.classes: list[int] = []
        self.counts: list[int] = []
        self.means = torch.empty(0, width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def write(self, keys: Float[Tensor, "n d"], labels: Int[Tensor, "n"]) -> None:
        """Add examples. The order and the sizes of the calls make no difference."""
        for key, label in zip(keys.double(), labels.tolist(), strict=True):
            if label not in self.classes:
                self.classes.append(label)
                self.counts.append(0)
                self.means = torch.cat((self.means, torch.zeros(1, len(key), dtype=torch.float64)))
            row = self.classes.index(label)
            self.counts[row] += 1
            before = key - self.means[row]
            self.means[row] += before / self.counts[row]
            self.scatter += torch.outer(before, key - self.means[row])

    def scores(self, keys: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Negative squared distances, in the order of `classes`. float64."""
        keys, means = keys.double(), self.means
        if self.metric == "mahalanobis":
            covariance = self.scatter / sum(self.counts)
            width = len(covariance)
            level = self.shrinkage * covariance.trace() / width + 1e-12
            root = torch.linalg.cholesky((1 - self.shrinkage) * covariance + level * torch.eye(width).double())
            keys, means = (torch.linalg.solve_triangular(root, x.mT, upper=False).mT for x in (keys, means))
        return -torch.cdist(keys, means, compute_mode="donot_use_mm_for_euclid_dist").square()


class AssociativeMemory:
    """A linear associative memory of class labels whose L2 objective is solved exactly after every write.

    With keys k_t and one-hot values v_t, recursive least squares is the delta rule with the best preconditioner:

        P_t = P_{t-1} - P_{t-1} k_t k_t^T P_{t-1} / (1 + k_t^T P_{t-1} k_t),        P_0 = I / ridge
        M_t = M_{t-1} + (v_t - M_{t-1} k_t) (P_t k_t)^T

    so that M_t minimises sum_s |M k_s - v_s|^2 + ridge |M|^2 over everything written (NL section 4: the inner objective
    is solved, not descended). The same M comes out in whatever order the classes arrive: this level forgets nothing. A
    class not met yet is a row of zeros, which is the exact solution for it, so classes are added as they come.
    `rule="delta"` is the plain delta rule (DeltaNet) in place of it, P_t k_t replaced by rate * k_t / |k_t|^2, for
    comparison.

    With `expansion` n, keys are first mapped to n features max(0, R k), R fixed and random (NL Eq. 51: a richer feature
    map holds more associations than d). A constant 1 is always appended to the key.

    Kept are n (or d) numbers for a class and their square in all, whatever the number of examples.

    Args:
        width: d, of the features.
        ridge: the pull to zero, above 0, for keys of mean square 1.
        expansion: random features, 0 for the key itself.
        rule: "least_squares" or "delta".
        rate: of the delta rule, 0 to 2.
        seed: of R.

    Raises:
        ValueError: ridge or rate out of range.
    """

    def __init__(
        self,
        width: int,
        ridge: float = 1.0,
        *,
        expansion: int = 0,
        rule: Literal["least_squares", "delta"] = "least_squares",
        rate: float = 0.5,
        seed: int = 0,
    ) -> None:
        if ridge <= 0 or not 0 < rate < 2:
            raise ValueError(f"ridge must be above 0 and rate between 0 and 2, not {ridge} and {rate}")
        self.rule, self.rate = rule, rate
        generator = torch.Generator().manual_seed(seed)
        self.projection: Tensor | None = None
        if expansion:
            self.projection = torch.randn(width, expansion, generator=generator, dtype=torch.float64) / math.sqrt(width)
        size = (expansion or width) + 1
        self.classes: list[int] = []
        self.weights = torch.empty(0, size, dtype=torch.float64)
        self.inverse = torch.eye(size, dtype=torch.float64) / ridge if rule == "least_squares" else torch.empty(0, 0)

    def write(self, keys: Float[Tensor, "n d"], labels: Int[Tensor, "n"]) -> None:
        """Add associations, one after the other (least squares: all at once, with the same result)."""
        for label in dict.fromkeys(labels.tolist()):
            if label not in self.classes:
                self.classes.append(label)
        grown = len(self.classes) - len(self.weights)
        self.weights = torch.cat((self.weights, self.weights.new_zeros(grown, self.weights.shape[1])))
        rows = torch.tensor([self.classes.index(label) for label in labels.tolist()])
        values = torch.nn.functional.one_hot(rows, len(self.classes)).double()
        expanded = self._expand(keys)
        if self.rule == "least_squares":
            self._solve(expanded, values)
            return
        for key, value in zip(expanded, values, strict=True):
            step = self.rate * key / key.dot(key)
            self.weights += torch.outer(value - self.weights @ key, step)

    def scores(self, keys: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """M k, in the order of `classes`; about 1 for the right class and 0 for the others. float64."""
        return self._expand(keys) @ self.weights.mT

    def _solve(self, keys: Tensor, values: Tensor) -> None:
        """The recursion over several keys at once (Woodbury): the gain is P K^T (I + K P K^T)^-1."""
        projected = keys @ self.inverse
        inner = torch.eye(len(keys), dtype=torch.float64) + projected @ keys.mT
        gain = torch.linalg.solve(inner, projected)
        self.weights = self.weights + (values - keys @ self.weights.mT).mT @ gain
        self.inverse = self.inverse - projected.mT @ gain
        self.inverse = (self.inverse + self.inverse.mT) / 2

    def _expand(self, keys: Tensor) -> Tensor:
        features = keys.double() if self.projection is None else (keys.double() @ self.projection).relu()
        return torch.cat((features, features.new_ones(len(features), 1)), -1)
