"""The models that the benchmarks share: a name, a module, its input and the number of classes."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), activation()]
    return nn.Sequential(*layers[:-1])


class Transformer(nn.Module):
    """Two encoder layers over token embeddings, mean-pooled."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.embedding = nn.Embedding(100, 64)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


class Recurrent(nn.Module):
    """One LSTM layer and a linear head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


def cnn() -> nn.Sequential:
    """Three convolutions on 28×28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 49, 10),
    )


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, int]]] = {
    "policy MLP 17-64-64-6, batch 2048": lambda: (mlp(17, 64, 64, 6), torch.randn(2048, 17), 6),
    "MLP 784-512³-10, batch 512": lambda: (mlp(784, 512, 512, 512, 10), torch.randn(512, 784), 10),
    "CNN, 3 convolutions, batch 256": lambda: (cnn(), torch.randn(256, 1, 28, 28), 10),
    "transformer, 2 layers, 64×32": lambda: (Transformer(), torch.randint(0, 100, (64, 32)), 10),
    "LSTM 32, 64×20": lambda: (Recurrent(), torch.randn(64, 20, 8), 10),
}
