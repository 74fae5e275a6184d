"""What NaturalCG says once in its logger, of a run that another optimizer or another setting would serve better."""

import logging
import math
from dataclasses import dataclass, replace

from ngd_optim.linearization import Point
from ngd_optim.report import StepReport
from ngd_optim.step import Outcome

logger = logging.getLogger("ngd_optim")

_STREAM = 20
"""So many steps in a row with other data each time are taken for an endless stream."""


@dataclass(frozen=True)
class Advice:
    """What has been said so far. A step replaces it, and a step that raises leaves the old one."""

    on_stream: int = 0
    """How many steps in a row had other data than the one before."""
    has_told_of_streams: bool = False
    has_told_of_damping: bool = False

    def after(self, report: StepReport, outcome: Outcome, point: Point) -> "Advice":
        """Say what one step shows."""
        return self._on_streams(report, point)._on_damping(report, outcome, point)

    def _on_streams(self, report: StepReport, point: Point) -> "Advice":
        """Which optimizer is made for a stream of batches."""
        has_own_batches = not (point.is_least_squares or point.is_estimated)
        is_on_stream = not math.isnan(report.new_slope) and point.kind == "ggn" and has_own_batches
        if not is_on_stream:
            return replace(self, on_stream=0)
        if self.on_stream + 1 < _STREAM or self.has_told_of_streams:
            return replace(self, on_stream=self.on_stream + 1)
        logger.warning(
            "each of the last %d steps had other data: for a stream of small batches "
            "ngd_optim.KFAC is made, whose step costs little more than a gradient; NaturalCG is "
            "for batches that are large, or come again. If the data are the same and dropout makes "
            "them differ, switch it off by model.eval(): a step fits one mask as it fits data",
            _STREAM,
        )
        return replace(self, on_stream=self.on_stream + 1, has_told_of_streams=True)

    def _on_damping(self, report: StepReport, outcome: Outcome, point: Point) -> "Advice":
        """Where the damping, which has the loss's unit, makes steps too short to be judged."""
        # A step that is undone, as if its data had not been there, shows nothing.
        is_unjudged = math.isnan(report.reduction_ratio) and not outcome.trial.forgets
        if self.has_told_of_damping or report.converged or not is_unjudged:
            return self
        if not outcome.is_held_by_damping(point.rounding):
            return self
        logger.warning(
            "steps are too short for the loss to show whether they are right, because damping=%g "
            "outweighs the curvature: λ has the unit of the loss, here %.3g, and stays where it is; "
            "scale the loss to the order of 1, or set damping to a tenth of its scale and "
            "min_damping to 0",
            report.damping,
            report.loss,
        )
        return replace(self, has_told_of_damping=True)
