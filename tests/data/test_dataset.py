"""Pairs, torch Datasets and image folders: partitions, laziness, and refusals."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gambeson.base.errors import UserError
from gambeson.base.seeds import generator
from gambeson.data import Dataset, LazySplit, Split, as_dataset, as_split, lazy, load
from gambeson.data.partition import partition, pick


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=3, max_size=120), st.floats(0, 1))
def test_pick_gives_every_class_its_share(labels: list[int], share: float) -> None:
    truth = torch.tensor(labels)
    count = int(share * len(labels))
    mask = pick(truth, count, generator(0, "test"))
    assert int(mask.sum()) == count
    for label in range(5):
        members = truth == label
        assert abs(int(mask[members].sum()) - count * int(members.sum()) / len(labels)) < 1


def test_partition_is_disjoint_complete_and_named() -> None:
    labels = torch.arange(200) % 7
    parts = partition(labels, [30, 50], "a")
    assert [len(part) for part in parts] == [120, 30, 50]
    assert torch.cat(parts).sort().values.tolist() == list(range(200))
    assert all(torch.equal(a, b) for a, b in zip(parts, partition(labels, [30, 50], "a"), strict=True))
    assert not torch.equal(parts[0], partition(labels, [30, 50], "b")[0])
    assert (parts[1].diff() > 0).all()
    assert (parts[1].diff() > 1).any()


def numbered(count: int = 100, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 3, 4), torch.arange(
        count
    ) % classes


@pytest.mark.parametrize("kind", ["tensors", "arrays", "split", "torch"])
def test_anything_becomes_a_data_set(kind: str) -> None:
    images, labels = numbered()
    data = {
        "tensors": (images, labels),
        "arrays": [images.numpy(), labels.numpy().astype(np.int32)],
        "split": Split("data", images, labels),
        "torch": torch.utils.data.TensorDataset(images, labels),
    }[kind]
    result = as_dataset(data)
    assert (len(result.train), len(result.validation), len(result.test)) == (70, 15, 15)
    assert result.test.labels.bincount().tolist() == [3] * 5
    ids = torch.cat([s.images[:, 0, 0, 0] for s in (result.train, result.validation, result.test)])
    assert ids.sort().values.tolist() == list(range(100))
    assert (result.in_channels, result.image_size, result.num_classes) == (1, (3, 4), 5)
    assert result.train.fingerprint == as_dataset((images, labels)).train.fingerprint
    assert load(data).test.fingerprint == result.test.fingerprint
    whole = as_split(data)
    assert torch.equal(whole.images, images)
    assert torch.equal(whole.labels, labels)


def test_as_split_and_as_dataset_hand_back_what_they_get() -> None:
    data = as_dataset(numbered())
    assert as_dataset(data) is data
    assert as_split(data) is data.test
    assert as_split(data, "train") is data.train
    assert as_split(data.validation) is data.validation
    with pytest.raises(UserError, match="unknown part 'validaton': did you mean validation"):
        as_split(data, "validaton")  # type: ignore[arg-type]


@pytest.mark.parametrize("ignored", [255, -1, -100])
def test_pairs_of_label_maps(ignored: int) -> None:
    maps = torch.arange(3).repeat(20 * 4).reshape(20, 3, 4)
    maps[:, 0, 0] = ignored
    data = as_dataset((torch.zeros(20, 3, 3, 4, dtype=torch.uint8), maps))
    assert data.num_classes == 3
    assert data.train.ignore_index == ignored
    assert data.test.take([0])[1].shape == (1, 3, 4)


def test_data_set_refusals() -> None:
    images, labels = numbered()
    good, one = Split("good", images, labels), Split("one", images, torch.zeros(100).long(), tuple("01234"))
    assert Dataset("ok", good, good, good, good.classes).num_classes == 5
    with pytest.raises(UserError, match="the test split of x, is empty"):
        Dataset("x", good, good, good.subset([]), good.classes)
    with pytest.raises(UserError, match="the validation split of x, has 100 images of one class only"):
        Dataset("x", good, one, good, good.classes)
    with pytest.raises(UserError, match="has 5 classes, but x has 2"):
        Dataset("x", good, good, good, ("a", "b"))
    with pytest.raises(UserError, match=r"images of \(1, 4, 3\), but train of \(1, 3, 4\)"):
        Dataset("x", good, Split("v", images.transpose(2, 3), labels), good, good.classes)
    with pytest.raises(UserError, match="of one class only"):
        as_dataset((images, torch.zeros(100, dtype=torch.int64)))
    with pytest.raises(UserError, match="has 4 images, too few"):
        as_dataset((images[:4], labels[:4]))
    with pytest.raises(UserError, match="is empty: expected one image"):
        as_split((images[:0], labels[:0]))
    with pytest.raises(UserError, match="100 images came with 99 labels"):
        load((images, labels[:99]))
    with pytest.raises(UserError, match="data is a dict: expected"):
        as_dataset({})
    with pytest.raises(UserError, match="size and mode are for image folders and torch Datasets"):
        load((images, labels), size=8)


class Pictures(torch.utils.data.Dataset):
    """PIL pictures of differing sizes, with labels or maps."""

    classes = ("cat", "dog", "bird")

    def __init__(self, maps: bool, targets: bool = False) -> None:
        self.maps = maps
        if targets:
            self.targets = [number % 3 for number in range(20)]

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> tuple[Image.Image, object]:
        if number >= 20:
            raise IndexError
        draw = np.random.default_rng(number)
        height, width = 8 + number % 3, 10
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        mask = draw.choice(np.array([0, 1, 2, 255], np.uint8), (height, width))
        return image, Image.fromarray(mask) if self.maps else number % 3


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("targets", [False, True])
def test_lazy_equals_eager(maps: bool, targets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = load(Pictures(maps, targets and not maps), size=6)
    assert type(eager.train) is Split
    monkeypatch.setattr(lazy, "MEMORY_LIMIT", 100)
    loaded = load(Pictures(maps, targets and not maps), size=6)
    assert eager.classes == loaded.classes == Pictures.classes
    before = threading.active_count()
    for part in ("train", "validation", "test"):
        a, b = as_split(eager, part), as_split(loaded, part)
        assert isinstance(b, LazySplit)
        assert (a.name, a.shape, len(a), a.ignore_index) == (b.name, b.shape, len(b), b.ignore_index)
        assert a.ignore_index == (255 if maps else None)
        assert a.fingerprint == b.fingerprint
        assert a.mean_std() == b.mean_std()
        draws = [torch.Generator().manual_seed(1) for _ in range(2)]
        for one, two in zip(a.batches(2, generator=draws[0]), b.batches(2, generator=draws[1]), strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])
        assert torch.equal(a.subset([1, 0]).take(slice(None))[0], b.subset([1, 0]).take(slice(None))[0])
        assert b.subset([]).take([])[0].shape == (0, 3, 6, 6)
        with pytest.raises(UserError, match="use take"):
            b.images.sum()
        if not maps:
            assert torch.equal(a.labels, b.labels)
    next(iter(loaded.train.batches(2)))  # left after one batch
    assert threading.active_count() == before


def test_torch_data_set_refusals() -> None:
    with pytest.raises(UserError, match=r"images differ in shape, \(3, 10, 10\) and \(3, 9, 10\)|pass size=224"):
        load(Pictures(False))
    with pytest.raises(UserError, match="item 0 of the data set is a tuple: expected a pair"):
        load(torch.utils.data.TensorDataset(torch.zeros(9, 1, 2, 2)))
    with pytest.raises(UserError, match="torch Dataset is empty"):
        load(torch.utils.data.Subset(Pictures(False), []))
    with pytest.raises(UserError, match=r"labels are torch\.float32, and not all are whole"):
        load(torch.utils.data.TensorDataset(torch.zeros(9, 1, 2, 2), torch.full((9,), 0.5)))
    with pytest.raises(UserError, match="divide by 255"):
        load(torch.utils.data.TensorDataset(torch.full((9, 1, 2, 2), 255.0), torch.arange(9)))


def test_targets_that_a_transform_changes_are_not_believed() -> None:
    class Shifted(Pictures):
        def __getitem__(self, number: int) -> tuple[Image.Image, object]:
            image, label = super().__getitem__(number)
            return image, (int(str(label)) + 1) % 3

    def counts(source: Pictures) -> list[int]:
        data = load(source, size=6)
        return torch.cat([data.train.labels, data.validation.labels, data.test.labels]).bincount().tolist()

    assert counts(Pictures(False, True)) == [7, 7, 6]
    assert counts(Shifted(False, True)) == [6, 7, 7]


def picture(path: Path, mode: str, size: tuple[int, int], level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level if mode == "L" else (level, 0, 255)).save(path)


def folder(root: Path, parts: tuple[str, ...], count: int = 12) -> Path:
    for part in parts:
        for number in range(count):
            picture(root / part / "cat" / f"{number:02}.png", "L", (9 + number, 7), 10 + number)
            picture(root / part / "dog" / f"{number:02}.jpg", "RGB", (6, 11), 200)
        (root / part / "cat" / "notes.txt").write_text("not an image")
    return root


def test_image_folder_without_parts(tmp_path: Path) -> None:
    data = load(f"image-folder:{folder(tmp_path / 'pets', ('',))}", size=5)
    assert data.name == "pets"
    assert data.classes == ("cat", "dog")
    assert data.train.shape == (3, 5, 5)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [16, 4, 4]
    assert data.test.labels.bincount().tolist() == [2, 2]
    levels = []
    for split in (data.train, data.validation, data.test):
        cats = split.images[split.labels == 0]
        assert (cats == cats[:, :1, :1, :1]).all()  # grey became three equal channels, and stayed flat
        levels += cats[:, 0, 0, 0].tolist()
    assert sorted(levels) == list(range(10, 22))
    assert load(tmp_path / "pets").image_size == (224, 224)


def test_image_folder_with_parts(tmp_path: Path) -> None:
    folder(tmp_path, ("train", "val", "test"), 4)
    picture(tmp_path / "test" / "dog" / "more.png", "RGB", (30, 30), 7)
    data = load(f"image-folder:{tmp_path}", size=4)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [8, 8, 9]
    assert data.test.images[-1, :, 0, 0].tolist() == [7, 0, 255]


def test_image_folder_cuts_missing_parts_from_train(tmp_path: Path) -> None:
    data = load(f"image-folder:{folder(tmp_path, ('train', 'test'), 20)}", size=4)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [34, 6, 40]
    assert data.validation.labels.bincount().tolist() == [3, 3]


def test_image_is_centre_cropped_and_scaled(tmp_path: Path) -> None:
    stripes = np.zeros((8, 16, 3), np.uint8)
    stripes[:, 4:12] = 255  # the middle square is white
    for part in ("train", "val", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(stripes).save(tmp_path / part / name / "x.png")
    assert (load(tmp_path, size=8).train.images == 255).all()
    assert (load(tmp_path, size=4).train.images > 200).all()


def test_large_image_folder_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, ("train", "val", "test"), 3)
    eager = load(tmp_path, size=4)
    monkeypatch.setattr(lazy, "MEMORY_LIMIT", 100)
    data = load(tmp_path, size=4)
    assert isinstance(data.train, LazySplit)
    assert data.train.fingerprint == eager.train.fingerprint
    assert torch.equal(data.train.eager().images, eager.train.images)


def test_folder_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load(f"image-folder:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="has no sub-folders"):
        load(tmp_path)
    folder(tmp_path, ("train", "test"), 4)
    picture(tmp_path / "test" / "emu" / "x.png", "L", (4, 4), 9)
    with pytest.raises(UserError, match="classes that train lacks: emu"):
        load(tmp_path)
    shutil.rmtree(tmp_path / "test" / "emu")
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(UserError, match="emu holds no images"):
        load(tmp_path)
    (tmp_path / "train" / "emu" / "x.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image"):
        load(tmp_path)
    (tmp_path / "train" / "emu" / "x.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"x\.png is a pointer of Git LFS"):
        load(tmp_path)
    with pytest.raises(UserError, match="ImageOptions.size = 0: expected greater"):
        load(tmp_path, size=0)
    only = folder(tmp_path / "only", ("test",), 3)
    with pytest.raises(UserError, match="no train folder"):
        load(only)


def test_a_split_without_a_label_that_counts_is_not_called_one_of_one_class() -> None:
    images, maps = torch.rand(9, 3, 4, 4), torch.arange(9 * 16).view(9, 4, 4) % 3
    first, second, third = (Split(f"x/{k}", images, maps, tuple("abc"), ignore_index=7) for k in range(3))
    Dataset("x", first, second, third, tuple("abc"))
    nothing = Split("x/test", images, torch.full_like(maps, 7), tuple("abc"), ignore_index=7)
    with pytest.raises(UserError, match="the test split of x, has no label that counts: all 9 images have the ignore"):
        Dataset("x", first, second, nothing, tuple("abc"))


def test_a_split_on_disk_is_known_again_by_its_labels_and_a_few_images() -> None:
    images, labels = numbered(1000)
    read: list[int] = []

    def split(pixels: torch.Tensor, truth: torch.Tensor) -> LazySplit:
        def fetch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            read.append(number)
            return pixels[number], truth[number]

        return LazySplit("it", fetch, truth, tuple("abcde"))

    made = split(images, labels)
    read.clear()
    sign = made.sign
    assert len(read) == lazy.SIGNED
    assert split(images, labels).sign == sign
    other = labels.clone()
    other[3] = (other[3] + 1) % 5  # of an image that is not read
    assert 3 not in read
    assert len({sign, split(images, other).sign, split(255 - images, labels).sign, made.subset(range(999)).sign}) == 4
