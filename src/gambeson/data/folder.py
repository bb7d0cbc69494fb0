"""Image folders: one sub-folder per class, optionally below folders for train, validation and test."""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gambeson.base.errors import DataWarning, UserError, one_line, some
from gambeson.base.files import refuse_pointer
from gambeson.base.pictures import open_picture
from gambeson.data.dataset import Dataset, complete, settled
from gambeson.data.lazy import LazySplit
from gambeson.data.pictures import Decoder, Header, ImageOptions, Shape, levels, read_header
from gambeson.data.split import Batch, Split

SIZE, LARGEST = 224, 512
"""Default side of the square for images of several sizes (what ImageNet models expect); the largest side, in pixels,
up to which images that all have one size keep it (ours)."""
ENDINGS = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".tif", ".tiff", ".webp", ".avif", ".avifs", ".jp2", ".tga", ".heic", ".heif"),
}
"""Endings of pictures. What PIL cannot read is refused rather than left out."""
JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "__pycache__", "$recycle.bin", "lost+found"}
"""What systems and tools leave behind, besides names that begin with a dot."""
WORDS = {
    "train": {"train", "training", "trainval"},
    "validation": {"val", "valid", "validation", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""Names of splits, in any case: those that Hugging Face's data sets recognise, and ``trainval``."""
NEUTRAL = {"set", "data", "dataset", "split", "images", "image", "imgs", "img", "folder"}
SHARE = 0.15
IMAGES = {"images", "image", "imgs", "img", "jpegimages", "leftimg8bit"}
MASKS = {
    *("masks", "mask", "labels", "label", "annotations", "annotation", "segmentation", "segmentations"),
    *("segmentationclass", "gtfine", "gt", "ground_truth", "groundtruth"),
}
"""Names, in any case, of the two folders of a data set of images with masks."""
LOOKED = 20_000
"""Pictures of which the headers are read, evenly spread, before the first is decoded (ours)."""


class Files:
    """Loads images as uint8 (C, H, W) with their labels.

    Raises:
        UserError: a file is not an image, is damaged, or does not fit the decoder; the message names it.
    """

    def __init__(self, paths: Sequence[Path], labels: torch.Tensor, decode: Decoder) -> None:
        # One array: reference counting would make every worker copy a million Path objects.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels, self.decode = labels, decode

    def __call__(self, number: int) -> Batch:
        """Load one image."""
        path = os.fsdecode(bytes(self.paths[number]))
        with open_image(path) as picture:
            return self.decode(picture, path), self.labels[number]


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture; whatever PIL raises while it is used becomes a sentence that names the file."""
    try:
        with open_picture(path) as picture:
            yield picture
    except UserError:
        raise
    except Exception as error:  # PIL's decoders raise errors of many types for damaged files
        refuse_pointer(path)
        raise UserError(f"{path} cannot be read as an image ({one_line(error)}): replace or remove it") from None


def load_folder(
    path: Path,
    options: ImageOptions | None = None,
    workers: int | None = None,
    input_shape: Shape = (None, None, None),
) -> Dataset:
    """Load class folders directly under a folder, or under its folders for train, validation and test.

    Missing splits are cut from train, stratified, 15 % each; without splits everything is cut 70/15/15. What a user
    should know about the folder is warned of: pictures that two splits share, an order of classes that surprises,
    enlarged images, and files that were left out. ``docs/data.md`` has every rule.

    Args:
        path: the folder.
        options: how pictures and folder names are read.
        workers: processes that prefetch the images, see :class:`LazySplit`.
        input_shape: the shape that the model takes, the default for the options' size and mode.

    Raises:
        UserError: no such folder, no class folders, no images, folders inside class folders, classes that train lacks,
            or pictures that no rule covers.
    """
    options = options or ImageOptions()
    if not path.is_dir():
        packed = "unpack it and name the folder" if path.is_file() else "expected one with a sub-folder per class"
        raise UserError(f"{path} is not a folder: {packed}")
    name, path = path.resolve().name, within(path)
    folders = _split_folders(path) or {"": path}
    found = {part: _class_folders(folder, options.nested == "flat") for part, folder in folders.items()}
    _refuse_masks(path, found)
    only, *others = next(iter(found.values()))
    if not others:
        raise UserError(f"{path} has the one class folder {only}: expected two or more, a sub-folder per class")
    classes = _ordered(name, list(next(iter(found.values()))), options.order)
    for part, folder in folders.items():
        _compare_classes(folder, list(found[part]), classes)
    paths = {part: [path for one in classes for path in files.get(one, ())] for part, files in found.items()}
    decode = decoder_for([path for those in paths.values() for path in those], options, input_shape, name)
    splits: dict[str, Split] = {}
    for part, files in found.items():
        truth = torch.tensor([k for k, one in enumerate(classes) for _ in files.get(one, ())])
        title = f"{name}/{part}" if part else name
        splits[part] = LazySplit(title, Files(paths[part], truth, decode), truth, classes, workers=workers)
    data = settled(complete(splits, name, SHARE))
    tell_shared(data)
    return data


def _class_folders(path: Path, flat: bool) -> dict[str, list[Path]]:
    """Return the pictures in each class folder under ``path``, by the class's name."""
    folder = within(path)
    folders, loose, left = listing(folder)
    if not folders:
        held = f"holds {loose[0].name} itself" if loose else f"holds {left[0].name}" if left else "is empty"
        raise UserError(f"{path} has no sub-folders and {held}: expected a sub-folder per class, with its images in it")
    left += loose
    found: dict[str, list[Path]] = {}
    for one in folders:
        name = unicodedata.normalize("NFC", one.name)  # macOS spells accents in another way
        twin = next((known for known in found if known.casefold() == name.casefold()), None)
        if twin is not None:
            raise UserError(f"{folder} holds {twin} and {one.name}, which differ in case only: merge or rename them")
        found[name] = sorted(_class_files(one, flat, left))
        if not found[name]:
            raise UserError(f"{one} holds no images: add some or remove the folder")
    if left:
        kinds = Counter(file.suffix.lower() or file.name for file in left).most_common(5)
        tell(f"left out of {path}: {', '.join(f'{count} {kind}' for kind, count in kinds)}")
    return found


def listing(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the folders, the pictures and the other files directly under a folder, without junk."""
    found: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    try:
        with os.scandir(folder) as entries:  # reads the folder once, not each file
            known = sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in entries)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): change its permissions or remove it") from None
    for name, is_folder, is_link in known:
        if name[0] == "." or name.lower().partition(":")[0] in JUNK:
            continue
        path = folder / name
        if is_folder and is_link and folder.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{path} is a link to a folder that it is in: remove it")
        found[0 if is_folder else 1 if path.suffix.lower() in ENDINGS else 2].append(path)
    return found


def _holds_pictures(folder: Path) -> bool:
    folders, pictures, _ = listing(folder)
    return bool(pictures) or any(map(_holds_pictures, folders))


def within(folder: Path) -> Path:
    """Step into a folder that holds nothing but one folder of folders, as archives often unpack."""
    folders, pictures, _ = listing(folder)
    if len(folders) != 1 or pictures or not listing(folders[0])[0]:
        return folder
    return within(folders[0]) if part_of(folders[0].name)[0] in (None, part_of(folder.name)[0]) else folder


def _class_files(folder: Path, flat: bool, left: list[Path]) -> list[Path]:
    """Return the pictures of a class folder, and add its other files to ``left``."""
    folders, pictures, others = listing(folder)
    inner = [one for one in folders if _holds_pictures(one)]
    if inner and not flat and (pictures or len(inner) > 1):
        raise UserError(
            f"the class folder {folder} holds folders of pictures ({some(one.name for one in inner)}): if those are "
            f"the classes, name {folder}; if everything below is of the class {folder.name}, add ?nested=flat"
        )
    left += others
    return [*pictures, *(file for one in inner for file in _class_files(one, flat, left))]


def part_of(name: str) -> tuple[str | None, bool]:
    """Return the split that a folder's name means, if any, and whether it says nothing else."""
    words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())
    words = [re.sub("(set|data|images?|imgs?|split)$", "", word) or word for word in words]
    parts = {part for word in words for part, known in WORDS.items() if word in known}
    parts = {"train"} if parts == {"train", "validation"} else parts
    plain = all(word in NEUTRAL.union(*WORDS.values()) for word in words)
    return (parts.pop(), plain) if len(parts) == 1 else (None, False)


def _split_folders(path: Path) -> dict[str, Path]:
    """Return the folders of the splits under ``path``, train first; none if its folders are classes.

    A folder is one of a split if its name says so and it holds folders. A name that says more, such as ``seg_train``,
    counts if it is beside that of another split, or if nothing else is there.
    """
    folders, _, _ = listing(path)
    named = {one: part_of(one.name) for one in folders if part_of(one.name)[0]}
    holders = [one for one in named if listing(one)[0]]
    several = len({part for part, _ in named.values()}) > 1
    if not holders:
        plain = [one for one, (_, only) in named.items() if only]
        if len({named[one][0] for one in plain}) > 1 or ((plain or several) and len(named) == len(folders)):
            raise UserError(
                f"{path} holds {some(one.name for one in named)}, which are names of splits, without class folders in "
                "them: expected a sub-folder per class in each"
            )
        return {}
    if not any(named[one][1] for one in holders) and not several and len(named) < len(folders):
        return {}
    found: dict[str, Path] = {}
    for part in WORDS:
        those = [one for one in holders if named[one][0] == part]
        those = [one for one in those if named[one][1]] or those
        if len(those) > 1:
            raise UserError(
                f"{path} holds {some(one.name for one in those)}, which all mean {part}: rename or remove one"
            )
        found.update((part, one) for one in those)
    if "train" not in found:
        only = next(iter(found.values()))
        raise UserError(
            f"{path} has {some(one.name for one in found.values())} but no train folder: add train, or name {only} to "
            "have it cut into three"
        )
    if left := [one for one in folders if one not in found.values() and _holds_pictures(one)]:
        tell(f"{some(one.name for one in left)} of {path} are left out: beside folders of splits, only those are read")
    return found


def _ordered(name: str, classes: list[str], order: str | None) -> tuple[str, ...]:
    """Order the classes; unless the order was chosen, warn where a class's number could be taken for another."""
    integers = all(re.fullmatch(r"[+-]?\d+", one) for one in classes)

    def numbers(text: str) -> tuple[object, ...]:
        if integers:
            return int(text), text
        parts = re.findall(r"\d+|\D+", text)
        return *(("0", int(part)) if part.isdecimal() else (part, 0) for part in parts), text

    by_text, by_number = sorted(classes), sorted(classes, key=numbers)
    if order is None and (
        by_text != by_number or (integers and [int(one) for one in by_text] != list(range(len(classes))))
    ):
        pairs = some((f"{k} is folder {one}" for k, one in enumerate(by_text)), 12)
        tell(
            f"the classes of {name} are in the order of text, as in torchvision: {pairs}; if your model takes the "
            "numbers in their names, choose ?order=number, else ?order=text"
        )
    return tuple(by_number if order == "number" else by_text)


def _refuse_masks(path: Path, found: dict[str, dict[str, list[Path]]]) -> None:
    """Refuse two folders that are not classes but images and their masks."""
    for classes in found.values():
        names = {one.lower() for one in classes}
        if len(names) == 2 and names & IMAGES and names & MASKS:
            raise UserError(
                f"{path} holds {some(classes)}, which are names of images and their masks, not of classes: write "
                f"mask-folder:{path}, or rename them"
            )


def _compare_classes(folder: Path, found: list[str], classes: tuple[str, ...]) -> None:
    """Refuse classes that train lacks; say which ones are missing."""
    if strangers := sorted(set(found) - set(classes)):
        near = [known for known in classes if known.casefold() in {stranger.casefold() for stranger in strangers}]
        hint = f"; train has {some(near)}" if near else ""
        raise UserError(
            f"{folder} has classes that train lacks: {some(strangers)}{hint}; expected the same folders in both"
        )
    if missing := [known for known in classes if known not in found]:
        tell(f"{folder} has no images of {some(missing)}: its rates are over the other classes")


def decoder_for(paths: list[Path], options: ImageOptions, input_shape: Shape, name: str) -> Decoder:
    """Look at the headers, choose size, mode and white, and say what a user would want to know."""

    def header(path: Path) -> Header:
        with open_image(path) as picture:
            return read_header(picture)

    seen = paths[:: -(-len(paths) // LOOKED)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        heads = list(pool.map(header, seen))
    of = f"of the {len(seen)} pictures of {name}{' looked at' if len(seen) < len(paths) else ''}"
    channels, *sides = input_shape
    sizes = {(head.height, head.width) for head in heads}
    common = next(iter(sizes))
    if options.size is not None:
        size = (options.size, options.size)
    elif sides[0] and sides[1]:
        size = (sides[0], sides[1])
    else:
        size = common if len(sizes) == 1 and max(common) <= LARGEST else (SIZE, SIZE)
    grey = options.mode == "grey" if options.mode else channels == 1
    greys = sum(head.grey for head in heads)
    if smaller := sum(head.height < size[0] or head.width < size[1] for head in heads):
        tell(f"{smaller} {of} are smaller than {size[0]}x{size[1]} and are enlarged: ?size= chooses another size")
    if options.mode is None and grey and greys < len(heads):
        tell(f"{len(heads) - greys} {of} have colours and are read as grey, which the model takes: ?mode=grey says so")
    if options.mode is None and channels is None and greys == len(heads):
        tell(f"all pictures of {name} are grey and get three equal channels, as in torchvision: ?mode=grey gives one")
    if animated := sum(head.frames > 1 for head in heads):
        tell(f"{animated} {of} have several frames or pages: the first one counts")
    white = _white([(path, head.depth) for path, head in zip(seen, heads, strict=True) if head.depth], options.white)
    return Decoder(size, grey, white, options.alpha)


def _white(deep: list[tuple[Path, str]], white: float | None) -> float | None:
    """Return the value of white for pictures of more than 8 bits.

    16-bit files hold 10, 12 or 14 bits as often, which no header says: unless one picture uses the highest bit, the
    user must say which value is white.
    """
    kinds = sorted({kind for _, kind in deep})
    if len(kinds) > 1:
        raise UserError(f"{deep[0][0].parent} holds {' and '.join(kinds)} pictures: expected one kind; convert some")
    if kinds != ["16-bit"] or white is not None:
        return white
    highest = 0.0
    for path, _ in deep:
        with open_image(path) as picture:
            values = levels(picture, str(path))
        colours = values[..., :-1] if values.ndim == 3 and values.shape[2] in (2, 4) else values  # without alpha
        highest = max(highest, float(colours.max()))
        if highest > 32767:
            return 65535.0
    raise UserError(
        f"{deep[0][0]} is a 16-bit picture, and no value of its folder is above {highest:.0f}, as with fewer bits: "
        f"say which value is white by ?white={2 ** max(1, int(highest).bit_length()) - 1}, or ?white=65535"
    )


def tell_shared(data: Dataset) -> None:
    """Warn of pictures that are in train and in another split; splits on disk are compared when they are audited."""
    if any(isinstance(split, LazySplit) for split in (data.train, data.validation, data.test)):
        return
    for split in (data.validation, data.test):
        if shared := int(torch.isin(split.image_hashes, data.train.image_hashes).sum()):
            tell(
                f"{shared} of the {len(split)} images of {split.name} are in {data.train.name} too (equal pixels): "
                "rates on them measure memory, so remove them from one of the two"
            )


def tell(text: str) -> None:
    """Warn of what a user would want to know of the data."""
    warnings.warn(text, DataWarning, stacklevel=2)
