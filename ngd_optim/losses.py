"""The library's own losses, which the optimizers recognise as they recognise those of ``torch.nn.functional``."""

from ngd_optim.tracing import least_squares as least_squares  # which the package itself offers
from ngd_optim.tracing import variational_energy

__all__ = ["variational_energy"]
