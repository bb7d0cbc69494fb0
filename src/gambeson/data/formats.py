"""Readers of data set files (idx, CIFAR binary, image sheets, tar); nothing is unpacked to disk, no pickle is read."""

from __future__ import annotations

import gzip
import io
import json
import math
import struct
import tarfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from gambeson.base.errors import UserError
from gambeson.base.files import parse_json

_GZIP = b"\x1f\x8b"
_IDX_UINT8 = 8


def read_idx(blob: bytes, what: str) -> torch.Tensor:
    """Read an idx file of unsigned bytes, gzip-compressed or not, as a uint8 tensor.

    The format: two zero bytes, the type, the number of dimensions, each dimension as a big-endian 32-bit
    integer, the values (LeCun, Cortes and Burges, the MNIST page).

    Args:
        blob: the file's content.
        what: its name, for errors.

    Raises:
        UserError: not an idx file of bytes, or not as long as its header says.
    """
    if blob[:2] == _GZIP:
        try:
            blob = gzip.decompress(blob)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{what} is a damaged gzip file ({error}): fetch it again") from None
    if len(blob) < 4 or blob[:2] != b"\0\0" or blob[2] != _IDX_UINT8 or not 1 <= blob[3] <= 4:
        raise UserError(f"{what} {opening(blob)}: expected an idx file of unsigned bytes")
    start = 4 + 4 * blob[3]
    if len(blob) < start:
        raise UserError(f"{what} ends inside its header after {len(blob)} bytes: fetch it again")
    shape = struct.unpack(f">{blob[3]}I", blob[4:start])
    if len(blob) - start != math.prod(shape):
        raise UserError(f"{what} holds {len(blob) - start} bytes, but its header promises {shape}: fetch it again")
    return _tensor(blob[start:]).reshape(shape)


def read_nifti(blob: bytes, what: str) -> torch.Tensor:
    """Read a gzip-compressed NIfTI-1 volume of unsigned bytes as uint8 (Z, Y, X).

    The format: a header of 348 bytes with the dimensions at byte 40, the type at 70 and the start of the values at 108,
    the first axis being the fastest (Cox et al. 2004; nifti1.h).

    Raises:
        UserError: not such a volume.
    """
    try:
        blob = gzip.decompress(blob)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{what} is a damaged gzip file ({error}): fetch it again") from None
    if len(blob) < 352 or blob[344:348] != b"n+1\0" or struct.unpack("<h", blob[70:72])[0] != 2:
        raise UserError(f"{what} {opening(blob)}: expected a NIfTI-1 file of unsigned bytes")
    axes, width, height, depth = struct.unpack("<4h", blob[40:48])
    values = blob[int(struct.unpack("<f", blob[108:112])[0]) :]
    if axes != 3 or len(values) != width * height * depth:
        raise UserError(f"{what} has {axes} axes and {len(values)} values: expected 3, and one value per voxel")
    return _tensor(values).reshape(depth, height, width)


def read_cifar(blob: bytes, what: str, label_bytes: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a file of CIFAR's binary version: records of the labels and 3 x 32 x 32 values, plane by plane.

    Args:
        blob: the file's content.
        what: its name, for errors.
        label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, coarse before fine.

    Returns:
        Images (N, 3, 32, 32) uint8 and the last label of each record (N,) int64.

    Raises:
        UserError: not a whole number of records.
    """
    record = label_bytes + 3 * 32 * 32
    if not blob or len(blob) % record:
        raise UserError(
            f"{what} has {len(blob)} bytes: expected a multiple of {record}, one record per image; fetch it again"
        )
    rows = _tensor(blob).reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32).contiguous(), rows[:, label_bytes - 1].to(torch.int64)


def read_sheet(blob: bytes, what: str) -> torch.Tensor:
    """Read a picture with one square RGB image per row of pixels, as uint8 (N, 3, S, S).

    Raises:
        UserError: not a lossless RGB picture, or rows whose length is not a square number.
    """
    pixels = read_picture(blob, "PNG", what)
    side = math.isqrt(pixels.shape[1])
    if side * side != pixels.shape[1]:
        raise UserError(f"{what} has rows of {pixels.shape[1]} pixels: expected a square number, one image per row")
    return torch.from_numpy(pixels).reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()


def read_picture(blob: bytes, kind: str, what: str) -> np.ndarray[Any, Any]:
    """Read a lossless RGB picture of one of PIL's formats as uint8 (H, W, 3); anything else is a ``UserError``."""
    try:
        with Image.open(io.BytesIO(blob), formats=(kind,)) as picture:
            mode, pixels = picture.mode, np.array(picture)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{what} {opening(blob)}: expected a whole {kind} picture ({error}); fetch it again") from None
    if mode != "RGB":
        raise UserError(f"{what} has mode {mode}: expected RGB")
    return pixels


def read_labels(blob: bytes, what: str) -> torch.Tensor:
    """Read a JSON list of integers as int64 (N,).

    Raises:
        UserError: not such a list.
    """
    try:
        values = parse_json(blob)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{what} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError(f"{what} is not a JSON list of integers: expected one label per image")
    return torch.tensor(values, dtype=torch.int64)


def read_members(blob: bytes, names: Iterable[str], what: str) -> dict[str, bytes]:
    """Return the named members of a tar archive, compressed or not, without extracting it.

    Nothing is written, so paths of members cannot escape; links are refused.

    Raises:
        UserError: not a tar archive, cut short, or a member is missing or not a plain file.
    """
    wanted = set(names)
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
            for member in archive:
                if member.name in wanted and member.isreg():
                    content = archive.extractfile(member)
                    found[member.name] = content.read() if content else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{what} {opening(blob)}: expected a whole tar archive ({error})") from None
    missing = sorted(wanted - set(found))
    if missing:
        raise UserError(f"{what} lacks the plain file {missing[0]}: expected {len(wanted)} known files in it")
    return found


def opening(blob: bytes) -> str:
    """Describe a file by its size, its first bytes and, if recognised, its type."""
    head = blob[:16]
    looks = blob[:256].lstrip().lower()
    kind = ""
    if looks.startswith((b"<!doctype html", b"<html", b"<?xml")):
        head, kind = blob.lstrip()[:15], ": a web page"
    elif blob[:1] == b"\x80":
        kind = ": a pickle, which is never read"
    elif not blob:
        kind = ": an empty file"
    text = head.decode("ascii", "replace") if head.isascii() and head.decode("ascii").isprintable() else repr(head)
    return f"({len(blob)} bytes) starts with {text}{kind}"


def _tensor(blob: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.empty(0, dtype=torch.uint8)
