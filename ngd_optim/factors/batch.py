"""One closure's pull-backs: what they show of each layer, and which samples the rows belong to."""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ngd_optim.curvature import OutputMetric
from ngd_optim.jacobian import Layer, Use, uses_of
from ngd_optim.kronecker import draw
from ngd_optim.parameters import FlatParameters

logger = logging.getLogger("ngd_optim")

Sides = tuple[Tensor, Tensor]
"""Of one use: ``l`` and ``r``, (groups, n, rows) and (groups, n, columns); of a table ``l`` has indices."""

_EITHER_WAY = "form the factors with sharing='expand' and eigenvalues=False"


class Pulled(NamedTuple):
    """What one ``u`` at the outputs shows.

    Attributes:
        sides: of each layer's uses.
        outside: the gradients of parameters that are in no layer.
    """

    sides: dict[Layer, list[Sides]]
    outside: dict[int, Tensor]


class _Layout(NamedTuple):
    """How the rows of a use are arranged.

    Attributes:
        samples_first: whether all rows of a sample stand together; else all samples of a position.
        back: which of both sides comes from the pull-back.
    """

    samples_first: bool
    back: int


class Batch:
    """A closure's graph, pulled back as often as the metric has columns, or as random vectors are drawn.

    Args:
        metric: of the closure, with its graph.
        parameters: what the factors are for.
        size: the curvature counts so many times in the mean.
        draws: how many random vectors; None: all columns of the metric's root.
        generator: draws.
    """

    def __init__(
        self,
        metric: OutputMetric,
        parameters: FlatParameters,
        size: float,
        draws: int | None,
        generator: torch.Generator,
    ) -> None:
        self._metric, self._parameters = metric, parameters
        self._size, self._draws, self._generator = size, draws, generator
        self._uses = uses_of(metric.outputs, parameters.tensors, tables=True)
        inside = {i for use in self._uses for i in (use.layer.weight, use.layer.bias)}
        self._outside = [i for i in range(len(parameters.tensors)) if i not in inside]

    def pull(self) -> Iterator[Pulled]:
        """What each ``u`` shows; ``Σ u uᵀ`` is the metric, in the mean over draws."""
        for u in self._columns() if self._draws is None else self._drawn(self._draws):
            yield self._pull([self._size**0.5 * part for part in u])

    @torch.no_grad()
    def _pull(self, u: Sequence[Tensor]) -> Pulled:
        params = self._parameters.tensors
        inputs: Any = [*(GradientEdge(use.node, 0) for use in self._uses)]
        inputs += [params[i] for i in self._outside]
        found = self._gradients(inputs, u)
        sides: dict[Layer, list[Sides]] = {}
        for use, gradient in zip(self._uses, found, strict=False):
            sides.setdefault(use.layer, []).append(self._sides(use, gradient))
        rest = found[len(self._uses) :]
        outside = {
            i: torch.zeros_like(params[i]) if gradient is None else gradient
            for i, gradient in zip(self._outside, rest, strict=True)
        }
        return Pulled(sides, outside)

    def _gradients(self, inputs: Any, u: Sequence[Tensor]) -> Sequence[Tensor | None]:
        if not inputs:
            return ()
        outputs = self._metric.outputs
        u = [part.to(z.dtype) for part, z in zip(u, outputs, strict=True)]
        return torch.autograd.grad(outputs, inputs, u, retain_graph=True, allow_unused=True)

    def _sides(self, use: Use, gradient: Tensor | None) -> Sides:
        gradient = use.zeros() if gradient is None else gradient
        left, right = use.sides(gradient, self._parameters.dtype)
        return left.detach(), right.detach()

    # What is pulled back.

    def _drawn(self, count: int) -> Iterator[list[Tensor]]:
        for _ in range(count):
            drawn = draw(self._metric, self._generator)
            yield [part / math.sqrt(count) for part in drawn]

    def _columns(self) -> Iterator[list[Tensor]]:
        """Columns of ``H_z^½``, of all samples at once, with random signs.

        A sample's sign is no matter to products of its rows with themselves, and keeps samples apart
        where a parameter's gradient is summed over them.
        """
        outputs = self._metric.outputs
        powers = self._metric.powers(self._parameters.dtype)
        if powers is None:
            raise ValueError(
                "the metric at the model's outputs is not positive semidefinite, and has no Kronecker "
                "factors; use curvature='ggn' with a convex loss, or return (loss, distribution)"
            )
        halves, _ = powers
        zeros = [z.new_zeros(z.shape, dtype=self._parameters.dtype) for z in outputs]
        if len(halves) != len(outputs) or any(
            _components(z) % half.shape[1] for z, half in zip(outputs, halves, strict=True)
        ):
            (whole,) = halves  # samples depend on each other
            for column in whole[0].T:
                parts = column.split([z.numel() for z in outputs])
                yield [part.view(z.shape) for part, z in zip(parts, outputs, strict=True)]
            return
        for k, (z, half) in enumerate(zip(outputs, halves, strict=True)):
            count, size, components = _samples(z), half.shape[1], _components(z)
            blocks = half.view(count, components // size, size, size)
            for i in range(components // size):
                for j in range(size):
                    u = half.new_zeros(count, components // size, size)
                    u[:, i] = blocks[:, i, :, j] * self._signs(count, u).unsqueeze(1)
                    yield [*zeros[:k], u.view(z.shape), *zeros[k + 1 :]]

    def _signs(self, count: int, like: Tensor) -> Tensor:
        drawn = torch.randint(
            0, 2, (count,), generator=self._generator, device=self._generator.device
        )
        return (2 * drawn - 1).to(like)

    # Which samples rows belong to.

    @cached_property
    def _count(self) -> int:
        counts = {_samples(z) for z in self._metric.outputs}
        if len(counts) > 1:
            raise ValueError(
                f"the outputs have different numbers of samples, {sorted(counts)}, so that rows of a "
                f"layer cannot be told apart; {_EITHER_WAY}"
            )
        return counts.pop()

    @cached_property
    @torch.no_grad()
    def _layouts(self) -> list[_Layout]:
        """Of each use, from two pull-backs: in the second each sample has a weight of its own."""
        count, outputs = self._count, self._metric.outputs
        inputs: Any = [GradientEdge(use.node, 0) for use in self._uses]
        drawn = draw(self._metric, torch.Generator(device="cpu").manual_seed(0))
        weights = 1 + torch.arange(count, device=outputs[0].device) / count
        weighted = [
            (weights.to(u).view(-1, *[1] * (u.ndim - 1)) if u.ndim else weights.to(u)[0]) * u
            for u in drawn
        ]
        layouts: list[_Layout] = []
        pairs = zip(self._gradients(inputs, drawn), self._gradients(inputs, weighted), strict=True)
        for use, (own, other) in zip(self._uses, pairs, strict=True):
            layouts.append(self._layout(use, own, other, weights))
        return layouts

    def _layout(
        self, use: Use, own: Tensor | None, other: Tensor | None, weights: Tensor
    ) -> _Layout:
        plain, weighted = self._sides(use, own), self._sides(use, other)
        back = 1 if torch.equal(plain[0], weighted[0]) else 0
        rows, expected = plain[back], weighted[back]
        most = torch.finfo(rows.dtype).eps ** 0.5 * expected.norm()
        for samples_first in (True, False):
            positions, rest = divmod(rows.shape[1], len(weights))
            if rest:
                break
            w = weights.to(rows)
            spread = w.repeat_interleave(positions) if samples_first else w.repeat(positions)
            if (rows * spread.unsqueeze(1) - expected).norm() <= most:
                return _Layout(samples_first, back)
        raise ValueError(
            "rows of a layer belong to several samples, or stand in an order that does not tell which, as "
            f"where samples share statistics (BatchNorm in train mode); {_EITHER_WAY}, or use eval()"
        )

    def _by_samples(self, layer: Layer, uses: Sequence[Sides]) -> list[tuple[Sides, _Layout]]:
        layouts = [
            layout
            for use, layout in zip(self._uses, self._layouts, strict=True)
            if use.layer == layer
        ]
        return [
            ((self._arrange(back, layout), self._arrange(into, layout)), layout)
            for (back, into), layout in zip(uses, layouts, strict=True)
        ]

    def _arrange(self, rows: Tensor, layout: _Layout) -> Tensor:
        """(groups, n, size) → (groups, samples, positions, size)."""
        if layout.samples_first:
            return rows.unflatten(1, (self._count, -1))
        return rows.unflatten(1, (-1, self._count)).transpose(1, 2)

    def join(self, layer: Layer, uses: Sequence[Sides]) -> Sides:
        """Both sides of all uses, by samples: (groups, samples, positions, size)."""
        arranged = [sides for sides, _ in self._by_samples(layer, uses)]
        back, into = (torch.cat(side, 2) for side in zip(*arranged, strict=True))
        return back, into

    def reduce(self, layer: Layer, uses: Sequence[Sides]) -> Sides:
        """Gradients summed, and inputs averaged, over the positions of each sample: (groups, samples, size)."""
        backs = {layout.back for _, layout in self._by_samples(layer, uses)}
        sides = self.join(layer, uses)
        if len(backs) > 1:
            raise ValueError(f"a weight is used as it is and transposed; {_EITHER_WAY}")
        (back,) = backs
        left, right = (side.sum(2) if i == back else side.mean(2) for i, side in enumerate(sides))
        return left, right

    @torch.no_grad()
    def warn_of_other_uses(self, names: Sequence[str]) -> None:
        """Say which weights the graph also uses in ways that their blocks leave out."""
        params = self._parameters.tensors
        drawn = draw(self._metric, torch.Generator(device="cpu").manual_seed(0))
        layers = list(dict.fromkeys(use.layer for use in self._uses))
        whole = self._gradients([params[layer.weight] for layer in layers], drawn)
        sides = self._pull(drawn).sides
        for layer, gradient in zip(layers, whole, strict=True):
            if gradient is None or not sides[layer][0][0].is_floating_point():
                continue
            matrix = sum(back.mT @ into for back, into in sides[layer])
            weight, _ = layer.split(matrix)  # pyright: ignore[reportArgumentType]
            found = weight.reshape(gradient.shape).to(gradient.dtype)
            if (found - gradient).norm() > 0.01 * gradient.norm():
                logger.warning(
                    "%s is also used in another way than in matrix products, and its block of the "
                    "curvature leaves that out",
                    names[layer.weight],
                )


def _samples(z: Tensor) -> int:
    return z.shape[0] if z.ndim else 1


def _components(z: Tensor) -> int:
    return z.numel() // max(1, _samples(z))
