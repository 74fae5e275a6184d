"""The settings of NaturalCG: what is allowed, and which of them hold for the whole step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, get_args

from torch import Tensor

from ngd_optim.names import (
    BackendChoice,
    Curvature,
    DampingLimit,
    DampingScale,
    MaxKL,
    PreconditionerName,
    SolverName,
    TrustRegion,
)
from ngd_optim.preconditioners import Diagonal, Nystrom, Preconditioner

PER_GROUP = ("lr", "damping", "weight_decay")
"""Settings that may differ between parameter groups."""


@dataclass(frozen=True)
class Settings:
    """The settings of one step. What each means is in the docstring of :class:`~ngd_optim.NaturalCG`.

    ``lr``, ``damping`` and ``weight_decay`` have one number for each parameter group.
    """

    lr: tuple[float, ...]
    damping: tuple[float, ...]
    weight_decay: tuple[float, ...]
    max_kl: MaxKL
    trust_region: TrustRegion
    adapt_damping: bool
    min_damping: DampingLimit
    max_damping: DampingLimit
    max_cg_iters: int
    cg_tol: float
    cg_progress_tol: float
    warm_start: float
    preconditioner: Preconditioner
    max_backtracks: int
    backtrack_ratio: float
    curvature: Curvature
    backend: BackendChoice
    solver: SolverName
    damping_scale: DampingScale
    momentum: float
    geodesic: bool

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]]) -> "Settings":
        """Those of some parameter groups.

        Raises:
            ValueError: the groups disagree on a setting that holds for the whole step.
        """
        values: dict[str, Any] = {}
        for name in _ALLOWED:
            of_groups = [group[name] for group in groups]
            if name in PER_GROUP:
                values[name] = tuple(map(float, of_groups))
                continue
            if any(value != of_groups[0] for value in of_groups):
                raise ValueError(
                    f"{name} holds for the whole step, so all parameter groups must agree on it, "
                    f"got {of_groups}; only {', '.join(PER_GROUP)} may differ"
                )
            values[name] = of_groups[0]
        return cls(**values)


def _number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real or (isinstance(value, Tensor) and value.numel() == 1)


def _count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _at_least_zero(value: Any) -> bool:
    return _number(value) and 0 <= value < math.inf


def _one_of(kind: Any) -> tuple[Callable[[Any], bool], str]:
    names = get_args(kind)
    return lambda value: value in names, f"one of {', '.join(map(repr, names))}"


def _preconditioner(value: Any) -> bool:
    is_name = isinstance(value, str) and value in get_args(PreconditionerName)
    is_function = callable(value) and not isinstance(value, type)
    return value is None or is_name or is_function or isinstance(value, Diagonal | Nystrom)


_FINITE = (_at_least_zero, "a finite number, at least 0")
_FLAG = (lambda v: isinstance(v, bool), "True or False")
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _FINITE,
    "max_kl": (
        lambda v: v is None or v == "auto" or (_number(v) and 0 < v < math.inf),
        "a finite number above 0, None or 'auto'",
    ),
    "trust_region": _one_of(TrustRegion),
    "damping": _FINITE,
    "adapt_damping": _FLAG,
    "min_damping": (
        lambda v: v == "auto" or _at_least_zero(v),
        "a finite number, at least 0, or 'auto'",
    ),
    "max_damping": (
        lambda v: v == "auto" or (_number(v) and v >= 0),
        "a number, at least 0, or 'auto'",
    ),
    "max_cg_iters": (lambda v: _count(v) and v >= 1, "an integer, at least 1"),
    "cg_tol": _FINITE,
    "cg_progress_tol": _FINITE,
    "warm_start": (lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "preconditioner": (
        _preconditioner,
        "'auto', 'kfac', 'diagonal', None, a Diagonal, a Nystrom or a function of a flat vector",
    ),
    "max_backtracks": (_count, "an integer, at least 0"),
    "backtrack_ratio": (lambda v: _number(v) and 0 < v < 1, "a number in (0, 1)"),
    "weight_decay": _FINITE,
    "curvature": _one_of(Curvature),
    "backend": _one_of(BackendChoice),
    "solver": _one_of(SolverName),
    "damping_scale": _one_of(DampingScale),
    "geodesic": _FLAG,
    "momentum": (lambda v: _number(v) and 0 <= v < 1, "a number in [0, 1)"),
}
assert _ALLOWED.keys() == {field.name for field in fields(Settings)}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check one parameter group's settings.

    Raises:
        ValueError: a setting is out of range; the message has its value and what is allowed.
    """
    for name, (is_allowed, allowed) in _ALLOWED.items():
        if not is_allowed(settings[name]):
            raise ValueError(f"{name} must be {allowed}, got {settings[name]!r}")
    lowest, highest = settings["min_damping"], settings["max_damping"]
    if "auto" not in (lowest, highest) and lowest > highest:
        raise ValueError(f"min_damping must be at most max_damping, got {lowest!r} > {highest!r}")
    if settings["trust_region"] != "clip" and settings["max_kl"] is None:
        kind = settings["trust_region"]
        raise ValueError(
            f"trust_region={kind!r} needs a max_kl whose boundary to go to, got max_kl=None"
        )


def to_plain_numbers(group: dict[str, Any]) -> None:
    """Make a parameter group's settings that are numpy's numbers Python's: these can be saved."""
    for name in _ALLOWED:
        value = group[name]
        if isinstance(value, Real) and type(value) not in (bool, int, float):
            group[name] = int(value) if isinstance(value, Integral) else float(value)


def check_saved(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]
) -> None:
    """Check what was saved of an optimizer before it takes the place of anything.

    Args:
        groups: the parameter groups.
        state: by parameter.

    Raises:
        ValueError: it is another optimizer's, or was saved of parameters of other shapes.
    """
    for group in groups:
        missing = [name for name in _ALLOWED if name not in group]
        if missing:
            raise ValueError(
                f"this is not the state of a NaturalCG: its groups have no {', '.join(missing)}"
            )
        check_settings(group)
    for p, entry in state.items():
        for saved in (entry[name] for name in ("solution", "largest_curvature") if name in entry):
            if isinstance(p, Tensor) and saved.shape != p.shape:
                raise ValueError(
                    f"the state was saved of other parameters: one of shape {tuple(p.shape)} had "
                    f"{tuple(saved.shape)}"
                )
