"""A small vision transformer and the digits it reads."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Set = tuple[Tensor, Tensor]


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, pre-norm blocks, a linear head (Dosovitskiy et al. 2021), no dropout.

    Args:
        image: height and width in pixels.
        patch: height and width of a patch; divides `image`.
        width, depth, heads: of the blocks; their MLPs have 4 times the width.
        classes: of the head.
    """

    def __init__(
        self, image: int, patch: int, width: int = 64, depth: int = 4, heads: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.first = nn.Parameter(torch.zeros(width))
        self.positions = nn.Embedding((image // patch) ** 2 + 1, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        block = [nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                 for _ in range(depth)]  # fmt: skip
        self.blocks = nn.Sequential(*block)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def get_output_embeddings(self) -> nn.Linear:
        """The head, as Hugging Face models name theirs: it is no hidden matrix."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of images `[B, 1, image, image]`."""
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat((self.first.expand(len(images), 1, -1), tokens), 1) + self.positions.weight
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def mnist(folder: Path) -> tuple[Set, Set, Set]:
    """8,000 training, 1,000 validation and 1,000 test images `[N, 1, 28, 28]` out of MNIST's 10,000 (a fixed shuffle).

    Args:
        folder: with t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz.

    Raises:
        SystemExit: a file is missing.
    """
    try:
        pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
        answers = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    except FileNotFoundError as error:
        raise SystemExit(f"{error.filename} is missing; give the folder of MNIST's t10k files with --mnist") from None
    images = torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(-1, 1, 28, 28).astype(np.float32))
    labels = torch.from_numpy(np.frombuffer(answers, np.uint8).astype(np.int64))
    return _split(images / 255, labels, 1000)


def digits() -> tuple[Set, Set, Set]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, 200 each for validation and test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return _split(images, torch.from_numpy(data.target).long(), 200)


def _split(images: Tensor, labels: Tensor, held: int) -> tuple[Set, Set, Set]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = (images - images.mean()) / images.std(), labels
    parts = order.split([len(order) - 2 * held, held, held])
    train, valid, test = ((images[p], labels[p]) for p in parts)
    return train, valid, test
