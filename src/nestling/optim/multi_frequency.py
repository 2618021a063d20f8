"""Levels of parameters that an optimizer updates at different frequencies (NL Eq. 71)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from nestling.optim import noise_scale
from nestling.optim.base import MemoryOptimizer
from nestling.optim.layer_inputs import InputOptimizer
from nestling.optim.optimizer_level import Factory, OptimizerLevel, RunningLevel, start_level
from nestling.optim.saved_state import check_state, copied_state, layouts

ACCUMULATED = "accumulated"
"""Name of a slow level's gradient sum among its parameters' optimizer states."""

ACCUMULATED_INPUTS = "accumulated_inputs"
"""Name of the like sum of what layer inputs come to, where the inner optimizer needs them (`InputOptimizer`)."""

SUMS = (ACCUMULATED, ACCUMULATED_INPUTS)


class MultiFrequency(Optimizer):
    """One inner optimizer and one period per level (NL Eq. 71): after every step, the levels whose period has passed

        theta <- theta - update(sum of the gradients of the last `period` steps)

    where `update` is any optimizer. A gradient is what `p.grad` holds when `step` is called, so a step counts once
    however many backward passes it had, a gradient clip acts on each step's gradient before it is added, and
    `zero_grad` between steps loses nothing: the sums are kept here, in float32 (float64 for float64 parameters), and
    are part of the state. Levels of period 1 hand their gradients over as they are: then this is the inner optimizer.

    - Weight decay and whatever else an inner optimizer does happens at its level's own steps only. With a decoupled
      decay of lr * weight_decay a step, a level of period 8 decays 8 times more slowly.
    - Eq. 71 gives every gradient the rate of its own step; here the whole sum has the rate of the step it is used at,
      because an arbitrary optimizer takes one rate. They agree while the rate stands still.
    - `param_groups` are the inner optimizers' own groups, one after the other, so schedulers act on them; each also has
      `level`, `level_period` and `level_elapsed` (steps since the level's last update).
    - An inner optimizer that needs its layers' inputs gets those of the whole period, summed (or averaged) as the
      gradients are; see `DeltaGradientDescent`, and `GeneralizedGradientDescent` for what does not add up.
    - A gradient sum that has not reached its period when training ends has changed nothing.
    - Every state must live in the inner optimizer's `state` and `param_groups`, as PyTorch's contract has it.

    Args:
        levels: by name. No parameter may stand in two.
        optimizer: makes the inner optimizer of the levels that name none; AdamW with its defaults.
        reduce: "sum" is Eq. 71. "mean" divides by their number: for inner optimizers that are not invariant to the
            scale of their gradient (SGD), so that one rate fits all periods.
        rate_exponent: the learning rates of a level are multiplied by period^rate_exponent. 0 leaves them. With -0.5 a
            level that sums more tokens a step moves less.

    Raises:
        ValueError: no level, a level without parameters, a parameter in two levels, a period below 1, an unknown
            `reduce`; at a step, a sparse gradient in a level with a period above 1.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> from nestling.optim import MultiFrequency, OptimizerLevel
        >>> fast, slow = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        >>> sgd = partial(torch.optim.SGD, lr=0.1)
        >>> often, rarely = OptimizerLevel([fast], optimizer=sgd), OptimizerLevel([slow], period=2, optimizer=sgd)
        >>> optimizer = MultiFrequency({"fast": often, "slow": rarely})
        >>> (fast + slow).sum().backward()
        >>> optimizer.step()
        >>> fast.detach(), slow.detach()  # the slow level waits for its second step
        (tensor([0.9000, 0.9000]), tensor([1., 1.]))
    """

    def __init__(
        self,
        levels: Mapping[str, OptimizerLevel],
        *,
        optimizer: Factory = AdamW,
        reduce: Literal["sum", "mean"] = "sum",
        rate_exponent: float = 0.0,
    ) -> None:
        if not levels:
            raise ValueError("levels is empty: name at least one, for example {'all': OptimizerLevel(parameters)}")
        if reduce not in ("sum", "mean"):
            raise ValueError(f"reduce is 'sum' or 'mean', not {reduce!r}")
        self.reduce = reduce
        self.levels: tuple[RunningLevel, ...] = ()
        made = tuple(start_level(name, level, optimizer, rate_exponent) for name, level in levels.items())
        _check_disjoint(made)
        super().__init__([{"params": level.parameters} for level in made], {})
        self.levels = made
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Add this step's gradients to the levels' sums, and update the levels whose period has passed.

        Args:
            closure: computes the loss and the gradients again; called once.

        Raises:
            Exception: what an inner optimizer raises. Levels before it have then stepped, and the period's sums of this
                one are gone: go on from what was last saved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for level in self.levels:
            elapsed = level.elapsed + 1
            due = self._is_due(level, keep=True)
            if level.period > 1:
                self._accumulate(level)
                self._accumulate_inputs(level, last=due)
            for group in level.optimizer.param_groups:
                group["level_elapsed"] = 0 if due else elapsed
                if level.signal_to_noise is not None and due:
                    group[noise_scale.UPDATES] += 1
                    group[noise_scale.STEPS] += elapsed
            if due and level.period == 1:
                level.optimizer.step()
            elif due:
                self._update(level, elapsed)
        return loss

    def due(self) -> list[str]:
        """Names of the levels that the next step updates, with the gradients that are there now."""
        return [level.name for level in self.levels if self._is_due(level, keep=False)]

    def _is_due(self, level: RunningLevel, keep: bool) -> bool:
        """Whether this step updates a level; an adaptive one keeps what it has measured, or not."""
        elapsed = level.elapsed + 1
        if level.signal_to_noise is None or elapsed == 1:
            return elapsed == level.period
        sums = [(p.grad, self.state[p].get(ACCUMULATED)) for p in level.parameters]
        pairs = [(new, total) for new, total in sums if new is not None and total is not None]
        groups = level.optimizer.param_groups
        signal, power = noise_scale.measured(groups[0], pairs, elapsed - 1)
        for group in groups if keep else ():
            group |= {noise_scale.SIGNAL: signal, noise_scale.POWER: power}
        return elapsed == level.period or noise_scale.ratio(signal, power, elapsed) >= level.signal_to_noise

    def _accumulate(self, level: RunningLevel) -> None:
        """Sums and gradients of equal kind are added in one call each."""
        alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for p in level.parameters:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} in level {level.name!r} has a sparse gradient, which "
                    f"cannot be summed over {level.period} steps; make its embedding dense, or give it period 1"
                )
            state = self.state[p]
            if ACCUMULATED not in state:
                dtype = torch.promote_types(p.dtype, torch.float32)
                state[ACCUMULATED] = p.grad.to(dtype, copy=True)
            else:
                sums, gradients = alike[type(p.grad), p.dtype, p.device]
                sums.append(state[ACCUMULATED])
                gradients.append(p.grad)
        for sums, gradients in alike.values():
            torch._foreach_add_(sums, gradients)

    def _accumulate_inputs(self, level: RunningLevel, last: bool) -> None:
        if isinstance(level.optimizer, InputOptimizer):
            for p, inputs in level.optimizer.take_inputs(last).items():
                state = self.state[p]
                state[ACCUMULATED_INPUTS] = (
                    state[ACCUMULATED_INPUTS] + inputs if ACCUMULATED_INPUTS in state else inputs
                )

    def _update(self, level: RunningLevel, steps: int) -> None:
        """Step a level with its sums, which it empties; `p.grad` is afterwards what it was."""
        own = [(p, p.grad) for p in level.parameters]
        inputs: dict[Tensor, Tensor] = {}
        for p, _ in own:
            sums = self.state.pop(p, {})
            if self.reduce == "mean":
                for value in sums.values():
                    value.div_(steps)
            p.grad = sums[ACCUMULATED].to(p.dtype) if ACCUMULATED in sums else None
            if ACCUMULATED_INPUTS in sums:
                inputs[p] = sums[ACCUMULATED_INPUTS]
        watching = level.optimizer if isinstance(level.optimizer, InputOptimizer) else None
        if watching is not None:
            watching.give_inputs(inputs)
        try:
            level.optimizer.step()
        finally:
            for p, gradient in own:
                p.grad = gradient
            if watching is not None:
                watching.layers.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, by the inner optimizers: some forget more than the gradients. The sums stay."""
        for level in self.levels:
            level.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizers' states and groups in PyTorch's layout, with the gradient sums and the counters.

        What an inner optimizer keeps under other keys than its parameters is found under (level, key).
        """
        packed = super().state_dict()
        indices = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        state = {i: dict(values) for i, values in packed["state"].items() if values}
        for level in self.levels:
            inner: dict[Any, Any] = level.optimizer.state  # type: ignore[assignment]  # some keep more than tensors' states
            for key, values in inner.items():
                if not isinstance(key, Tensor):
                    state[level.name, key] = values
                elif values:
                    state[indices[id(key)]] = {**values, **state.get(indices[id(key)], {})}
        return packed | {"state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ValueError: a state of other levels, periods or numbers of parameters, or not one of the inner optimizers'.
                Nothing has changed then.
        """
        groups = list(state_dict["param_groups"])
        found = [(group.get("level"), group.get("level_period")) for group in groups]
        wanted = [(group["level"], group["level_period"]) for group in self.param_groups]
        if found != wanted:
            raise ValueError(
                f"the saved optimizer has the levels (name, period) {_once(found)}, this one has {_once(wanted)}; "
                "make it with the levels of the run that saved it"
            )
        sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in self.param_groups]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the saved optimizer has {sum(sizes[0])} parameters in groups of {sizes[0]}, this one {sum(sizes[1])} "
                f"in groups of {sizes[1]}"
            )
        parts = []
        for level in self.levels:
            own, groups = groups[: len(level.optimizer.param_groups)], groups[len(level.optimizer.param_groups) :]
            parts.append((level, {"state": _state_of(level.name, own, state_dict["state"]), "param_groups": own}))
        for level, part in parts:
            _check(level, part, state_dict["state"])
        self.state = defaultdict(dict)
        for level, part in parts:
            level.optimizer.load_state_dict(part)
            # The inner optimizer would cast the sums to the parameters' type.
            numbers = [i for group in part["param_groups"] for i in group["params"]]
            for number, p in zip(numbers, level.parameters, strict=True):
                for name in SUMS:
                    if (total := state_dict["state"].get(number, {}).get(name)) is not None:
                        dtype = torch.promote_types(p.dtype, torch.float32)
                        self.state[p][name] = total.detach().to(p.device, dtype, copy=True)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the level it names under `level`.

        Raises:
            ValueError: no such level, or one whose gradient sums are under way, which the new group would miss.
        """
        if not self.levels:  # the base class's constructor
            super().add_param_group(param_group)
            return
        named = {level.name: level for level in self.levels}
        level = named.get(str(param_group.get("level")))
        if level is None:
            raise ValueError(f"param_group['level'] names the level to join: one of {', '.join(named)}")
        if level.elapsed:
            raise ValueError(f"level {level.name!r} is {level.elapsed} steps into its period; add the group at its end")
        level.optimizer.add_param_group(param_group)
        first = level.optimizer.param_groups[0]
        kept = {key: first[key] for key in noise_scale.KEYS if key in first}
        level.optimizer.param_groups[-1] |= {"level_period": level.period, "level_elapsed": 0} | kept
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """See `copied_state`: a copy goes on as the original would."""
        return copied_state(self)

    def _share(self) -> None:
        """The inner optimizers' groups are this one's: the same objects."""
        self.param_groups = [group for level in self.levels for group in level.optimizer.param_groups]


def _state_of(name: str, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A level's own part of a saved state, without the sums."""
    found = {key[1]: value for key, value in state.items() if isinstance(key, tuple) and key[0] == name}
    for number in (i for group in groups for i in group["params"]):
        values = {n: value for n, value in state.get(number, {}).items() if n not in SUMS}
        if values:
            found[number] = values
    return found


