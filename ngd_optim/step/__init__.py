"""From a solved system to a step: trust region, line search, damping."""

from ngd_optim.step.damping import Damping, damping_range
from ngd_optim.step.descend import Descent, Outcome
from ngd_optim.step.last_step import Carried
from ngd_optim.step.trust_region import chosen_max_kl

__all__ = ["Carried", "Damping", "Descent", "Outcome", "chosen_max_kl", "damping_range"]
