"""The settings of the optimizers: what is allowed, and which of them hold for the whole step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

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
from ngd_optim.shown import show


def _number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"  # an array compares its elements


def _count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _preconditioner(value: Any) -> bool:
    is_name = isinstance(value, str) and value in get_args(PreconditionerName)
    is_function = callable(value) and not isinstance(value, type)
    return value is None or is_name or is_function or isinstance(value, Diagonal | Nystrom)


class _Allowed(NamedTuple):
    """What a setting may be, in words and as a function, and whether groups may differ in it."""

    words: str
    holds: Callable[[Any], bool]
    per_group: bool = False


def _one_of(kind: Any) -> _Allowed:
    names = get_args(kind)
    return _Allowed(
        f"one of {', '.join(map(repr, names))}", lambda v: isinstance(v, str) and v in names
    )


_FINITE = _Allowed("a finite number, at least 0", lambda v: _number(v) and 0 <= v < math.inf)
_FINITE_OR_AUTO = _Allowed(f"{_FINITE.words}, or 'auto'", lambda v: _is_auto(v) or _FINITE.holds(v))
_PER_GROUP = _FINITE._replace(per_group=True)
_RATE = _PER_GROUP._replace(  # torch's optimizers take a tensor of one element as well
    holds=lambda v: _FINITE.holds(v.squeeze() if isinstance(v, Tensor) else v)
)
_NUMBER_OR_AUTO = _Allowed(
    "a number, at least 0, or 'auto'", lambda v: _is_auto(v) or (_number(v) and v >= 0)
)
_REGION = _Allowed(
    "a finite number above 0, None or 'auto'",
    lambda v: v is None or _is_auto(v) or (_number(v) and 0 < v < math.inf),
)
_UP_TO_1 = _Allowed("a number in [0, 1]", lambda v: _number(v) and 0 <= v <= 1)
_BELOW_1 = _Allowed("a number in [0, 1)", lambda v: _number(v) and 0 <= v < 1)
_BETWEEN_0_AND_1 = _Allowed("a number in (0, 1)", lambda v: _number(v) and 0 < v < 1)
_ABOVE_0 = _Allowed("a finite number above 0", lambda v: _number(v) and 0 < v < math.inf)
_COUNT = _Allowed("an integer, at least 0", _count)
_COUNT_FROM_1 = _Allowed("an integer, at least 1", lambda v: _count(v) and v >= 1)
_FLAG = _Allowed("True or False", lambda v: isinstance(v, bool))
_PRECONDITIONER = _Allowed(
    "'auto', 'kfac', 'diagonal', None, a Diagonal, a Nystrom or a function of a flat vector",
    _preconditioner,
)


T = TypeVar("T", bound="GroupSettings")


class GroupSettings:
    """Settings as the fields of a dataclass, whose annotations say what is allowed."""

    @classmethod
    @cache
    def allowed(cls) -> dict[str, _Allowed]:
        """What each setting may be, by name."""
        hints = get_type_hints(cls, include_extras=True)
        return {name: hint.__metadata__[0] for name, hint in hints.items()}

    @classmethod
    def of(cls: type[T], groups: Sequence[Mapping[str, Any]]) -> T:
        """Those of some parameter groups.

        Raises:
            ValueError: the groups disagree on a setting that holds for the whole step.
        """
        values: dict[str, Any] = {}
        for name, allowed in cls.allowed().items():
            of_groups = [group[name] for group in groups]
            if allowed.per_group:
                values[name] = tuple(map(float, of_groups))
                continue
            if any(value != of_groups[0] for value in of_groups):
                may_differ = ", ".join(n for n, other in cls.allowed().items() if other.per_group)
                raise ValueError(
                    f"{name} holds for the whole step, so all parameter groups must agree on it, "
                    f"got {show(of_groups)}; only {may_differ} may differ"
                )
            values[name] = of_groups[0]
        return cls(**values)

    @classmethod
    def require_names(cls, group: Mapping[str, Any], optimizer: str) -> None:
        """Check that a saved parameter group has all settings.

        Raises:
            ValueError: it is of another optimizer.
        """
        missing = [name for name in cls.allowed() if name not in group]
        if missing:
            raise ValueError(
                f"this is not the state of a {optimizer}: its groups have no {', '.join(missing)}"
            )

    @classmethod
    def check_each(cls, settings: Mapping[str, Any]) -> None:
        """Check one parameter group's settings, each by itself.

        Raises:
            ValueError: a setting is out of range; the message has its value and what is allowed.
        """
        for name, allowed in cls.allowed().items():
            if not allowed.holds(settings[name]):
                raise ValueError(f"{name} must be {allowed.words}, got {show(settings[name])}")


@dataclass(frozen=True)
class KFACSettings(GroupSettings):
    """The settings of one step; the docstring of :class:`~ngd_optim.KFAC` explains them.

    ``lr`` and ``weight_decay`` have one number for each parameter group.
    """

    lr: Annotated[tuple[float, ...], _RATE]
    momentum: Annotated[float, _BELOW_1]
    damping: Annotated[float, _FINITE]
    radius: Annotated[float, _ABOVE_0]
    adapt_radius: Annotated[bool, _FLAG]
    renew_every: Annotated[int, _COUNT_FROM_1]
    factor_decay: Annotated[float, _BELOW_1]
    weight_decay: Annotated[tuple[float, ...], _PER_GROUP]
    shard_state: Annotated[bool, _FLAG]


@dataclass(frozen=True)
class Settings(GroupSettings):
    """The settings of one step; the docstring of :class:`~ngd_optim.NaturalCG` explains them.

    ``lr``, ``damping`` and ``weight_decay`` have one number for each parameter group.
    """

    lr: Annotated[tuple[float, ...], _RATE]
    max_kl: Annotated[MaxKL, _REGION]
    trust_region: Annotated[TrustRegion, _one_of(TrustRegion)]
    damping: Annotated[tuple[float, ...], _PER_GROUP]
    adapt_damping: Annotated[bool, _FLAG]
    min_damping: Annotated[DampingLimit, _FINITE_OR_AUTO]
    max_damping: Annotated[DampingLimit, _NUMBER_OR_AUTO]
    max_cg_iters: Annotated[int, _COUNT_FROM_1]
    cg_tol: Annotated[float, _FINITE]
    cg_progress_tol: Annotated[float, _FINITE]
    warm_start: Annotated[float, _UP_TO_1]
    preconditioner: Annotated[Preconditioner, _PRECONDITIONER]
    max_backtracks: Annotated[int, _COUNT]
    backtrack_ratio: Annotated[float, _BETWEEN_0_AND_1]
    weight_decay: Annotated[tuple[float, ...], _PER_GROUP]
    curvature: Annotated[Curvature, _one_of(Curvature)]
    backend: Annotated[BackendChoice, _one_of(BackendChoice)]
    solver: Annotated[SolverName, _one_of(SolverName)]
    damping_scale: Annotated[DampingScale, _one_of(DampingScale)]
    geodesic: Annotated[bool, _FLAG]
    cuda_graphs: Annotated[bool, _FLAG]
    shard_state: Annotated[bool, _FLAG]
    momentum: Annotated[float, _BELOW_1]
    xtol: Annotated[float, _FINITE]
    ftol: Annotated[float, _FINITE]
    gtol: Annotated[float, _FINITE]


SETTINGS = tuple(Settings.allowed())
"""The names of all settings."""

COMMON_SETTINGS = tuple(
    name for name, allowed in Settings.allowed().items() if not allowed.per_group
)
"""Those in which groups must agree."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check one parameter group's settings.

    Raises:
        ValueError: a setting is out of range; the message has its value and what is allowed.
    """
    rate = settings["lr"]
    if isinstance(rate, Tensor) and rate.numel() != 1:
        # In the words of torch's optimizers.
        raise ValueError(f"Tensor lr must be 1-element, got {show(rate)}")
    Settings.check_each(settings)
    lowest, highest = settings["min_damping"], settings["max_damping"]
    if "auto" not in (lowest, highest) and lowest > highest:
        raise ValueError(f"min_damping must be at most max_damping, got {lowest!r} > {highest!r}")
    for name, whole in (("solver", ("dense", "sample")), ("damping_scale", ("diagonal",))):
        if settings["shard_state"] and settings[name] in whole:
            raise ValueError(
                f"{name}={settings[name]!r} works on whole vectors, and shard_state=True divides them; use "
                f"{name}='auto'"
            )
    if settings["trust_region"] != "clip" and settings["max_kl"] is None:
        kind = settings["trust_region"]
        raise ValueError(
            f"trust_region={kind!r} needs a max_kl whose boundary to go to, got max_kl=None"
        )


def check_initial(group: Mapping[str, Any]) -> None:
    """Check the damping that a parameter group began with, which is no setting, and saved with these.

    Raises:
        ValueError: it is out of range.
    """
    if not _FINITE.holds(group["initial_damping"]):
        raise ValueError(
            f"initial_damping must be {_FINITE.words}, got {show(group['initial_damping'])}"
        )


def to_plain_numbers(group: dict[str, Any], names: Sequence[str] = SETTINGS) -> None:
    """Make a parameter group's settings that are numpy's numbers Python's: these can be saved."""
    for name in names:
        value = group[name]
        if isinstance(value, Real) and type(value) not in (bool, int, float):
            group[name] = int(value) if isinstance(value, Integral) else float(value)


def check_owner(group: Mapping[str, Any]) -> None:
    """Check that a saved parameter group is of this optimizer: some settings may be newer than what saved it.

    Raises:
        ValueError: it has less than half of the settings.
    """
    missing = [name for name in SETTINGS if name not in group]
    if 2 * len(missing) > len(SETTINGS):
        raise ValueError(
            f"this is not the state of a NaturalCG: its groups have no {', '.join(missing)}"
        )


def add_missing(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Give a parameter group those of some settings that it does not have."""
    for name, value in settings.items():
        group.setdefault(name, value)


def check_shapes(state: Mapping[Any, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Check what has a parameter's shape.

    Raises:
        ValueError: it was saved of parameters of other shapes.
    """
    # By parameter once the optimizer has mapped them; before that the keys are numbers.
    for p, entry in state.items():
        for saved in (entry[name] for name in names if name in entry):
            if not isinstance(p, Tensor):
                continue
            if saved.shape != p.shape or saved.is_complex() != p.is_complex():
                raise ValueError(
                    f"the state was saved of other parameters: one of shape {tuple(p.shape)}, {p.dtype}, had "
                    f"{tuple(saved.shape)}, {saved.dtype}"
                )
