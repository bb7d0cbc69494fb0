"""One label per pixel."""

from __future__ import annotations

from typing import ClassVar

import torch

from gambeson.tasks.base import Task
from gambeson.tasks.registry import register


@register("segmentation")
class Segmentation(Task):
    """One label per pixel: logits (N, K, H, W), labels (N, H, W); each labelled pixel is right or wrong.

    Losses are averaged over the labelled pixels of an image, the headline metric is the pixel accuracy, and an attack
    has succeeded on an image once no labelled pixel is right.
    """

    label_dims: ClassVar[int] = 3
    label_form: ClassVar[str] = "label maps (N, H, W)"

    def units(self, values: torch.Tensor) -> torch.Tensor:
        """Return (N, H, W) as (N, H * W): the pixels are the units.

        Raises:
            UserError: there is not one value per pixel.
        """
        if values.ndim != 3:
            self._refuse(values)
        return values.flatten(1)
