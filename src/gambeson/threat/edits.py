"""Edits of images that a perturbation meets on its way to a model: JPEG, resizing, shifts, rounding, blur, colours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, radians
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import AfterValidator

from gambeson.base import UserError, unknown_name
from gambeson.base.config import parse_number
from gambeson.tasks import Task
from gambeson.threat.jpeg import differentiable_jpeg, jpeg

Change = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]
"""Images (N, C, H, W), a strength, and uniform draws in [0, 1) (N, C), to images of the same shape."""


class Strength(NamedTuple):
    """What the strength of a kind of edit is, and its range."""

    what: str
    low: float
    high: float
    whole: bool = False
    """Whether it is an integer."""


def _bits(images: torch.Tensor, bits: float, _: torch.Tensor) -> torch.Tensor:
    levels = 2 ** int(bits) - 1
    return (images * levels).round() / levels


def _resize(images: torch.Tensor, scale: float, _: torch.Tensor) -> torch.Tensor:
    size = [max(1, round(scale * side)) for side in images.shape[2:]]
    small = F.interpolate(images, size, mode="bilinear", antialias=True)
    return F.interpolate(small, list(images.shape[2:]), mode="bilinear", antialias=True)


_WAYS = torch.tensor([(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)])


def _shift(images: torch.Tensor, pixels: float, draws: torch.Tensor) -> torch.Tensor:
    moves = (int(pixels) * _WAYS[(8 * draws[:, 0]).long()]).to(images.device)
    steps = [torch.arange(side, device=images.device) for side in images.shape[2:]]
    down, right = ((step - moves[:, [k]]).clamp(0, len(step) - 1) for k, step in enumerate(steps))
    rows = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images[rows, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def _rotate(images: torch.Tensor, degrees: float, draws: torch.Tensor) -> torch.Tensor:
    angle = torch.where(draws[:, 0] < 0.5, -radians(degrees), radians(degrees)).to(images)
    return moved(images, angle)


def moved(
    images: torch.Tensor, angle: torch.Tensor, scale: torch.Tensor | float = 1.0, shift: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Shift images, scale them, and rotate them around the middle; bilinear, with the outermost pixels repeated.

    Args:
        images: (N, C, H, W).
        angle: (N,) in radians.
        scale: (N,), above 1 larger.
        shift: (N, 2) in pixels, to the right and down, before the rest.
    """
    height, width = images.shape[2:]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    right, down = (-2 * shift / torch.tensor([width, height]).to(images)).expand(len(images), 2).unbind(1)
    rows = [cos, -sin * height / width, right, sin * width / height, cos, down]
    places = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, places, mode="bilinear", padding_mode="border", align_corners=False)


def _blur(images: torch.Tensor, sigma: float, _: torch.Tensor) -> torch.Tensor:
    reach = ceil(3 * sigma)
    line = torch.exp(-(torch.arange(-reach, reach + 1).to(images) / sigma).square() / 2)
    line = (line / line.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, line, groups=len(line)), line.transpose(2, 3), groups=len(line))


def _gamma(images: torch.Tensor, power: float, _: torch.Tensor) -> torch.Tensor:
    return images.clamp(0, 1) ** power


def _smooth_gamma(images: torch.Tensor, power: float, draws: torch.Tensor) -> torch.Tensor:
    """Gamma with the slope that it has at 0.01 also below, where it would become infinite or zero."""
    slope = power * images.detach().clamp(min=0.01) ** (power - 1)
    return _gamma(images.detach(), power, draws) + slope * (images - images.detach())


def _colour(images: torch.Tensor, size: float, draws: torch.Tensor) -> torch.Tensor:
    return images + torch.where(draws < 0.5, -size, size).to(images)[:, :, None, None]


def _straight(change: Change) -> Change:
    """What a change returns, with the derivative of the identity."""

    def straight(images: torch.Tensor, strength: float, draws: torch.Tensor) -> torch.Tensor:
        return images + (change(images.detach(), strength, draws) - images.detach())

    return straight


