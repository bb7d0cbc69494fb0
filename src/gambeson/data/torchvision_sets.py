"""torchvision's image data sets by name: their train, validation and test parts, and image sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gambeson.base.errors import UserError, unknown_name
from gambeson.data.dataset import Dataset, complete, settled
from gambeson.data.folder import SHARE, SIZE
from gambeson.data.pictures import ImageOptions, Shape
from gambeson.data.sources import torchvision_sets
from gambeson.data.split import Split
from gambeson.data.torch_dataset import Survey, survey
from gambeson.tasks.labels import class_names

MOST = 5000
"""Maximum number of images of a split cut from train, as for the named sets (ours)."""
KEPT = ("targets", "labels", "_labels", "y", "_samples")
"""Attributes in which torchvision's classes store labels; their values are compared with items."""
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """How to construct one of torchvision's data sets."""

    parts: dict[str, Settings] = field(default_factory=dict)
    """Arguments for each part; empty: the set has no parts and is cut 70/15/15."""
    size: int | None = SIZE
    """Default side of the square that images are resized to; None if they have one size."""
    downloads: bool = True
    """Whether torchvision can download it."""
    classes: tuple[str, ...] = ()
    """Class names if the torchvision class lacks them; always given for label maps."""


def _by(key: str, train: Any, test: Any, validation: Any = None) -> dict[str, Settings]:
    named = {"train": train, "validation": validation, "test": test}
    return {part: {key: value} for part, value in named.items() if value is not None}


SETS = {
    "Caltech101": Source(),
    "Caltech256": Source(),
    "CLEVRClassification": Source(parts=_by("split", "train", "val")),
    "Country211": Source(parts=_by("split", "train", "test", "valid")),
    "DTD": Source(parts=_by("split", "train", "test", "val")),
    "EuroSAT": Source(size=None),
    "FGVCAircraft": Source(parts=_by("split", "train", "test", "val")),
    "Flowers102": Source(parts=_by("split", "train", "test", "val")),
    "Food101": Source(parts=_by("split", "train", "test")),
    "GTSRB": Source(parts=_by("split", "train", "test"), size=32),
    "ImageNet": Source(parts=_by("split", "train", "val"), downloads=False),
    "Imagenette": Source(parts=_by("split", "train", "val")),
    "KMNIST": Source(parts=_by("train", True, False), size=None),
    "OxfordIIITPet": Source(parts=_by("split", "trainval", "test")),
    "Places365": Source(parts=_by("split", "train-standard", "val")),
    "RenderedSST2": Source(parts=_by("split", "train", "test", "val")),
    "SEMEION": Source(size=None),
    "STL10": Source(parts=_by("split", "train", "test"), size=None),
    "StanfordCars": Source(parts=_by("split", "train", "test"), downloads=False),
    "SUN397": Source(),
    "SVHN": Source(parts=_by("split", "train", "test"), size=None),
    "USPS": Source(parts=_by("train", True, False), size=None),
    "VOCSegmentation": Source(parts=_by("image_set", "train", "val"), classes=VOC),
}
"""The sets that :func:`load_torchvision` accepts. If a set has only a validation part, that part is used as test, and
validation is cut from train."""
OTHERWISE = {
    "CIFAR10": "cifar10",
    "CIFAR100": "cifar100",
    "MNIST": "mnist",
    "FashionMNIST": "fashion-mnist",
    "ImageFolder": "image-folder:PATH",
}
"""Sets that have their own name here, whose loader reads no pickles."""


def load_torchvision(
    name: str, root: Path, options: ImageOptions, workers: int | None = None, input_shape: Shape = (None, None, None)
) -> Dataset:
    """Load one of torchvision's data sets from local files.

    Missing splits are cut from train, 15 % but at most 5,000 images; without parts everything is cut 70/15/15.

    Args:
        name: of the class, such as ``OxfordIIITPet``; case is ignored.
        root: torchvision's ``root`` argument; for ImageNet its sub-folder ``imagenet``, if present.
        options: how images are read. Their size is by default 32 for GTSRB, that of the model or else 224 for other
            sets whose images differ in size, and unchanged for the rest.
        workers: processes that prefetch the images, see :class:`LazySplit`.
        input_shape: the shape that the model takes.

    Raises:
        UserError: an unknown name, or missing, damaged or mismatched files.
    """
    name, source = _source(name)
    size = None if source.size is None else (source.size, source.size)
    if source.size == SIZE and input_shape[1] and input_shape[2]:
        size = (input_shape[1], input_shape[2])
    decode = options.decoder(size)
    found = {
        part: survey(_open(name, root, settings, False), decode, KEPT, source.classes)
        for part, settings in (source.parts or {"": {}}).items()
    }
    classes = source.classes or _classes(list(found.values()))
    ignored = 255 if next(iter(found.values())).labels is None else None
    splits: dict[str, Split] = {
        part: one.split(f"{name}/{part}", classes, ignored, workers) for part, one in found.items()
    }
    return settled(complete(splits, name, SHARE, MOST))


def fetch_torchvision(name: str, root: Path) -> Path:
    """Let torchvision download a data set if necessary; return its folder.

    Raises:
        UserError: an unknown name, a set that torchvision cannot download, or a download that failed.
    """
    name, source = _source(name)
    for settings in source.parts.values() or [{}]:
        _open(name, root, settings, source.downloads)
    return _folder(name, root)


def _source(name: str) -> tuple[str, Source]:
    small = {known.lower(): known for known in [*SETS, *OTHERWISE]}
    known = small.get(name.lower(), name)
    if known in OTHERWISE:
        raise UserError(f"torchvision:{name} is called {OTHERWISE[known]} here: use that name")
    if known in SETS:
        return known, SETS[known]
    if hasattr(torchvision_sets(), name):
        raise UserError(
            f"torchvision:{name} is not among the sets that load by name ({', '.join(SETS)}): if its items are "
            f"(image, label), build it and pass it, as in gambeson.data.load(torchvision.datasets.{name}(...))"
        )
    raise unknown_name("torchvision data set", name, SETS)


def _folder(name: str, root: Path) -> Path:
    # Only ImageNet's class expects train and val directly in its root; the others create their own sub-folder.
    own = root / "imagenet"
    return own if name == "ImageNet" and own.is_dir() else root


def _open(name: str, root: Path, settings: Settings, download: bool) -> Any:
    folder = _folder(name, root)
    asked = {"download": download} if SETS[name].downloads else {}
    if download:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        return getattr(torchvision_sets(), name)(str(folder), **settings, **asked)
    except ModuleNotFoundError as error:
        raise UserError(f"torchvision:{name} needs {error.name} to read its files: pip install {error.name}") from None
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        how = "put its files there, as torchvision's page on it says"
        if asked and not download:
            how = f"fetch it by `gambeson data get torchvision:{name}`, or {how}"
        said = " ".join(str(error).replace("You can use download=True to download it", "").split()).rstrip(".")
        raise UserError(f"torchvision:{name} is not available in {folder} ({said}): {how}") from None


def _classes(found: list[Survey]) -> tuple[str, ...]:
    """Return the class names common to all parts, else numbers up to the highest label."""
    numbered = max((class_names(one.values, None) for one in found), key=len)
    names = {one.names for one in found}
    return names.pop() if len(names) == 1 and len(found[0].names) >= len(numbered) else numbered
