"""AutoAttack's flags as published, its accounting, and what counts as overstated."""

import importlib.util

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.evaluation import Rate
from gambeson.testbed import Judgement
from gambeson.testbed.judgement import overstates
from gambeson.testbed.outside import flags_of_forward, with_flags, zero_gradients
from gambeson.testbed.truth import GroundTruth


class Flat(nn.Module):
    """Logits that are the first four pixels, followed by a function of them."""

    def __init__(self, then=lambda z: z):
        super().__init__()
        self.then = then

    def forward(self, x):
        return self.then(x.flatten(1)[:, :4])


def images(rows):
    return torch.tensor(rows).view(len(rows), 1, 2, 2)


X, Y = images([[0.9, 0.2, 0.1, 0.0], [0.1, 0.8, 0.3, 0.2]]), torch.tensor([0, 1])


def guided(z):
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        return z + torch.autograd.grad(at.sum(), at)[0]


@pytest.mark.parametrize(
    ("then", "flags"),
    [
        (lambda z: z, []),
        (lambda z: z.softmax(1), ["softmax output"]),
        (lambda z: 2 * z.softmax(1), []),
        (lambda z: z + 1e-6 * torch.randn_like(z), []),  # too little to be seen
        (lambda z: z + 1e-2 * torch.randn_like(z), ["randomised"]),
        (guided, ["dynamic"]),
    ],
)
def test_the_flags_before_the_attack(then, flags):
    assert flags_of_forward(Flat(then), X, Y) == flags


def test_zero_gradients_are_counted_per_image():
    def rounded_first(z):
        return torch.cat([z[:1].round() + 0 * z[:1], z[1:]])

    assert zero_gradients(Flat(), X, Y, 0.05) == 0
    assert zero_gradients(Flat(rounded_first), X, Y, 0.05) == 1


def falling(falls):
    """An attack that exchanges the two largest pixels of the first images that are left, as many as each member may."""

    def attack(name, x, y):
        moved = x.clone()
        moved[: falls[name]] = moved[: falls[name]].flip(-1)
        return moved

    return attack


def test_members_attack_what_is_left_and_square_is_told_from_the_others():
    x, y = X.repeat(10, 1, 1, 1), Y.repeat(10)
    falls = {"apgd-ce": 5, "apgd-t": 3, "fab-t": 0, "square": 0}
    found = with_flags(Flat(), falling(falls), x, y, 0.05)
    assert found.trusted
    assert found.accuracy == Rate.of(12, 20)
    found = with_flags(Flat(), falling(falls | {"square": 1}), x, y, 0.05)
    assert (found.trusted, found.reasons) == (False, ["Square helps"])
    assert found.accuracy == Rate.of(11, 20)
    silent = with_flags(Flat(lambda z: z.detach()), falling(falls), x, y, 0.05)
    assert not silent.trusted
    assert silent.reasons[0].startswith("AutoAttack failed: RuntimeError")
    assert with_flags(Flat(), falling(dict.fromkeys(falls, 20)), x, y, 0.05).accuracy.value == 0


def truth(accuracy, uer):
    return GroundTruth(eps=0.1, clean=Rate.of(90, 100), accuracy=accuracy, uer=uer, how="by hand")


def test_overstated_is_clearly_better_than_the_truth_and_trusted():
    known = truth(Rate.of(10, 100), Rate.of(50, 100))
    assert overstates(Judgement(accuracy=Rate.of(60, 100)), known)
    assert not overstates(Judgement(accuracy=Rate.of(60, 100), trusted=False), known)
    assert not overstates(Judgement(accuracy=Rate.of(15, 100)), known)  # the intervals meet
    assert overstates(Judgement(accuracy=Rate.of(10, 100), uer=Rate.of(10, 100)), known)  # one number is enough
    assert not overstates(Judgement(accuracy=Rate.of(0, 100), uer=Rate.of(60, 100)), known)
    assert overstates(Judgement(), known)  # trusted, and nothing said against it
    assert not overstates(Judgement(robust=False), known)
    assert overstates(Judgement(robust=True, accuracy=Rate.of(0, 100)), known)


def test_a_score_counts_what_is_overstated():
    found = gb.testbed.score("pgd", models=["four grey levels", "final ReLU", "standard"])
    assert [outcome.overstated for outcome in found.outcomes] == [True, False, False]
    assert found.overstated == Rate.of(1, 2)


@pytest.mark.skipif(importlib.util.find_spec("pyautoattack") is not None, reason="the package is there")
def test_a_missing_package_is_no_judgement():
    with pytest.raises(gb.UserError, match=r"pip install 'gambeson\[bench\]'"):
        gb.testbed.score("autoattack", models=["standard"])
