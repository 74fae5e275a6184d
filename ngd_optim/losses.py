"""The library's own losses, which the optimizers recognise as they recognise those of ``torch.nn.functional``."""

from ngd_optim.own_losses import variational_energy

__all__ = ["variational_energy"]
