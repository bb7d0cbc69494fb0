"""Segmentation models: one row of logits per pixel, at every size, from every source."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gambeson import models
from gambeson.base import UserError

# name, channels, size
CASES = [("unet-small", 3, (64, 64)), ("unet-small", 1, (19, 35)), ("unet-smallx0.5", 3, (16, 16))]


@pytest.mark.parametrize(("name", "channels", "size"), CASES)
def test_logits_of_every_pixel_gradients_and_independence_of_the_batch(name, channels, size):
    model = models.create(name, in_channels=channels, classes=7, image_size=size, mean=0.4, std=0.3, seed=0)
    pixels = torch.rand(2, channels, *size)
    logits = model(pixels)
    assert logits.shape == (2, 7, *size)
    labels = torch.arange(2 * size[0] * size[1]).view(2, *size) % 7
    F.cross_entropy(logits, labels).backward()
    silent = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert silent == []
    model.eval()
    with torch.no_grad():
        together = model(pixels)
        alone = torch.cat([model(pixels[:1]), model(pixels[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], rtol=0, atol=1e-6)


def test_a_u_net_s_weights_by_hand_and_its_smallest_size():
    widths, channels, classes = [8, 16, 32, 64, 128], 3, 7
    total = 0
    for before, after in zip([channels, *widths], widths, strict=False):
        total += 9 * (before + after) * after + 4 * after
    for below, after in zip(widths[1:], widths, strict=False):
        total += below * after + after + 9 * 3 * after * after + 4 * after
    assert models.count_parameters(models.create("unet-small", in_channels=3, classes=7, image_size=16)) == (
        total + widths[0] * classes + classes
    )
    with pytest.raises(UserError, match=r"unet-small cannot take 15x64 images: the smallest it takes are 16x16"):
        models.create("unet-small", in_channels=3, classes=7, image_size=(15, 64))
