"""Augmentation geometry: every output is an exact copy of the input, shifted and maybe mirrored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gambeson.base.errors import UserError
from gambeson.data import augment
from gambeson.data.augment import draw_boxes, sampling_grid


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def find(padded: torch.Tensor, out: torch.Tensor, flips: tuple[bool, ...]) -> tuple[int, int, bool]:
    height, width = out.shape[-2:]
    hits = [
        (dy, dx, flip)
        for dy in range(9)
        for dx in range(9)
        for flip in flips
        if torch.equal(padded[..., dy : dy + height, dx : dx + width], out.flip(-1) if flip else out)
    ]
    assert len(hits) == 1, "not one exact shifted copy"
    return hits[0]


@pytest.mark.parametrize(("kind", "flips"), [("crop", (False,)), ("crop-flip", (False, True))])
def test_images_and_maps_move_together(kind: str, flips: tuple[bool, ...]) -> None:
    x = torch.rand(400, 2, 10, 12, generator=rng(1)) + 0.01
    maps = torch.randint(0, 5, (400, 10, 12), generator=rng(2))
    out, moved = augment(x, kind, rng(), maps, 255)
    assert out.shape == x.shape
    assert moved.shape == maps.shape
    assert out.is_contiguous()
    found = []
    for number in range(400):
        move = find(F.pad(x[number], (4,) * 4), out[number], flips)
        assert find(F.pad(maps[number], (4,) * 4, value=255), moved[number], flips) == move
        found.append(move)
    assert len({(dy, dx) for dy, dx, _ in found}) > 70  # of 81: each image has its own shift
    assert {dy for dy, _, _ in found} == {dx for _, dx, _ in found} == set(range(9))
    assert len({flip for *_, flip in found}) == len(flips)
    if len(flips) == 2:
        assert 150 < sum(flip for *_, flip in found) < 250
    assert torch.equal(moved == 255, (out == 0).all(1))  # what came in from outside, and nothing else


@pytest.mark.parametrize("flip", [False, True])
def test_a_zoom_is_torchvisions_resized_crop(flip: bool) -> None:
    from torchvision.transforms.v2 import functional

    x = torch.rand(60, 3, 30, 25, generator=rng(1))
    boxes, flips = draw_boxes(60, 30, 25, rng(2)), torch.full((60,), flip)
    grid = sampling_grid(boxes, flips, 30, 25)
    out = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
    for number, box in enumerate(boxes.long().tolist()):
        expected = functional.resized_crop(x[number], *box, [30, 25])
        torch.testing.assert_close(out[number], expected.flip(-1) if flip else expected, rtol=0, atol=2e-5)


def test_boxes_are_drawn_as_torchvision_draws_them() -> None:
    from torchvision.transforms import RandomResizedCrop

    count, height, width = 20000, 96, 128
    boxes = draw_boxes(count, height, width, rng(3))
    assert (boxes >= torch.tensor([0.0, 0.0, 1.0, 1.0])).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([height, width])).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.empty(1, height, width)
        theirs = [RandomResizedCrop.get_params(x, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    others = torch.tensor(theirs, dtype=torch.float32)
    for ours, other in zip(
        (*boxes.T, boxes[:, 2] * boxes[:, 3]), (*others.T, others[:, 2] * others[:, 3]), strict=True
    ):
        error = (ours.var() / count + other.var() / len(other)).sqrt()
        assert (ours.mean() - other.mean()).abs() < 4 * error
        assert ours.std() == pytest.approx(float(other.std()), rel=0.06)


def test_where_no_box_fits_the_middle_is_taken() -> None:
    boxes = draw_boxes(500, 4, 400, rng(4))  # no box of 8 % of the area and an aspect up to 4/3 fits
    assert boxes.unique(dim=0).tolist() == [[0.0, 198.0, 4.0, 5.0]]


def test_images_and_maps_are_zoomed_together() -> None:
    maps = torch.randint(0, 5, (50, 6, 6), generator=rng(1)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    maps[:, :4, :4] = 255
    x = maps[:, None] / 255
    out, moved = augment(x, "imagenet", rng(), maps, 255)
    assert out.shape == x.shape
    assert moved.dtype == torch.int64
    assert set(moved.unique().tolist()) <= set(maps.unique().tolist())
    assert 0.3 < (out[:, 0] * 255 - moved).abs().lt(0.01).float().mean() < 1  # equal but where labels meet
    assert torch.equal(out, augment(x, "imagenet", rng()))
    assert ((moved != maps).flatten(1).any(1)).all()
    assert out.min() >= 0
    assert out.max() <= 1


def test_draws_come_from_the_generator_alone() -> None:
    x = torch.rand(16, 3, 8, 8, generator=rng(1))
    state = torch.get_rng_state()
    assert torch.equal(augment(x, "crop-flip", rng(5)), augment(x, "crop-flip", rng(5)))
    assert not torch.equal(augment(x, "crop-flip", rng(5)), augment(x, "crop-flip", rng(6)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augment(x, "crop", rng(5)), augment(x, "crop", rng(5), torch.zeros(16, 8, 8).long())[0])


def test_none_changes_and_draws_nothing() -> None:
    x, draw = torch.rand(3, 1, 4, 4), rng()
    state = draw.get_state()
    assert augment(x, "none", draw) is x
    assert torch.equal(draw.get_state(), state)


def test_maps_get_torchs_ignore_index_by_default() -> None:
    _, moved = augment(torch.ones(32, 1, 4, 4), "crop", rng(), torch.zeros(32, 4, 4, dtype=torch.int64))
    assert set(moved.unique().tolist()) == {0, -100}


def test_refusals() -> None:
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(UserError, match="unknown augmentation 'crop-flips': did you mean crop-flip"):
        augment(x, "crop-flips", rng())
    with pytest.raises(UserError, match=r"maps have shape \(2, 4, 5\): expected \(2, 4, 4\)"):
        augment(x, "crop", rng(), torch.zeros(2, 4, 5))
    with pytest.raises(UserError, match="generator is on cpu and the images on meta"):
        augment(x.to("meta"), "crop", rng())
