"""One label per image."""

from __future__ import annotations

from typing import ClassVar

import torch

from gambeson.tasks.base import Task
from gambeson.tasks.registry import register


@register("classification")
class Classification(Task):
    """One label per image: logits (N, K), labels (N,); an image is right or wrong."""

    label_dims: ClassVar[int] = 1
    label_form: ClassVar[str] = "one label per image (N,)"
    per_image_label: ClassVar[bool] = True

    def units(self, values: torch.Tensor) -> torch.Tensor:
        """Return (N,) as (N, 1): the image is the unit.

        Raises:
            UserError: there is not one value per image.
        """
        if values.ndim != 1:
            self._refuse(values)
        return values.unsqueeze(1)

    def per_image(self, values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the values themselves, (N,), zero where the label does not count."""
        if values.ndim != 1:
            self._refuse(values)
        return values if self.ignore_index is None else values.where(self.valid(labels), 0)


CLASSIFICATION = Classification()
"""Classification in which every label counts: what is meant where no task is given."""
