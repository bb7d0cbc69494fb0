"""Pictures inside the page: test images with the model's answers, patterns, and values as colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from gambeson.base import eps_text, pixel_bytes
from gambeson.evaluation import Rate
from gambeson.tasks import of as task_of


@dataclass(frozen=True)
class Pattern:
    """A perturbation as a picture, with its caption."""

    source: str
    alt: str
    title: str
    scale: str
    rate: str


@dataclass(frozen=True)
class Answer:
    """A model's prediction for one picture."""

    source: str
    alt: str
    name: str
    right: bool


@dataclass(frozen=True)
class Example:
    """A test image, clean and perturbed."""

    truth: str
    clean: Answer
    perturbed: Answer


def pattern(delta: torch.Tensor, eps: float, norm: str, label: str, rate: str, status: str = "done") -> Pattern:
    """Draw a perturbation (C, H, W) for the model ``label``; ``rate`` is what it does."""
    white = reach(delta, eps, norm)
    size = eps_text(white) if norm == "inf" else f"{white:.3g}"
    return Pattern(
        source=png(signed(delta, white)),
        alt=f"Universal perturbation for {label} at eps {eps_text(eps)}",
        title=f"eps {eps_text(eps)}" + ("" if status == "done" else f" ({status})"),
        scale=f"{'each channel: ' if delta.shape[0] == 3 else ''}black -{size}, grey 0, white +{size}",
        rate=rate,
    )


def examples(tensors: Mapping[str, torch.Tensor], classes: Sequence[str]) -> list[Example]:
    """Draw test images with the model's answers, from :func:`gambeson.auditing.stages.examples.save_examples`.

    Label maps are drawn by :mod:`gambeson.report.scenes`.
    """
    if not task_of(tensors["labels"]).per_image_label:
        return []

    def answer(image: str, prediction: str, k: int, kind: str) -> Answer:
        source = png(tensors[image][k])
        said, truth = int(tensors[prediction][k]), int(tensors["labels"][k])
        name = classes[said] if said >= 0 else "no majority"
        return Answer(source, f"Test image of class {classes[truth]}, {kind}", name, said == truth)

    return [
        Example(
            truth=classes[int(tensors["labels"][k])],
            clean=answer("images", "predictions", k, "clean"),
            perturbed=answer("perturbed", "perturbed_predictions", k, "perturbed"),
        )
        for k in range(len(tensors["images"]))
    ]


def first_flipped(shown: Sequence[Example]) -> Example | None:
    """Return the first example that the pattern turns from right to wrong, else the first one; None without any."""
    return next((one for one in shown if one.clean.right and not one.perturbed.right), next(iter(shown), None))


def proportion(shown: Sequence[Example], wrong: Rate, clean: Rate) -> str:
    """Say how many of the examples the model gets wrong, beside how many of all test images; empty without examples."""
    if not shown:
        return ""
    under = sum(not example.perturbed.right for example in shown)
    before = sum(not example.clean.right for example in shown)
    alike = abs(under - wrong.value * len(shown)) < 1 and abs(before - clean.value * len(shown)) < 1
    kept = "Right and wrong stand here as they do in all test images. " if alike else ""
    return (
        f"{kept}Of these {len(shown)} the model gets {under} wrong with the pattern and {before} without it; of all "
        f"{wrong.n:,} it gets {round(wrong.value * wrong.n):,} wrong with it and {round(clean.value * clean.n):,} "
        "without it."
    )


def png(pixels: torch.Tensor) -> str:
    """Return a PNG data URI of a uint8 image (C, H, W); of other than 1 or 3 channels, the first."""
    if len(pixels) == 3:
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), "RGB")
    else:
        picture = Image.fromarray(pixels[0].contiguous().numpy(), "L")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def reach(delta: torch.Tensor, eps: float, norm: str) -> float:
    """Return the change drawn as white: eps, or the largest change if eps is a Euclidean length."""
    return eps if norm == "inf" else float(delta.abs().max())


def signed(delta: torch.Tensor, white: float) -> torch.Tensor:
    """Return delta (C, H, W) as uint8 pixels: grey is no change, 255 is +white, 0 is -white, each channel."""
    return pixel_bytes(torch.full_like(delta, 0.5) if white == 0 else 0.5 + delta.float() / (2 * white))


def painted(values: torch.Tensor, ramp: Sequence[str]) -> torch.Tensor:
    """Return values (H, W) as uint8 pixels (3, H, W): the lowest in the ramp's first colour, the highest its last."""
    low, high = float(values.min()), float(values.max())
    place = (values.double() - low) / max(high - low, 1e-300) * (len(ramp) - 1)
    colours = torch.tensor([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in ramp], dtype=torch.float64)
    below = place.floor().long().clamp(max=len(ramp) - 2)
    share = (place - below)[..., None]
    return pixel_bytes((colours[below] * (1 - share) + colours[below + 1] * share).permute(2, 0, 1) / 255)


def icon() -> str:
    """Return the page's icon, a small chessboard."""
    rows, columns = torch.arange(16).view(-1, 1) // 4, torch.arange(16) // 4
    return png(((rows + columns) % 2 * 150 + 70).to(torch.uint8)[None])
