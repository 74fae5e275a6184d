"""A closure at one point: loss, gradient, and curvature products that were checked."""

from ngd_optim.linearization.checks import Experience, Signature
from ngd_optim.linearization.point import Linearization, Observer, linearize, linearize_mean, unseen

__all__ = ["Experience", "Linearization", "Observer", "Signature", "linearize", "linearize_mean", "unseen"]
