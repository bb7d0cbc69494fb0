"""Ensemble Adversarial Training (Tramèr et al., ICLR 2018, arXiv 1705.07204)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import cross_entropy, image_means
from gambeson.base import Number, UserError, generator
from gambeson.defenses.objective import Defense, Objective, Scene
from gambeson.defenses.registry import register
from gambeson.defenses.terms import Batch, Clean, Term, batch_loss
from gambeson.threat import Ball, Eps, Norm, perturb
from gambeson.victim import Victim


@register("ensemble-adversarial", source="Tramèr et al. 2018", cost="3 / 3")
class EnsembleAdversarial(Defense):
    """Train on single-step examples that a model drawn for each batch crafts: a static source, or the model itself.

    Without sources this is single-step adversarial training. Sources stay as they are, in evaluation mode (ours: the
    released MNIST code leaves their dropout on). Costs one forward and backward of the drawn model beside the step;
    nothing with ``precompute`` where a source is drawn.
    """

    eps: Eps
    """Radius in pixel units: 0.3 on MNIST, 16/256 on ImageNet in the paper."""
    norm: Norm = "inf"
    sources: tuple[str, ...] = ()
    """Static models: run folders or weights files; or names of architectures, which the training run trains first,
    by the same recipe and without a defence (the paper's MNIST nets are ``mnist-a`` to ``mnist-d``)."""
    pool: Annotated[tuple[Any, ...], Field(exclude=True, repr=False)] = ()
    """The same as modules, from pixels to logits; they precede ``sources``."""
    attack: Literal["fgsm", "r-fgsm", "step-ll", "r-step-ll"] = "fgsm"
    """How examples are made: FGSM on MNIST, Step-LL (towards the least likely class) on ImageNet in the paper; ``r-``
    puts a random-sign step before it."""
    start_size: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Length of that random step as a share of eps; the gradient's has the rest."""
    label: Literal["prediction", "truth"] = "prediction"
    """Which label an untargeted step leaves: the drawn model's own prediction, against label leaking (the released
    code's), or the true one."""
    mixing: Literal["both", "half"] = "both"
    """Clean and adversarial form of every image with equal weights (the paper's MNIST), or the first half of the
    batch replaced, with one loss (its ImageNet)."""
    random_eps: bool = False
    """A radius for every image: |N(0, eps / 2)| cut to [0, eps] (Kurakin et al. 2017)."""
    precompute: bool = False
    """Compute the sources' gradients once for all training images, one byte a value and source; for steps without a
    random start in the norm inf, and without augmentation (the paper's remark)."""

    def supplied(self, load: Callable[[str], nn.Module]) -> Defense:
        """Load the sources."""
        return self.model_copy(update={"pool": (*self.pool, *(load(name) for name in self.sources))})

    def check(self, batch_size: int) -> None:
        """Refuse a precomputation that cannot be right.

        Raises:
            UserError: the step has a random start, or the norm is not inf.
        """
        if self.precompute and (self.attack.startswith("r-") or self.norm != "inf"):
            raise UserError(
                f"precompute works for fgsm and step-ll in the norm inf, got {self.attack} in {self.norm}: "
                "leave precompute out"
            )

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The clean risk and the risk on examples of the model itself: what stands without sources."""
        return self._with(Transferred(self, []))

    def open(self, scene: Scene) -> Objective:
        """Hold the sources frozen, and compute their gradients where that is asked for.

        Raises:
            UserError: a source is named and not loaded, or does not answer as the model does.
        """
        if len(self.pool) < len(self.sources):
            raise UserError(
                f"the sources {', '.join(self.sources)} are not loaded: train with a run (gambeson train), or give "
                "the modules as pool=(...)"
            )
        term = Transferred(self, self.pool)
        term.fit(scene)
        return Objective(self._with(term))

    def _with(self, term: Transferred) -> dict[str, tuple[float, Term]]:
        if self.mixing == "half":
            return {"adversarial": (1.0, term)}
        return {"adversarial": (0.5, term), "clean": (0.5, Clean())}


class Transferred:
    """Cross-entropy on the examples of one model of the pool, drawn anew for every batch."""

    def __init__(self, defense: EnsembleAdversarial, sources: Iterable[nn.Module]) -> None:
        self.defense = defense
        self.ball = Ball(eps=defense.eps, norm=defense.norm)
        self.sources = [Victim(source, fast=True).__enter__() for source in sources]  # frozen for good
        self.signs: list[torch.Tensor] = []

    def fit(self, scene: Scene) -> None:
        """See that every source answers as the model does; precompute what is asked for."""
        images, _ = scene.train.take(slice(0, 2), Victim(scene.model).device)
        with Victim(scene.model) as victim, torch.no_grad():
            expected = victim(images).shape
        for number, source in enumerate(self.sources, 1):
            source.model.to(images.device)
            with torch.no_grad():
                found = source(images).shape
            if found != expected:
                raise UserError(
                    f"source {number} answers {tuple(found)} to 2 images and the model {tuple(expected)}: choose a "
                    "source of the same classes"
                )
            if self.defense.precompute:
                self.signs.append(self._signs(source, scene))

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss on the examples, or on the batch of which they replace one half."""
        moved = self.craft(model, batch)
        if self.defense.mixing == "half":
            half = len(moved) // 2
            moved = torch.cat([moved[:half], batch.images[half:]])
        return batch_loss(model, moved, batch)

    def craft(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the examples (N, C, H, W) of the model drawn for this batch."""
        drawn = int(torch.randint(len(self.sources) + 1, (), generator=generator(batch.seed, "source")))
        if drawn == len(self.sources):
            with Victim(model, fast=True) as victim:
                moved = self._step(victim, batch)
        elif self.signs:
            if batch.indices is None:
                raise UserError("precompute needs the images as they are: train without augmentation")
            signs = self.signs[drawn][batch.indices].to(batch.images.device)
            moved = perturb(batch.images, self.ball.eps * signs.to(batch.images.dtype))
        else:
            moved = self._step(self.sources[drawn], batch)
        if not self.defense.random_eps:
            return moved
        shape = (len(moved) * batch.place[1], 1, 1, 1)
        normal = torch.randn(shape, generator=generator(batch.seed, "eps", device=moved.device), device=moved.device)
        return batch.images + batch.mine((normal / 2).abs().clamp(max=1)) * (moved - batch.images)

    def _step(self, victim: Victim, batch: Batch) -> torch.Tensor:
        settings, images = self.defense, batch.images
        delta, length = torch.zeros_like(images), settings.eps
        if settings.attack.startswith("r-"):
            shape = (len(images) * batch.place[1], *images.shape[1:])
            signs = self.ball.signs(shape, generator(batch.seed, "start", device=images.device))
            delta = settings.start_size * batch.mine(signs).to(images.dtype)
            length = (1 - settings.start_size) * settings.eps
        gradient = self._gradient(victim, perturb(images, delta), batch.labels, batch.ignore_index)
        return perturb(images, self.ball.project(delta + length * self.ball.steepest(gradient))).detach()

    def _gradient(
        self, victim: Victim, images: torch.Tensor, labels: torch.Tensor, ignore_index: int | None
    ) -> torch.Tensor:
        """Return the direction of one step; prediction and gradient come from one forward."""
        least_likely = self.defense.attack.endswith("step-ll")
        with torch.enable_grad():
            point = images.detach().requires_grad_()
            logits = victim(point)
            goal = labels
            if least_likely or self.defense.label == "prediction":
                goal = logits.argmin(1) if least_likely else logits.argmax(1)
                goal = goal if ignore_index is None else goal.where(labels != ignore_index, labels)
            value = image_means(cross_entropy(logits, goal, ignore_index), goal, ignore_index).sum()
            gradient = victim.gradient(value, point, len(images))
        return -gradient if least_likely else gradient

    def _signs(self, source: Victim, scene: Scene) -> torch.Tensor:
        found = []
        for images, labels in scene.train.batches(500, device=source.device):
            found.append(self._gradient(source, images, labels, scene.train.ignore_index).sign().to(torch.int8))
        return torch.cat(found)
