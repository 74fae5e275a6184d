"""What one step leaves for the next: where its conjugate gradients start, and what it compares new data with."""

import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ngd_optim.damping import SeenByNewData
from ngd_optim.descent import Outcome
from ngd_optim.linearization import Linearization
from ngd_optim.parameters import FlatParameters
from ngd_optim.report import StepReport


class Carried:
    """The last step, in the optimizer's state.

    That has ``solution`` and ``largest_curvature`` for each parameter; for the first also ``slope``, that of the
    objective along the solution at the step's start, 0 where it was rejected, and ``loss`` and ``new_loss``, the loss
    at its start and at its end.

    Args:
        parameters: of the step that is now taken.
        state: the optimizer's.
    """

    def __init__(self, parameters: FlatParameters, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        self._parameters = parameters
        self._state = state

    @property
    def moved(self) -> bool:
        """Whether there was a step, and it was not rejected."""
        return self._number("slope") != 0

    def solution(self, used: Sequence[bool]) -> Tensor:
        """A new flat vector: what the last system was solved by; 0 for parameters that are not used now."""
        return self._parameters.flatten(
            self._state[p].get("solution") if flag else None
            for p, flag in zip(self._parameters.tensors, used, strict=True)
        )

    def seen_by_new_data(self, point: Linearization, gradient: Tensor, lr: Sequence[float]) -> SeenByNewData | None:
        """What this step's data say of the last step; None if they are that step's own, or if there was none.

        They are taken for its own where the loss is what it was at that step's end.

        Args:
            point: where the step ended, seen by the data of this one.
            gradient: of the objective there, flat.
            lr: one per group.
        """
        start, end, now = self._number("loss"), self._number("new_loss"), point.loss.item()
        if not self.moved or not 100 * point.rounding < abs(now - end) < math.inf:
            return None
        slope = self._along(self.solution(point.used), gradient, lr) / abs(self._number("slope"))
        return SeenByNewData(slope, share=(start - now) / (start - end) if start > end else 0.0)

    def largest_curvature(self, diagonal: Tensor) -> Tensor:
        """The largest diagonal so far, flat, with this one, which is kept; what is not finite is left out."""
        before = self._parameters.flatten(self._state[p].get("largest_curvature") for p in self._parameters.tensors)
        largest = torch.maximum(before, diagonal.where(diagonal.isfinite(), 0.0))
        self._write("largest_curvature", largest)
        return largest

    def keep(self, outcome: Outcome, report: StepReport, lr: Sequence[float]) -> None:
        """For the next step."""
        x, moved = outcome.solution.solution, outcome.trial.accepted
        self._write("solution", x)
        self._state[self._parameters.tensors[0]] |= {
            "slope": self._along(x, outcome.model.gradient, lr) if moved else 0.0,
            "loss": report.loss if moved else 0.0,
            "new_loss": report.new_loss if moved else 0.0,
        }

    def _along(self, solution: Tensor, gradient: Tensor, lr: Sequence[float]) -> float:
        return torch.dot(gradient, self._parameters.spread(lr) * solution).item()

    def _number(self, name: str) -> float:
        return self._state[self._parameters.tensors[0]].get(name, 0.0)

    def _write(self, name: str, flat: Tensor) -> None:
        for p, part in zip(self._parameters.tensors, self._parameters.unflatten(flat), strict=True):
            self._state[p][name] = part
