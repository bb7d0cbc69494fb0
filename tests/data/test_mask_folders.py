"""Images with masks as people have them: layouts, what values and colours mean, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gambeson.base.errors import DataWarning, UserError
from gambeson.data import Dataset, LazySplit, canonical, get, lazy, load, published

DRAW = np.random.default_rng(0)
IGNORED = 255
Save = Callable[[np.ndarray[Any, Any], Path], None]


def blocks(classes: int, size: tuple[int, int] = (16, 24)) -> np.ndarray[Any, Any]:
    """A random map of 8x8 blocks, with every class in it."""
    rows, columns = size[0] // 8, size[1] // 8
    labels = DRAW.permutation(np.arange(rows * columns) % classes).reshape(rows, columns)
    return labels.repeat(8, 0).repeat(8, 1).astype(np.uint8)


def picture_of(labels: np.ndarray[Any, Any]) -> Image.Image:
    """An image whose red channel tells the class of each pixel."""
    noise = DRAW.integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
    noise[..., 0] = labels * 10
    return Image.fromarray(noise)


def grey(values: np.ndarray[Any, Any], path: Path) -> None:
    Image.fromarray(values).save(path)


def indexed(values: np.ndarray[Any, Any], path: Path) -> None:
    picture = Image.fromarray(values).convert("P")
    picture.putdata(values.flatten().tolist())
    picture.putpalette(DRAW.integers(0, 256, 768).tolist())  # says nothing
    picture.save(path)


def coloured(colours: list[tuple[int, int, int]]) -> Save:
    return lambda values, path: Image.fromarray(np.array(colours, dtype=np.uint8)[values]).save(path)


def fill(images: Path, masks: Path, count: int = 8, *, save: Save = grey, classes: int = 3, end: str = "") -> None:
    """Write images, and masks that fit them."""
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        labels = blocks(classes)
        picture_of(labels).save(images / f"{number}.png")
        save(labels, masks / f"{number}{end}.png")


def quiet(name: str, **options: Any) -> Dataset:
    """Load without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        return load(name, **options)


def check(data: Dataset) -> None:
    """Every mask fits its image, pixel by pixel."""
    for split in (data.train, data.validation, data.test):
        x, y = split.take(slice(0, len(split)))
        assert torch.equal((x[:, 0] * 25.5).round().long().clamp(max=y.max()), y), split.name
        assert (y.dtype, split.task.ignore_index) == (torch.int64, IGNORED)


def test_two_folders_are_cut_in_three(tmp_path: Path) -> None:
    fill(tmp_path / "images", tmp_path / "masks", 20)
    data = quiet(f"mask-folder:{tmp_path}")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [14, 3, 3]
    assert data.classes == ("0", "1", "2")
    assert data.train.shape == (3, 16, 24)
    check(data)
    assert get(f"mask-folder:{tmp_path}") == tmp_path


@pytest.mark.parametrize(
    ("images", "masks"), [("imgs", "labels"), ("Image", "Annotations"), ("img", "SegmentationClass")]
)
@pytest.mark.parametrize("above", [True, False])
def test_folders_of_splits_above_or_below(tmp_path: Path, images: str, masks: str, above: bool) -> None:
    for part, count in (("training", 9), ("val", 4), ("test", 5)):
        inner = [tmp_path / part / one if above else tmp_path / one / part for one in (images, masks)]
        fill(inner[0], inner[1], count, end="_mask")
    data = quiet(f"mask-folder:{tmp_path}")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [9, 4, 5]
    check(data)


def test_sub_folders_and_one_folder_around_everything(tmp_path: Path) -> None:
    for town in ("a", "b"):
        fill(tmp_path / "set/images" / town, tmp_path / "set/masks" / town, 5)
    data = quiet(f"mask-folder:{tmp_path}")
    assert len(data.train) + len(data.validation) + len(data.test) == 10
    check(data)


@pytest.mark.parametrize("save", [grey, indexed])
def test_indexed_masks(tmp_path: Path, save: Save) -> None:
    fill(tmp_path / "images", tmp_path / "masks", save=save, classes=5)
    data = quiet(f"mask-folder:{tmp_path}")
    assert data.num_classes == 5
    check(data)


