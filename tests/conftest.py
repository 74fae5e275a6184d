"""What every test module shares."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch


def _declare_missing_torchvision_schemas() -> torch.library.Library | None:
    """Let torchvision's Python parts work beside a CPU-only torch, where its CUDA wheel cannot load its operators."""
    try:
        if not version("torch").endswith("+cpu") or version("torchvision").endswith("+cpu"):
            return None
    except PackageNotFoundError:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


torchvision_library = _declare_missing_torchvision_schemas()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two test processes share the machine, and sums come out the same on every run."""
    torch.set_num_threads(1)
