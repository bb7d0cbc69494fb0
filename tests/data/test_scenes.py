"""Scenes: their splits share no item, masks fit the images, and the same seed gives the same bytes everywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gambeson.base.errors import UserError
from gambeson.base.seeds import generator
from gambeson.cli.app import run
from gambeson.data import Dataset, canonical, catalog, get, load, scenes
from gambeson.data.registry import DATASETS, DatasetSpec
from gambeson.data.scenes import IGNORED, SceneOptions, compose, outline
from gambeson.data.sources import Content, Way
from gambeson.data.split import Split

SMALL = {"train": 60, "validation": 30, "test": 40}


def discs(count: int, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """White discs, all with the same outline; the last pixel, which is no part of them, makes every item another."""
    rows, columns = torch.meshgrid(*[torch.arange(28) - 13.5] * 2, indexing="ij")
    images = ((rows**2 + columns**2) < 144).to(torch.uint8).mul(255).expand(count, 1, 28, 28).clone()
    images[:, 0, -1, -1] = torch.arange(count) % 20  # below the ink
    images[:, 0, -1, -2] = torch.arange(count) // 20
    return images, torch.arange(count) % classes


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a small source: 300 discs, of which 60 are for validation and 80 for test."""
    images, labels = discs(300)
    way = Way("here", lambda _: Content({"images": images, "labels": labels}))
    spec = DatasetSpec(
        name="discs", description="", shape=(1, 28, 28), source=(300, 0), validation=60, test=80, how="", ways=(way,)
    )
    monkeypatch.setitem(DATASETS, "discs", spec)
    return "discs"


def build(root: Path, **options: int) -> Dataset:
    return scenes.scenes("disc-scenes", "discs", root, SceneOptions(**{**SMALL, **options}), clothes=True)


def test_the_same_seed_gives_the_same_scenes_and_fewer_are_the_first_of_more(source: str, tmp_path: Path) -> None:
    data, again, other = build(tmp_path), build(tmp_path), build(tmp_path, seed=1)
    for part in ("train", "validation", "test"):
        split: Split = getattr(data, part)
        assert split.fingerprint == getattr(again, part).fingerprint != getattr(other, part).fingerprint
        assert len(split.image_hashes.unique()) == len(split) == SMALL[part]
    assert not torch.equal(data.train.labels > 0, other.train.labels > 0)  # all items have one outline
    fewer = build(tmp_path, train=10)
    assert torch.equal(fewer.train.images, data.train.images[:10])
    assert torch.equal(fewer.train.labels, data.train.labels[:10])
    assert not torch.isin(data.train.image_hashes, data.test.image_hashes).any()
    assert data.test.fingerprint == "e0493435c6c9ead1"  # the same bytes on every machine


def test_no_item_is_in_two_splits_or_comes_twice_before_all_have_come(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, list[torch.Tensor]] = {}

    def spy(items: Split, numbers: torch.Tensor, *rest: Any) -> Any:
        used.setdefault(items.name, []).append(items.image_hashes[numbers[: scenes.BLOCK * scenes.ITEMS[1]]])
        return compose(items, numbers, *rest)

    monkeypatch.setattr(scenes, "compose", spy)
    build(tmp_path)
    assert list(used) == ["discs/train", "discs/validation", "discs/test"]
    sets = [set(torch.cat(found).tolist()) for found in used.values()]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]  # noqa: PT018
    counts = torch.cat(used["discs/train"])[: 4 * 40].unique(return_counts=True)[1]
    assert len(counts) == 160 and bool((counts == 1).all())  # noqa: PT018


def test_masks_fit_the_images(source: str, tmp_path: Path) -> None:
    """Discs of one value have one colour per item: two to four in a scene, where the ground has hundreds."""
    train = build(tmp_path).train
    seen = []
    for image, labels in zip(train.images, train.labels, strict=True):
        inside = (labels > 0) & (labels != IGNORED)
        assert 0.05 < float(inside.float().mean()) < 0.75
        core = inside & ~outline(labels[None].to(torch.uint8), 4)[0]  # edges are blurred
        core[:3], core[-3:], core[:, :3], core[:, -3:] = False, False, False, False  # also those of the frame
        colours = image[:, core].unique(dim=1)
        painted = (image[:, None] == colours[:, :, None, None]).all(0).any(0)
        assert int((painted & (labels == 0)).sum()) < 3
        assert int((inside & ~painted).sum()) < 0.35 * int(inside.sum())
        assert len(image[:, labels == 0].unique(dim=1).T) > 200
        seen.append(len(colours.T))
    shares = torch.bincount(torch.tensor(seen), minlength=5) / len(seen)
    assert bool((shares[2:5] > 0.15).all()), shares  # one alone where the others are hidden or small


def test_classes_are_balanced_and_named(source: str, tmp_path: Path) -> None:
    data = build(tmp_path, train=300)
    assert data.classes == ("ground", *"0123456789")
    share = torch.bincount(data.train.labels.flatten(), minlength=256)
    items = share[1:11].double() / share[1:11].sum()
    assert bool((items > 0.06).all()) and bool((items < 0.15).all())  # noqa: PT018
    assert int(share[11:255].sum()) == 0
    assert 0.02 < int(share[IGNORED]) / int(share.sum()) < 0.2


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_border_is_every_pixel_near_another_owner(width: int) -> None:
    draw = torch.Generator().manual_seed(width)
    owner = torch.nn.functional.interpolate(torch.randint(0, 4, (3, 1, 4, 5), generator=draw).float(), (17, 19))
    owner = owner[:, 0].to(torch.uint8)
    expected = torch.zeros_like(owner, dtype=torch.bool)
    for n, r, c in torch.ones_like(owner).nonzero().tolist():
        near = owner[n, max(0, r - width) : r + width + 1, max(0, c - width) : c + width + 1]
        expected[n, r, c] = bool((near != owner[n, r, c]).any())
    assert torch.equal(outline(owner, width), expected)