def test_255_is_unlabelled_and_0_with_255_is_a_mask(tmp_path: Path) -> None:
    def some_unlabelled(values: np.ndarray[Any, Any], path: Path) -> None:
        grey(np.where(np.arange(24) < 8, 255, values).astype(np.uint8), path)

    fill(tmp_path / "void/images", tmp_path / "void/masks", save=some_unlabelled)
    data = quiet(f"mask-folder:{tmp_path / 'void'}")
    assert data.classes == ("0", "1", "2")
    assert bool((data.train.labels[:, :, :8] == IGNORED).all())
    assert int(data.train.labels[:, :, 8:].max()) == 2
    fill(tmp_path / "two/images", tmp_path / "two/masks", save=lambda v, path: grey(v * np.uint8(255), path), classes=2)
    data = quiet(f"mask-folder:{tmp_path / 'two'}")
    assert data.classes == ("background", "foreground")
    check(data)
    bits = tmp_path / "bits"
    fill(bits / "images", bits / "masks", save=lambda v, path: Image.fromarray(v > 0).save(path), classes=2)
    check(quiet(f"mask-folder:{bits}"))


def test_another_value_can_be_unlabelled(tmp_path: Path) -> None:
    fill(tmp_path / "images", tmp_path / "masks")
    data = quiet(f"mask-folder:{tmp_path}?ignore=2")
    assert data.train.labels.unique().tolist() == [0, 1, IGNORED]
    assert data.classes == ("0", "1")


COLOURS = [(0, 0, 0), (255, 0, 0), (0, 0, 255), (9, 9, 9)]
JSON = json.dumps(dict(zip(("ground", "fire", "water", "void"), COLOURS, strict=True)))
TEXT = "# colours\nground 0 0 0\n255, 0, 0, fire\n0 0 255\twater\nvoid: 9 9 9\n"


@pytest.mark.parametrize(("file", "text"), [("palette.json", JSON), ("palette.txt", TEXT), ("my colours", TEXT)])
def test_colours_mean_what_the_palette_says(tmp_path: Path, file: str, text: str) -> None:
    fill(tmp_path / "images", tmp_path / "masks", save=coloured(COLOURS), classes=4)
    (tmp_path / file).write_text(text)
    option = "" if file.startswith("palette") else f"?palette={tmp_path / file}"
    data = quiet(f"mask-folder:{tmp_path}{option}")
    assert data.classes == ("ground", "fire", "water")
    x, y = data.train.take(slice(0, len(data.train)))
    expected = (x[:, 0] * 25.5).round().long()
    assert torch.equal(y, torch.where(expected == 3, IGNORED, expected))
    assert canonical(f"mask-folder:{tmp_path}{option}").startswith("mask-folder:")


def test_colours_of_indexed_masks_count_where_the_palette_has_colours(tmp_path: Path) -> None:
    def shuffled(values: np.ndarray[Any, Any], path: Path) -> None:
        order = DRAW.permutation(3)  # each file has its own numbers for the same colours
        picture = Image.fromarray(np.argsort(order)[values].astype(np.uint8)).convert("P")
        picture.putdata(np.argsort(order)[values].flatten().tolist())
        picture.putpalette(np.array(COLOURS)[order].flatten().tolist())
        picture.save(path)

    fill(tmp_path / "images", tmp_path / "masks", save=shuffled)
    (tmp_path / "palette.txt").write_text(TEXT)
    check(quiet(f"mask-folder:{tmp_path}"))


def test_names_without_colours_name_the_values(tmp_path: Path) -> None:
    fill(tmp_path / "images", tmp_path / "masks", classes=4)
    (tmp_path / "classes.txt").write_text("unlabelled\nsky\nland\nsea\n")
    data = quiet(f"mask-folder:{tmp_path}")
    assert data.classes == ("sky", "land", "sea")
    x, y = data.train.take(slice(0, len(data.train)))
    assert torch.equal(y, (x[:, 0] * 25.5).round().long().sub(1).where(y != IGNORED, IGNORED))
    (tmp_path / "classes.txt").write_text("sky\nland\n")
    with pytest.raises(UserError, match=r"\d.png has the value [23] in row \d+, column \d+, which is none of the 2"):
        load(f"mask-folder:{tmp_path}")