def _check(level: RunningLevel, part: dict[str, Any], state: Mapping[Any, Any]) -> None:
    """Raise a ValueError unless the level's optimizer could have saved its part, and the sums fit its parameters."""
    optimizer = level.optimizer
    if isinstance(optimizer, MemoryOptimizer):
        optimizer.checked(part)
    else:
        check_state(optimizer, part["state"], layouts(optimizer, part["param_groups"]), exact=False)
    numbers = [i for group in part["param_groups"] for i in group["params"]]
    for number, p in zip(numbers, level.parameters, strict=True):
        shapes = {ACCUMULATED: tuple(p.shape)}
        if isinstance(optimizer, InputOptimizer) and optimizer.layers.watches(p):
            shapes[ACCUMULATED_INPUTS] = optimizer.inputs_shape(p)
        for name in SUMS:
            total = state.get(number, {}).get(name)
            if total is not None and (not isinstance(total, Tensor) or tuple(total.shape) != shapes.get(name)):
                raise ValueError(
                    f"the saved {name!r} of a parameter of shape {tuple(p.shape)} in level {level.name!r} is "
                    f"{tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__}, and not "
                    f"{shapes.get(name, 'there')}; load the state into the optimizer that saved it"
                )


def _check_disjoint(levels: Sequence[RunningLevel]) -> None:
    owner: dict[int, str] = {}
    for level in levels:
        for p in level.parameters:
            if owner.setdefault(id(p), level.name) != level.name:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} stands in the levels {owner[id(p)]!r} and {level.name!r}; "
                    "every parameter belongs to one"
                )


def _once(pairs: Sequence[tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}={period}" for name, period in dict.fromkeys(pairs))
