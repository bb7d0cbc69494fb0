"""Subsets: every class keeps its share, the seed decides, and no path takes the first images of a sorted split."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import gambeson as gb
from gambeson.base import UserError
from gambeson.data import Dataset, LazySplit, Split
from gambeson.defenses import SharedAdversarial
from gambeson.evaluation.attack_run import AttackRun, run_attack
from gambeson.evaluation.export_check import run_export
from gambeson.evaluation.transfer import TransferRun, run_transfer
from gambeson.training.validation import validate_robustly
from gambeson.victim import Victim, temperature
from tests.auditing.evidence import held

UNEVEN = (31, 2, 17, 5, 50, 11, 8)
"""Images of each of seven classes, which come one after another as in a folder."""


def pixels(count: int, shape: tuple[int, int, int] = (1, 4, 4)) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *shape), generator=draw, dtype=torch.uint8)


def by_class(sizes: tuple[int, ...], shape: tuple[int, int, int] = (1, 4, 4), name: str = "sorted") -> Split:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return Split(name, pixels(len(labels), shape), labels, tuple(map(str, range(len(sizes)))))


def counts(split: Split) -> list[int]:
    return split.labels.bincount(minlength=len(split.classes)).tolist()


def allowed(sizes: list[int], count: int) -> tuple[list[int], list[int]]:
    """By exact fractions: how many each class gets at least, and whether its remainder is (above, at) the cut."""
    quotas = [Fraction(size * count, sum(sizes)) for size in sizes]
    floors = [int(quota) for quota in quotas]
    seats = count - sum(floors)
    rest = sorted((quota - floor for quota, floor in zip(quotas, floors, strict=True)), reverse=True)
    if not seats:
        return floors, floors
    cut = rest[seats - 1]
    least = [floor + (quota - floor > cut) for quota, floor in zip(quotas, floors, strict=True)]
    most = [floor + (quota - floor >= cut) for quota, floor in zip(quotas, floors, strict=True)]
    return least, most


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 200), st.integers(0, 5))
def test_each_class_gets_its_share_by_largest_remainders(sizes: list[int], count: int, seed: int) -> None:
    total = sum(sizes)
    if not total:
        return
    split = by_class(tuple(sizes))
    rows = split.sample_indices(count, seed=seed)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == min(count, total)
    found = counts(split.sample(count, seed=seed))
    least, most = allowed(sizes, min(count, total))
    assert all(low <= got <= high for low, got, high in zip(least, found, most, strict=True))


@pytest.mark.parametrize("count", [1, 3, 6, 7, 40, 123, 124])
def test_uneven_classes_in_order(count: int) -> None:
    split = by_class(UNEVEN)
    some = split.sample(count, seed=4)
    assert torch.equal(some.images, split.images[split.sample_indices(count, seed=4)])
    if count == 40:
        assert counts(some) == [10, 1, 5, 2, 16, 3, 3]  # of 10, 0.65, 5.48, 1.61, 16.13, 3.55, 2.58
    assert (some is split) == (count == 124)


def test_the_seed_decides_and_every_image_can_be_drawn() -> None:
    split = by_class((10,) * 7)
    assert torch.equal(split.sample_indices(21, seed=1), split.sample_indices(21, seed=1))
    assert not torch.equal(split.sample_indices(21, seed=1), split.sample_indices(21, seed=2))
    drawn = Counter(int(row) for seed in range(300) for row in split.sample_indices(7, seed=seed))
    assert len(drawn) == 70
    assert max(drawn.values()) < 60  # 30 expected, 5.2 its deviation
    assert all(counts(split.sample(7, seed=seed)) == [1] * 7 for seed in range(20))


def test_fewer_images_than_classes_are_of_different_classes_which_the_seed_chooses() -> None:
    split = by_class((10,) * 7)
    found = [counts(split.sample(3, seed=seed)) for seed in range(60)]
    assert all(sorted(one) == [0, 0, 0, 0, 1, 1, 1] for one in found)
    assert min(torch.tensor(found).sum(0).tolist()) > 10  # 25.7 expected


@pytest.mark.parametrize("count", [0, -3])
def test_no_images_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"^a subset of {count} images of sorted was requested: expected 1 or more$"):
        by_class(UNEVEN).sample(count)


class Item:
    def __init__(self, split: Split, maps: bool) -> None:
        self.split, self.maps, self.read = split, maps, list[int]()

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read.append(number)
        label = torch.full((4, 4), number % 7) if self.maps else self.split.labels[number]
        return self.split.images[number], label


def test_a_stream_is_drawn_alike_without_reading_it_and_read_in_order() -> None:
    split = by_class(UNEVEN)
    fetch = Item(split, maps=False)
    stream = LazySplit("stream", fetch, split.labels, split.classes, None, 0)
    fetch.read.clear()
    some = stream.sample(33, seed=2)
    assert fetch.read == []
    assert torch.equal(torch.cat([x for x, _ in some.batches(10)]), split.sample(33, seed=2).take(slice(None))[0])
    assert fetch.read == split.sample_indices(33, seed=2).tolist()


def test_images_without_a_label_that_counts_are_not_drawn() -> None:
    """So that a sample of 20 has 20 that count, and of the same classes as that of the labelled images alone."""
    split = by_class(UNEVEN)
    labelled = torch.rand(len(split), generator=torch.Generator().manual_seed(1)) < 0.5
    partly = Split("partly", split.images, split.labels.where(labelled, 255), split.classes, ignore_index=255)
    alone = partly.subset(labelled)
    for count in (1, 20, int(labelled.sum()), len(split)):
        found = partly.sample(count, seed=3)
        assert len(found) == min(count, int(labelled.sum()))
        assert torch.equal(found.images, alone.sample(count, seed=3).images)
    none = Split("none", split.images, torch.full_like(split.labels, 255), split.classes, ignore_index=255)
    assert len(none.sample(20)) == 20  # which whoever scores it refuses


@pytest.mark.parametrize("lazy", [False, True])
def test_label_maps_are_drawn_without_classes(lazy: bool) -> None:
    whole = by_class(UNEVEN)
    fetch = Item(whole, maps=True)
    split: Split = LazySplit("stream", fetch, 124, tuple("abcdefg"), None, 0)
    if not lazy:
        assert isinstance(split, LazySplit)
        split = split.eager()
    fetch.read.clear()
    drawn = Counter(int(row) for seed in range(200) for row in split.sample_indices(31, seed=seed))
    assert fetch.read == []
    assert len(drawn) == 124
    assert max(drawn.values()) < 85  # 50 expected, 6.1 its deviation
    assert split.sample(31, seed=3).take(slice(None))[1].shape == (31, 4, 4)


def test_the_moments_of_a_stream_are_those_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(2).repeat_interleave(100)
    split = Split("two", (labels * 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), labels)
    monkeypatch.setattr("gambeson.data.lazy.SAMPLE", 21)
    mean, _ = LazySplit("two", Item(split, maps=False), labels, ("a", "b"), None, 0).mean_std()
    assert abs(mean[0] - 0.5) < 0.03


# Every path that takes some of the images, on a model that says 0 whatever it is shown: its accuracy on a sample is the
# share of class 0, and was 100 % on the first images of a split in order of class.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes of 20 test images each."""
    root = tmp_path_factory.mktemp("sorted")
    images = pixels(7 * 26, (3, 16, 16)).permute(0, 2, 3, 1).numpy()
    for part, first, last in (("train", 0, 4), ("val", 4, 6), ("test", 6, 26)):
        for label in range(7):
            place = root / part / f"class-{label}"
            place.mkdir(parents=True)
            for number in range(first, last):
                Image.fromarray(np.ascontiguousarray(images[label * 26 + number])).save(place / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def zero(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a net that says 0."""
    model = gb.models.create("lenet5", in_channels=3, classes=7, image_size=16)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([2.0, 0, 0, 0, 0, 0, 0]))
    file = tmp_path_factory.mktemp("zero") / "zero.safetensors"
    gb.models.save(model, file)
    return str(file)


def test_attack(folder: Path, zero: str, tmp_path: Path) -> None:
    data = f"image-folder:{folder}?size=16"
    run = AttackRun(model=zero, data=data, attack="fgsm", settings={"eps": 0.1}, images=14, seed=5)
    found = run_attack(run, tmp_path / "a")
    assert found.clean.n == 14
    assert found.clean.value == pytest.approx(1 / 7)
    tensors, _ = gb.base.load_tensors(tmp_path / "a" / "adversarial.safetensors")
    test = gb.data.load(data).test
    assert torch.equal(tensors["indices"], test.sample_indices(14, seed=5))
    assert torch.equal(tensors["labels"], test.labels[tensors["indices"]])


def test_transfer(folder: Path, zero: str, tmp_path: Path) -> None:
    run = TransferRun(models=(zero, zero), data=f"image-folder:{folder}?size=16", attacks=("fgsm",), eps=0.1, images=21)
    found = run_transfer(run, tmp_path / "t")
    assert [rate.value for rate in found.clean] == pytest.approx([6 / 7] * 2)


def test_export(folder: Path, zero: str, tmp_path: Path) -> None:
    name = f"image-folder:{folder}?size=16"
    found = run_export(zero, "safetensors", tmp_path / "x.safetensors", data_name=name, images=7, seed=3)
    assert found.original.value == found.exported.value == pytest.approx(1 / 7)
    assert (found.original.n, found.seed) == (7, 3)


def constant(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)[:, :1] * 0 + torch.tensor([2.0, 0, 0, 0, 0, 0, 0])


class Constant(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return constant(x)


@pytest.fixture(scope="module")
def data() -> Dataset:
    whole = by_class((300,) * 7)
    parts = [whole.subset(torch.arange(start, 2100, 3), part) for start, part in enumerate(("a", "b", "c"))]
    return Dataset("seven", parts[0], parts[1], parts[2], whole.classes)


def test_robust_validation(data: Dataset) -> None:
    found = validate_robustly(Constant(), data, SharedAdversarial(eps=0.1), seed=0)
    assert found["validation_pgd_accuracy"] == pytest.approx(1 / 7, abs=0.002)


def test_the_temperature_is_that_of_all_classes(data: Dataset) -> None:
    with Victim(Constant()) as victim:
        found = temperature.calibrating(victim, data.validation, seed=0)
    # Cross-entropy is least where the probability of class 0 is its share: of 200 images, 28 or 29.
    assert found > 5


def test_the_audits_samples(data: Dataset) -> None:
    with held(Constant(), data, (0.1,), sample=70) as evidence:
        assert counts(evidence.sample) == counts(evidence.unseen) == [10] * 7
        assert counts(evidence.few(14, data.train)) == [2] * 7


@pytest.mark.parametrize("dark", [5, 20, 35])
def test_images_without_labels_are_cut_evenly_over_what_the_model_says(dark: int) -> None:
    from gambeson.attacks.universal.context import splits_of

    class Dark(torch.nn.Module):
        """Calls black images dark."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            black = (x.flatten(1)[:, 0] < 0.1).float()
            return torch.stack([1 - black, black], 1)

    images = torch.full((100, 1, 2, 2), 0.5)
    images[:dark] = 0
    with Victim(Dark()) as victim:
        train, validation = splits_of(victim, images)
    assert counts(train) == [80 - dark * 4 // 5, dark * 4 // 5]
    assert counts(validation) == [20 - dark // 5, dark // 5]
