"""Folders of images with masks: what masks mean, and how they are found and read."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from gambeson.base.errors import UserError, one_line, some
from gambeson.base.files import parse_json
from gambeson.data.dataset import PARTS, Dataset, complete, settled
from gambeson.data.folder import (
    IMAGES,
    MASKS,
    SHARE,
    decoder_for,
    listing,
    open_image,
    part_of,
    tell,
    tell_shared,
    within,
)
from gambeson.data.lazy import LazySplit
from gambeson.data.pictures import Decoder, ImageOptions, Shape, fit, read_header
from gambeson.data.split import Batch, Split
from gambeson.tasks.labels import MASK, class_names, find_ignored

IGNORED = 255
"""The label of every unlabelled pixel, whatever its value in the files; classes are 0 to 254."""
SUFFIX = re.compile(
    r"[-_. ](masks?|labels?|labelids|seg|segmentation|gt|gtfine|annotation|image|img|leftimg8bit)$", re.I
)
"""What the names of an image and its mask may end in besides what they share."""
LOSSLESS = {"PNG", "BMP", "GIF", "TIFF", "PPM"}
VOID = {"void", "ignore", "ignored", "unlabelled", "unlabeled"}
"""Classes of a palette that mark unlabelled pixels."""
PALETTES = ("palette.json", "palette.txt", "classes.json", "classes.txt")
"""Files in the folder that are read if no palette is given."""
Values = np.ndarray[Any, Any]
Pair = tuple[Path, Path]


class MaskOptions(ImageOptions):
    """How images with masks are read; in a name ``?size=64,palette=colours.json``."""

    palette: Path | None = None
    """File with the class names, and their colours in colour-coded masks."""
    ignore: Annotated[int, Field(ge=0, le=255)] | None = None
    """Value of unlabelled pixels in indexed masks; by default 255, unless 0 and 255 are the only values."""


@dataclass(frozen=True)
class Palette:
    """The classes of a palette file."""

    names: tuple[str, ...]
    colours: tuple[tuple[tuple[int, int, int], int], ...] = ()
    """Each colour with its label; empty if the file has names only."""
    labels: tuple[int, ...] = ()
    """The label of each value in indexed masks: that of the entry with this number."""


def read_palette(path: Path) -> Palette:
    """Read class names, with or without colours, in the order of the labels.

    JSON: ``{"sky": [0, 0, 255], ...}``, or a list of names. Text: a line per class, with three numbers before or after
    the name, or the name alone; lines that begin with # are skipped. What is called void, ignore or unlabelled marks
    unlabelled pixels.

    Raises:
        UserError: the file cannot be read, or a colour or name is wrong or given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the palette {path} cannot be read ({one_line(error)}): expected a JSON or a text file"
        ) from None
    found: list[tuple[str, Any]] = []
    if path.suffix.lower() == ".json":
        try:
            content = parse_json(text, object_pairs_hook=tuple)  # a dict would drop all but a name's last colour
        except json.JSONDecodeError as error:
            raise UserError(f"the palette {path} is not valid JSON ({error})") from None
        if not isinstance(content, tuple | list):
            raise UserError(f"the palette {path} holds {content!r}: expected colours by name, or a list of names")
        found = list(content) if isinstance(content, tuple) else [(name, None) for name in content]
    else:
        for line in filter(None, (line.strip() for line in text.splitlines())):
            numbers = r"(\d+)[\s,;]+(\d+)[\s,;]+(\d+)"
            one = re.fullmatch(rf"(?:(.+?)[\s,;:]+)?{numbers}(?:[\s,;:]+(.+))?", line)
            if not line.startswith("#"):
                name = (one[1] or one[5] or "") if one else line
                found.append((name, [int(value) for value in one.groups()[1:4]] if one else None))
    names: list[str] = []
    labels: list[int] = []
    for name, colour in found:
        right = colour is None or (
            isinstance(colour, list) and len(colour) == 3 and all(type(v) is int and 0 <= v <= 255 for v in colour)
        )
        if not right or not isinstance(name, str) or not name or (colour is None) != (found[0][1] is None):
            raise UserError(
                f"the palette {path} has the entry {name!r}: {colour!r}: expected a name for every class, with three "
                "numbers from 0 to 255 for all or for none"
            )
        void = name.lower() in VOID
        if not void and name not in names:
            names.append(name)
        labels.append(IGNORED if void else names.index(name))
    colours = {tuple(colour): label for (_, colour), label in zip(found, labels, strict=True) if colour is not None}
    if not 2 <= len(names) <= IGNORED or len(colours) not in (0, len(found)):
        fault = "one colour twice" if 0 < len(colours) < len(found) else f"{len(names)} classes"
        raise UserError(f"the palette {path} has {fault}: expected 2 to {IGNORED} classes, and each colour once")
    return Palette(tuple(names), tuple(colours.items()), tuple(labels))


