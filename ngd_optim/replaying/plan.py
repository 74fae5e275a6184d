"""A recorded program without what it reads."""

import threading
from typing import Any

import torch
from torch import Tensor

from ngd_optim.aten import facts
from ngd_optim.program import Meta, Operation, find_last_uses, remove_dead_code, run
from ngd_optim.replaying.passes import optimise
from ngd_optim.replaying.prepared import Prepared
from ngd_optim.torch_internals import plain


class Plan:
    """A recorded program without its constants.

    Args:
        program: what was recorded.
        metas: of its slots.
        output: the slot of what the function gave; None if it does not depend on the vector.
        result: what it gave.
        constants: is filled with what the program reads beside the vector.
        zeros: is filled with what it would read, if that were not zero.
        optimises: make the program shorter; it then writes where it knows the layout.

    Attributes:
        output: the slot of what the function gave; None if that is ``zero`` for every vector.
        views, program: the operations, in two parts: the first ones only look at the vector.
        last_uses: of each operation in these, the slots below ``size`` that nothing needs after it.
        size: how many slots it fills; those of constants follow.
        length: how many operations a replay takes.
        bytes: how much they compute.
        was_run: whether it was replayed.
        is_free: is held while it runs, which fills its arguments: threads take turns.
        prepared: by class, the program in memory of its own; None: it cannot be had.
    """

    def __init__(
        self,
        program: list[Operation],
        metas: list[Meta],
        output: int | None,
        result: Tensor,
        constants: list[Tensor],
        zeros: list[Tensor],
        *,
        optimises: bool = True,
    ) -> None:
        self.output = output
        self.views: list[Operation] = []
        self.program: list[Operation] = []
        self.zero = torch.zeros_like(plain(result)) if output is None else None
        if output is not None and optimises:
            self.views, self.program = optimise(program, metas, output, zeros)
        elif output is not None:
            self.program = remove_dead_code(program, [output], lambda slot: metas[slot].memory)
        self.size = len(metas)
        self.was_run = False
        self.is_free = threading.Lock()
        self.prepared: dict[type[Prepared], Prepared | None] = {}
        everything = [*self.views, *self.program]
        _take_constants_out(everything, self.size, constants)
        last_uses = find_last_uses(everything, () if output is None else (output,), self.size)
        self.last_uses = last_uses[: len(self.views)], last_uses[len(self.views) :]
        self.length = len(self.program)
        computed = [op for op in self.program if not facts(op.function).shares_memory]
        self.bytes = sum(metas[slot].bytes for op in computed for _, slot in op.outputs)

    def look(self, values: list[Any]) -> None:
        """Fill the slots of what only looks at the vector, which is in the first one."""
        run(self.views, self.last_uses[0], values)

    def run(self, values: list[Any]) -> Tensor:
        """What the function gives, from slots with constants and what :meth:`look` fills; it fills the others."""
        assert self.output is not None
        run(self.program, self.last_uses[1], values)
        return values[self.output]

    def let_go(self) -> None:
        """Give up memory that is soon had again."""
        kept = {k: v for k, v in self.prepared.items() if v is None or v.is_costly}
        self.prepared = kept

    def computes_like(self, other: "Plan") -> bool:
        """Whether it is the same program, up to its constants."""

        def described(plan: Plan) -> Any:
            operations = [*plan.views, *plan.program]
            return plan.output, [
                (op.function, op.args, op.kwargs, op.slots, op.outputs) for op in operations
            ]

        return described(self) == described(other)


def _take_constants_out(program: list[Operation], first: int, constants: list[Tensor]) -> None:
    """Let the operations read constants from slots, of which ``first`` is the first one."""
    slots: dict[int, int] = {}
    for operation in program:
        places: list[Any] = [operation.args, operation.kwargs]
        places += [value for value in operation.args if isinstance(value, list)]
        for place in places:
            for key, value in place.items() if isinstance(place, dict) else enumerate(place):
                if isinstance(value, Tensor):
                    if id(value) not in slots:
                        slots[id(value)] = first + len(constants)
                        constants.append(value)
                    operation.inputs = [*operation.inputs, (place, key, slots[id(value)])]
                    place[key] = None
