"""M3: multi-scale momentum Muon (NL Algorithm 1, Eq. 75)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nestling.ops.newton_schulz import MUON, Coefficients
from nestling.optim.base import Group, MemoryOptimizer, OnNonfinite, check_range, shared_settings
from nestling.optim.elementwise import accumulate, accumulate_squares, adamw_settings, root
from nestling.optim.matrices import AdjustLr, Orthogonalizer
from nestling.optim.memories import Memories
from nestling.optim.shards import total

Form = Literal["average", "algorithm"]


class M3(MemoryOptimizer):
    """Orthogonal factors of a fast and a slow momentum, summed, over the root of a second moment (NL Algorithm 1).

    `form="algorithm"` is Algorithm 1 to the letter, with betas (b1, b2, b3):

        M1 <- M1 + b1 g;  V <- V + b2 g^2;  every `frequency` steps M2 <- M2 + b3 (sum of g since), O2 = NS(M2)
        W <- W - lr (NS(M1) + alpha O2) / (sqrt(V) + eps)

    Nothing decays there: M1 weighs the first gradient as the last, and b1, b3 change nothing since Newton-Schulz
    ignores scale. V grows like t and takes lr / sqrt(t) with it; and since NS(M1) does not grow with the gradient and V
    does, the step has the units of one over a gradient. So it starts huge where gradients are small, and a loss times
    1,000 takes steps a thousandth as long.

    `form="average"` (default) keeps the structure and mends these:

        M1 <- b1 M1 + (1 - b1) g;  V <- b2 V + (1 - b2) g^2;  every `frequency` steps M2 <- b3 M2 + (1 - b3) (mean of g
        since), O2 = NS(M2) S = (NS(M1) + alpha O2) / (1 + alpha);  U = S / (sqrt(V) / rms + eps);  W <- W - lr ratio U
        |S| / |U|

    The betas are kept fractions, as in Adam and Muon. rms is the root of V's mean, so V only tells entries of one
    matrix from each other, and U gets the length of S back, so one entry with a small V cannot lengthen the step. 1 +
    alpha keeps alpha a mixture and not a second learning rate; `ratio` (`adjust_lr`) makes one lr serve this step and
    the AdamW step of the rest. The step does not depend on the gradient's scale. With alpha = 0 and
    `second_moment=False` it is Muon without Nesterov's term. The slow factor is of the steps before the current cycle,
    as in the algorithm (Eq. 75 has the sign of M2 turned and other names for its beta); before the first cycle ends it
    is zero.

    Shapes: matrices, stacks of them and kernels take the step above; what is none takes AdamW's. Give the groups of
    `matrix_groups(model)`: by shape alone ("auto"), embeddings and heads would count as matrices. Sparse gradients
    and complex parameters are refused. Under FSDP2 the momenta are gathered for the iteration, and every process runs
    it.

    State per parameter of a matrix: 16 bytes (M1, M2, O2, V; gradients are added to M2 as they come, so they need no
    buffer), 12 without second moment, 4 with alpha = 0 besides; 8 under AdamW's step. float32 for half-precision
    parameters.

    Examples:
        >>> import torch
        >>> from nestling.optim import M3, matrix_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 4))
        >>> optimizer = M3(matrix_groups(model, weight_decay=0.1), lr=1e-3)
        >>> model(torch.arange(10)).square().mean().backward()
        >>> optimizer.step()
    """

    adamw_for_rest = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.95, 0.95, 0.9),
        alpha: float = 0.25,
        *,
        frequency: int = 8,
        form: Form = "average",
        second_moment: bool = True,
        eps: float | None = None,
        ns_steps: int = 5,
        ns_coefficients: Coefficients = MUON,
        ns_zeta: float = 0.0,
        adjust_lr: AdjustLr = "match_rms_adamw",
        weight_decay: float = 0.0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool = True,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        """Args:
            params: parameters or groups, best those of `matrix_groups(model)`.
            lr: step size; as AdamW's with the default `adjust_lr`.
            betas: of the fast momentum, the second moment and the slow momentum: the paper's beta_1, beta_2, beta_3.
                0.95 is Muon's; 0.9 per cycle of 8 steps is a memory of about 80 steps, four times the fast one's.
            alpha: weight of the slow factor.
            frequency: steps of a cycle.
            form: see above.
            second_moment: divide by the root of V; False leaves the factors as they are.
            eps: added to the root. None: 0.1 of V's root mean square, which bounds what the division can raise one
                entry by ("average"), or 1e-8 ("algorithm").
            ns_steps, ns_coefficients, ns_zeta: of `nestling.ops.newton_schulz`; Eq. 44 is `gradient_step(ns_zeta)` as
                coefficients.
            adjust_lr: see `nestling.optim.matrices.lr_ratio`; not used by "algorithm", which has no such factor.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.
            adamw_betas, adamw_eps: of the AdamW step of what is no matrix.

        Raises:
            ValueError: a setting outside its range.
        """
        if form not in ("average", "algorithm"):
            raise ValueError(f'form must be "average" or "algorithm", got {form!r}')
        if len(betas) != 3:
            raise ValueError(f"betas must be three numbers (fast, second moment, slow), got {betas}")
        for beta in betas:
            check_range("betas", beta, 0.0, 1.0, open_end=True)
        check_range("alpha", alpha, 0.0)
        check_range("frequency", frequency, 1)
        if eps is not None and eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        average = form == "average"
        self.orthogonalizer = Orthogonalizer(
            ns_steps, ns_coefficients, adjust=adjust_lr if average else None, zeta=ns_zeta
        )
        defaults = {
            **shared_settings(lr, weight_decay, maximize, foreach, on_nonfinite),
            "betas": tuple(betas),
            "alpha": alpha,
            "frequency": frequency,
            "form": form,
            "second_moment": second_moment,
            "eps": eps if eps is not None else 0.1 if average else 1e-8,
            "kind": "auto",
            **adamw_settings(adamw_betas, adamw_eps),
        }
        super().__init__(params, defaults)

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        average = group["form"] == "average"
        fast = memories.tensors("fast")
        if average:
            accumulate(fast, gradients, group["betas"][0], average=True)
        else:
            torch._foreach_add_(fast, gradients, alpha=group["betas"][0])
        directions = self.orthogonalizer.factors(fast, memories.parameters, memories.kinds)
        if group["alpha"]:
            torch._foreach_add_(directions, memories.tensors("slow_factor"), alpha=group["alpha"])
            if average:
                torch._foreach_div_(directions, 1 + group["alpha"])
            self._write_slow(group, memories, gradients)
        if group["second_moment"]:
            self._divide(group, memories, gradients, directions)
        return directions

    def _write_slow(self, group: Group, memories: Memories, gradients: list[Tensor]) -> None:
        """M2, and O2 at a cycle's end. The sum over a cycle enters M2 gradient by gradient: nobody reads M2 before."""
        frequency, kept = group["frequency"], group["betas"][2]
        average = group["form"] == "average"
        slow, factors = memories.tensors("slow"), memories.tensors("slow_factor")
        if average and (fresh := [m for m, t in zip(slow, memories.steps, strict=True) if (t - 1) % frequency == 0]):
            torch._foreach_mul_(fresh, kept)
        torch._foreach_add_(slow, gradients, alpha=(1 - kept) / frequency if average else kept)
        due = [i for i, t in enumerate(memories.steps) if t % frequency == 0]
        if due:
            parameters, kinds = [memories.parameters[i] for i in due], [memories.kinds[i] for i in due]
            found = self.orthogonalizer.factors([slow[i] for i in due], parameters, kinds)
            torch._foreach_copy_([factors[i] for i in due], found)

    def _divide(self, group: Group, memories: Memories, gradients: list[Tensor], directions: list[Tensor]) -> None:
        """Divide the directions by the root of the second moment, in place."""
        squares, kept, eps = memories.tensors("second_moment"), group["betas"][1], group["eps"]
        if group["form"] == "algorithm":
            accumulate_squares(squares, gradients, 1.0, kept)
            torch._foreach_div_(directions, root(squares, [1.0] * len(squares), eps))
            return
        accumulate_squares(squares, gradients, kept, 1 - kept)
        for direction, square, parameter in zip(directions, squares, memories.parameters, strict=True):
            if not parameter.numel():
                continue
            rms = (total(square.sum(), parameter) / parameter.numel()).sqrt()
            before = total(_squared_length(direction), parameter)
            # sqrt(V) / rms and not sqrt(V): nothing of the size of a tiny gradient's inverse appears.
            direction.div_(square.sqrt().div_(torch.where(rms > 0, rms, 1.0)).add_(eps))
            after = total(_squared_length(direction), parameter)
            direction.mul_(torch.where(after > 0, (before / after).sqrt(), 1.0))


def _squared_length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x).square()