def test_0_with_255_and_a_palette_of_more_than_two_names_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "images", tmp_path / "masks", save=lambda v, path: grey(v * np.uint8(255), path), classes=2)
    names = tmp_path / "classes.txt"
    names.write_text("roof\nlawn\npath\n")
    with pytest.raises(UserError, match=r"0 and 255 alone, and the palette names 3 classes: say by \?ignore=255"):
        load(f"mask-folder:{tmp_path}")
    names.write_text("roof\nlawn\n")
    assert quiet(f"mask-folder:{tmp_path}").classes == ("roof", "lawn")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": [0, 0, 0]}', "1 classes"),
        ('{"a": [0, 0, 0], "b": [0, 0, 0]}', "one colour twice"),
        ('{"a": [0, 0, 0], "b": [0, 0, 256]}', r"'b': \[0, 0, 256\]"),
        ('{"a": [0, 0, 0], "b": "red"}', "'b': 'red'"),
        ('{"a": [0, 0, 0], "b"', "not valid JSON"),
        ('["a", 2]', "entry 2"),
        ('{"a": [0, 0, 0], "b": [1, 1, 1], "a": [1, 1, 1]}', "one colour twice"),
        ("3", "holds 3: expected colours by name"),
        ('"ab"', "holds 'ab': expected colours by name"),
    ],
)
def test_wrong_palettes(tmp_path: Path, text: str, fault: str) -> None:
    fill(tmp_path / "images", tmp_path / "masks")
    (tmp_path / "palette.json").write_text(text)
    with pytest.raises(UserError, match=rf"the palette .*palette.json .*{fault}"):
        load(f"mask-folder:{tmp_path}")


def test_a_colour_that_the_palette_lacks_is_refused_with_its_file(tmp_path: Path) -> None:
    fill(tmp_path / "images", tmp_path / "masks", save=coloured([(1, 2, 3), *COLOURS]))
    (tmp_path / "palette.txt").write_text(TEXT)
    with pytest.raises(UserError, match=r"masks/\d.png has the colour \(1, 2, 3\) in row .*add it to the palette"):
        load(f"mask-folder:{tmp_path}")
    (tmp_path / "palette.txt").unlink()
    with pytest.raises(UserError, match=r"masks/\d.png has colours, and nothing says what they mean"):
        load(f"mask-folder:{tmp_path}")


def test_classes_that_no_mask_shows_are_named(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    fill(tmp_path / "images", tmp_path / "masks", save=lambda values, path: grey(values * 2, path))
    with pytest.warns(DataWarning, match=r"no mask of .* has 1, 3, of which numbers then say nothing"):
        assert load(f"mask-folder:{tmp_path}").classes == ("0", "1", "2", "3", "4")
    (tmp_path / "palette.txt").write_text("a\nb\nc\nd\ne\nunicorn\n")
    with pytest.warns(DataWarning, match=r"has b, d, unicorn, of which"):
        load(f"mask-folder:{tmp_path}")


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "images", tmp_path / "masks", 9)
    name = f"mask-folder:{tmp_path}"
    (tmp_path / "masks/3.png").rename(tmp_path / "masks/x.png")
    with pytest.raises(UserError, match=r"1 of 9 images of .* have no mask in .*: 3.png"):
        load(name)
    (tmp_path / "images/3.png").unlink()
    with pytest.raises(UserError, match=r"1 masks of .* have no image in .*: x.png"):
        load(name)
    (tmp_path / "masks/x.png").unlink()
    grey(blocks(3, (24, 16)), tmp_path / "masks/5.png")
    with pytest.raises(UserError, match=r"masks/5.png is 24x16, and its image 5.png is 16x24"):
        load(name)
    grey(blocks(3), tmp_path / "masks/5.png")
    grey(blocks(3), tmp_path / "masks/5_mask.png")
    with pytest.raises(UserError, match=r"holds 5.png and 5_mask.png"):
        load(name)
    (tmp_path / "masks/5_mask.png").unlink()
    quiet(name)
    Image.fromarray(blocks(3).astype(np.uint16) + 300).save(tmp_path / "masks/5.png")
    with pytest.raises(UserError, match="values up to 302: expected at most 255 classes"):
        load(name)
    (tmp_path / "masks/5.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="masks/5.png cannot be read as an image"):
        load(name)


def test_lossy_and_transparent_masks_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "images", tmp_path / "masks")
    Image.fromarray(blocks(3) * 100).save(tmp_path / "masks/0.jpg")
    (tmp_path / "masks/0.png").unlink()
    with pytest.raises(UserError, match=r"masks/0.jpg is a JPEG, whose compression changes labels"):
        load(f"mask-folder:{tmp_path}")
    (tmp_path / "masks/0.jpg").unlink()
    Image.fromarray(DRAW.integers(0, 3, (16, 24, 4), dtype=np.uint8)).save(tmp_path / "masks/0.png")
    with pytest.raises(UserError, match=r"masks/0.png has transparent pixels"):
        load(f"mask-folder:{tmp_path}")


