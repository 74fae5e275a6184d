"""Which preconditioner a setting stands for."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ngd_optim.distributed import ALONE, Ranks
from ngd_optim.names import PreconditionerName
from ngd_optim.parameters import FlatParameters
from ngd_optim.preconditioners.base import Given, Preconditioning, Solve
from ngd_optim.preconditioners.kfac import Kronecker
from ngd_optim.preconditioners.sketches import Diagonal, Nystrom, Sketched

Preconditioner = PreconditionerName | None | Solve | Diagonal | Nystrom


def build_preconditioner(
    kind: Preconditioner,
    parameters: FlatParameters,
    state: MutableMapping[Tensor, dict[str, Any]],
    generator: torch.Generator | None,
    ranks: Ranks = ALONE,
) -> Preconditioning:
    """What a setting stands for in one step.

    Args:
        kind: the setting.
        parameters: of the step.
        state: the optimizer's; it is written to by ``keep`` only.
        generator: draws the random vectors; None: one that starts anew at each renewal, from its
            number.
        ranks: those that take the step.
    """
    if kind in ("auto", "kfac"):
        return Kronecker(parameters, state, generator, ranks, must=kind == "kfac")
    sketch = Diagonal() if kind == "diagonal" else kind
    if isinstance(sketch, Diagonal | Nystrom):
        return Sketched(sketch, parameters, state, generator)
    return Given(sketch) if callable(sketch) else Preconditioning()
