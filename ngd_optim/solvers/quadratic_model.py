"""The quadratic model of the objective around the current parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuadraticModel:
    """``m(d) = gᵀd + ½ dᵀ(F + W) d``; the linear system adds the damping: ``(F + W + λI) d = b``, ``b = −g``.

    Attributes:
        gradient: ``g``, flat, that of the weight decay included.
        curvature: ``v ↦ F v``, flat to flat, a new tensor at each call.
        decay: ``W``, the weight decay: one number or a flat vector.
        damping: ``λ``, likewise.
        centre: where the damping pulls to, zero if None: ``½ (d − centre)ᵀ λ (d − centre)`` is
            added to ``m``.
        scale: what :meth:`with_damping` multiplies by, flat; None: the identity.
    """

    gradient: Tensor
    curvature: Callable[[Tensor], Tensor]
    decay: float | Tensor
    damping: float | Tensor = 0.0
    centre: Tensor | None = None
    scale: Tensor | None = None

    def with_damping(self, damping: float | Tensor, *, is_first: bool) -> "QuadraticModel":
        """The same with a damping; only at the first attempt it pulls to the centre."""
        damping = damping if self.scale is None else damping * self.scale
        return replace(self, damping=damping, centre=self.centre if is_first else None)

    @property
    def right_side(self) -> Tensor:
        """``b = −g + λ centre``."""
        return -self.gradient if self.centre is None else self.damping * self.centre - self.gradient

    @property
    def shift(self) -> Tensor:
        """``W + λ`` as a flat vector."""
        return torch.zeros_like(self.gradient) + self.decay + self.damping

    def system(self, v: Tensor) -> Tensor:
        """``(F + W + λI) v``."""
        shift = self.decay + self.damping
        product = self.curvature(v)
        return (
            product.addcmul_(shift, v)
            if isinstance(shift, Tensor)
            else product.add_(v, alpha=shift)
        )
