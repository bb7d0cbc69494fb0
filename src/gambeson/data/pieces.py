"""Prepared data sets cut into small lossless pieces, for machines without a network."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gambeson.base.errors import UserError
from gambeson.base.files import load_tensors, save_tensors, write_bytes
from gambeson.data.dataset import Dataset
from gambeson.data.formats import read_members, read_picture
from gambeson.data.load import check_content, data_root, load, prepare, stored_file
from gambeson.data.partition import partition
from gambeson.data.registry import DATASETS, DatasetSpec
from gambeson.data.split import Split

IMAGES_A_PICTURE = 2500
"""Images per lossless WebP picture: CIFAR-10 takes 1.7 kB per image, against 2.3 as PNG."""
FOLDER = "pieces"
_ABOUT = "about.json"
_PARTS = ("train", "test")


def write_pieces(
    name: str, cuts: Sequence[tuple[tuple[int, int], tuple[int, int]]], out: Path, root: str | Path | None = None
) -> list[Path]:
    """Write pieces of a named data set, verified by reading them back.

    Args:
        name: a data set of the registry with a train and a test part, such as ``cifar10``.
        cuts: for each piece the range of its training images and that of its test images, each (first, stop).
        out: folder for ``NAME-1.tar``, ``NAME-2.tar`` and so on.
        root: the data folder, see :func:`gambeson.data.load`.

    Returns:
        The files.

    Raises:
        UserError: the data is unavailable, or a picture is not bit-identical after reading.
    """
    spec = _spec(name)
    tensors, known = prepare(spec, data_root(root))
    files = []
    for number, ranges in enumerate(cuts, 1):
        members: dict[str, bytes] = {}
        about: dict[str, Any] = {"name": name, "source": known.get("source"), "classes": known.get("classes")}
        for part, (first, stop) in zip(_PARTS, ranges, strict=True):
            images, labels = tensors[f"{part}_images"][first:stop], tensors[f"{part}_labels"][first:stop]
            pictures = [_picture(block) for block in images.split(IMAGES_A_PICTURE)] if len(images) else []
            members |= {f"{part}-{k:03}.webp": picture for k, picture in enumerate(pictures)}
            about[part] = {
                "first": first,
                "count": len(images),
                "pictures": len(pictures),
                "labels": labels.tolist(),
                "sha256": _digest(images),
            }
        file = out / f"{name}-{number}.tar"
        write_bytes(file, _tar({_ABOUT: json.dumps(about).encode(), **members}))
        read_piece(file)
        files.append(file)
    return files


def read_piece(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read one piece: ``train_images``, ``train_labels``, ``test_images``, ``test_labels``, and its metadata.

    Raises:
        UserError: the file is missing, not a piece, or damaged.
    """
    try:
        blob = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name a piece that `make bundle` wrote") from None
    about = json.loads(read_members(blob, [_ABOUT], str(file))[_ABOUT])
    names = [f"{part}-{k:03}.webp" for part in _PARTS for k in range(about[part]["pictures"])]
    pictures = read_members(blob, names, str(file)) if names else {}
    shape, tensors = _spec(about["name"]).shape, {}
    for part in _PARTS:
        count, blocks = about[part]["count"], []
        for k in range(about[part]["pictures"]):
            here = min(IMAGES_A_PICTURE, count - k * IMAGES_A_PICTURE)
            blocks.append(_images(pictures[f"{part}-{k:03}.webp"], here, shape, str(file)))
        images = torch.cat(blocks) if blocks else torch.empty((0, *shape), dtype=torch.uint8)
        if _digest(images) != about[part]["sha256"]:
            raise UserError(f"{file} does not hold the {part} images that it was made of: make it again and copy it")
        tensors[f"{part}_images"] = images
        tensors[f"{part}_labels"] = torch.tensor(about[part]["labels"], dtype=torch.int64)
    return tensors, about