@pytest.mark.parametrize(("size", "width"), [(64, 1), (128, 2)])
def test_no_two_labels_meet_without_a_border_between_them(source: str, tmp_path: Path, size: int, width: int) -> None:
    labels = build(tmp_path, size=size, train=20).train.labels.float()[:, None]
    counts = labels != IGNORED
    most = torch.nn.functional.max_pool2d(labels.where(counts, -1), 2 * width + 1, stride=1)
    least = -torch.nn.functional.max_pool2d(-labels.where(counts, 999), 2 * width + 1, stride=1)
    assert bool(((most == least) | (most < 0)).all())
    more = torch.nn.functional.max_pool2d(labels.where(counts, -1), 2 * width + 2, stride=1)
    less = -torch.nn.functional.max_pool2d(-labels.where(counts, 999), 2 * width + 2, stride=1)
    assert not bool(((more == less) | (more < 0)).all())  # the border is no wider than that


def test_the_size_changes_the_pixels_and_not_the_scenes(source: str, tmp_path: Path) -> None:
    small, large = (build(tmp_path, size=size, train=20).train for size in (64, 128))
    assert large.shape == (3, 128, 128)
    theirs = large.labels[:, ::2, ::2]
    both = (small.labels != IGNORED) & (theirs != IGNORED)
    assert float(both.float().mean()) > 0.7
    assert float((small.labels == theirs)[both].float().mean()) > 0.995


def test_later_items_hide_earlier_ones() -> None:
    images, labels = discs(100, classes=2)
    maps = compose(Split("x", images, labels), torch.arange(100), 64, generator(0, "x"), True)[1]
    covered = (maps > 0).flatten(1).sum(1)
    most = 4 * 3.1416 * (12 / 28 * 0.7 * 64) ** 2
    assert bool((covered < most).all())
    assert len(maps.unique()) == 4  # the ground, two classes, the border


def test_clothes_are_solid_and_mirrored_and_digits_neither() -> None:
    """Frames in the left half of their picture."""
    images = torch.zeros(100, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 2:26, :14] = 255
    images[:, :, 5:23, 3:11] = 0
    given = Split("x", images, torch.arange(100) % 2)
    where = []
    for clothes in (True, False):
        maps = compose(given, torch.arange(100), 64, generator(0, "x"), clothes)[1]
        rows = ((maps > 0) & (maps != IGNORED)).nonzero()
        where.append((len(rows), float(rows[:, 2].double().mean())))
    (solid, centre), (hollow, left) = where
    assert solid > 1.5 * hollow
    assert abs(centre - 31.5) < 2.5
    assert left < 27


def test_maps_are_stored_as_bytes_and_delivered_as_class_indices(source: str, tmp_path: Path) -> None:
    train = build(tmp_path, train=20).train
    assert train._labels.dtype == torch.uint8
    x, y = train.take(slice(0, 3))
    assert (x.dtype, y.dtype, train.labels.dtype) == (torch.float32, torch.int64, torch.int64)
    y.zero_()
    assert train.labels[:3].any()
    plain = Split(train.name, train.images, train.labels, train.classes, ignore_index=IGNORED)
    assert plain.fingerprint == train.fingerprint  # whatever the labels are stored as
    assert train.subset([1, 2]).labels.dtype == torch.int64


def test_names_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path]] = []
    assert canonical("fashion-scenes?seed=1,size=128") == "fashion-scenes?size=128,seed=1"
    with pytest.raises(UserError, match="mode in fashion-scenes.* is unknown: the options are size, seed, train"):
        load("fashion-scenes?mode=grey")
    with pytest.raises(UserError, match="size = '16': expected"):
        load("digit-scenes?size=16")
    monkeypatch.setattr(
        sys.modules["gambeson.data.load"], "prepare", lambda recipe, root: asked.append((recipe.name, root))
    )
    assert get("digit-scenes?seed=3", tmp_path) == tmp_path
    assert asked == [("mnist5k", tmp_path)]  # nothing is composed
    with pytest.raises(UserError, match="train"):
        load("digit-scenes", tmp_path, train=1)
    lines = {entry.name: entry for entry in catalog(tmp_path)}
    for name, source in (("fashion-scenes", "fashion-mnist"), ("digit-scenes", "mnist5k")):
        line = lines[name]
        assert (line.train, line.validation, line.test, line.shape, line.classes) == (4000, 500, 1000, (3, 64, 64), 11)
        assert source in line.how
        assert line.licence == lines[source].licence
        assert not line.ready


def test_fashion_scenes_for_real() -> None:
    if not {entry.name: entry for entry in catalog()}["fashion-mnist"].ready:
        pytest.skip("fashion-mnist is not on disk")
    data = load("fashion-scenes?train=50,validation=25,test=25")
    assert data.classes[:2] == ("ground", "T-shirt/top")
    assert data.train.labels.unique().tolist() == [*range(11), IGNORED]


def test_show_says_what_labels_are(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gambeson.data.load", lambda *_: build(tmp_path, train=4, validation=4, test=4))
    assert run(["data", "show", "fashion-scenes"]) == 0
    assert "label maps (N, H, W), where 255 is ignored\nclass 0: ground\n" in capsys.readouterr().out
    assert run(["data", "show", "fashion-scenes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ignored"] == IGNORED
