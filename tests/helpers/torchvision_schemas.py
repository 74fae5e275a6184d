"""Let torchvision's Python parts work beside a CPU-only torch, where its CUDA wheel cannot load its operators.

Lightning imports torchvision through torchmetrics. So import this before either of them.
"""

from importlib.metadata import PackageNotFoundError, version

import torch


def _declare_missing_schemas() -> torch.library.Library | None:
    try:
        if not version("torch").endswith("+cpu") or version("torchvision").endswith("+cpu"):
            return None
    except PackageNotFoundError:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


library = _declare_missing_schemas()  # the schemas last as long as this does
