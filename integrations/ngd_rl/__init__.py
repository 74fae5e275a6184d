"""TRPO for Stable-Baselines3 on the NaturalCG step, and CPO, which keeps to a limit of costs."""

from ngd_rl.cpo import CPO, CPOReport
from ngd_rl.recurrent import RecurrentTRPO
from ngd_rl.trpo import NPG, TRPO

__all__ = ["CPO", "NPG", "TRPO", "CPOReport", "RecurrentTRPO"]
