"""Ensemble Adversarial Training (Tramèr et al., ICLR 2018, arXiv 1705.07204)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.gradient.pgd import FGSM, PGD, RFGSM, RStepLL, StepLL
from gambeson.base import Number, UserError, generator
from gambeson.defenses.objective import Batch, Clean, Defense, Objective, Term, TrainContext, batch_loss
from gambeson.defenses.registry import register
from gambeson.threat import Eps, Norm, perturb
from gambeson.victim import Victim


@register("ensemble-adversarial", source="Tramèr et al. 2018", cost="3 / 3")
class EnsembleAdversarial(Defense):
    """Train on single-step examples crafted on a model drawn per batch: a static source, or the model itself.

    Without sources this is single-step adversarial training. Sources are frozen, in evaluation mode (ours: the released
    MNIST code leaves their dropout on); one that is the trained model itself, or shares weights with it, is copied at
    the start. Costs one forward and backward of the drawn model in addition to the step, and one forward for a
    predicted label; nothing with ``precompute`` if a source is drawn.
    """

    eps: Eps
    """Radius in pixel units: 0.3 on MNIST, 16/256 on ImageNet in the paper."""
    norm: Norm = "inf"
    sources: tuple[str, ...] = ()
    """Static models: run folders or weights files; or names of architectures, which are trained first, with the same
    recipe and without a defence (the paper's MNIST nets are ``mnist-a`` to ``mnist-d``)."""
    pool: Annotated[tuple[Any, ...], Field(exclude=True, repr=False)] = ()
    """Static models as modules from pixels to logits, in front of ``sources``."""
    attack: Literal["fgsm", "r-fgsm", "step-ll", "r-step-ll"] = "fgsm"
    """The attack: FGSM on MNIST, Step-LL (towards the least likely class) on ImageNet in the paper; ``r-`` adds a
    random-sign step before it. These are :class:`gambeson.attacks.FGSM` and its variants, with the labels of the clean
    image."""
    start_size: Annotated[Number, Field(ge=0, le=1)] = 0.5
    """Size of that random step as a share of eps; the gradient step has the rest."""
    label: Literal["prediction", "truth"] = "prediction"
    """Label that an untargeted step leaves: the drawn model's prediction, against label leaking (the released code's),
    or the true one."""
    mixing: Literal["both", "half"] = "both"
    """Clean and adversarial form of every image with equal weights (the paper's MNIST), or the first half of the
    batch replaced, with one loss (its ImageNet)."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """Weight lambda of an adversarial example relative to a clean one: 0.3 in Kurakin et al. 2017, whose mean
    is (clean + lambda * adversarial) / (1 + lambda); the ensemble paper's MNIST code weighs them equally."""
    random_eps: bool = False
    """A radius per image: |N(0, eps / 2)| truncated to [0, eps] (Kurakin et al. 2017), for the whole attack on the
    image."""
    precompute: bool = False
    """Compute the sources' gradient signs once for all training images, one byte per value and source; for attacks
    without a random start in the norm inf, and without augmentation (the paper's remark)."""

    def with_source_models(self, load: Callable[[str], nn.Module]) -> Defense:
        """Load the sources."""
        return self.model_copy(update={"pool": (*self.pool, *(load(name) for name in self.sources))})

    def check(self, batch_size: int) -> None:
        """Check that the precomputation is possible.

        Raises:
            UserError: the attack has a random start, or the norm is not inf.
        """
        if self.precompute and (self.attack.startswith("r-") or self.norm != "inf"):
            raise UserError(
                f"precompute works for fgsm and step-ll in the norm inf, got {self.attack} in {self.norm}: "
                "leave precompute out"
            )

    def terms(self) -> dict[str, tuple[float, Term]]:
        """The clean risk and the risk on examples of the model itself (without sources)."""
        return self._with(Transferred(self, []))

    def build_objective(self, context: TrainContext) -> Objective:
        """Freeze the sources, and precompute their gradients if requested.

        Raises:
            UserError: a named source is not loaded, or its output shape differs from the model's.
        """
        if len(self.pool) < len(self.sources):
            raise UserError(
                f"the sources {', '.join(self.sources)} are not loaded: train with a run (gambeson train), or give "
                "the modules as pool=(...)"
            )
        term = Transferred(self, self.pool)
        term.fit(context)
        return Objective(self._with(term))

    def _with(self, term: Transferred) -> dict[str, tuple[float, Term]]:
        if self.mixing == "half":
            return {"adversarial": (1.0, term)}
        whole = 1 + self.weight
        return {"adversarial": (self.weight / whole, term), "clean": (1 / whole, Clean())}

    @property
    def crafting(self) -> PGD:
        """The attack, from :mod:`gambeson.attacks`."""
        common: dict[str, Any] = {"eps": self.eps, "norm": self.norm}
        if self.attack.startswith("r-"):
            common["start_size"] = self.start_size
        if self.attack.endswith("step-ll"):
            return (RStepLL if self.attack.startswith("r-") else StepLL)(**common)
        return (RFGSM if self.attack.startswith("r-") else FGSM)(label=self.label, **common)


class Transferred:
    """Cross-entropy on the examples of one model of the pool, drawn per batch."""

    def __init__(self, defense: EnsembleAdversarial, sources: Iterable[nn.Module]) -> None:
        self.defense = defense
        self.attack = defense.crafting
        self.sources = list(sources)
        self.signs: list[torch.Tensor] = []

    def fit(self, context: TrainContext) -> None:
        """Check the output shape of every source; precompute gradients if requested.

        A source that shares weights with the model is replaced by a copy: static sources do not learn.
        """
        images, _ = context.train.take(slice(0, 2), Victim(context.model).device)
        with Victim(context.model) as victim, torch.no_grad():
            expected = victim(images).shape
        self.sources = [copy.deepcopy(s) if _tied(s, context.model) else s.to(images.device) for s in self.sources]
        for number, source in enumerate(self.sources, 1):
            with Victim(source, fast=True) as victim:
                with torch.no_grad():
                    found = victim(images).shape
                if found != expected:
                    raise UserError(
                        f"source {number} answers {tuple(found)} to 2 images and the model {tuple(expected)}: choose a "
                        "source of the same classes"
                    )
                if self.defense.precompute:
                    self.signs.append(self._signs(victim, context))

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss on the examples, or on the batch with one half replaced by them."""
        moved = self.craft(model, batch)
        if self.defense.mixing == "both":
            return batch_loss(model, moved, batch)
        half = len(moved) // 2
        moved = torch.cat([moved[:half], batch.images[half:]])
        if self.defense.weight == 1:
            return batch_loss(model, moved, batch)
        values = batch.losses(batch.forward(model, moved))
        weights = torch.ones_like(values)
        weights[:half] = self.defense.weight
        return (weights * values).sum() / weights.sum()

    def draw(self, batch: Batch) -> int:
        """Draw the model for this batch: the index of a source, or the number of sources for the model itself."""
        return int(torch.randint(len(self.sources) + 1, (), generator=generator(batch.seed, "source")))

    def craft(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the examples (N, C, H, W) of the model drawn for this batch."""
        drawn, sizes = self.draw(batch), self.sizes(batch)
        if drawn < len(self.signs):
            if batch.indices is None:
                raise UserError("precompute needs unaugmented images: train without augmentation")
            signs = self.signs[drawn][batch.indices].to(batch.images)
            return perturb(batch.images, self.defense.eps * (signs if sizes is None else sizes * signs))
        with Victim(model if drawn == len(self.sources) else self.sources[drawn], fast=True) as victim:
            return self.attack.perturb_batch(
                victim,
                batch.images,
                batch.labels,
                seed=batch.seed,
                task=batch.task,
                sizes=sizes,
                place=batch.place,
            )

    def sizes(self, batch: Batch) -> torch.Tensor | None:
        """Draw each image's radius as a share of eps, (N, 1, 1, 1); None if every image has radius eps."""
        if not self.defense.random_eps:
            return None
        shape, device = (len(batch.images) * batch.place[1], 1, 1, 1), batch.images.device
        uniform = torch.rand(shape, generator=generator(batch.seed, "eps", device=device), device=device)
        # By the inverse of the truncated distribution, without rejection; eps is two standard deviations.
        deviations = math.sqrt(2) * torch.erfinv(uniform * math.erf(math.sqrt(2)))
        return batch.mine((deviations / 2).clamp(max=1))

    def _signs(self, source: Victim, context: TrainContext) -> torch.Tensor:
        """Return the gradient sign of every training image, 0 where the clip prevents any change."""
        found = []
        for images, labels in context.train.batches(500, device=source.device):
            moved = self.attack.perturb_batch(source, images, labels, task=context.train.task)
            found.append((moved - images).sign().to(torch.int8))
        return torch.cat(found)


def _tied(source: nn.Module, model: nn.Module) -> bool:
    """Whether two models share a tensor."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return any(id(tensor) in own for tensor in (*source.parameters(), *source.buffers()))
