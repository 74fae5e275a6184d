"""Gradients that a closure computes itself, by ``backward`` or by hand."""

import math

import torch
from torch import Tensor

from ngd_optim.autograd_graph import leaves
from ngd_optim.layout import whole
from ngd_optim.parameters import FlatParameters
from ngd_optim.torch_internals import version_of


class GradientAccumulation:
    """Carries out ``backward`` while a closure runs, so that it finds ``.grad`` as torch leaves it.

    Args:
        parameters: whose gradients they are.

    Attributes:
        total: the sum of what was computed since the closure last cleared the gradients, flat; None
            if nothing was.
        roots: what that is the gradient of. What depends on none of the parameters is no part of
            it: an attack on the inputs, the step of another optimizer.
    """

    def __init__(self, parameters: FlatParameters) -> None:
        self._parameters = parameters
        self._found = [(p.grad, _version(p.grad)) for p in parameters.tensors]
        self._before: list[Tensor | None] = []
        self.total: Tensor | None = None
        self.roots: list[Tensor] = []
        self._called_on: list[Tensor] = []

    def add(self, root: Tensor) -> list[Tensor]:
        """Differentiate a scalar, whose graph is kept, and give the roots that count from then on."""
        params = self._parameters.tensors
        self._called_on.append(root)
        now = [p.grad for p in params]
        for p in params:
            p.grad = None
        root.backward(retain_graph=True)
        new = [p.grad for p in params]
        for p, old in zip(params, now, strict=True):
            if old is not None:
                p.grad = old if p.grad is None else old + p.grad
        if all(g is None for g in new):
            return self.roots
        if self.total is None or not any(g is not None and g.any() for g in now):
            self.total, self.roots, self._before = None, [], now  # else it adds to what is there
        flat = self._parameters.flatten(new)
        self.total = flat if self.total is None else self.total + flat
        self.roots = [*self.roots, root]
        return self.roots

    def was_cleared(self) -> bool:
        """Whether the closure cleared the gradients, and computed none since."""
        left = [p.grad for p in self._parameters.tensors]
        return (
            self.total is not None
            and not any(g is not None and g.any() for g in left)
            and bool(self.total.any())
        )

    def forget(self) -> None:
        """Let nothing count that was computed so far."""
        self.total, self.roots = None, []

    def adopt(self, loss: Tensor) -> None:
        """After the run: gradients that the closure set itself must be those of its loss as well."""
        if self._called_on or not loss.requires_grad:
            return
        left = [p.grad for p in self._parameters.tensors]
        is_set = any(
            g is not None and not (g is old and _version(g) == version) and bool(g.any())
            for g, (old, version) in zip(left, self._found, strict=True)
        )
        if not is_set:
            return
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                loss, self._parameters.tensors, retain_graph=True, allow_unused=True
            )
        self.total, self.roots = self._parameters.flatten(gradients), [loss]
        self._before = [None] * len(left)

    def find_others(self) -> list[Tensor]:
        """The tensors whose ``.grad`` it set, beside the parameters."""
        reached = {id(t): t for root in self._called_on for t in leaves(root)}
        for p in self._parameters.tensors:
            reached.pop(id(p), None)
        return list(reached.values())

    def finish(self) -> list[Tensor | None]:
        """After the run: put ``.grad`` to where it was before what counts, and return that.

        Raises:
            RuntimeError: the closure changed the gradients after ``backward``.
        """
        params = self._parameters.tensors
        if self.total is None:
            return [p.grad for p in params]
        left = [p.grad for p in params]
        for p, old in zip(params, self._before, strict=True):
            p.grad = old
        expected = self._parameters.unflatten(self.total)
        difference = total = 0.0
        for found, old, new in zip(left, self._before, expected, strict=True):
            right = new if old is None else old + new
            # It may clear them again.
            if found is None or torch.equal(found, right):
                continue
            found, right = whole(found), whole(right)
            difference += (found - right).norm().item() ** 2
            total += right.norm().item() ** 2
        if difference > 1e-10 * total:
            raise RuntimeError(
                "the closure changes the gradients after backward, by "
                f"{math.sqrt(difference / total):.2g} (relative): a step is made for a loss, and "
                "they are no longer the gradient of one; use max_kl, the trust region, in place of "
                "clipping, and write all that is to be minimised into the loss"
            )
        return self._before


def _version(gradient: Tensor | None) -> int:
    return 0 if gradient is None else version_of(gradient)
