"""What one step leaves for the next: where its conjugate gradients start, and what it compares new data with."""

import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ngd_optim.distributed import ParametersInParts
from ngd_optim.linearization import Point
from ngd_optim.parameters import FlatParameters, forget
from ngd_optim.step.damping import smoothing_factor
from ngd_optim.step.descend import Outcome

_KEPT_ON_NEW_DATA = 0.7
"""Share of the largest diagonal: one that was 1e8 times too large is forgotten in fifty steps."""


class LastStep:
    """The last step, in the optimizer's state.

    That has ``solution``, ``largest_curvature`` and ``lr``, its learning rate, for each parameter.
    The first also has ``slope``, that of the objective along the step at its start, 0 if the step
    was rejected, and ``new_loss``, the loss at its end. If the loss has kinks, it has
    ``smoothing``, how wide they are rounded.

    Args:
        parameters: of the step that is now taken.
        state: the optimizer's.
    """

    def __init__(
        self,
        parameters: FlatParameters | ParametersInParts,
        state: MutableMapping[Tensor, dict[str, Any]],
    ) -> None:
        self._parameters = parameters
        self._state = state
        self._largest: Tensor | None = None

    @property
    def exists(self) -> bool:
        """Whether there was a step."""
        return "solution" in self._first

    @property
    def moved(self) -> bool:
        """Whether there was a step, and it was not rejected."""
        return bool(self._first.get("slope"))

    @property
    def smoothing(self) -> float:
        """How wide kinks are rounded, as a share of their mean size."""
        return self._first.get("smoothing", 1.0)

    def adapt_smoothing(
        self, promised: float, hidden: float, reduction_ratio: float, *, accepted: bool
    ) -> None:
        """After a step of a loss with kinks; see :func:`~ngd_optim.step.damping.smoothing_factor`."""
        value = self.smoothing * smoothing_factor(
            promised, hidden, reduction_ratio, accepted=accepted
        )
        self._state[self._parameters.params[0]]["smoothing"] = min(max(value, 1e-6), 1.0)

    def momentum(self, used: Sequence[bool], factor: float) -> Tensor | None:
        """``factor`` times the last solution; None: no factor, or the last step was rejected."""
        return self.solution(used).mul_(factor) if factor and self.moved else None

    def solution(self, used: Sequence[bool]) -> Tensor:
        """A new flat vector: what the last system was solved by; 0 for parameters that are not used now."""
        return self._parameters.flatten(
            self._of(p).get("solution") if flag else None
            for p, flag in zip(self._parameters.params, used, strict=True)
        )

    def slope_on_new_data(self, point: Point, gradient: Tensor) -> float:
        """That of the objective along the last step ÷ its steepness at that step's start; NaN if the data are the same.

        They are taken for the same where the loss is what it was at the last step's end. Also NaN
        if the step had other parameters. Of a step with a geodesic correction, it is the straight
        one.

        Args:
            point: where the step ended, seen by the data of this one.
            gradient: of the objective there, flat.
        """
        lr = [self._of(p).get("lr", math.nan) for p in self._parameters.params]
        change = abs(point.value - self._first.get("new_loss", 0.0))
        if not self.moved or any(map(math.isnan, lr)) or not point.rounding < change < math.inf:
            return math.nan
        # gᵀd of the new data ÷ |gᵀd| of the old ones.
        return self._along(self.solution(point.used), gradient, lr) / abs(self._first["slope"])

    def largest_curvature(self, diagonal: Tensor, *, forgets: bool) -> Tensor:
        """The largest diagonal so far, flat, with this one, to be kept; what is not finite is left out.

        Only its relative sizes last, for its size is that of the damping: what all diagonals have
        lost is forgotten at once, so that one at least is as large as ever. Beside it a diagonal
        never falls on the same data (Moré 1978). Other data may have had an outlier, which is
        forgotten by and by.
        """
        before = self._parameters.flatten(
            self._of(p).get("largest_curvature") for p in self._parameters.params
        )
        if forgets:
            before = _KEPT_ON_NEW_DATA * before
        diagonal = diagonal.where(diagonal.isfinite(), 0.0)
        largest = torch.maximum(before, diagonal)
        left = (diagonal / largest).nan_to_num(0.0).amax()
        self._largest = torch.where(left > 0, left, 1.0) * largest
        return self._largest

    def keep(self, outcome: Outcome, new_loss: float, lr: Sequence[float]) -> None:
        """For the next step; ``lr`` is one per group."""
        # Some may be of a step that had other parameters, or began with another one.
        forget(self._state, ("slope", "new_loss", "lr"))
        x, moved, rates = (
            outcome.solution.solution,
            outcome.trial.accepted,
            self._parameters.by_parameter(lr),
        )
        self._write("solution", x)
        if self._largest is not None:
            self._write("largest_curvature", self._largest)
        for p, rate in zip(self._parameters.params, rates, strict=True):
            self._state[p]["lr"] = rate
        self._state[self._parameters.params[0]] |= {
            "slope": outcome.step.slope_of_solution if moved else 0.0,
            "new_loss": new_loss if moved else 0.0,
        }

    @property
    def _first(self) -> dict[str, Any]:
        return self._of(self._parameters.params[0])

    def _of(self, p: Tensor) -> dict[str, Any]:
        return self._state.get(p, {})  # the state is made where it is written to

    def _along(self, solution: Tensor, gradient: Tensor, lr: Sequence[float]) -> float:
        # The host waits, on new data: the damping of this step depends on it.
        return torch.dot(self._parameters.repeat(lr) * solution, gradient).item()

    def _write(self, name: str, flat: Tensor) -> None:
        for p, part in zip(self._parameters.params, self._parameters.to_state(flat), strict=True):
            self._state[p][name] = part
