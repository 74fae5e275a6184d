"""Small files in the format and the place of torchvision's MNIST."""

import struct
from pathlib import Path

import numpy as np


def write_mnist(root: Path, n: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Write random images and labels below ``root``, as torchvision finds them; return them."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    images, labels = (
        random.integers(0, 256, (n, 28, 28), np.uint8),
        random.integers(0, 10, n, np.uint8),
    )
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, *images.shape) + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, *labels.shape) + labels.tobytes()
        )
    return images, labels
