"""Linearise a closure to look at it, and compare what it gives with differences."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngd_optim.distributed import ALONE
from ngd_optim.kernels import twice_differentiable
from ngd_optim.linearization import Observer, Point, linearize_mean
from ngd_optim.names import BackendChoice, Curvature
from ngd_optim.parameters import FlatParameters, name_parameters
from ngd_optim.shown import show
from ngd_optim.testing.surroundings import Listener, nothing_changes
from ngd_optim.tracing import TracedClosure

_DIFFERENT = 0.01
"""A slope that is off by this part is another one."""


class RefusedError(Exception):
    """A closure cannot be linearised; the message is the library's."""


@dataclass(frozen=True)
class Subject:
    """A closure that is being checked.

    Attributes:
        point: where the parameters are.
        run: the closure.
        parameters: what it is a function of.
        names: of these.
        heard: what the library has logged.
        generator: draws the random vectors.
    """

    point: Point
    run: TracedClosure
    parameters: FlatParameters
    names: list[str]
    heard: Listener
    generator: torch.Generator

    def draw(self) -> Tensor:
        """A random flat vector."""
        g = self.point.gradient
        return torch.randn(g.shape, generator=self.generator, device=self.generator.device).to(g)


@contextmanager
def examined(
    closure: Callable[[], Any],
    params: Iterable[Any],
    curvature: Curvature,
    backend: BackendChoice,
    generator: torch.Generator | None,
    observe: Callable[[FlatParameters], Observer] | None = None,
) -> Iterator[Subject]:
    """Linearise a closure; after the block everything is as it was before.

    Args:
        closure: any that ``step`` takes.
        params: as for :func:`name_parameters`.
        curvature: the setting of that name.
        backend: likewise.
        generator: draws the random vectors; None: one of its own.
        observe: gives what sees the metric.

    Raises:
        RefusedError: the library refuses it.
        Exception: whatever the closure raises.
    """
    if not callable(closure):
        raise TypeError(
            f"closure must be a function that computes the loss, without arguments, got {show(closure)}"
        )
    parameters, names = name_parameters(params)
    raised: list[BaseException] = []

    def noted() -> Any:
        try:
            return closure()
        except BaseException as error:
            raised.append(error)
            raise

    run, heard = TracedClosure(noted, parameters), Listener()
    generator = generator or torch.Generator(device="cpu").manual_seed(0)
    with nothing_changes(parameters), heard.listening():
        try:
            try:
                with twice_differentiable():
                    observer = None if observe is None else observe(parameters)
                    point = linearize_mean(
                        parameters, curvature, backend, {}, ALONE, [run], observer
                    )
            except (TypeError, ValueError, RuntimeError) as error:
                if error in raised:
                    raise
                raise RefusedError(str(error)) from error
            with twice_differentiable(recomputes=run.recomputes):
                yield Subject(point, run, parameters, names, heard, generator)
        finally:
            run.rewind()


def relative(error: Tensor, size: Tensor) -> float:
    """``‖error‖ / ‖size‖``, 0 if there is no error."""
    missed, whole = error.norm().item(), size.norm().item()
    return missed / whole if whole else math.inf if missed else 0.0


def compare_slopes(
    subject: Subject, measure: Callable[[], float], direction: Tensor, slope: float
) -> tuple[float | None, bool]:
    """By how much differences of a loss along a direction differ from its slope, and whether it is another one.

    The error is relative; None where nobody can tell.
    """
    theta = subject.parameters.read()
    eps = torch.finfo(subject.point.loss.dtype).eps
    h = max(eps ** (1 / 3) * theta.norm().item(), eps**0.5) / direction.norm().item()
    slopes: list[float] = []
    # Rounding falls with the length, and what is not linear grows.
    for length in (h, 4 * h, 16 * h):
        ends: list[float] = []
        for side in (length, -length):
            with subject.parameters.displaced(theta, direction, side):
                ends.append(measure())
        slopes.append((ends[0] - ends[1]) / (2 * length))
    if not all(map(math.isfinite, slopes)) or not slope:
        return None, False
    error = min(abs(one - slope) for one in slopes)
    noise = 3 * (max(slopes) - min(slopes))
    return error / abs(slope), error > max(_DIFFERENT * abs(slope), noise)
