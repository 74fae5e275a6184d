"""What a closure computes from the parameters, as a function of them."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from ngd_optim.program import Operation, find_last_uses, remove_dead_code, run


class ForwardProgram:
    """``parameters ↦ tensors``, a pure function: it writes to nothing that was there before.

    Args:
        program: the operations, which fill slots; the parameters are in the first ones.
        last_uses: of each operation, slots that are not needed after it.
        values: of the slots that are constants, None in the others.
        outputs: of each output, its slot, or its value if it is a constant.
        has_functions: whether something is on the way whose derivatives need not be those of its
            operations: an ``autograd.Function``, or an activation that is changed under ``no_grad``.
    """

    def __init__(
        self,
        program: list[Operation],
        last_uses: list[Sequence[int]],
        values: list[Any],
        outputs: Sequence[int | Tensor],
        *,
        has_functions: bool,
    ) -> None:
        self.has_functions = has_functions
        self._program = program
        self._last_uses = last_uses
        self._values = values
        self._outputs = outputs

    @classmethod
    def of(
        cls,
        operations: list[Operation],
        memories: Sequence[int],
        outputs: Sequence[int | Tensor],
        constants: Mapping[int, Tensor],
        functions: Set[int],
    ) -> "ForwardProgram":
        """The program of those operations that some outputs need.

        Args:
            operations: in the order of a run.
            memories: of each slot, a number for what its tensor lies in.
            outputs: as for the class.
            constants: slots that are taken for constants, and their values.
            functions: slots of what makes ``has_functions`` true.
        """
        needed = [out for out in outputs if isinstance(out, int)]
        kept = remove_dead_code(operations, needed, memories.__getitem__)
        values: list[Any] = [None] * len(memories)
        for slot, constant in constants.items():
            values[slot] = constant
        filled = {slot for operation in kept for _, slot in operation.outputs}
        last_uses = find_last_uses(kept, needed)
        return cls(kept, last_uses, values, outputs, has_functions=not filled.isdisjoint(functions))

    def __call__(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The outputs at other parameters, with a graph if gradients are enabled.

        Raises:
            CannotReplayError: a condition that the closure asks about does not hold there.
            RuntimeError: an operation is not possible there.
        """
        values = [*parameters, *self._values[len(parameters) :]]
        run(self._program, self._last_uses, values)
        return [values[out] if isinstance(out, int) else out for out in self._outputs]
