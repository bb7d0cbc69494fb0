"""Image folders as people have them: names of splits and classes, junk, nesting, and pictures that two splits share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gambeson.base.errors import DataWarning, UserError
from gambeson.cli.app import run
from gambeson.data import Dataset, LazySplit, canonical, get, lazy, load

DRAW = np.random.default_rng(0)


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DRAW.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def tree(root: Path, folders: list[str], count: int = 8) -> Path:
    for folder in folders:
        for number in range(count):
            picture(root / folder / f"{number}.png")
    return root


def quiet(name: str | Path, **options: Any) -> Dataset:
    """Load without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        return load(name, **options)


SPLITS = [
    ("Training", "Validation", "Testing"),
    ("TRAIN", "VALID", "TEST"),
    ("seg_train", "seg_val", "seg_test"),
    ("train_set", "dev", "test_set"),
    ("asl-train", "asl-dev", "asl-eval"),
    ("TrainImages", "ValImages", "TestImages"),
    ("train2017", "val2017", "test2017"),
    ("trainval", "validation-data", "evaluation"),
]


@pytest.mark.parametrize("names", SPLITS)
def test_names_of_splits_in_any_case_and_form(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for part, count in zip(names, (9, 5, 7), strict=True):
        tree(tmp_path / part, ["cat", "dog"], count)
    data = quiet(tmp_path)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [18, 10, 14]
    assert data.classes == ("cat", "dog")
    # Each picture is in the split of its folder: that of test is read again by itself.
    alone = quiet(tmp_path / names[2])
    hashes = torch.cat([split.image_hashes for split in (alone.train, alone.validation, alone.test)])
    assert set(hashes.tolist()) == set(data.test.image_hashes.tolist())


def test_classes_whose_names_sound_like_splits_are_classes(tmp_path: Path) -> None:
    data = quiet(tree(tmp_path / "vehicles", ["bus", "car", "train"]))
    assert data.classes == ("bus", "car", "train")
    assert quiet(tree(tmp_path / "places", ["airport", "train_station"])).classes == ("airport", "train_station")
    tree(tmp_path / "nested", ["airport", "train_station/day", "train_station/night"])
    with pytest.raises(UserError, match=r"train_station holds folders of pictures \(day, night\)"):
        load(tmp_path / "nested")


@pytest.mark.parametrize(
    "names", [["train", "test"], ["seg_train", "seg_test"], ["Training", "Valid", "Testing"], ["dev"]]
)
def test_a_folder_of_splits_without_classes_is_not_a_set_of_classes(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UserError, match="names of splits, without class folders"):
        load(tree(tmp_path, names))


def test_splits_that_cannot_be_told_apart(tmp_path: Path) -> None:
    tree(tmp_path / "a", ["Train/x", "Train/y", "training/x", "training/y"])
    with pytest.raises(UserError, match="Train, training, which all mean train"):
        load(tmp_path / "a")
    tree(tmp_path / "b", ["train/x", "train/y", "train_extra/x", "train_extra/y", "docs"], 9)
    with pytest.warns(DataWarning, match="docs, train_extra of .* are left out"):
        data = load(tmp_path / "b")
    assert sum(map(len, (data.train, data.validation, data.test))) == 18
    tree(tmp_path / "c", ["valid/x", "valid/y"], 9)
    with pytest.raises(UserError, match=r"has valid but no train folder: add train, or name .*c/valid to have it cut"):
        load(tmp_path / "c")


def test_junk_is_passed_by_at_every_depth(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", ["train/a", "train/b", "test/a", "test/b"])
    clean = quiet(root)
    for folder in [root, root / "train", root / "train" / "a", root / "test" / "b"]:
        for junk in [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir"]:
            picture(folder / junk / "0.png")
        for junk in ["._0.png", ".DS_Store", "Thumbs.db", "thumbs.DB", "desktop.ini", "Thumbs.db:encryptable"]:
            (folder / junk).write_bytes(bytes(64))
    again = quiet(root)
    for part in ("train", "validation", "test"):
        assert getattr(again, part).fingerprint == getattr(clean, part).fingerprint
        assert getattr(again, part).name == getattr(clean, part).name


def test_folders_that_archives_wrap_are_stepped_into(tmp_path: Path) -> None:
    root = tree(tmp_path / "intel", ["archive/seg_train/seg_train/a", "archive/seg_train/seg_train/b"])
    tree(root, ["archive/seg_test/seg_test/a", "archive/seg_test/seg_test/b"], 5)
    (root / "__MACOSX" / "archive").mkdir(parents=True)
    data = quiet(root)
    assert (data.classes, len(data.test)) == (("a", "b"), 10)
    tiny = tree(tmp_path / "tiny", ["n01/images", "n02/images"])
    assert quiet(tiny).classes == ("n01", "n02")


def test_folders_inside_class_folders_are_refused_or_flattened_on_request(tmp_path: Path) -> None:
    root = tree(tmp_path, ["healthy/patient1", "healthy/patient2", "ill/patient3", "ill"], 6)
    with pytest.raises(UserError, match=r"healthy holds folders of pictures \(patient1, patient2\).*\?nested=flat"):
        load(root)
    data = load(f"image-folder:{root}?nested=flat")
    labels = torch.cat([split.labels for split in (data.train, data.validation, data.test)])
    assert data.classes == ("healthy", "ill")
    assert labels.bincount().tolist() == [12, 12]


def test_a_picture_in_two_splits_is_counted_by_its_pixels(tmp_path: Path) -> None:
    root = tree(tmp_path, ["train/a", "train/b", "val/a", "val/b", "test/a", "test/b"], 10)
    for number in range(3):
        with Image.open(root / "train" / "a" / f"{number}.png") as same:  # other bytes, another name, the same pixels
            same.save(root / "test" / "b" / f"copy{number}.bmp")
    with pytest.warns(DataWarning, match=r"3 of the 23 images of .*/test are in .*/train too"):
        load(root)


def test_a_picture_that_a_folder_holds_twice_is_told_when_it_is_cut(tmp_path: Path) -> None:
    root = tree(tmp_path, ["a", "b"], 20)
    for number in range(20):
        (root / "a" / f"copy{number}.png").write_bytes((root / "a" / f"{number}.png").read_bytes())
    with pytest.warns(DataWarning, match=r"images of .*/test are in .*/train too"):
        load(root)


ORDERS = [
    ([str(k) for k in range(11)], "0 is folder 0, 1 is folder 1, 2 is folder 10"),
    (["1", "2", "3"], "0 is folder 1, 1 is folder 2"),  # one order, but class k is not folder k
    (["class9", "class10", "class11"], "0 is folder class10"),
    (["-1", "0", "1"], "0 is folder -1"),
]


@pytest.mark.parametrize(("names", "told"), ORDERS)
def test_orders_that_surprise_are_said(tmp_path: Path, names: list[str], told: str) -> None:
    root = tree(tmp_path, names)
    with pytest.warns(DataWarning, match=f"in the order of text, as in torchvision: {told}"):
        data = load(root)
    assert data.classes == tuple(sorted(names))


def test_the_order_is_chosen(tmp_path: Path) -> None:
    numbers = [str(k) for k in range(12)]
    for number in numbers:
        for at in range(8):
            path = tmp_path / number / f"{at}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (int(number) * 20, at, 0)).save(path)
    data = quiet(f"image-folder:{tmp_path}?order=number")
    assert data.classes == tuple(numbers)
    assert torch.equal(data.test.images[:, 0, 0, 0].long(), data.test.labels * 20)
    text = quiet(f"image-folder:{tmp_path}?order=text")
    folders = torch.tensor([int(name) for name in text.classes])
    assert torch.equal(text.test.images[:, 0, 0, 0].long(), folders[text.test.labels] * 20)
    assert quiet(tree(tmp_path / "padded", ["000", "001", "010"][:2])).classes == ("000", "001")
    assert quiet(tree(tmp_path / "mixed", ["7up", "cola"])).classes == ("7up", "cola")


def test_names_that_differ_in_case_or_in_accents(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cat and cat, which differ in case only"):
        load(tree(tmp_path / "twins", ["Cat", "cat", "dog"]))
    root = tree(tmp_path / "parts", ["train/Cat", "train/dog", "test/cat", "test/dog"])
    with pytest.raises(UserError, match=r"classes that train lacks: cat; train has Cat; expected the same"):
        load(root)
    accents = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    assert accents[0] != accents[1]
    tree(tmp_path / "mac", [f"train/{accents[0]}", "train/日本", f"test/{accents[1]}", "test/日本"])
    data = quiet(tmp_path / "mac")
    assert data.classes == ("café", "日本")
    assert data.test.labels.bincount().tolist() == [8, 8]


def test_files_that_are_left_out_are_said(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", ["a", "b"])
    (root / "a" / "more.zip").write_bytes(b"PK")
    (root / "b" / "scan.dcm").write_bytes(b"DICM")
    picture(root / "cover.png")
    with pytest.warns(DataWarning, match=r"left out of .*/set: 1 .png, 1 .zip, 1 .dcm"):
        load(root)
    (root / "b" / "phone.heic").write_bytes(b"ftypheic")
    with pytest.raises(UserError, match=r"phone\.heic cannot be read as an image"):
        load(root)
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"set\.zip is not a folder: unpack it"):
        load(tmp_path / "set.zip")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "all.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"packed has no sub-folders and holds all\.zip"):
        load(tmp_path / "packed")


def test_a_class_that_a_split_lacks(tmp_path: Path) -> None:
    root = tree(tmp_path, ["train/a", "train/b", "train/c", "test/a", "test/c"])
    with pytest.warns(DataWarning, match="/test has no images of b: its rates are over the other classes"):
        data = load(root)
    assert data.test.labels.bincount().tolist() == [8, 0, 8]


def test_links(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", ["a"])
    elsewhere = tree(tmp_path / "elsewhere", ["b"])
    (root / "b").symlink_to(elsewhere / "b")
    picture(tmp_path / "one.png")
    (root / "a" / "linked.png").symlink_to(tmp_path / "one.png")
    data = quiet(root)
    assert sum(map(len, (data.train, data.validation, data.test))) == 17
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png cannot be read as an image"):
        load(root)
    (root / "a" / "gone.png").unlink()
    (root / "a" / "up").symlink_to(root)
    with pytest.raises(UserError, match="up is a link to a folder that it is in"):
        load(f"image-folder:{root}?nested=flat")


def test_folders_and_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, real, opened = tree(tmp_path, ["a", "b"]), os.scandir, Image.open

    def scan(folder: Any) -> Any:
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    def image(path: Any, *rest: Any) -> Any:
        if Path(path.name).name == "3.png":
            raise PermissionError(13, "Permission denied", path.name)
        return opened(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scan)
        with pytest.raises(UserError, match=r"/b cannot be read \(Permission denied\)"):
            load(root)
    monkeypatch.setattr(Image, "open", image)
    with pytest.raises(UserError, match=r"3\.png cannot be read as an image .*Permission denied"):
        load(root)


def test_one_image_or_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 images, too few"):
        load(tree(tmp_path, ["a", "b"], 1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no sub-folders and is empty"):
        load(tmp_path / "empty")


def test_options_in_a_name(tmp_path: Path) -> None:
    root = tree(tmp_path / "what?", ["a", "b"])
    assert load(f"image-folder:{root}?size=6,mode=grey").train.shape == (1, 6, 6)
    assert load(f"image-folder:{root}?mode=grey&size=6").train.shape == (1, 6, 6)
    assert load(root, size=6, mode="grey").train.shape == (1, 6, 6)
    assert load(f"image-folder:{root}").train.shape == (3, 8, 8)
    assert canonical(f"image-folder:{root}?mode=grey&size=6") == f"image-folder:{root}?size=6,mode=grey"
    for wrong, told in [
        ("siz=6", "siz in .* is unknown: the options are size, mode, order, nested, white, alpha"),
        ("size=6,size=7", "size in .* is given twice"),
        ("size=6,grey", "grey in .* has no value"),
        ("size=6?mode=grey", "expected a valid integer"),
        ("mode=gray", "mode = 'gray': expected 'rgb' or 'grey'"),
        ("white=0", "white = '0'"),
    ]:
        for call in (load, canonical):
            with pytest.raises(UserError, match=told):
                call(f"image-folder:{root}?{wrong}")
    with pytest.raises(
        UserError, match=f"is a folder, not the name of a data set: write image-folder:{re.escape(str(root))}"
    ):
        load(str(root))
    assert get(f"image-folder:{root}?size=6") == root
    assert canonical(f"image-folder:{root}?white=4095") == f"image-folder:{root}?white=4095"
    with pytest.raises(UserError, match="mode came with digits, whose images are 8x8 in grey"):
        load("digits?mode=rgb")
    with pytest.raises(UserError, match="order is for class folders"):
        load("torchvision:KMNIST?order=number", tmp_path)


@pytest.mark.parametrize(("shapes", "size"), [([(10, 7)], (10, 7)), ([(9, 9)], (9, 9)), ([(9, 9), (8, 9)], (224, 224))])
def test_images_of_one_size_keep_it(tmp_path: Path, shapes: list[tuple[int, int]], size: tuple[int, int]) -> None:
    for name in "ab":
        for number in range(8):
            picture(tmp_path / name / f"{number}.png", shapes[number % len(shapes)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = load(tmp_path)
    assert data.image_size == size
    assert bool(told) == (size == (224, 224))
    if told:
        assert "16 of the 16 pictures" in str(told[0].message)
        assert "smaller than 224x224 and are enlarged" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load(tmp_path, input_shape=(3, 12, 16)).image_size == (12, 16)
        assert load(tmp_path, input_shape=(1, None, None)).train.shape == (1, *size)
        assert load(f"image-folder:{tmp_path}?size=5,mode=rgb", input_shape=(1, 12, 16)).train.shape == (3, 5, 5)


def test_on_disk_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, ["train/a", "train/b", "test/a", "test/b"], 9)
    one = load(root)
    monkeypatch.setattr(lazy, "MEMORY_LIMIT", 0)
    other = load(root)
    assert isinstance(other.train, LazySplit)
    assert other.train.fingerprint == one.train.fingerprint


def test_the_command_line_shows_splits_classes_and_warnings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "set", ["2", "10"], 10)
    command = [sys.executable, "-m", "gambeson", "data", "show", f"image-folder:{root}?size=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # pytest would keep the warnings
    assert done.stdout.splitlines() == [
        "set: train 14, validation 3, test 3 images",
        "shape 3x4x4 (channels, height, width)",
        "class 0: 10",
        "class 1: 2",
    ]
    assert done.stderr.startswith("warning: the classes of set are in the order of text")
    assert done.stderr.count("\n") == 1
    assert run(["data", "show", f"image-folder:{root}?sizes=4"]) == 2
    assert "the options are size, mode, order" in capfd.readouterr().err
    assert run(["data", "list"]) == 0
    assert "gambeson[digits]" in "".join(capfd.readouterr().out.split())
