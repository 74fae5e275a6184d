"""TRPO for Stable-Baselines3 on the NaturalCG step."""

from ngd_rl.recurrent import RecurrentTRPO
from ngd_rl.trpo import NPG, TRPO

__all__ = ["NPG", "TRPO", "RecurrentTRPO"]