def read_mask(path: Path, colours: bool = False) -> Values:
    """Read the values of a mask, (H, W), or with ``colours`` its colours as numbers, 65536 R + 256 G + B.

    Raises:
        UserError: the file is lossy or damaged, partly transparent, or has colours where values are expected.
    """
    with open_image(path) as picture:
        if picture.format not in LOSSLESS or picture.info.get("compression") == "jpeg":
            raise UserError(
                f"the mask {path} is a {picture.format}, whose compression changes labels at every edge: expected a "
                "lossless picture; export the masks as PNG"
            )
        if picture.mode in ("RGBA", "LA", "PA"):
            if picture.getchannel("A").getextrema() != (255, 255):
                raise UserError(f"the mask {path} has transparent pixels: expected an opaque picture")
            picture = picture.convert("L" if picture.mode == "LA" else "RGB")
        if colours and picture.mode in ("1", "L", "P"):
            picture = picture.convert("RGB")
        values = np.asarray(picture)
    if values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8:
        if colours:
            return values.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
        if (values == values[..., :1]).all():
            return values[..., 0]
        raise UserError(
            f"the mask {path} has colours, and nothing says what they mean: give the classes and their colours in a "
            "file by ?palette=FILE, or as palette.json or palette.txt in the folder"
        )
    if values.ndim != 2 or values.dtype.kind not in "bui" or colours:
        raise UserError(f"the mask {path} has mode {picture.mode}: expected a class number per pixel, or RGB colours")
    return values.astype(np.uint8) if values.dtype == bool else values


@dataclass(frozen=True)
class MaskReader:
    """Turns masks into label maps (H, W) of bytes.

    Raises:
        UserError: a value or colour that stands for no class; the message has it, its place and its file.
    """

    known: Values
    """The values or colours that occur, ascending."""
    labels: Values
    """The label of each, uint8."""
    colours: bool = False
    classes: int = 0
    """Number of classes, for messages."""

    @classmethod
    def of(cls, labels: dict[int, int], classes: int, colours: bool = False) -> MaskReader:
        """Return the reader of masks whose values or colours have these labels."""
        known = np.array(sorted(labels))
        return cls(known, np.array([labels[value] for value in known.tolist()], dtype=np.uint8), colours, classes)

    def __call__(self, path: Path) -> Values:
        """Read one mask."""
        values = read_mask(path, self.colours)
        at = np.searchsorted(self.known, values).clip(max=len(self.known) - 1)
        wrong = self.known[at] != values
        if wrong.any():
            row, column = (int(where) for where in np.argwhere(wrong)[0])
            value = int(values[row, column])
            red, green, blue = value >> 16, value >> 8 & 255, value & 255
            what = f"the colour ({red}, {green}, {blue})" if self.colours else f"the value {value}"
            remedy = "add it to the palette" if self.colours else "correct the mask, or name all classes in a palette"
            raise UserError(
                f"the mask {path} has {what} in row {row}, column {column}, which is none of the {self.classes} "
                f"classes and does not mark unlabelled pixels: {remedy}"
            )
        return self.labels[at]


