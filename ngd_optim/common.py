"""What the ranks of a process group must have in common when a step begins.

Ranks that differ in it would meet with vectors of different lengths, which ends their processes, or
with numbers that mean different things, which nobody would see.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngd_optim.distributed import Common
from ngd_optim.layout import is_spread
from ngd_optim.preconditioners import Diagonal, Nystrom
from ngd_optim.real_parts import real_parts
from ngd_optim.settings import KFACSettings, Settings
from ngd_optim.state import NAMES

_SENTENCES = {
    "calls": "the ranks of the process group call step() differently; let each give as many closures, and all "
    "or none a curvature closure",
    "parameters": "the ranks of the process group have different parameters, or froze different ones "
    "(requires_grad); let all have the same ones in the same groups, and freeze the same",
    "settings": "the settings differ between the ranks of the process group; give all ranks the same ones, "
    "learning rates included",
    "damping": "the damping differs between the ranks of the process group; write to it, or load it, on all "
    "ranks alike",
    "state": "the optimizer's state differs between the ranks of the process group; load the same state_dict() on "
    "all ranks",
    "generator": "the generators of the ranks of the process group are in different states; seed them alike, as "
    "all ranks must draw the same directions for this preconditioner",
    "values": "the parameters differ between the ranks of the process group; start from the same ones "
    "(torch.nn.parallel.DistributedDataParallel sends rank 0's to all), and change them on all ranks alike",
}


@dataclass(frozen=True)
class Beginning:
    """Where a step begins, on this rank.

    Attributes:
        groups: the optimizer's.
        settings: of the step.
        tensors: the parameters that it is for.
        theta: their values, flat; None: not gathered yet.
        state: the optimizer's.
        whole_state: whether the state's tensors count, or the first parameter's numbers alone, as
            where no state was loaded since the last step.
        generator: the user's, if there is one.
        calls: how many closures there are, and how many for the curvature.
        names: of the entries of the state that count.
    """

    groups: Sequence[Mapping[str, Any]]
    settings: Settings | KFACSettings
    tensors: Sequence[Tensor]
    theta: Tensor | None
    state: Mapping[Any, Any]
    whole_state: bool
    generator: torch.Generator | None
    calls: tuple[int, int]
    names: Sequence[str] = NAMES

    length = len(_SENTENCES)
    """Of :meth:`common`."""

    def common(self) -> list[Common]:
        """All that must be the same, what explains the most first."""
        settings = {name: _describe(value) for name, value in vars(self.settings).items()}
        damping = settings.pop("damping")
        shapes = [
            [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in group["params"]]
            for group in self.groups
        ]
        # Kronecker factors are means over the ranks, whose draws may differ.
        preconditioner = getattr(self.settings, "preconditioner", "kfac")
        is_drawn_alike = isinstance(preconditioner, Diagonal | Nystrom)
        is_drawn_alike |= preconditioner == "diagonal"
        generator = self.generator if is_drawn_alike else None
        numbers: dict[str, int | Tensor] = {
            "calls": _number(self.calls),
            "parameters": _number(shapes),
            "settings": _number(settings),
            "damping": _number(damping),
            "state": self._state(),
            "generator": 0 if generator is None else checksum(generator.get_state()),
            "values": 0 if self.theta is None else checksum(self.theta),
        }
        return [Common(numbers[name], sentence) for name, sentence in _SENTENCES.items()]

    def _state(self) -> int | Tensor:
        own = [self.state.get(p, {}) for p in self.tensors]
        entries = [(i, n, e[n]) for i, e in enumerate(own) for n in self.names if n in e]
        if not self.whole_state:
            entries = [entry for entry in entries if entry[0] == 0]
        total: int | Tensor = _number(
            [
                (i, name, tuple(value.shape) if isinstance(value, Tensor) else value)
                for i, name, value in entries
            ]
        )
        if self.whole_state:
            for k, (_, _, value) in enumerate(entries, 1):
                # Of what is spread each rank has another part.
                is_alike = isinstance(value, Tensor) and not is_spread(value)
                total = total + k * checksum(value) if is_alike else total
        return total


def _number(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def _describe(value: Any) -> Any:
    """A function's representation has its address."""
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else value


def checksum(tensor: Tensor) -> Tensor:
    """A number that is the same for the same bits in the same places, 0-dim; rounding has no part in it."""
    flat = real_parts(tensor.detach()).contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # integers of 64 bits begin at every eighth byte
    row = _WIDTH * 8 // flat.element_size()
    body = len(flat) // row * row
    # Sums of rows and of columns: places count, and nothing as large as the tensor is made.
    square = flat[:body].view(torch.int64).view(-1, _WIDTH)
    rest = flat[body:].view(_INTEGERS[flat.element_size()]).long()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part, factor in zip((square.sum(1), square.sum(0), rest), _FACTORS, strict=True):
        places = torch.arange(1, len(part) + 1, device=part.device)
        total += (part * places).sum() * factor
    return total


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDTH = 1024
_FACTORS = (1, 1_000_003, 998_244_353)
