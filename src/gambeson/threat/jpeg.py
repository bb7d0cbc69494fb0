"""JPEG: the codec itself, and a differentiable approximation of it."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Return images as libjpeg stores them and reads them again, chroma halved (4:2:0), on the device of the images.

    Args:
        images: (N, C, H, W) in [0, 1], grey or colour; rounded to 8 bits first.
        quality: from 1 to 100.
    """
    pixels = (images.detach() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1)
    stored = [torch.from_numpy(_stored(one, quality)) for one in pixels.squeeze(3).numpy()]
    return torch.stack(stored).view(pixels.shape).permute(0, 3, 1, 2).to(images) / 255 if stored else images


def _stored(pixels: np.ndarray[Any, Any], quality: int) -> np.ndarray[Any, Any]:
    """Encode and decode one image, (H, W) or (H, W, 3) bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.array(Image.open(file))


def quantisation(quality: int) -> torch.Tensor:
    """Return libjpeg's tables for luminance and chrominance, (2, 8, 8): those of the standard's annex K, scaled."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor([_LUMINANCE, _CHROMINANCE]) * scale + 50) // 100).clamp(1, 255).float()


def smooth_round(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest integer plus the cube of what is left, whose derivative is not zero almost everywhere.

    Shin and Song, "JPEG-resistant Adversarial Images" (NeurIPS workshop on machine learning and computer security,
    2017).
    """
    nearest = values.detach().round()
    return nearest + (values - nearest) ** 3


def differentiable_jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Return what JPEG makes of images, with derivatives: all of it but entropy coding, which loses nothing.

    Colours are transformed as in JFIF, chroma is halved and read back by linear interpolation, blocks of 8 pixels pass
    through the discrete cosine transform, the tables of :func:`quantisation` and :func:`smooth_round` (Shin and Song
    2017). Images are neither rounded to 8 bits nor clipped.

    Args:
        images: (N, C, H, W), grey or colour.
        quality: from 1 to 100.
    """
    pixels, tables = images * 255, quantisation(quality).to(images)
    if images.shape[1] == 1:
        return (_quantised(pixels - 128, tables[0]) + 128) / 255
    height, width = images.shape[2:]
    planes = torch.einsum("kc,nchw->nkhw", images.new_tensor(_TO_YCC), pixels)
    luma = _quantised(planes[:, :1] - 128, tables[0]) + 128
    halved = F.avg_pool2d(F.pad(planes[:, 1:], (0, width % 2, 0, height % 2), mode="replicate"), 2)
    chroma = F.interpolate(_quantised(halved, tables[1]), scale_factor=2.0, mode="bilinear", align_corners=False)
    planes = torch.cat([luma, chroma[..., :height, :width]], 1)
    return torch.einsum("ck,nkhw->nchw", images.new_tensor(_TO_RGB), planes) / 255


def _quantised(planes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Quantise the cosine transform of every block of planes (N, C, H, W); edges are repeated to whole blocks."""
    height, width = planes.shape[2:]
    padded = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (N, C, rows, columns, 8, 8)
    steps = torch.arange(8, device=planes.device)
    cosines = torch.cos((2 * steps + 1) * steps[:, None] * math.pi / 16).to(planes) / 2
    cosines[0] = math.sqrt(0.125)
    spectrum = smooth_round(cosines @ blocks @ cosines.T / table) * table
    blocks = cosines.T @ spectrum @ cosines
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width]
