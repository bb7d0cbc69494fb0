"""Readers: round trips of files that the tests write themselves, and every refusal with its words."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gambeson.base.errors import UserError
from gambeson.data import formats


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**32 - 1), st.booleans())
def test_idx_round_trip(shape: list[int], seed: int, packed: bool) -> None:
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    blob = idx_bytes(values)
    read = formats.read_idx(gzip.compress(blob, mtime=0) if packed else blob, "file")
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), values)


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"<!DOCTYPE html><html>", "starts with <!DOCTYPE html>: a web page"),
        (b"\x80\x04", "a pickle, which is never read"),
        (b"", "an empty file"),
        (struct.pack(">BBBBI", 0, 0, 13, 1, 4) + bytes(16), "expected an idx file of unsigned bytes"),
        (idx_bytes(np.zeros((3, 2), np.uint8))[:-1], r"holds 5 bytes, but its header promises \(3, 2\)"),
        (idx_bytes(np.zeros((3, 2), np.uint8))[:8], "ends inside its header after 8 bytes"),
        (gzip.compress(idx_bytes(np.zeros((3, 2), np.uint8)), mtime=0)[:-4], "damaged gzip"),
    ],
)
def test_idx_refusals(blob: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        formats.read_idx(blob, "train-images")


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_cifar_round_trip(label_bytes: int) -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    labels = draw.integers(0, 100, (5, label_bytes), dtype=np.uint8)
    blob = b"".join(label.tobytes() + image.tobytes() for label, image in zip(labels, images, strict=True))
    read, truth = formats.read_cifar(blob, "batch", label_bytes)
    assert np.array_equal(read.numpy(), images)
    assert truth.tolist() == labels[:, -1].tolist()  # fine labels come last
    with pytest.raises(UserError, match=f"{len(blob) - 1} bytes: expected a multiple of {3072 + label_bytes}"):
        formats.read_cifar(blob[:-1], "batch", label_bytes)


def test_sheet_has_one_image_a_row_with_interleaved_channels() -> None:
    images = np.random.default_rng(1).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(images.reshape(6, 16, 3)).save(buffer, "PNG")
    read = formats.read_sheet(buffer.getvalue(), "sheet")
    assert np.array_equal(read.numpy(), images.transpose(0, 3, 1, 2))
    with pytest.raises(UserError, match="expected a whole PNG"):
        formats.read_sheet(buffer.getvalue()[:40], "sheet")
    odd = io.BytesIO()
    Image.fromarray(images.reshape(12, 8, 3)).save(odd, "PNG")
    with pytest.raises(UserError, match="rows of 8 pixels"):
        formats.read_sheet(odd.getvalue(), "sheet")
    grey = io.BytesIO()
    Image.fromarray(images[..., 0].reshape(6, 16)).save(grey, "PNG")
    with pytest.raises(UserError, match="mode L: expected RGB"):
        formats.read_sheet(grey.getvalue(), "sheet")


def test_labels_of_json() -> None:
    assert formats.read_labels(b"[6, 9, 0]", "labels").tolist() == [6, 9, 0]
    for blob, words in (
        (b"[6,", "not valid JSON"),
        (b"[true]", "list of integers"),
        (b"{}", "list of integers"),
    ):
        with pytest.raises(UserError, match=words):
            formats.read_labels(blob, "labels")


def test_tar_members_are_read_where_they_lie() -> None:
    blob = tar_bytes({"a/x.bin": b"123", "../a/x.bin": b"evil", "a/y.bin": b""})
    assert formats.read_members(blob, ["a/x.bin", "a/y.bin"], "tar") == {"a/x.bin": b"123", "a/y.bin": b""}
    with pytest.raises(UserError, match=r"lacks the plain file a/z\.bin"):
        formats.read_members(blob, ["a/x.bin", "a/z.bin"], "tar")
    with pytest.raises(UserError, match="a web page"):
        formats.read_members(b"<html>", ["a"], "tar")
    with pytest.raises(UserError, match="whole tar archive"):
        formats.read_members(blob[: len(blob) // 2], ["a/x.bin", "a/y.bin"], "tar")


def test_tar_links_are_refused() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("a/x.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(UserError, match="lacks the plain file"):
        formats.read_members(buffer.getvalue(), ["a/x.bin"], "tar")


def nifti(volume: np.ndarray[Any, Any], kind: int = 2) -> bytes:
    """A NIfTI-1 file of a volume (X, Y, Z), as its authors define it."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *volume.shape, 1, 1, 1, 1)
    struct.pack_into("<h", header, 70, kind)
    struct.pack_into("<f", header, 108, 352.0)
    header[344:348] = b"n+1\0"
    return gzip.compress(bytes(header) + volume.tobytes("F"))


def test_volumes_have_their_axes_in_order() -> None:
    volume = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    read = formats.read_nifti(nifti(volume), "v")
    assert read.tolist() == volume.transpose(2, 1, 0).tolist()
    short = gzip.compress(gzip.decompress(nifti(volume))[:-1])
    for blob in (b"x", gzip.compress(b"x" * 400), nifti(volume, kind=4), short):
        with pytest.raises(UserError, match="^v "):
            formats.read_nifti(blob, "v")