KINDS = {
    "bits": Strength("bits per value", 1, 8, whole=True),
    "blur": Strength("standard deviation in pixels", 0.1, 10),
    "colour": Strength("change of each channel", 0.001, 1),
    "gamma": Strength("exponent", 0.25, 4),
    "jpeg": Strength("quality", 1, 100, whole=True),
    "print": Strength("standard deviation of its blur", 0.1, 10),
    "resize": Strength("scale", 0.05, 4),
    "rotate": Strength("degrees", 0.1, 45),
    "screenshot": Strength("quality of its JPEG", 1, 100, whole=True),
    "shift": Strength("pixels", 1, 64, whole=True),
}
NONE = "none"
_CHANGES: dict[str, tuple[Change, Change]] = {
    "bits": (_bits, _straight(_bits)),
    "blur": (_blur, _blur),
    "colour": (_colour, _colour),
    "gamma": (_gamma, _smooth_gamma),
    "jpeg": (lambda x, quality, _: jpeg(x, int(quality)), lambda x, quality, _: differentiable_jpeg(x, int(quality))),
    "resize": (_resize, _resize),
    "rotate": (_rotate, _rotate),
    "shift": (_shift, _shift),
}
"""Each change, and its differentiable form."""
_RANDOM = ("shift", "rotate", "colour")
_MOVING = ("shift", "rotate")
_MADE_OF: dict[str, Callable[[float], tuple[tuple[str, float], ...]]] = {
    "print": lambda sigma: (("blur", sigma), ("colour", min(1.0, 0.1 * sigma))),
    "screenshot": lambda quality: (("resize", 0.8), ("gamma", 1.1), ("jpeg", quality)),
}
"""Edits that are made of others, by their strength; the recipes are ours."""