def test_images_without_a_label_are_told_and_splits_without_one_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        fill(tmp_path / part / "images", tmp_path / part / "masks")
    grey(np.full((16, 24), 255, dtype=np.uint8), tmp_path / "val/masks/0.png")
    with pytest.warns(DataWarning, match=r"1 of the 8 images of .*/validation have no label that counts"):
        load(f"mask-folder:{tmp_path}")
    for file in (tmp_path / "val/masks").iterdir():
        grey(np.full((16, 24), 255, dtype=np.uint8), file)
    with pytest.raises(UserError, match="validation split of .*, has no label that counts: all 8 images"):
        load(f"mask-folder:{tmp_path}")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder: expected one with the folders images and masks"):
        load(f"mask-folder:{tmp_path / 'none'}")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="has no folders images and masks, nor folders train"):
        load(f"mask-folder:{tmp_path}")
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        load(f"mask-folder:{tmp_path}")
    fill(tmp_path / "val/images", tmp_path / "val/masks")
    (tmp_path / "images").rmdir()
    (tmp_path / "masks").rmdir()
    with pytest.raises(UserError, match="has validation but no train folder"):
        load(f"mask-folder:{tmp_path / 'val/..'}")


def test_as_class_folders_they_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "Images", tmp_path / "labels")
    with pytest.raises(UserError, match="Images, labels, which are names of images and their masks.* mask-folder:"):
        load(f"image-folder:{tmp_path}")


def test_masks_follow_the_size_of_the_images(tmp_path: Path) -> None:
    fill(tmp_path / "images", tmp_path / "masks")
    small = load(f"mask-folder:{tmp_path}?size=8")
    assert small.train.shape == (3, 8, 8)
    whole = load(f"mask-folder:{tmp_path}")
    assert torch.equal(small.train.labels, whole.train.labels[:, 1::2, 5:20:2])  # the centre of 12, halved
    assert not set(small.train.labels.unique().tolist()) - {0, 1, 2}  # never a mixture
    with pytest.raises(UserError, match="order is for class folders"):
        load(f"mask-folder:{tmp_path}?order=number")
    with pytest.raises(UserError, match="palette in .* is unknown"):
        load(f"image-folder:{tmp_path}?palette=x")


def test_large_sets_stay_on_disk_with_their_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "images", tmp_path / "masks", 20)
    eager = quiet(f"mask-folder:{tmp_path}")
    assert not isinstance(eager.train, LazySplit)
    assert eager.train._labels.dtype == torch.uint8
    monkeypatch.setattr(lazy, "MEMORY_LIMIT", 20 * 16 * 24 * 4 - 1)  # a byte short of images and masks
    data = quiet(f"mask-folder:{tmp_path}", workers=0)
    assert isinstance(data.train, LazySplit)
    for part in ("train", "validation", "test"):
        assert getattr(data, part).fingerprint == getattr(eager, part).fingerprint
    x, y = next(data.train.batches(5))
    assert torch.equal((x[:, 0] * 25.5).round().long(), y)


