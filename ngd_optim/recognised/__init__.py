"""The losses that the trace recognises: their outputs, and the Hessian that each has there."""

from ngd_optim.recognised.parabolas import flat_share, irls_weight
from ngd_optim.recognised.table import LOSSES, LossCall, call_loss

__all__ = ["LOSSES", "LossCall", "call_loss", "flat_share", "irls_weight"]
