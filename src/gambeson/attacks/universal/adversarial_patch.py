"""Adversarial patches: pattern, mask and placement with their provenance, applying, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gambeson.attacks.universal.perturbation import Provenance, UniversalPerturbation
from gambeson.attacks.universal.target import Target
from gambeson.base import UserError, load_tensors, notebook
from gambeson.base.checks import as_images
from gambeson.base.errors import some
from gambeson.data import Split
from gambeson.models import zoo
from gambeson.threat import Ball, Patch, Placement


class AdversarialPatch(UniversalPerturbation):
    """One patch for all images, at a place that is drawn for each (Brown et al. 2017).

    Attributes:
        pattern: (1, C, h, w), float32, in [0, 1].
        mask: (1, 1, h, w), float32, in [0, 1]: where the patch is.
        image_shape: (C, H, W) of the images that it is for.
        about: its provenance; among the settings is its placement.
        image_hashes: of the images it was crafted on, as those of a :class:`UniversalPerturbation`.
    """

    target_map = None

    def __init__(
        self,
        pattern: torch.Tensor,
        mask: torch.Tensor,
        image_shape: tuple[int, ...],
        about: Provenance,
        image_hashes: torch.Tensor | None = None,
    ) -> None:
        if pattern.ndim != 4 or len(pattern) != 1 or mask.shape != (1, 1, *pattern.shape[2:]):
            raise UserError(
                f"a patch has a pattern (1, C, h, w) and a mask (1, 1, h, w), got {tuple(pattern.shape)} and "
                f"{tuple(mask.shape)}"
            )
        for name, values in (("pattern", pattern), ("mask", mask)):
            if not (float(values.min()) >= 0 and float(values.max()) <= 1):
                raise UserError(f"the {name} of a patch holds values outside [0, 1], or NaN: expected pixels")
        self.pattern, self.mask, self.image_shape = pattern.detach(), mask.detach(), tuple(image_shape)
        self.image_hashes = torch.empty(0, dtype=torch.int64) if image_hashes is None else image_hashes.unique()
        self.about = about

    def __repr__(self) -> str:
        size, image = ("x".join(map(str, one)) for one in (self.pattern.shape[2:], self.image_shape))
        return (
            f"AdversarialPatch({self.about.attack}, {self.about.settings.get('shape', 'patch')} of {size} pixels, "
            f"{100 * self.area:.2g} % of {image}, {self.placement}, crafted on {self.about.crafted_split})"
        )

    @property
    def delta(self) -> torch.Tensor:  # type: ignore[override]
        """Refuse: a patch is not added to images."""
        raise _no_ball()

    @property
    def ball(self) -> Ball:
        """Refuse, as :attr:`delta` does."""
        raise _no_ball()

    @property
    def placement(self) -> Placement:
        """How it is placed."""
        return Placement(**{name: self.about.settings[name] for name in Placement.model_fields})

    @property
    def area(self) -> float:
        """Share of an image that it covers at scale 1."""
        return float(self.mask.sum()) / (self.image_shape[1] * self.image_shape[2])

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images that it is for."""
        return self.image_shape

    @property
    def target(self) -> Target | None:
        """The class it was crafted for; None if untargeted."""
        told = self.about.settings.get("target")
        return None if told is None else Target.of(told)

    def placed(self, pattern: torch.Tensor | None = None, placement: Placement | None = None) -> Patch:
        """Return the patch itself, or another pattern (1, C, h, w), such as a control's, or one placed differently."""
        return Patch(self.pattern if pattern is None else pattern, self.mask, placement or self.placement)

    def shared(self, device: torch.device | str) -> Patch:
        """Return what images have in common, on a device, as :func:`gambeson.victim.predict` takes it."""
        return self.placed().to(device)

    def apply(self, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
        """Return images (N, C, H, W) in [0, 1] with the patch on each, at places drawn from the seed.

        Raises:
            UserError: images of another shape, or outside [0, 1].
        """
        images = as_images(images, floats=True)
        if tuple(images.shape[1:]) != self.image_shape:
            raise UserError(
                f"the patch is for images of shape {self.image_shape}, got {tuple(images.shape[1:])}: give such images"
            )
        return self.shared(images.device).seeded(seed)(images)

    def held_out(self, split: Split) -> Split:
        """As :meth:`UniversalPerturbation.held_out`; of a patch with a target also without images of that class.

        They would count as successes of the patch whatever it looks like (Brown et al. 2017).

        Raises:
            UserError: as there, or all images are of the target's class.
        """
        split = super().held_out(split)
        if self.target is None or not split.task.per_image_label:
            return split
        target = self.target.within(split).index
        others = split.labels != target
        if not bool(others.any()):
            raise UserError(
                f"every image of {split.name} is of the class {split.classes[target]!r}, which the patch is to make "
                "others taken for: give images of other classes"
            )
        return split if bool(others.all()) else split.subset(others)

    def plot(self) -> Any:
        """Return a ``plotly`` figure of the pattern."""
        return notebook.picture((self.pattern * self.mask)[0].cpu(), f"{self.about.attack}, {100 * self.area:.2g} %")

    def _tensors(self) -> dict[str, torch.Tensor]:
        shape = torch.tensor(self.image_shape)
        return {"pattern": self.pattern, "mask": self.mask, "image_shape": shape}

    @classmethod
    def load(cls, path: str | Path) -> AdversarialPatch:
        """Read a patch written by :meth:`save`.

        Raises:
            UserError: the file is missing, damaged, a pickle, or holds something else, as ``zoo:NAME`` does.
        """
        path = zoo.resolved(str(path), zoo.UAP)
        tensors, about = load_tensors(Path(path), "a patch")
        if set(tensors) != {"pattern", "mask", "image_shape", "image_hashes"} or "crafted_on" not in about:
            found = f"the tensors {some(sorted(tensors), 3)}"
            if "delta" in tensors:
                found = "a perturbation of whole images"
            raise UserError(f"{path} holds {found}: expected a patch, as `gambeson uap craft` writes")
        shape = tuple(tensors["image_shape"].tolist())
        return cls(tensors["pattern"], tensors["mask"], shape, Provenance(**about), tensors["image_hashes"])


def _no_ball() -> UserError:
    return UserError(
        "a patch is in no norm ball, and this needs a perturbation that is: score a patch with "
        "gambeson.evaluation.universal_evasion or by_placement, or `gambeson uap score`"
    )


def load(path: str | Path) -> UniversalPerturbation:
    """Read a universal perturbation or a patch, whichever a file holds; ``zoo:NAME`` is that of a model of the zoo.

    Raises:
        UserError: the file is missing, damaged, a pickle, or holds something else.
    """
    path = zoo.resolved(str(path), zoo.UAP)
    tensors, _ = load_tensors(Path(path), "a universal perturbation or a patch")
    return (AdversarialPatch if "pattern" in tensors else UniversalPerturbation).load(path)
