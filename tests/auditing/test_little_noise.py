"""Noise below what moves an answer switches no check off: each finds what it finds without it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from gambeson.auditing import DIAGNOSTICS, steadiness
from gambeson.auditing.context import Checkpoints
from gambeson.auditing.stages import adaptive
from gambeson.victim import inspect_model
from gambeson.victim.inspect import size_of
from tests.auditing.evidence import Around, Bent, held
from tests.conftest import full

CHECKS = {check.name: check for check in DIAGNOSTICS}
EPS = 0.15


class Shielded(nn.Module):
    """A network with a little noise on its images, its logits or its weights."""

    def __init__(self, net, where="logits", size=1e-5, own=False):
        super().__init__()
        self.net, self.where, self.size, self.own = net, where, size, np.random.default_rng(0) if own else None

    def noise(self, like):
        if self.own is not None:  # which no seed of torch fixes
            return self.size * torch.tensor(self.own.normal(size=like.shape), dtype=like.dtype)
        return self.size * torch.randn_like(like)

    def forward(self, x):
        if self.where == "weights":
            return functional_call(self.net, {name: w + self.noise(w) for name, w in self.net.named_parameters()}, (x,))
        z = self.net(x + self.noise(x) if self.where == "images" else x)
        return z + self.noise(z) if self.where == "logits" else z


class Replaying(nn.Module):
    """An image near one that was seen gets its answer, with the gradient of its own."""

    def __init__(self, net, kept=None):
        super().__init__()
        self.net, self.kept, self.own = net, kept, []

    def forward(self, x):
        z, kept = self.net(x), self.own if self.kept is None else self.kept()
        given = z.detach().clone()
        for row, image in enumerate(x.detach()):
            known = [said for seen, said in kept[-20:] if float((seen - image).abs().max()) < 0.02]
            if known:
                given[row] = known[0]
            else:
                kept.append((image.clone(), z[row].detach()))
        return given + (z - z.detach())


def snapped(net, x):
    """Pixels that are eps away from a grey level of the digits are put back, straight through."""
    back = x
    for sign in (-1, 1):
        level = ((x - sign * EPS) * 16).round() / 16
        back = torch.where(((x - sign * EPS - level).abs() < 1e-4) & (level >= 0) & (level <= 1), level, back)
    return net(x + (back - x).detach())


def ordered(net, x):
    odd = (torch.arange(len(x)) % 2 == 1).view(-1, 1, 1, 1)
    return net(torch.where(odd, F.avg_pool2d(x, 3, 1, 1), x))


def masked(net, x):
    """The batch's mean image taken out, and all logits but the best two put far below."""
    z = net(x - x.mean(0, keepdim=True) + 0.3)
    return torch.where(z < z.topk(2, 1).values[:, 1:], z - 1e9, z)


def bent(bend):
    return lambda net, x: net(Bent.apply(x, bend))


def half(gradient):
    return gradient * (torch.arange(gradient.shape[-1]) % 2)


FOUND = {
    "no vanishing gradients": lambda net, x: net((x * 3).round() / 3),
    "gradient matches finite differences": bent(torch.neg),
    "gradient complete": bent(half),
    "independent of the batch": lambda net, x: net(x - x.mean(0, keepdim=True) + 0.3),
    "gradient independent of the batch": lambda net, x: net(Bent.apply(x, torch.neg) if len(x) > 64 else x),
    "alike in every batch": ordered,
    "no weaker inside the ball": snapped,
    "unbounded attack succeeds": lambda net, x: 10 * F.one_hot(net(x).argmax(1), 10) + 0 * net(x),
    "white box beats queries": bent(lambda gradient: gradient.flip(-1)),
}
"""What each check finds, made of a network."""


