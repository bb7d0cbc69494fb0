"""The published layouts of Cityscapes, Pascal VOC and ADE20K in a local folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from gambeson.base.errors import UserError, some
from gambeson.data.dataset import Dataset
from gambeson.data.folder import listing
from gambeson.data.mask_folders import IGNORED, MaskReader, Pair, load_masks, paired
from gambeson.data.pictures import ImageOptions, Shape
from gambeson.data.torchvision_sets import MOST, VOC

Content = tuple[dict[str, list[Pair]], MaskReader, tuple[str, ...]]
"""Pairs of files by part, the reader of the masks, and the class names."""

CITYSCAPES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
"""The label ids that are evaluated, in the order of the train ids 0 to 18 (Cordts et al. 2016; cityscapesScripts)."""
ADE20K_CLASSES = 150


def cityscapes(path: Path) -> Content:
    """Cityscapes: leftImg8bit and gtFine with their folders train and val, and 19 classes from the label ids."""
    root = _root(path, "leftImg8bit", "gtFine")
    ends = ("_leftImg8bit.png", "_gtFine_labelIds.png")
    parts = {
        part: paired(root / "leftImg8bit" / folder, root / "gtFine" / folder, *ends)
        for part, folder in (("train", "train"), ("test", "val"))
    }
    labels = dict.fromkeys([*range(34), 255], IGNORED) | {value: label for label, value in enumerate(CITYSCAPES)}
    return parts, MaskReader.of(labels, len(CITYSCAPES)), tuple(CITYSCAPES.values())


def voc(path: Path) -> Content:
    """Pascal VOC: JPEGImages and SegmentationClass, with the lists in ImageSets/Segmentation."""
    root = _root(path, "JPEGImages", "SegmentationClass")
    parts = {}
    for part, file in (("train", "train.txt"), ("test", "val.txt")):
        chosen = root / "ImageSets/Segmentation" / file
        try:
            names = chosen.read_text(encoding="utf-8").split()
        except OSError as error:
            raise UserError(f"{chosen} cannot be read ({error.strerror}): expected the layout of voc") from None
        parts[part] = [(root / f"JPEGImages/{one}.jpg", root / f"SegmentationClass/{one}.png") for one in names]
        if lacking := [file.name for pair in parts[part] for file in pair if not file.is_file()]:
            raise UserError(f"{root} lacks {some(lacking)}, which {chosen.name} lists: unpack it again")
    return parts, MaskReader.of({k: k for k in (*range(len(VOC)), IGNORED)}, len(VOC)), VOC


def ade20k(path: Path) -> Content:
    """ADE20K of the scene parsing challenge: images and annotations, 150 classes, 0 being unlabelled."""
    root = _root(path, "images", "annotations")
    parts = {
        part: paired(root / "images" / folder, root / "annotations" / folder)
        for part, folder in (("train", "training"), ("test", "validation"))
    }
    classes = tuple(str(number + 1) for number in range(ADE20K_CLASSES))
    if (root / "objectInfo150.txt").is_file():
        rows = (root / "objectInfo150.txt").read_text(encoding="utf-8").splitlines()[1:]
        names = tuple(row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip())
        classes = names if len(names) == len(classes) else classes
    labels = {0: IGNORED} | {number + 1: number for number in range(ADE20K_CLASSES)}
    return parts, MaskReader.of(labels, ADE20K_CLASSES), classes


def _root(path: Path, *needed: str) -> Path:
    """Return the folder that has the needed ones: the given one, or one up to two levels below it."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: unpack the data set and name its folder")
    near = [path, *listing(path)[0]]
    near += [inner for one in near[1:] for inner in listing(one)[0]]
    for one in near:
        if all((one / name).is_dir() for name in needed):
            return one
    raise UserError(f"{path} has no folder with {' and '.join(needed)} in it: expected the published layout")


def _load(
    layout: Callable[[Path], Content],
    path: Path,
    options: ImageOptions,
    workers: int | None = None,
    input_shape: Shape = (None, None, None),
) -> Dataset:
    """Load a published layout. Its validation part, the last with labels, is test; validation is cut from train."""
    return load_masks(layout.__name__, *layout(path), options, workers, input_shape, MOST)


LAYOUTS = {layout.__name__: partial(_load, layout) for layout in (cityscapes, voc, ade20k)}
"""The loader of each published layout, by name."""
