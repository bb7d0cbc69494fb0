"""From what a user names, a run folder or a weights file, to a model and the data it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gambeson import data, models
from gambeson.base import UserError, read_settings


@dataclass(frozen=True)
class LoadedModel:
    """A model with its data, and what is known of its training."""

    model: models.PixelModel
    dataset: data.Dataset
    trained: dict[str, Any]
    """The settings of its training run; empty where only weights were named."""
    label: str
    """The name of its defence, or of its file."""


def load_subject(source: str, data_name: str | None, device: str, dataset: data.Dataset | None = None) -> LoadedModel:
    """Load a model and its data.

    Args:
        source: the folder of a training run, or a weights file of this library.
        data_name: a data set; None: the one the run was trained on.
        device: where the model goes.
        dataset: the data, where it is loaded already.

    Raises:
        UserError: there is no such model, no data is known, or the two do not fit.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: name the folder of a finished `gambeson train`, or a model.safetensors file"
        )
    trained = read_settings(path / "run.yaml", "train") if (path / "run.yaml").is_file() else {}
    name = data_name or trained.get("data")
    if name is None:
        raise UserError(f"{path} does not say what data its model was trained on: name it with --data")
    dataset = data.load(name) if dataset is None else dataset
    model = models.load(path).to(torch.device(device))
    card = model.card
    if card.classes != dataset.num_classes or card.in_channels != dataset.in_channels:
        raise UserError(
            f"the model takes {card.in_channels} channels and knows {card.classes} classes, but {name} has "
            f"{dataset.in_channels} channels and {dataset.num_classes} classes: choose data that fit the model"
        )
    label = trained.get("defense", {}).get("name") or path.stem
    return LoadedModel(model=model, dataset=dataset, trained=trained, label=label)
