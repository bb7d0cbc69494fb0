"""A data set."""

import torch

import gambeson as gb


@gb.data.register("blobs")
def blobs(root):
    """Bright squares in one of four corners, 8x8 grey, with noise."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    images = torch.rand(400, 1, 8, 8, generator=draw) * 0.5
    for k, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[k, :, row : row + 4, column : column + 4] += 0.4
    return images, labels
