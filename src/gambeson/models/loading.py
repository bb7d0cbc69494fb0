"""Loading of anything that can be attacked or audited: runs, files, architectures, functions, servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson import data, models
from gambeson.base import UserError, read_settings, seeded
from gambeson.models import external, registry, torchvision_nets, user_code
from gambeson.models.black_box.base import BlackBox
from gambeson.models.black_box.http import HttpModel
from gambeson.models.black_box.local import FunctionModel, OnnxModel
from gambeson.models.program import SUFFIX, load_program, read_program
from gambeson.models.storage import init_weights, read_card

FUNCTION = "function:"
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class LoadedModel:
    """A model with its data and its training settings."""

    model: nn.Module
    """From pixels to logits: a ``PixelModel``, or a ``BlackBox``."""
    dataset: data.Dataset
    trained: dict[str, Any]
    """Settings of its training run; empty for other sources."""
    label: str
    """The name of its defence, or of its file."""

    @property
    def black_box(self) -> bool:
        """Whether the model returns scores without gradients."""
        return isinstance(self.model, BlackBox)


def load_model(
    source: str,
    data_name: str | None,
    device: str,
    dataset: data.Dataset | None = None,
    *,
    budget: int | None = None,
) -> LoadedModel:
    """Load a model and its data.

    Args:
        source: one of

            * the folder of a training run, or a weights file of this library;
            * an architecture: a name of :func:`gambeson.models.create`, ``torchvision:NAME[@WEIGHTS]``,
              ``timm:NAME[@TAG]``, ``transformers:NAME_OR_PATH`` or ``FILE.py:FUNCTION``; with weights from a file as
              ``ARCHITECTURE@FILE.safetensors``, else with weights drawn from seed 0;
            * a ``torch.export`` program, ``FILE.pt2``;
            * a black box: ``FILE.onnx``, ``http://…``, ``https://…``, or ``function:FILE.py:FUNCTION``, a function
              from images to scores (N, K) or to class indices (N,).
        data_name: a data set; None: that of the training run.
        device: of the model; a black box is not moved.
        dataset: the data, if already loaded.
        budget: maximum number of images sent to a black box, including two here.

    Raises:
        UserError: no such model, unknown data, data that do not fit the model, or a budget for a model that is not a
            black box.
    """
    path = Path(source)
    trained = read_settings(path / "run.yaml", "train") if (path / "run.yaml").is_file() else {}
    name = data_name or trained.get("data")
    load = _loader(source)
    if name is None:
        raise UserError(f"{source} does not say what data its model was trained on: name it with --data")
    if budget is not None and load is not _black_box:
        raise UserError(f"a budget limits the queries to a black box, and {source} is none: leave --budget out")
    dataset = data.load(name, input_shape=input_shape(source)) if dataset is None else dataset
    model = _black_box(source, dataset, budget) if load is _black_box else load(source, dataset, device)
    if isinstance(model, models.PixelModel):
        card = model.card
        if card.classes != dataset.num_classes or card.in_channels != dataset.in_channels:
            raise UserError(
                f"the model takes {card.in_channels} channels and knows {card.classes} classes, but {name} has "
                f"{dataset.in_channels} channels and {dataset.num_classes} classes: choose data that fit the model"
            )
    defense = trained.get("defense", {})
    label = user_code.short((defense if isinstance(defense, str) else defense.get("name")) or _label(source))
    return LoadedModel(model=model, dataset=dataset, trained=trained, label=label)


def check_source(source: str) -> None:
    """Refuse a model that no source in :func:`load_model` provides, without loading it.

    Raises:
        UserError: there is none.
    """
    _loader(source)


def input_shape(source: str) -> data.Shape:
    """Return the channels, height and width that a model takes, None where it takes any or does not say.

    Args:
        source: as in :func:`load_model`; image folders are read for this shape.

    Raises:
        UserError: the file is damaged, or the architecture's name is wrong.
    """
    load, known = _loader(source), dict[str, Any]()
    if load is _stored:
        known = read_card(Path(source)).plain()
    elif load is _architecture:
        name = external.canonical(_parted(source)[0])
        tables = external.defaults if external.is_external(name) else torchvision_nets.weights_defaults
        known = tables(name) if external.is_external(name) or name.startswith(torchvision_nets.PREFIX) else {}
    elif load is _program or source.lower().endswith(".onnx"):
        channels, height, width = read_program(Path(source)).shape if load is _program else OnnxModel(source).shape[1:]
        return channels, height, width
    height, width = known.get("image_size") or (None, None)
    return known.get("in_channels"), height, width


def _loader(source: str) -> Any:
    if source.startswith(("http://", "https://", FUNCTION)) or source.lower().endswith(".onnx"):
        return _black_box
    if Path(source).exists() and Path(source).suffix != ".py":
        return _program if source.endswith(SUFFIX) else _stored
    if source.endswith(SUFFIX):
        raise UserError(f"{source} does not exist: name a program that torch.export.save has written")
    architecture, _ = _parted(source)
    if external.is_external(external.canonical(architecture)) or architecture.startswith(torchvision_nets.PREFIX):
        return _architecture
    if "/" in source or source.endswith(_WEIGHTS):
        if architecture != source:
            registry.check_name(architecture)
            return _architecture
        raise UserError(
            f"{source} does not exist: name the folder of a finished `gambeson train`, a model.safetensors file, or "
            "what else `gambeson audit --help` lists"
        )
    try:
        registry.check_name(architecture)
    except UserError as error:
        raise UserError(f"{source} does not exist, and as the name of an architecture it is wrong: {error}") from None
    return _architecture


def _stored(source: str, dataset: data.Dataset, device: str) -> nn.Module:
    return models.load(Path(source)).to(torch.device(device))


def _program(source: str, dataset: data.Dataset, device: str) -> nn.Module:
    return load_program(Path(source), dataset.in_channels, dataset.num_classes, dataset.image_size, device)


def _architecture(source: str, dataset: data.Dataset, device: str) -> nn.Module:
    architecture, weights = _parted(source)
    if weights is not None and not weights.is_file():
        raise UserError(f"{weights} does not exist: expected the weights of {architecture}, a safetensors file")
    if external.is_external(architecture):
        own = external.defaults(external.canonical(architecture)).get("classes", dataset.num_classes)
        if weights is None and own != dataset.num_classes:  # a new, untrained last layer would be evaluated
            raise UserError(
                f"{architecture} knows {own} classes, but {dataset.name} has {dataset.num_classes}: choose data that "
                "fit the model, or fine-tune it on these with gambeson train and name the run"
            )
    with seeded(0, "model"):
        model = models.create(architecture, dataset)
    if weights is not None:
        init_weights(model, weights)
    elif drawn := getattr(model.body, "drawn", None):
        raise UserError(
            f"{architecture} has no weights for {', '.join(drawn[:3])}, which would be random: choose a model that is "
            "trained as a classifier, or fine-tune it with gambeson train and name the run"
        )
    return model.eval().to(torch.device(device))


def _black_box(source: str, dataset: data.Dataset, budget: int | None) -> nn.Module:
    box: BlackBox
    settings: dict[str, Any] = {"budget": budget, "classes": dataset.num_classes}
    if source.startswith(FUNCTION):
        spelling = source.removeprefix(FUNCTION)
        file, call = user_code.file_of(spelling), user_code.load_function(spelling)

        def ask(images: torch.Tensor) -> Any:
            with user_code.told(file, f"asking {spelling} about {len(images)} images"):
                return call(images)

        box = FunctionModel(ask, title=spelling, **settings)
    elif source.lower().endswith(".onnx"):
        box = OnnxModel(source, **settings)
    else:
        box = HttpModel(source, **settings)
    images = torch.full((2, dataset.in_channels, *dataset.image_size), 0.5)
    with torch.no_grad():
        found = box(images)
    if found.shape[1] != dataset.num_classes:
        raise UserError(
            f"{box.title} gives scores of {found.shape[1]} classes, but {dataset.name} has {dataset.num_classes}: "
            "choose data that fit the model"
        )
    return box


def _parted(source: str) -> tuple[str, Path | None]:
    """Split ``ARCHITECTURE@FILE.safetensors`` at the first @; the path may contain more."""
    if not source.endswith(_WEIGHTS) or "@" not in source:
        return source, None
    architecture, _, file = source.partition("@")
    return architecture, Path(file)


def _label(source: str) -> str:
    architecture, weights = _parted(source)
    if weights is not None:
        return weights.stem
    if source.startswith(("http://", "https://")):
        return source.partition("://")[2].partition("?")[0].rpartition("@")[2]
    if user_code.is_spelling(architecture.removeprefix(FUNCTION)):
        return architecture.rpartition(":")[2]
    return Path(source).stem if Path(source).exists() else source