def unpack(files: Sequence[Path], root: str | Path | None = None) -> dict[str, str]:
    """Unpack pieces into the data folder; once all pieces of a data set are there, it can be loaded.

    Args:
        files: pieces of one or more data sets, all at once or in several calls.
        root: the data folder, see :func:`gambeson.data.load`.

    Returns:
        By data set, its state: ``complete``, or the number of images out of the total.

    Raises:
        UserError: a file is not a piece, or is damaged.
    """
    folder, found = data_root(root), {}
    for file in files:
        tensors, about = read_piece(file)
        key = "_".join(f"{part}{about[part]['first']}+{about[part]['count']}" for part in _PARTS)
        save_tensors(folder / FOLDER / f"{about['name']}-{key}.safetensors", tensors, about)
        found[about["name"]] = ""
    for name in found:
        spec = _spec(name)
        tensors, about = _joined(spec, folder)
        have = [len(tensors[f"{part}_labels"]) for part in _PARTS]
        found[name] = f"{have[0]} of {spec.source[0]} training and {have[1]} of {spec.source[1]} test images"
        if tuple(have) == spec.source:
            check_content(spec, tensors)
            kept = {"name": name, "source": about["source"], "licence": spec.licence, "classes": about["classes"]}
            save_tensors(stored_file(name, folder), tensors, kept)
            found[name] = "complete"
    return found


def load_available(name: str, root: str | Path | None = None) -> Dataset:
    """Load a named data set, or the part of it in unpacked pieces, under a name that says so.

    A tenth of the available training images is used for validation.

    Raises:
        UserError: neither the data set nor a piece with training and test images is available.
    """
    spec, folder = _spec(name), data_root(root)
    if stored_file(name, folder).is_file() or not list((folder / FOLDER).glob(f"{name}-*.safetensors")):
        return load(name, root)
    tensors, about = _joined(spec, folder)
    classes = tuple(spec.classes or about["classes"])
    title = f"{name}[{len(tensors['train_labels'])}]"
    whole = Split(title, tensors["train_images"], tensors["train_labels"], classes)
    train, validation = partition(whole.labels, [max(2, len(whole) // 10)], name)
    return Dataset(
        title,
        whole.subset(train, f"{title}/train"),
        whole.subset(validation, f"{title}/validation"),
        Split(f"{name}/test", tensors["test_images"], tensors["test_labels"], classes),
        classes,
    )


def _joined(spec: DatasetSpec, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Join the unpacked pieces, ordered by their first images; overlapping ones are skipped."""
    stored = [load_tensors(file, "a piece of data") for file in (folder / FOLDER).glob(f"{spec.name}-*.safetensors")]
    joined: dict[str, torch.Tensor] = {}
    for part in _PARTS:
        blocks, reached = [], -1
        for tensors, about in sorted(stored, key=lambda piece: (piece[1][part]["first"], -piece[1][part]["count"])):
            if about[part]["count"] and about[part]["first"] >= reached:
                blocks.append((tensors[f"{part}_images"], tensors[f"{part}_labels"]))
                reached = about[part]["first"] + about[part]["count"]
        none = torch.empty((0, *spec.shape), dtype=torch.uint8)
        joined[f"{part}_images"] = torch.cat([none, *(b[0] for b in blocks)])
        joined[f"{part}_labels"] = torch.cat([torch.empty(0, dtype=torch.int64), *(b[1] for b in blocks)])
    return joined, stored[0][1]


def _spec(name: str) -> DatasetSpec:
    if name not in DATASETS or not DATASETS[name].source[1]:
        known = sorted(key for key, spec in DATASETS.items() if spec.source[1])
        raise UserError(f"{name} is not cut into pieces: choose one of {', '.join(known)}")
    return DATASETS[name]


def _picture(images: torch.Tensor) -> bytes:
    """Lay images out on a square grid, row by row, as one lossless picture, padded with black."""
    count, channels, height, width = images.shape
    side = math.isqrt(count - 1) + 1
    grid = images.new_zeros((side * side, channels, height, width))
    grid[:count] = images
    tiles = grid.view(side, side, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = tiles.reshape(side * height, side * width, channels).expand(-1, -1, 3).numpy()
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "webp", lossless=True, exact=True, quality=75, method=3)
    return out.getvalue()


def _images(blob: bytes, count: int, shape: tuple[int, int, int], what: str) -> torch.Tensor:
    channels, height, width = shape
    side = math.isqrt(count - 1) + 1
    pixels = read_picture(blob, "WEBP", f"a picture in {what}")
    if pixels.shape != (side * height, side * width, 3):
        raise UserError(f"{what} holds a picture of {pixels.shape}: expected {(side * height, side * width, 3)}")
    tiles = torch.from_numpy(pixels).view(side, height, side, width, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(side * side, 3, height, width)[:count, :channels].contiguous()


def _digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def _tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()