def test_cityscapes(tmp_path: Path) -> None:
    ids = np.array([7, 8, 11, 33, 0, 1], dtype=np.uint8)  # road, sidewalk, building, bicycle; unlabelled, ego vehicle
    root = tmp_path / "cityscapes"
    for part, count in (("train", 8), ("val", 3)):
        for town in ("aachen", "bonn"):
            images, masks = root / "leftImg8bit" / part / town, root / "gtFine" / part / town
            fill(images, masks, count, save=lambda values, path: grey(ids[values], path), classes=6)
            for number in range(count):
                (images / f"{number}.png").rename(images / f"{town}_{number}_leftImg8bit.png")
                (masks / f"{number}.png").rename(masks / f"{town}_{number}_gtFine_labelIds.png")
                grey(np.zeros((16, 24), dtype=np.uint8), masks / f"{town}_{number}_gtFine_instanceIds.png")
                (masks / f"{town}_{number}_gtFine_polygons.json").write_text("{}")
    data = quiet(f"cityscapes:{tmp_path}")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [14, 2, 6]
    assert (data.num_classes, data.classes[0], data.classes[18]) == (19, "road", "bicycle")
    x, y = data.test.take(slice(0, 6))
    expected = torch.tensor([0, 1, 2, 18, IGNORED, IGNORED])[(x[:, 0] * 25.5).round().long()]
    assert torch.equal(y, expected)
    grey(np.arange(34, dtype=np.uint8).reshape(2, 17), tmp_path / "all.png")
    read = published.cityscapes(tmp_path)[1](tmp_path / "all.png")
    evaluated = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # ids of train ids 0 to 18
    assert read.flatten().tolist() == [evaluated.index(k) if k in evaluated else IGNORED for k in range(34)]


def test_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit/VOC2012"
    fill(root / "JPEGImages", root / "SegmentationClass", 16, save=indexed, classes=6)
    masks = {}
    for file in (root / "SegmentationClass").iterdir():
        Image.open(root / f"JPEGImages/{file.stem}.png").save(root / f"JPEGImages/{file.stem}.jpg", quality=95)
        (root / f"JPEGImages/{file.stem}.png").unlink()
        values = np.asarray(Image.open(file)).copy()
        values[0] = 255
        indexed(values, file)
        masks[file.stem] = torch.from_numpy(values).long()
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(map(str, range(11))))
    (lists / "val.txt").write_text("15\n12\n13\n14\n")  # 11 is in neither
    data = quiet(f"voc:{tmp_path}")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [9, 2, 4]
    assert (data.num_classes, data.classes[:2], data.classes[20]) == (21, ("background", "aeroplane"), "tvmonitor")
    assert torch.equal(data.test.labels, torch.stack([masks[name] for name in ("15", "12", "13", "14")]))
    (root / "SegmentationClass/12.png").unlink()
    with pytest.raises(UserError, match=r"lacks 12.png, which val.txt lists"):
        load(f"voc:{tmp_path}")
    with pytest.raises(UserError, match="has no folder with leftImg8bit and gtFine in it"):
        load(f"cityscapes:{tmp_path}")


def test_ade20k(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    for part, count in (("training", 10), ("validation", 4)):
        folders = root / "images" / part, root / "annotations" / part
        fill(*folders, count, save=lambda values, path: grey(values * np.uint8(50), path))
    data = quiet(f"ade20k:{tmp_path}")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [8, 2, 4]
    assert (data.num_classes, data.classes[0], data.classes[-1]) == (150, "1", "150")
    x, y = data.test.take(slice(0, 4))
    assert torch.equal(y, torch.tensor([IGNORED, 49, 99])[(x[:, 0] * 25.5).round().long()])
    rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{k}\t0.1\t1\t1\tthing {k}, object {k}" for k in range(1, 151))]
    (root / "objectInfo150.txt").write_text("\n".join(rows))
    assert quiet(f"ade20k:{tmp_path}").classes[1] == "thing 2"
