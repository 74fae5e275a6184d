"""Which solver a step takes."""

import logging

import torch
from torch import Tensor

from ngd_optim.linearization import Point
from ngd_optim.names import SolverName
from ngd_optim.solvers.direct import LeastSquares, Matrix, SampleSpace, tell_if_long
from ngd_optim.solvers.solver import Solver

logger = logging.getLogger("ngd_optim")

_FEW = 4096
"""Direct solvers are chosen for so many unknowns at most: parameters or outputs, whichever are fewer."""

_LARGEST_JACOBIAN = 2**30
"""And for a Jacobian of so many bytes at most."""

_LARGEST_MATRIX = 2**35
"""Bytes. Where they are asked for, they refuse what needs a larger matrix."""

_NEEDS_OUTPUTS = (
    "needs one closure in one process, with a recognised loss function or a returned "
    "distribution: no other loss, no scalar KL, no list of closures, and no penalty on the "
    "weights within the loss (weight_decay is allowed)"
)

_NOT_SEMIDEFINITE = (
    "the metric at the model's outputs is not positive semidefinite; use solver='cg' with "
    "damping_scale='identity'"
)


def build_solver(name: SolverName, point: Point, conjugate_gradients: Solver) -> Solver:
    """The solver of a step.

    ``"auto"`` is a direct solver for :func:`~ngd_optim.least_squares`, where the step is only as
    good as the solution: ``"dense"``, or ``"sample"`` where there are fewer outputs than
    parameters. It is ``"cg"`` for every other loss, and for what is too large.

    Args:
        name: the setting.
        point: where the step begins.
        conjugate_gradients: the solver that is ``"cg"``.

    Raises:
        ValueError: ``"sample"`` is asked for and the metric does not live at the outputs of one
            model; or a direct solver that needs too large a matrix.
    """
    if name == "sample" and not point.outputs:
        raise ValueError(f"solver='sample' {_NEEDS_OUTPUTS}; else use 'cg'")
    if not point.is_finite:
        return conjugate_gradients  # which say so
    if name == "auto":
        name = _choose_automatically(point)
    if name == "cg":
        return conjugate_gradients
    try:
        return _direct_solver(name, point)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        # Numbers at the end of the range, which conjugate gradients tell of.
        logger.warning("conjugate gradients solve in place of %r: %s", name, error)
        return conjugate_gradients


def _choose_automatically(point: Point) -> SolverName:
    m, n = point.outputs, point.parameters.size
    # A direct solve takes few³ operations, and its Jacobian m·n numbers.
    few = n if not m else min(m, n)
    bytes_needed = point.gradient.element_size() * n * (m or n)
    if not point.is_least_squares or few > _FEW or bytes_needed > _LARGEST_JACOBIAN:
        return "cg"
    return "sample" if m and m < n else "dense"


def _direct_solver(name: SolverName, point: Point) -> Solver:
    m, n, size = point.outputs, len(point.gradient), point.gradient.element_size()
    needed = size * (n * n if name == "dense" else m * max(m, n))
    if needed > _LARGEST_MATRIX:
        other = "'sample' or 'cg'" if name == "dense" and 0 < m < n else "'cg'"
        raise ValueError(
            f"solver={name!r} needs a matrix of {needed / 2**30:,.0f} GiB for {n:,} parameters and "
            f"{m:,} outputs; use solver={other}"
        )
    # Of more outputs than that the matrix comes from n products, a row at a time.
    most = _LARGEST_MATRIX if point.is_least_squares or name == "sample" else _LARGEST_JACOBIAN
    root = point.square_root() if m and size * m * n <= most else None
    if root is not None:
        tell_if_long(name, 2 * m * n * min(m, n), point.gradient)
        return SampleSpace(root) if name == "sample" else LeastSquares(root)
    if name == "sample":
        raise ValueError(_NOT_SEMIDEFINITE)
    return Matrix(point.product, point.gradient)


def curvature_diagonal(solver: Solver, point: Point) -> Tensor:
    """The diagonal of ``F``, exactly.

    Raises:
        ValueError: neither the solver knows it nor the outputs tell.
    """
    if solver.diagonal is not None:
        return solver.diagonal
    if not point.outputs:
        raise ValueError(
            f"damping_scale='diagonal' {_NEEDS_OUTPUTS}, or solver='dense'; else use 'identity'"
        )
    root = point.square_root()
    if root is None:
        raise ValueError(_NOT_SEMIDEFINITE)
    return root.rows.square().sum(0)
