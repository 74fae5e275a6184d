"""A closure at one point: loss, gradient, and curvature products that were checked."""

from ngd_optim.linearization.linearization import Linearization, linearize
from ngd_optim.linearization.point import Learnt, Observer, Point, linearize_mean

__all__ = ["Learnt", "Linearization", "Observer", "Point", "linearize", "linearize_mean"]
