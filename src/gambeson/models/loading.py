"""Loading of anything that can be attacked or audited: runs, files, architectures, functions, servers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson import data, models
from gambeson.base import UserError, read_settings, seeded, user_code
from gambeson.base.errors import DataWarning, as_text
from gambeson.base.files import read_yaml
from gambeson.data.load import FOLDERS
from gambeson.models import external, hubs, normalisation, registry, torchvision_nets, zoo
from gambeson.models.black_box.base import BlackBox, no_gradient
from gambeson.models.black_box.http import HttpModel, HttpSettings, refuse_secrets
from gambeson.models.black_box.local import FunctionModel, OnnxModel
from gambeson.models.normalisation import IMAGENET, Scale
from gambeson.models.program import SUFFIX, load_onnx, load_program, read_program
from gambeson.models.storage import CLASS_NAMES, ENDINGS, FILE_NAME, Weights, read_card, read_weights

FUNCTION = "function:"
_SERVER = ("http://", "https://")


@dataclass(frozen=True)
class LoadedModel:
    """A model with its data and its training settings."""

    model: nn.Module
    """From pixels to logits: a ``PixelModel``, or a ``BlackBox``."""
    dataset: data.Dataset
    trained: dict[str, Any]
    """Settings of its training run; of a hardening its data and defence, and empty for other sources."""
    label: str
    """The name of its defence, or of its file."""

    @property
    def black_box(self) -> bool:
        """Whether the model returns scores without gradients."""
        return isinstance(self.model, BlackBox)


def load_model(
    source: str | Path,
    data_name: str | None = None,
    device: str = "cpu",
    dataset: Any = None,
    *,
    budget: int | None = None,
    http: HttpSettings | None = None,
    gradients: str | None = None,
) -> LoadedModel:
    """Load a model and its data.

    Args:
        source: one of

            * the folder of a training run or a hardening, a weights file of this library, or ``zoo:NAME``
              (:mod:`gambeson.zoo`);
            * an architecture: a name of :func:`gambeson.models.create`, ``torchvision:NAME[@WEIGHTS]``,
              ``timm:NAME[@TAG]``, ``transformers:NAME_OR_PATH`` or ``FILE.py:FUNCTION``; with weights from a file as
              ``ARCHITECTURE@FILE``, where FILE is safetensors or a state dict of ``torch.save`` (see
              :func:`gambeson.models.load_weights`), else with weights drawn from seed 0;
            * a model of the Hugging Face hub, ``hf://OWNER/NAME[@REVISION]``, or a folder in its layout;
            * a ``torch.export`` program, ``FILE.pt2``, or ``FILE.onnx``, which is a black box if it cannot be turned
              into a differentiable model, or if there is a budget;
            * a black box: ``http://…``, ``https://…``, or ``function:FILE.py:FUNCTION``, a function from images to
              scores (N, K) or to class indices (N,), of label maps (N, K, H, W) or (N, H, W).

            What was trained by someone else may take normalised pixels: an architecture with weights, a program and an
            ONNX file may end in ``?normalise=imagenet``, ``?normalise=data`` (the statistics of the training split),
            ``?normalise=none`` or ``?normalise=MEAN,STD``, one number each or one per channel, joined by ``/``. Where
            neither this nor the file says it, torchvision's architectures of colour images get ImageNet's, as in
            torchvision's recipes, those of timm, transformers and smp what their library says, and other architectures
            those of the data, with a warning that says what others would give on a few validation images; graphs and
            functions of your own take pixels in [0, 1].
        data_name: a data set; None: that of the training run.
        device: of the model; a black box is not moved.
        dataset: the data, if already loaded: a data set, a split, or an (images, labels) pair.
        budget: maximum number of images sent to a black box, including two here.
        http: how a server is asked; None: the defaults.
        gradients: what needs the model's gradients, such as an attack; a black box is then refused before it is asked.

    Raises:
        UserError: no such model, unknown data, data that do not fit the model or have its classes in another order, a
            budget for a model that is not a black box, or weights that do not say how pixels were normalised and are
            clearly better under another way.
    """
    named = as_text(source)
    source, normalise = _split(named)
    path = Path(source)
    trained = _trained(path)
    dataset = None if dataset is None else data.as_dataset(dataset)
    name = data_name or trained.get("data") or (None if dataset is None else dataset.name)
    load = _loader(source)
    if name is None:
        raise UserError(f"{source} does not say what data its model was trained on: name it with --data")
    asked = load in (_black_box, _onnx)
    if budget is not None and not asked:
        raise UserError(f"a budget limits the queries to a black box, and {source} is none: leave --budget out")
    if http is not None and not source.startswith(_SERVER):
        raise UserError(f"{source} is no server: leave the settings of HTTP out")
    if gradients is not None and load is _black_box:
        raise no_gradient(gradients, source)
    dataset = data.load(name, input_shape=input_shape(source, name)) if dataset is None else dataset
    scale = None if normalise is None else normalisation.read(normalise, source, dataset)
    if load is _black_box:
        model = _black_box(source, dataset, budget, http)
    elif load is _onnx:
        model = _onnx(source, dataset, device, budget, gradients, scale)
    elif load is _stored:
        model = _stored(source, dataset, device)
    else:
        model = load(source, dataset, device, scale)
    if isinstance(model, models.PixelModel):
        card = model.card
        if card.classes != dataset.num_classes or card.in_channels != dataset.in_channels:
            raise UserError(
                f"the model takes {card.in_channels} channels and knows {card.classes} classes, but {name} has "
                f"{dataset.in_channels} channels and {dataset.num_classes} classes: choose data that fit the model"
            )
    defense = "" if named.startswith(zoo.PREFIX) else trained.get("defense", {})
    label = user_code.short((defense if isinstance(defense, str) else defense.get("name")) or _label(source))
    return LoadedModel(model=model, dataset=dataset, trained=trained, label=label)


def asking(source: str, budget: int | None, http: HttpSettings | None) -> dict[str, Any]:
    """Return those of the keywords of :func:`load_model` that a model among several has a use for."""
    asked = _loader(_split(source)[0]) in (_black_box, _onnx)
    return {"budget": budget if asked else None, "http": http if source.startswith(_SERVER) else None}


def check_source(source: str) -> None:
    """Refuse a model that no source in :func:`load_model` provides, without loading it.

    Raises:
        UserError: there is none.
    """
    _loader(_split(source)[0])


def trained_on(source: str) -> str | None:
    """Return the name of the data set of a training, a hardening or a model of the zoo; None where there is none.

    Raises:
        UserError: the zoo has no such model.
    """
    folder = Path(zoo.resolved(source))
    return _trained(folder).get("data") if _kind(folder) in ("train", "harden") else None


def _kind(folder: Path) -> Any:
    """The kind of the run in a folder; None where there is none."""
    return read_yaml(file).get("kind") if (file := folder / "run.yaml").is_file() else None


def _trained(folder: Path) -> dict[str, Any]:
    """Return :attr:`LoadedModel.trained` of the run in a folder; empty where there is none.

    Raises:
        UserError: it is a run that leaves no model.
    """
    if not (folder / "run.yaml").is_file():
        return {}
    if _kind(folder) != "harden":
        return read_settings(folder / "run.yaml", "train")
    run = read_settings(folder / "run.yaml", "harden")
    ball = {name: run[name] for name in ("eps", "norm") if run.get(name) is not None}
    return {
        "data": run.get("data") or trained_on(run["model"]),
        "defense": {"name": "gambeson", **ball, **run.get("defense", {})},
    }


def input_shape(source: str, data_name: str) -> data.Shape:
    """Return the channels, height and width that a model takes, None where it takes any or does not say.

    Args:
        source: as in :func:`load_model`; image folders are read for this shape.
        data_name: name of the data; a model of a user's file is built and tried for image folders alone.

    Raises:
        UserError: the file is damaged, or the architecture's name is wrong.
    """
    source = _split(source)[0]
    load, known = _loader(source), dict[str, Any]()
    if load is _stored:
        known = read_card(Path(source)).plain()
    elif load is _architecture:
        name, weights = external.canonical(_parted(source)[0]), _parted(source)[1]
        tables = external.defaults if external.is_external(name) else torchvision_nets.weights_defaults
        known = tables(name) if external.is_external(name) or name.startswith(torchvision_nets.PREFIX) else {}
        if user_code.is_spelling(name) and data_name.partition(":")[0] in FOLDERS:
            known = {"in_channels": external.channels(name)}
        if weights is not None and known.get("in_channels") is None:
            known = {**known, "in_channels": _channels_of(weights, name)}
    elif load is _program or load is _onnx:
        return read_program(Path(source)).shape if load is _program else OnnxModel(source).input.image
    height, width = known.get("image_size") or (None, None)
    return known.get("in_channels"), height, width


def _channels_of(weights: Path, architecture: str) -> int | None:
    """Return the channels that the first convolution of an architecture has in a file of weights, if it is there."""
    found = read_weights(weights)
    if "card" in found.document:
        return read_card(weights).in_channels
    sizes: dict[str, Any] = {"in_channels": 3, "classes": 2, "image_size": (32, 32)}
    own = user_code.is_spelling(architecture)
    body = external.called(architecture, **sizes) if own else models.create(architecture, **sizes).body
    first = next((name for name, module in body.named_modules() if isinstance(module, nn.Conv2d)), None)
    tensors = max(found.groups.values(), key=len)
    kernel = next((tensors[key] for key in tensors if f".{key}".endswith(f".{first}.weight")), None)
    return None if kernel is None else kernel.shape[1]


_OF_MODELS = (FILE_NAME, "run.yaml", "config.json")
"""What a folder that is a model has one of."""


def _loader(source: str) -> Any:
    if source.startswith(_SERVER):
        refuse_secrets(source)
    if source.startswith((*_SERVER, FUNCTION)):
        return _black_box
    if source.lower().endswith(".onnx"):
        return _onnx
    architecture, weights = _parted(source)
    if (folder := Path(source)).is_dir() and not any((folder / one).is_file() for one in _OF_MODELS):
        raise UserError(f"{source} is a folder without a model: name one that a finished `gambeson train` has written")
    if weights is None and Path(source).exists() and Path(source).suffix != ".py" and not hubs.is_folder(source):
        return _program if source.endswith(SUFFIX) else _stored
    if source.endswith(SUFFIX):
        raise UserError(f"{source} does not exist: name a program that torch.export.save has written")
    if external.is_external(external.canonical(architecture)) or architecture.startswith(torchvision_nets.PREFIX):
        return _architecture
    if weights is None and ("/" in source or source.endswith(ENDINGS)):
        raise UserError(
            f"{source} does not exist: name the folder of a finished `gambeson train`, a model.safetensors file, or "
            "what else `gambeson audit --help` lists"
        )
    try:
        registry.check_name(architecture)
    except UserError as error:
        if weights is not None:
            raise
        raise UserError(f"{source} does not exist, and as the name of an architecture it is wrong: {error}") from None
    return _architecture


def _stored(source: str, dataset: data.Dataset, device: str) -> nn.Module:
    weights = read_weights(Path(source))
    _compare_classes(weights, dataset, source)
    return models.load(weights).to(torch.device(device))


def _compare_classes(weights: Weights, dataset: data.Dataset, source: str) -> None:
    """Refuse data whose classes are the model's in another order, and warn of other names."""
    learnt: Sequence[str] = weights.document.get("about", {}).get(CLASS_NAMES, ())
    given, numbers = dataset.classes, tuple(map(str, range(dataset.num_classes)))
    different = [index for index, (mine, theirs) in enumerate(zip(learnt, given, strict=False)) if mine != theirs]
    if len(learnt) != len(given) or not different:
        return
    first = different[0]
    found = f"class {first} is {learnt[first]!r} where {source} was trained, but {given[first]!r} in {dataset.name}"
    if {*learnt} == {*given}:
        raise UserError(f"{found}: give the classes in the order of the training")
    if numbers not in (tuple(learnt), given):  # which only count
        text = f"{found}: every rate is wrong unless the names mean the same classes"
        warnings.warn(text, DataWarning, stacklevel=4)


