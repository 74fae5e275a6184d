"""The quadratic model of the objective around the current parameters."""

from collections.abc import Callable
from dataclasses import dataclass

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
    """

    gradient: Tensor
    curvature: Callable[[Tensor], Tensor]
    decay: float | Tensor
    damping: float | Tensor
    centre: Tensor | None = None

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


@dataclass(frozen=True)
class UndampedModel:
    """That model before its damping is known, which a step may raise and solve again.

    Attributes:
        gradient: ``g``, flat, that of the weight decay included.
        curvature: ``v ↦ F v``.
        decay: ``W``.
        scale: what ``λ`` is multiplied by, flat; None: the identity.
        centre: where the damping pulls to at the first attempt; None: to zero.
    """

    gradient: Tensor
    curvature: Callable[[Tensor], Tensor]
    decay: float | Tensor
    scale: Tensor | None
    centre: Tensor | None

    def with_damping(self, damping: float | Tensor, *, is_first: bool) -> QuadraticModel:
        """The model with a damping; at later attempts than the first one it pulls to zero."""
        damping = damping if self.scale is None else damping * self.scale
        return QuadraticModel(
            self.gradient, self.curvature, self.decay, damping, self.centre if is_first else None
        )
