"""Numbers that the host reads: on an accelerator each reading waits for the device."""

from typing import Any

import torch
from torch import Tensor


def read(*values: Tensor | float) -> list[Any]:
    """What some 0-dim tensors of one device hold, at one wait for it; numbers stay as they are."""
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        found = (tensor.item() for tensor in tensors)
    else:
        found = iter(torch.stack(tensors).tolist())
    return [next(found) if isinstance(value, Tensor) else value for value in values]
