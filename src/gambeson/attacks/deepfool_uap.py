"""DeepFool-UAP: walk over the images, and add what each one that still stands would need to fall."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field

from gambeson.attacks.crafting import UniversalAttack
from gambeson.attacks.workshop import Candidate, Workshop
from gambeson.base import Number, UserError, generator
from gambeson.data import Split
from gambeson.threat import perturb
from gambeson.victim import Victim, predict, score


class DeepFoolUAP(UniversalAttack):
    """Universal adversarial perturbation of Moosavi-Dezfooli et al. (CVPR 2017, algorithm 1).

    For every image whose prediction under v is still the clean one: r = DeepFool(clip(x + v)), v = Proj(v + r). Passes
    over the shuffled images go on until the fooling rate on them reaches ``fooling``, or ``passes`` are done (the
    public Python code has no such limit; the status is then ``target not reached``).

    ``images_a_step=1`` is the paper's one image at a time. With more, DeepFool runs on all standing images of a step at
    once and v moves by the mean of their r: a deviation of ours for speed.

    Cost: a forward an image and pass, and for a standing image up to ``inner_steps`` times ``classes`` forwards and
    backwards. Clipping of x + v, which the public code leaves out, is ours.
    """

    name: ClassVar[str] = "deepfool-uap"

    images: Annotated[int, Field(ge=1)] = 1000
    """Training images that are used; the paper has 10,000 of ImageNet."""
    fooling: Annotated[Number, Field(gt=0, le=1)] = 0.8
    """Fooling rate on these images at which it stops (1 - delta of the paper)."""
    passes: Annotated[int, Field(ge=1)] = 10
    """Passes over the images, at most."""
    images_a_step: Annotated[int, Field(ge=1)] = 1
    """Images that are looked at before v moves."""
    classes: Annotated[int, Field(ge=2)] = 10
    """Classes that DeepFool considers: the highest clean logits, the prediction among them."""
    overshoot: Annotated[Number, Field(ge=0)] = 0.02
    """DeepFool goes this share beyond the boundary."""
    inner_steps: Annotated[int, Field(ge=1)] = 10
    """Linearisations of DeepFool an image; an image that has not fallen after them moves nothing."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """Orders of the images; validation chooses."""

    def _search(self, work: Workshop, start: torch.Tensor | None) -> Iterable[Candidate]:
        if work.train.labels.ndim != 1:
            raise UserError("the labels are maps: DeepFool-UAP expects one label an image")
        few = work.few(self.images)
        clean = [predict(victim, few) for victim in work.victims]
        zero = work.start("zero", 0)
        for restart in range(self.restarts + (start is not None)):
            warm = start is not None and restart == self.restarts
            v, reached = (start if warm and start is not None else zero), False
            for turn in range(self.passes):
                order = torch.randperm(len(few), generator=generator(work.seed, "order", restart, turn))
                for rows in order.split(self.images_a_step):
                    images, _ = few.take(rows, work.device)
                    for victim, answers in zip(work.victims, clean, strict=True):
                        v = self._move(work, victim, v, images, answers[rows].to(work.device))
                reached = self._fooling(work, few, clean, v) >= self.fooling
                if reached:
                    break
            yield Candidate(start="warm" if warm else "zero", delta=v, reached=reached)

    def _move(
        self, work: Workshop, victim: Victim, v: torch.Tensor, images: torch.Tensor, clean: torch.Tensor
    ) -> torch.Tensor:
        """Return Proj(v + mean r) over the images whose prediction is still the clean one."""
        moved = perturb(images, v)
        with torch.no_grad():
            standing = victim(moved).argmax(1) == clean
        if not bool(standing.any()):
            return v
        found = deepfool(
            victim,
            moved[standing],
            classes=self.classes,
            overshoot=self.overshoot,
            steps=self.inner_steps,
        )
        if not bool(found.fallen.any()):
            return v
        return work.ball.project(v + found.shift[found.fallen].mean(0, keepdim=True))

    def _fooling(self, work: Workshop, few: Split, clean: list[torch.Tensor], v: torch.Tensor) -> float:
        changed = [
            score(now := predict(victim, few, v), few, before).changed / len(now)
            for victim, before in zip(work.victims, clean, strict=True)
        ]
        return sum(changed) / len(changed)


class Found(NamedTuple):
    """What :func:`deepfool` returns."""

    shift: torch.Tensor
    """(N, C, H, W): what to add; zero for an image that stood."""
    fallen: torch.Tensor
    """(N,): whether the prediction of x + shift has changed."""
    steps: torch.Tensor
    """(N,): linearisations used."""


def deepfool(
    victim: Victim, images: torch.Tensor, *, classes: int = 10, overshoot: float = 0.02, steps: int = 10
) -> Found:
    """Find for every image a short Euclidean step over its nearest boundary (Moosavi-Dezfooli et al. 2016, alg. 2).

    The boundaries to the highest ``classes`` logits are linearised, f_k / ||w_k|| with f_k = z_k - z_0 and w_k its
    gradient; the image moves onto the nearest and ``overshoot`` beyond. All images and classes share one forward and
    backward a step: an image costs ``classes`` of each. The step is not clipped to [0, 1], as in the paper.

    Args:
        victim: the model.
        images: (N, C, H, W).
        classes: logits considered, the prediction's own among them.
        overshoot: share by which the whole step is lengthened.
        steps: linearisations at most.
    """
    with torch.no_grad():
        logits = victim(images)
    ranked = logits.topk(min(classes, logits.shape[1]), dim=1).indices
    total = torch.zeros_like(images)
    fallen = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    used = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    for _ in range(steps):
        moved = images[rows] + (1 + overshoot) * total[rows]
        values, slopes, answer = _linearised(victim, moved, ranked[rows])
        over = answer != ranked[rows, 0]
        fallen[rows[over]] = True
        rows, values, slopes = rows[~over], values[~over], slopes[~over]
        if len(rows) == 0:
            break
        gaps = (values[:, 1:] - values[:, :1]).abs()
        normals = slopes[:, 1:] - slopes[:, :1]
        lengths = normals.flatten(2).norm(dim=2).clamp(min=1e-12)
        nearest = (gaps / lengths).argmin(1)
        pick = torch.arange(len(rows), device=images.device), nearest
        # A tie counts as standing: it needs the least of pushes to fall.
        share = gaps[pick].clamp(min=1e-6) / lengths[pick] ** 2
        total[rows] += share.view(-1, 1, 1, 1) * normals[pick]
        used[rows] += 1
    if len(rows):
        with torch.no_grad():
            fallen[rows] = victim(images[rows] + (1 + overshoot) * total[rows]).argmax(1) != ranked[rows, 0]
    shift = (1 + overshoot) * total * fallen.view(-1, 1, 1, 1)
    return Found(shift, fallen, used)


def _linearised(
    victim: Victim, images: torch.Tensor, ranked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits (N, k) and their gradients (N, k, C, H, W) of the ranked classes, and the predictions (N,)."""
    count, k = ranked.shape
    with torch.enable_grad():
        point = images.detach().repeat_interleave(k, 0).requires_grad_()
        logits = victim(point)
        values = logits.gather(1, ranked.reshape(-1, 1)).squeeze(1)
        slopes = victim.gradient(values.sum(), point, len(point))
    return values.detach().view(count, k), slopes.unflatten(0, (count, k)), logits.detach()[::k].argmax(1)
