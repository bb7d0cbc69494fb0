"""Edits of images: each against what it is defined as, their derivatives, and what is refused."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from gambeson import UserError
from gambeson.base import generator
from gambeson.tasks import CLASSIFICATION, Segmentation
from gambeson.threat import jpeg as codec
from gambeson.threat.edits import KINDS, Edit, check_edits, moved, strength_of
from gambeson.threat.jpeg import differentiable_jpeg, jpeg, quantisation, smooth_round

EVERY = [
    "bits:3",
    "blur:0.7",
    "colour:0.2",
    "gamma:1.5",
    "jpeg:60",
    "resize:0.6",
    "resize:2",
    "rotate:7",
    "shift:2",
    "screenshot:70",
]


def photos(channels=3, size=(45, 37), count=4):
    """Smooth images with some noise, as photographs are."""
    draw = generator(0, "photos")
    smooth = F.interpolate(torch.rand(count, channels, 6, 6, generator=draw), size, mode="bicubic")
    return (smooth + 0.04 * torch.randn(smooth.shape, generator=draw)).clamp(0, 1)


def edited(text, images, seed=0, smooth=False):
    edit = Edit.parse(text)
    drawn = edit.draw(len(images), images.shape[1], generator(seed, "edit"))
    return edit.differentiable(images, drawn) if smooth else edit(images, drawn)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("quality", "most"), [(90, 0.007), (75, 0.008), (50, 0.009), (20, 0.011)])
def test_differentiable_jpeg_is_close_to_the_codec(channels, quality, most, monkeypatch):
    images = photos(channels)
    exact = jpeg(images, quality)
    near = (differentiable_jpeg(images, quality).clamp(0, 1) - exact).abs().mean()
    assert near < min(most, 0.45 * (exact - images).abs().mean())
    # What is left is the smooth rounding: with the codec's own, only what it rounds to bytes is.
    monkeypatch.setattr(codec, "smooth_round", torch.round)
    stored = (images * 255).round() / 255
    assert (differentiable_jpeg(stored, quality).clamp(0, 1) - exact).abs().mean() < 1.5 / 255


def test_tables_are_those_that_a_file_holds():
    for quality in (10, 50, 75, 97):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
        stored = Image.open(file).quantization  # row by row
        assert [quantisation(quality)[k].flatten().int().tolist() for k in (0, 1)] == [stored[0], stored[1]]


def test_smooth_rounding_is_the_papers():
    values = torch.tensor([-1.6, -0.4, 0.0, 0.25, 0.9, 7.0], requires_grad=True)
    rounded = smooth_round(values)
    left = values.detach() - values.detach().round()
    torch.testing.assert_close(rounded, values.detach().round() + left**3)
    (slope,) = torch.autograd.grad(rounded.sum(), values)
    torch.testing.assert_close(slope, 3 * left**2)


@pytest.mark.parametrize("text", EVERY)
def test_edits_stay_in_the_box_and_their_derivatives_are_those_of_what_they_do(text):
    images, weight = photos(3, (20, 18)) * 0.5 + 0.25, photos(3, (20, 18)).double()
    exact = edited(text, images)
    assert exact.shape == images.shape
    assert 0 <= float(exact.min()) <= float(exact.max()) <= 1
    assert (exact - images).abs().mean() > 1e-3
    point = images.double().requires_grad_()
    smooth = edited(text, point, smooth=True)
    assert (smooth.detach() - exact).abs().mean() < 0.012  # of JPEG alone more than rounding errors
    (slope,) = torch.autograd.grad((smooth * weight).sum(), point)
    assert bool(slope.isfinite().all())
    assert float(slope.abs().mean()) > 0.01
    if "bits" in text:
        return  # straight through
    way = torch.randn(images.shape, generator=generator(1, "way"), dtype=torch.float64)
    ends = [(edited(text, images + step * way, smooth=True) * weight).sum() for step in (1e-6, -1e-6)]
    torch.testing.assert_close((slope * way).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-3, atol=1e-3)


def test_edits_of_images_alone():
    images = photos(3, (16, 24))
    assert torch.equal(edited("none", images), images)
    assert torch.equal(edited("none", images, smooth=True), images)
    flat = torch.full((2, 1, 9, 7), 0.3)
    for text in ("blur:1", "blur:4", "resize:0.5", "resize:3", "shift:3"):  # what does not change what is constant
        torch.testing.assert_close(edited(text, flat), flat)
    assert set((edited("bits:2", images) * 3).unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    torch.testing.assert_close(edited("gamma:2", images), images**2)
    moved = edited("colour:0.1", images * 0.5 + 0.25) - (images * 0.5 + 0.25)
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.1))
    assert len({tuple(row) for row in moved[:, :, 0, 0].sign().tolist()}) > 1
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1
    spread = edited("blur:1.5", point)[0, 0]
    places = torch.arange(31.0) - 15
    assert float(spread.sum()) == pytest.approx(1)
    assert math.sqrt(float((spread.sum(0) * places**2).sum())) == pytest.approx(1.5, rel=0.03)
    both = edited("resize:0.5+jpeg:50", images)
    assert torch.equal(both, jpeg(edited("resize:0.5", images), 50))
    assert torch.equal(edited("screenshot:75", images), edited("resize:0.8+gamma:1.1+jpeg:75", images))
    assert torch.equal(edited("print:1", images), edited("blur:1+colour:0.1", images))


def test_a_shift_moves_each_image_one_of_eight_ways_and_repeats_the_edge():
    images = photos(2, (11, 9), 200)
    moved = edited("shift:2", images)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    ways = {(y, x): padded[..., 2 - y : 13 - y, 2 - x : 11 - x] for y in (-2, 0, 2) for x in (-2, 0, 2)}
    hits = {way: (moved == shifted).flatten(1).all(1) for way, shifted in ways.items()}
    assert torch.equal(sum(hit.long() for hit in hits.values()), torch.ones(200, dtype=torch.long))
    assert not bool(hits[0, 0].any())
    assert min(int(hit.sum()) for way, hit in hits.items() if way != (0, 0)) > 10


def test_draws_of_an_image_do_not_depend_on_the_batch():
    images = photos(3, (12, 12), 40)
    for text in ("shift:1", "colour:0.1+shift:2"):
        at_once = Edit.parse(text).seeded(3, generator(3, "a"))(images)
        change = Edit.parse(text).seeded(3, generator(3, "a"))
        assert torch.equal(torch.cat([change(part) for part in images.split([7, 1, 25, 7])]), at_once)
        assert not torch.equal(Edit.parse(text).seeded(3, generator(4, "a"))(images), at_once)


def test_texts_have_one_spelling():
    assert str(Edit.parse(" resize:1/2 + jpeg:50.0")) == "resize:0.5+jpeg:50"
    assert str(Edit.parse("none+bits:8")) == "bits:8"
    assert str(Edit.parse("none")) == "none"
    assert Edit.parse(Edit.parse("shift:2")) == Edit.parse("shift:2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jpg:75", "unknown edit 'jpg': did you mean jpeg"),
        ("", "unknown edit ''"),
        ("jpeg", "edit 'jpeg': expected jpeg:STRENGTH, its quality, an integer from 1 to 100"),
        ("jpeg:0", "an integer from 1 to 100"),
        ("jpeg:101", "an integer from 1 to 100"),
        ("jpeg:75.5", "an integer from 1 to 100"),
        ("bits:9", "bits per value, an integer from 1 to 8"),
        ("shift:nan", "pixels, an integer from 1"),
        ("resize:0", "scale, a number from 0.05 to 4"),
        ("blur:1e9", "a number from 0.1 to 10"),
        ("blur:1+gamma:a", "edit 'gamma:a'"),
        (75, "an edit is a int: expected text"),
    ],
)
def test_what_is_no_edit_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        Edit.parse(text)


@pytest.mark.parametrize(
    ("text", "shape", "task", "message"),
    [
        ("shift:1", (3, 9, 9), Segmentation(), "edit shift:1 does not fit x: it moves what is in an image"),
        ("shift:9", (3, 9, 12), CLASSIFICATION, "leaves nothing of images of 9x12 pixels"),
        ("colour:0.1", (1, 9, 9), CLASSIFICATION, "one channel have no colours; gamma and print"),
        ("jpeg:50", (4, 9, 9), CLASSIFICATION, "these have 4 channels"),
        ("blur:1+screenshot:50", (2, 9, 9), CLASSIFICATION, "these have 2 channels"),
    ],
)
def test_edits_that_do_not_fit_the_data_are_refused(text, shape, task, message):
    with pytest.raises(UserError, match=message):
        check_edits([text], shape, task, "x")


def test_what_is_seen_moves_and_grows_as_asked():
    images = torch.rand(3, 2, 6, 9, generator=torch.Generator().manual_seed(0))
    still = torch.zeros(3)
    torch.testing.assert_close(moved(images, still), images)
    right = moved(images, still, shift=torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(right[0, :, :, 2:], images[0, :, :, :-2])
    torch.testing.assert_close(right[1, :, 1:], images[1, :, :-1])
    torch.testing.assert_close(right[2], images[2])
    ramp = torch.linspace(-1, 1, 9).expand(3, 1, 9, 9)
    torch.testing.assert_close(moved(ramp, still, scale=torch.tensor([2.0, 1.0, 1.0]))[0], ramp[0] / 2)


def test_strengths_have_words():
    assert strength_of("rotate:10") == "degrees"
    assert all(strength_of(f"{kind}:1") for kind in KINDS)
    assert strength_of("none") == strength_of("jpeg:75+shift:1") == ""


def test_edits_that_fit_the_data():
    assert len(check_edits(["jpeg:50", "blur:1", "print:1", "bits:8"], (1, 8, 8), Segmentation(), "x")) == 4


@pytest.mark.parametrize("degrees", [3.0, 10.0, 45.0])
def test_rotation_is_that_of_scipy_and_goes_both_ways(degrees):
    images = torch.rand(12, 2, 9, 12, generator=torch.Generator().manual_seed(1))
    moved = edited(f"rotate:{degrees}", images)
    ways = [
        torch.from_numpy(ndimage.rotate(images.numpy(), angle, (2, 3), reshape=False, order=1, mode="nearest"))
        for angle in (-degrees, degrees)
    ]
    apart = torch.stack([(moved - way).abs().amax((1, 2, 3)) for way in ways])
    assert float(apart.amin(0).max()) < 1e-4
    assert set(apart.argmin(0).tolist()) == {0, 1}
    with pytest.raises(UserError, match="it moves what is in an image"):
        check_edits([f"rotate:{degrees}"], (1, 9, 9), Segmentation(), "x")
