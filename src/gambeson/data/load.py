"""Loading of data sets by name: prepare the tensors on disk, then build the Dataset."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator

from gambeson.base import Config, user_code
from gambeson.base.errors import OutOfSpace, UserError, unknown_name
from gambeson.base.files import load_tensors, save_tensors
from gambeson.base.registry import Registered
from gambeson.data.dataset import PARTS, Dataset, as_dataset
from gambeson.data.folder import load_folder
from gambeson.data.mask_folders import MaskOptions, load_mask_folder
from gambeson.data.partition import partition
from gambeson.data.pictures import ImageOptions, Shape
from gambeson.data.published import LAYOUTS
from gambeson.data.registry import DATASETS, SETS, DatasetSpec
from gambeson.data.split import Split
from gambeson.data.torchvision_sets import fetch_torchvision, load_torchvision

Stored = tuple[dict[str, torch.Tensor], dict[str, Any]]


def stored_file(name: str, root: Path) -> Path:
    """Return the file with the prepared tensors of a data set."""
    return root / f"{name}.safetensors"


def prepare(spec: DatasetSpec, root: Path) -> Stored:
    """Return a data set's tensors and their metadata, from disk or from the first source that works.

    Raises:
        UserError: every source failed, or the result cannot be stored.
    """
    file = stored_file(spec.name, root)
    if file.is_file():
        try:
            tensors, about = load_tensors(file, "images and labels")
            check_content(spec, tensors)
            return tensors, about
        except UserError:
            pass  # damaged, or from another source: prepared again and replaced
    failures: list[str] = []
    for way in spec.ways:
        try:
            content = way.run(root)
            check_content(spec, content.tensors)
        except UserError as error:
            failures.append(f"({len(failures) + 1}) {way.name}: {error}")
            continue
        about = {"name": spec.name, "source": way.name, "licence": spec.licence, "classes": content.classes}
        try:
            save_tensors(file, content.tensors, about)
        except OutOfSpace as error:
            raise OutOfSpace(
                f"could not store {file} ({error.__cause__}): nothing half-written was left; choose another "
                "folder with root= or $GAMBESON_DATA, or free some space"
            ) from error
        return content.tensors, about
    raise UserError(
        f"could not get {spec.name}, every way failed: {'; '.join(failures)}. Connect to the network and run "
        f"`gambeson data get {spec.name}` again, or copy {file.name} from another machine to {root}"
    )


def check_content(spec: DatasetSpec, tensors: dict[str, torch.Tensor]) -> None:
    """Raise unless the tensors are those of the data set: names, counts, shapes, types and labels.

    Raises:
        UserError: the first thing that differs.
    """
    parts = ("train_", "test_") if spec.source[1] else ("",)
    for part, count in zip(parts, spec.source, strict=False):
        images, labels = tensors.get(f"{part}images"), tensors.get(f"{part}labels")
        if images is None or labels is None:
            raise UserError(f"{part}images or {part}labels are missing: expected both")
        if images.dtype != torch.uint8 or tuple(images.shape) != (count, *spec.shape):
            raise UserError(
                f"{part}images are {images.dtype} of {tuple(images.shape)}: expected uint8 of {(count, *spec.shape)}"
            )
        expected = (count,) if spec.task.per_image_label else (count, *spec.shape[1:])
        if tuple(labels.shape) != expected:
            raise UserError(f"{part}labels have shape {tuple(labels.shape)}: expected {expected}")
        spec.task.check_labels(labels, spec.num_classes)


def build(spec: DatasetSpec, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> Dataset:
    """Cut a prepared data set into its splits, identically on every machine."""
    name = spec.name
    given = spec.classes or about.get("classes") or ()
    classes = tuple(given) if len(given) == spec.num_classes else tuple(map(str, range(spec.num_classes)))
    if spec.source[1]:
        whole = Split(name, tensors["train_images"], tensors["train_labels"], classes)
        train, validation = partition(whole.labels, [spec.validation], name)
        test = Split(f"{name}/test", tensors["test_images"], tensors["test_labels"], classes)
    else:
        whole = Split(name, tensors["images"], tensors["labels"], classes, task=spec.task)
        counts = [spec.validation, spec.test]
        rows = torch.arange(len(whole)).split([spec.train, *counts])
        train, validation, chosen = rows if spec.ordered else partition(whole.labels, counts, name)
        test = whole.subset(chosen, f"{name}/test")
    rest = (whole.subset(train, f"{name}/train"), whole.subset(validation, f"{name}/validation"))
    return Dataset(name, *rest, test, classes)


FOLDERS: dict[str, Any] = {"image-folder": load_folder, "mask-folder": load_mask_folder, **LAYOUTS}
"""Loaders of folders, ``NAME:PATH``."""
TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Entry:
    """One entry of the catalogue."""

    name: str
    """Name to pass to :func:`load`."""
    description: str
    ready: bool
    """Whether it is on disk, so that loading needs neither a network nor other packages."""
    how: str = ""
    """Where it comes from."""
    train: int = 0
    """Training images, without validation."""
    validation: int = 0
    test: int = 0
    shape: tuple[int, ...] = ()
    """Channels, height, width; empty if unknown before loading."""
    classes: int = 0
    licence: str = ""
    """As stated by the source."""


def load(
    name_or_data: Any,
    root: str | Path | None = None,
    *,
    workers: int | None = None,
    input_shape: Shape = (None, None, None),
    **options: Any,
) -> Dataset:
    """Load a data set, downloading it first if necessary.

    Sets of up to 4 GiB are read into memory; larger ones stay on disk and are prefetched, each image once per pass for
    any number of workers.

    Args:
        name_or_data: a name of :func:`catalog`, such as fashion-mnist or fashion-scenes; image-folder:PATH,
            mask-folder:PATH, cityscapes:PATH, voc:PATH, ade20k:PATH or torchvision:NAME; a name that an installed
            package has registered, or ``FILE.py:FUNCTION``, a function from the data folder to data; or an (images,
            labels) pair of tensors or arrays, a Split, or a torch Dataset of (image, label) items, which are cut
            70/15/15. A name may end in options, such as ``?size=64,mode=grey``.
        root: the data folder; by default $GAMBESON_DATA or ~/.cache/gambeson.
        workers: processes that prefetch images; 0: threads of this process; None: $GAMBESON_WORKERS, else
            :func:`gambeson.data.lazy.default_workers`.
        input_shape: channels, height and width that a model takes, None where it takes any: the default mode and size
            of image folders, and the default size of torchvision's sets whose images differ in size.
        **options: how pictures are read, for data that are not tensors already: :class:`ImageOptions`, such as
            ``size=64``. Those in the name come first.

    Raises:
        UserError: an unknown name or option, data that is unavailable or invalid, or options for tensors.
    """
    if workers is not None and workers < 0:
        raise UserError(f"workers = {workers}: expected a number of processes, 0 or more")
    options = {key: value for key, value in options.items() if value is not None}
    if isinstance(name_or_data, Path):
        return load_folder(name_or_data, ImageOptions(**options), workers, input_shape)
    if not isinstance(name_or_data, str):
        return as_dataset(name_or_data, ImageOptions(**options).decoder() if options else None, workers)
    name, given = _parsed(name_or_data)
    options |= given
    kind, _, path = name.partition(":")
    if kind in FOLDERS:
        return FOLDERS[kind](Path(path).expanduser(), _settings(name)(**options), workers, input_shape)
    if name.startswith(TORCHVISION):
        found = name.removeprefix(TORCHVISION)
        return load_torchvision(found, data_root(root), ImageOptions(**options), workers, input_shape)
    entry = _entry(name)
    if "settings" in entry.options:
        return entry.target(data_root(root), entry.options["settings"](**options))
    if "spec" not in entry.options:
        return _named(load(_called(entry, data_root(root)), workers=workers, **options), name)
    spec: DatasetSpec = entry.options["spec"]
    if options:
        raise UserError(
            f"{' and '.join(options)} came with {spec.name}, whose images are {spec.shape[1]}x{spec.shape[2]} in "
            f"{'grey' if spec.shape[0] == 1 else 'colour'}: leave it out"
        )
    return build(spec, *prepare(spec, data_root(root)))


def get(name: str, root: str | Path | None = None) -> Path:
    """Download and prepare a named data set if necessary; return its folder.

    Raises:
        UserError: an unknown name, or every source failed; the message lists them.
    """
    folder, (bare, _) = data_root(root), _parsed(name)
    kind, _, path = bare.partition(":")
    if kind in FOLDERS:
        return Path(path).expanduser()
    if bare.startswith(TORCHVISION):
        return fetch_torchvision(bare.removeprefix(TORCHVISION), folder)
    options = _entry(bare).options
    spec = options.get("spec") or DATASETS.get(options.get("source", ""))
    if spec is None:
        load(name, folder)
    else:
        prepare(spec, folder)
    return folder


def catalog(root: str | Path | None = None) -> list[Entry]:
    """List the named data sets; those of :func:`load` with a path and torchvision:NAME come in addition.

    For data sets from installed packages only the name, description and package are known before loading; their counts
    are 0.
    """
    folder = data_root(root)
    return [_line(name, folder) for name in SETS.names()]


def canonical(name: str) -> str:
    """Return a name as runs store it: ``FILE.py:FUNCTION`` by its absolute path and with the hash of the file.

    Raises:
        UserError: there is no such file, or it was changed since the name was stored.
    """
    bare, options = _parsed(name)
    kind = _settings(bare)
    kind(**options)  # refuses wrong values
    given = [f"{key}={options[key]}" for key in kind.model_fields if key in options]
    return SETS.canonical(bare) + ("?" if given else "") + ",".join(given)


Name = Annotated[str, AfterValidator(canonical)]
"""The name of a data set in the settings of a run, as :func:`canonical` gives it."""


def data_root(root: str | Path | None) -> Path:
    """Return the data folder: ``root``, else $GAMBESON_DATA, else ~/.cache/gambeson."""
    return Path(root or os.environ.get("GAMBESON_DATA") or "~/.cache/gambeson").expanduser()


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    """Split ``name?size=64,mode=grey`` into the name and the options.

    Raises:
        UserError: an unknown option, one without a value, or one given twice.
    """
    found = re.fullmatch(r"(.*?)\?(\w+=.*)", name, re.DOTALL)
    if found is None:
        return name, {}
    options: dict[str, Any] = {}
    known = _settings(found[1]).model_fields
    for part in re.split("[,&]", found[2]):
        key, sign, value = part.partition("=")
        if not sign or key not in known or key in options:
            fault = "is given twice" if key in options else "is unknown" if sign else "has no value"
            raise UserError(f"{key} in {name} {fault}: the options are {', '.join(known)}")
        options[key] = value
    return found[1], options


def _settings(name: str) -> type[Config]:
    """Return the class of the options that a name takes."""
    if name.startswith("mask-folder:"):
        return MaskOptions
    if user_code.is_spelling(name) or name not in SETS.names():
        return ImageOptions
    return SETS.get(name).options.get("settings", ImageOptions)


def _entry(name: str) -> Registered[Any]:
    if user_code.is_spelling(name) or name in SETS.names():
        return SETS.get(name)
    if Path(name).is_dir():
        raise UserError(
            f"{name} is a folder, not the name of a data set: write image-folder:{name}, or mask-folder:{name} if it "
            "has folders of images and of masks"
        )
    raise unknown_name("data set", name, [*SETS.names(), *(f"{kind}:PATH" for kind in FOLDERS), f"{TORCHVISION}NAME"])


def _line(name: str, folder: Path) -> Entry:
    try:
        entry = SETS.get(name)
    except UserError as error:
        return Entry(name, str(error), ready=False)
    if "source" in entry.options:
        ready = stored_file(entry.options["source"], folder).is_file()
        return Entry(name, entry.summary, ready, **entry.options["about"])
    if "spec" not in entry.options:
        return Entry(name, entry.summary, ready=True, how=f"loaded by {entry.owner}")
    spec: DatasetSpec = entry.options["spec"]
    known = {key: getattr(spec, key) for key in ("how", "train", "validation", "test", "shape", "licence")}
    ready = stored_file(name, folder).is_file()
    return Entry(name, spec.description, ready, classes=spec.num_classes, **known)


def _called(entry: Registered[Any], root: Path) -> Any:
    """Call the function that loads a data set.

    Raises:
        UserError: a user's file fails, with its line; or it returns a name, which could recurse without end.
    """
    if user_code.is_spelling(entry.name):
        file = user_code.file_of(entry.name)
        with user_code.told(file, f"calling {user_code.short(entry.name)}"), user_code.beside(file):
            found = entry.target(root)
    else:
        found = entry.target(root)
    if isinstance(found, str):
        raise UserError(f"the data set {entry.name} returned the text {found!r}: expected the data, or a pathlib.Path")
    return found


def _named(data: Dataset, name: str) -> Dataset:
    """Give a data set without a name the name it was requested by."""
    name = user_code.short(name)
    if data.name != "data":
        return data
    for part in PARTS:  # just cut, so nothing else refers to them
        getattr(data, part).name = f"{name}/{part}"
    return replace(data, name=name)