def _program(source: str, dataset: data.Dataset, device: str, scale: Scale | None) -> nn.Module:
    sizes = (dataset.in_channels, dataset.num_classes, dataset.image_size)
    return _graph(load_program(Path(source), *sizes, device, scale), source, dataset, scale)


def _graph(model: models.PixelModel, source: str, dataset: data.Dataset, scale: Scale | None) -> nn.Module:
    """Return a graph, which takes pixels unless its name says otherwise."""
    if scale is None:
        normalisation.compare(model, dataset, source, guessed=False)
    return model


def _architecture(source: str, dataset: data.Dataset, device: str, scale: Scale | None) -> nn.Module:
    architecture, file = _parted(source)
    weights = None if file is None else read_weights(file)
    if external.is_external(external.canonical(architecture)):
        own = external.defaults(external.canonical(architecture)).get("classes", dataset.num_classes)
        if weights is None and own != dataset.num_classes:  # a new, untrained last layer would be evaluated
            raise UserError(
                f"{architecture} knows {own} classes, but {dataset.name} has {dataset.num_classes}: choose data that "
                "fit the model, or fine-tune it on these with gambeson train and name the run"
            )
    (mean, std), guessed = scale_for(architecture, weights, dataset, scale)
    with seeded(0, "model"):
        model = models.create(architecture, dataset, mean=mean, std=std)
    if weights is not None:
        _compare_classes(weights, dataset, source)
        models.load_weights(model, weights)
    elif drawn := getattr(model.body, "drawn", None):
        raise UserError(
            f"{architecture} has no weights for {', '.join(drawn[:3])}, which would be random: choose a model that is "
            "trained as a classifier, or fine-tune it with gambeson train and name the run"
        )
    elif _is_drawn(architecture):
        warnings.warn(
            f"{architecture} is untrained: its weights are random, as none are named; name a run, or their file as in "
            f"{architecture}@FILE",
            stacklevel=3,
        )
    if guessed is not None:
        normalisation.compare(model, dataset, str(file or architecture), guessed=guessed)
    return model.eval().to(torch.device(device))


