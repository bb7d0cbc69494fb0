"""Everything that a perturbation does to a model, beside its controls: from one clean pass and one perturbed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Literal

import torch
from torch import nn

from gambeson.attacks import CONTROLS, PATCH_CONTROLS, AdversarialPatch, UniversalPerturbation
from gambeson.base import Config, UserError
from gambeson.data import Split, as_split
from gambeson.evaluation.edits import EditsResult, under_edits
from gambeson.evaluation.placement import PlacementResult, by_placement
from gambeson.evaluation.rates import Control, strongest_control
from gambeson.evaluation.targeted import TargetSuccess, target_success
from gambeson.evaluation.universal import accuracy_rate, change_rate, error_rate, rates_beside, scorable
from gambeson.tasks import Confusion, Difference, Rate
from gambeson.threat.edits import Edit
from gambeson.victim import Score, Shared, Victim, as_victim, auto_batch_size, predict_batches, score_batch


class MapScore(Config):
    """Mean IoU of label maps, over the classes that occur among the labels."""

    clean: Rate
    perturbed: Rate
    lost: Difference
    """What the perturbation takes from it: paired on the same images."""


class UapScore(Config):
    """What :func:`score_uap` returns."""

    images: int
    """Images that were scored."""
    left_out: int
    """Images that were not: the perturbation was crafted on them, or they are of a patch's target class."""
    clean: Rate
    """Error on clean images."""
    uer: Rate
    """Error under the perturbation."""
    fooling: Rate
    """Share of predictions that it changes, whatever the labels."""
    mean_iou: MapScore | None = None
    """None where an image has one label."""
    controls: list[Control]
    """What patterns do that nobody crafted; empty with a target, which has its own."""
    target: TargetSuccess | None = None
    """How far it reaches its target; None without one."""
    edits: EditsResult | None = None
    placements: PlacementResult | None = None

    @property
    def rival(self) -> Control | None:
        """The strongest control, if it does no less harm; None if the perturbation does more, or none at all."""
        worst = strongest_control(self.controls)
        return worst if worst is not None and worst.worst.value >= self.uer.value > 0 else None


def score_uap(
    model: nn.Module,
    data: object,
    uap: UniversalPerturbation,
    *,
    edits: Iterable[str | Edit] | Literal["standard"] | None = None,
    placements: bool = False,
    seed: int = 0,
) -> UapScore:
    """Score a universal perturbation or a patch, beside its controls.

    Each rate is that of the function of its own (:func:`universal_evasion`, :func:`fooling_rate`, :func:`rates_beside`
    and so on), but all share one pass over the clean images and one over the perturbed ones.

    Args:
        model: any module from pixels to logits; black boxes too.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used. Images that the
            perturbation was crafted on are left out.
        uap: the perturbation or the patch.
        edits: also under these edits, as in :func:`under_edits`; ``"standard"``: all of
            :data:`gambeson.evaluation.STANDARD_EDITS` that fit the data.
        placements: also at a grid of places and over scales and angles; see :func:`by_placement`.
        seed: of the controls, a patch's places and a random model's votes.

    Raises:
        UserError: ``placements`` of a perturbation of whole images, an unknown edit, or as :func:`universal_evasion`.
    """
    patch = uap if isinstance(uap, AdversarialPatch) else None
    if patch is None and placements:
        raise UserError("the perturbation is of whole images, and has no place: leave placements out")
    whole, split = as_split(data, "test"), scorable(data, uap)
    with as_victim(model) as victim:
        before = _Seen.of(victim, split, None, None, seed)
        after = _Seen.of(victim, split, uap.shared(victim.device), before.predictions, seed)
    maps = None
    if before.confusion is not None and after.confusion is not None:
        clean, perturbed = before.confusion, after.confusion
        maps = MapScore(clean=clean.mean_iou, perturbed=perturbed.mean_iou, lost=clean.drop(perturbed))
    target = None
    if uap.target is not None:
        names = CONTROLS if patch is None else PATCH_CONTROLS
        target = target_success(model, whole, uap, seed=seed, controls=names)
    asked = None if edits == "standard" else edits
    return UapScore(
        images=len(split),
        left_out=len(whole) - len(split),
        clean=accuracy_rate(before.score).complement,
        uer=error_rate(after.score),
        fooling=change_rate(after.score),
        mean_iou=maps,
        controls=rates_beside(model, whole, uap, seed=seed) if target is None else [],
        target=target,
        edits=None if edits is None else under_edits(model, split, uap, asked, seed=seed),
        placements=by_placement(model, whole, patch, seed=seed) if patch is not None and placements else None,
    )


@dataclass(frozen=True)
class _Seen:
    """What one pass over a split has seen."""

    predictions: torch.Tensor
    score: Score
    confusion: Confusion | None
    """None where an image has one label."""

    @classmethod
    def of(cls, victim: Victim, split: Split, delta: Shared | None, clean: torch.Tensor | None, seed: int) -> _Seen:
        known = repeat(None) if clean is None else iter(clean.split(auto_batch_size(split.shape)))
        task, classes = split.task, split.classes

        def look(found: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, Score, torch.Tensor | None]:
            counts = None if task.per_image_label else task.confusion(found, labels, len(classes)).cpu()
            return found.int().cpu(), score_batch(task, found, labels, next(known)), counts

        predictions, scores, counts = zip(*predict_batches(victim, split, look, delta, seed=seed), strict=True)
        confusion = None if task.per_image_label else Confusion(torch.cat(counts), classes)
        return cls(torch.cat(predictions), Score.joined(scores, split), confusion)
