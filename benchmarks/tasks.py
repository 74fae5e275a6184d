"""What the training benchmarks train: models on data that comes with scikit-learn and with Python itself."""

import sysconfig
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
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


class Text(NamedTuple):
    """Characters in a row, of which the last ones are held out.

    Attributes:
        characters: as numbers.
        symbols: how many numbers there are.
        border: where the held-out part begins.
    """

    characters: Tensor
    symbols: int
    border: int


def reference() -> Text:
    """Python's own reference: the last tenth of its topics, by name, is held out."""
    return Text(CHARACTERS, len(_ALPHABET), len(CHARACTERS) * 9 // 10)


@cache
def sources() -> Text:
    """The sources of Python's standard library, some 12 million characters; every twentieth file is held out.

    Without tests, which not every Python ships, and without the reference. Files come in a random
    order; whatever is no printable ASCII is one symbol.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "pydoc_data"}
    files = sorted(f for f in root.rglob("*.py") if not left_out & {*f.relative_to(root).parts})
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    codes = [np.frombuffer(files[i].read_bytes(), np.uint8) for i in order]
    border = sum(map(len, codes[: len(codes) * 19 // 20]))
    return Text(_ascii(np.concatenate(codes)), 97, border)


def _ascii(codes: np.ndarray) -> Tensor:
    """Bytes as 97 numbers: 95 printable characters, the end of a line, and any other."""
    other, newline = 95, 96
    table = np.full(256, other)
    table[32:127] = np.arange(95)
    table[10] = newline
    return torch.from_numpy(table[codes])


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


class Residual(nn.Module):
    """Two convolutions with batch normalization, beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [
            (nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
            for _ in range(2)
        ]
        self.inner = nn.Sequential(*layers[0], nn.ReLU(), *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


def residual_cnn(channels: int = 16, blocks: int = 3) -> nn.Module:
    """A residual network with batch normalization on 8×8 images."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        *(Residual(channels) for _ in range(blocks)),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * channels, 10),
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

    def __init__(
        self, width: int = 64, layers: int = 2, heads: int = 4, symbols: int = len(_ALPHABET)
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))


class LowRank(nn.Module):
    """A frozen linear layer and the change of its weight, of rank four (LoRA: Hu et al. 2022)."""

    def __init__(self, frozen: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


@cache
def _trained_on_the_reference() -> LanguageModel:
    """A small transformer after 300 steps of Adam on Python's reference, in the symbols of its sources."""
    characters = _ascii(np.frombuffer(_TEXT.encode("latin-1", "replace"), np.uint8))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = LanguageModel(symbols=97)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        starts = torch.randint(len(characters) - CONTEXT, (128,), generator=generator)
        optimizer.zero_grad()
        next_character(model, starts, characters).backward()
        optimizer.step()
        scheduler.step()
    return model


def adapted() -> nn.Module:
    """That transformer, frozen, with a low-rank change of each linear layer in its blocks to be trained."""
    model = deepcopy(_trained_on_the_reference()).requires_grad_(False)
    for block in model.modules():
        if isinstance(block, Block):
            block.qkv, block.merge = LowRank(block.qkv), LowRank(block.merge)
            block.feed_forward[0] = LowRank(block.feed_forward[0])
            block.feed_forward[2] = LowRank(block.feed_forward[2])
    return model


def next_character(
    model: Callable[[Tensor], Tensor], starts: Tensor, characters: Tensor = CHARACTERS
) -> Tensor:
    """Cross-entropy in nats per character, over pieces of the text that begin at ``starts``."""
    pieces = characters[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
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
