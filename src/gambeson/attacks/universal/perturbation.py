"""Universal perturbations: delta with its provenance, applying, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from gambeson.attacks.universal.target import Target
from gambeson.base import Config, UserError, eps_text, load_tensors, notebook, save_tensors
from gambeson.base.checks import as_images
from gambeson.base.errors import some
from gambeson.data import Split, held_out
from gambeson.models import zoo
from gambeson.threat import Ball, Eps, Norm, perturb
from gambeson.victim import Shared

Status = Literal["done", "weak", "zero", "target not reached"]
"""``weak``: its norm is below 5 % of eps; ``zero``: it is zero although eps is not; ``target not reached``: the
attack's own stopping rule (DeepFool-UAP's fooling rate) was not met within its passes."""


class Provenance(Config):
    """How a universal perturbation was crafted: enough to reproduce it, and to refuse scoring it on its own images."""

    attack: str
    """Name of the attack."""
    settings: dict[str, Any]
    """Every setting of the attack."""
    eps: Eps
    norm: Norm
    seed: int
    model: str
    """Hash of the model's weights; those of several models are joined by ``+``."""
    crafted_on: str
    """Hash of the images it was crafted on; ``no images`` for data-free attacks."""
    crafted_split: str
    """Name of their split."""
    chosen_on: str
    """Name of the split that selected among restarts."""
    restarts: list[tuple[str, float]]
    """Each start and its rate on ``chosen_on``: UER, or the target rate if targeted."""
    status: Status
    """See :data:`Status`."""
    forwards: int
    backwards: int
    temperature: tuple[float, ...] = (1.0,)
    """What each model's logits were divided by while crafting; see :data:`gambeson.victim.Temperature`."""
    source_class: int | None = None
    """The true class it is for, if crafted class-wise."""
    target_hash: str | None = None
    """Hash of the static target map, which is stored with the perturbation."""
    left_out: int = 0
    """Training images that were left out because they are wholly of the class to hide."""


class UniversalPerturbation:
    """One perturbation for all images.

    Attributes:
        delta: (1, C, H, W), float32, in pixel units, inside the ball of ``about``.
        about: its provenance.
        image_hashes: (M,) int64, unique hashes (:attr:`gambeson.data.Split.image_hashes`) of the images it was crafted
            on, in ascending order; empty if there were none. They are stored in its file: 8 bytes per image, 400 kB for
            50,000, 10 MB for ImageNet.
        target_map: (H, W), the label map of a static target, -1 where it has none; None for any other target.
    """

    def __init__(
        self,
        delta: torch.Tensor,
        about: Provenance,
        image_hashes: torch.Tensor | None = None,
        target_map: torch.Tensor | None = None,
    ) -> None:
        if delta.ndim != 4 or len(delta) != 1:
            raise UserError(f"a universal perturbation has shape (1, C, H, W), got {tuple(delta.shape)}")
        ball = Ball(eps=about.eps, norm=about.norm)
        size = float(ball.length(delta.detach().double()))
        if not size <= ball.limit:  # not finite, too
            raise UserError(
                f"the universal perturbation has norm {size:.4g} ({about.norm}), but eps = {eps_text(about.eps)}: "
                "expected a finite one inside the ball; project it"
            )
        self.delta = delta.detach()
        self.image_hashes = torch.empty(0, dtype=torch.int64) if image_hashes is None else image_hashes.unique()
        self.about, self.target_map = about, target_map

    def __repr__(self) -> str:
        about, shape = self.about, "x".join(map(str, self.delta.shape[1:]))
        return (
            f"UniversalPerturbation({about.attack}, eps {eps_text(about.eps)}, norm {about.norm}, {shape}, "
            f"{about.status}, crafted on {about.crafted_split})"
        )

    def plot(self) -> Any:
        """Return a ``plotly`` figure of the pattern, stretched to the full range of colours."""
        return notebook.picture(self.delta[0].cpu(), f"{self.about.attack}, eps {eps_text(self.about.eps)}")

    @property
    def target(self) -> Target | None:
        """The target it was crafted for, with the map of a static one; None if untargeted."""
        told = self.about.settings.get("target")
        if self.target_map is not None and told is not None:
            return Target.of(self.target_map)
        found = None if told is None else Target.of(told)
        if found is not None and found.kind != "static" and found.value.isdecimal():  # an index, when it was crafted
            return found.model_copy(update={"value": f"#{found.value}"})
        return found

    @property
    def ball(self) -> Ball:
        """The ball of the perturbation."""
        return Ball(eps=self.about.eps, norm=self.about.norm)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images that it is for."""
        return tuple(self.delta.shape[1:])

    def shared(self, device: torch.device | str) -> Shared:
        """Return what images have in common, on a device, as :func:`gambeson.victim.predict` takes it."""
        return self.delta.to(device)

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Return clip(images + delta, 0, 1) for images (N, C, H, W) in [0, 1].

        Raises:
            UserError: images of another shape, or outside [0, 1].
        """
        images = as_images(images, floats=True)
        if images.shape[1:] != self.delta.shape[1:]:
            raise UserError(
                f"images of shape {tuple(images.shape)} came to a perturbation of {tuple(self.delta.shape)}: expected "
                "images of its shape"
            )
        return perturb(images, self.delta.to(images))

    def held_out(self, split: Split) -> Split:
        """Return the images of a split that the perturbation was not crafted on, on which it may be scored.

        A few shared images are left out, because data sets contain duplicates; many are an error
        (:func:`gambeson.data.held_out`).

        Raises:
            UserError: it was crafted on more of the images than chance explains.
        """
        return held_out(
            split,
            self.image_hashes,
            f"images that this perturbation was crafted on ({self.about.crafted_split})",
            "score it on images it has not seen, such as data.test; split.without(uap.image_hashes) leaves them out",
        )

    def save(self, path: str | Path) -> None:
        """Write the perturbation to one safetensors file."""
        tensors = self._tensors() | {"image_hashes": self.image_hashes}
        if self.target_map is not None:
            tensors["target_map"] = self.target_map
        save_tensors(Path(path), tensors, self.about.plain())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"delta": self.delta}

    @classmethod
    def load(cls, path: str | Path) -> UniversalPerturbation:
        """Read a perturbation written by :meth:`save`, or that of a model of the zoo, ``zoo:NAME``.

        Raises:
            UserError: the file is missing, damaged, a pickle, or holds something else, such as a patch.
        """
        tensors, about = load_tensors(Path(zoo.resolved(str(path), zoo.UAP)), "a universal perturbation")
        if "pattern" in tensors:
            raise UserError(
                f"{path} holds a patch, and this needs a perturbation in a norm ball: score a patch with `gambeson uap "
                "score`, or read it with gambeson.attacks.AdversarialPatch.load"
            )
        if set(tensors) - {"target_map"} != {"delta", "image_hashes"} or "crafted_on" not in about:
            raise UserError(
                f"{path} holds the tensors {some(sorted(tensors), 3)}: expected a universal perturbation, as "
                "`gambeson uap craft` writes; a network's weights are a model"
            )
        return cls(tensors["delta"], Provenance(**about), tensors["image_hashes"], tensors.get("target_map"))
