"""``torch.lstm`` as plain operations, which can be differentiated twice, in both modes.

On the CPU torch has no other way to say that one call is to do without mkldnn's fused kernel, which can
not: its switch is the whole process's, and other threads see it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def lstm(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs and the last states, bit for bit those of torch's own operations.

    Arguments are as for ``torch.lstm``, which also takes packed sequences, with their batch sizes.
    """
    is_packed = "batch_sizes" in kwargs or (len(args) > 1 and isinstance(args[1], Tensor))
    return (_run_packed if is_packed else _run_padded)(*args, **kwargs)


def _run_padded(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    data = input.transpose(0, 1) if batch_first else input
    layers = _split(params, hx, has_biases, num_layers, bidirectional)
    data, h, c = _run_layers(data, None, layers, dropout if train else 0.0)
    return data.transpose(0, 1) if batch_first else data, h, c


def _run_packed(
    data: Tensor,
    batch_sizes: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layers = _split(params, hx, has_biases, num_layers, bidirectional)
    return _run_layers(data, batch_sizes.tolist(), layers, dropout if train else 0.0)


class _Direction(NamedTuple):
    """One layer in one direction: its weights, some of which there need not be, and the states at the start."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    start: tuple[Tensor, Tensor]


def _split(
    params: Sequence[Tensor],
    hx: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
) -> list[list[_Direction]]:
    """The directions of each layer."""
    h0, c0 = hx
    has_projections = h0.shape[2] != c0.shape[2]
    count, each = 1 + bidirectional, 2 + 2 * has_biases + has_projections
    directions = []
    for i in range(num_layers * count):
        w_ih, w_hh, *rest = params[i * each : (i + 1) * each]
        b_ih, b_hh = rest[:2] if has_biases else (None, None)
        w_hr = rest[-1] if has_projections else None
        directions.append(_Direction(w_ih, w_hh, b_ih, b_hh, w_hr, (h0[i], c0[i])))
    return [directions[i : i + count] for i in range(0, len(directions), count)]


def _run_layers(
    data: Tensor, batch_sizes: list[int] | None, layers: list[list[_Direction]], dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer upon layer: the outputs, and the last states of all directions.

    Args:
        data: ``(steps, batch, inputs)``; or with batch sizes packed, ``(elements, inputs)``.
        batch_sizes: of the steps.
        layers: from the lowest.
        dropout: between them.
    """
    ends: list[tuple[Tensor, Tensor]] = []
    for number, directions in enumerate(layers):
        if number and dropout:
            data = torch.dropout(data, dropout, True)
        outputs = []
        for direction, backwards in zip(directions, (False, True), strict=False):
            gates = F.linear(data, direction.w_ih, direction.b_ih)
            steps = gates.unbind(0) if batch_sizes is None else gates.split(batch_sizes)
            found, end = _run_direction(steps, direction, backwards=backwards)
            outputs.append(torch.stack(found) if batch_sizes is None else torch.cat(found))
            ends.append(end)
        data = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    h, c = (torch.stack(parts) for parts in zip(*ends, strict=True))
    return data, h, c


def _run_direction(
    steps: Sequence[Tensor], direction: _Direction, *, backwards: bool
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """The outputs of all steps, and the last states.

    Args:
        steps: what the inputs add to the gates, ``(batch, 4 · hidden)`` each. Of packed sequences the
            longest are first, so that the batch shrinks, and grows backwards.
        direction: its weights.
        backwards: begin with the last step.
    """
    _, w_hh, _, b_hh, w_hr, start = direction
    h, c = (state[: len(steps[-1])] for state in start) if backwards else start
    outputs: list[Tensor] = []
    ended: list[tuple[Tensor, Tensor]] = []
    for gates in reversed(steps) if backwards else steps:
        n, before = len(gates), len(h)
        if n < before:
            ended.append((h[n:], c[n:]))
            h, c = h[:n], c[:n]
        elif n > before:
            h, c = (torch.cat((s, s0[before:n])) for s, s0 in zip((h, c), start, strict=True))
        # Hochreiter & Schmidhuber (1997); Gers, Schmidhuber & Cummins (2000).
        i, f, g, o = (F.linear(h, w_hh, b_hh) + gates).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if w_hr is not None:
            h = F.linear(h, w_hr)
        outputs.append(h)
    for h_end, c_end in reversed(ended):
        h, c = torch.cat((h, h_end)), torch.cat((c, c_end))
    return outputs[::-1] if backwards else outputs, (h, c)