def _is_drawn(architecture: str) -> bool:
    """Whether an architecture without a file of weights has random ones; what others wrote may bring its own."""
    name, _, weights = architecture.partition("@")
    if name.startswith(hubs.TIMM):
        return not weights and "." not in name
    if name.startswith((torchvision_nets.PREFIX, hubs.SMP)):
        return not weights
    return any(re.fullmatch(rf"{re.escape(one.name)}(x[\d.]+)?", name) for one in registry.MODELS.own())


def scale_for(
    architecture: str, weights: Weights | None, dataset: data.Dataset, asked: Scale | None = None
) -> tuple[Scale | tuple[None, None], bool | None]:
    """Return how pixels are normalised before an architecture, and whether that is to be held against other ways.

    Args:
        architecture: its name.
        weights: those that it gets from a file; None: none.
        dataset: the data.
        asked: mean and standard deviation that the user named.

    Returns:
        Mean and standard deviation per channel, (None, None) for those of :func:`gambeson.models.create`; and
        ``guessed`` of :func:`gambeson.models.normalisation.compare`, None where the file, its architecture or the user
        says them, or where nothing was trained.

    Raises:
        UserError: both the file and the user say it.
    """
    own_code = user_code.is_spelling(architecture)  # which normalises, if anything does
    card = {} if weights is None or own_code else weights.document.get("exported", {})
    told = bool(card) or any("normalize.mean" in group for group in weights.groups.values()) if weights else False
    if weights is not None and told and asked is not None:
        raise UserError(f"{weights.path} says itself how its pixels were normalised: leave ?normalise= out")
    if told or asked is not None or (weights is None and not own_code):
        return asked or (card.get("mean"), card.get("std")), None
    named = "@" in architecture  # published weights, whose way these take
    imagenet = architecture.startswith(torchvision_nets.PREFIX) and not named and dataset.in_channels == 3
    return IMAGENET if imagenet else (None, None), not own_code and not named


