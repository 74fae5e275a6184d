"""What the training benchmarks train: models on data that comes with scikit-learn and with Python itself."""

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from models import mlp
from sklearn.datasets import load_digits
from torch import Tensor, nn

_DIGITS = load_digits()
IMAGES = torch.tensor(_DIGITS.data / 16, dtype=torch.float32)
DIGIT = torch.tensor(_DIGITS.target)
_TEXT = "\n".join(topics[name] for name in sorted(topics))
"""Python's own reference, which its interactive help shows: some 460,000 characters."""
_ALPHABET = sorted(set(_TEXT))
CHARACTERS = torch.tensor([_ALPHABET.index(c) for c in _TEXT])
CONTEXT = 32


class Task(NamedTuple):
    """A model and what it is trained on.

    Attributes:
        make: the model, with its random initial weights.
        loss: of a function from input to output, over all of the data.
        floor: the lowest loss that there can be.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[Callable[[Tensor], Tensor]], Tensor]
    floor: float


def autoencoder(activation: Callable[[], nn.Module], *widths: int) -> nn.Module:
    """An encoder with these widths, the last one that of its linear code, and its mirror image."""
    encoder, decoder = (mlp(*order, activation=activation) for order in (widths, widths[::-1]))
    return nn.Sequential(*encoder, *decoder)


def reconstruction(model: Callable[[Tensor], Tensor]) -> Tensor:
    """Binary cross-entropy of an image, in nats."""
    return F.binary_cross_entropy_with_logits(model(IMAGES), IMAGES, reduction="sum") / len(IMAGES)


def small_cnn() -> nn.Module:
    """Two convolutions and a linear head on 8×8 images."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


class Block(nn.Module):
    """Causal self-attention and two linear layers, each behind a norm and beside an identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norms[0](x))
            .unflatten(-1, (3, self.heads, -1))
            .movedim(2, 0)
            .transpose(2, 3)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class LanguageModel(nn.Module):
    """A transformer that predicts the next character from those before it."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(_ALPHABET), width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(_ALPHABET))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))


def next_character(model: Callable[[Tensor], Tensor], starts: Tensor) -> Tensor:
    """Cross-entropy in nats per character, over pieces of the text that begin at ``starts``."""
    pieces = CHARACTERS[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


_ENTROPY = F.binary_cross_entropy(IMAGES, IMAGES, reduction="sum").item() / len(IMAGES)
_WIDE, _NARROW = (64, 256, 128, 16), (64, 128, 64, 32, 8)
_PIECES = torch.arange(64) * (len(CHARACTERS) // 64)
TASKS = {
    "autoencoder, tanh": Task(lambda: autoencoder(nn.Tanh, *_WIDE), reconstruction, _ENTROPY),
    "autoencoder, ReLU": Task(lambda: autoencoder(nn.ReLU, *_WIDE), reconstruction, _ENTROPY),
    "deep autoencoder, tanh": Task(
        lambda: autoencoder(nn.Tanh, *_NARROW), reconstruction, _ENTROPY
    ),
    "deep autoencoder, ReLU": Task(
        lambda: autoencoder(nn.ReLU, *_NARROW), reconstruction, _ENTROPY
    ),
    "CNN": Task(small_cnn, lambda m: F.cross_entropy(m(IMAGES), DIGIT), 0.0),
    "language model": Task(LanguageModel, lambda m: next_character(m, _PIECES), 0.0),
}
