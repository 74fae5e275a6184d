"""From a solved system to a step: trust region, line search, damping."""

from ngd_optim.step.damping import Damping
from ngd_optim.step.descend import Descent, Outcome
from ngd_optim.step.last_step import LastStep
from ngd_optim.step.trust_region import choose_max_kl

__all__ = ["Damping", "Descent", "LastStep", "Outcome", "choose_max_kl"]
