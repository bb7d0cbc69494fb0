"""A few test images, clean and perturbed, with what the model made of them: for pictures, and to look again."""

from __future__ import annotations

from pathlib import Path

import torch

from gambeson.attacks import UniversalPerturbation
from gambeson.base import pixel_bytes, save_tensors, seeded
from gambeson.data import Dataset
from gambeson.victim import Victim, vote

FILE = "examples.safetensors"


def save_examples(folder: Path, victim: Victim, data: Dataset, uap: UniversalPerturbation, count: int = 10) -> None:
    """Write the first test images of every class in turn, up to ``count``, whatever the model makes of them.

    The file holds ``images`` and ``perturbed`` (uint8, K x C x H x W), ``labels``, ``predictions`` and
    ``perturbed_predictions`` (K, or K x H x W). Of label maps they are drawn at random.
    """
    labels = data.test.labels
    if labels.ndim == 1:
        turns = [(labels == label).nonzero().flatten().tolist() for label in range(data.num_classes)]
        order = [rows[turn] for turn in range(count) for rows in turns if turn < len(rows)]
        chosen = torch.tensor(order[:count])
    else:
        chosen = data.test.sample_indices(count)
    images, truths = data.test.take(chosen, victim.device)
    moved = uap.apply(images)
    with seeded(0, "examples"):  # of a random model's votes
        before, after = vote(victim, images), vote(victim, moved)
    tensors = {
        "images": pixel_bytes(images),
        "perturbed": pixel_bytes(moved),
        "labels": truths,
        "predictions": before,
        "perturbed_predictions": after,
    }
    save_tensors(folder / FILE, tensors, {"eps": uap.about.eps, "norm": uap.about.norm})
