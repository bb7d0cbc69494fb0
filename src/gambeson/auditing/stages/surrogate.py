"""The surrogate stage: a network for the same data, on which transfer attacks are crafted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gambeson import models
from gambeson.auditing.context import Checkpoints
from gambeson.auditing.results import Surrogate
from gambeson.auditing.suite import Suite
from gambeson.base import UserError, seeded
from gambeson.data import Dataset
from gambeson.defenses import Standard
from gambeson.evaluation import accuracy, load_model
from gambeson.models.unet import SMALLEST
from gambeson.tasks import Segmentation
from gambeson.training import train

FILE = "surrogate.safetensors"
LARGEST = 64
"""Largest side in pixels for which a surrogate is trained: networks for larger images take hours."""
_MANY = 150_000
"""Training images from which a residual network on colour images learns more than LeNet-5 in the same time."""
_FEWEST_STEPS = 400
_BATCH, _MAP_BATCH = 64, 16
_MAPS = "unet-small"
"""The architecture for label maps, whose every image has thousands of labels: batches are smaller."""
_MAPS_SEEN = 50_000
"""Training images, of all epochs together, from which such a net is worth its time (ours): after 19,200 scenes it named
73 % of pixels, of which the ground is 65 %, and what was crafted on it broke fewer pixels than random signs."""


def choose(suite: Suite, data: Dataset) -> tuple[str, str]:
    """Return the architecture to train (empty: none, or the one named by the suite), and why there is none."""
    if suite.surrogate == "none":
        return "", "No perturbation was transferred, as the suite asks."
    if suite.surrogate != "auto":
        return "", ""
    if max(data.image_size) > LARGEST:
        return "", (
            f"No perturbation was transferred: images are {max(data.image_size)} pixels wide, and a surrogate is only "
            f"trained up to {LARGEST}; name a model of the same data with --surrogate."
        )
    seen = suite.surrogate_epochs * min(suite.surrogate_images, len(data.train))
    if not data.test.task.per_image_label:
        form = data.test.task.label_form
        if not isinstance(data.test.task, Segmentation) or min(data.image_size) < SMALLEST:
            return "", f"No perturbation was transferred: there is no small net for {form} of this size."
        if seen < _MAPS_SEEN:
            return "", (
                f"No perturbation was transferred: of {seen:,} images a net for {form} learns too little for what is "
                "crafted on it to do more than noise; take a larger suite, or name a model of the same data with "
                "--surrogate."
            )
        return _MAPS, ""
    return ("resnet20" if data.in_channels > 1 and seen >= _MANY else "lenet5"), ""


def obtain(
    suite: Suite,
    data: Dataset,
    audited: nn.Module,
    folder: Path | None,
    stages: Checkpoints,
    seed: int,
    before_step: Callable[[], None] | None = None,
) -> tuple[nn.Module | None, Surrogate]:
    """Return the surrogate on the audited model's device, and its description.

    It is trained once on the train split, with the data's labels, and stored in the folder.

    Args:
        suite: defines the surrogate.
        data: for training.
        audited: the audited model, which cannot be its own surrogate.
        folder: of the audit.
        stages: of the audit.
        seed: of its weights and its training.
        before_step: see :func:`train_surrogate`.

    Raises:
        UserError: the suite names a model that is unavailable, or the audited model itself.
    """
    name, reason = choose(suite, data)
    if reason:
        return None, Surrogate(name="", left_out=reason)
    device = next((parameter.device for parameter in audited.parameters()), torch.device("cpu"))
    made: list[nn.Module] = []

    def work() -> Surrogate:
        model, about = (
            train_surrogate(name, suite, data, device, seed, before_step) if name else _named(suite, data, device)
        )
        made.append(model)
        if folder is None or not isinstance(model, models.PixelModel) or not name:
            return about
        models.save(model, folder / FILE)
        return about.model_copy(update={"file": FILE})

    about = stages.do("surrogate", Surrogate, work)
    if not made and name and folder is not None:
        made.append(models.load(folder / FILE).to(device))
    elif not made:
        made.append(_named(suite, data, device)[0])
    _refuse_itself(made[0], audited, suite)
    return made[0].eval(), about


def check(suite: Suite, data: Dataset, audited: nn.Module) -> None:
    """Refuse a surrogate that the suite names and that cannot be one, before any work.

    Raises:
        UserError: as :func:`obtain`.
    """
    if not choose(suite, data)[1] and suite.surrogate != "auto":
        _refuse_itself(_load(suite, data, torch.device("cpu")), audited, suite)


def _refuse_itself(model: nn.Module, audited: nn.Module, suite: Suite) -> None:
    if models.fingerprint(model) == models.fingerprint(audited):
        raise UserError(f"the surrogate {suite.surrogate} is the audited model itself: name another one, or none")


def _load(suite: Suite, data: Dataset, device: torch.device) -> nn.Module:
    found = load_model(suite.surrogate, data.name, str(device), data)
    if found.black_box:
        raise UserError(f"the surrogate {suite.surrogate} is a black box: name a model that has gradients")
    return found.model


def _named(suite: Suite, data: Dataset, device: torch.device) -> tuple[nn.Module, Surrogate]:
    model = _load(suite, data, device)
    return model, Surrogate(name=suite.surrogate, accuracy=accuracy(model, data.test))


class Schedule(NamedTuple):
    """How long a surrogate is trained."""

    images: int
    batch: int
    epochs: int


def schedule(name: str, suite: Suite, data: Dataset) -> Schedule:
    """Return how long a surrogate of architecture ``name`` is trained."""
    count = min(suite.surrogate_images, len(data.train))
    batch = min(_MAP_BATCH if name == _MAPS else _BATCH, count, max(16, count // 16))
    return Schedule(count, batch, max(suite.surrogate_epochs, math.ceil(_FEWEST_STEPS / (count // batch))))


def train_surrogate(
    name: str,
    suite: Suite,
    data: Dataset,
    device: torch.device,
    seed: int,
    before_step: Callable[[], None] | None = None,
) -> tuple[models.PixelModel, Surrogate]:
    """Train a surrogate of architecture ``name`` as the audits of this suite, data and seed do.

    ``before_step`` is called before each of its forwards; it may raise, as a limit on time does.
    """
    count, batch, epochs = schedule(name, suite, data)
    part = data.train.sample(count, seed=seed)
    held = data.validation.sample(_BATCH, seed=seed)
    with seeded(seed, "surrogate"):
        model = models.create(name, data).to(device)
    watch = model.register_forward_pre_hook(lambda *_: None if before_step is None else before_step())
    train(
        model,
        Dataset(data.name, part, held, data.test, data.classes),
        Standard(),
        seed=seed,
        label="  surrogate",
        epochs=epochs,
        batch_size=batch,
        lr=0.1 if name.startswith("resnet") else 0.03,
        warmup=0.5,
    )
    watch.remove()
    return model, Surrogate(name=name, accuracy=accuracy(model, data.test), images=count, epochs=epochs)
