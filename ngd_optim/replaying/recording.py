"""A recorded function, and its replay on other vectors."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngd_optim.replaying.captured import CapturedCalls
from ngd_optim.replaying.fixed import FixedCalls
from ngd_optim.replaying.plan import Plan
from ngd_optim.replaying.prepared import CannotPrepareError, Prepared

logger = logging.getLogger("ngd_optim")


class Recording:
    """``v ↦ function(v)`` for a linear function of a flat vector, as a program that was recorded.

    It runs without the function's code, without autograd and without the primal pass.

    Args:
        plan: the program.
        constants: what it reads beside the vector.
        captures: whether it is to be replayed by a CUDA graph, where the device is one of CUDA's.
    """

    def __init__(self, plan: Plan, constants: Sequence[Tensor], *, captures: bool = False) -> None:
        self.plan = plan
        self._captures = captures
        self._values: list[Any] = [None] * plan.size + list(constants)
        self._seen: tuple[Tensor | None, int] = (None, 0)

    @torch.no_grad()
    def multiply(self, rows: Tensor) -> Tensor:
        """The values at several vectors, as rows, by one run of a program that is not optimised.

        Raises:
            RuntimeError: ``torch.vmap`` does not know an operation.
        """
        plan = self.plan
        if plan.output is None:
            assert plan.zero is not None
            return plan.zero.expand(len(rows), -1).clone()

        def replay(v: Tensor) -> Tensor:
            values = self._values.copy()
            values[0] = v
            return plan.run(values)

        with plan.is_free:
            return torch.vmap(replay)(rows)

    @torch.no_grad()
    def __call__(self, v: Tensor) -> Tensor:
        """The function's value at another vector.

        If the same tensor object is passed again (CG updates it in place), its views are reused.
        """
        plan = self.plan
        if plan.output is None:
            assert plan.zero is not None
            return plan.zero.clone()  # linear, and the same for every vector
        with plan.is_free:
            # The first call is a plain one: libraries make themselves ready, which cannot be captured, and
            # what is called once need not be prepared.
            prepared = self._prepare(v) if plan.was_run else None
            plan.was_run = True
            if prepared is not None:
                return prepared(v, self, self.constants)
            if not (self._seen[0] is v and self._seen[1] == v.data_ptr()):
                self._seen = v, v.data_ptr()
                self._values[0] = v
                plan.look(self._values)
            # Slots of constants and of the vector's views; the program fills the others.
            return plan.run(self._values.copy())

    def _prepare(self, v: Tensor) -> Prepared | None:
        """The program in memory of its own, by a CUDA graph if that was asked for; None: it cannot be had."""
        plan = self.plan
        for kind in (CapturedCalls, FixedCalls) if self._captures else (FixedCalls,):
            if kind not in plan.prepared:
                try:
                    plan.prepared[kind] = kind(plan, v, self.constants)
                except CannotPrepareError as error:
                    plan.prepared[kind] = None
                    if str(error):
                        logger.info("products are replayed without a CUDA graph, because %s", error)
            if (prepared := plan.prepared[kind]) is not None:
                return prepared
        return None

    @property
    def constants(self) -> list[Tensor]:
        """What it reads beside the vector."""
        return self._values[self.plan.size :]