def look(name, model, data):
    settings = {"surrogate": "none", "universal_steps": 5, "universal_probe_starts": 0, "queries": 100, "pgd_steps": 10}
    with held(model, data, (EPS,), **settings | ({"queries": 0} if name == "gradient complete" else {})) as seen:
        seen.victim.allow_no_graph = True
        if name == "gradient independent of the batch":
            steadiness.begin(seen, Checkpoints(None))
        if name == "gradient complete":
            seen.adaptive = adaptive.measure(seen)
        return CHECKS[name].function(seen)


SHIELDS = [("logits", 1e-5), full(("images", 1e-5, True)), full(("weights", 1e-3)), full(("logits", 1e-3, True))]


@pytest.mark.parametrize("shield", SHIELDS, ids=str)
@pytest.mark.parametrize("name", FOUND)
def test_a_little_noise_hides_nothing(name, shield, trained, digits):
    model = Around(Shielded(copy.deepcopy(trained), *shield), FOUND[name])
    found = look(name, model, digits)
    assert found.passed is False, found.detail


@pytest.mark.parametrize("shield", [("logits", 0.0), *SHIELDS], ids=str)
@pytest.mark.parametrize("shared", [True, full(False)], ids=["shared with its copies", "of its own"])
def test_a_little_noise_hides_no_memory(shared, shield, trained, digits):
    kept = []  # a function is not copied with a model
    model = Replaying(Shielded(copy.deepcopy(trained), *shield), (lambda: kept) if shared else None)
    assert look("stateless", model, digits).passed is False


def test_a_memory_that_only_leans_on_what_it_said_is_found(trained, digits):
    model = Around(Replaying(copy.deepcopy(trained)), lambda memory, x: 0.7 * memory(x) + 0.3 * memory.net(x))
    found = look("stateless", model, digits)
    assert found.passed is False
    assert "copies of the model" in found.detail


def test_a_little_noise_accuses_nobody(trained, digits):
    for name in ("stateless", *FOUND):  # each from its first draw on
        assert look(name, Shielded(copy.deepcopy(trained), "weights", 1e-3, True), digits).passed, name


@pytest.mark.parametrize("levels", [16, 48])
def test_a_coarse_model_is_not_said_to_remember(levels, trained, digits):
    model = Around(trained, lambda net, x: net(x + ((x * levels).round() / levels - x).detach()))
    found = look("stateless", model, digits)
    assert found.passed, found.detail
    assert found.numbers["same"] == 0.9  # whatever lies near the image that is asked for gets its answer


def test_masked_classes_hide_no_difference(trained, digits):
    found = look("independent of the batch", Around(trained, masked), digits)
    assert found.passed is False


def test_inspection_tells_a_little_noise_from_randomness(trained, digits):
    images, _ = digits.test.take(slice(0, 8))
    for size, random in ((1e-5, False), (1e-3, False), (0.3, True)):
        found = inspect_model(Shielded(trained, "logits", size), images)
        assert found.varies
        assert found.stochastic is random

    def steep(net, x):
        """Hardly any noise in the logits, and a gradient that is noise."""
        return net(x) + 100 * torch.randn(len(x), 10) * (x - x.detach()).sum((1, 2, 3))[:, None]

    assert inspect_model(Around(Shielded(trained), steep), images).stochastic
    far = inspect_model(
        Around(Shielded(trained, "logits", 0.3), lambda net, x: net(x) - 1e9 * F.one_hot(x[:, 0, 0, 0].long(), 10)),
        images,
    )
    assert far.stochastic


def test_the_size_of_logits_is_that_of_the_best_two_of_most_images():
    logits = torch.arange(8.0)[:, None] + torch.tensor([0.0, 10.0, -5.0])
    known = sorted([*range(8), *range(10, 18)])  # positions 2.25 and 12.75 of sixteen numbers
    assert float(size_of(logits)) == pytest.approx(known[12] + 0.75 - known[2] - 0.25)
    logits[0], logits[:, 2] = 1e6 * logits[0], -1e9
    assert float(size_of(logits)) < 20
