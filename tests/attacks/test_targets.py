"""Targets of universal attacks on label maps, against closed forms of pixel-wise linear models."""

import itertools
import warnings

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from gambeson import UserError, attacks
from gambeson.attacks import DFUAP, SGA, StochasticPGD, Target, UniversalPerturbation
from gambeson.attacks.universal.stochastic_pgd import mean_over_tiles, repeat_tile
from gambeson.attacks.universal.target import NOTHING
from gambeson.base.errors import DataWarning
from gambeson.data import Dataset, Split
from gambeson.evaluation import target_success
from gambeson.victim import Victim

IGNORED = 255


class PixelNet(nn.Module):
    """A 1x1 convolution: u = W x + b at every pixel; counts what it is sent."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)) if bias is None else torch.as_tensor(bias))

    def forward(self, x):
        return torch.einsum("kc,nchw->nkhw", self.weight, x) + self.bias[:, None, None]


def binary(channels=3):
    """Two classes, w the difference of their rows, and a bias that parts grey images evenly."""
    w = torch.tensor([0.9, -1.4, 0.6])[:channels] * 3
    half = float(w.sum()) / 4
    return PixelNet(torch.stack([-w / 2, w / 2]), [half, -half]), w


def dataset(x, y, classes=None, ignore_index=IGNORED):
    names = classes or tuple("abcdefgh"[: int(y[y != IGNORED].max()) + 1])
    parts = [Split(f"maps/{k}", x[k::3], y[k::3], names, ignore_index=ignore_index) for k in range(3)]
    data = object.__new__(Dataset)
    for name, value in zip(("name", "train", "validation", "test", "classes"), ("maps", *parts, names), strict=True):
        object.__setattr__(data, name, value)
    return data


def grey(count, size, channels=3, seed=0):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.35


def four_classes(count=60, size=(5, 4)):
    """Four colours, pixel by pixel, which the net tells apart."""
    colours = torch.tensor([[0.3, 0.3, 0.3], [0.7, 0.3, 0.3], [0.3, 0.7, 0.3], [0.3, 0.3, 0.7]])
    model = PixelNet(2 * 8 * (colours - colours.mean(0)), -8 * colours.square().sum(1))
    y = torch.randint(0, 4, (count, *size), generator=torch.Generator().manual_seed(1))
    x = colours[y].movedim(-1, 1) + 0.1 * (grey(count, size) - 0.5)
    assert torch.equal(model(x).argmax(1), y)
    return model, x, y


def linear_data(count=60, size=(4, 5)):
    model, w = binary()
    x = grey(count, size)
    return model, w, dataset(x, model(x).argmax(1), ("a", "b"))


FAST = {"steps": 30, "batch_size": 10, "probe_starts": 0, "tau": 1.0, "temperature": 1}
"""Without truncation the plain loss has the closed form as its optimum."""


def pattern(size=(4, 5), seed=3):
    return torch.randint(0, 2, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_a_static_target_has_the_optimum_of_its_formula(norm):
    model, w, data = linear_data()
    goal = pattern()
    uap = StochasticPGD(eps=0.1, norm=norm, target=goal, **FAST).craft(model, data)
    toward = (2 * goal - 1)[None] * w[:, None, None]
    assert torch.equal(uap.delta[0].sign(), toward.sign())
    if norm == "inf":
        torch.testing.assert_close(uap.delta[0], 0.1 * toward.sign())
        x = data.validation.take(slice(None))[0]
        margins = model(x).detach().diff(dim=1)[:, 0] * (2 * goal - 1)
        assert uap.about.restarts[0][1] == pytest.approx(float((margins > -0.1 * w.abs().sum()).float().mean()))
    else:
        assert float(uap.delta.norm()) == pytest.approx(0.1, rel=1e-4)
        at_each_pixel = uap.delta[0] / uap.delta[0].norm(dim=0)
        torch.testing.assert_close(at_each_pixel, toward / w.norm(), rtol=1e-3, atol=1e-4)


def test_norm_2_never_reaches_more_pixels_of_one_image_than_its_cheapest_ones():
    model, w = binary()
    x = grey(1, (6, 6), seed=5).repeat(3, 1, 1, 1)
    # Copies would be the images to craft on: differ where no pixel counts.
    labels = model(x).argmax(1)
    x, labels = (torch.cat([part, part[:, ..., :1]], -1) for part in (x, labels))
    x[1:, 0, 0, -1], x[2:, 1, 0, -1], labels[:, :, -1] = 0.1, 0.9, IGNORED
    goal = 1 - labels[0]
    eps = 0.3
    cost = (-(model(x[:1]).detach().diff(dim=1)[0, 0] * (2 * goal.clamp(0, 1) - 1)) / w.norm()).clamp(min=0)[:, :-1]
    best = int((cost.flatten().sort().values.square().cumsum(0) < eps**2).sum())
    assert 3 < best < 33
    attack = StochasticPGD(
        eps=eps, norm="2", target=goal.where(goal >= 0, 0), steps=150, probe_starts=0, tau=0.52, temperature=1
    )
    reached = attack.craft(model, dataset(x, labels, ("a", "b"))).about.restarts[0][1] * 36
    assert 0.5 * best < reached <= best + 1e-6


@pytest.mark.parametrize("labels", ["prediction", "truth"])
def test_a_hidden_class_has_the_optimum_of_its_formula(labels):
    model, w, data = linear_data()
    uap = StochasticPGD(eps=0.05, target="hide:a", labels=labels, omega=0.5, **FAST).craft(model, data)
    torch.testing.assert_close(uap.delta[0], 0.05 * w.sign()[:, None, None].expand(3, 4, 5))
    margins = model(data.validation.take(slice(None))[0]).detach().diff(dim=1)[:, 0]
    hidden = float((margins[margins < 0] > -0.05 * w.abs().sum()).float().mean())
    assert 0.2 < hidden < 0.8
    assert uap.about.restarts[0][1] == pytest.approx((hidden + 1) / 2)  # everything else is kept


def test_weights_flip_the_step_where_two_images_disagree_at_the_omega_of_the_formula():
    """At the first pixel, the target of the image with the class to hide and what the other keeps pull apart."""
    model = PixelNet([[0.0], [8.0], [-8.0]], [1.0, -4.0, 4.0])
    x = torch.tensor([[0.5, 0.8], [0.2, 0.8]]).view(2, 1, 1, 2)
    validation = torch.tensor([[0.51, 0.8]]).view(1, 1, 1, 2)
    names = ("o", "a", "b")
    assert model(x).argmax(1).flatten().tolist() == [0, 1, 2, 1]

    data = dataset(torch.cat([x, validation, validation]), torch.zeros(4, 1, 2).long(), names)
    object.__setattr__(data, "train", Split("two", x, model(x).argmax(1), names))
    object.__setattr__(data, "validation", Split("one", validation, model(validation).argmax(1), names))
    point = x.clone().requires_grad_()
    targets = torch.tensor([[[1, 1]], [[2, 1]]])
    gradient = torch.autograd.grad(-cross_entropy(model(point), targets, reduction="sum"), point)[0]
    one, two = float(gradient[0, 0, 0, 0]), float(gradient[1, 0, 0, 0])
    assert one > 0 > two
    flip = -two / (one - two)
    for omega, sign in ((flip + 0.01, 1), (flip - 0.01, -1)):
        attack = StochasticPGD(
            eps=0.01, target="hide:o", omega=omega, steps=1, batch_size=2, probe_starts=0, tau=1, temperature=1
        )
        delta = attack.craft(model, data).delta
        assert float(delta[0, 0, 0, 0].sign()) == sign


@pytest.mark.parametrize("target", ["class:1", "static", "hide:0"])
@pytest.mark.parametrize("make", [StochasticPGD, SGA])
def test_what_is_reached_with_confidence_has_no_say(make, target):
    model, _, data = linear_data()
    goal = torch.ones(4, 5).long() if target == "static" else target
    settings = {"probe_starts": 0} if make is StochasticPGD else {"inner_batch": 5}
    attack = make(eps=0.1, target=goal, steps=3, batch_size=10, labels="truth", temperature=1, **settings)
    with torch.no_grad():
        model.bias += torch.tensor([-9.0, 9.0])  # everything is class 1, with a probability above 0.75
    uap = attack.craft(model, data)
    assert not uap.delta.any()
    assert uap.about.status == "zero"
    assert attack.model_copy(update={"tau": 1.0}).craft(model, data).delta.any()


@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_tau_is_a_probability_for_every_loss(loss):
    """One pixel's target is a little below tau, the other's a little above."""
    model = PixelNet([[-4.0], [4.0]])
    level = torch.tensor([0.74, 0.76]).logit() / 8
    x = level.view(1, 1, 1, 2) + torch.arange(3).view(3, 1, 1, 1) / 255
    y = torch.zeros(3, 1, 2).long()
    attack = StochasticPGD(eps=0.01, target=1, steps=1, batch_size=3, probe_starts=0, loss=loss, temperature=1)
    delta = attack.craft(model, dataset(x, y, ("a", "b"))).delta.flatten()
    assert delta[0] > 0
    assert delta[1] == 0


@pytest.mark.parametrize("target", ["static:1", "hide:b"])
@pytest.mark.parametrize("labels", ["truth", "prediction"])
@pytest.mark.parametrize("tile", [None, (3, 2)])
def test_ignored_pixels_change_nothing_bit_for_bit(target, labels, tile):
    model, x, y = four_classes()
    y[:, 0], y[:, :, 3] = IGNORED, IGNORED
    y[::5] = IGNORED
    other = x.clone()
    other[:, :, 0], other[:, :, :, 3] = x[:, :, 1].flip(0), x[:, :, :, 2].flip(0)
    attack = StochasticPGD(eps=0.1, target=target, labels=labels, tile=tile, steps=8, batch_size=8, probe_starts=2)
    found, same = (attack.craft(model, dataset(one, y, tuple("abcd"))) for one in (x, other))
    kept = target != "static:1" or labels == "truth"
    assert not torch.equal(model(x).argmax(1), model(other).argmax(1))
    if kept:  # the prediction of the target's own image is no label of an image
        assert torch.equal(found.delta, same.delta)
        assert found.about.restarts == same.about.restarts
    if tile is None:
        assert not found.delta[0, :, 0].any()
        assert not found.delta[0, :, :, 3].any()


@pytest.mark.parametrize(("size", "tile"), [((6, 8), (3, 4)), ((7, 5), (3, 4)), ((4, 4), (4, 4)), ((5, 9), (1, 2))])
def test_the_gradient_of_a_tile_is_the_sum_over_its_copies(size, tile):
    draw = torch.Generator().manual_seed(0)
    factor, own = torch.randn(2, 3, *size, generator=draw), torch.randn(2, 3, *tile, generator=draw, requires_grad=True)
    whole = torch.zeros(2, 3, *size)
    for i, j in itertools.product(range(size[0]), range(size[1])):
        whole[:, :, i, j] = own[:, :, i % tile[0], j % tile[1]].detach()
    assert torch.equal(repeat_tile(own, size), whole)
    sums = torch.autograd.grad((repeat_tile(own, size) * factor).sum(), own)[0]
    copies = torch.autograd.grad(repeat_tile(own, size).sum(), own)[0]
    torch.testing.assert_close(mean_over_tiles(factor, tile), repeat_tile(sums / copies, size))


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_a_tiled_perturbation_repeats_and_is_the_best_that_does(norm):
    model, w, data = linear_data(size=(5, 7))
    goal = pattern((5, 7))
    attack = StochasticPGD(
        eps=0.1, norm=norm, target=goal, tile=(2, 3), **FAST | {"probe_starts": 3, "probe_start_steps": 5}
    )
    uap = attack.craft(model, data, start=torch.rand(1, 3, 5, 7))
    tile = uap.delta[..., :2, :3]
    assert torch.equal(uap.delta, repeat_tile(tile, (5, 7)))
    assert float(attack.ball.length(uap.delta)) == pytest.approx(0.1, rel=1e-4)
    votes = mean_over_tiles((2.0 * goal - 1)[None, None], (2, 3))[0, :, :2, :3]
    clear = votes[0].abs() > 0.3
    assert torch.equal(tile[0].sign()[:, clear], (votes * w[:, None, None]).sign()[:, clear])
    free = attack.model_copy(update={"tile": None}).craft(model, data)
    assert free.about.restarts[0][1] > max(rate for _, rate in uap.about.restarts)
    full = attack.model_copy(update={"tile": (5, 7)}).craft(model, data)
    torch.testing.assert_close(full.delta, free.delta)


@pytest.mark.parametrize("target", [None, 1])
def test_a_map_of_one_pixel_is_classification(target):
    class Flat(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).flatten(1)

    model = PixelNet(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) * 4)
    x = grey(60, (1, 1))
    y = torch.randint(0, 3, (60, 1, 1), generator=torch.Generator().manual_seed(2))
    attack = StochasticPGD(eps=0.05, target=target, steps=10, batch_size=8, probe_starts=2, probe_start_steps=5)
    maps, images = attack.craft(model, dataset(x, y)), attack.craft(Flat(model), dataset(x, y.flatten()))
    assert torch.equal(maps.delta, images.delta)
    assert maps.about.restarts == images.about.restarts
    assert maps.delta.any()


def test_hidden_pixels_take_the_class_of_the_nearest_other_pixel():
    draw = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (40, 7, 9), generator=draw)
    maps[:20] = torch.where(torch.rand(20, 7, 9, generator=draw) < 0.7, 2, maps[:20])
    maps[0], maps[1], maps[1, 0, 0] = 2, 2, 1
    valid = torch.rand(maps.shape, generator=draw) < 0.9
    target = Target.parse("hide:2")
    targets, hidden = target.reach(maps, valid)
    assert torch.equal(hidden, (maps == 2) & valid)
    places = torch.cartesian_prod(torch.arange(7), torch.arange(9)).double()
    distances = torch.cdist(places, places).square().round().long()
    for own, found, counts in zip(maps.flatten(1), targets.flatten(1), valid.flatten(1), strict=True):
        sources = (own != 2) & counts
        for pixel in range(63):
            if not counts[pixel] or not bool(sources.any()):
                assert found[pixel] == NOTHING
            elif own[pixel] != 2:
                assert found[pixel] == own[pixel]
            else:
                near = distances[pixel].masked_fill(~sources, 10**6)
                assert int(found[pixel]) in own[near == near.min()].tolist()
    plain, weights = target.maps(maps, valid, omega=0.75)
    assert torch.equal(plain, targets)
    assert torch.equal(weights, torch.where(targets == NOTHING, 0.0, torch.where(hidden, 0.75, 0.25)))


def test_no_pixel_is_nearest_across_a_border():
    line = torch.tensor([[[0, 0, 0, 1, 1, 3]]])
    assert Target.parse("hide:0").reach(line)[0].tolist() == [[[1, 1, 1, 1, 1, 3]]]


def test_every_image_keeps_its_own_targets_in_every_batch_and_predictions_are_made_once():
    model, x, y = four_classes(size=(3, 4))
    x[3], y[3] = x[3, :, :1, :1], y[3, 0, 0]  # the second image of train is of one class
    hide = int(y[3, 0, 0])
    y[::6, 0] = IGNORED
    data = dataset(x, y, tuple("abcd"))
    attack = StochasticPGD(
        eps=0.1, target=f"hide:{hide}", omega=0.8, steps=9, batch_size=7, probe_starts=0, temperature=1
    )
    with pytest.warns(DataWarning, match="1 of the 20 training images show nothing but the class to hide"):
        uap = attack.craft(model, data)
    assert uap.about.left_out == 1
    assert uap.about.forwards <= 9 * 7 + 20 + 20 + 20  # the steps, and both splits clean, and validation once more
    assert uap.about.settings["labels"] == "prediction"
    seen = 0
    with warnings.catch_warnings(action="ignore"), attack._crafting(model, data, 0) as context:
        for images, labels, rows in itertools.islice(context.batches(7, 1), 9):
            targets, weights = context.aims(images, labels, rows)
            expected, own = Target.parse(f"hide:{hide}").maps(model(images).argmax(1), labels != IGNORED, omega=0.8)
            assert torch.equal(targets.where(labels != IGNORED, NOTHING), expected)
            assert torch.equal(weights, own)
            seen += len(images)
            assert not any(torch.equal(image, data.train.images[1]) for image in images)
    assert seen > 40


def test_a_static_target_is_stored_and_can_be_run_again(tmp_path):
    model, _, data = linear_data()
    first = StochasticPGD(eps=0.1, target="static:2", **FAST).craft(model, data)
    assert torch.equal(first.target_map, model(data.validation.take(slice(2, 3))[0]).argmax(1)[0])
    assert first.about.settings["target"] == "static:2"
    first.save(tmp_path / "uap.safetensors")
    back = UniversalPerturbation.load(tmp_path / "uap.safetensors")
    assert back.about == first.about
    assert torch.equal(back.target_map, first.target_map)
    settings = back.about.settings | {"target": back.target}
    again = StochasticPGD(**settings).craft(model, data)
    assert torch.equal(again.delta, first.delta)
    assert again.about.target_hash == first.about.target_hash is not None
    other = StochasticPGD(**settings | {"target": 1 - back.target_map}).craft(model, data)
    assert other.about.target_hash != first.about.target_hash
    with pytest.raises(UserError, match=r"is a label map that was given as a tensor: give it again"):
        StochasticPGD(**other.about.settings)
    truth = StochasticPGD(eps=0.1, target="static:2", labels="truth", **FAST).craft(model, data)
    assert torch.equal(truth.target_map, data.validation.labels[2])
    hidden = StochasticPGD(eps=0.1, target="hide:a", **FAST).craft(model, data)
    hidden.save(tmp_path / "hidden.safetensors")
    back = UniversalPerturbation.load(tmp_path / "hidden.safetensors")
    assert (back.target_map, str(back.target)) == (None, "hide:a")
    assert torch.equal(StochasticPGD(**back.about.settings).craft(model, data).delta, hidden.delta)


def test_a_target_of_a_picture_and_its_holes(tmp_path):
    model, w, data = linear_data()
    goal = pattern().byte()
    goal[1, 1] = IGNORED
    Image.fromarray(goal.numpy()).save(tmp_path / "goal.png")
    uap = StochasticPGD(eps=0.1, target=f"static:{tmp_path / 'goal.png'}", **FAST).craft(model, data)
    assert not uap.delta[0, :, 1, 1].any()
    toward = (2 * goal.long() - 1)[None] * w[:, None, None].sign() * 0.1
    toward[:, 1, 1] = 0
    torch.testing.assert_close(uap.delta[0], toward)
    assert uap.target_map[1, 1] == NOTHING


@pytest.mark.parametrize("make", [SGA, DFUAP])
@pytest.mark.parametrize("target", ["static", "hide:0"])
def test_the_other_targeted_attacks_reach_the_same_optimum(make, target):
    model, w, data = linear_data()
    goal = torch.ones(4, 5).long() if target == "static" else target
    settings = {"confidence": 50.0} if make is DFUAP else {"tau": 1.0, "inner_batch": 5}
    settings |= {} if target == "static" else {"omega": 0.5}
    uap = make(eps=0.05, target=goal, steps=40, batch_size=10, **settings).craft(model, data)
    torch.testing.assert_close(uap.delta[0], 0.05 * w.sign()[:, None, None].expand(3, 4, 5), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("loss", ["segpgd", "cospgd", "mce", "mce-bal", "js", "margin", "dlr"])
def test_untargeted_losses_of_pixels_break_what_can_be_broken(loss):
    model, w, _ = linear_data()
    x = grey(60, (4, 5)).mean((2, 3), keepdim=True).expand(60, 3, 4, 5) + 0.01 * grey(60, (4, 5), seed=4)
    x = x[model(x).diff(dim=1).flatten(1).gt(0).all(1)]  # all pixels of class 1: one direction is best
    data = dataset(x, model(x).argmax(1), ("a", "b"))
    attack = StochasticPGD(eps=0.02, loss=loss, steps=40, batch_size=6, probe_starts=0, truncate=None)
    uap = attack.craft(model, data)
    margins = model(data.validation.take(slice(None))[0]).detach().diff(dim=1)[:, 0]
    broken = float((margins < 0.02 * w.abs().sum()).float().mean())
    assert 0.1 < broken < 0.95
    assert uap.about.restarts[0][1] == pytest.approx(broken, abs=0.02)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("hide:road", "unknown class 'road'"),
        ("hide:2", "target 2 is not a class: expected 0 to 1"),
        ("static:20", r"target static:20: maps/1 has 20 images, expected 0 to 19"),
        (torch.zeros(4, 6).long(), "is a map of 4x6 pixels, but the label maps of maps/1 have 4x5"),
        (torch.full((4, 5), 7), "holds classes from 7 to 7, but there are 2: expected 0 to 1"),
        (torch.zeros(4, 5), "a target map has shape .* and type float32: expected class indices"),
        ("static:missing.png", "missing.png cannot be read as a PNG of class indices"),
        ("hide:", "expected class:CLASS, static:IMAGE or hide:CLASS"),
        ("lift:3", "expected class:CLASS, static:IMAGE or hide:CLASS"),
        ("road", "expected class:CLASS, static:IMAGE or hide:CLASS"),
        (-1, "greater than or equal to 0"),
        (1.5, "expected class:CLASS, static:IMAGE or hide:CLASS"),
        (True, "expected class:CLASS, static:IMAGE or hide:CLASS"),
    ],
)
def test_bad_targets_are_refused_in_one_sentence(target, words):
    model, _, data = linear_data()
    with pytest.raises(UserError, match=words):
        StochasticPGD(eps=0.1, target=target, probe_starts=0, steps=1).craft(model, data)


def test_what_does_not_fit_data_or_model_is_refused():
    model, _, data = linear_data()
    with pytest.raises(UserError, match="tile = 5x5 is larger than the images of 4x5 pixels"):
        StochasticPGD(eps=0.1, tile=(5, 5)).craft(model, data)
    with pytest.raises(UserError, match="a step in norm 1 moves single pixels"):
        StochasticPGD(eps=5, norm="1", tile=(2, 2))
    x, y = data.train.images, data.train.labels
    ghost = dataset(x, y, ("a", "b", "ghost"))
    three = PixelNet(torch.cat([model.weight, torch.zeros(1, 3)]), [0.0, 0.0, -9.0])
    for target in ("class:ghost", 2):
        with pytest.warns(DataWarning, match="no pixel of maps/0 is labelled 'ghost': a model trained on these"):
            StochasticPGD(eps=0.1, target=target, probe_starts=0, steps=1).craft(three, ghost)
    for labels, seen in (("prediction", "predicted"), ("truth", "labelled")):
        with pytest.raises(UserError, match=f"no pixel of maps/0 is {seen} 'ghost': name another class to hide"):
            StochasticPGD(eps=0.1, target="hide:ghost", labels=labels).craft(three, ghost)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        StochasticPGD(eps=0.1, target="class:b", probe_starts=0, steps=1).craft(three, ghost)
        StochasticPGD(eps=0.1, target=2, probe_starts=0, steps=1).craft(three, x)  # labels are predictions
    with torch.no_grad():
        model.bias += torch.tensor([9.0, -9.0])
    with pytest.raises(UserError, match="no pixel of maps/0 is predicted 'b': name another class to hide"):
        StochasticPGD(eps=0.1, target="hide:b").craft(model, data)
    with pytest.raises(UserError, match="every pixel of maps/0 is predicted 'a': name another class to hide"):
        StochasticPGD(eps=0.1, target="hide:a").craft(model, data)
    flat = dataset(grey(30, (1, 1)), torch.arange(30) % 2)
    for target in ("hide:0", "static:1", torch.zeros(1, 1).long()):
        with pytest.raises(UserError, match="maps/1 has one label per image, and this needs label maps"):
            StochasticPGD(eps=0.1, target=target).craft(nn.Sequential(model, nn.Flatten()), flat)


def test_every_registered_attack_works_on_label_maps_or_refuses_at_once():
    """Untargeted attacks raise the error of pixels, or say what they lack; none fails otherwise."""
    _, x, y = four_classes(60, (8, 8))
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    few = {"steps": 8, "batch_size": 10, "patterns": 6, "images": 12, "passes": 1, "probe_starts": 0, "restarts": 1}
    few |= {"queries": 2000}
    with torch.no_grad():  # the colours' distances, computed by a convolution
        model, _, _ = four_classes(1)
        net[0].weight.copy_(torch.eye(3).repeat(3, 1)[:8, :, None, None])
        net[0].bias.zero_()
        net[2].weight.zero_()
        net[2].weight[:, :3].copy_(model.weight[:, :, None, None])
        net[2].bias.copy_(model.bias)
    data, refused = dataset(x, y, tuple("abcd")), []
    assert net(x).argmax(1).eq(y).all()
    for name in attacks.names("universal"):
        known = attacks.entry(name).settings
        attack = attacks.create(name, eps=0.3, **{key: few[key] for key in few if key in known})
        try:
            uap = attack.craft(net, data)
        except UserError as error:
            refused.append((name, str(error)))
            continue
        assert uap.delta.shape == (1, 3, 8, 8)
        assert max(rate for _, rate in uap.about.restarts) > 0.2, name
        if "target" in known:
            for target in ("hide:b", "static:2", 3):
                settings = {"target": target} | {key: few[key] for key in few if key in known}
                settings |= {"omega": 0.75} if "omega" in known and target == "hide:b" else {}
                aimed = attacks.create(name, eps=0.3, **settings).craft(net, data)
                found = target_success(net, data.validation, aimed)
                assert found.score == pytest.approx(max(rate for _, rate in aimed.about.restarts))
                assert found.score > (0.52 if target == "hide:b" else 0.27) or not attack.gradients, (name, target)
    assert [name for name, _ in refused] == ["deepfool-uap", "universal-patch"]
    assert "expects one label per image (N,)" in refused[0][1]
    assert "a patch hides what a label map tells" in refused[1][1]


def test_several_models_have_one_target_from_their_mean():
    model, _, data = linear_data()
    other = PixelNet(model.weight.detach().flip(0) * 0.5, model.bias.detach().flip(0))
    attack = StochasticPGD(eps=0.1, target="hide:a", **FAST)
    with Victim(model) as one, Victim(other) as two, attack._crafting([one, two], data, 0) as context:
        mean = (model(data.train.images) + other(data.train.images)).argmax(1)
        assert torch.equal(context.predictions(context.train), mean)


def test_a_number_that_is_another_class_s_name_is_no_index():
    """Folders 0, 1, 10, 2 are classes 0 to 3, so that 2 is a name of one and the index of another."""
    images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) % 4
    split = Split("folders", images, labels, ("0", "1", "10", "2"))
    for text in ("class:2", "2"):
        with pytest.raises(
            UserError, match=r"the class called 2, whose index is 3, or index 2, whose class is called 10"
        ):
            Target.of(text).within(split)
    assert Target.of("class:10").within(split).index == 2  # there is no index 10
    for meant in ("class:#2", 2):
        found = Target.of(meant).within(split)
        assert found.index == 2
        assert found.called(split.classes) == "class:#2 (10)"
        assert Target.of(str(found)).within(split) == found  # as it is stored
    assert Target.of("1").within(split).called(split.classes) == "class:1"
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    old = StochasticPGD(eps=0.1, steps=1, target=2).craft(net, split)
    old.about = old.about.model_copy(update={"settings": {"target": "hide:2"}})  # an index, of earlier versions
    assert old.target == Target.of("hide:#2")
    assert attacks.create("stochastic-pgd", eps=0.1, target="class:2").plain()["target"] == "class:2"
    assert attacks.create("stochastic-pgd", eps=0.1, target=2).plain()["target"] == 2
