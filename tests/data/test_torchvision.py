"""torchvision's data sets by name, from tiny files in the sets' real formats."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from gambeson.base.errors import UserError
from gambeson.data import LazySplit, Split, get, lazy, load
from gambeson.data.torchvision_sets import OTHERWISE, SETS


def picture(file: Path, level: int, size: tuple[int, int] = (12, 9)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 255 - level)).save(file)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def gtsrb(root: Path) -> None:
    """Class folders of .ppm for training; a flat folder and a CSV for testing."""
    base = root / "gtsrb"
    for label in range(3):
        for number in range(20):
            picture(base / "GTSRB" / "Training" / f"{label:05}" / f"{number:05}.ppm", 80 * label, (15 + number, 20))
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number in range(9):
        picture(base / "GTSRB" / "Final_Test" / "Images" / f"{number:05}.ppm", 80 * (number % 3))
        lines.append(f"{number:05}.ppm;12;9;0;0;12;9;{number % 3}")
    (base / "GT-final_test.csv").write_text("\n".join(lines))


def check_levels(data: Split, step: int = 80) -> None:
    x, y = data.take(slice(None))
    assert torch.allclose(x[:, 0, 0, 0] * 255, y.float() * step, atol=3)


def test_train_and_test_with_a_validation_cut_from_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gtsrb(tmp_path)
    data = load("torchvision:GTSRB", tmp_path)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [51, 9, 9]
    assert data.validation.labels.bincount().tolist() == [3, 3, 3]
    assert data.name == "GTSRB"
    assert data.test.name == "GTSRB/test"
    assert data.classes == ("0", "1", "2")
    assert data.train.shape == (3, 32, 32)
    for split in (data.train, data.validation, data.test):
        assert type(split) is Split
        check_levels(split)
    monkeypatch.setattr(lazy, "MEMORY_LIMIT", 0)
    on_disk = load("torchvision:gtsrb?size=32", tmp_path, workers=2)
    assert isinstance(on_disk.train, LazySplit)
    assert on_disk.train.fingerprint == data.train.fingerprint
    assert load("torchvision:GTSRB", tmp_path, size=8).test.shape == (3, 8, 8)
    assert load("torchvision:GTSRB?size=8", tmp_path).test.shape == (3, 8, 8)


def test_food_keeps_its_class_names(tmp_path: Path) -> None:
    base = tmp_path / "food-101"
    meta: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, name in enumerate(("apple_pie", "ramen")):
        for number in range(20):
            picture(base / "images" / name / f"{number}.jpg", 100 * label)
            meta["train" if number < 14 else "test"].setdefault(name, []).append(f"{name}/{number}")
    (base / "meta").mkdir()
    for part, files in meta.items():
        (base / "meta" / f"{part}.json").write_text(json.dumps(files))
    data = load("torchvision:Food101", tmp_path, size=6)
    assert data.classes == ("apple_pie", "ramen")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [24, 4, 12]
    check_levels(data.test, 100)


def test_pets(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    for part in ("trainval", "test"):
        lines = []
        for number in range(16):
            name = ("Abyssinian", "great_pyrenees")[number % 2] + f"_{part}{number}"
            picture(base / "images" / f"{name}.jpg", 100 * (number % 2))
            lines.append(f"{name} {number % 2 + 1} {number % 2 + 1} 1")
        (base / "annotations").mkdir(exist_ok=True)
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines))
    data = load("torchvision:oxfordiiitpet", tmp_path, size=6)
    assert data.classes == ("Abyssinian", "Great Pyrenees")
    check_levels(data.test, 100)
    check_levels(data.train, 100)


def test_textures_bring_all_three_parts(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    counts = {"train": 6, "val": 4, "test": 2}
    (base / "labels").mkdir(parents=True)
    for part, count in counts.items():
        files = []
        for label, name in enumerate(("banded", "woven")):
            for number in range(count):
                files.append(f"{name}/{part}{number}.jpg")
                picture(base / "images" / files[-1], 100 * label)
        (base / "labels" / f"{part}1.txt").write_text("\n".join(files))
    data = load("torchvision:DTD", tmp_path, size=6)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [12, 8, 4]
    assert data.classes == ("banded", "woven")
    check_levels(data.validation, 100)


def test_imagenet_is_reported_on_its_validation_part(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    names = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",)}
    for part, count in (("train", 20), ("val", 5)):
        for label, folder in enumerate(names):
            for number in range(count):
                picture(root / part / folder / f"{number}.JPEG", 100 * label)
    torch.save((names, ["n01440764"] * 5), root / "meta.bin")
    for where in (tmp_path, root):
        data = load("torchvision:ImageNet", where, size=8)
        assert data.classes == ("tench, Tinca tinca", "goldfish")
        assert [len(s) for s in (data.train, data.validation, data.test)] == [34, 6, 10]
        check_levels(data.test, 100)


def test_svhn_and_stl10_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = pytest.importorskip("scipy.io")
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        labels = np.arange(1, 41) % 10
        labels[labels == 0] = 10  # as the files have it
        pixels = draw.integers(0, 256, (32, 32, 3, 40), dtype=np.uint8)
        pixels[0, 0, 0] = labels % 10
        io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": labels[:, None].astype(np.uint8)})
    sums = {part: ["", f"{part}_32x32.mat", md5(tmp_path / f"{part}_32x32.mat")] for part in ("train", "test")}
    monkeypatch.setattr(datasets.SVHN, "split_list", sums)
    data = load("torchvision:SVHN", tmp_path)
    assert data.test.shape == (3, 32, 32)
    assert data.num_classes == 10
    assert torch.equal(data.test.images[:, 0, 0, 0].long(), data.test.labels)
    assert torch.equal(data.train.images[:, 0, 0, 0].long(), data.train.labels)

    base = tmp_path / "stl10_binary"
    base.mkdir()
    lists = {}
    for part in ("train", "test"):
        labels = (np.arange(40) % 10 + 1).astype(np.uint8)
        stripes = np.repeat(labels, 3 * 96 * 96).reshape(40, 3, 96, 96)
        for kind, content in (("X", stripes), ("y", labels)):
            (base / f"{part}_{kind}.bin").write_bytes(content.tobytes())
        lists[part] = [[f"{part}_{kind}.bin", md5(base / f"{part}_{kind}.bin")] for kind in "Xy"]
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    (base / "class_names.txt").write_text("\n".join(names))
    for part in ("train", "test"):
        monkeypatch.setattr(datasets.STL10, f"{part}_list", lists[part])
    monkeypatch.setattr(datasets.STL10, "train_list", [*lists["train"], ["class_names.txt", None]])
    monkeypatch.setattr(datasets.STL10, "folds_list_file", "class_names.txt")
    data = load("torchvision:STL10", tmp_path)
    assert data.classes == names
    assert data.train.shape == (3, 96, 96)
    assert torch.equal(data.test.images[:, 0, 0, 0].long(), data.test.labels + 1)


def test_a_set_without_parts_is_cut(tmp_path: Path) -> None:
    for label, name in enumerate(("AnnualCrop", "Forest")):
        for number in range(20):
            picture(tmp_path / "eurosat" / "2750" / name / f"{number}.jpg", 100 * label, (64, 64))
    data = load("torchvision:EuroSAT", tmp_path)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [28, 6, 6]
    assert data.test.shape == (3, 64, 64)
    check_levels(data.test, 100)


def test_voc_has_maps(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for part, count in (("train", 12), ("val", 4)):
        names = [f"{part}{number}" for number in range(count)]
        for number, name in enumerate(names):
            picture(base / "JPEGImages" / f"{name}.jpg", 90, (20 + number, 16))
            mask = np.full((16, 20 + number), number % 21, np.uint8)
            mask[:, 10] = 255
            (base / "SegmentationClass").mkdir(exist_ok=True)
            Image.fromarray(mask, "L").save(base / "SegmentationClass" / f"{name}.png")
        (base / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (base / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names))
    data = load("torchvision:VOCSegmentation", tmp_path, size=16)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [10, 2, 4]
    assert (data.num_classes, data.classes[15], data.test.ignore_index) == (21, "person", 255)
    assert data.test.labels[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert (data.test.labels == 255).any()


def test_missing_files_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"GTSRB is not available in .* \(Dataset not found\): fetch it by `gambeson data"
    ):
        load("torchvision:GTSRB", tmp_path)
    for name in ("ImageNet", "StanfordCars"):
        for call in (load, get):
            with pytest.raises(UserError, match=f"torchvision:{name} is not available in .*: put its files there"):
                call(f"torchvision:{name}", tmp_path)
    asked = []

    def download(self: object) -> None:
        asked.append(self)
        raise OSError("no route")

    monkeypatch.setattr(datasets.GTSRB, "download", download)
    with pytest.raises(UserError, match=r"is not available in .* \(no route\): put its files there"):
        get("torchvision:GTSRB", tmp_path)
    assert len(asked) == 1
    monkeypatch.setattr(datasets.GTSRB, "download", lambda self: gtsrb(tmp_path))
    assert get("torchvision:GTSRB", tmp_path) == tmp_path
    assert len(load("torchvision:GTSRB", tmp_path).test) == 9


def test_a_damaged_file_of_a_set(tmp_path: Path) -> None:
    gtsrb(tmp_path)
    (tmp_path / "gtsrb" / "GTSRB" / "Training" / "00001" / "00003.ppm").write_bytes(b"P6 9 9 255 short")
    with pytest.raises(UserError, match="item 23 of the data set cannot be read"):
        load("torchvision:GTSRB", tmp_path)


def test_other_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchvision:CIFAR10 is called cifar10 here"):
        load("torchvision:CIFAR10", tmp_path)
    with pytest.raises(UserError, match=r"Kinetics is not among the sets that load by name .*datasets\.Kinetics"):
        load("torchvision:Kinetics", tmp_path)
    with pytest.raises(UserError, match="unknown torchvision data set 'Food10': did you mean Food101"):
        load("torchvision:Food10", tmp_path)
    with pytest.raises(UserError, match=r"size = 'big': expected a valid integer"):
        load("torchvision:GTSRB?size=big", tmp_path)
    with pytest.raises(UserError, match="size = '0': expected greater than"):
        load("torchvision:GTSRB?size=0", tmp_path)
    assert all(hasattr(datasets, name) for name in [*SETS, *OTHERWISE])