class MaskedFiles:
    """Loads images as uint8 (C, H, W) with their label maps (H, W), of bytes.

    Raises:
        UserError: a file is damaged or does not fit, or a mask is of another size than its image.
    """

    def __init__(self, pairs: Sequence[Pair], decode: Decoder, masks: MaskReader) -> None:
        # One array: reference counting would make every worker copy all Path objects.
        self.paths = np.array([[os.fsencode(path) for path in pair] for pair in pairs])
        self.decode, self.masks = decode, masks

    def __call__(self, number: int) -> Batch:
        """Load one image with its mask."""
        image_path, mask_path = (Path(os.fsdecode(bytes(path))) for path in self.paths[number])
        with open_image(image_path) as picture:
            head = read_header(picture)
            image = self.decode(picture, str(image_path))
        labels = self.masks(mask_path)
        if labels.shape != (head.height, head.width):
            raise UserError(
                f"the mask {mask_path} is {labels.shape[0]}x{labels.shape[1]}, and its image {image_path.name} is "
                f"{head.height}x{head.width} (height x width): expected one size; resize masks by nearest neighbour"
            )
        return image, fit(torch.from_numpy(labels), self.decode.size, nearest=True)


def load_masks(
    name: str,
    parts: dict[str, list[Pair]],
    masks: MaskReader,
    classes: tuple[str, ...],
    options: ImageOptions,
    workers: int | None,
    input_shape: Shape,
    most: int | None = None,
) -> Dataset:
    """Build a data set from pairs of files; missing parts are cut from train, as of class folders."""
    options.decoder()  # refuses options that are for class folders
    decode = decoder_for([image for pairs in parts.values() for image, _ in pairs], options, input_shape, name)
    splits: dict[str, Split] = {}
    for part, pairs in parts.items():
        title = f"{name}/{part}" if part else name
        splits[part] = LazySplit(title, MaskedFiles(pairs, decode, masks), len(pairs), classes, IGNORED, workers)
    data = settled(complete(splits, name, SHARE, most))
    tell_shared(data)
    return data


def paired(images: Path, masks: Path, image_end: str = "", mask_end: str = "") -> list[Pair]:
    """Return the images below a folder with the masks of their names below another.

    Args:
        images: the folder of images.
        masks: that of the masks, with the same sub-folders.
        image_end: what the names of images end in, if known; other files are left out.
        mask_end: likewise of masks.

    Raises:
        UserError: no images, images without a mask, masks without an image, or two files of one name.
    """
    have, drawn = _by_stem(images, image_end), _by_stem(masks, mask_end)
    if not have:
        raise UserError(f"{images} holds no images: expected some, and their masks in {masks}")
    if missing := [have[stem].name for stem in have if stem not in drawn]:
        raise UserError(
            f"{len(missing)} of {len(have)} images of {images} have no mask in {masks}: {some(missing)}; expected a "
            "mask of the same name for every image"
        )
    if extra := [drawn[stem].name for stem in drawn if stem not in have]:
        raise UserError(f"{len(extra)} masks of {masks} have no image in {images}: {some(extra)}; add or remove them")
    return [(path, drawn[stem]) for stem, path in have.items()]


def _by_stem(folder: Path, ending: str) -> dict[str, Path]:
    """Return the pictures below a folder by what an image and its mask share of the name."""
    found: dict[str, Path] = {}
    for path in _below(folder):
        if path.name.endswith(ending):
            inner = path.relative_to(folder)
            stem = inner.name.removesuffix(ending) if ending else SUFFIX.sub("", inner.stem)
            stem = unicodedata.normalize("NFC", str(inner.parent / stem))
            if stem in found:
                raise UserError(f"{folder} holds {found[stem].name} and {path.name}: expected one of them; remove one")
            found[stem] = path
    return found


def _below(folder: Path) -> Iterable[Path]:
    folders, pictures, _ = listing(folder)
    yield from pictures
    for one in folders:
        yield from _below(one)


