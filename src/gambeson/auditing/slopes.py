"""The audit's Jacobian analysis: slopes, what inputs share of them, bounds, and the surface of the loss."""

from __future__ import annotations

from gambeson.base import Config


class Slopes(Config):
    """What the model's slopes say, on a sample of test images."""

    images: int
    """Test images looked at."""
