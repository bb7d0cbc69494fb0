"""Models and images below float32: success is that of the model itself, and no image leaves its ball."""

import copy

import pytest
import torch
from torch import nn

from gambeson.attacks import NES, PGD, AutoPGD, DeepFool, Loss, RayS, Square
from gambeson.threat import Ball, landed
from gambeson.victim import FastPath, Victim


@pytest.fixture(scope="module")
def blurred():
    """A network with more answers near a boundary than bfloat16 can tell, and the images it is right on."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = nn.Sequential(nn.Flatten(), nn.Linear(50, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
        x = torch.rand(600, 2, 5, 5)
    with torch.no_grad():
        net[-1].weight.mul_(20)
        net[-1].bias.sub_(net(x).mean(0))
        return net, x, net(x).argmax(1)


def left(net, x, y, attack, precision):
    with Victim(net, fast=FastPath(precision=precision)) as victim:
        moved = attack(victim, x, y, seed=3)
    with torch.no_grad():
        return int((net(moved).argmax(1) == y).sum())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.008, steps=40, rel_step_size=0.05, start="zero"),
        PGD(eps=0.06, steps=40, rel_step_size=0.05, start="zero", norm="2"),
        AutoPGD(eps=0.008, steps=30, rel_step_size=0.1),
        Square(eps=0.008, queries=80),
    ],
    ids=str,
)
def test_what_falls_in_low_precision_alone_is_attacked_further(blurred, attack, precision):
    exact, coarse = (left(*blurred, attack, kind) for kind in ("float32", precision))
    assert 60 < exact < 560
    assert abs(coarse - exact) <= 2


def test_an_ensemble_is_as_coarse_as_its_coarsest_member(blurred):
    net, x, y = blurred
    attack = PGD(eps=0.008, steps=40, rel_step_size=0.05, start="zero")
    with Victim(net) as fine, Victim(net, fast=FastPath(precision="bfloat16")) as coarse:
        moved = attack([fine, coarse], x, y)
    with torch.no_grad():
        assert abs(int((net(moved).argmax(1) == y).sum()) - left(net, x, y, attack, "float32")) <= 2


def test_what_has_fallen_is_asked_once_more_and_float32_never(blurred):
    net, x, y = blurred
    for precision, more in (("float32", 0), ("bfloat16", 600)):
        with Victim(net, fast=FastPath(precision=precision)) as victim:
            AutoPGD(eps=0.0, steps=1)(victim, x, (y + 1) % 4)  # every image is adversarial as it is
            assert victim.forwards == 600 + more


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.03, early_stop=False),
        PGD(eps=0.3, norm="2", early_stop=False),
        PGD(eps=0.9, norm="1", early_stop=False),
        AutoPGD(eps=0.03, steps=5, early_stop=False),
        Square(eps=0.03, queries=30),
        NES(eps=0.03, queries=120),
        RayS(eps=0.03, queries=30),
        DeepFool(eps=0.02, norm="inf"),
        DeepFool(eps=0.05),
    ],
    ids=str,
)
def test_images_in_half_precision_stay_in_the_ball(blurred, attack, kind):
    net, x, y = blurred
    x = x[:50].to(kind)
    moved = attack(net, x, y[:50])
    ball = Ball(eps=attack.eps, norm=getattr(attack, "norm", "2"))
    length = ball.length(moved.double() - x.double())
    assert moved.dtype == kind
    assert float(length.max()) <= attack.eps * (1 + 1e-6)
    assert float(length.max()) > 0.5 * attack.eps


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_values_land_on_the_nearest_number_that_is_not_further_from_the_image(kind):
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(50, 1, 20, 20, generator=draw).to(kind)
    images[:5], images[5:10] = 0, 1
    moved = (images + 0.1 * torch.randn(images.shape, generator=draw)).clamp(0, 1)
    found = landed(images, moved)
    exact, near = found.double(), moved.to(kind)
    assert bool(((exact - images).abs() <= (moved.double() - images).abs()).all())
    inside = (near.double() - images).abs() <= (moved.double() - images).abs()
    assert torch.equal(found[inside], near[inside])
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    spacing = torch.finfo(kind).eps
    assert bool(((exact - moved.double()).abs() <= spacing * moved).all())
    assert torch.equal(landed(images, images.float()), images)


class Autocast(nn.Module):
    """A network that turns autocast on by itself."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.float16):
            return self.net(x)


HALVES = {
    "weights": lambda net: (copy.deepcopy(net).half(), None),
    "autocast of its own": lambda net: (Autocast(net), None),
    "autocast of the attack": lambda net: (net, FastPath(precision="float16")),
}


@pytest.mark.parametrize("kind", HALVES)
def test_float16_hides_no_gradient_of_an_image_that_the_model_is_sure_about(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
        x, cotangents = torch.rand(200, 1, 8, 8), torch.randn(3, 200, 4)
    net[-1].weight.data.mul_(150)
    with torch.no_grad():
        y = net(x).argmax(1)

    def gradients(model, fast):
        point, shared = x.clone().requires_grad_(), torch.zeros(1, 1, 8, 8, requires_grad=True)
        with Victim(model, fast=fast or False) as victim:
            each = victim.gradient(Loss()(victim(point), y).sum(), point, len(x))
            of_all = victim.gradient(Loss()(victim(x + shared), y).sum(), shared, len(x))
            several = victim.gradient(victim(point), point, len(x), cotangents, batched=True)
        return each, of_all, several

    model, fast = HALVES[kind](net)
    exact, found = gradients(net, None), gradients(model, fast)
    size = exact[0].flatten(1).abs().amax(1)
    assert 20 < int((size < 1e-9).sum()) < 180  # float16 alone would have none
    apart = (found[0] - exact[0]).flatten(1).abs().amax(1) / size
    assert apart.quantile(0.9) < 0.1
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
        assert 0.9 < float(one.norm() / other.norm()) < 1.1