def load_mask_folder(
    path: Path, options: MaskOptions, workers: int | None = None, input_shape: Shape = (None, None, None)
) -> Dataset:
    """Load a folder with images and masks in two folders, below or above those of the splits, if any.

    Args:
        path: the folder.
        options: how images and masks are read.
        workers: processes that prefetch, see :class:`LazySplit`.
        input_shape: the shape that the model takes, the default for the options' size and mode.

    Raises:
        UserError: no such folders, pairs that are incomplete or do not fit, or masks that no rule covers.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: expected one with the folders images and masks")
    name, path = path.resolve().name, within(path)
    parts = {part: paired(*both) for part, both in _folders(path).items()}
    file = options.palette or next((path / file for file in PALETTES if (path / file).is_file()), None)
    palette = None if file is None else read_palette(file)
    if palette is not None and palette.colours:
        if options.ignore is not None:
            raise UserError("ignore came with a palette of colours: name the colour of unlabelled pixels void in it")
        colours = {(r << 16) + (g << 8) + b: label for (r, g, b), label in palette.colours}
        reader, classes = MaskReader.of(colours, len(palette.names), colours=True), palette.names
    else:
        values = _values([mask for pairs in parts.values() for _, mask in pairs])
        reader, classes = _indexed(values, palette, options.ignore)
        seen = set(reader.labels[np.isin(reader.known, values.numpy())].tolist())
        if missing := [one for label, one in enumerate(classes) if label not in seen and label]:  # 0 is told elsewhere
            tell(f"no mask of {name} has {some(missing)}, of which numbers then say nothing")
    return load_masks(name, parts, reader, classes, options, workers, input_shape)


def _indexed(values: torch.Tensor, palette: Palette | None, ignore: int | None) -> tuple[MaskReader, tuple[str, ...]]:
    """Choose what the distinct values of indexed masks stand for."""
    ignored = find_ignored(values) if ignore is None else ignore
    labels = {} if ignored is None else {ignored: IGNORED}
    if ignored is None and values.tolist() == MASK:
        classes = ("background", "foreground") if palette is None else palette.names
        if len(classes) > 2:
            raise UserError(
                f"the masks hold the values 0 and 255 alone, and the palette names {len(classes)} classes: say by "
                "?ignore=255 that 255 marks unlabelled pixels, or name the two classes of 0 and 255"
            )
        labels |= {0: 0, 255: 1}
    elif palette is not None:
        classes = palette.names
        labels = dict(enumerate(palette.labels)) | labels
    else:
        classes = class_names(values, ignored)
        labels = {value: value for value in values.tolist()} | labels
        if len(classes) > IGNORED:
            raise UserError(
                f"the masks have values up to {len(classes) - 1}: expected at most {IGNORED} classes, from 0"
            )
    return MaskReader.of(labels, len(classes)), classes


def _values(paths: list[Path]) -> torch.Tensor:
    """Return the distinct values of all masks."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = set().union(*pool.map(lambda path: set(np.unique(read_mask(path)).tolist()), paths))
    return torch.tensor(sorted(found))


def _folders(path: Path) -> dict[str, Pair]:
    """Return the folders of images and masks of each split, or of everything under the name ""."""
    both = _both(path)
    if both is not None:
        images, masks = ({part_of(one.name)[0]: one for one in listing(folder)[0]} for folder in both)
        if not images or None in images or listing(both[0])[1]:
            return {"": both}
        if lacking := [images[part].name for part in images if part not in masks]:
            raise UserError(f"{both[0]} has {some(lacking)}, which {both[1]} lacks: expected the same folders in both")
        found = {str(part): (images[part], masks[part]) for part in images}
    else:
        inner = {part_of(one.name)[0]: _both(one) for one in listing(path)[0]}
        found = {part: two for part, two in inner.items() if part is not None and two is not None}
    if not found:
        raise UserError(
            f"{path} has no folders images and masks, nor folders train, val or test with those in them: expected one "
            "of the two layouts"
        )
    if "train" not in found:
        raise UserError(f"{path} has {some(found)} but no train folder: add train, or give one folder, which is cut")
    return {part: found[part] for part in PARTS if part in found}


def _both(path: Path) -> Pair | None:
    """Return the folder of images and that of masks in a folder, if it has one of each."""
    folders = listing(path)[0]
    images, masks = ([one for one in folders if one.name.lower() in names] for names in (IMAGES, MASKS))
    if len(images) > 1 or len(masks) > 1:
        names = some(one.name for one in images + masks)
        raise UserError(f"{path} holds {names}: expected one folder of images and one of masks; rename the others")
    return (images[0], masks[0]) if images and masks else None
