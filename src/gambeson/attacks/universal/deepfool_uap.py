"""DeepFool-UAP: iterate over the images, adding the DeepFool perturbation of each one not yet fooled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from gambeson.attacks.minimal_norm.deepfool import DeepFool
from gambeson.attacks.registry import register
from gambeson.attacks.universal.base import Candidate, UniversalAttack
from gambeson.attacks.universal.context import CraftingContext
from gambeson.base import Number, generator
from gambeson.data import Split
from gambeson.threat import perturb
from gambeson.victim import Victim, predict, score


@register(
    "deepfool-uap",
    source="Moosavi-Dezfooli et al. 2017",
    cost="1 / 0 per image and pass, and DeepFool on the others",
)
class DeepFoolUAP(UniversalAttack):
    """Universal adversarial perturbation of Moosavi-Dezfooli et al. (CVPR 2017, algorithm 1).

    For every image whose prediction under v is the clean one: r = DeepFool(clip(x + v)), v = Proj(v + r). It ends when
    the fooling rate on the images reaches ``fooling``, or after ``passes`` passes over the shuffled images (the public
    Python code has no such limit; the status is then ``target not reached``).

    ``batch_size=1`` is the paper's one image at a time. With more, DeepFool runs on all images of a step that are
    not fooled, and v moves by the mean of their r (ours, for speed).

    Cost: a forward per image and pass and, if not fooled, one more and up to ``inner_steps`` times those of a step of
    :class:`DeepFool`. Clipping x + v, which the public code does not do, is ours.
    """

    name: ClassVar[str] = "deepfool-uap"

    images: Annotated[int, Field(ge=1)] = 1000
    """Number of training images; the paper uses 10,000 of ImageNet."""
    fooling: Annotated[Number, Field(gt=0, le=1)] = 0.8
    """Fooling rate on these images at which it stops (the paper's 1 - delta)."""
    passes: Annotated[int, Field(ge=1)] = 10
    """Maximum number of passes over the images."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Images per update of v."""
    classes: Annotated[int, Field(ge=2)] = 10
    """Classes that DeepFool considers: those with the highest clean logits, including the prediction."""
    overshoot: Annotated[Number, Field(ge=0)] = 0.02
    """Overshoot of DeepFool beyond the boundary."""
    inner_steps: Annotated[int, Field(ge=1)] = 10
    """DeepFool steps per image; images not fooled after them contribute nothing."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """Random orders of the images, among which validation selects."""

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        context.task.require_classification("DeepFool-UAP")
        few = context.few(self.images)
        clean = [predict(victim, few) for victim in context.victims]
        zero = context.start("zero", 0)
        for restart in range(self.restarts + (start is not None)):
            warm = start is not None and restart == self.restarts
            v, reached = (start if warm and start is not None else zero), False
            for turn in range(self.passes):
                order = torch.randperm(len(few), generator=generator(context.seed, "order", restart, turn))
                for rows in order.split(self.batch_size):
                    images, _ = few.take(rows, context.device)
                    for victim, answers in zip(context.edited, clean, strict=True):
                        v = self._move(context, victim, v, images, answers[rows].to(context.device))
                reached = self._fooling(context, few, clean, v) >= self.fooling
                if reached:
                    break
            yield Candidate(start="warm" if warm else "zero", delta=v, reached=reached)

    def _move(
        self, context: CraftingContext, victim: Victim, v: torch.Tensor, images: torch.Tensor, clean: torch.Tensor
    ) -> torch.Tensor:
        """Return Proj(v + mean r) over the images whose prediction is the clean one."""
        moved = perturb(images, v)
        with torch.no_grad():
            active = victim(moved).argmax(1) == clean
        if not bool(active.any()):
            return v
        images, labels = moved[active], clean[active]
        # Not clipped, as in the paper: a value clipped on one image may matter on another.
        inner = DeepFool(classes=self.classes, overshoot=self.overshoot, steps=self.inner_steps, clip="end")
        found = inner.search(victim, images, labels, torch.arange(len(images), device=images.device))
        with torch.no_grad():
            down = victim(found).argmax(1) != labels
        if not bool(down.any()):
            return v
        return context.ball.project(v + (found - images)[down].mean(0, keepdim=True))

    def _fooling(self, context: CraftingContext, few: Split, clean: list[torch.Tensor], v: torch.Tensor) -> float:
        flipped = [
            (found := score(predictions, few, before)).flipped / max(1, found.total)
            for victim, before in zip(context.victims, clean, strict=True)
            for predictions in context.under_edits(victim, few, v)
        ]
        return sum(flipped) / len(flipped)
