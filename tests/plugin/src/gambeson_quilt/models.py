"""A model."""

from torch import nn

import gambeson as gb


@gb.models.register("two-layer", smallest=2)
class TwoLayer(nn.Sequential):
    """Two linear layers with a ReLU between them."""

    def __init__(self, in_channels, classes, image_size):
        pixels = in_channels * image_size[0] * image_size[1]
        super().__init__(nn.Flatten(), nn.Linear(pixels, 32), nn.ReLU(), nn.Linear(32, classes))
