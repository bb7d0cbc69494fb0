"""Patches on images: what is replaced and what is not, places, gradients, masks, and what is refused."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from gambeson import UserError
from gambeson.base import generator
from gambeson.tasks import CLASSIFICATION, of
from gambeson.threat import Patch, Placement
from gambeson.threat.patch import mask_of, require_room


def images(count, shape, seed=0):
    return torch.rand(count, *shape, generator=generator(seed, "images"))


def patch(size=(2, 3), channels=1, mask=None, **placement):
    pattern = torch.rand(1, channels, *size, generator=generator(1, "pattern"))
    return Patch(pattern, torch.ones(1, 1, *size) if mask is None else mask, Placement(**placement))


@pytest.mark.parametrize("shape", [(1, 6, 9), (3, 9, 6)])
def test_whole_pixels_are_replaced_and_all_others_keep_every_bit(shape):
    x, one = images(200, shape), patch(channels=shape[0])
    moved = one(x, one.draw(200, generator(0, "draw")))
    seen = set()
    for before, after in zip(x, moved, strict=True):
        (top, left), (bottom, right) = ((after != before).any(0).nonzero().aminmax(dim=0)[k].tolist() for k in (0, 1))
        assert (bottom - top + 1, right - left + 1) == (2, 3)
        expected = before.clone()
        expected[:, top : top + 2, left : left + 3] = one.pattern[0]
        assert torch.equal(after, expected)
        seen.add((top, left))
    assert len(seen) == (shape[1] - 1) * (shape[2] - 2)  # every legal place, and no other


def test_places_are_uniform_and_follow_the_seed():
    x, one = torch.zeros(7000, 1, 6, 9), Patch(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), Placement())
    moved = one.seeded(3)(x)
    corners = moved.flatten(1).argmax(1).bincount(minlength=54).view(6, 9)[:5, :7].double()
    assert corners.sum() == 7000
    chi_square = float(((corners - 200) ** 2 / 200).sum())
    assert 15 < chi_square < 62  # 0.1 % and 99.9 % of its 34 degrees of freedom
    parts = one.seeded(3)
    assert torch.equal(torch.cat([parts(x[:1]), parts(x[1:38]), parts(x[38:])]), moved)
    assert not torch.equal(one.seeded(4)(x), moved)
    # Another pattern of the same placement lies at the same places, one of another placement does not.
    grey = Patch(one.pattern / 2, one.mask, Placement())
    assert torch.equal(2 * grey.seeded(3)(x), moved)


def test_corners_and_fixed_places():
    x = torch.zeros(400, 1, 6, 9)
    corner = Patch(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), Placement(place="corner")).seeded(0)(x)
    found = corner.flatten(1).argmax(1).bincount(minlength=54).view(6, 9)
    assert found.nonzero().tolist() == [[0, 0], [0, 6], [4, 0], [4, 6]]
    assert int(found[found > 0].min()) > 65
    for place, (top, left) in (
        ((0, 0), (0, 0)),
        ((1, 1), (4, 6)),
        ((0.5, 1), (2, 6)),
        ((0.25, 0.5), (1, 3)),
        ((0.4, 0.6), (2, 4)),
    ):
        one = Patch(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), Placement(place=place)).seeded(0)(x)
        expected = torch.zeros(6, 9)
        expected[top : top + 2, left : left + 3] = 1
        assert torch.equal(one, expected.expand_as(one)), place


def test_a_quarter_turn_and_twice_the_size_are_exact():
    pattern = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).T.contiguous()[None, None]  # four rows, from top to bottom
    mask, x = torch.ones(1, 1, 4, 1), torch.zeros(1, 1, 4, 4)
    turned = Patch(pattern, mask, Placement(place=(0, 0), rotation=(90, 90)))(x, torch.rand(1, 4))
    back = Patch(pattern, mask, Placement(place=(0, 0), rotation=(-90, -90)))(x, torch.rand(1, 4))
    half = Patch(pattern, mask, Placement(place=(0, 0), rotation=(180, 180)))(x, torch.rand(1, 4))
    row = turned[0, 0, 0]
    assert row.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4]) or row.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert back[0, 0, 0].tolist() == pytest.approx(row.flip(0).tolist())
    assert half[0, 0, :, 0].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert float(turned[0, 0, 1:].abs().max()) < 1e-6
    flat = Patch(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2), Placement(scale=2))(x, torch.rand(1, 4))
    # Bilinear: the inner pixels are wholly covered, and the edge fades over half a pixel of the patch.
    assert flat[0, 0, 1:3, 1:3].flatten().tolist() == pytest.approx([0.5] * 4)
    assert float(flat[0, 0, 0, 0]) == pytest.approx(0.5 * 0.75**2)


def test_scales_and_angles_are_drawn_within_their_range():
    drawn = torch.rand(3000, 4, generator=generator(0, "draw"))
    thetas = Placement(scale=(0.5, 1.5), rotation=30).thetas((4, 4), (16, 16), drawn)
    scales = (4 / (thetas[:, 0, 0] ** 2 + thetas[:, 0, 1] ** 2).sqrt()).numpy()
    angles = torch.rad2deg(torch.atan2(thetas[:, 0, 1], thetas[:, 0, 0])).numpy()
    for values, low, high in ((scales, 0.5, 1.5), (angles, -30, 30)):
        share = np.sort((values - low) / (high - low))
        assert share.min() >= -1e-9
        assert share.max() <= 1 + 1e-9
        assert np.abs(share - np.linspace(0, 1, 3000)).max() < 1.95 / math.sqrt(3000)  # Kolmogorov, 99.9 %


@pytest.mark.parametrize("place", ["random", "corner", (1, 0)])
def test_a_scaled_and_turned_patch_lies_within_the_image(place):
    """The whole of its mass, in the unit of the scale squared."""
    one = patch((3, 4), scale=(0.8, 1.3), rotation=180, place=place)
    white = Patch(torch.ones(1, 1, 3, 4), one.mask, one.placement)
    drawn = one.draw(300, generator(2, "draw"))
    area = white(torch.zeros(300, 1, 15, 12), drawn).sum((1, 2, 3))
    scale = 0.8 + 0.5 * drawn[:, 2]
    # Less what fades beyond the image's edge: at most half a pixel of the patch along the sides that touch it.
    assert ((area / (12 * scale**2)) > 0.8).all()
    assert float((area / (12 * scale**2)).mean()) == pytest.approx(1, abs=0.06)
    around = white(torch.zeros(300, 1, 21, 18), drawn)
    assert float((around.sum((1, 2, 3)) / (12 * scale**2)).mean()) == pytest.approx(1, abs=0.06)


def test_the_gradient_of_a_scaled_and_turned_patch_is_that_of_finite_differences():
    x, weight = images(3, (2, 9, 8)).double(), torch.randn(3, 2, 9, 8, generator=generator(0, "w")).double()
    mask = torch.rand(1, 1, 3, 4, generator=generator(0, "mask")).double()
    drawn = torch.rand(3, 4, generator=generator(0, "draw"))
    pattern = torch.rand(1, 2, 3, 4, generator=generator(0, "p")).double().requires_grad_()

    def loss(values):
        return (Patch(values, mask, Placement(scale=(0.7, 1.2), rotation=40))(x, drawn) * weight).square().sum()

    (slope,) = torch.autograd.grad(loss(pattern), pattern)
    assert float(slope.abs().min()) > 1e-3
    for place in [(0, c, y, x) for c in range(2) for y in range(3) for x in range(4)]:
        step = torch.zeros_like(pattern)
        step[place] = 1e-5
        with torch.no_grad():
            difference = (loss(pattern + step) - loss(pattern - step)) / 2e-5
        assert float(slope[place]) == pytest.approx(float(difference), rel=1e-6, abs=1e-8)


def test_several_patterns_are_on_consecutive_images_and_a_mask_mixes():
    x, pattern = images(6, (1, 4, 4)), torch.stack([torch.full((1, 2, 2), value) for value in (0.0, 1.0, 0.5)])
    mask = torch.tensor([[1.0, 0.0], [0.25, 0.5]])[None, None]
    moved = Patch(pattern, mask, Placement(place=(0, 0)))(x, torch.rand(6, 4))
    for k in range(6):
        value, corner = float(pattern[k // 2].mean()), x[k, 0, :2, :2]
        expected = corner + mask[0, 0] * (value - corner)
        assert torch.allclose(moved[k, 0, :2, :2], expected)
    assert torch.equal(moved[:, 0, 0, 1], x[:, 0, 0, 1])  # where the mask is zero


def test_masks_have_the_area(tmp_path):
    assert mask_of("square", 0.05, (28, 28)).shape == (1, 1, 6, 6)
    for area in (0.02, 0.1, 0.4):
        circle = mask_of("circle", area, (100, 80))
        assert float(circle.sum()) == pytest.approx(area * 8000, rel=0.07)
        assert torch.equal(circle, circle.flip(2))
        assert circle[0, 0, 0, 0] == 0
        assert bool(circle.any(2).all())  # it touches its own border on every side
    picture = np.zeros((60, 90, 4), np.uint8)
    picture[10:40, 20:80, 3] = 255
    picture[10:40, 20:50, 3] = 0  # 30 x 30 are left, at the right
    picture[20:30, 60:70, 3] = 0  # with a hole
    Image.fromarray(picture).save(tmp_path / "sticker.png")
    sticker = mask_of(str(tmp_path / "sticker.png"), 0.2, (40, 50))
    assert sticker.shape == (1, 1, 21, 21)
    assert float(sticker.sum()) == pytest.approx(400, rel=0.06)
    assert float(sticker[0, 0, 10, 10]) == 0
    assert float(sticker[0, 0, 2, 2]) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_of("square", 0.001, (28, 28)), "area of 0.001 is 0.78 pixels of images of 28x28"),
        (lambda: mask_of("triangle", 0.1, (28, 28)), "shape 'triangle': expected square, circle, or the file"),
        (lambda: Placement(scale=0), "scale.0 = 0: expected greater than 0"),
        (lambda: Placement(scale=(2, 1)), r"scale = \(2, 1\): expected the smaller value first"),
        (lambda: Placement(rotation=200), "rotation = 200: expected 0 to 180 degrees"),
        (lambda: Placement(place=(0.5, 1.2)), r"expected random, corner, or \(y, x\), two shares from 0 to 1"),
        (lambda: Placement(place="outside"), r"expected random, corner, or \(y, x\)"),
        (lambda: require_room((5, 5), (4, 9), Placement()), "patch of 5x5 pixels takes up to 5x5, and the images"),
        (
            lambda: require_room((4, 4), (5, 5), Placement(rotation=(20, 60))),
            "scaled and turned as it may be, takes up to 6x6",
        ),
        (lambda: patch(channels=3).require_fit((1, 9, 9), CLASSIFICATION), "3 channels came with images of 1"),
        (lambda: patch().require_fit((1, 9, 9), of(torch.zeros(1, 9, 9).long())), "hides what a label map tells"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_pictures_without_a_sticker_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "opaque.png")
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    with pytest.raises(UserError, match="opaque.png has no transparency"):
        mask_of(str(tmp_path / "opaque.png"), 0.1, (28, 28))
    with pytest.raises(UserError, match="clear.png is transparent everywhere"):
        mask_of(str(tmp_path / "clear.png"), 0.1, (28, 28))


def test_room_is_that_of_the_largest_bounding_rectangle():
    """Against a fine grid of angles."""
    for size, rotation in (((3, 7), (-20, 50)), ((5, 5), (100, 170)), ((2, 9), (-180, 180)), ((4, 6), (0, 0))):
        angles = np.radians(np.linspace(*rotation, 20001))
        cos, sin = np.abs(np.cos(angles)), np.abs(np.sin(angles))
        expected = [(1.5 * (a * cos + b * sin)).max() for a, b in (size, size[::-1])]
        assert Placement(scale=(0.5, 1.5), rotation=rotation).needs(size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("angle", [400, -20, float("nan")])
def test_a_single_angle_is_meant_in_both_directions_or_refused(angle):
    assert Placement(rotation=20).rotation == (-20, 20)
    with pytest.raises(UserError, match="expected 0 to 180 degrees, in both directions"):
        Placement(rotation=angle)
