"""TRPO for Stable-Baselines3 on the NaturalCG step, and two that keep to a limit of costs: CPO and TRPOLagrangian."""

from ngd_rl.cpo import CPO, CPOReport
from ngd_rl.lagrangian import TRPOLagrangian
from ngd_rl.recurrent import RecurrentTRPO
from ngd_rl.trpo import NPG, TRPO

__all__ = ["CPO", "NPG", "TRPO", "CPOReport", "RecurrentTRPO", "TRPOLagrangian"]
