"""Export of a model with a check: the exported file is scored against the original on the test split."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.base import Config, UserError, environment, load_tensors, required, seeded, task, unused, write_json
from gambeson.data import Split
from gambeson.evaluation.universal import accuracy_rate
from gambeson.models import ModelCard, PixelModel
from gambeson.models.black_box.local import OnnxModel
from gambeson.models.export import Target, export
from gambeson.models.factory import build
from gambeson.models.loading import load_model
from gambeson.models.program import load_program
from gambeson.models.storage import load_weights
from gambeson.tasks import Rate
from gambeson.victim import Victim, auto_batch_size, inspect_model, majority, nothing_counts, predicted, score

_TOLERANCE = 1e-3
"""Largest allowed difference of a logit, as a share of the largest logit, for the rounding of different runtimes."""
_CHANCE = 3.0
"""Allowed difference of a random model's export, as a multiple of that between two sets of the original's draws."""
_SPREAD = 2.0
"""Allowed factor between the standard deviations over draws."""


class Exported(Config):
    """Result of an export and its check."""

    source: str
    to: str
    file: str
    split: str
    seed: int
    """Seed of the sample, if not all images were scored."""
    votes: int
    """Votes per image; 1 for a deterministic model."""
    unit: str = "image"
    """What accuracies are shares of: images, or pixels of label maps."""
    original: Rate
    """Accuracy of the original model."""
    exported: Rate
    """Accuracy of the exported file, loaded again."""
    largest_difference: float
    """Largest difference of a logit; for a random model, of its mean over draws."""
    by_chance: float | None
    """The same between two sets of draws of the original; None for a deterministic model."""
    spread_ratio: float | None
    """Standard deviation over draws, exported to original (root mean square over images and classes)."""
    agrees: bool
    """Whether both agree up to rounding and chance."""


def run_export(
    source: str,
    to: Target,
    out: Path,
    *,
    data_name: str | None = None,
    images: int | None = None,
    votes: int = 10,
    seed: int = 0,
) -> Exported:
    """Export a model to ``out``, load it again, score both, and write the result to ``OUT.json``.

    Args:
        source: see :func:`gambeson.models.loading.load_model`.
        to: ``torch-export``, ``onnx`` or ``safetensors``; see :func:`gambeson.models.export.export`.
        out: the file.
        data_name: data set for scoring; None: that of the training run.
        images: maximum number of test images, a stratified sample; None: all.
        votes: votes per image, for a random model.
        seed: of the images and of the draws of torch; onnxruntime seeds its own.

    Raises:
        UserError: the file exists, the model is a black box, a dependency is missing, or the export fails.
    """
    unused(out)
    if votes < 2 or (images is not None and images < 1):
        raise UserError(f"votes = {votes}, images = {images}: expected at least 2 votes and 1 image")
    if to == "onnx":
        required("onnxruntime", "scoring an export to ONNX")
    subject = load_model(source, data_name, "cpu")
    model, test = subject.model, subject.dataset.test
    if not isinstance(model, PixelModel):
        raise UserError(f"{source} is a black box and cannot be exported: name a model with its weights")
    if images is not None:
        test = test.sample(images, seed=seed)
    export(model, out, to)
    again = _loaded(out, to, model.card)
    found = _score(model, again, test, votes, seed)
    result = Exported(source=source, to=to, file=out.name, split=test.name, seed=seed, **found)
    write_json(Path(f"{out}.json"), {"schema": "gambeson/export-1", "environment": environment(), **result.plain()})
    return result


def _loaded(path: Path, to: Target, card: ModelCard) -> nn.Module:
    if to == "onnx":
        return OnnxModel(path, output="logits")
    if to == "torch-export":
        return load_program(path, card.in_channels, card.classes, card.image_size, "cpu")
    _, about = load_tensors(path)
    with seeded(0, "load"):
        model = build(ModelCard(**about["exported"]), pretrained=False)
    load_weights(model, path)
    return model.eval()


@dataclass
class _Sums:
    """Outputs of one model over the draws of one batch."""

    answers: list[torch.Tensor] = field(default_factory=list)
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


@torch.no_grad()
def _score(model: nn.Module, again: nn.Module, test: Split, votes: int, seed: int) -> dict[str, Any]:
    found: dict[str, list[torch.Tensor]] = {"original": [], "exported": []}
    variance = {"original": 0.0, "exported": 0.0}
    difference = chance = largest = 0.0
    if len(test) == 0:
        raise nothing_counts(test)
    with Victim(model) as victim, seeded(seed, "export"):
        first, _ = test.take(slice(0, 8))
        repeats = not (inspect_model(model, first).varies or inspect_model(again, first).varies)
        count = 1 if repeats else votes
        size = auto_batch_size(test.shape, 250)
        with task("score the export", math.ceil(len(test) / size)) as advance:
            for images, _ in test.batches(size):
                own = _asked(victim.forward_original, images, count)
                other = _asked(again, images, count)
                found["original"].append(majority(torch.stack(own.answers)))
                found["exported"].append(majority(torch.stack(other.answers)))
                largest = max(largest, float(own.total.abs().max()) / count)
                difference = max(difference, float((own.total - other.total).abs().max()) / count)
                if count > 1:
                    control = _asked(victim.forward_original, images, count)
                    chance = max(chance, float((own.total - control.total).abs().max()) / count)
                    for name, sums in (("original", own), ("exported", other)):
                        variance[name] += float((sums.squares - sums.total**2 / count).clamp(min=0).sum())
                advance()
    ratio = math.sqrt(variance["exported"] / variance["original"]) if variance["original"] else None
    if count == 1:
        agrees = difference <= _TOLERANCE * max(1.0, largest)
    else:
        agrees = ratio is not None and 1 / _SPREAD <= ratio <= _SPREAD and difference <= _CHANCE * chance
    return {
        "unit": test.task.unit,
        "votes": count,
        **{name: accuracy_rate(score(torch.cat(answers), test)) for name, answers in found.items()},
        "largest_difference": difference,
        "by_chance": chance if count > 1 else None,
        "spread_ratio": ratio,
        "agrees": agrees,
    }


def _asked(ask: Any, images: torch.Tensor, votes: int) -> _Sums:
    sums = _Sums()
    for _ in range(votes):
        logits = ask(images).double()
        sums.answers.append(predicted(logits))
        sums.total = sums.total + logits
        sums.squares = sums.squares + logits**2
    return sums
