"""Let torchvision's Python parts work beside a CPU-only torch, where its CUDA wheel cannot load its operators.

Lightning imports torchvision through torchmetrics. ``make`` installs this module in its environment
(``.ci/torchvision_schemas``), where torch calls ``declare`` when it is imported, so that any script
can import Lightning. In another environment, import it before either of them.
"""

from importlib.metadata import PackageNotFoundError, version

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # the schemas last as long as these do


def declare() -> None:
    """Declare the operators that torchvision's Python parts ask for, if they are missing."""
    try:
        if not version("torch").endswith("+cpu") or version("torchvision").endswith("+cpu"):
            return
    except PackageNotFoundError:
        return
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)


declare()
