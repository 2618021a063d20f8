"""Optimizers by name, for command lines and trainers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from nestling.optim.deep_momentum import DeepMomentum
from nestling.optim.delta_gradient_descent import DeltaGradientDescent
from nestling.optim.delta_momentum import DeltaMomentum
from nestling.optim.feature_momentum import FeatureMomentum
from nestling.optim.full_matrix import AdaGradMatrix
from nestling.optim.generalized_gradient_descent import GeneralizedGradientDescent
from nestling.optim.generalized_momentum import GeneralizedMomentum
from nestling.optim.groups import matrix_groups, parameter_groups
from nestling.optim.learned_features import LearnedFeatures
from nestling.optim.learned_preconditioner import Whitening
from nestling.optim.m3 import M3
from nestling.optim.oja import OjaGradientDescent
from nestling.optim.preconditioned_momentum import PreconditionedMomentum
from nestling.optim.preconditioners import AdamDiagonal, NewtonSchulz

LIKE_ADAMW = frozenset({"adamw", "learned_preconditioner", "m3", "muon", "preconditioned_momentum"})
"""Names whose steps have AdamW's size, so that one learning rate serves them all; the others' have a gradient's."""

NAMES = (
    "adamw",
    "deep_momentum",
    "delta_gradient_descent",
    "delta_momentum",
    "feature_momentum",
    "full_matrix_adagrad",
    "generalized_gradient_descent",
    "generalized_momentum",
    "learned_features",
    "learned_preconditioner",
    "m3",
    "muon",
    "oja",
    "preconditioned_momentum",
    "sgd",
)


def build(
    name: str,
    model: nn.Module,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    heads: Iterable[nn.Module] = (),
    only: Iterable[Tensor] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Optimizer:
    """The optimizer called `name`, with its defaults, over the parameters of `model` that need gradients.

    Weight decay falls on matrices and stacks of them, as `nestling.optim.groups.decaying` says, and is decoupled for
    all but `sgd`, where it is torch's L2 term. `m3`, `muon` and `learned_preconditioner` step matrices by role
    (`matrix_groups`) and the rest by AdamW with the same rate: their steps' entries have AdamW's size.
    `full_matrix_adagrad` gives the rest AdaGrad's diagonal.

    Args:
        name: one of `NAMES`. `adamw` and `sgd` (with momentum) are `torch.optim`'s. `muon` is
            `PreconditionedMomentum` with Newton-Schulz, which equals `torch.optim.Muon`, takes stacks of matrices and
            does not iterate in bfloat16 on CPUs that emulate it, a fiftieth of the speed. `preconditioned_momentum` has
            Adam's diagonal inside the memory (NL Eq. 47); `learned_preconditioner` has a `Whitening` there that learns
            by gradient descent (Eq. 41), `full_matrix_adagrad` is it with `AdaGradMatrix` and no momentum (Eq. 111).
            `learned_features` is `FeatureMomentum` with `LearnedFeatures`, and `oja` is `OjaGradientDescent`.
        model: what to train.
        lr: step size. A good one is near 1e-3 for those of `LIKE_ADAMW`, and 10 to 100 times that for the others, whose
            steps have a gradient's size (AdaGrad's fall with the square root of their number).
        weight_decay: see above.
        betas: AdamW's; the first is the momentum of `sgd` and of the memories that are not Newton-Schulz's.
        heads: see `matrix_groups`.
        only: parameters of the model; None is all. For one level of `MultiFrequency`.
        process_group: the processes of a DistributedDataParallel around the model, for the optimizers that see layer
            inputs (`DeltaGradientDescent`, `GeneralizedGradientDescent`, `OjaGradientDescent`); the others need none.

    Raises:
        ValueError: an unknown name, and the message lists the known ones; or no parameter to train.

    Examples:
        >>> import torch
        >>> from nestling.optim import build
        >>> model = torch.nn.Linear(8, 4)
        >>> type(build("delta_momentum", model, lr=0.1)).__name__
        'DeltaMomentum'
    """
    if name not in NAMES:
        raise ValueError(f"unknown optimizer {name!r}; choose one of: {', '.join(NAMES)}")
    by_role = name in ("full_matrix_adagrad", "learned_preconditioner", "m3", "muon")
    every = matrix_groups(model, weight_decay, heads) if by_role else parameter_groups(model, weight_decay)
    groups = _trained(every, None if only is None else {id(p) for p in only})
    if not groups:
        raise ValueError("no parameter to train: none that is asked for needs a gradient; see requires_grad")
    match name:
        case "adamw":
            # Not fused: with a state of another shape (a memory file's) that kernel writes beyond it on a CPU.
            return AdamW(groups, lr, betas=betas)
        case "deep_momentum":
            return DeepMomentum(groups, lr, betas[0])
        case "delta_gradient_descent":
            return DeltaGradientDescent(groups, lr, model=model, process_group=process_group)
        case "delta_momentum":
            return DeltaMomentum(groups, lr, betas[0])
        case "feature_momentum":
            return FeatureMomentum(groups, lr, betas[0])
        case "full_matrix_adagrad":
            return PreconditionedMomentum(groups, lr, 0.0, output=AdaGradMatrix())
        case "generalized_gradient_descent":
            return GeneralizedGradientDescent(groups, lr, model=model, process_group=process_group)
        case "generalized_momentum":
            return GeneralizedMomentum(groups, lr, betas[0])
        case "learned_features":
            return FeatureMomentum(groups, lr, betas[0], features=LearnedFeatures())
        case "learned_preconditioner":
            settings: dict[str, Any] = {"preconditioner": Whitening(), "average": True, "adamw_betas": betas}
            return PreconditionedMomentum(groups, lr, betas[0], **settings)
        case "m3":
            return M3(groups, lr, adamw_betas=betas)
        case "muon":
            muon: dict[str, Any] = {"output": NewtonSchulz(), "average": True, "nesterov": True}
            return PreconditionedMomentum(groups, lr, 0.95, adamw_betas=betas, **muon)
        case "oja":
            return OjaGradientDescent(groups, lr, model=model, process_group=process_group)
        case "preconditioned_momentum":
            return PreconditionedMomentum(groups, lr, betas[0], preconditioner=AdamDiagonal(betas[1]), average=True)
        case "sgd":
            return SGD(groups, lr, momentum=betas[0])
    raise NotImplementedError(f"{name!r} is in NAMES and has no case in nestling.optim.build.build: write one")


def _trained(groups: list[dict[str, Any]], only: set[int] | None) -> list[dict[str, Any]]:
    """The groups with what needs gradients and stands in `only`, without those that are left empty."""
    kept = [
        {**group, "params": [p for p in group["params"] if p.requires_grad and (only is None or id(p) in only)]}
        for group in groups
    ]
    return [group for group in kept if group["params"]]


class TrainerFactory:
    """`build` for Hugging Face's Trainer, which makes one of these and calls it with the model.

        Trainer(..., optimizer_cls_and_kwargs=(TrainerFactory, {"name": "m3", "lr": 1e-3, "weight_decay": 0.1}))

    The Trainer passes a class like `M3` its own groups, which do not tell an embedding from a matrix; this sees the
    model, and says that the Trainer averages gradients over all processes, where there are several.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        name: str,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        heads: Iterable[nn.Module] = (),
    ) -> Optimizer:
        """See `build`."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        everyone = dist.group.WORLD if several else None
        return build(name, model, lr=lr, weight_decay=weight_decay, betas=betas, heads=heads, process_group=everyone)