@dataclass(frozen=True)
class Edit:
    """An edit of images, or several in turn; as text ``KIND:STRENGTH``, joined by ``+``, or ``none``.

    It takes place after a perturbation was added and clipped, so that an eps bounds the perturbation before the edit.

    - ``jpeg:QUALITY`` (1 to 100): stored and read by libjpeg, chroma halved. Its differentiable form is
      :func:`gambeson.threat.jpeg.differentiable_jpeg`.
    - ``bits:B`` (1 to 8): rounded to 2**B levels; ``bits:8`` is what a file without loss does.
    - ``resize:SCALE`` (0.05 to 4): to another size and back, bilinear with antialiasing.
    - ``shift:PIXELS``: cropped by so many pixels at a side or at a corner, one of eight drawn for each image, and as
      many repeated at the opposite one. It moves what is in an image.
    - ``rotate:DEGREES`` (0.1 to 45): around the middle, clockwise or not, drawn for each image; bilinear, with the
      outermost pixels repeated. It moves what is in an image.
    - ``blur:SIGMA``: Gaussian, in pixels.
    - ``gamma:POWER`` (0.25 to 4): x**POWER.
    - ``colour:SIZE``: each channel of each image moves up or down by SIZE, drawn for each.
    - ``screenshot:QUALITY``: ``resize:0.8+gamma:1.1+jpeg:QUALITY``.
    - ``print:SIGMA``: ``blur:SIGMA+colour:0.1*SIGMA``, of grey images too.

    Differentiable forms pass the gradient on straight through rounding and clips.
    """

    text: str
    """In its shortest spelling, such as ``jpeg:75``."""
    named: tuple[tuple[str, float], ...]
    """The kinds and strengths that the text names."""

    @classmethod
    def parse(cls, text: str | Edit) -> Edit:
        """Read an edit.

        Raises:
            UserError: an unknown kind, or a strength that is missing or out of range.
        """
        if isinstance(text, Edit):
            return text
        if not isinstance(text, str):
            raise UserError(f"an edit is a {type(text).__name__}: expected text such as 'jpeg:75'")
        parts = [part.strip() for part in text.split("+")]
        named = tuple(_named(part) for part in parts if part != NONE)
        return cls("+".join(f"{name}:{strength:g}" for name, strength in named) or NONE, named)

    def __str__(self) -> str:
        return self.text

    @property
    def steps(self) -> list[tuple[str, float]]:
        """The kinds and strengths that it is made of."""
        return [step for name, strength in self.named for step in _steps(name, strength)]

    def misfit(self, shape: Sequence[int], task: Task) -> str:
        """Return why it does not fit images of ``shape`` (C, H, W) with the labels of a task; empty if it does."""
        names, steps = dict(self.named), dict(self.steps)
        if not (task.per_image_label or steps.keys().isdisjoint(_MOVING)):
            return f"it moves what is in an image, and would have to move the {task.label_form} along"
        if steps.get("shift", 0) >= min(shape[1:]):
            return f"it leaves nothing of images of {shape[1]}x{shape[2]} pixels"
        if "colour" in names and shape[0] == 1:
            return "images of one channel have no colours; gamma and print change grey images"
        if "jpeg" in steps and shape[0] not in (1, 3):
            return f"JPEG stores grey and colour images, and these have {shape[0]} channels"
        return ""

    def draw(self, images: int, channels: int, generator: torch.Generator) -> torch.Tensor:
        """Draw what is random about it, (S, N, C) for its S steps; each image has its own numbers, one after another.

        The numbers of an image do not depend on how a split is cut into batches.
        """
        if not any(name in _RANDOM for name, _ in self.steps):
            return torch.empty(len(self.steps), images, 0)
        drawn = torch.rand((images, len(self.steps), channels), generator=generator, device=generator.device)
        return drawn.transpose(0, 1)

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return edited images in [0, 1].

        Args:
            images: (N, C, H, W) in [0, 1].
            drawn: what :meth:`draw` returned for them.
        """
        with torch.no_grad():
            for (name, strength), draws in zip(self.steps, drawn, strict=True):
                images = _CHANGES[name][0](images, strength, draws).clamp(0, 1)
        return images

    def differentiable(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return edited images with derivatives; see :meth:`__call__`."""
        for (name, strength), draws in zip(self.steps, drawn, strict=True):
            images = _clip(_CHANGES[name][1](images, strength, draws), 0, draws)
        return images

    def seeded(self, channels: int, generator: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that edits one batch after another, each image by the generator's next numbers."""
        return lambda images: self(images, self.draw(len(images), channels, generator))


_clip = _straight(lambda images, *_: images.clamp(0, 1))


def check_edits(edits: Iterable[str | Edit], shape: Sequence[int], task: Task, where: str) -> list[Edit]:
    """Return edits that fit images of ``shape`` (C, H, W).

    Raises:
        UserError: one does not; or as :meth:`Edit.parse`.
    """
    found = [Edit.parse(edit) for edit in edits]
    for edit in found:
        if fault := edit.misfit(shape, task):
            raise UserError(f"edit {edit} does not fit {where}: {fault}; leave it out")
    return found


def _steps(name: str, strength: float) -> tuple[tuple[str, float], ...]:
    return _MADE_OF[name](strength) if name in _MADE_OF else ((name, strength),)


def strength_of(text: str) -> str:
    """Return what the strength of an edit is, in words; empty for ``none``, several in turn, and unknown kinds."""
    kind = KINDS.get(text.split(":")[0])
    return kind.what if kind and "+" not in text else ""


def _named(part: str) -> tuple[str, float]:
    name, _, text = part.partition(":")
    if name not in KINDS:
        raise unknown_name("edit", name, [*KINDS, NONE])
    kind = KINDS[name]
    number = "an integer" if kind.whole else "a number"
    try:
        strength = float(parse_number(text))
    except ValueError:
        strength = float("nan")
    if not kind.low <= strength <= kind.high or (kind.whole and strength % 1):
        raise UserError(
            f"edit {part!r}: expected {name}:STRENGTH, its {kind.what}, {number} from {kind.low:g} to {kind.high:g}"
        )
    return name, strength


EditText = Annotated[str, AfterValidator(lambda text: Edit.parse(text).text)]
"""An edit in settings, as text."""
