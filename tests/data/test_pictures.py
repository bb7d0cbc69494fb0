"""Depth, mode, transparency and orientation of picture files: scaled by the stated rule, or refused by name."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gambeson.base
from gambeson.base.errors import DataWarning, UserError
from gambeson.data import load

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
"""Grey levels of a picture, 0 to 1; rows get brighter downwards."""


def deep_png(values: np.ndarray[Any, Any], clear: int | None = None) -> bytes:
    """A PNG of 16 bits per channel, (H, W, C), which PIL cannot write in colour, of which one level may be clear."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    head = chunk(b"IHDR", head) + (b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear) * channels))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def folder(root: Path, write: Any, ending: str) -> Path:
    """Two classes of five files each, written by ``write(path)``; the pictures may be the same."""
    for name in "ab":
        (root / name).mkdir(parents=True)
        for number in range(5):
            write(root / name / f"{number}{ending}")
    return root


def read(root: Path, **options: Any) -> torch.Tensor:
    """Every image of a folder whose pictures are one, as that one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = load(root, **options).train.images
    assert (images == images[:1]).all()
    return images[0]


def saver(values: np.ndarray[Any, Any], **keywords: Any) -> Any:
    return lambda path: Image.fromarray(values).save(path, **keywords)


LEVELS = torch.from_numpy(np.rint(RAMP * 255)).to(torch.uint8)


@pytest.mark.parametrize(
    ("values", "ending", "options"),
    [
        ((RAMP * 65535).astype(np.uint16), ".png", {}),
        ((RAMP * 65535).astype(np.uint16), ".tif", {}),
        ((RAMP * 4095).astype(np.uint16), ".tif", {"white": 4095}),
        ((RAMP * 1023).astype(np.uint16), ".png", {"white": 1023}),
        ((RAMP * 65535).astype(np.int32), ".tif", {"white": 65535}),
        ((RAMP * 2**30).astype(np.int32), ".tiff", {"white": 2**30}),
        (RAMP.astype(np.float32), ".tif", {}),
        ((RAMP * 255).astype(np.float32), ".tif", {"white": 255}),
    ],
)
def test_deep_pictures_are_scaled_to_white(tmp_path: Path, values: Any, ending: str, options: dict[str, Any]) -> None:
    root = folder(tmp_path, saver(values), ending)
    for mode, channels in (("grey", 1), ("rgb", 3)):
        image = read(root, mode=mode, **options)
        assert image.shape == (channels, 8, 8)
        assert (image.int() - LEVELS.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("values", "ending", "told"),
    [
        (
            (RAMP * 4095).astype(np.uint16),
            ".tif",
            r"no value of its folder is above 4095.*\?white=4095, or \?white=65535",
        ),
        ((RAMP * 16383).astype(np.uint16), ".png", r"\?white=16383"),
        ((RAMP * 4095).astype(np.int32), ".tif", "is a 32-bit integer picture: say which value is white"),
        ((RAMP * 255).astype(np.float32), ".tif", "float picture with values from 0 to 255: expected 0 to 1"),
        ((RAMP - 0.5).astype(np.float32), ".tif", "values from -0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), ".tif", "values from nan"),
    ],
)
def test_deep_pictures_whose_white_is_unknown_are_refused(tmp_path: Path, values: Any, ending: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as kept:
        load(folder(tmp_path, saver(values), ending))
    assert f"0{ending}" in str(kept.value)


def test_white_that_a_picture_exceeds(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", saver((RAMP * 5000).astype(np.uint16)), ".png")
    with pytest.raises(UserError, match="values from 0 to 5000: expected 0 to 4095"):
        load(root, white=4095)
    saver(RAMP.astype(np.float32))(root / "a" / "x.tif")
    with pytest.raises(UserError, match="holds 16-bit and float pictures: expected one kind"):
        load(root)


def test_one_picture_with_the_highest_bit_tells_for_dark_ones(tmp_path: Path) -> None:
    root = folder(tmp_path, saver((RAMP * 900).astype(np.uint16)), ".png")
    saver(np.full((8, 8), 40000, np.uint16))(root / "b" / "bright.png")
    for number in range(9):
        for name in "ab":
            saver((RAMP * 900).astype(np.uint16))(root / name / f"more{number}.png")
    assert load(root, mode="grey").image_size == (8, 8)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bits_in_each_channel_of_a_png(tmp_path: Path, channels: int) -> None:
    values = np.stack([RAMP, RAMP.T, 1 - RAMP, np.ones_like(RAMP)], 2)
    values = values[:, :, [0, 3]] if channels == 2 else values[:, :, :channels]
    root = folder(tmp_path / "full", lambda path: path.write_bytes(deep_png(values * 65535)), ".png")
    image = read(root, mode="rgb").permute(1, 2, 0).numpy().astype(int)
    wanted = values[:, :, [0, 0, 0]] if channels == 2 else values[:, :, :3]
    assert np.abs(image - np.rint(wanted * 255)).max() <= 1
    twelve = folder(tmp_path / "twelve", lambda path: path.write_bytes(deep_png(values * 4095)), ".png")
    with pytest.raises(UserError, match=r"\?white=4095"):
        load(twelve)
    assert (read(twelve, mode="rgb", white=4095).int() - read(root, mode="rgb").int()).abs().max() <= 1
    mixed = np.concatenate([values[..., :-1] * 4095, values[..., -1:] * 65535], 2)
    if channels != 3:  # a white alpha says nothing about the colours
        with pytest.raises(UserError, match=r"\?white=4095"):
            load(folder(tmp_path / "mixed", lambda path: path.write_bytes(deep_png(mixed)), ".png"))


def test_grey_levels_that_a_pgm_states(tmp_path: Path) -> None:
    blob = b"P5\n8 8\n4095\n" + (RAMP * 4095).astype(">u2").tobytes()
    image = read(folder(tmp_path, lambda path: path.write_bytes(blob), ".pgm"), mode="grey")
    assert (image.int() - LEVELS.int()).abs().max() <= 1


def test_tiffs_whose_zero_is_white(tmp_path: Path) -> None:
    values = (RAMP * 65535).astype(np.uint16)
    image = read(folder(tmp_path / "full", saver(65535 - values, tiffinfo={262: 0}), ".tif"), mode="grey")
    assert (image.int() - LEVELS.int()).abs().max() <= 1
    dark = folder(tmp_path / "dark", saver(4095 - (RAMP * 4095).astype(np.uint16), tiffinfo={262: 0}), ".tif")
    with pytest.raises(UserError, match=r"\?white=4095"):
        load(dark)
    image = read(dark, mode="grey", white=4095)
    assert (image.int() - LEVELS.int()).abs().max() <= 1


def test_transparent_pixels_need_a_rule(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 4), np.uint8)
    values[:4] = (200, 100, 50, 255)
    values[4:] = (10, 20, 30, 0)
    root = folder(tmp_path / "rgba", saver(values), ".png")
    with pytest.raises(UserError, match=r"0\.png has transparent pixels: choose alpha=drop"):
        load(root)
    for alpha, under in (("drop", [10, 20, 30]), ("white", [255] * 3), ("black", [0] * 3)):
        image = read(root, alpha=alpha)
        assert image[:, 0, 0].tolist() == [200, 100, 50]
        assert image[:, 7, 7].tolist() == under
    values[..., 3] = 255
    assert read(folder(tmp_path / "opaque", saver(values), ".webp"), mode="rgb").shape == (3, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_a_deep_picture_needs_a_rule(tmp_path: Path, channels: int) -> None:
    values = np.rint(RAMP * 65535)[..., None].repeat(channels, 2)
    root = folder(tmp_path, lambda path: path.write_bytes(deep_png(values, clear=int(values[3, 3, 0]))), ".png")
    for options in ({}, {"alpha": "white"}):
        with pytest.raises(UserError, match=r"0\.png is a 16-bit picture in which one colour is transparent"):
            read(root, **options)
    assert (read(root, mode="grey", alpha="drop").int() - LEVELS.int()).abs().max() <= 1


def test_palettes(tmp_path: Path) -> None:
    picture = Image.new("P", (8, 8))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.paste(1, (0, 0, 8, 4))
    root = folder(tmp_path / "a", lambda path: picture.save(path), ".png")
    assert read(root)[:, [0, 7], 0].tolist() == [[200, 10], [100, 20], [50, 30]]
    root = folder(tmp_path / "b", lambda path: picture.save(path, transparency=0), ".png")
    with pytest.raises(UserError, match="transparent pixels"):
        load(root)
    assert read(root, alpha="white")[:, [0, 7], 0].tolist() == [[200, 255], [100, 255], [50, 255]]


def test_cmyk_and_one_bit(tmp_path: Path) -> None:
    colours = (
        np.array([[(250, 250, 250), (240, 10, 10)], [(10, 200, 10), (5, 5, 5)]], np.uint8).repeat(4, 0).repeat(4, 1)
    )
    cmyk = Image.fromarray(colours).convert("CMYK")
    image = read(folder(tmp_path / "cmyk", lambda path: cmyk.save(path), ".tif"))
    assert (image.permute(1, 2, 0).int() - torch.from_numpy(colours).int()).abs().max() <= 2
    bits = Image.fromarray((RAMP > 0.5).astype(np.uint8) * 255).convert("1")
    assert read(folder(tmp_path / "bits", lambda path: bits.save(path), ".png"), mode="grey").unique().tolist() == [
        0,
        255,
    ]


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_are_turned_upright(tmp_path: Path, ending: str, orientation: int) -> None:
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8] = 255
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright, turns)))
    image = read(folder(tmp_path, lambda path: stored.save(path, exif=exif), ending))
    assert image.shape == (3, 16, 8)  # the common size is that of upright pictures
    assert image[:, :6].min() > 200
    assert image[:, 10:].max() < 50


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_grey_tiffs_are_turned_pixel_by_pixel(tmp_path: Path, orientation: int, compression: str) -> None:
    upright = (np.arange(16 * 24) % 241).reshape(16, 24).astype(np.uint8)
    stored = {5: upright.T, 6: np.rot90(upright), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored))
    root = folder(tmp_path, lambda path: picture.save(path, exif=exif, compression=compression), ".tif")
    assert np.array_equal(read(root, mode="grey")[0].numpy(), upright)


def test_pictures_are_opened_in_one_place() -> None:
    files = [file for file in Path(gambeson.base.__path__[0]).parent.rglob("*.py") if "Image.open(" in file.read_text()]
    inner = {"formats.py", "jpeg.py"}  # of bytes in memory
    assert {file.name for file in files} == {"pictures.py", *inner}


@pytest.mark.parametrize("ending", [".gif", ".webp", ".png", ".tif"])
def test_the_first_frame_counts_and_that_is_said(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    root = folder(
        tmp_path, lambda path: frames[0].save(path, save_all=True, append_images=frames[1:], duration=50), ending
    )
    with pytest.warns(
        DataWarning, match="10 of the 10 pictures of .* have several frames or pages: the first one counts"
    ):
        image = load(root).train.images[0, :, 0, 0].tolist()
    assert image[0] > 200 > 50 > image[1]


def test_grey_folders(tmp_path: Path) -> None:
    root = folder(tmp_path, saver(LEVELS.numpy()), ".png")
    with pytest.warns(
        DataWarning, match=r"are grey and get three equal channels, as in torchvision: \?mode=grey gives one"
    ):
        assert load(root).in_channels == 3
    assert torch.equal(read(root, mode="grey")[0], LEVELS)
    assert read(root, input_shape=(1, None, None)).shape == (1, 8, 8)
    assert read(root, input_shape=(3, 8, 8)).shape == (3, 8, 8)
    Image.new("RGB", (8, 8), (9, 0, 0)).save(root / "a" / "colour.png")
    with pytest.warns(DataWarning, match="1 of the 11 pictures of .* have colours and are read as grey"):
        load(root, input_shape=(1, 8, 8))


def test_damaged_and_huge_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path, saver(LEVELS.numpy()), ".png")
    whole = (root / "b" / "3.png").read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"PK\x03\x04" + bytes(60), whole[:40] + bytes(40) + whole[80:]):
        (root / "b" / "3.png").write_bytes(damage)
        with pytest.raises(UserError, match=r"b/3\.png cannot be read as an image"):
            load(root)
    (root / "b" / "3.png").write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match=r"0\.png cannot be read as an image .*decompression bomb"):
        load(root)


@pytest.mark.parametrize("ending", [".avif", ".tif", ".png", ".jpg", ".gif", ".webp", ".jp2", ".tga"])
def test_whatever_pil_raises_names_the_file(tmp_path: Path, ending: str) -> None:
    root = folder(tmp_path, saver(LEVELS.numpy()), ".png")
    for number in range(5, 10):
        saver(LEVELS.numpy())(root / "a" / f"{number}.png")
        saver(LEVELS.numpy())(root / "b" / f"{number}.png")
    saver(LEVELS.numpy())(root / "b" / f"x{ending}")
    whole, draw = (root / "b" / f"x{ending}").read_bytes(), np.random.default_rng(1)
    told = []
    for _ in range(40):
        blob = bytearray(whole)
        for at in draw.integers(0, len(blob), 6):
            blob[at] = draw.integers(256)
        (root / "b" / f"x{ending}").write_bytes(bytes(blob))
        try:
            load(root, size=8, alpha="drop", white=2.0**32)
        except UserError as error:  # any other type fails the test
            told.append(str(error))
    assert told
    assert all(f"x{ending}" in text for text in told)


class Items(torch.utils.data.Dataset[Any]):
    """A torch Dataset of one picture, repeated."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture = picture

    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        if number >= 10:
            raise IndexError
        return self.picture, number % 2


def test_torch_data_sets_follow_the_same_rules() -> None:
    deep = Items(Image.fromarray((RAMP * 4095).astype(np.uint16)))
    with pytest.raises(UserError, match="item 0 is a 16-bit picture: say which value is white"):
        load(deep)
    image = load(deep, white=4095).train.images[0]
    assert (image.int() - LEVELS.int()).abs().max() <= 1
    clear = Items(Image.new("RGBA", (8, 8), (9, 8, 7, 0)))
    with pytest.raises(UserError, match="item 0 has transparent pixels"):
        load(clear)
    assert load(clear, alpha="drop").train.images[0, :, 0, 0].tolist() == [9, 8, 7]
    assert load(Items(Image.new("RGB", (8, 8), (9, 9, 9))), mode="grey", size=4).train.shape == (1, 4, 4)
    assert load(Items(Image.new("L", (8, 8), 9)), mode="rgb").train.shape == (3, 8, 8)
    with pytest.warns(DataWarning, match="the first image is 8x8: enlarged to 9x9"):
        load(Items(Image.new("L", (8, 8), 9)), size=9)