def _onnx(
    source: str, dataset: data.Dataset, device: str, budget: int | None, gradients: str | None, scale: Scale | None
) -> nn.Module:
    if budget is None:
        try:
            sizes = (dataset.in_channels, dataset.num_classes, dataset.image_size)
            graph = load_onnx(Path(source), *sizes, device, scale)
        except UserError as error:
            if gradients is not None:
                raise
            reason = error
        else:
            return _graph(graph, source, dataset, scale)
        model = _black_box(
            source, dataset, None, None, scale
        )  # first: it tells what is wrong with the file or the data
        warnings.warn(f"{source} is taken as a black box, without gradients: {reason}", stacklevel=2)
        return model
    if gradients is not None:
        raise no_gradient(gradients, f"{source} with a budget")
    return _black_box(source, dataset, budget, None, scale)


def _black_box(
    source: str, dataset: data.Dataset, budget: int | None, http: HttpSettings | None, scale: Scale | None = None
) -> nn.Module:
    box: BlackBox
    settings: dict[str, Any] = {"budget": budget, "classes": dataset.num_classes}
    if source.startswith(FUNCTION):
        spelling = source.removeprefix(FUNCTION)
        file, call = user_code.file_of(spelling), external.load_function(spelling)

        def ask(images: torch.Tensor) -> Any:
            with user_code.told(file, f"asking {spelling} about {len(images)} images"):
                return call(images)

        box = FunctionModel(ask, title=spelling, **settings)
    elif source.lower().endswith(".onnx"):
        box = OnnxModel(source, normalise=scale, **settings)
    else:
        box = HttpModel(source, **settings, **({} if http is None else http.plain()))
    images = torch.full((2, dataset.in_channels, *dataset.image_size), 0.5)
    with torch.no_grad():
        found = box(images)
    if found.shape[1] != dataset.num_classes:
        raise UserError(
            f"{box.title} gives scores of {found.shape[1]} classes, but {dataset.name} has {dataset.num_classes}: "
            "choose data that fit the model"
        )
    return box


