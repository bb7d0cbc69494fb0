"""Splits: exact values, coverage, statistics against brute force, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gambeson.base.errors import UserError
from gambeson.data import Split


def make(count: int = 11, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Split:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 5, 7), generator=draw, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    return Split("toy", images if dtype == torch.uint8 else images.to(dtype) / 255, labels)


def test_take_gives_exact_pixels() -> None:
    split = make()
    x, y = split.take(torch.tensor([7, 2, 2]))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert torch.equal(x, split.images[[7, 2, 2]].to(torch.float32) / 255)
    assert y.tolist() == [3, 2, 2]
    assert torch.equal(split.take(slice(2, 9, 3))[0], split.take([2, 5, 8])[0])
    assert torch.equal(split.take(split.labels == 3)[0], split.take([3, 7])[0])


def test_floats_pass_through_unquantised() -> None:
    images = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    split = Split("toy", images, np.arange(6, dtype=np.uint16) % 2)
    assert torch.equal(split.take(slice(None))[0], images)
    assert (images * 255 != (images * 255).round()).any()
    assert Split("toy", images.double(), split.labels).take([1])[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_batches_may_be_changed_without_changing_the_split(dtype: torch.dtype) -> None:
    split = make(dtype=dtype)
    before = split.images.clone(), split.labels.clone()
    x, y = split.take(slice(0, 4))
    x.zero_()
    y.zero_()
    assert torch.equal(split.images, before[0])
    assert torch.equal(split.labels, before[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.booleans(), st.booleans())
def test_batches_cover_everything_once(count: int, size: int, shuffled: bool, drop: bool) -> None:
    split = Split("toy", torch.arange(count, dtype=torch.uint8)[:, None, None, None], torch.arange(count) % 2)
    if drop and size > count:
        with pytest.raises(UserError, match="leaves no batch"):
            split.batches(size, drop_last=True)
        return
    draw = torch.Generator().manual_seed(3) if shuffled else None
    got = list(split.batches(size, generator=draw, drop_last=drop))
    sizes = [len(y) for _, y in got]
    assert sizes[:-1] == [size] * (len(sizes) - 1)
    seen = (torch.cat([x for x, _ in got]).flatten() * 255).round().long()
    kept = count - count % size if drop else count
    assert len(seen) == kept == len(set(seen.tolist()))
    assert torch.equal(torch.cat([y for _, y in got]), seen % 2)  # labels stay with their images
    if not shuffled:
        assert seen.tolist() == list(range(kept))


def test_shuffling_follows_the_generator_alone() -> None:
    split = make(50)

    def order(seed: int) -> torch.Tensor:
        walk = split.batches(8, generator=torch.Generator().manual_seed(seed))
        return torch.cat([x for x, _ in walk])

    state = torch.get_rng_state()
    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mean_std_is_brute_force(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gambeson.data.split.CHUNK_BYTES", 300)  # several pieces
    split = make(23, dtype)
    mean, std = split.mean_std()
    pixels = split.images.double() / (255 if dtype == torch.uint8 else 1)
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-9)


def test_fingerprint_sees_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    split = make()
    images, labels = split.images.clone(), split.labels.clone()
    same = Split("another name", images.clone(), labels.clone())
    assert split.fingerprint == same.fingerprint
    assert len(split.fingerprint) == 16
    images[10, 2, 4, 6] ^= 1
    labels[10] ^= 1
    others = [
        Split("toy", images, split.labels),
        Split("toy", split.images, labels),
        Split("toy", split.images.transpose(2, 3), split.labels),
        split.subset(torch.arange(10)),
        split.subset(torch.arange(11).flip(0)),
    ]
    assert len({split.fingerprint, *(other.fingerprint for other in others)}) == 6
    monkeypatch.setattr("gambeson.data.split.CHUNK_BYTES", 300)
    assert make().fingerprint == split.fingerprint


def test_subset_keeps_classes_and_order() -> None:
    split = make()
    split.mean_std()
    part = split.subset([5, 1], "pair")
    assert (part.name, part.classes, len(part), part.labels.tolist()) == ("pair", split.classes, 2, [1, 1])
    assert torch.equal(part.images, split.images[[5, 1]])
    assert part.mean_std() != split.mean_std()
    assert split.subset([]).name == "toy[0]"
    assert len(split.subset([])) == 0


def test_label_maps_with_ignore_index() -> None:
    maps = torch.tensor([[[0, 255], [1, 2]], [[255, 255], [1, 1]]], dtype=torch.uint8)
    split = Split("maps", torch.zeros(2, 3, 2, 2, dtype=torch.uint8), maps, None, 255)
    assert split.classes == ("0", "1", "2")
    assert split.take([1])[1].tolist() == [[[255, 255], [1, 1]]]
    with pytest.raises(UserError, match="reach from 0 to 255, but there are 3 classes"):
        Split("maps", split.images, maps, ("a", "b", "c"))
    with pytest.raises(UserError, match="2x2 pixels came with images of 4x2"):
        Split("maps", torch.zeros(2, 3, 4, 2), maps)


def test_to_stays_usable() -> None:
    split = make()
    moved = split.to("cpu")
    assert moved.device == torch.device("cpu")
    assert moved.fingerprint == split.fingerprint


BYTES = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
TRUTH = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.tensor([-2.1, 2.6]).reshape(2, 1, 1, 1), TRUTH[:2], r"from -2.1 to 2.6.*normalised"),
        (torch.tensor([0.0, 255.0]).reshape(2, 1, 1, 1), TRUTH[:2], "divide by 255"),
        (torch.tensor([0.0, torch.nan]).reshape(2, 1, 1, 1), TRUTH[:2], "1 images hold NaN.*index 1"),
        (BYTES.int(), TRUTH, "expected floats in"),
        (BYTES[:, 0], TRUTH, r"shape \(4, 2, 2\): expected a batch \(N, C, H, W\); pass images\[:, None\]"),
        (torch.zeros(4, 32, 32, 3), TRUTH, "channels last.*permute"),
        (torch.zeros(4, 0, 2, 2), TRUTH, "holds no pixels"),
        (BYTES, TRUTH[:3], "4 images came with 3 labels"),
        (BYTES, TRUTH + 0.5, "labels are torch.float32, and not all are whole numbers"),
        (BYTES, torch.eye(4) * torch.tensor([[1], [2], [1], [1]]), "one-hot"),
        (BYTES, TRUTH - 1, "reach from -1 to 0"),
        ("cat.png", TRUTH, "images are a str: expected a torch tensor"),
        (BYTES, [[0], [1, 2], [3], [4]], "cannot become one tensor"),
    ],
)
def test_refusals(images: object, labels: object, words: str) -> None:
    assert len(Split("good", BYTES, TRUTH)) == 4  # the control row
    with pytest.raises(UserError, match=words):
        Split("bad", images, labels)


def test_labels_beyond_the_classes() -> None:
    with pytest.raises(UserError, match=r"reach from 1 to 2, but there are 2 classes.*start at 1"):
        Split("bad", BYTES, TRUTH + 1, ("a", "b"))


def test_batch_size_below_one() -> None:
    with pytest.raises(UserError, match="batch_size = 0: expected 1 or more"):
        make().batches(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_on_a_gpu_everything_is_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    split = make(dtype=dtype)
    moved = split.to("cuda")
    assert moved.images.is_cuda
    assert split.images.device.type == "cpu"
    fresh = Split("gpu", moved.images, moved.labels)
    assert fresh.fingerprint == split.fingerprint
    assert fresh.mean_std()[0] == pytest.approx(split.mean_std()[0], abs=1e-12)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=None: (0, 0))
    stays = split.to("cuda")
    assert not stays.images.is_cuda
    for other in (moved, stays):
        pairs = zip(split.batches(4), other.batches(4), strict=True)
        for (x, y), (x_gpu, y_gpu) in pairs:
            assert x_gpu.is_cuda
            assert torch.equal(x, x_gpu.cpu())
            assert torch.equal(y, y_gpu.cpu())
        assert torch.equal(other.take([3, 1])[0].cpu(), split.take([3, 1])[0])
