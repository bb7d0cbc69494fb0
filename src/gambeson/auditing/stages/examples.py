"""The examples of an audit: test images, clean and perturbed, with what the model says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from gambeson.attacks import UniversalPerturbation
from gambeson.base import pixel_bytes, save_tensors, seeded
from gambeson.data import Split
from gambeson.evaluation.targeted import Goal
from gambeson.victim import Victim, vote

FILE = "examples.safetensors"
_SHOWN, _MAPS_SHOWN = 10, 6


def save_examples(
    folder: Path,
    victim: Victim,
    test: Split,
    uap: UniversalPerturbation,
    before: torch.Tensor,
    after: torch.Tensor,
    curve: Sequence[UniversalPerturbation] = (),
    targeted: Mapping[str, UniversalPerturbation] | None = None,
) -> None:
    """Write ten test images, clean and perturbed, in which right and wrong stand in their true proportion.

    The file holds ``images`` and ``perturbed`` (uint8, K x C x H x W), ``labels``, ``predictions`` and
    ``perturbed_predictions`` (K, or K x H x W). Of images with label maps there are six at the most, whose errors
    under the perturbation are spread evenly over those of all, and the file holds them under every perturbation of the
    curve as well: ``curve`` (E x K x C x H x W) and ``curve_predictions`` (E x K x H x W), by eps. A label that does
    not count is -1 there. For each kind of target, ``KIND`` and ``KIND_predictions`` (K x H x W) and ``KIND_images``
    (K x C x H x W) are added.

    Args:
        folder: of the file.
        victim: the model, inside its context.
        test: the split that is reported on.
        uap: the perturbation.
        before: (N,), what share of each image is wrong when clean.
        after: (N,), what share of it is wrong under the perturbation.
        curve: of label maps, the perturbations by eps.
        targeted: of label maps, perturbations with a target, by its kind.
    """
    if test.task.per_image_label:
        chosen = in_proportion(test.labels.cpu(), 2 * (before > 0).long() + (after <= 0).long(), _SHOWN)
    else:
        parts = min(_MAPS_SHOWN, len(test))
        middles = (torch.arange(parts) + 0.5) * len(test) / parts
        chosen = after.argsort(stable=True)[middles.long()]
    images, truths = test.take(chosen, victim.device)
    moved = uap.apply(images)
    with seeded(0, "examples"):  # for the votes of a random model
        clean, perturbed = vote(victim, images), vote(victim, moved)
    tensors = {
        "images": pixel_bytes(images),
        "perturbed": pixel_bytes(moved),
        "labels": truths,
        "predictions": clean,
        "perturbed_predictions": perturbed,
    }
    if not test.task.per_image_label:
        tensors["labels"] = truths.where(test.task.valid(truths), -1)
        everywhere = [one.apply(images) for one in curve]
        with seeded(0, "examples"):
            tensors["curve_predictions"] = torch.stack([vote(victim, under) for under in everywhere])
        tensors["curve"] = torch.stack([pixel_bytes(under) for under in everywhere])
        for kind, one in (targeted or {}).items():
            under = one.apply(images)
            tensors[f"{kind}_images"] = pixel_bytes(under)
            with seeded(0, "examples"):
                tensors[f"{kind}_predictions"] = vote(victim, under)
                if one.target is not None:
                    tensors[kind] = Goal.of(victim, test.subset(chosen), one.target).targets
    save_tensors(folder / FILE, tensors, {"eps": uap.about.eps, "norm": uap.about.norm})


def in_proportion(labels: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """Return up to ``count`` indices, from each group its share (largest remainders), group after group.

    Inside a group the first images of every class come in turn, so that nothing else about an image has a say.

    Args:
        labels: (N,), classes.
        groups: (N,), the group of each image, counted from 0.
        count: number of indices.
    """
    sizes, count = groups.bincount(), min(count, len(labels))
    quota = sizes.double() * count / len(labels)
    shares = quota.long()
    shares[(quota - shares).argsort(descending=True, stable=True)[: count - int(shares.sum())]] += 1
    ordered = labels.argsort(stable=True)
    turn = torch.empty_like(ordered)
    turn[ordered] = torch.arange(len(labels)) - (labels.bincount().cumsum(0) - labels.bincount())[labels[ordered]]
    order = (turn * (int(labels.max()) + 1) + labels).argsort()
    return torch.cat([order[groups[order] == group][:share] for group, share in enumerate(shares.tolist())])
