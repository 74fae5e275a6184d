"""A recorded program on one vector after another: shortened, laid out in memory of its own, called again and again."""

from ngd_optim.replaying.plan import Plan
from ngd_optim.replaying.recording import Recording

__all__ = ["Plan", "Recording"]
