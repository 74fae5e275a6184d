"""What a step starts from: its settings, the parameters as vectors, and closures that are about to run."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ngd_optim.common import Beginning
from ngd_optim.distributed import ParametersInParts, Ranks, ShardedModules
from ngd_optim.parameters import FlatParameters
from ngd_optim.settings import Settings
from ngd_optim.step import LastStep
from ngd_optim.tracing import TracedClosure, list_closures
from ngd_optim.transaction import Transaction

MANY = 2**20
"""With so many parameters, each rank of sharded modules has a part of the step's vectors.

Of fewer it has them whole, which saves three exchanges of a number in each iteration.
"""


@dataclass(frozen=True)
class Start:
    """Where a step is taken from.

    Attributes:
        settings: of the step.
        parameters: with the weights that the closures compute with.
        own: the same, as the step's own vectors lie.
        theta: their values, flat and whole.
        last: what the last step left.
        closures: of the loss.
        others: of the curvature; none: the loss's.
        ranks: those that take the step.
        beginning: what these must have in common.
    """

    settings: Settings
    parameters: FlatParameters
    own: FlatParameters | ParametersInParts
    theta: Tensor
    last: LastStep
    closures: Sequence[TracedClosure]
    others: Sequence[TracedClosure]
    ranks: Ranks
    beginning: Beginning

    @property
    def runs(self) -> list[TracedClosure]:
        """All closures, in the order in which they first run."""
        return [*self.closures, *self.others]

    @property
    def is_alone(self) -> bool:
        """Whether there is one closure, whose graph gives the curvature as well."""
        return len(self.closures) == 1 and not self.others

    def compare_values(self) -> None:
        """Have the ranks compare all that they must have in common when they next meet."""
        beginning = replace(self.beginning, theta=self.theta)
        self.ranks.begin_with(beginning.length, beginning.common)


def begin(
    closure: Any,
    curvature_closure: Any,
    ranks: Ranks,
    modules: ShardedModules,
    *,
    groups: list[dict[str, Any]],
    state: MutableMapping[Any, dict[str, Any]],
    whole_state: bool,
    generator: torch.Generator | None,
    transaction: Transaction,
) -> Start:
    """Gather sharded weights, and have the transaction cover all that the closures may change.

    Args:
        closure: that of ``step``, or its list.
        curvature_closure: likewise; None: there is none.
        ranks: those that take the step.
        modules: what ``fully_shard`` has made of the parameters' modules.
        groups: the optimizer's.
        state: likewise.
        whole_state: as for :class:`~ngd_optim.common.Beginning`.
        generator: likewise.
        transaction: of the step.

    Raises:
        TypeError, ValueError: there is no closure, or groups disagree.
    """
    ranks.begin_with(Beginning.length)
    settings = Settings.of(groups)
    parameters = FlatParameters(groups)
    functions = list_closures(closure)
    others = [] if curvature_closure is None else list_closures(curvature_closure)
    beginning = Beginning(
        groups=groups,
        settings=settings,
        tensors=parameters.params,
        theta=None,
        state=state,
        whole_state=whole_state,
        generator=generator,
        calls=(len(functions), len(others)),
    )
    if modules:
        ranks.begin_with(beginning.length, beginning.common)
        ranks.together(lambda: None)  # gathering takes all of them
        transaction.enter(modules)
        ranks.begin_with(Beginning.length)
        parameters = FlatParameters(groups, modules.weight)
    own = divide(parameters, settings, modules, ranks)
    is_alone = len(functions) == 1 and not others
    start = Start(
        settings=settings,
        parameters=parameters,
        own=own,
        theta=parameters.read(),
        last=LastStep(own, state),
        closures=[TracedClosure(f, parameters, is_alone=is_alone) for f in functions],
        others=[TracedClosure(f, parameters, is_alone=False) for f in others],
        ranks=ranks,
        beginning=beginning,
    )
    transaction.cover(parameters, start.runs, start.theta)
    return start


def divide(
    parameters: FlatParameters, settings: Settings, modules: ShardedModules, ranks: Ranks
) -> FlatParameters | ParametersInParts:
    """The parameters as the step's vectors lie: in parts if that is asked for, or if they are many and sharded."""
    is_worth_it = bool(modules) and parameters.size >= MANY
    uses_parts = settings.solver in ("auto", "cg") and settings.damping_scale != "diagonal"
    if ranks.group is None or not (settings.shard_state or (is_worth_it and uses_parts)):
        return parameters
    return ranks.divide(parameters)
