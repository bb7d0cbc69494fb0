"""Small scenes for segmentation: coloured squares on a grey ground with noise, and a small net that knows them."""

from __future__ import annotations

import torch
from torch import nn

from gambeson.base import pixel_bytes
from gambeson.data import Dataset, Split
from gambeson.tasks import Segmentation

CLASSES = ("ground", "red", "blue", "green")
HUES = torch.tensor([[0.75, 0.35, 0.5], [0.35, 0.5, 0.75], [0.5, 0.75, 0.35]])
IGNORED = 255


def scenes(count: int, seed: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, side, side) of bytes, and label maps; the first row of pixels has no label that counts."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.5 + 0.12 * torch.randn(count, 3, side, side, generator=draw)
    labels = torch.zeros(count, side, side, dtype=torch.long)
    for image, label in zip(images, labels, strict=True):
        for _ in range(2):
            label_of = int(torch.randint(1, len(CLASSES), (1,), generator=draw))
            size = int(torch.randint(6, 10, (1,), generator=draw))
            top, left = (int(torch.randint(side - size, (1,), generator=draw)) for _ in range(2))
            label[top : top + size, left : left + size] = label_of
            image[:, top : top + size, left : left + size] += (HUES[label_of - 1] - 0.5)[:, None, None]
    labels[:, 0] = IGNORED
    return pixel_bytes(images), labels


def dataset(train: int = 150, held: int = 40) -> Dataset:
    """The scenes as a data set; no two splits share a draw."""

    def split(name: str, count: int, seed: int) -> Split:
        return Split(f"scenes/{name}", *scenes(count, seed), CLASSES, task=Segmentation(ignore_index=IGNORED))

    parts = split("train", train, 0), split("validation", held, 1), split("test", held, 2)
    return Dataset("scenes", *parts, CLASSES)


def net(data: Dataset) -> nn.Sequential:
    """Three convolutions, trained for a second or two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, len(CLASSES), 3, padding=1)),
        )
        images, labels = data.train.take(slice(None), "cpu")
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(120):
            rows = torch.randperm(len(images))[:32]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows], ignore_index=IGNORED).backward()
            optimizer.step()
    return model.eval()