def _split(source: str) -> tuple[str, str | None]:
    """Split ``?normalise=`` from a model's name, and find one of the zoo; a server's address stays as it is."""
    bare, normalise = normalisation.split(source)
    if normalise is None or source.startswith(_SERVER):
        return zoo.resolved(source), None
    if _loader(zoo.resolved(bare)) in (_black_box, _stored):
        raise UserError(f"{bare} normalises its pixels itself: leave ?normalise={normalise} out")
    return bare, normalise


def _parted(source: str) -> tuple[str, Path | None]:
    """Split ``ARCHITECTURE@FILE`` at the first @ before what exists or looks like a file of weights."""
    cuts = [k for k, letter in enumerate(source) if letter == "@"]
    found = [(source[:k], Path(source[k + 1 :]).expanduser()) for k in cuts]
    likely = [pair for pair in found if pair[1].name.lower().endswith(ENDINGS) or "/" in str(pair[1])]
    likely = likely or [pair for pair in found if (pair[1] / FILE_NAME).is_file()]
    return next((pair for pair in likely if pair[1].exists()), likely[0] if likely else (source, None))


def _label(source: str) -> str:
    if source.startswith(_SERVER):
        return source.partition("://")[2].partition("?")[0].rpartition("@")[2]
    architecture, weights = _parted(source)
    if weights is not None:
        return weights.stem
    if user_code.is_spelling(architecture.removeprefix(FUNCTION)):
        return architecture.rpartition(":")[2]
    return Path(source).stem if Path(source).exists() else source
