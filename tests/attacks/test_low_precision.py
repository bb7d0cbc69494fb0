"""Models and images below float32: success is that of the model itself, and no image leaves its ball."""

import pytest
import torch
from torch import nn

from gambeson.attacks import PGD, AutoPGD, Square
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
