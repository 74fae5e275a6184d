"""Losses of the library's own, which the trace recognises as it recognises those of ``torch.nn.functional``."""

from ngd_optim.own_losses.least_squares import (
    RobustLoss,
    least_squares,
    robust_weight,
    weights_of,
)
from ngd_optim.own_losses.variational_energy import sample_shares, variational_energy

__all__ = [
    "RobustLoss",
    "least_squares",
    "robust_weight",
    "sample_shares",
    "variational_energy",
    "weights_of",
]
